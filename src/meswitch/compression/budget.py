"""`--target-bpw`: how each tensor is stored, so that the artifact's file keeps a budget.

Every tensor offers a few ways, each with its bytes and the harm that is expected of it: bits and salient channels of
its codes, or the rank of a pair of thin matrices. Harms add up, so the best mix under a budget takes the tensors'
convex hulls in the order of harm avoided per byte: the Lagrangian solution, as Delta-CoMe (arXiv 2406.08903) and
PrinMix (2506.11087) solve it by search and by ILP.

The harm of a way is the squared error that it leaves, each input channel weighed by the energy of the layer's inputs
(ME-Switch's saliency, section 3), times what the model minds of such errors. That is measured where the model fits into
memory, by rounding tensors to 2 bits: the divergence from the full expert on a few sequences gives nats a token for
each unit of their error. Rounding must not shorten the deltas there (`lengthen`), else what is lost along all of them
adds up, and is not the sum of what each loses alone. All tensors of a kind are rounded together, and once more each by
itself: of fine-tunes of a pretrained model layers differ by less than two, and the noise of single measurements does
more harm than they can tell; of models whose layers differ it is the other way. Which mix is taken is decided by the
divergence of the whole model, rounded by each. What is cut off, as a pair of thin matrices cuts off a delta's
smaller directions, counts more than a rounding error (`_CUT`): it adds up over tokens.
"""

import contextlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meswitch.architecture import EMBEDDING, HEAD, STACKS, Conversion, from_matrix
from meswitch.artifact.reader import layer_type
from meswitch.checkpoint import Checkpoint
from meswitch.codec import (
    Rank,
    Spec,
    dequantize,
    encode,
    encode_pair,
    mse_scales,
    nbytes,
    pair_shapes,
    quantize,
    same_bits,
    spectrum,
    stored_shapes,
)
from meswitch.codec.delta import reconstruction_error, without_negligible
from meswitch.codec.quantize import expand_scale
from meswitch.codec.words import LENGTHS, nearest_words, signs_of, word_scales, words_fit
from meswitch.compression.convert import difference, roles_of
from meswitch.compression.distill.student import Outputs, frozen, read_batch
from meswitch.compression.distill.training import Sample, divergence, in_batches, mean, weights
from meswitch.compression.inputs import Walk
from meswitch.compression.options import Options
from meswitch.compression.partial_model import working_dtype
from meswitch.errors import ConfigError
from meswitch.units import Progress, silent

_SAMPLE = 256  # rows
_SALIENT = (0, 1, 2, 4)  # multiples of one channel in 512
_RANKS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_TABLE = 0.2  # where it is not measured: harm of a squared unit of an embedding or head, against 1 of a linear layer
_CUT = 10.0  # harm of a squared unit that is cut off, against 1 that is a rounding error
_PROBE = Spec(bits=2, salient=0)
_PROBE_TOKENS = 4096
_QUESTION = 0.1  # what a token that is not the assistant's counts, as in training
_HEADER = 85  # bytes that a stored part takes in the file's header, beside its module's name; at most


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a tensor.

    Args:
        nbytes: of all its parts.
        harm: in any unit that all tensors share.
    """

    spec: Spec | Rank
    nbytes: int
    harm: float


def hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those on the lower convex hull of harm over bytes, by rising bytes: every next one pays less for each byte."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.harm)):
        if found and candidate.harm >= found[-1].harm:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-2], candidate):
            found.pop()
        found.append(candidate)
    return found


def _gain(before: Candidate, after: Candidate) -> float:
    return (before.harm - after.harm) / (after.nbytes - before.nbytes)


def allocate(offers: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Spec | Rank] | None:
    """The mix of least harm: tensor -> spec; None if even the cheapest mix takes more than `budget` bytes."""
    hulls = {name: hull(candidates) for name, candidates in offers.items()}
    left = budget - sum(candidates[0].nbytes for candidates in hulls.values())
    if left < 0:
        return None
    level = dict.fromkeys(hulls, 0)
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        candidates, at = hulls[name], level[name]
        if at + 1 < len(candidates):
            heapq.heappush(steps, (-_gain(candidates[at], candidates[at + 1]), name))

    for name in hulls:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        candidates, at = hulls[name], level[name]
        cost = candidates[at + 1].nbytes - candidates[at].nbytes
        if cost <= left:  # what does not fit is passed over: a smaller step of another tensor still may
            left -= cost
            level[name] = at + 1
            offer(name)
    return {name: candidates[level[name]].spec for name, candidates in hulls.items()}


def offers(
    delta: Tensor, spec: Spec, energy: Tensor | None, *, is_table: bool, has_salient: bool, overhead: int = 0
) -> list[Candidate]:
    """Ways to store a delta, with their bytes and the harm they do.

    Args:
        delta: [rows, in_features] float32.
        spec: what is not tried: damping, and the group size beside a whole row.
        energy: [in_features] float32, mean square of the inputs; None weighs all channels alike.
        is_table: of an embedding or a head: try pairs of thin matrices too.
        has_salient: try salient channels.
        overhead: bytes that each stored part takes besides its own.
    """
    rows, width = delta.shape
    chosen = torch.linspace(0, rows - 1, min(rows, _SAMPLE), device=delta.device).round().long()
    sample, least = delta[chosen], torch.finfo(torch.float32).tiny
    if energy is not None:
        energy = energy / energy.mean().clamp_min(least)
    sampled = float(delta.square().sum() / sample.square().sum().clamp_min(least))
    found: list[Candidate] = []

    def add(way: Spec | Rank, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], lost: float) -> None:
        found.append(Candidate(way, nbytes(shapes) + overhead * len(shapes), lost))

    for group_size in dict.fromkeys((spec.group_size, None)):
        for bits in (1, 2, 3, 4):
            falling = _rounding_error(sample, bits, group_size, energy).sort(descending=True).values.double()
            for multiple in _SALIENT if has_salient else (0,):
                count = min(multiple * max(1, width // 512), width)
                way = replace(spec, bits=bits, salient=count, group_size=group_size)
                shapes = stored_shapes(rows, width, way, 0, torch.float32)
                add(way, shapes, float(falling[count:].sum()) * sampled)
        for length in (length for length in LENGTHS if words_fit(width, group_size, length)):
            way = replace(spec, bits=1, salient=0, group_size=group_size, block=length)
            lost = float(_word_error(sample, length, group_size, energy).sum()) * sampled
            add(way, stored_shapes(rows, width, way, 0, torch.float32), lost)
    if is_table:
        left = spectrum(delta).double().flip(0).cumsum(0).flip(0)
        for rank in (r for r in _RANKS if r < len(left)):
            add(Rank(rank, spec.row_floor), pair_shapes(rows, width, rank), float(left[rank]) * _CUT)
    return found


def _rounding_error(delta: Tensor, bits: int, group_size: int | None, energy: Tensor | None) -> Tensor:
    scale = mse_scales(delta, bits, group_size)
    restored = dequantize(quantize(delta, scale, bits, group_size), scale, bits, group_size)
    return reconstruction_error(delta, restored, energy)


def _word_error(delta: Tensor, length: int, group_size: int | None, energy: Tensor | None) -> Tensor:
    scale = expand_scale(word_scales(delta, length, group_size).float(), delta.shape[1], group_size)
    return reconstruction_error(delta, signs_of(nearest_words(delta, length), length) * scale, energy)


def specs_within(
    base: Checkpoint,
    expert: Checkpoint,
    options: Options,
    moments: list[list[int]] | None,
    starts: Sequence[int],
    measure: bool,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, Spec | Rank]:
    """How every tensor that changed is stored, so that the tensor file takes at most `options.target_bpw`.

    The budget counts the whole file, header included, over all parameters of the expert.

    Args:
        moments: token ids over which the inputs of layers are measured; None weighs all inputs alike.
        starts: of each sequence, where the assistant's last turn starts.
        measure: whether the full expert fits into memory twice, so that what it minds can be measured.

    Raises:
        ConfigError: the budget is below what the smallest mix takes.
    """
    assert options.target_bpw is not None
    energies = {} if moments is None else _input_energies(expert, moments, device)
    found, fixed = _all_offers(base, expert, options, energies, device, progress)
    budget = int(options.target_bpw * expert.parameters / 8) - fixed
    least = fixed + sum(hull(ways)[0].nbytes for ways in found.values())
    if least - fixed > budget:
        raise ConfigError(
            f"target_bpw: {options.target_bpw} cannot be reached: the smallest mix takes "
            f"{least * 8 / expert.parameters:.3f} bits a weight; give more"
        )
    roles = roles_of(expert)
    units = {name: _TABLE if roles[name] in (EMBEDDING, HEAD) else 1.0 for name in found}
    if not measure or moments is None:
        return _within(found, units, budget)
    probe = _Probe(base, expert, moments, starts, device)
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(layer_type(name), []).append(name)
    together: dict[tuple[str, ...], list[str]] = {}  # the experts of a mixture become one parameter
    for name in found:
        together.setdefault(probe.rules[name].sources, []).append(name)
    mixes = [_within(found, units, budget)]
    for groups in (list(kinds.values()), list(together.values())):
        mixes.append(_within(found, probe.units(found, groups, progress), budget))
    return min(mixes, key=probe.harm)


def _within(found: Mapping[str, list[Candidate]], units: Mapping[str, float], budget: int) -> dict[str, Spec | Rank]:
    weighed = {name: [replace(way, harm=way.harm * units[name]) for way in ways] for name, ways in found.items()}
    specs = allocate(weighed, budget)
    assert specs is not None  # the smallest mix fits
    return specs


def _all_offers(
    base: Checkpoint,
    expert: Checkpoint,
    options: Options,
    energies: Mapping[str, Tensor],
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, list[Candidate]], int]:
    """The ways to store each tensor that is to be packed, and the bytes of all else."""
    found: dict[str, list[Candidate]] = {}
    fixed, roles = 0, roles_of(expert)
    for done, (name, info) in enumerate(expert.tensors.items(), start=1):
        role, theirs = roles[name], base.info(name)
        if theirs is None or not options.packs(role):
            fixed += info.nbytes + len(name) + _HEADER
            continue
        ours, before = info.read(), base.read(name)
        if same_bits(ours, before):  # as `convert` decides it: what equals the base's costs nothing
            continue
        changed = difference(ours, before, role, device)
        delta = changed.delta
        spec = options.spec(role, delta.shape[1])
        if spec.row_floor:
            delta = without_negligible(delta, spec.row_floor)
            delta = delta[(delta != 0).any(1)]
            fixed += delta.shape[0] * torch.int32.itemsize + len(name) + _HEADER
        fixed += 0 if changed.extra is None else changed.extra.nbytes
        found[name] = offers(
            delta,
            spec,
            energies.get(name),
            is_table=role in (EMBEDDING, HEAD),
            has_salient=role not in (EMBEDDING, *STACKS),
            overhead=len(name) + _HEADER,
        )
        progress("weighing ways to store", done, len(expert.tensors), name)
    return found, fixed


class _Probe:
    """The full expert, to be asked what it minds.

    Args:
        sequences: as of `specs_within`.
        starts: as of `specs_within`.
    """

    def __init__(
        self,
        base: Checkpoint,
        expert: Checkpoint,
        sequences: list[list[int]],
        starts: Sequence[int],
        device: torch.device,
    ) -> None:
        self._base, self._expert, self._device = base, expert, device
        self._model = frozen(expert, device, working_dtype(device, expert.parameters))
        self.rules, self._roles = expert.load_plan.by_source, roles_of(expert)
        self._samples = _first(sequences, starts)
        self._wanted = {batch[0].number: self._read(batch) for batch in in_batches(self._samples)}

    def _read(self, batch: list[Sample]) -> Outputs:
        return read_batch(self._model, [sample.ids for sample in batch], self._device)

    @torch.no_grad()
    def harm(self, ways: Mapping[str, Spec | Rank]) -> float:
        """Divergence from the full expert in nats a token when these tensors are stored so, and no other is changed."""
        together: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for name, way in ways.items():
            together.setdefault(self.rules[name].sources, {})[name] = self._rounded(name, way)
        with contextlib.ExitStack() as replaced:
            for sources, tensors in together.items():
                rule = self.rules[sources[0]]
                replaced.enter_context(_replaced(self._model, self._expert, rule, tensors))
            return mean(self._samples, _QUESTION, self._lost)

    def _lost(self, batch: list[Sample]) -> float:
        """Divergence from the full expert on a batch, in nats a token."""
        full, said = self._wanted[batch[0].number], self._read(batch)
        weight = weights(batch, _QUESTION, self._device)
        return float((divergence(full.logits, said.logits)[said.real] * weight).sum())

    def units(
        self, found: Mapping[str, list[Candidate]], groups: list[list[str]], progress: Progress
    ) -> dict[str, float]:
        """Tensor name -> nats a token for each unit of its error, those of a group rounded together."""
        units: dict[str, float] = {}
        for done, names in enumerate(groups):
            progress("measuring what the model minds", done, len(groups), names[0])
            lost = self.harm(dict.fromkeys(names, _PROBE))
            error = sum(next(way.harm for way in found[name] if _is_probe(way.spec)) for name in names)
            units |= dict.fromkeys(names, max(lost, 0.0) / error if error else 0.0)
        return units

    def _rounded(self, name: str, way: Spec | Rank) -> Tensor:
        """A tensor of the expert, its delta stored in a way without calibration."""
        full, role = self._expert.read(name), self._roles[name]
        changed = difference(full, self._base.read(name), role, self._device)
        if isinstance(way, Rank):
            made = encode_pair(changed.delta, way, name=name).dequantize()
        else:
            made = encode(changed.delta, way, name=name, lengthen=True).dequantize()
        rounded = made.add_(changed.base)
        if changed.extra is not None:
            rounded = torch.cat([rounded, changed.extra.to(rounded)])
        return from_matrix(rounded, tuple(full.shape), role).to(full.dtype).cpu()


def _is_probe(way: Spec | Rank) -> bool:
    return isinstance(way, Spec) and (way.bits, way.salient, way.block) == (_PROBE.bits, _PROBE.salient, None)


def _first(sequences: list[list[int]], starts: Sequence[int]) -> list[Sample]:
    """The first sequences, up to the tokens that a probe reads."""
    chosen: list[Sample] = []
    total = 0
    for ids, start in zip(sequences, starts, strict=True):
        if total and total + len(ids) > _PROBE_TOKENS:
            break
        chosen.append(Sample(ids, start, len(chosen)))
        total += len(ids)
    return chosen


@contextlib.contextmanager
def _replaced(model: Any, expert: Checkpoint, rule: Conversion, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other tensors in the place of some of the expert's, for a while.

    Args:
        rule: how they are loaded.
    """
    made = rule.build(lambda name: tensors[name] if name in tensors else expert.read(name), model)
    kept = {name: model.get_parameter(name).data for name in rule.targets}
    for name, value in kept.items():
        model.get_parameter(name).data = made[name].to(value.device, value.dtype)
    try:
        yield
    finally:
        for name, value in kept.items():
            model.get_parameter(name).data = value


def _input_energies(expert: Checkpoint, moments: list[list[int]], device: torch.device) -> Mapping[str, Tensor]:
    """Mean square of every linear layer's inputs: tensor name -> [in_features] float32."""
    energies: dict[str, Tensor] = {}
    for _, seen in Walk(expert, moments, device, working_dtype(device, expert.parameters), pairs=False).steps():
        for name, inputs in seen.items():
            different = {id(own): own for _, own in inputs}.values()
            if tokens := sum(own.tokens for own in different):
                energies[name] = torch.stack([own.energy * (own.tokens / tokens) for own in different]).sum(0)
    return energies
