"""A sentence encoder from transformers (BERT and its like): mean states of all tokens."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import ConfigError
from meswitch.router.bert import BertLayers, is_bert
from meswitch.router.encoder import Progress, batches, quiet_loading, shortened
from meswitch.router.hidden import first_layers, hidden_states
from meswitch.router.lexical import clip
from meswitch.tokenizer import load_tokenizer


class SentenceEncoder:
    """Texts -> mean hidden states of some layers of a bidirectional encoder.

    Args:
        model: in eval mode. tokenizer: its own. bits: 8 keeps the linear layers as int8, on the CPU.
    """

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str, source: str, bits: int = 32) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.source = source
        self.bits = bits
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
    def load(cls, source: str | Path, device: str = "cpu", bits: int = 32) -> "SentenceEncoder":
        """Load a checkpoint directory or hub id.

        Raises:
            CheckpointError: nothing there. ConfigError: no tokenizer, or 8 bits elsewhere than on the CPU.
        """
        from transformers import AutoModel

        if bits == 8 and device != "cpu":
            raise ConfigError(f"encoder bits 8: only on the CPU, not on {device}; use 32")
        checkpoint = Checkpoint.open(source)
        with quiet_loading():
            model = AutoModel.from_pretrained(checkpoint.directory, dtype=torch.float32, trust_remote_code=False)
            tokenizer = load_tokenizer(checkpoint.directory)
        return cls(model.to(device).eval(), tokenizer, fingerprint(checkpoint), str(source), bits)

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
        for batch in batches(tokens, self.device, progress):
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
