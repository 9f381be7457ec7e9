"""A router directory -> a router, whichever kind it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import CheckpointError
from meswitch.router.base import Router, RouterError
from meswitch.router.cascade import CascadeRouter
from meswitch.router.described import DescribedRouter, RouteOption, Space, check_options
from meswitch.router.embedding import EmbeddingRouter
from meswitch.router.embedding_file import open_embedding, open_encoder
from meswitch.router.encoder import Encoder
from meswitch.router.few import add_described
from meswitch.router.llm import LlmRouter
from meswitch.router.lora import merge_adapters, replace_weights
from meswitch.router.records import CascadeFile, LlmFile, ModelInfo, RulesFile
from meswitch.router.rules import RulesRouter
from meswitch.router.storage import JSON_NAME, AnyFile, RouterFile, check_members, read_all_tensors, read_file
from meswitch.tokenizer import load_tokenizer


@dataclass(frozen=True)
class _Given:
    """What the caller of `load_router` said."""

    base: str | Path
    fallback: str
    threshold: float | None
    model: Any
    tokenizer: Any
    device: str
    llm: str | Path | None


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
    llm: str | Path | None = None,
) -> Router:
    """Load a router directory for a base.

    Args:
        path: what `meswitch router train` wrote. base: the base's checkpoint directory or hub id.
        experts: the family's; the router's must be the same ones. None: do not compare.
        fallback: who answers when the router abstains. threshold: instead of the calibrated one.
        model, tokenizer: the base, if it is loaded already; give both. device: where to load models otherwise.
        llm: where an LLM router's model is now, if it is not where it was.

    Raises:
        RouterError: no router, damaged or newer, of other experts, or trained on another base or model.
        CheckpointError: no base.
    """
    directory = Path(path)
    file = read_file(directory)
    if experts is not None:
        _check_experts(directory, file, experts)
    return _load(directory, file, _Given(base, fallback, threshold, model, tokenizer, device, llm))


def open_router(
    path: str | Path,
    base: str | Path,
    options: Sequence[RouteOption],
    *,
    encoder: str | Path | None = None,
    bits: int = 32,
    fallback: str = "base",
    threshold: float | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
    llm: str | Path | None = None,
) -> Router:
    """A family's router: the trained one if there is one, otherwise one by what the family says of its experts.

    An expert that a trained embedding router does not know is added to it by its examples and description.

    Args:
        path: where a trained router would be. options: the family's experts. encoder, bits: of a router by
            descriptions; None: the base. Others: see `load_router`.

    Raises:
        RouterError: no trained router and an expert of which nothing is said; or see `load_router`.
    """
    directory = Path(path)
    names = [option.name for option in options]
    given = _Given(base, fallback, threshold, model, tokenizer, device, llm)
    if not is_trained(directory):
        check_described(directory, options)
        return DescribedRouter(options, Space(_encoder(encoder, bits, given)), fallback=fallback, threshold=threshold)
    file = read_file(directory)
    new = [option for option in options if option.name not in file.experts]
    sayings = all(option.examples for option in new)
    grows = isinstance(file, RouterFile) and new and sayings and {*file.experts} <= {*names}
    if not grows:
        _check_experts(directory, file, names)
    router = _load(directory, file, given)
    return add_described(router, new) if isinstance(router, EmbeddingRouter) and grows else router


def is_trained(directory: Path) -> bool:
    """Whether a router was written here, whole or damaged."""
    return (directory / JSON_NAME).exists()


def check_described(directory: Path, options: Sequence[RouteOption]) -> None:
    """Can these experts be told apart without the trained router that `directory` has not?

    Raises:
        RouterError: says what is missing, and both ways to mend it.
    """
    bare = [option.name for option in options if not option.description.strip() and not option.examples]
    if bare or not options:
        missing = ", ".join(repr(name) for name in bare) or "any expert"
        raise RouterError(
            f"{directory}: no router here, and nothing is said of {missing}; give every [[expert]] of family.toml a "
            "`description` and `examples`, or make a router with `meswitch router train --family F --data rows.jsonl`"
        )
    check_options(options)


def _encoder(source: str | Path | None, bits: int, given: _Given) -> Any:
    if source is not None:
        return open_encoder(source, given.device, bits)
    if given.model is not None:
        return Encoder(given.model, given.tokenizer, fingerprint(Checkpoint.open(given.base)))
    return Encoder.load(given.base, given.device)


def _load(directory: Path, file: AnyFile, given: _Given) -> Router:
    if isinstance(file, RouterFile):
        return open_embedding(
            directory,
            file,
            given.base,
            fallback=given.fallback,
            threshold=given.threshold,
            model=given.model,
            tokenizer=given.tokenizer,
            device=given.device,
        )
    if isinstance(file, LlmFile):
        return _load_llm(directory, file, given)
    tensors = read_all_tensors(directory, file)
    if tensors:
        raise RouterError(f"{directory}: {min(tensors)}: a {file.kind} router has no tensors of its own")
    if isinstance(file, CascadeFile):
        check_members(directory, file, ("first", "second"))
        return CascadeRouter(
            _member(directory / "first", given),
            _member(directory / "second", given),
            file.calibration,
            margin=file.margin,
            weight=file.weight,
            fallback=given.fallback,
            threshold=given.threshold,
        )
    return _load_rules(directory, file, given)


def _load_rules(directory: Path, file: RulesFile, given: _Given) -> RulesRouter:
    names = ("router",) if file.members else ()
    check_members(directory, file, names)
    behind = _member(directory / "router", given) if names else None
    try:
        return RulesRouter(file.rules, file.experts, behind, fallback=given.fallback, threshold=given.threshold)
    except RouterError as error:
        raise RouterError(f"{directory}: {error}") from None


def _member(directory: Path, given: _Given) -> Router:
    """A router inside another one; it decides by its own threshold, if at all."""
    file = read_file(directory)
    if isinstance(file, CascadeFile | RulesFile) and directory.parent.name in ("first", "second", "router"):
        raise RouterError(f"{directory}: kind: routers of routers of routers are not read")
    return _load(directory, file, replace(given, threshold=None))


def _load_llm(directory: Path, file: LlmFile, given: _Given) -> LlmRouter:
    if file.settings.weights not in ("reference", "lora", "full"):
        raise RouterError(f"{directory}: settings.weights: {file.settings.weights!r} is none of reference, lora, full")
    if file.experts != tuple(file.descriptions):
        raise RouterError(f"{directory}: descriptions: not of the router's experts, in their order")
    tensors = read_all_tensors(directory, file)
    where = _find_model(directory, file.model, given)
    model, tokenizer = open_llm(where, given.device)
    settings = file.settings
    try:
        if settings.weights == "full":
            replace_weights(model, tensors)
        elif settings.weights == "lora":
            merge_adapters(model, tensors, settings.rank, settings.alpha)
        elif tensors:
            raise RouterError(f"{min(tensors)}: a router that uses the model as it is has no tensors")
    except RouterError as error:
        raise RouterError(f"{directory}: {error}") from None
    return LlmRouter(
        model,
        tokenizer,
        file.model,
        file.descriptions,
        settings,
        file.calibration,
        file.provenance,
        tuned=tensors,
        fallback=given.fallback,
        threshold=given.threshold,
    )


def open_llm(source: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """A causal LM and its tokenizer; float32 on the CPU, the checkpoint's dtype elsewhere.

    Raises:
        CheckpointError: nothing there. ConfigError: no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(source)
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval(), load_tokenizer(checkpoint.directory)


def model_info(source: str | Path, model: Any) -> ModelInfo:
    """Which model this is: where it lies, its content and its size."""
    checkpoint = Checkpoint.open(source)
    path = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    return ModelInfo(path, fingerprint(checkpoint), sum(value.numel() for value in model.parameters()))


def _find_model(directory: Path, info: ModelInfo, given: _Given) -> str | Path:
    """Where the router's model is: where the caller says, where it was, or it is the base itself."""
    if given.llm is not None:
        if _is(given.llm, info):
            return given.llm
        raise RouterError(
            f"{directory}: model.fingerprint: {given.llm} is another model than the one this router was trained with"
        )
    here = directory / info.path
    known = here if here.is_dir() else info.path
    if _is(known, info):
        return known
    if _is(given.base, info):
        return given.base
    raise RouterError(
        f"{directory}: model.path: {info.path} is not there or is another model than the one this router was trained "
        "with; give its directory with `--model`, or train the router again"
    )


def _is(source: str | Path, info: ModelInfo) -> bool:
    try:
        return fingerprint(Checkpoint.open(source)) == info.fingerprint
    except CheckpointError:
        return False


def _check_experts(directory: Path, file: AnyFile, experts: Sequence[str]) -> None:
    gone = [name for name in file.experts if name not in experts]
    new = [name for name in experts if name not in file.experts]
    if gone or new:
        parts = [f"knows {', '.join(gone)}, which the family has not"] if gone else []
        parts += [f"does not know {', '.join(new)}"] if new else []
        more = ""
        if isinstance(file, LlmFile):
            more = ", or take the family's descriptions as they are now with `meswitch router update`"
        elif isinstance(file, RouterFile) and not gone:
            more = ", or give each new [[expert]] of family.toml `examples`, five lines that are queries for it"
        raise RouterError(
            f"{directory}: experts: the router {' and '.join(parts)}; train it again with `meswitch router train`"
            + more
        )
