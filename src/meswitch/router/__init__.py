"""Query -> scores over the experts -> who answers. Train, calibrate, evaluate, save and load. See docs/routing.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch.router.base import OTHER, Route, Router, RouterError
from meswitch.router.data import Row, read_rows
from meswitch.router.embedding import EmbeddingRouter
from meswitch.router.embedding_file import open_embedding, open_encoder
from meswitch.router.encoder import Encoder, TextEncoder
from meswitch.router.evaluate import Evaluation, evaluate_router
from meswitch.router.storage import RouterFile, read_file
from meswitch.router.train import train_router

__all__ = [
    "OTHER",
    "EmbeddingRouter",
    "Encoder",
    "Evaluation",
    "Route",
    "Router",
    "RouterError",
    "Row",
    "TextEncoder",
    "evaluate_router",
    "load_router",
    "open_encoder",
    "read_rows",
    "train_router",
]


def load_router(
    path: str | Path,
    base: str | Path,
    *,
    experts: Sequence[str] | None = None,
    fallback: str = "base",
    threshold: float | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
) -> Router:
    """Load a router directory for a base.

    Args:
        path: what `meswitch router train` wrote. base: the base's checkpoint directory or hub id.
        experts: the family's; the router's must be the same ones. None: do not compare.
        fallback: who answers when the router abstains. threshold: instead of the calibrated one.
        model, tokenizer: the base, if it is loaded already; give both. device: where to load it otherwise.

    Raises:
        RouterError: no router, damaged or newer, of other experts, or trained on another base.
        CheckpointError: no base.
    """
    directory = Path(path)
    file = read_file(directory)
    if experts is not None:
        _check_experts(directory, file, experts)
    return open_embedding(
        directory,
        file,
        base,
        fallback=fallback,
        threshold=threshold,
        model=model,
        tokenizer=tokenizer,
        device=device,
    )


def _check_experts(directory: Path, file: RouterFile, experts: Sequence[str]) -> None:
    gone = [name for name in file.experts if name not in experts]
    new = [name for name in experts if name not in file.experts]
    if gone or new:
        parts = [f"knows {', '.join(gone)}, which the family has not"] if gone else []
        parts += [f"does not know {', '.join(new)}"] if new else []
        raise RouterError(
            f"{directory}: experts: the router {' and '.join(parts)}; train it again with `meswitch router train`"
        )
