"""Where in the model compression errs: the output error of every linear layer on inputs of the full expert."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.errors import ConfigError, IncompatibleError
from meswitch.evaluate.fidelity import Text, padded_batches


@torch.inference_mode()
def layer_errors(expert: Any, model: Any, texts: Iterable[Text], batch_tokens: int = 2048) -> dict[str, float]:
    """Relative output error `||f(x) - g(x)|| / ||f(x)||` of each linear layer, by module name in the model's order.

    `f` is the layer of the full expert, `g` the same layer of `model`, and `x` what the expert feeds its own on the
    texts, so an error that earlier layers passed on does not count. Norms are over all tokens and outputs.

    Raises:
        ConfigError: there is no text.
        IncompatibleError: the two do not have the same linear layers.
    """
    ours = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    theirs = {name: module for name, module in expert.named_modules() if isinstance(module, nn.Linear)}
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs or ours[name].weight.shape != theirs[name].weight.shape:
            raise IncompatibleError(f"{name}: not the same linear layer in both models; compare models of one shape")
    squares: dict[str, list[Tensor]] = defaultdict(list)  # of the error and of the output, a batch at a time
    mask = torch.zeros(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            other = ours[name].forward(x.to(ours[name].weight.device))  # not through hooks: it can be the same module
            wrong = other.to(output.device).float() - output.float()
            kept = mask.to(output.device).bool()
            if x.shape[:-1] == kept.shape:  # else the tokens were chosen by a router: all of them count
                wrong, output = wrong[kept], output[kept]
            squares[name].append(torch.stack([wrong.square().sum(), output.float().square().sum()]).double().cpu())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in theirs.items()]
    try:
        for ids, mask, _ in padded_batches(texts, batch_tokens):  # the hooks read `mask`
            expert(input_ids=ids.to(expert.device), attention_mask=mask.to(expert.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not squares:
        raise ConfigError("texts: no token to compare; give at least one sequence longer than its `start`")
    sums = {name: torch.stack(squares[name]).sum(0) for name in theirs if name in squares}
    return {name: float((wrong / right).sqrt()) if right > 0 else 0.0 for name, (wrong, right) in sums.items()}
