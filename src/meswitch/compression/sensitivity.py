"""What storing a tensor in fewer bits does to the whole model.

The rounding error of each way to store it is computed from a sample of its rows, weighted with the energy of the
layer's inputs (ME-Switch's saliency, section 3, summed over the channels that are not salient). How much the model
minds is measured: one tensor at a time is rounded, the rest left whole, and the divergence from the full expert on a
few sequences gives nats a token for each unit of that tensor's error.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from meswitch.checkpoint import Checkpoint
from meswitch.codec import Spec, dequantize, mse_scales, nbytes, quantize, stored_shapes
from meswitch.codec.salient import reconstruction_error
from meswitch.compression.allocation import Candidate
from meswitch.compression.divergence import divergence
from meswitch.compression.student import frozen, read_batch
from meswitch.compression.walk import compute_dtype

_SAMPLE = 256  # rows
_SALIENT = (0, 1, 2, 4)  # multiples of one channel in 512
_PROBE_BITS = 2
_PROBE_TOKENS = 4096
_BATCH = 16


def offers(
    delta: Tensor, spec: Spec, energy: Tensor | None, *, is_embedding: bool, overhead: int = 0
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
        for multiple in (0,) if is_embedding else _SALIENT:
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
    names: list[str],
    group_size: int | None,
    sequences: list[list[int]],
    device: torch.device,
) -> dict[str, float]:
    """Divergence from the full expert in nats a token when only this tensor is rounded to 2 bits: name -> KL."""
    dtype = compute_dtype(device)
    model = frozen(expert, device, dtype)
    parameters = dict(model.named_parameters())
    batches = _batches(sequences)
    wanted = [read_batch(model, batch, device).logits for batch in batches]
    tokens = sum(len(sequence) for batch in batches for sequence in batch)
    harm = {}
    for name in names:
        weight = parameters[name].data
        before = base.read(name).to(device, torch.float32)
        delta = weight[: len(before)].float() - before
        scale = mse_scales(delta, _PROBE_BITS, group_size)
        rounded = dequantize(quantize(delta, scale, _PROBE_BITS, group_size), scale, _PROBE_BITS, group_size)
        kept = weight[: len(before)].clone()
        weight[: len(before)] = (before + rounded).to(dtype)
        harm[name] = 0.0
        for batch, target in zip(batches, wanted, strict=True):
            found = read_batch(model, batch, device)
            harm[name] += float(divergence(target, found.logits)[found.real].sum()) / tokens
        weight[: len(before)] = kept
    return harm


def weighted(found: Mapping[str, list[Candidate]], harm: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """Candidates with their errors in nats a token: scaled so that 2 bits without salient channels do `harm`."""
    result = {}
    for name, candidates in found.items():
        probe = next(c for c in candidates if c.spec.bits == _PROBE_BITS and c.spec.salient == 0)
        unit = max(harm[name], 0.0) / probe.harm if probe.harm else 0.0
        result[name] = [replace(candidate, harm=candidate.harm * unit) for candidate in candidates]
    return result


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
