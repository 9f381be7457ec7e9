"""Static embeddings: one vector a token, averaged. A table and a tokenizer, no model; microseconds a query."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import CheckpointError
from meswitch.router.encoder import Progress
from meswitch.router.lexical import clip


class StaticEncoder:
    """Texts -> mean of their tokens' rows of `table` [vocab, width]; it has one layer, 0."""

    depth = 0

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
