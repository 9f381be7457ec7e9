"""What a training takes, and which way it is done where nobody says so."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meswitch.checkpoint import Checkpoint
from meswitch.compression.distill.recipe import Recipe, Scope
from meswitch.compression.distill.training import fast_products, training_dtype
from meswitch.units import format_bytes

END_TO_END_PARAMETERS = 2_000_000_000  # above, a step end to end takes seconds, and blocks need fewer of them
STEP_TOKENS = 2048  # of a step that are in memory at once
# For every parameter: expert, base, matrices as they are restored, latent weights, their gradients and AdamW's two
# moments in 4 bytes each, the gradients of the matrices, levels.
_BYTES_A_PARAMETER = 40
_LOGITS = 8  # tensors as large as the logits of a step's part
_STATES = 24  # numbers that a block keeps for the gradient, a token and a hidden unit
_FREE = 0.8
_WORK = 8  # operations for a parameter and token: forward of both models, backward of one
_EFFICIENCY = 0.35  # of what a large product reaches
_LAUNCHES = {"cuda": 1e-3, "cpu": 2e-4}  # seconds a step for every matrix that is restored


@dataclass(frozen=True, slots=True)
class Cost:
    """What a training takes.

    Args:
        seconds: about, on this device as it is now.
        nbytes: of the device's memory, at most.
    """

    seconds: float
    nbytes: int


def end_to_end_bytes(expert: Checkpoint) -> int:
    """About how much memory a training end to end takes on the device."""
    config = expert.config.get_text_config()
    for_tokens = config.vocab_size * _LOGITS + config.num_hidden_layers * config.hidden_size * _STATES
    return int(expert.parameters * _BYTES_A_PARAMETER + STEP_TOKENS * for_tokens * 4)


def scope_for(expert: Checkpoint, device: torch.device) -> Scope:
    """End to end where the whole model fits in the device's free memory as often as that takes, else block by block."""
    if device.type != "cuda":
        return "model"
    fits = end_to_end_bytes(expert) <= _FREE * torch.cuda.mem_get_info(device)[0]
    return "model" if fits and expert.parameters <= END_TO_END_PARAMETERS else "block"


def cost_of(expert: Checkpoint, lengths: Sequence[int], recipe: Recipe, device: torch.device) -> Cost:
    """What a training takes.

    Args:
        lengths: of the calibration text's sequences, in tokens.
    """
    mean = sum(min(length, recipe.length or length) for length in lengths) / len(lengths)
    tokens = recipe.steps * recipe.batch * mean * 1.1  # a tenth is padding and looks at held-out text
    work = tokens * expert.parameters * _WORK
    matrices = sum(len(info.shape) > 1 for info in expert.tensors.values())
    seconds = work / (_EFFICIENCY * _rate(training_dtype(expert, device), device))
    if recipe.scope == "model":
        seconds += recipe.steps * matrices * _LAUNCHES.get(device.type, 1e-3)
        return Cost(seconds, end_to_end_bytes(expert))
    config = expert.config.get_text_config()
    # every block's states go through it three times more, and its weights are read twice
    passes = 3 * sum(lengths) * expert.parameters * 2 / (_EFFICIENCY * _rate(torch.bfloat16, device))
    largest = expert.parameters // max(1, config.num_hidden_layers)
    head = 2 * config.vocab_size * config.hidden_size * 4
    return Cost(seconds + passes + expert.nbytes / 1e9, max(largest * _BYTES_A_PARAMETER, head * 5))


def statement(recipe: Recipe, cost: Cost) -> str:
    """What a person is told before a training starts."""
    way = "end to end" if recipe.scope == "model" else "block by block"
    return (
        f"training {way} for {recipe.steps} steps: takes {duration(cost.seconds)} and {format_bytes(cost.nbytes)} of "
        "memory; --distill 0 leaves it out"
    )


def duration(seconds: float) -> str:
    """`about 40 seconds`, `about 12 minutes`, `about 5 hours`."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"about {seconds / unit:.0f} {name}"
    return f"about {seconds:.0f} seconds"


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second that a large product reaches."""
    side = 4096 if device.type == "cuda" else 512
    one = torch.ones(side, side, device=device, dtype=dtype)
    with fast_products():
        best = float("inf")
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            one @ one
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
