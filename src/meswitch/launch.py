"""From a `family.toml` to something that runs."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.architecture import architecture_of
from meswitch.durable import recover_directory
from meswitch.errors import ArtifactError, MeswitchError
from meswitch.family import ExpertSection, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastapi import FastAPI

    from meswitch.engine import Engine
    from meswitch.router import Decider, Encoder, OpenOptions, RouteOption, Router
    from meswitch.server.auto import AutoPolicy
    from meswitch.server.experts import Experts
    from meswitch.server.keys import ApiKey, Keys

logger = logging.getLogger("meswitch")


def engine_from_family(family: Family) -> "Engine":
    """The engine that `[base]`, `[[expert]]` and `[engine]` describe.

    Raises:
        ArtifactError: an expert has not been compressed yet, or its artifact is damaged.
        MeswitchError: see `Engine`.
    """
    from meswitch.engine import Engine
    from meswitch.engine_options import EngineOptions

    deltas = {expert.name: find_artifact(family, expert) for expert in family.expert}
    options = EngineOptions(
        **family.engine.model_dump(), base_name=family.base.name, grows=family.server.experts_dir is not None
    )
    return Engine(family.base_source(), deltas, options)


def find_artifact(family: Family, section: ExpertSection) -> Path:
    """The directory of an expert's artifact, or adapter.

    Raises:
        ArtifactError: there is none.
    """
    directory = family.resolve(section.delta)
    recover_directory(directory)
    if not directory.exists():
        raise ArtifactError(
            f"{family.file}: expert {section.name!r}: delta: {directory}: no such artifact; make it with "
            f"`meswitch compress --family {family.file} --expert {section.name}`"
        )
    return directory


def router_from_family(
    family: Family,
    engine: "Engine | None" = None,
    *,
    path: Path | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    llm: str | None = None,
) -> "Router":
    """The router that `[router]` describes; without a trained one, that by what is said of each `[[expert]]`.

    Args:
        engine: a running engine of the same family; the router then reads hidden states with the engine's weights
            instead of loading the base a second time.
        path: in place of the family's; there must be a router.
        threshold: in place of the family's.
        device: where to load models otherwise.
        llm: where an LLM router's model is now, if it is not where it was.

    Raises:
        RouterError: no router and too little said of an expert (the message says how to mend it), or a router that
            does not fit the family.
    """
    from meswitch.router import OpenOptions
    from meswitch.router.store import read_file

    encoder = family.router.encoder
    directory = path or family.resolve(family.router.path)
    if path is not None:
        read_file(path)
    elif not is_trained(directory):
        check_described(directory, route_options(family))
        bare = ", ".join(expert.name for expert in family.expert if not expert.examples)
        hint = f" (of {bare} a description alone, which is seldom enough: add five `examples` each)" if bare else ""
        logger.warning("%s: no router here; experts are told apart by what family.toml says of them%s", directory, hint)
    given = OpenOptions(
        family.base_source(),
        fallback=family.router.fallback,
        threshold=family.router.threshold if threshold is None else threshold,
        model=None if engine is None else _base_beside(engine),
        tokenizer=None if engine is None else engine.tokenizers[engine.base_name].tokenizer,
        device=device,
        llm=llm,
    )
    source = None if encoder is None else family.resolve_model(encoder, "router.encoder")
    return open_family_router(directory, route_options(family), given, encoder=source, bits=family.router.bits)


def open_family_router(
    path: str | Path,
    options: "Sequence[RouteOption]",
    given: "OpenOptions",
    *,
    encoder: str | Path | None = None,
    bits: int = 32,
) -> "Router":
    """A family's router: the trained one if there is one, otherwise one by what the family says of its experts.

    An expert that a trained embedding router does not know is added to it by its examples and description.

    Args:
        path: where a trained router would be.
        options: the family's experts.
        given: the base, who answers when the router abstains, and what is loaded already.
        encoder: of a router by descriptions; None: the base.
        bits: of that encoder's linear layers, 32 or 8.

    Raises:
        RouterError: no trained router and an expert of which nothing is said; or see `load_router`.
    """
    from meswitch.router import DescribedRouter, Space
    from meswitch.router.described import suits_update
    from meswitch.router.embedding import RouterFile
    from meswitch.router.store import check_experts, open_kind, read_file

    directory = Path(path)
    names = [option.name for option in options]
    if not is_trained(directory):
        check_described(directory, options)
        space = Space(_encoder(encoder, bits, given, updated=suits_update(options)))
        return DescribedRouter(options, space, fallback=given.fallback, threshold=given.threshold)
    file = read_file(directory)
    new = [option for option in options if option.name not in file.experts]
    sayings = all(option.examples for option in new)
    grows = isinstance(file, RouterFile) and new and sayings and {*file.experts} <= {*names}
    if not grows:
        check_experts(directory, file, names)
    router = open_kind(directory, file, given)
    for option in new if grows else ():
        router = router.with_expert(option)
    return router


def is_trained(directory: Path) -> bool:
    """Whether a router was written here, whole or damaged."""
    from meswitch.router.store import JSON_NAME

    return (directory / JSON_NAME).exists()


def check_described(directory: Path, options: "Sequence[RouteOption]") -> None:
    """Can these experts be told apart without the trained router that `directory` has not?

    Raises:
        RouterError: says what is missing, and both ways to mend it.
    """
    from meswitch.router import RouterError
    from meswitch.router.described import check_options

    bare = [option.name for option in options if not option.description.strip() and not option.examples]
    if bare or not options:
        missing = ", ".join(repr(name) for name in bare) or "any expert"
        raise RouterError(
            f"{directory}: no router here, and nothing is said of {missing}; give every [[expert]] of family.toml a "
            "`description` and `examples`, or make a router with `meswitch router train --family F --data rows.jsonl`"
        )
    check_options(options)


def _encoder(source: str | Path | None, bits: int, given: "OpenOptions", *, updated: bool) -> Any:
    from meswitch.artifact import fingerprint
    from meswitch.checkpoint import Checkpoint
    from meswitch.router.encoder import Encoder, open_encoder

    if source is not None:
        return open_encoder(source, given.device, bits, updated=updated)
    if given.model is not None:
        return Encoder(given.model, given.tokenizer, fingerprint(Checkpoint.open(given.base)))
    return Encoder.load(given.base, given.device)


def route_options(family: Family) -> "list[RouteOption]":
    """What `family.toml` says of its experts, for a router."""
    from meswitch.router import RouteOption

    return [RouteOption(section.name, section.description, section.examples) for section in family.expert]


def check_router(family: Family) -> None:
    """Refuse a family that cannot route at once, instead of after its models are loaded.

    Raises:
        RouterError: a damaged router, or none and too little said of an expert.
    """
    from meswitch.router.store import read_file

    directory = family.resolve(family.router.path)
    if is_trained(directory):
        read_file(directory)
    else:
        check_described(directory, route_options(family))


def policy_from_family(family: Family, engine: "Engine | None" = None) -> tuple["AutoPolicy", str | None]:
    """Who answers a request, and why `auto` will not work, or None if it will.

    A router that is missing or does not fit costs `auto` alone: the experts still answer by name.

    Args:
        family: its `[router]` is loaded.
        engine: see `router_from_family`; experts that come and go there do so here.
    """
    from meswitch.server.auto import AutoPolicy

    router, problem = None, None
    try:
        router = router_from_family(family, engine)
    except MeswitchError as error:
        problem = str(error)
    named = [family.base.name, *family.names]
    policy = AutoPolicy(
        router,
        (lambda: named) if engine is None else (lambda: engine.names),
        base=family.base.name,
        fallback=family.router.fallback,
        no_router=problem or "",
        prefetch=None if engine is None else engine.prefetch,
    )
    return policy, problem


def keys_from_family(family: Family) -> "list[ApiKey]":
    """The keys of `server.keys` and of the environment.

    Raises:
        ConfigError: the file is missing, or a field is wrong.
    """
    from meswitch.server.keys import read_keys

    return read_keys(None if family.server.keys is None else family.resolve(family.server.keys))


def experts_from_family(family: Family, engine: "Engine", auto: "AutoPolicy | None" = None) -> "Experts":
    """What changes the experts of a running server.

    Args:
        auto: see `policy_from_family`; it takes in experts that come later.
    """
    from meswitch.server.experts import Experts

    directory = family.server.experts_dir
    return Experts(
        engine,
        family.deltas(),
        route_options(family),
        directory=None if directory is None else family.resolve(directory),
        family=family.file,
        is_watched=family.server.watch_experts,
        auto=auto,
    )


def app_from_family(
    family: Family, engine: "Engine", auto: "AutoPolicy", keys: "Keys | None" = None, experts: "Experts | None" = None
) -> "FastAPI":
    """The HTTP application.

    Args:
        auto: see `policy_from_family`.
        keys: of which clients must send one; None for the family's.
        experts: see `experts_from_family`; None for experts that nobody changes.
    """
    from meswitch.server import OnDemandModels, Web, create_app
    from meswitch.server.keys import Keys
    from meswitch.server.logs import traced

    return create_app(
        engine,
        auto=auto,
        descriptions={section.name: section.description for section in family.expert},
        keys=Keys(keys_from_family(family)) if keys is None else keys,
        experts=experts,
        on_demand=OnDemandModels(encoder_opener(engine), decider_opener(family, engine)),
        trace=traced(),
        web=Web(family.server.allow_origins, family.server.root_path),
    )


def encoder_opener(engine: "Engine") -> "Callable[[], Encoder] | None":
    """What gives the base's hidden states, on the engine's weights; None where they are not the base's all the time."""
    if not _has_base_beside(engine):
        return None

    def open_encoder() -> "Encoder":
        from meswitch.router import Encoder

        return Encoder(_base_beside(engine), engine.tokenizers[engine.base_name].tokenizer, "")

    return open_encoder


def decider_opener(family: Family, engine: "Engine") -> "Callable[[], Decider] | None":
    """What gives a router over routes that a request brings: by the encoder of `[router]`, else by the base."""
    source, base = family.router.encoder, encoder_opener(engine)
    if source is None and base is None:
        return None

    def open_decider() -> "Decider":
        from meswitch.router import Decider, Space
        from meswitch.router.encoder import open_encoder

        if source is not None:
            place = family.resolve_model(source, "router.encoder")
            space = Space(open_encoder(place, "cpu", family.router.bits))
            if not space.encoder.update:
                return Decider(space)
            return Decider(space, lambda: Space(open_encoder(place, "cpu", family.router.bits, updated=False)))
        assert base is not None
        return Decider(Space(base()))

    return open_decider


def _has_base_beside(engine: "Engine") -> bool:
    return not (engine.takes_turns or architecture_of(engine.model.config).is_multimodal)


def _base_beside(engine: "Engine") -> Any:
    """A plain base model on the engine's own weights, without its head; None if the router has to load its own.

    The engine's layers work on the batch of the step that runs now, so nothing else may pass through them. Where
    experts take turns, the weights are not always the base's.
    """
    if not _has_base_beside(engine):
        return None
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModel

    from meswitch.engine.coded import share_codes
    from meswitch.engine.runner import attention_for

    config = copy.deepcopy(engine.model.config)
    prefix = f"{engine.model.base_model_prefix}."
    weights = {
        name.removeprefix(prefix).replace(".base.", "."): tensor
        for name, tensor in engine.model.state_dict().items()
        if name.startswith(prefix)
    }
    device = next(iter(weights.values())).device
    with init_empty_weights(include_buffers=False), torch.device(device):
        model = AutoModel.from_config(config, attn_implementation=attention_for(type(engine.model)))
    share_codes(engine.model, model, prefix)
    model.load_state_dict(weights, assign=True)
    engine.lend(model)
    return model.to(device).eval()
