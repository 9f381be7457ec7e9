"""`--target-bpw`: which tensor gets how many bits and salient channels, so that the artifact's file keeps a budget.

Every tensor offers a few ways to be stored, each with its bytes and with the harm it is expected to do to the whole
model. The rounding error of each way is computed from a sample of the tensor's rows, weighted with the energy of the
layer's inputs (ME-Switch's saliency, section 3, summed over the channels that are not salient). How much the model
minds is measured: one tensor at a time is rounded, the rest left whole, and the divergence from the full expert on a
few sequences gives nats a token for each unit of that tensor's error. Harms add up, so the best mix under a budget
takes the tensors' convex hulls in the order of harm avoided per byte: the Lagrangian solution, as Delta-CoMe
(arXiv 2406.08903) and PrinMix (2506.11087) solve it by search and by ILP.
"""

import contextlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meswitch.architecture import EMBEDDING, STACKS, Conversion, as_matrix, from_matrix
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Spec, dequantize, mse_scales, nbytes, quantize, same_bits, stored_shapes
from meswitch.codec.rows import without_negligible
from meswitch.codec.salient import reconstruction_error
from meswitch.compression.convert import roles_of
from meswitch.compression.distill.student import frozen, read_batch
from meswitch.compression.distill.training import divergence
from meswitch.compression.inputs import Walk
from meswitch.compression.lazy_model import compute_dtype
from meswitch.compression.options import Options
from meswitch.compression.saved_work import NOWHERE, SavedWork, digest
from meswitch.errors import ConfigError
from meswitch.progress import Progress, silent

_SAMPLE = 256  # rows
_SALIENT = (0, 1, 2, 4)  # multiples of one channel in 512
_PROBE_BITS = 2
_PROBE_TOKENS = 4096
_BATCH = 16
_HEADER = 85  # bytes that a stored part takes in the file's header, beside its module's name; at most


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a tensor. nbytes: of all its parts. harm: nats a token, or any unit that all tensors share."""

    spec: Spec
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


def allocate(offers: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Spec] | None:
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
    delta: Tensor, spec: Spec, energy: Tensor | None, *, has_salient: bool, overhead: int = 0
) -> list[Candidate]:
    """Ways to store a delta, with their bytes and the output error they leave.

    Args:
        delta: [rows, in_features] float32. spec: what is not tried: group size, damping.
        energy: [in_features] float32, mean square of the inputs; None weighs all channels alike.
        overhead: bytes that each stored part takes besides its own.
    """
    rows, width = delta.shape
    chosen = torch.linspace(0, rows - 1, min(rows, _SAMPLE), device=delta.device).round().long()
    sample = delta[chosen]
    found = []
    for bits in (1, 2, 3, 4):
        error = _rounding_error(sample, bits, spec.group_size, energy) * (rows / len(chosen))
        falling = error.sort(descending=True).values.double()
        for multiple in _SALIENT if has_salient else (0,):
            count = min(multiple * max(1, width // 512), width)
            way = replace(spec, bits=bits, salient=count)
            shapes = stored_shapes(rows, width, way, 0, torch.float32)
            found.append(Candidate(way, nbytes(shapes) + overhead * len(shapes), float(falling[count:].sum())))
    return found


def _rounding_error(delta: Tensor, bits: int, group_size: int | None, energy: Tensor | None) -> Tensor:
    scale = mse_scales(delta, bits, group_size)
    restored = dequantize(quantize(delta, scale, bits, group_size), scale, bits, group_size)
    return reconstruction_error(delta, restored, energy)


@torch.no_grad()
def measured(
    base: Checkpoint,
    expert: Checkpoint,
    errors: Mapping[str, float],
    group_size: int | None,
    sequences: list[list[int]],
    device: torch.device,
    progress: Progress = silent,
    work: SavedWork = NOWHERE,
) -> dict[str, float]:
    """Divergence from the full expert in nats a token when only this tensor is rounded to 2 bits: name -> KL.

    Tensors that become a parameter together, as the experts of a mixture do, are rounded together: each has a share of
    the divergence, as much as its error is of theirs.

    Args:
        errors: name -> error of its output when it is rounded to 2 bits.
    """
    dtype = compute_dtype(device, expert.parameters)
    model = frozen(expert, device, dtype)
    rules, roles = expert.load_plan.by_source, roles_of(expert)
    together: dict[tuple[str, ...], list[str]] = {}
    for name in errors:
        together.setdefault(rules[name].sources, []).append(name)
    batches = _batches(sequences)
    wanted = [read_batch(model, batch, device).logits for batch in batches]
    tokens = sum(len(sequence) for batch in batches for sequence in batch)
    plan = digest(fingerprint(base), fingerprint(expert), group_size, sequences, device.type)
    saved = work.load("sensitivity", plan)
    found: dict[str, float] = {} if saved is None else saved[0]
    for done, names in enumerate(together.values(), start=1):
        if names[0] in found:
            continue
        progress("measuring what the model minds", done - 1, len(together), names[0])
        rounded = {name: _rounded(base, expert, name, roles[name], group_size, device) for name in names}
        harm = 0.0
        with _replaced(model, expert, rules[names[0]], rounded):
            for batch, full in zip(batches, wanted, strict=True):
                said = read_batch(model, batch, device)
                harm += float(divergence(full, said.logits)[said.real].sum()) / tokens
        found[names[0]] = harm
        if work.due or done == len(together):
            work.save("sensitivity", plan, found)
    shares: dict[str, float] = {}
    for names in together.values():
        total = sum(errors[name] for name in names)
        shares |= {name: found[names[0]] * (errors[name] / total if total else 0.0) for name in names}
    return shares


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


def _rounded(
    base: Checkpoint, expert: Checkpoint, name: str, role: str, group_size: int | None, device: torch.device
) -> Tensor:
    """A tensor of the expert, its delta rounded as `measured` does it."""
    full = expert.read(name)
    ours, before = as_matrix(full, role).to(device), as_matrix(base.read(name), role).to(device, torch.float32)
    rows = min(len(ours), len(before))
    delta = ours[:rows].float() - before[:rows]
    scale = mse_scales(delta, _PROBE_BITS, group_size)
    rounded = dequantize(quantize(delta, scale, _PROBE_BITS, group_size), scale, _PROBE_BITS, group_size)
    rounded = torch.cat([before[:rows] + rounded, ours[rows:].float()])
    return from_matrix(rounded, tuple(full.shape), role).cpu()


def weighted(found: Mapping[str, list[Candidate]], harm: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """Candidates with their errors in nats a token: scaled so that 2 bits without salient channels do `harm`."""
    result = {}
    for name, candidates in found.items():
        error = _probed(candidates)
        unit = max(harm[name], 0.0) / error if error else 0.0
        result[name] = [replace(candidate, harm=candidate.harm * unit) for candidate in candidates]
    return result


def _probed(candidates: Sequence[Candidate]) -> float:
    """The error that 2 bits without salient channels leave."""
    return next(c.harm for c in candidates if c.spec.bits == _PROBE_BITS and c.spec.salient == 0)


def _batches(sequences: list[list[int]]) -> list[list[list[int]]]:
    """The first sequences, up to the tokens that a probe reads, in batches of similar lengths."""
    chosen, total = [], 0
    for tokens in sequences:
        if total and total + len(tokens) > _PROBE_TOKENS:
            break
        chosen.append(tokens)
        total += len(tokens)
    chosen.sort(key=len)
    return [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]


def specs_within(
    base: Checkpoint,
    expert: Checkpoint,
    options: Options,
    moments: list[list[int]] | None,
    measure: bool,
    device: torch.device,
    progress: Progress = silent,
    work: SavedWork = NOWHERE,
) -> dict[str, Spec]:
    """A spec for every tensor that is to be packed, so that the tensor file takes at most `options.target_bpw`.

    The budget counts the whole file, header included, over all parameters of the expert.

    Args:
        moments: token ids over which the inputs of layers are measured; None weighs all inputs alike.
        measure: measure each tensor's effect on the model's output (both models' weights must fit); without it, or
            without token ids, a tensor's error is weighed against what the layer itself puts out.
        work: where what was measured is saved now and then.

    Raises:
        ConfigError: the budget is below what the smallest mix takes.
    """
    assert options.target_bpw is not None
    energies = {} if moments is None else _input_energies(expert, moments, device)
    found: dict[str, list[Candidate]] = {}
    outputs: dict[str, float] = {}
    fixed, roles = 0, roles_of(expert)
    for done, (name, info) in enumerate(expert.tensors.items(), start=1):
        role, theirs = roles[name], base.info(name)
        if theirs is None or not options.packs(role):
            fixed += info.nbytes + len(name) + _HEADER
            continue
        ours, before = info.read(), base.read(name)
        if same_bits(ours, before):  # as `convert` decides it: what equals the base's costs nothing
            continue
        ours, before = as_matrix(ours, role), as_matrix(before, role)
        rows = min(len(ours), len(before))
        delta = ours[:rows].to(device, torch.float32) - before[:rows].to(device, torch.float32)
        spec = options.spec(role, delta.shape[1])
        if spec.row_floor:
            delta = without_negligible(delta, spec.row_floor)
            delta = delta[(delta != 0).any(1)]
            fixed += delta.shape[0] * torch.int32.itemsize + len(name) + _HEADER
        fixed += (len(ours) - rows) * ours.shape[1] * ours.element_size()
        energy = energies.get(name)
        salient = role not in (EMBEDDING, *STACKS)
        found[name] = offers(delta, spec, energy, has_salient=salient, overhead=len(name) + _HEADER)
        outputs[name] = _output(ours[:rows].to(device, torch.float32), energy)
        progress("weighing ways to store", done, len(expert.tensors), name)
    if measure and moments is not None:
        errors = {name: _probed(ways) for name, ways in found.items()}
        harm = measured(base, expert, errors, options.group_size, moments, device, progress, work)
        found = weighted(found, harm)
    else:
        found = {
            name: [Candidate(c.spec, c.nbytes, c.harm / outputs[name]) for c in ways] for name, ways in found.items()
        }
    budget = int(options.target_bpw * expert.parameters / 8) - fixed
    specs = allocate(found, budget)
    if specs is None:
        least = fixed + sum(hull(ways)[0].nbytes for ways in found.values())
        raise ConfigError(
            f"target_bpw: {options.target_bpw} cannot be reached: the smallest mix takes "
            f"{least * 8 / expert.parameters:.3f} bits a weight; give more, or a larger group size"
        )
    return specs


def _input_energies(expert: Checkpoint, moments: list[list[int]], device: torch.device) -> Mapping[str, Tensor]:
    """Mean square of every linear layer's inputs: tensor name -> [in_features] float32."""
    energies: dict[str, Tensor] = {}
    for _, seen in Walk(expert, moments, device, compute_dtype(device, expert.parameters), pairs=False).steps():
        for name, inputs in seen.items():
            different = {id(own): own for _, own in inputs}.values()
            if tokens := sum(own.tokens for own in different):
                energies[name] = torch.stack([own.energy * (own.tokens / tokens) for own in different]).sum(0)
    return energies


def _output(weight: Tensor, energy: Tensor | None) -> float:
    """Energy of the layer's output if its input channels were uncorrelated."""
    power = weight.square().sum(0)
    return max(float((power if energy is None else power * energy).sum()), torch.finfo(torch.float32).tiny)
