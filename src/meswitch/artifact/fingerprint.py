"""Which base is this? By content, not by path, and cheap enough to ask at every start.

The fingerprint hashes every tensor's name, dtype and shape and 16 evenly spaced blocks of 4 KiB of its bytes: a few
dozen MB of a 14 GB base. A fine-tune moves all weights, so it tells bases apart; the full SHA-256 of every base tensor
is in the manifest too, and `meswitch verify --base` compares those.
"""

import hashlib
from pathlib import Path

from meswitch.checkpoint import Checkpoint
from meswitch.tensorfile import NAMES, TensorInfo

_BLOCK = 4096
_BLOCKS = 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """`sampled-sha256:<64 hex digits>`, independent of how the tensors are spread over files."""
    digest = hashlib.sha256()
    content = checkpoint.tensors if checkpoint.content is None else checkpoint.content
    for name, info in sorted(content.items()):
        digest.update(f"{name}\n{NAMES[info.dtype]}\n{list(info.shape)}\n".encode())
        for block in _sample(info):
            digest.update(block)
    return f"sampled-sha256:{digest.hexdigest()}"


def _sample(info: TensorInfo) -> list[bytearray]:
    if info.nbytes <= _BLOCK * _BLOCKS:
        return [info.read_bytes()]
    step = (info.nbytes - _BLOCK) // (_BLOCKS - 1)
    return [info.read_bytes(i * step, _BLOCK) for i in range(_BLOCKS)]


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
