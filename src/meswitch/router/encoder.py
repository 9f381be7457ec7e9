"""A causal language model as an encoder: mean hidden states of a query's tokens. The family's base is the usual one."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.configuration import read_config
from meswitch.router.decoder import DecoderLayers, is_plain
from meswitch.router.hidden import first_layers, hidden_states
from meswitch.router.lexical import clip
from meswitch.tokenizer import load_tokenizer

Progress = Callable[[int, int], None]  # (done, total)

_CPU_BATCH_TOKENS = 512  # what stays in a core's cache; measured: larger batches are slower
_GPU_BATCH_TOKENS = 8192


class TextEncoder(Protocol):
    """What turns texts into vectors: a causal LM (`Encoder`), a `SentenceEncoder` or a `StaticEncoder`.

    fingerprint: which weights these are, by content. depth: the number of its last layer. source: where it is, or
    `base` if it is the family's base.
    """

    source: str
    fingerprint: str
    hidden_size: int
    vocab_size: int
    depth: int

    @property
    def device(self) -> torch.device: ...

    def encode(
        self, texts: Sequence[str], layers: Sequence[int], max_tokens: int, progress: Progress | None = None
    ) -> Tensor:
        """[len(texts), len(layers) x hidden_size] float32 on the CPU; layers: ascending, 0 for the embeddings."""

    def nbytes(self) -> int:
        """Of its weights in memory."""


class Encoder:
    """Texts -> mean hidden states of some layers of one causal language model.

    Args:
        model: a transformers model (with or without its language-model head), in eval mode; on the CPU use float32.
        tokenizer: the base's tokenizer.
        fingerprint: which base this is, from `meswitch.artifact.fingerprint`.
    """

    source = "base"

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.model = getattr(model, "base_model", model)  # the head over the vocabulary is not needed
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        config = self.model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.depth: int = config.num_hidden_layers
        self._short: dict[int, Any] = {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())

    @classmethod
    def load(cls, base: str | Path, device: str = "cpu", last: int | None = None) -> "Encoder":
        """Load a checkpoint directory or hub id; float32 on the CPU, the checkpoint's dtype elsewhere.

        Args:
            last: the last layer that will be asked for; those from the second above it on are not loaded.

        Raises:
            CheckpointError: nothing there, or weights that cannot be read. ConfigError: no tokenizer.
        """
        from transformers import AutoModelForCausalLM

        checkpoint = Checkpoint.open(base)
        dtype = torch.float32 if device == "cpu" else "auto"
        with quiet_loading(report=last is None):
            config = read_config(checkpoint.directory)
            depth = _cut(config.get_text_config(), last)
            model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, config=config, dtype=dtype)
            tokenizer = load_tokenizer(checkpoint.directory, config)
        encoder = cls(model.to(device).eval(), tokenizer, fingerprint(checkpoint))
        encoder.depth = depth
        return encoder

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], layers: Sequence[int], max_tokens: int, progress: Progress | None = None
    ) -> Tensor:
        """[len(texts), len(layers) x hidden_size] float32 on the CPU.

        layers: indices into the hidden states, 0 for the embeddings, `depth` for the last. max_tokens: of a longer
        text, three quarters of this many tokens from its beginning and one quarter from its end.
        """
        tokens = [self._tokens(text, max_tokens) for text in texts]
        out = torch.zeros(len(texts), len(layers) * self.hidden_size)
        for batch in batches(tokens, self.device, progress):
            out[batch] = self._pooled([tokens[i] for i in batch], layers)
        return out

    def _tokens(self, text: str, max_tokens: int) -> list[int]:
        ids = shortened(self.tokenizer(clip(text), add_special_tokens=False)["input_ids"], max_tokens)
        # A model without a start token still needs one position for an empty text.
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return [start or 0, *ids]

    def _pooled(self, tokens: list[list[int]], layers: Sequence[int]) -> Tensor:
        """[batch, len(layers) x hidden_size] float32: means over all positions but the first.

        The first position is the attention sink of a trained model: its huge state would drown the others.
        """
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in tokens])
        width = int(lengths.max())
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens], device=device)
        real = (torch.arange(width) < lengths[:, None]).to(device)
        mask = real.long() if int(lengths.min()) < width else None  # without padding the attention is cheaper
        states = self._states(padded, mask, layers)
        counted = real.float()
        counted[:, 0] = (lengths == 1).to(counted)
        share = (counted / counted.sum(1, keepdim=True))[:, None]  # [batch, 1, width]
        means = [torch.bmm(share, state.float())[:, 0] for state in states]
        return torch.cat(means, 1).cpu()

    def _states(self, padded: Tensor, mask: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """[batch, width, hidden_size] each."""
        last = max(layers)
        if last not in self._short:
            whole = self.model
            self._short[last] = DecoderLayers(whole, last) if is_plain(whole) else first_layers(whole, last, self.depth)
        short = self._short[last]
        if isinstance(short, DecoderLayers):
            if short.window is None or padded.shape[1] <= short.window:
                return short(padded, layers)
            short = self.model
        inputs = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
        return hidden_states(short, layers, self.depth, inputs)


def open_encoder(source: str | Path, device: str = "cpu", bits: int = 32) -> TextEncoder:
    """An encoder from a directory or hub id: static embeddings, a causal LM, or any other transformers encoder.

    Raises:
        CheckpointError: nothing there.
    """
    from meswitch.router.sentence import SentenceEncoder
    from meswitch.router.static import StaticEncoder, is_static

    if is_static(source):
        return StaticEncoder.load(source)
    names = Checkpoint.open(source).config.architectures or []
    if any(name.endswith("ForCausalLM") for name in names):
        encoder = Encoder.load(source, device)
        encoder.source = str(source)
        return encoder
    return SentenceEncoder.load(source, device, bits)


def _cut(config: Any, last: int | None) -> int:
    """Leave a model's layers up to the one above `last`; how many it had.

    One more than is read, as some models give the states after their topmost layer with the final norm applied.
    """
    depth: int = config.num_hidden_layers
    if last is not None and last + 1 < depth:
        config.num_hidden_layers = last + 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: last + 1]
    return depth


def shortened(ids: list[int], limit: int) -> list[int]:
    """Three quarters of `limit` tokens from the beginning of a longer text and one quarter from its end."""
    head = limit * 3 // 4
    return ids if len(ids) <= limit else ids[:head] + ids[head - limit :]


def batches(tokens: list[list[int]], device: torch.device, progress: Progress | None) -> Iterator[list[int]]:
    """Indices of texts, shortest first, in batches that suit the device with their padding; reports those done."""
    limit = _CPU_BATCH_TOKENS if device.type == "cpu" else _GPU_BATCH_TOKENS
    batch: list[int] = []
    done = 0
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        if batch and (len(batch) + 1) * len(tokens[i]) > limit:
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, len(tokens))
            batch = []
        batch.append(i)
    if batch:
        yield batch
        if progress is not None:
            progress(len(tokens), len(tokens))


@contextlib.contextmanager
def quiet_loading(*, report: bool = True) -> Iterator[None]:
    """Loading a model without transformers' own progress bar. report: name tensors that do not fit the model."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not report:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
