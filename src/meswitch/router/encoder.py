"""Encoders, texts -> vectors: a causal LM (the family's base is the usual one), a sentence encoder, static embeddings.

All give mean hidden states of a query's tokens.
"""

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from meswitch.architecture import architecture_of
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.configuration import read_config
from meswitch.errors import CheckpointError, ConfigError
from meswitch.loaded import dequantised
from meswitch.router.base import RouterError, clip
from meswitch.router.layers import BertLayers, DecoderLayers, first_layers, hidden_states, is_bert, is_llama_like
from meswitch.tokenizer import load_tokenizer

# A causal language model as an encoder: mean hidden states of a query's tokens. The family's base is the usual one.


Progress = Callable[[int, int], None]  # (done, total)

UPDATE_SHA256 = "454829afd4ee31edf118794e01d026c877a8adbfbb54d1fe404a9ae047cfc598"  # of adapted.safetensors
_CPU_BATCH_TOKENS = 512  # what stays in a core's cache; measured: larger batches_by_length are slower
_GPU_BATCH_TOKENS = 8192


class TextEncoder(Protocol):
    """What turns texts into vectors: a causal LM (`Encoder`), a `SentenceEncoder` or a `StaticEncoder`.

    Args:
        fingerprint: which weights these are, by content.
        update: SHA-256 of the change of these weights that `Update` made; empty where they are as they come.
        depth: the number of its last layer.
        source: where it is, or `base` if it is the family's base.
    """

    source: str
    fingerprint: str
    update: str
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
        fingerprint: which base this is, from `meswitch.checkpoint`.
    """

    source = "base"
    update = ""

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
        # a quantised model's codes are buffers
        return sum(tensor.nbytes for tensors in (self.model.parameters(), self.model.buffers()) for tensor in tensors)

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
            if checkpoint.is_quantised:
                model: Any = dequantised(checkpoint, architecture_of(config), dtype)
            else:
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

        Args:
            layers: indices into the hidden states, 0 for the embeddings, `depth` for the last.
            max_tokens: of a longer text, three quarters of this many tokens from its beginning and one quarter from its
                end.
        """
        tokens = [self._tokens(text, max_tokens) for text in texts]
        out = torch.zeros(len(texts), len(layers) * self.hidden_size)
        for batch in batches_by_length(tokens, self.device, progress):
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
            self._short[last] = (
                DecoderLayers(whole, last) if is_llama_like(whole) else first_layers(whole, last, self.depth)
            )
        short = self._short[last]
        if isinstance(short, DecoderLayers):
            if short.window is None or padded.shape[1] <= short.window:
                return short(padded, layers)
            short = self.model
        inputs = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
        return hidden_states(short, layers, self.depth, inputs)


@dataclass(frozen=True, slots=True)
class Update:
    """What public sets taught of one encoder: `adapted.safetensors` (`benchmarks/routing/adapt.py`).

    Args:
        sha256: of the file.
        encoder: fingerprint of the encoder that it is for.
        weights: `<weight>.left` [out, rank] and `<weight>.right` [in, rank] float32, where weight + left @ right.T
            replaces weight.
        form: `scale`, `left` and `right`, see `meswitch.router.described.Form.with_learnt`.
    """

    sha256: str
    encoder: str
    weights: dict[str, Tensor]
    form: dict[str, Tensor]

    @classmethod
    def of(cls, sha256: str, encoder: str, tensors: dict[str, Tensor]) -> "Update":
        """From the tensors of the file: those of the form are called `form.<name>`."""
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        form = {name.removeprefix("form."): weights.pop(name) for name in tensors if name.startswith("form.")}
        return cls(sha256, encoder, weights, form)

    def apply(self, model: nn.Module) -> None:
        """Change the weights of a float32 model in place."""
        names = {name.rpartition(".")[0] for name in self.weights}
        with torch.no_grad():
            for name in names:
                left, right = (self.weights[f"{name}.{side}"] for side in ("left", "right"))
                weight = model.get_parameter(name)
                weight.add_((left @ right.T).to(weight.device))


@functools.cache
def shipped_update() -> Update:
    """The one that comes with this package.

    Raises:
        RouterError: see `taught`.
    """
    return Update.of(UPDATE_SHA256, *taught("adapted.safetensors", UPDATE_SHA256))


def taught(name: str, checksum: str) -> tuple[str, dict[str, Tensor]]:
    """A file of this package with what public sets taught: fingerprint of the encoder that it is for, and tensors.

    Args:
        checksum: its SHA-256.

    Raises:
        RouterError: the file is missing or damaged.
    """
    path = files(__package__) / name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RouterError(f"{path}: cannot be read ({error}); install meswitch again") from None
    if hashlib.sha256(raw).hexdigest() != checksum:
        raise RouterError(f"{path}: damaged: its checksum is another; install meswitch again")
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])["__metadata__"]["encoder"], safetensors.torch.load(raw)


def open_encoder(source: str | Path, device: str = "cpu", bits: int = 32, *, updated: bool = True) -> TextEncoder:
    """An encoder from a directory or hub id: static embeddings, a causal LM, or any other transformers encoder.

    Args:
        updated: whether the weights are changed as public sets taught, of the encoder that `Update` is for.

    Raises:
        CheckpointError: nothing there.
    """
    from meswitch.router.encoder import SentenceEncoder, StaticEncoder, is_static

    if is_static(source):
        return StaticEncoder.load(source)
    names = Checkpoint.open(source).config.architectures or []
    if any(name.endswith("ForCausalLM") for name in names):
        encoder = Encoder.load(source, device)
        encoder.source = str(source)
        return encoder
    return SentenceEncoder.load(source, device, bits, updated=updated)


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


def batches_by_length(tokens: list[list[int]], device: torch.device, progress: Progress | None) -> Iterator[list[int]]:
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


# A sentence encoder from transformers (BERT and its like): mean states of all tokens.


class SentenceEncoder:
    """Texts -> mean hidden states of some layers of a bidirectional encoder.

    Args:
        model: in eval mode.
        tokenizer: its own.
        bits: 8 keeps the linear layers as int8, on the CPU.
        update: SHA-256 of the update that the weights have; empty where they have none.
    """

    def __init__(
        self, model: Any, tokenizer: Any, fingerprint: str, source: str, bits: int = 32, update: str = ""
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.source = source
        self.bits = bits
        self.update = update
        config = model.config
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.depth: int = config.num_hidden_layers
        self._kept = self.depth
        self._limit = int(getattr(config, "max_position_embeddings", 512)) - 4
        self._before, self._after = _special(tokenizer)
        self._packed = bits != 8
        self._bert: BertLayers | None = None

    @classmethod
    def load(
        cls, source: str | Path, device: str = "cpu", bits: int = 32, *, updated: bool = True
    ) -> "SentenceEncoder":
        """Load a checkpoint directory or hub id.

        Args:
            updated: see `open_encoder`.

        Raises:
            CheckpointError: nothing there. ConfigError: no tokenizer, or 8 bits elsewhere than on the CPU.
        """
        from transformers import AutoModel

        if bits == 8 and device != "cpu":
            raise ConfigError(f"encoder bits 8: only on the CPU, not on {device}; use 32")
        checkpoint = Checkpoint.open(source)
        if checkpoint.is_quantised:
            raise CheckpointError(
                f"{source}: is quantised; give a sentence encoder whose weights are stored as they are"
            )
        with quiet_loading():
            model = AutoModel.from_pretrained(checkpoint.directory, dtype=torch.float32, trust_remote_code=False)
            tokenizer = load_tokenizer(checkpoint.directory)
        known, checksum = fingerprint(checkpoint), ""
        if updated and (update := shipped_update()).encoder == known:
            update.apply(model)  # before the weights are rounded to int8
            checksum = update.sha256
        return cls(model.to(device).eval(), tokenizer, known, str(source), bits, checksum)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device if self._bert is None else self._bert.device
        return device

    def nbytes(self) -> int:
        if self._bert is not None:
            return self._bert.nbytes()
        kept = sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())
        packed = [m.weight() for m in self.model.modules() if type(m).__name__ == "Linear" and callable(m.weight)]
        return kept + sum(weight.numel() for weight in packed)

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], layers: Sequence[int], max_tokens: int, progress: Progress | None = None
    ) -> Tensor:
        """See `TextEncoder.encode`. The layers above the highest of `layers` are dropped for good."""
        self._prepare(max(layers))
        tokens = [self._tokens(text, min(max_tokens, self._limit)) for text in texts]
        out = torch.zeros(len(texts), len(layers) * self.hidden_size)
        for batch in batches_by_length(tokens, self.device, progress):
            out[batch] = self._pooled([tokens[i] for i in batch], layers)
        return out

    def _prepare(self, last: int) -> None:
        """Drop layers above `last`; a layer that is gone cannot be asked for again."""
        if last > self._kept:
            raise ConfigError(f"layers: {last} is above layer {self._kept}, the last that this encoder still has")
        if self._bert is None and is_bert(self.model):
            self._bert, self._kept = BertLayers(self.model, max(1, last), self.bits), max(1, last)
            self.model = None  # its other layers are not needed any more
        if self._bert is not None:
            return
        if last < self._kept:
            self.model, self._kept = first_layers(self.model, last, self._kept), max(1, last)
        if not self._packed:
            self.model, self._packed = _int8(self.model), True

    def _tokens(self, text: str, max_tokens: int) -> list[int]:
        ids = shortened(self.tokenizer(clip(text), add_special_tokens=False)["input_ids"], max_tokens)
        return [*self._before, *ids, *self._after] or [0]

    def _pooled(self, tokens: list[list[int]], layers: Sequence[int]) -> Tensor:
        """[batch, len(layers) x hidden_size] float32: means over the tokens, the special ones too."""
        lengths = torch.tensor([len(ids) for ids in tokens])
        width = int(lengths.max())
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens], device=self.device)
        real = (torch.arange(width) < lengths[:, None]).to(self.device)
        mask = real.long() if int(lengths.min()) < width else None
        if self._bert is not None:
            states = self._bert(padded, None if mask is None else real, layers)
        else:
            inputs = {"input_ids": padded, "attention_mask": mask}
            states = hidden_states(self.model, layers, self.depth, inputs)
        share = (real.float() / lengths.to(self.device)[:, None])[:, None]  # [batch, 1, width]
        return torch.cat([torch.bmm(share, state.float())[:, 0] for state in states], 1).cpu()


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def _int8(model: Any) -> Any:
    """The model with int8 linear layers, quantised a row, inputs a tensor at run time."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# Static embeddings: one vector a token, averaged. A table and a tokenizer, no model; microseconds a query.


class StaticEncoder:
    """Texts -> mean of their tokens' rows of `table` [vocab, width]; it has one layer, 0."""

    depth = 0
    update = ""

    def __init__(self, table: Tensor, tokenizer_file: str | Path, fingerprint: str, source: str) -> None:
        from tokenizers import Tokenizer

        self.table = table
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.fingerprint = fingerprint
        self.source = source
        self.vocab_size, self.hidden_size = table.shape

    @classmethod
    def load(cls, source: str | Path) -> "StaticEncoder":
        """Load a directory with tokenizer.json and a safetensors file of one matrix.

        Raises:
            CheckpointError: nothing there, no tokenizer.json, or not exactly one matrix.
        """
        checkpoint = Checkpoint.open(source)
        if not is_static(source):
            raise CheckpointError(f"{source}: static embeddings are one safetensors matrix and a tokenizer.json")
        (info,) = checkpoint.tensors.values()
        table = info.read()
        return cls(table, checkpoint.directory / "tokenizer.json", fingerprint(checkpoint), str(source))

    @property
    def device(self) -> torch.device:
        return self.table.device

    def nbytes(self) -> int:
        return self.table.numel() * self.table.element_size()

    def encode(
        self, texts: Sequence[str], layers: Sequence[int], max_tokens: int, progress: Progress | None = None
    ) -> Tensor:
        """See `TextEncoder.encode`; all tokens count, and `layers` can only be (0,)."""
        out = torch.zeros(len(texts), self.hidden_size)
        for i, found in enumerate(
            self.tokenizer.encode_batch([clip(text) for text in texts], add_special_tokens=False)
        ):
            if found.ids:
                out[i] = self.table[torch.tensor(found.ids)].float().mean(0)
        if progress is not None:
            progress(len(texts), len(texts))
        return out


def is_static(source: str | Path) -> bool:
    """Whether this directory holds static embeddings."""
    checkpoint = Checkpoint.open(source)
    shapes = [info.shape for info in checkpoint.tensors.values()]
    return len(shapes) == 1 and len(shapes[0]) == 2 and (checkpoint.directory / "tokenizer.json").is_file()
