"""Routes known by what is said of them: a name, a description, example lines. No training, no labelled queries.

A text becomes the means of its tokens in the encoder's upper half of layers, each of length one, less the mean of
everyday requests (`everyday.txt`). A route is the mean of its lines. (Of few routes, broad ones, whose examples differ
nearly as much as those of different routes, are their lines: a query is as near as to the nearest ones. There
directions count more that tell kinds of request apart, as learnt from public sets: see `Form`.) Nearness is measured
in a metric that counts directions less in which the examples of one route differ among themselves. A route
that everyday requests are near to is near to everything, so that counts against it. The origin, where everyday
requests lie, stands for "none of these".

Probabilities come from the lines themselves. Each example is left out of its route and scored: how far it wins says
how sure a score is. The same example without its route, and the everyday requests, show what a query for nobody scores.

Without a family or an engine, over any list of routes:

    decider = Decider(Space(open_encoder("sentence-transformers/all-MiniLM-L6-v2")))
    options = parse_options([{"name": "billing", "description": "invoices and refunds"}, ...])
    decision = decider.decide("where is my money?", options)

This is what `meswitch route --routes` asks and what a server's `/v1/route` can ask: JSON in, JSON out.
"""

import functools
import json
import math
import threading
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize, pad, softplus

from meswitch.cpu import fitting_threads
from meswitch.jsonfile import json_kind
from meswitch.router.base import OTHER, Messages, RouteOption, Router, RouterError, text_of
from meswitch.router.calibrate import choose_threshold
from meswitch.router.encoder import Encoder, TextEncoder, shipped_update, taught

# What people ask of assistants and apps, in all directions: a route known by a few lines is measured against it.
EVERYDAY = tuple((files(__package__) / "everyday.txt").read_text(encoding="utf-8").splitlines())

# Of tasks.safetensors. Heads of saved routers, those without an update, are learnt beside that map: another one needs a
# version of `router.json`.
LEARNT_SHA256 = "cc64337733a291df92ab47f133562da51af0b8a6f9c6bb6a71d6bd3b03d30fb2"
ENOUGH = 3  # example lines of each route, from which they help a trained router
_MAX_TOKENS = 64  # of a text: the beginning and the end
_DESCRIBED = 2.0  # how many examples a description weighs; 1 and 3 were little different
_SHRINK = 4.0  # of the metric towards plain distance; 1 to 4 were little different
MANY = 16  # routes, from which they are taken to be intents of one application rather than domains
_BROAD = 0.85  # variance within routes, as a share of all; four domains had 0.87 to 0.91, most intents 0.5 to 0.8
_SOFTNESS = 0.3  # how far lines behind the nearest one count; 0.1 to 0.6 were little different
_HUB = 0.25  # how much of a route's nearness to everyday requests is taken off; 0.25 to 0.75 were little different
_HUB_LINES = 10  # everyday requests, the nearest ones, that say how near
_TEMPERATURE = 0.025  # of scores, where examples say nothing else
_TEMPERATURE_BARE = 0.03  # of routes without examples
_MOST_BARE = 0.4  # the highest threshold of routes without examples
_KNOWN = 2 / 3  # share of traffic that is taken to be for some route
_DOUBT = 0.5  # how far, as a standard deviation of its logarithm, the temperature may lie from that
_LIFT = 0.7  # of log-odds, see `Prototypes.lift`, where left-out examples say nothing else
_LIFT_ROWS = 12  # how many of them, half of them right, weigh as much as that
_KEPT_LINES = 4096
MOST_ROUTES = 1000
MOST_EXAMPLES = 100  # of one route
MOST_CHARACTERS = 4096  # of one text
_KEPT = 32  # lists of routes


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


def suits_update(options: Sequence[RouteOption]) -> bool:
    """Whether these routes are told apart better by an encoder that has its update.

    A few by descriptions alone are not: 0.50 instead of 0.53 on the 15 sources of docs/results/routing.md.
    """
    return len(options) >= MANY or any(option.examples for option in options)


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


@dataclass(frozen=True, slots=True)
class Form:
    """Vectors of texts -> what they say of the kind of request, for routes that are broad; float32.

    x [n, width] becomes y + (y @ left) @ right.T, where y = scale * x.

    Args:
        scale: [width], zero for layers that say only what a text is about.
        left: [width, rank]. For all-MiniLM-L6-v2 left and right come from `tasks.safetensors`, which
            `benchmarks/routing/tasks.py` learnt from public sets of many tasks, or from the update that its weights
            have (`meswitch.router.encoder.Update`); for other encoders the rank is 0.
        right: [width, rank].
    """

    scale: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, encoder: TextEncoder, layers: Sequence[int], low: Sequence[int], *, learnt: bool) -> "Form":
        """
        Args:
            layers: of the encoder, those that are read.
            low: those of them that count.
            learnt: whether what public sets taught counts.

        Raises:
            RouterError: the file of what they taught is damaged.
        """
        share = torch.tensor([layer in low for layer in layers]).float()
        scale = (share * (len(share) / share.sum()) ** 0.5).repeat_interleave(encoder.hidden_size)
        plain = cls(scale, torch.zeros(len(scale), 0), torch.zeros(len(scale), 0))
        if not learnt:
            return plain
        if encoder.update:
            return plain.with_learnt(shipped_update().form)
        found = learnt_map(encoder.fingerprint)
        return plain if found is None else plain.with_learnt(found)

    def with_learnt(self, tensors: dict[str, Tensor]) -> "Form":
        """
        Args:
            tensors: `scale` [1], a factor; `left` and `right` [rows, rank] of the layers that count, the first ones.
        """
        left, right = (
            pad(tensors[name].float(), (0, 0, 0, len(self.scale) - len(tensors[name]))) for name in ("left", "right")
        )
        return Form(self.scale * tensors["scale"], left, right)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, width]."""
        y = self.scale * x
        return y + (y @ self.left) @ self.right.T

    def back(self, weight: Tensor) -> Tensor:
        """[width, points], whose product with a vector is that of `weight` [width, points] with what it becomes."""
        return self.scale[:, None] * (weight + self.left @ (self.right.T @ weight))


def learnt_map(encoder: str) -> dict[str, Tensor] | None:
    """The tensors of `tasks.safetensors`; None if they are of another encoder than the one with this fingerprint.

    Raises:
        RouterError: the file is missing or damaged.
    """
    made_for, tensors = taught("tasks.safetensors", LEARNT_SHA256)
    return tensors if made_for == encoder else None


class Space:
    """Texts -> vectors, of one encoder. The lines of routes are kept, as the same ones come again.

    Where routes are few, only the layers `low` count, by `form`; the others say only what a text is about.

    Args:
        learnt: whether the form has what public sets taught; False as in versions before.
    """

    def __init__(self, encoder: TextEncoder, *, learnt: bool = True) -> None:
        self.encoder = encoder
        self.layers = layers_of(encoder)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        # A sentence encoder's last layers know what a text is about, those below also what is wanted.
        top = encoder.depth if isinstance(encoder, Encoder) else round(encoder.depth * 5 / 6)
        self.low = tuple(layer for layer in self.layers if layer <= top) or self.layers
        self.form = Form.of(encoder, self.layers, self.low, learnt=learnt)
        raw = self._raw(EVERYDAY)
        self.middle = raw.mean(0)
        self.background = raw - self.middle

    def __call__(self, texts: Sequence[str], layers: Sequence[int] | None = None) -> Tensor:
        """[len(texts), layers x hidden_size] float32.

        Args:
            layers: the first ones of `self.layers`, where the rest does not count.
        """
        return self._raw(texts, layers) - self.middle

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
        """Vectors of hidden states [n, layers x hidden_size] that somebody has computed, of the first layers."""
        return self._unit(states) - self.middle

    def _raw(self, texts: Sequence[str], layers: Sequence[int] | None = None) -> Tensor:
        with fitting_threads(self.encoder.device, self.encoder.hidden_size):
            states = self.encoder.encode(texts, layers or self.layers, _MAX_TOKENS)
        with torch.inference_mode(False):
            return self._unit(states.clone())

    def _unit(self, states: Tensor) -> Tensor:
        count, width = len(self.layers), self.encoder.hidden_size
        units = normalize(states.unflatten(1, (-1, width)), dim=2).flatten(1) / count**0.5
        return pad(units, (0, count * width - units.shape[1]))


@dataclass(frozen=True, slots=True)
class Prototypes:
    """Routes as points, and how sure a score is; float32.

    Args:
        weight: [width, points]; the nearness to a point is linear in the text's vector.
        bias: [points].
        owner: [points] int64, the point's route.
        heights: [points], the logarithm of the point's share in its route.
        hub: [routes], what is taken off a route's score.
        layers: of the encoder, those that count.
        temperature: of scores of examples that are left out.
        fullness: what the lines of a route weigh without one example, as a share of what they weigh.
        slope: the log-odds that any route is for a text are slope x (the best score - cut).
        cut: see there.
        lift: what is added to the log-odds that the best route is right: of texts that some route is for.
        threshold: of the best route's probability.
    """

    weight: Tensor
    bias: Tensor
    owner: Tensor
    heights: Tensor
    hub: Tensor
    layers: tuple[int, ...]
    temperature: float = _TEMPERATURE
    fullness: float = 1.0
    slope: float = 1.0
    cut: float = 0.0
    lift: float = 0.0
    threshold: float = 0.0

    def logits(self, x: Tensor) -> Tensor:
        """[n, routes], before the temperature. x: [n, width]."""
        return self.together(x @ self.weight + self.bias, self.heights)

    def together(self, near: Tensor, heights: Tensor) -> Tensor:
        """[n, routes], of the nearness to each point [n, points]."""
        scaled = near / _SOFTNESS + heights
        index = self.owner.expand_as(scaled)
        shape = (len(near), len(self.hub))
        top = scaled.new_full(shape, -torch.inf).scatter_reduce(1, index, scaled, "amax")
        rest = scaled.new_zeros(shape).scatter_add(1, index, (scaled - top.gather(1, index)).exp())
        return _SOFTNESS * (top + rest.log()) - self.hub

    def odds(self, logits: Tensor) -> Tensor:
        """[n]: log-odds that some route is for the text. logits: [n, routes]."""
        return self.slope * (logits.amax(1) - self.cut)

    def log_scores(self, logits: Tensor) -> Tensor:
        """[n, routes + 1] float64 log-probabilities, `other` last. logits: [n, routes]."""
        which = (logits.double() / (self.temperature * self.fullness)).log_softmax(1)
        odds = self.odds(logits).double()[:, None].clamp(-30, 30)
        scores = torch.cat([which + logsigmoid(odds), logsigmoid(-odds)], 1)
        best = which.argmax(1, keepdim=True)
        return scores.scatter_add(1, best, torch.full_like(scores, self.lift)).log_softmax(1)


def fit_prototypes(options: Sequence[RouteOption], space: Space, *, broad: bool | None = None) -> Prototypes:
    """Points and calibration from the options' lines alone.

    Args:
        broad: whether each line is a point of its own, or each route; None: as the examples say.

    Raises:
        RouterError: see `check_options`.
    """
    check_options(options)
    lines = _Lines.of(options, space, broad)
    metric, residuals = lines.metric()
    weight = metric @ lines.points().T
    bias = -0.5 * (lines.points() * weight.T).sum(1)
    heights = (lines.weights / lines.total()[lines.owner]).log()
    weighted, hub = weight if lines.form is None else lines.form.back(weight), torch.zeros(len(options))
    found = Prototypes(weighted, bias, lines.owner, heights, hub, lines.layers)
    nearest = found.logits(space.background).topk(_HUB_LINES, 0).values.mean(0)
    found = replace(found, hub=_HUB * nearest)
    # an example of a route that has nothing else cannot be left out of it
    route = lines.owner[lines.group]
    left = lines.total()[route] > 1
    if not bool(left.any()) or len(options) < 2:
        return _uncalibrated(found, space, bool(len(lines.examples)))
    scores = _left_out(lines, metric, residuals, weight, bias, found)
    return _calibrated(found, space, scores[left], route[left], lines.total()[route[left]])


@dataclass(frozen=True, slots=True)
class _Lines:
    """What is said of the routes, as vectors, and which lines make a point together.

    Args:
        examples: [n, width].
        group: [n] int64, each example's point.
        sums: [points, width], of the lines' vectors times what they weigh.
        weights: [points], what the lines of each weigh.
        owner: [points] int64, each point's route.
        counts: [routes] int64, examples of each.
        form: that the vectors were given, if each line is a point.
        layers: of the encoder, those that count.
    """

    examples: Tensor
    group: Tensor
    sums: Tensor
    weights: Tensor
    owner: Tensor
    counts: Tensor
    form: Form | None
    layers: tuple[int, ...]

    @classmethod
    def of(cls, options: Sequence[RouteOption], space: Space, broad: bool | None) -> "_Lines":
        texts = [line for option in options for line in option.examples]
        route = torch.tensor([i for i, option in enumerate(options) for _ in option.examples], dtype=torch.int64)
        # a name without a description says nothing: it may be any word
        said = [i for i, option in enumerate(options) if option.description.strip()]
        vectors = space.lines([*texts, *(_described(options[i]) for i in said)])
        counts = torch.bincount(route, minlength=len(options))
        if broad is None:
            broad = len(options) < MANY and _spread(vectors[: len(texts)], route, counts) >= _BROAD
        apart = bool(texts) and broad
        form = space.form if apart else None
        vectors = vectors if form is None else form(vectors)
        routes = torch.cat([route, torch.tensor([*said], dtype=torch.int64)])
        shares = torch.cat([torch.ones(len(texts)), torch.full((len(said),), _DESCRIBED if texts else 1.0)])
        group = torch.arange(len(routes)) if apart else routes
        owner = routes if apart else torch.arange(len(options))
        sums = torch.zeros(len(owner), vectors.shape[1]).index_add(0, group, shares[:, None] * vectors)
        weights = torch.zeros(len(owner)).index_add(0, group, shares)
        layers = space.low if apart else space.layers
        return cls(vectors[: len(texts)], group[: len(texts)], sums, weights, owner, counts, form, layers)

    def points(self) -> Tensor:
        """[points, width]."""
        return self.sums / self.weights[:, None]

    def total(self) -> Tensor:
        """[routes]: what all lines of a route weigh."""
        return torch.zeros(len(self.counts)).index_add(0, self.owner, self.weights)

    def metric(self) -> tuple[Tensor, Tensor]:
        """The inverse of the covariance within routes, shrunk to the identity, [width, width]; [n, width] residuals."""
        width = self.examples.shape[1]
        residuals = _residuals(self.examples, self.owner[self.group], self.counts)
        if not bool(residuals.any()):
            return torch.eye(width), residuals
        covariance = residuals.T @ residuals / _mean_variance(residuals)
        return torch.linalg.inv((covariance + _SHRINK * torch.eye(width)) / (1 + _SHRINK)), residuals


def _described(option: RouteOption) -> str:
    name = option.name.replace("_", " ").replace("-", " ")
    return f"{name}: {option.description}" if option.description.strip() else name


def _residuals(examples: Tensor, route: Tensor, counts: Tensor) -> Tensor:
    """[n, width]: examples less the mean of their route's; zero where it has but one."""
    sums = torch.zeros(len(counts), examples.shape[1]).index_add(0, route, examples)
    return examples - (sums / counts.clamp_min(1)[:, None])[route]


def _spread(examples: Tensor, route: Tensor, counts: Tensor) -> float:
    """The variance of examples within routes as a share of that of all; 0 where no route has two."""
    free = int((counts - 1).clamp_min(0).sum())
    if not free:
        return 0.0
    within = _residuals(examples, route, counts).square().sum() / free
    return float(within / examples.var(0).sum().clamp_min(1e-12))


def _mean_variance(residuals: Tensor) -> Tensor:
    """What the covariance within routes is divided by, so that its mean variance is one."""
    return (residuals.square().sum() / residuals.shape[1]).clamp_min(1e-12)


def _left_out(
    lines: _Lines, metric: Tensor, residuals: Tensor, weight: Tensor, bias: Tensor, found: Prototypes
) -> Tensor:
    """[n, routes]: scores of each example with its point, its route and the metric as they are without it.

    The metric without one example differs by a product of a vector with itself (Sherman and Morrison's formula).

    Args:
        metric: [width, width].
        residuals: [n, width].
        weight: [width, points].
        bias: [points].
    """
    examples, group, points = lines.examples, lines.group, lines.points()
    every, owner = torch.arange(len(group)), lines.owner[group]
    turned = residuals @ metric
    several = lines.counts[owner].float()
    share = several / (several - 1).clamp_min(1) / (_mean_variance(residuals) * (1 + _SHRINK))
    share = torch.where(several > 1, share, 0.0)
    gain = share / (1 - share * (turned * residuals).sum(1)).clamp_min(1e-6)
    along, to_points = (turned * examples).sum(1), turned @ points.T
    near = examples @ weight + bias + gain[:, None] * to_points * (along[:, None] - 0.5 * to_points)
    rest = lines.weights[group] - 1
    own = (lines.sums[group] - examples) / rest.clamp_min(1e-6)[:, None]
    to_own = (turned * own).sum(1)
    distance = ((examples - 0.5 * own) * (own @ metric)).sum(1) + gain * to_own * (along - 0.5 * to_own)
    near[every, group] = torch.where(rest > 0, distance, -torch.inf)
    total = lines.total()[owner]
    heights = found.heights + (total / (total - 1).clamp_min(1e-6)).log()[:, None] * (lines.owner == owner[:, None])
    heights[every, group] = (rest / (total - 1).clamp_min(1e-6)).clamp_min(1e-6).log()
    return found.together(near, heights)


def _calibrated(found: Prototypes, space: Space, scores: Tensor, targets: Tensor, total: Tensor) -> Prototypes:
    """Temperature, odds, lift and threshold.

    Args:
        scores: [n, routes], of examples that were left out.
        targets: [n] int64, their routes.
        total: [n], what all lines of these weigh.
    """
    divisor = _temperature(scores, targets)
    inside = scores.amax(1)
    rest = scores.clone()
    rest[torch.arange(len(targets)), targets] = -torch.inf
    everyday = found.logits(space.background)
    # Everyday requests that a route is clearly for are no requests for nobody.
    everyday = everyday[everyday.amax(1) < inside.quantile(0.25)]
    outside = torch.cat([rest, everyday])
    high, low = inside, outside.amax(1)
    gap = float((high.mean() - low.mean()).clamp_min(1e-4))
    spread = float(((high.var(correction=0) + low.var(correction=0)) / 2).clamp_min(1e-6))
    slope = gap / spread
    cut = float(high.mean() + low.mean()) / 2 - math.log(_KNOWN / (1 - _KNOWN)) / slope
    fitted = replace(found, temperature=divisor, slope=slope, cut=cut)
    correct = scores.argmax(1) == targets
    fitted = replace(fitted, lift=_lift(fitted.log_scores(scores)[:, :-1].amax(1), correct))
    # A route with all of its lines is told apart better than one that lacks the line which is scored, as measured on
    # nine boards of intents with 3, 5 and 10 examples a route: by about this factor of the temperature.
    fitted = replace(fitted, fullness=float(((total - 1) / total).mean()))
    confidence = fitted.log_scores(torch.cat([scores, outside]))[:, :-1].amax(1).exp()
    known = torch.arange(len(confidence)) < len(scores)
    right = torch.cat([correct, known[len(scores) :]])
    return replace(fitted, threshold=choose_threshold(confidence, right, known))


def _lift(sure: Tensor, correct: Tensor) -> float:
    """The likeliest lift of left-out examples; with few of them, near the usual one. Never below zero.

    Args:
        sure: [n] float64 log-probabilities of the best routes, without a lift.
        correct: [n] bool, whether these are right.
    """
    odds = sure - torch.log1p(-sure.exp().clamp_max(1 - 1e-9))
    grid = torch.linspace(0, 6, 121, dtype=torch.float64)
    losses = torch.stack([softplus(torch.where(correct, -1, 1) * (odds + lift)).sum() for lift in grid])
    prior = (grid - _LIFT).square() * _LIFT_ROWS / 8
    return float(grid[(losses + prior).argmin()])


def _temperature(scores: Tensor, targets: Tensor) -> float:
    """The likeliest temperature of left-out examples; with few of them, near the usual one."""
    grid = torch.logspace(-3.5, 0, 200, dtype=torch.float64)
    losses = torch.stack([cross_entropy(scores.double() / t, targets, reduction="sum") for t in grid])
    prior = (grid / _TEMPERATURE).log().square() / (2 * _DOUBT**2)
    return float(grid[(losses + prior).argmin()])


def _uncalibrated(found: Prototypes, space: Space, examples: bool) -> Prototypes:
    """With descriptions alone nothing can be left out: only everyday requests say what a score means."""
    everyday = found.logits(space.background)
    temperature, best = _TEMPERATURE if examples else _TEMPERATURE_BARE, everyday.amax(1)
    sharp, nobody = 1.5, best
    if len(found.hub) >= MANY:  # some of many intents are what people ask for every day
        sharp, clear = 3.0, (everyday / temperature).softmax(1).amax(1) > 0.5
        nobody = best[~clear] if bool((~clear).any()) else best
    slope = sharp / float(best.std().clamp_min(1e-3))
    fitted = replace(found, temperature=temperature, slope=slope, cut=float(nobody.quantile(0.75)))
    taken = fitted.log_scores(everyday)[:, :-1].amax(1).exp()
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
        return cls(tuple(options), space, fit_prototypes(options, space, broad=len(options) < MANY))

    def __call__(self, states: Tensor) -> Tensor:
        """[n, experts + 1] float32: log-odds of each expert among them, and that any is for the text.

        Args:
            states: [n, layers x hidden_size], of `prototypes.layers`.
        """
        x = self.space.of_states(states)
        logits = self.prototypes.logits(x)
        return torch.cat([logits / self.prototypes.temperature, self.prototypes.odds(logits)[:, None]], 1)


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
        x = self.space([text_of(messages) for messages in messages_batch], self.prototypes.layers)
        rows = self.prototypes.log_scores(self.prototypes.logits(x)).exp().tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def with_expert(self, option: RouteOption) -> "DescribedRouter":
        own = None if self.threshold == self.prototypes.threshold else self.threshold
        options = [*(known for known in self.options if known.name != option.name), option]
        return DescribedRouter(options, self.space, fallback=self.fallback, threshold=own)

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
        plain: gives that of the same encoder without its update, for routes that it does not suit; called once, by the
            first list of such. None: `space` is for all.
    """

    def __init__(self, space: Space, plain: Callable[[], Space] | None = None) -> None:
        self._space = space
        self._plain = None if plain is None else functools.cache(plain)
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
                space = self._space if self._plain is None or suits_update(options) else self._plain()
                self._routers[options] = DescribedRouter(options, space)
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
