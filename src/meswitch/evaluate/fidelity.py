"""How closely a model follows the full expert: KL divergence, top-1 agreement, errors of its layers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.errors import ConfigError, IncompatibleError


@dataclass(frozen=True, slots=True)
class Text:
    """One token sequence; the two models are compared on what they predict after position `start` and later ones."""

    ids: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Fidelity:
    """`kl`: mean KL(expert || model) in nats a token. `top1`: share of tokens with the same most likely next one."""

    kl: float
    top1: float
    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """One text's share of `Fidelity`: `kl` is its mean in nats a token."""

    kl: float
    agreeing: int  # tokens with the same most likely next one, of `tokens`
    tokens: int


def fidelity(model: Any, expert: Any, texts: Iterable[Text], batch_tokens: int = 2048) -> Fidelity:
    """Compare the next-token distributions of two models of one vocabulary; both see the same token ids.

    Logits of one batch of at most `batch_tokens` positions (`[batch, length, vocabulary]`, float32) are held at a
    time, so the texts can be a long stream.

    Raises:
        ConfigError: there is no position to compare.
        IncompatibleError: the vocabularies differ in size.
    """
    return total(divergences(model, expert, texts, batch_tokens))


def total(found: Iterable[Divergence]) -> Fidelity:
    """The fidelity over all tokens of some texts.

    Raises:
        ConfigError: there is no text.
    """
    kl = agreeing = tokens = sequences = 0.0
    for text in found:
        kl += text.kl * text.tokens
        agreeing += text.agreeing
        tokens += text.tokens
        sequences += 1
    if not tokens:
        raise ConfigError("texts: no token to compare; give at least one sequence longer than its `start`")
    return Fidelity(kl / tokens, agreeing / tokens, int(tokens), int(sequences))


@torch.inference_mode()
def divergences(model: Any, expert: Any, texts: Iterable[Text], batch_tokens: int = 2048) -> Iterator[Divergence]:
    """As `fidelity`, text by text and in their order, for paired comparison; texts without a position are left out.

    Raises:
        IncompatibleError: the vocabularies differ in size.
    """
    for ids, mask, counted in padded_batches(texts, batch_tokens):
        p = _log_probabilities(expert, ids, mask, counted)
        q = _log_probabilities(model, ids, mask, counted).to(p.device)
        if p.shape[-1] != q.shape[-1]:
            raise IncompatibleError(
                f"vocab_size: {q.shape[-1]} of the model and {p.shape[-1]} of the expert; "
                "compare models of one vocabulary"
            )
        lengths = counted.sum(-1).tolist()
        kl = (p.exp() * (p - q)).sum(-1).split(lengths)
        agreeing = (p.argmax(-1) == q.argmax(-1)).split(lengths)
        for row, tokens in enumerate(lengths):
            # Rounding in float32 can leave a hair less than nothing where the two are the same.
            yield Divergence(max(0.0, kl[row].mean().item()), int(agreeing[row].sum()), tokens)


def _log_probabilities(model: Any, ids: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Next-token log probabilities at the counted positions of all rows in turn: [positions, vocabulary], float32."""
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return logits[counted.to(logits.device)].float().log_softmax(-1)


def padded_batches(texts: Iterable[Text], budget: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, attention mask and compared positions, each [batch, length]; padded on the right, so causality hides it."""
    batch: list[Text] = []
    for text in texts:
        if len(text.ids) <= text.start:
            continue
        if batch and max(len(text.ids), *(len(other.ids) for other in batch)) * (len(batch) + 1) > budget:
            yield _padded(batch)
            batch = []
        batch.append(text)
    if batch:
        yield _padded(batch)


def _padded(batch: list[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = len(batch), max(len(text.ids) for text in batch)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros_like(ids)
    counted = torch.zeros(shape, dtype=torch.bool)
    for row, text in enumerate(batch):
        length = len(text.ids)
        ids[row, :length] = torch.tensor(text.ids)
        mask[row, :length] = 1
        counted[row, text.start : length] = True
    return ids, mask, counted


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
