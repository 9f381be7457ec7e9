"""A family's router: the trained one, grown by new experts; or one by what the family says of its experts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.router.base import Router, RouterError
from meswitch.router.described import DescribedRouter, RouteOption, Space, check_options
from meswitch.router.embedding import EmbeddingRouter, RouterFile
from meswitch.router.encoder import Encoder, open_encoder
from meswitch.router.few import add_described
from meswitch.router.store import JSON_NAME, Given, check_experts, open_kind, read_file


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
    given = Given(base, fallback, threshold, model, tokenizer, device, llm)
    if not is_trained(directory):
        check_described(directory, options)
        return DescribedRouter(options, Space(_encoder(encoder, bits, given)), fallback=fallback, threshold=threshold)
    file = read_file(directory)
    new = [option for option in options if option.name not in file.experts]
    sayings = all(option.examples for option in new)
    grows = isinstance(file, RouterFile) and new and sayings and {*file.experts} <= {*names}
    if not grows:
        check_experts(directory, file, names)
    router = open_kind(directory, file, given)
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


def _encoder(source: str | Path | None, bits: int, given: Given) -> Any:
    if source is not None:
        return open_encoder(source, given.device, bits)
    if given.model is not None:
        return Encoder(given.model, given.tokenizer, fingerprint(Checkpoint.open(given.base)))
    return Encoder.load(given.base, given.device)
