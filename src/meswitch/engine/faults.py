"""A step whose numbers are not finite: which requests did it, and what the others' answer is.

Attention runs over the keys and values of the whole batch. A mask hides one request's from another's, but NaN times
zero is NaN: one expert that overflows would take every other request of the step with it. Such a step is computed
again, with the base's weights for the requests in question. That is done only after it has happened; a healthy step
pays for one look at its results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meswitch.engine.context import BASE_SLOT
from meswitch.engine.sampling import not_finite


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the batch.

    Args:
        requests: ids, in the batch's order. slots: their experts'. lengths: how many tokens of each are in the step.
        started: whether some request has several tokens here and others in the cache already.
        place: gives the tokens of each request to a slot.
    """

    requests: Sequence[str]
    slots: Sequence[int]
    lengths: Sequence[int]
    started: bool
    place: Callable[[Sequence[int]], None]


class FaultIsolation:
    """Looks at the results of every step of a model.

    Args:
        model: a causal language model on continuous batching.
        fail: is told a request's id and why it cannot go on.
    """

    def __init__(self, model: Any, fail: Callable[[str, str], None]) -> None:
        self.step: Step | None = None
        self._model = model
        self._fail = fail
        self._reason = not_finite(model.dtype)
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        # A window overwrites its oldest keys and values: a step that read them cannot be computed twice.
        windows = getattr(config, "sliding_window", None) if kinds is None else set(kinds) - {"full_attention"}
        self._repeatable = not windows
        self._tokens_finite = torch.ones(1, dtype=torch.bool)
        self._hooks = [
            model.base_model.register_forward_hook(self._look),
            model.register_forward_hook(self._after_step, with_kwargs=True),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep which tokens' last hidden states are finite: [1, tokens], on the device."""
        self._tokens_finite = output[0].isfinite().all(-1)

    def _after_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        step, self.step = self.step, None
        if step is None or self._healthy(step):
            return None
        everyone = set(range(len(step.requests)))

        def run(real: set[int]) -> Any:
            """The step with these requests' own weights, and with the base's for the others."""
            step.place([slot if i in real else BASE_SLOT for i, slot in enumerate(step.slots)])
            return model.forward(*args, **kwargs)

        def broken(suspects: list[int]) -> set[int]:
            """Those of the suspects whose weights break the step."""
            if suspects:
                run(set(suspects))
            if not suspects or self._healthy(step):
                return set()
            half = len(suspects) // 2
            return set(suspects) if not half else broken(suspects[:half]) | broken(suspects[half:])

        bad, reason = everyone, self._reason
        if self._repeatable or not step.started:
            bad = broken([i for i in everyone if step.slots[i] != BASE_SLOT])
            output = run(everyone - bad)
            if not self._healthy(step):  # the base itself, or what two do together
                bad = everyone
        elif len(everyone) > 1:
            reason = "the numbers of a step that it shared are not finite, and whose they are cannot be told; ask again"
        for i in sorted(bad):
            self._fail(step.requests[i], reason)
        output.logits.nan_to_num_(nan=0.0, posinf=0.0)  # what is chosen for those is thrown away
        return output

    def _healthy(self, step: Step) -> bool:
        return bool(self._tokens_finite[0, : sum(step.lengths)].all())
