"""Query -> scores over the experts -> who answers. Train, calibrate, evaluate, save and load. See docs/routing.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch.router.base import OTHER, Route, Router, RouterError
from meswitch.router.data import Row, read_rows
from meswitch.router.embedding import EmbeddingRouter, Heads
from meswitch.router.encoder import Encoder
from meswitch.router.evaluate import Evaluation, evaluate_router
from meswitch.router.storage import RouterFile, read_file, read_tensors
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
    "evaluate_router",
    "load_router",
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
    from meswitch.artifact import fingerprint
    from meswitch.checkpoint import Checkpoint

    directory = Path(path)
    file = read_file(directory)
    if experts is not None:
        _check_experts(directory, file, experts)
    checkpoint = Checkpoint.open(base)
    found = fingerprint(checkpoint)
    if found != file.base.fingerprint:
        raise RouterError(
            f"{directory}: base.fingerprint: trained on the hidden states of another base than {base} "
            f"({file.base.fingerprint:.24}..., this is {found:.24}...); train it again with `meswitch router train`"
        )
    labels = len(file.experts) + file.other
    width = len(file.settings.layers) * file.base.hidden_size
    tensors = read_tensors(
        directory,
        file,
        {
            "words.weight": (file.settings.buckets, labels),
            "states.mean": (width,),
            "states.scale": (width,),
            "states.weight": (width, labels),
            "bias": (labels,),
        },
    )
    encoder = Encoder(model, tokenizer, found) if model is not None else Encoder.load(base, device)
    for name in ("hidden_size", "vocab_size"):
        if getattr(encoder, name) != getattr(file.base, name):
            raise RouterError(
                f"{directory}: base.{name}: {getattr(file.base, name)}, but the model has {getattr(encoder, name)}"
            )
    return EmbeddingRouter(
        encoder,
        Heads(
            words=tensors["words.weight"],
            mean=tensors["states.mean"],
            scale=tensors["states.scale"],
            weight=tensors["states.weight"],
            bias=tensors["bias"],
        ),
        file.experts,
        file.settings,
        file.calibration,
        file.provenance,
        fallback=fallback,
        threshold=threshold,
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
