"""What is proven when an engine opens, before anybody is answered.

1. The running batch runs the base, and gives the logits that the model alone gives.
2. For every kind of block, and every module outside of blocks, that carries a delta: in one step that mixes two experts
   and the base, each one's rows come out as those of the same block with that expert's merged weights. The merged
   weights are read from the artifact, not from the slot: what is proven is the whole way.

One block of a kind is proven, not all layers; it costs two experts' weights of one block.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meswitch.artifact import Artifact
from meswitch.codec import Delta
from meswitch.engine.attach import Attachment, Survey
from meswitch.engine.attention import PAGE
from meswitch.engine.batching import Batch
from meswitch.engine.context import BASE_SLOT, Rows, Switch
from meswitch.engine.layers import Switchable, SwitchableEmbedding
from meswitch.engine.parameters import ExpertParameters, StoredTensors
from meswitch.engine.sampling import SamplingParams, not_finite
from meswitch.errors import MeswitchError
from meswitch.ops.routing import MAX_TOKENS
from meswitch.slots import ExpertStore

Steps = Literal["eager", "tokens", "prompts"]  # computed without tables; from tables, of single tokens or of prompts
LENGTHS = (7, 5, 9)  # tokens of the trial's requests; no two sums of them are alike
NEW_TOKENS = 3
TEXT = PAGE + 9  # tokens of a text of more than one page, with its continuation
PROOF_PAGES = 4  # that the prompts of `prove` take together
_PROMPTS = 8  # of a step of many rows, at least: of a page each, they fill the largest graph
_PATIENCE = 600  # seconds for a step of a large model on a slow machine
# In float32 nothing but the order of sums differs. In 16 bit what is lost in rounding is as large as a small delta:
# there the part of the difference that points the expert's way must be the expert's.
_EXACT, _ALONG = 0.01, 0.15
# Of the norm of logits, in 16 bit: two ways to sum attention differ by so much after many layers of random weights. A
# wrong page makes another text of it.
_OTHER_SUMS = 0.2


@dataclass(frozen=True, slots=True)
class Trial:
    """Requests that are run to see how a model runs them.

    Args:
        prompts: token ids of each.
        wanted: logits that the base alone gives for the first prompt's next tokens.
        tokens: what they are, greedily.
        exact: computed in float32.
    """

    prompts: tuple[list[int], ...]
    wanted: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    exact: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, vocabulary: int) -> "Trial":
        """Run the model alone, before anything else is done with it.

        Raises:
            MeswitchError: it cannot be run.
        """
        generator = torch.Generator().manual_seed(0)
        prompts = tuple(torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS)
        ids, wanted, tokens = list(prompts[0]), [], []
        device = next(model.parameters()).device
        try:
            for _ in range(2):
                logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float()
                wanted.append(logits)
                tokens.append(int(logits.argmax()))
                ids.append(tokens[-1])
        except Exception as error:  # whatever a model raises
            raise MeswitchError(f"{type(model).__name__}: cannot be run: {_line(error)}") from error
        return cls(prompts, tuple(wanted), tuple(tokens), model.dtype == torch.float32)

    def fault(self, found: Sequence[Tensor]) -> str | None:
        """How logits of the first prompt's next tokens, greedily chosen, differ from the model's own.

        Args:
            found: [vocabulary] for each token.
        """
        error = _too_far(zip(self.wanted, found, strict=False), 0.001 if self.exact else 0.1)
        return error and f"its logits differ from those of the model alone by {error} of their norm"


def run(
    batch: Batch, name: str, prompts: Sequence[list[int]], slots: Sequence[int], new_tokens: int = NEW_TOKENS
) -> None:
    """Run a few steps of the batch with requests of these slots.

    Args:
        name: what the requests' ids begin with; their number follows.
        new_tokens: of each request.

    Raises:
        MeswitchError: the batch could not run them.
    """
    done = threading.Event()
    errors: list[str] = []
    own_fault = not_finite(batch.dtype)  # of an expert: it fails by name when it is asked
    left = set(range(len(prompts)))

    def listen(number: int) -> Callable[[list[int], bool, str | None], None]:
        def told(tokens: list[int], finished: bool, error: str | None) -> None:
            if error is not None and error != own_fault:
                errors.append(error)
            if finished:
                left.discard(number)
            if not left:
                done.set()

        return told

    params = SamplingParams(max_new_tokens=new_tokens)
    with batch.together():
        for number, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            batch.submit(f"{name}-{number}", prompt, slot, params, [], listen(number))
    if not done.wait(_PATIENCE):
        raise MeswitchError(f"no answer within {_PATIENCE} s")
    if errors:
        raise MeswitchError(errors[0].partition("\n")[0])


def batch_runs_base(batch: Batch, trial: Trial, watching: contextlib.AbstractContextManager[Any], name: str) -> None:
    """See that the running batch gives what the model alone gives.

    Args:
        watching: entered while the batch runs, such as a survey that sees how the modules are called.
        name: of this run.

    Raises:
        MeswitchError: it cannot, or gives something else.
    """
    with _seen(batch) as found, watching:
        run(batch, name, trial.prompts, [BASE_SLOT] * len(trial.prompts))
    fault = trial.fault(found.get(0, []))
    if fault is not None:
        raise MeswitchError(fault)


@contextlib.contextmanager
def without_weights(model: nn.Module, parts: Iterable[str]) -> Iterator[None]:
    """Take the weights of parts of a model away for a while: whatever reads them then gives NaN, or fails."""
    taken: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in parts:
            for module in model.get_submodule(part).modules():
                tables: list[dict[str, Any]] = [module._parameters, module._buffers]
                for table in tables:
                    for name, value in table.items():
                        if value is not None:
                            taken.append((table, name, value))
                            empty = value.to("meta")
                            if value.is_floating_point():
                                nan = torch.full((), torch.nan, dtype=value.dtype, device=value.device)
                                empty = nan.expand(value.shape)
                            is_parameter = isinstance(value, nn.Parameter)
                            table[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        yield
    finally:
        for table, name, value in taken:
            table[name] = value


@dataclass(frozen=True, slots=True)
class Proof:
    """Compares every kind of wrapped block with itself under merged weights.

    Args:
        model: the base with its wrappers.
        batch: that runs it.
        switch: whose tokens are where.
        attachment: what was wrapped.
        stored: how stored tensors become parameters.
        survey: how modules are called.
        store: of the experts.
    """

    model: Any
    batch: Batch
    switch: Switch
    attachment: Attachment
    stored: StoredTensors
    survey: Survey
    store: ExpertStore

    def faults(self, artifacts: Mapping[str, Artifact], trial: Trial, steps: Steps = "eager") -> list[str]:
        """Run steps with experts in them.

        Args:
            artifacts: of the experts.
            steps: which to look at.

        Returns:
            what does not agree, a line each: module, class and reason; empty if all do.
        """
        units = _units(self.model, self.attachment, self.stored)
        if not units:
            return []
        reasons: list[str] = []
        for number, names in enumerate(_rounds(units, artifacts, self.store.slot_count)):
            slots: dict[int, str] = {}
            try:
                for name in names:
                    slots[self.store.acquire(name)] = name
                witnesses = [
                    _Witness(unit, self.switch, self.survey, slots, artifacts, self.stored, steps != "eager")
                    for unit in units.values()
                ]
                order = [*slots, BASE_SLOT, *slots][: max(3, len(slots) + 1)]
                prompts = [list(trial.prompts[i % len(trial.prompts)]) for i in range(len(order))]
                if steps == "tokens":
                    prompts = [[prompt[place]] for place, prompt in enumerate(prompts)]
                elif steps == "prompts":  # of more rows than the fused kernel takes, and one of so many for itself
                    prompts = [
                        (prompt * MAX_TOKENS)[: 24 if place else MAX_TOKENS] for place, prompt in enumerate(prompts)
                    ]
                for prompt, slot in zip(prompts, order, strict=True):
                    if slot in slots:
                        _say_added(prompt, artifacts[slots[slot]], self.model)
                handles = [handle for witness in witnesses for handle in witness.watch(self.model)]
                try:
                    run(self.batch, f"proof-{number}", prompts, order)
                    if steps == "eager":  # steps of one row, too
                        run(self.batch, f"alone-{number}", prompts[:1], order[:1])
                finally:
                    for handle in handles:
                        handle.remove()
                reasons += [line for witness in witnesses for line in witness.found()]
            finally:
                for slot in slots:
                    self.store.release(slot)
            if reasons:
                break
        return reasons


def most_changed(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Experts' names, those that change the most tensors first."""
    changes = {name: sum(e.kind != "same" for e in one.manifest.tensors.values()) for name, one in artifacts.items()}
    return sorted(changes, key=lambda name: -changes[name])


def mixed_tokens(
    batch: Batch, store: ExpertStore, artifacts: Mapping[str, Artifact], trial: Trial, rows: int, experts: int = 2
) -> list[tuple[str, int, Tensor]]:
    """What the base and some experts give in one step.

    Args:
        rows: of the step: single tokens, where the cache has a page for each; else prompts of one token again and
            again, each of a page at most.
        experts: at most so many, those that change most.

    Returns:
        expert's name, "" for the base; token; [vocabulary] logits. Of each row that was computed.
    """
    slots: dict[str, int] = {}
    try:
        for name in most_changed(artifacts)[: min(experts, store.slot_count)]:
            slots[name] = store.acquire(name)
        owners = {"": BASE_SLOT, **slots}
        pairs = [(name, token) for token in trial.prompts[0][:2] for name in owners]
        most = rows if rows <= MAX_TOKENS else max(_PROMPTS, 2 * len(pairs))
        count = min(most, max(1, batch.kv_tokens // PAGE))
        asked = [pairs[row % len(pairs)] for row in range(count)] if count > 1 else pairs[len(slots) :][:1]
        with _seen(batch) as found:
            # together they have as many tokens as the step has rows; with the one that is made, each fits into its page
            lengths = [min(PAGE - 1, (rows + row) // count) for row in range(count)]
            prompts = [[token] * length for (_, token), length in zip(asked, lengths, strict=True)]
            run(batch, "tokens", prompts, [owners[name] for name, _ in asked], 1)
    finally:
        for slot in slots.values():
            store.release(slot)
    return [(*asked[row], found[row][0]) for row in sorted(found)]


def base_text(batch: Batch) -> list[Tensor]:
    """The base's logits of a few tokens after a text of more than one page."""
    with _seen(batch) as found:
        run(batch, "pages", [[5 + place % 7 for place in range(TEXT - NEW_TOKENS)]], [BASE_SLOT])
    return found.get(0, [])


def text_fault(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """How logits of one text, greedily continued, differ; None if they do not. In 16 bit."""
    error = _too_far(zip(wanted, found, strict=True), _OTHER_SUMS)
    return error and f"logits after a text of several pages differ by {error} of their norm"


@contextlib.contextmanager
def _seen(batch: Batch) -> Iterator[dict[int, list[Tensor]]]:
    """The logits of what `run` runs meanwhile: number of the request -> [vocabulary] of each step."""
    found: dict[int, list[Tensor]] = {}

    def see(names: tuple[str, ...], scores: Tensor) -> None:
        for name, logits in zip(names, scores, strict=True):
            found.setdefault(int(name.rpartition("-")[2]), []).append(logits.float().clone())

    batch.see = see
    try:
        yield found
    finally:
        batch.see = None


def _too_far(pairs: Iterable[tuple[Tensor, Tensor]], limit: float) -> str | None:
    """By how much of their norm logits of a greedily continued text differ; None if by no more than the limit.

    Args:
        pairs: wanted and found, [vocabulary] each, of one token after the other.
    """
    for wanted, ours in pairs:
        finite = wanted.isfinite()
        ours = ours[: len(wanted)]  # a head may have tokens that experts added
        error = float((ours - wanted)[finite].norm() / wanted[finite].norm().clamp_min(1e-30))
        if not error <= limit:
            return f"{error:.2g}"
        if int(ours.argmax()) != int(wanted.argmax()):
            break  # a near tie went the other way: what follows is another text
    return None


@dataclass(frozen=True, slots=True)
class _Unit:
    """A block of the model, or a module outside of blocks, and the modules in it that are wrapped."""

    name: str
    kind: str
    wrapped: tuple[str, ...]
    parameters: ExpertParameters

    @property
    def sources(self) -> set[str]:
        return {name for conversion, _ in self.parameters.rules for name in conversion.sources}


def _units(model: Any, attachment: Attachment, stored: StoredTensors) -> dict[str, _Unit]:
    """One unit of each kind: blocks of the same classes and shapes are one kind."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside: dict[str, list[str]] = {}
    for path in attachment.wraps:
        block = next((name for name in lists if path.startswith(f"{name}.")), None)
        unit = path if block is None else ".".join(path.split(".")[: block.count(".") + 2])
        inside.setdefault(unit, []).append(path)
    units: dict[str, _Unit] = {}
    for unit, paths in inside.items():
        parts = []
        for path in sorted(paths):
            wrapper = model.get_submodule(path)
            assert isinstance(wrapper, Switchable)
            shapes = [tuple(p.shape) for p in (*wrapper.base.parameters(), *wrapper.base.buffers())]
            changed = [n for n in stored.changed_parameters() if n.startswith(f"{path}.")]
            parts.append(f"{path.removeprefix(unit)} {type(wrapper).__name__} {type(wrapper.base).__name__} {shapes}")
            parts.append(str([name.removeprefix(path) for name in changed]))
        kind = f"{type(model.get_submodule(unit)).__name__} {parts}"
        if kind not in units:
            parameters = stored.of_module(unit, attachment.name_inside(unit))
            units[kind] = _Unit(unit, type(model.get_submodule(unit)).__name__, tuple(sorted(paths)), parameters)
    return units


def _rounds(units: Mapping[str, _Unit], artifacts: Mapping[str, Artifact], slots: int) -> list[list[str]]:
    """Experts to prove with, as many at a time as there are slots for: two, and more where those change too little."""

    def changes(name: str) -> set[str]:
        return {tensor for tensor, entry in artifacts[name].manifest.tensors.items() if entry.kind != "same"}

    by_name = {name: changes(name) for name in artifacts}
    most_first = sorted(by_name, key=lambda name: -len(by_name[name]))
    chosen = most_first[:2]
    for unit in units.values():
        wanted = unit.sources
        if not any(by_name[name] & wanted for name in chosen):
            chosen += [name for name in most_first if by_name[name] & wanted][:1]
    return [chosen[i : i + slots] for i in range(0, len(chosen), slots)]


def _say_added(prompt: list[int], artifact: Artifact, model: Any) -> None:
    """Put a token of an expert's own vocabulary into its prompt."""
    rows, size = model.get_input_embeddings().weight.shape[0], artifact.manifest.expert.vocab_size
    if size > rows:
        prompt[min(1, len(prompt) - 1)] = size - 1


@dataclass
class _Witness:
    """Sees one unit compute a mixed step, and lets it compute the same for each expert with merged weights."""

    unit: _Unit
    switch: Switch
    survey: Survey
    slots: Mapping[int, str]
    artifacts: Mapping[str, Artifact]
    stored: StoredTensors
    from_tables: bool = False
    reasons: list[str] = field(default_factory=list)
    _seen: bool = False
    _inputs: Any = None

    def found(self) -> list[str]:
        """What does not agree; of a step from tables also that there was none."""
        unseen = self.from_tables and not self._seen
        return [self._reason("no step from tables has reached it")] if unseen else self.reasons

    def watch(self, model: Any) -> list[Any]:
        module = model.get_submodule(self.unit.name)
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owners = self.switch.step.owners
        if not self._seen and owners.any and owners.in_tables == self.from_tables:
            self._inputs = _copied((args, kwargs))

    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._seen or self._inputs is None:
            return
        self._seen = True
        axes = self.survey.output_axes(self.unit.name)
        if axes is None:
            self.reasons.append(self._reason("no output of it has a row a token"))
            return
        rows, places = axes
        step = self.switch.step
        mixed = _clones(output)
        try:
            self.switch.step = step.of_base()
            base = self._run(module, {})
            merged = {
                slot: self._run(module, self.unit.parameters.own(module, self._tensors(name)))
                for slot, name in self.slots.items()
            }
        except Exception as error:  # noqa: BLE001  whatever the module raises
            self.reasons.append(self._reason(f"it cannot be run with merged weights: {_line(error)}"))
            return
        finally:
            self.switch.step = step
        self._compare(mixed, base, merged, rows, places)

    def _run(self, module: nn.Module, own: Mapping[str, Tensor]) -> list[Tensor]:
        """What the unit gives with some parameters in place of its own.

        The rows of others do not count then: a token that only their tables hold becomes the last of this one.
        """
        some, more = _copied(self._inputs)
        if isinstance(module, SwitchableEmbedding):
            last = len(own.get("base.weight", module.base.weight)) - 1
            some, more = pytree.tree_map(lambda leaf: leaf.clamp(max=last), (some, more))
        return _clones(torch.func.functional_call(module, dict(own), some, more))

    def _compare(
        self,
        mixed: Sequence[Tensor],
        base: Sequence[Tensor],
        merged: Mapping[int, Sequence[Tensor]],
        rows: Rows,
        places: Sequence[int | None],
    ) -> None:
        owners = self.switch.step.rows(rows)
        slots = owners.slots.to("cpu")
        for number, axis in enumerate(places):
            if axis is None or not mixed[number].is_floating_point():
                continue
            for slot in (BASE_SLOT, *self.slots):
                mine = (slots == slot).nonzero().view(-1).to(mixed[number].device)
                if not len(mine):
                    continue
                wanted = base[number] if slot == BASE_SLOT else merged[slot][number]
                parts = [t.index_select(axis, mine) for t in (mixed[number], wanted, base[number])]
                fault = _difference(*parts, exact=mixed[number].dtype in (torch.float32, torch.float64))
                if fault is not None:
                    who = "the base" if slot == BASE_SLOT else f"expert {self.slots[slot]!r}"
                    self.reasons.append(self._reason(f"with {who}'s rows in a mixed step {fault}"))
                    return

    def _reason(self, text: str) -> str:
        inside = [name.removeprefix(f"{self.unit.name}.") for name in self.unit.wrapped if name != self.unit.name]
        named = ", ".join(inside[:4]) + (", …" if inside[4:] else "")
        more = f" (in which {named} change)" if inside else ""
        return f"{self.unit.name}: a {self.unit.kind}{more}: {text}"

    def _tensors(self, expert: str) -> dict[str, Delta | Tensor]:
        """What the unit needs of an expert, from the artifact."""
        artifact = self.artifacts[expert]
        entries = artifact.manifest.tensors
        found: dict[str, Delta | Tensor] = {}
        device = self.switch.step.owners.slots.device
        for name in self.unit.sources:
            stored = name if name in entries else self.stored.tied.get(name, name)
            value = artifact.read(stored) if stored in entries else None
            if isinstance(value, Delta | Tensor):
                found[name] = value.to(device)
        return found


def _difference(found: Tensor, wanted: Tensor, base: Tensor, *, exact: bool) -> str | None:
    """How rows differ from what they should be, None if they do not.

    Args:
        found, wanted, base: the same rows as the mixed step, the merged weights and the base gave them.
        exact: computed in float32.
    """
    width = min(found.shape[-1], wanted.shape[-1], base.shape[-1])
    finite = wanted[..., :width].isfinite() & base[..., :width].isfinite()
    if not torch.equal(found[..., :width].isfinite() & base[..., :width].isfinite(), finite):
        return "it gives other infinite or missing values than with merged weights"
    ours, theirs, plain = (t[..., :width][finite].double() for t in (found, wanted, base))
    error, effect, size = (float(x.norm()) for x in (ours - theirs, theirs - plain, theirs))
    rounding = (1e-4 if exact else 0.02) * size
    if error <= rounding and (exact or effect <= rounding):
        return None
    if exact:
        if error <= _EXACT * effect + rounding:
            return None
        return f"it differs from merged weights by {error / max(effect, 1e-30):.2g} of what the expert changes"
    along = float((ours - plain) @ (theirs - plain)) / max(effect**2, 1e-60)
    if abs(along - 1) <= _ALONG and error <= effect + rounding:
        return None
    return f"it gives {along:.2f} of what the expert changes, and is off by {error / max(effect, 1e-30):.2g} of it"


def _copied(arguments: Any) -> Any:
    """Arguments whose numbers a module may change without anybody else seeing it; indices and lengths stay theirs."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(copied, arguments)


def _clones(output: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
