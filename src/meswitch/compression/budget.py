"""`--target-bpw`: which tensor gets how many bits and salient channels, so that the artifact's file keeps a budget."""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.checkpoint import Checkpoint
from meswitch.codec import Spec
from meswitch.codec.rows import without_negligible
from meswitch.compression.allocation import Candidate, allocate, hull
from meswitch.compression.compatibility import role_of
from meswitch.compression.convert import Progress
from meswitch.compression.options import Options
from meswitch.compression.sensitivity import measured, offers, weighted
from meswitch.compression.walk import compute_dtype, walk
from meswitch.errors import ConfigError

_HEADER = 85  # bytes that a stored part takes in the file's header, beside its module's name; at most


def specs_within(
    base: Checkpoint,
    expert: Checkpoint,
    options: Options,
    moments: list[list[int]] | None,
    *,
    measure: bool,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Spec]:
    """A spec for every tensor that is to be packed, so that the tensor file takes at most `options.target_bpw`.

    The budget counts the whole file, header included, over all parameters of the expert.

    Args:
        moments: token ids over which the inputs of layers are measured; None weighs all inputs alike.
        measure: measure each tensor's effect on the model's output (both models' weights must fit); without it, or
            without token ids, a tensor's error is weighed against what the layer itself puts out.

    Raises:
        ConfigError: the budget is below what the smallest mix takes.
    """
    assert options.target_bpw is not None
    energies = {} if moments is None else _input_energies(expert, moments, device)
    found: dict[str, list[Candidate]] = {}
    outputs: dict[str, float] = {}
    fixed = 0
    for done, (name, info) in enumerate(expert.tensors.items(), start=1):
        role, theirs = role_of(name, len(info.shape)), base.info(name)
        if theirs is None or not options.packs(role, len(info.shape)):
            fixed += info.nbytes + len(name) + _HEADER
            continue
        ours, before = info.read(), base.read(name)
        if ours.dtype == before.dtype and torch.equal(ours, before):
            continue
        rows = min(len(ours), len(before))
        delta = ours[:rows].to(device, torch.float32) - before[:rows].to(device, torch.float32)
        spec = options.spec(role, delta.shape[1])
        if spec.row_floor:
            delta = without_negligible(delta, spec.row_floor)
            delta = delta[(delta != 0).any(1)]
            fixed += delta.shape[0] * torch.int32.itemsize + len(name) + _HEADER
        fixed += (len(ours) - rows) * ours.shape[1] * ours.element_size()
        energy = energies.get(name)
        found[name] = offers(delta, spec, energy, is_embedding=role == "embedding", overhead=len(name) + _HEADER)
        outputs[name] = _output(ours[:rows].to(device, torch.float32), energy)
        if progress is not None:
            progress(done, len(expert.tensors), f"bits for {name}")
    if measure and moments is not None:
        harm = measured(base, expert, list(found), options.group_size, moments, device)
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

    def visit(module: str, inputs: Tensor) -> None:
        energies[f"{module}.weight"] = inputs.float().square().mean(0)

    walk(expert, moments, visit, device=device, dtype=compute_dtype(device))
    return energies


def _output(weight: Tensor, energy: Tensor | None) -> float:
    """Energy of the layer's output if its input channels were uncorrelated."""
    power = weight.square().sum(0)
    return max(float((power if energy is None else power * energy).sum()), torch.finfo(torch.float32).tiny)
