"""A decision over any list of routes: the router as a product of its own, without a family or an engine.

    decider = Decider(Space(open_encoder("all-MiniLM-L6-v2")))
    options = parse_options([{"name": "billing", "description": "invoices and refunds"}, ...])
    decision = decider.decide("where is my money?", options)

This is what `meswitch route --routes` asks and what a server's `/v1/route` can ask: JSON in, JSON out.
"""

import json
import threading
import tomllib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meswitch.router.base import Messages, RouterError
from meswitch.router.described import DescribedRouter, RouteOption, Space, check_options
from meswitch.textfile import json_kind

MOST_ROUTES = 1000
MOST_EXAMPLES = 100  # of one route
MOST_CHARACTERS = 4096  # of one text
_KEPT = 32  # lists of routes


@dataclass(frozen=True, slots=True)
class Selection:
    """One decision over named routes.

    choice: a route's name; None: none is likely enough. confidence: the best route's probability. scores: name ->
    probability, summing to one with `other` (none of these). threshold: what the confidence had to reach.
    """

    choice: str | None
    confidence: float
    threshold: float
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Decider:
    """Decides over lists of routes; the last lists are kept ready.

    Args:
        space: of the encoder, see `meswitch.router.Space`. Several threads may ask.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._lock = threading.Lock()
        self._routers: OrderedDict[tuple[RouteOption, ...], DescribedRouter] = OrderedDict()

    def decide(
        self, query: str | Messages, options: Sequence[RouteOption], *, threshold: float | None = None
    ) -> Selection:
        """Which route is this query (a text, or chat messages) for?

        Args:
            threshold: the probability that the best route must reach; None: the one that the routes' own lines give.

        Raises:
            RouterError: options that cannot be routes. ConfigError: a query without text.
        """
        router = self._router(tuple(options))
        route = router.route(query)
        best = max(router.experts, key=lambda name: route.scores[name])
        least = router.threshold if threshold is None else threshold
        sure = route.scores[best]
        return Selection(best if sure >= least else None, sure, least, route.scores)

    def _router(self, options: tuple[RouteOption, ...]) -> DescribedRouter:
        with self._lock:
            if options not in self._routers:
                self._routers[options] = DescribedRouter(options, self._space)
                if len(self._routers) > _KEPT:
                    self._routers.popitem(last=False)
            self._routers.move_to_end(options)
            return self._routers[options]


def parse_options(data: Any, where: str = "routes") -> list[RouteOption]:
    """Routes from JSON: a list of `{"name": ..., "description": ..., "examples": [...]}`, checked and bounded.

    Raises:
        RouterError: not such a list; names the place and the field.
    """
    if not isinstance(data, list):
        raise RouterError(f"{where}: expected a list of objects with name, description and examples")
    if len(data) > MOST_ROUTES:
        raise RouterError(f"{where}: {len(data)} routes; give at most {MOST_ROUTES}")
    options = [_option(item, f"{where}[{i}]") for i, item in enumerate(data)]
    check_options(options)
    return options


def _option(data: Any, where: str) -> RouteOption:
    if not isinstance(data, dict):
        raise RouterError(f"{where}: expected an object with name, description and examples, found {json_kind(data)}")
    for key in data:
        if key not in ("name", "description", "examples"):
            raise RouterError(f"{where}.{key}: no such field; a route has name, description and examples")
    examples = data.get("examples", [])
    if not isinstance(examples, list) or len(examples) > MOST_EXAMPLES:
        raise RouterError(f"{where}.examples: expected a list of at most {MOST_EXAMPLES} texts")
    texts = {"name": data.get("name"), "description": data.get("description", "")}
    texts |= {f"examples[{i}]": example for i, example in enumerate(examples)}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise RouterError(f"{where}.{key}: expected a text, found {json_kind(value)}")
        if len(value) > MOST_CHARACTERS:
            raise RouterError(f"{where}.{key}: {len(value)} characters; give at most {MOST_CHARACTERS}")
    return RouteOption(str(texts["name"]), str(texts["description"]), tuple(examples))


def read_options(path: str | Path) -> list[RouteOption]:
    """Routes from a file: TOML of `[[route]]` tables, or JSON, `{"routes": [...]}` or the list alone.

    Raises:
        RouterError: no such file, or not such routes; names the file and the field.
    """
    file = Path(path)
    form = "TOML" if file.suffix == ".toml" else "JSON"
    try:
        text = file.read_text(encoding="utf-8")
        data: Any = tomllib.loads(text) if form == "TOML" else json.loads(text)
    except FileNotFoundError:
        raise RouterError(f"{file}: no such file; give TOML of [[route]] tables, or JSON") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RouterError(f"{file}: cannot be read as {form} ({error})") from None
    key = "route" if form == "TOML" else "routes"
    if isinstance(data, dict):
        if data.keys() != {key}:
            raise RouterError(f"{file}: expected {key!r} and nothing else, found {', '.join(data) or 'nothing'}")
        data = data[key]
    return parse_options(data, f"{file}: {key}")
