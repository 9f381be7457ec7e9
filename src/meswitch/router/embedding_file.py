"""An embedding router's directory -> the router; and its encoder, wherever that is."""

from pathlib import Path
from typing import Any

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.router.base import RouterError
from meswitch.router.described import Prior, Space
from meswitch.router.embedding import EmbeddingRouter, Heads, Linear
from meswitch.router.encoder import Encoder, TextEncoder
from meswitch.router.memory import ROWS, Memory
from meswitch.router.sentence import SentenceEncoder
from meswitch.router.static import StaticEncoder, is_static
from meswitch.router.storage import RouterFile, read_tensors
from meswitch.router.style import WIDTH

BASE = "base"  # the encoder is the family's base


def open_encoder(source: str | Path, device: str = "cpu", bits: int = 32) -> TextEncoder:
    """An encoder from a directory or hub id: static embeddings, a causal LM, or any other transformers encoder.

    Raises:
        CheckpointError: nothing there.
    """
    if is_static(source):
        return StaticEncoder.load(source)
    names = Checkpoint.open(source).config.architectures or []
    if any(name.endswith("ForCausalLM") for name in names):
        encoder = Encoder.load(source, device)
        encoder.source = str(source)
        return encoder
    return SentenceEncoder.load(source, device, bits)


def open_embedding(
    directory: Path,
    file: RouterFile,
    base: str | Path,
    *,
    fallback: str = "base",
    threshold: float | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
) -> EmbeddingRouter:
    """See `load_router`; `file` is the directory's `router.json`.

    Raises:
        RouterError: damaged, or trained with another encoder. CheckpointError: the encoder is gone.
    """
    settings = file.settings
    own = settings.encoder == BASE
    near = directory / settings.encoder  # a path is also looked for beside router.json
    source = base if own else near if near.is_dir() else settings.encoder
    found = fingerprint(Checkpoint.open(source))
    if found != file.base.fingerprint:
        raise RouterError(
            f"{directory}: base.fingerprint: trained on the hidden states of another base than {source} "
            f"({file.base.fingerprint:.24}..., this is {found:.24}...); train it again with `meswitch router train`"
        )
    experts, width = len(file.experts), file.base.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"words.weight": (settings.buckets, experts)}
    shapes |= _shapes("states", len(settings.layers) * width, experts)
    known, columns = len(settings.known_layers) * width + WIDTH * settings.style, 1 + file.added
    if file.other:
        shapes |= _shapes("known", known, columns)
        shapes["known.words"] = (settings.buckets, columns)
    rows = (experts + file.other) * ROWS
    shapes |= {"memory.states": (rows, len(settings.layers) * width), "memory.words": (rows, experts)}
    shapes["memory.known"] = (rows, known)
    tensors = read_tensors(directory, file, shapes)
    encoder: TextEncoder
    if own and model is not None:
        encoder = Encoder(model, tokenizer, found)
    else:
        last = None if file.routes else max(*settings.layers, *settings.known_layers, 0)
        encoder = Encoder.load(base, device, last) if own else open_encoder(source, device, settings.bits)
        encoder.source = settings.encoder
    for name in ("hidden_size", "vocab_size"):
        if getattr(encoder, name) != getattr(file.base, name):
            raise RouterError(
                f"{directory}: base.{name}: {getattr(file.base, name)}, but the model has {getattr(encoder, name)}"
            )

    def head(name: str) -> Linear:
        return Linear(*(tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight", "bias")))

    heads = Heads(
        tensors["words.weight"], head("states"), head("known") if file.other else None, tensors.get("known.words")
    )
    return EmbeddingRouter(
        encoder,
        heads,
        file.experts,
        settings,
        file.calibration,
        file.provenance,
        prior=Prior.of(file.routes, Space(encoder)) if file.routes else None,
        memory=Memory(*(tensors[f"memory.{part}"] for part in ("states", "known", "words"))),
        added=file.added,
        fallback=fallback,
        threshold=threshold,
    )


def _shapes(name: str, width: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.mean": (width,),
        f"{name}.scale": (width,),
        f"{name}.weight": (width, outputs),
        f"{name}.bias": (outputs,),
    }
