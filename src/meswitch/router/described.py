"""Routes known by what is said of them: a name, a description, example lines. No training, no labelled queries.

A text becomes the means of its tokens in the encoder's upper half of layers, each of length one, less the mean of
everyday requests (`everyday.txt`). A route is the weighted mean of its lines; a query belongs to the nearest route, in
a metric that counts directions less in which the examples of one route differ among themselves. The origin, where
everyday requests lie, stands for "none of these".

Probabilities come from the lines themselves. Each example is left out of its route and scored: how far it wins says
how sure a score is. The same example without its route, and the everyday requests, show what a query for nobody scores.

Without a family or an engine, over any list of routes:

    decider = Decider(Space(open_encoder("all-MiniLM-L6-v2")))
    options = parse_options([{"name": "billing", "description": "invoices and refunds"}, ...])
    decision = decider.decide("where is my money?", options)

This is what `meswitch route --routes` asks and what a server's `/v1/route` can ask: JSON in, JSON out.
"""

import json
import math
import threading
import tomllib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from meswitch.cpu import fitting_threads
from meswitch.jsonfile import json_kind
from meswitch.router.base import OTHER, Messages, Router, RouterError, text_of
from meswitch.router.calibrate import choose_threshold
from meswitch.router.encoder import Encoder, TextEncoder

# What people ask of assistants and apps, in all directions: a route known by a few lines is measured against it.
EVERYDAY = tuple((files(__package__) / "everyday.txt").read_text(encoding="utf-8").splitlines())

ENOUGH = 3  # example lines of each route, from which they help a trained router
_MAX_TOKENS = 64  # of a text: the beginning and the end
_DESCRIBED = 2.0  # how many examples a description weighs; 1 and 3 were little different
_SHRINK = 4.0  # of the metric towards plain distance; 1 to 4 were little different
_TEMPERATURE = 0.025  # of scores, where examples say nothing else
_TEMPERATURE_BARE = 0.03  # of routes without examples
_MOST_BARE = 0.4  # the highest threshold of routes without examples
_KNOWN = 2 / 3  # share of traffic that is taken to be for some route
_DOUBT = 0.5  # how far, as a standard deviation of its logarithm, the temperature may lie from that
_KEPT_LINES = 4096
MOST_ROUTES = 1000
MOST_EXAMPLES = 100  # of one route
MOST_CHARACTERS = 4096  # of one text
_KEPT = 32  # lists of routes


@dataclass(frozen=True, slots=True)
class RouteOption:
    """One route to choose from.

    Args:
        name: what is answered.
        description: what it is for, in a sentence or two.
        examples: queries for it; five different ones do much.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()


def check_options(options: Sequence[RouteOption]) -> None:
    """
    Raises:
        RouterError: no routes, two of one name, one that is called `other`, or one of which nothing is said.
    """
    if not options:
        raise RouterError("routes: none; give at least one with a name and a description")
    seen: set[str] = set()
    for option in options:
        if not option.name.strip():
            raise RouterError("routes: name: empty; every route needs one")
        if option.name == OTHER:
            raise RouterError(f"routes: name: {OTHER!r} means 'none of these'; rename the route")
        if option.name in seen:
            raise RouterError(f"routes: name: {option.name!r} is there twice; every route needs its own")
        seen.add(option.name)
        if any(not example.strip() for example in option.examples):
            raise RouterError(f"routes: {option.name!r}: examples: one is empty; remove it")
        if not option.description.strip() and not option.examples:
            raise RouterError(
                f"routes: {option.name!r}: description: missing; say in a sentence what it is for, or give examples"
            )


def layers_of(encoder: TextEncoder) -> tuple[int, ...]:
    """The layers that are read: the upper half, where a sentence encoder knows what a text means.

    A causal LM's last layers are about the next token, so there it is the third below the upper sixth.
    """
    depth = encoder.depth
    if not depth:
        return (0,)
    if isinstance(encoder, Encoder):
        return tuple(range(max(1, depth // 2), max(1, depth * 5 // 6) + 1))
    return tuple(range(depth // 2 + 1, depth + 1))


class Space:
    """Texts -> vectors, of one encoder. The lines of routes are kept, as the same ones come again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.layers = layers_of(encoder)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        raw = self._raw(EVERYDAY)
        self.middle = raw.mean(0)
        self.background = raw - self.middle

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), layers x hidden_size] float32."""
        return self._raw(texts) - self.middle

    def lines(self, texts: Sequence[str]) -> Tensor:
        """The same, of texts that will be asked for again."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        found = dict(zip(new, self(new), strict=True)) if new else {}
        rows = [found[text] if text in found else self._kept[text] for text in texts]
        self._kept.update(found)
        while len(self._kept) > _KEPT_LINES:
            self._kept.popitem(last=False)
        return torch.stack(rows)

    def of_states(self, states: Tensor) -> Tensor:
        """Vectors of hidden states [n, layers x hidden_size] that somebody has computed already."""
        return self._unit(states) - self.middle

    def _raw(self, texts: Sequence[str]) -> Tensor:
        with fitting_threads(self.encoder.device, self.encoder.hidden_size):
            states = self.encoder.encode(texts, self.layers, _MAX_TOKENS)
        with torch.inference_mode(False):
            return self._unit(states.clone())

    def _unit(self, states: Tensor) -> Tensor:
        count = len(self.layers)
        return normalize(states.unflatten(1, (count, -1)), dim=2).flatten(1) / count**0.5


@dataclass(frozen=True, slots=True)
class Prototypes:
    """Routes as points, and how sure a score is; float32.

    Args:
        weight: [width, routes]; a route's score is linear in the text's vector.
        bias: [routes].
        temperature: of scores.
        slope: the log-odds that any route is for a text are slope x (the best score - cut).
        cut: see there.
        threshold: of the best route's probability.
    """

    weight: Tensor
    bias: Tensor
    temperature: float
    slope: float
    cut: float
    threshold: float

    def logits(self, x: Tensor) -> Tensor:
        """[n, routes], before the temperature. x: [n, width]."""
        return x @ self.weight + self.bias

    def odds(self, x: Tensor) -> Tensor:
        """[n]: log-odds that some route is for the text."""
        return self.slope * (self.logits(x).amax(1) - self.cut)

    def log_scores(self, x: Tensor) -> Tensor:
        """[n, routes + 1] float64 log-probabilities, `other` last."""
        which = (self.logits(x).double() / self.temperature).log_softmax(1)
        odds = self.odds(x).double()[:, None].clamp(-30, 30)
        return torch.cat([which + logsigmoid(odds), logsigmoid(-odds)], 1)


def fit_prototypes(options: Sequence[RouteOption], space: Space) -> Prototypes:
    """Points and calibration from the options' lines alone.

    Raises:
        RouterError: see `check_options`.
    """
    check_options(options)
    texts = [_described(option) for option in options] + [line for option in options for line in option.examples]
    vectors = space.lines(texts)
    said, counts = vectors[: len(options)], torch.tensor([len(option.examples) for option in options])
    examples, owner = vectors[len(options) :], torch.arange(len(options)).repeat_interleave(counts)
    own = torch.tensor([_DESCRIBED if option.description.strip() else 0.0 for option in options])
    if not len(examples):
        own = own.clamp_min(1.0)
    total = (own + counts)[:, None]
    points = (said * own[:, None]).index_add(0, owner, examples) / total
    residuals = _residuals(examples, owner, counts)
    metric = _metric(residuals)
    weight, bias = _linear(points, metric)
    # an example of a route that has nothing else cannot be left out of it
    left = [i for i, k in enumerate(owner.tolist()) if float(total[k]) > 1]
    if not left or len(options) < 2:
        return _uncalibrated(weight, bias, space, bool(len(examples)))
    without = _LeftOut(points, metric, residuals, examples, owner, counts, total)
    return _calibrated(weight, bias, space, without.scores()[left], owner[left])


def _described(option: RouteOption) -> str:
    name = option.name.replace("_", " ").replace("-", " ")
    return f"{name}: {option.description}" if option.description.strip() else name


def _residuals(examples: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """[n, width]: examples less the mean of their route's; zero where it has but one."""
    means = torch.zeros(len(counts), examples.shape[1]).index_add(0, owner, examples) / counts.clamp_min(1)[:, None]
    return examples - means[owner]


def _scale(residuals: Tensor) -> Tensor:
    """What the covariance within routes is divided by, so that its mean variance is one."""
    return (residuals.square().sum() / residuals.shape[1]).clamp_min(1e-12)


def _metric(residuals: Tensor) -> Tensor:
    """[width, width]: the inverse of the covariance within routes, shrunk to the identity."""
    width = residuals.shape[1]
    if not bool(residuals.any()):
        return torch.eye(width)
    covariance = residuals.T @ residuals / _scale(residuals)
    return torch.linalg.inv((covariance + _SHRINK * torch.eye(width)) / (1 + _SHRINK))


def _linear(points: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    weight = metric @ points.T
    return weight, -0.5 * (points * weight.T).sum(1)


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """What `fit_prototypes` has, for scores of its own examples as if it had not seen them.

    Args:
        points: [routes, width].
        metric: [width, width].
        residuals: [n, width].
        examples: [n, width].
        owner: [n] int64.
        counts: [routes] int64.
        total: [routes, 1], what all lines of a route weigh.
    """

    points: Tensor
    metric: Tensor
    residuals: Tensor
    examples: Tensor
    owner: Tensor
    counts: Tensor
    total: Tensor

    def scores(self) -> Tensor:
        """[n, routes]: each example's route without it, in a metric without it (Sherman and Morrison's formula)."""
        total = self.total[self.owner]
        own = (self.points[self.owner] * total - self.examples) / (total - 1).clamp_min(1e-6)
        turned = self.residuals @ self.metric
        several = self.counts[self.owner].float()
        share = several / (several - 1).clamp_min(1) / (_scale(self.residuals) * (1 + _SHRINK))
        share = torch.where(several > 1, share, 0.0)
        gain = share / (1 - share * (turned * self.residuals).sum(1)).clamp_min(1e-6)
        along = (turned * self.examples).sum(1)
        weight, bias = _linear(self.points, self.metric)
        to_points = turned @ self.points.T
        scores = self.examples @ weight + bias + gain[:, None] * to_points * (along[:, None] - 0.5 * to_points)
        to_own = (turned * own).sum(1)
        distance = ((self.examples - 0.5 * own) * (own @ self.metric)).sum(1)
        scores[torch.arange(len(own)), self.owner] = distance + gain * to_own * (along - 0.5 * to_own)
        return scores


def _calibrated(weight: Tensor, bias: Tensor, space: Space, scores: Tensor, targets: Tensor) -> Prototypes:
    divisor = _temperature(scores, targets)
    inside = scores.amax(1)
    rest = scores.clone()
    rest[torch.arange(len(targets)), targets] = -torch.inf
    everyday = space.background @ weight + bias
    # Everyday requests that a route is clearly for are no requests for nobody.
    everyday = everyday[everyday.amax(1) < inside.quantile(0.25)]
    outside = torch.cat([rest, everyday])
    high, low = inside, outside.amax(1)
    gap = float((high.mean() - low.mean()).clamp_min(1e-4))
    spread = float(((high.var(correction=0) + low.var(correction=0)) / 2).clamp_min(1e-6))
    slope = gap / spread
    cut = float(high.mean() + low.mean()) / 2 - math.log(_KNOWN / (1 - _KNOWN)) / slope
    fitted = Prototypes(weight, bias, divisor, slope, cut, 0.0)
    which = torch.cat([scores, outside])
    best = (which / divisor).softmax(1).max(1)
    confidence = best.values.double() * torch.sigmoid(fitted.slope * (which.amax(1).double() - fitted.cut))
    known = torch.arange(len(which)) < len(scores)
    right = known.clone()
    right[: len(scores)] = best.indices[: len(scores)] == targets
    return replace(fitted, threshold=choose_threshold(confidence, right, known))


def _temperature(scores: Tensor, targets: Tensor) -> float:
    """The likeliest temperature of left-out examples; with few of them, near the usual one."""
    grid = torch.logspace(-3.5, 0, 200, dtype=torch.float64)
    losses = torch.stack([cross_entropy(scores.double() / t, targets, reduction="sum") for t in grid])
    prior = (grid / _TEMPERATURE).log().square() / (2 * _DOUBT**2)
    return float(grid[(losses + prior).argmin()])


def _uncalibrated(weight: Tensor, bias: Tensor, space: Space, examples: bool) -> Prototypes:
    """With descriptions alone nothing can be left out: only everyday requests say what a score means."""
    everyday = (space.background @ weight + bias).amax(1)
    slope = 1.5 / float(everyday.std().clamp_min(1e-3))
    cut = float(everyday.quantile(0.75))
    fitted = Prototypes(weight, bias, _TEMPERATURE if examples else _TEMPERATURE_BARE, slope, cut, 0.0)
    taken = fitted.log_scores(space.background)[:, :-1].amax(1).exp()
    return replace(fitted, threshold=min(_MOST_BARE, float(taken.quantile(0.75))))


@dataclass(frozen=True, slots=True)
class Prior:
    """What is said of the experts, as the place that a trained router starts from."""

    options: tuple[RouteOption, ...]
    space: Space
    prototypes: Prototypes

    @classmethod
    def of(cls, options: Sequence[RouteOption], space: Space) -> "Prior":
        """
        Raises:
            RouterError: see `check_options`.
        """
        return cls(tuple(options), space, fit_prototypes(options, space))

    def __call__(self, states: Tensor) -> Tensor:
        """[n, experts + 1] float32: log-odds of each expert among them, and that any is for the text.

        Args:
            states: [n, layers x hidden_size], of `space.layers`.
        """
        x = self.space.of_states(states)
        return torch.cat([self.prototypes.logits(x) / self.prototypes.temperature, self.prototypes.odds(x)[:, None]], 1)


def says_enough(options: Sequence[RouteOption]) -> bool:
    """Whether every route has lines enough for a prior; with descriptions alone it made routers worse."""
    return all(len(set(option.examples)) >= ENOUGH for option in options)


class DescribedRouter(Router):
    """See the module's docstring.

    Args:
        options: the routes.
        space: the encoder's; one for all routers that share it.

    Raises:
        RouterError: see `check_options`.
    """

    def __init__(
        self,
        options: Iterable[RouteOption],
        space: Space,
        *,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        self.options = tuple(options)
        self.space = space
        self.prototypes = fit_prototypes(self.options, space)
        self.experts = tuple(option.name for option in self.options)
        self.labels = (*self.experts, OTHER)
        self.fallback = fallback
        self.threshold = self.prototypes.threshold if threshold is None else threshold

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        x = self.space([text_of(messages) for messages in messages_batch])
        rows = self.prototypes.log_scores(x).exp().tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def nbytes(self) -> int:
        """Of the encoder and the routes in memory."""
        return self.space.encoder.nbytes() + 4 * (self.prototypes.weight.numel() + self.prototypes.bias.numel())


@dataclass(frozen=True, slots=True)
class Selection:
    """One decision over named routes.

    Args:
        choice: a route's name; None: none is likely enough.
        confidence: the best route's probability.
        scores: name -> probability, summing to one with `other` (none of these).
        threshold: what the confidence had to reach.
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
