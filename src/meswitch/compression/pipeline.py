"""Checkpoint pair -> artifact: the steps of a compression, in their order.

Options and pair are checked; calibration text is read or written; bits are shared out if there is a budget; one pass
encodes every tensor (`convert`); what was encoded is trained against the full expert (`distill`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from meswitch.adapter import Adapter, find_adapter, write_artifact
from meswitch.artifact import Artifact, rewrite
from meswitch.artifact.writer import SavedWork, check_destination
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Rank, Spec
from meswitch.compression.budget import specs_within
from meswitch.compression.compatibility import check_same_base, matched, remarks
from meswitch.compression.convert import Converter, Preparation
from meswitch.compression.distill.blockwise import train_blocks
from meswitch.compression.distill.student import check_trainable
from meswitch.compression.distill.training import (
    about_duration,
    check_text,
    cost_of,
    fast_products,
    scope_for,
    statement,
    train_end_to_end,
)
from meswitch.compression.options import Options, TrainingRecipe, check_none_given
from meswitch.compression.partial_model import check_blocks
from meswitch.compression.text import CalibrationSet, gather
from meswitch.cpu import fitting_threads
from meswitch.errors import IncompatibleError
from meswitch.tokenizer import ChatTokenizer, has_tokenizer
from meswitch.units import Progress, format_bytes, silent

DISTILL_SEQUENCES = 32  # of text; fewer train nothing unless steps are asked for
DISTILL_BYTES = 256 << 20  # on a CPU, of experts that are trained unasked: larger ones take hours
_SEQUENCE = 256  # tokens of a sequence, where the text is not read yet
MOMENT_TOKENS = 32768  # that second moments are taken over; more text is for training only
# On a CPU, unless they are asked for, fewer: so many weights x tokens, or so many tokens if that is more
CPU_WORK, CPU_MOMENT_TOKENS = 1.5e12, 4096


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Artifact:
    """Compress a fine-tune into an artifact of its difference from the base.

    Args:
        base: a checkpoint directory or hub id.
        expert: the fine-tune, likewise. A PEFT adapter is kept as it was trained.
        out: the directory to create.
        options: what decides its bytes (`meswitch.Options`); None is data-free at 2 bits, `bits="exact"` loses nothing.
        device: where the arithmetic runs, `cpu` or `cuda`.
        overwrite: replace an artifact that exists.
        force: compress an expert of another base too, whose matrices have nothing to do with the base's.
        progress: is told how far each phase is (`meswitch.units`).
        notice: is told, in a line each, what a person should know: large deltas, self-written text.
        settings: single options by name instead, such as `bits=3, calibration="math.jsonl"`.

    What is done is kept in `<out>.partial` in small steps: after an interrupt the same call goes on there. Nothing
    half-written is ever under the name `out`.

    Raises:
        MeswitchError: see `meswitch.errors`.
    """
    options = dataclasses.replace(options or Options(), **settings)
    out, where = Path(out), torch.device(device)
    source = Checkpoint.open(base)
    if (directory := find_adapter(expert, source)) is not None:
        check_none_given(options.given(), directory)
        check_destination(out, overwrite)
        adapter = Adapter.open(directory)
        return write_artifact(source, adapter, out, overwrite=overwrite, progress=progress, notice=notice)
    source, target = matched(source, Checkpoint.open(expert))
    if not force:
        check_same_base(source, target)
    for line in remarks(source, target):
        notice(line)
    check_destination(out, overwrite)
    if not has_tokenizer(target.directory):
        notice(
            f"{target.directory} has no tokenizer's files: what is made can be merged, not served; "
            "if it speaks with the base's tokenizer, copy the base's tokenizer files there first"
        )
    else:
        ChatTokenizer.open(target.directory.name, target.directory)
    with SavedWork(out) as work:
        text, recipe = _text_and_recipe(options, target, where, progress, notice, work)
        moments = None if text is None else text.first(measured_tokens(options, target, where))
        specs: Mapping[str, Spec | Rank] = {}
        if options.target_bpw is not None:
            with fitting_threads(where, target.config.get_text_config().hidden_size):
                starts = [] if text is None or moments is None else text.known_starts[: len(moments)]
                fits = _fits(target, where, notice)
                specs = specs_within(source, target, options, moments, starts, fits, where, progress)
        stage = out if recipe is None else work.directory / "undistilled"
        replace = overwrite or recipe is not None
        prepared = Preparation(text, moments, specs)
        converter = Converter(source, target, stage, options, prepared, where, replace, progress)
        artifact = converter.run(is_made=stage.is_dir() and work.load("undistilled", converter.plan) is not None)
        if all(entry.kind == "same" for entry in artifact.manifest.tensors.values()):
            notice(f"{target.directory}: no tensor differs from the base's; is it the right fine-tune?")
        bits = None if isinstance(options.bits, str) or options.target_bpw is not None else options.bits
        if warning := converter.large.warning(bits):
            notice(warning)
        if recipe is None or text is None:
            return artifact
        work.save("undistilled", converter.plan, True)
        by = train_blocks if recipe.scope == "block" else train_end_to_end
        hidden_size = target.config.get_text_config().hidden_size
        with fast_products(), fitting_threads(where, hidden_size):
            changed, info = by(source, target, artifact, text, recipe, device=where, progress=progress, work=work)
        distilled = dataclasses.replace(artifact.manifest.method, distillation=info)
        return rewrite(artifact, out, changed, distilled, overwrite=overwrite)


def _text_and_recipe(
    options: Options,
    expert: Checkpoint,
    device: torch.device,
    progress: Progress,
    notice: Callable[[str], None],
    work: SavedWork,
) -> tuple[CalibrationSet | None, TrainingRecipe | None]:
    """Calibration text, if any is asked for, and how to train on it, if that is done."""
    steps = options.asked_steps
    recipe, shortage = None, None
    if options.has_scales and steps != 0:
        scope, shortage = scope_for(expert, device)
        recipe = options.recipe_for(scope)
    if recipe is not None and steps is None and device.type == "cpu" and expert.nbytes > DISTILL_BYTES:
        if options.source is not None:
            takes = about_duration(cost_of(expert, [_SEQUENCE] * DISTILL_SEQUENCES, recipe, device).seconds)
            notice(f"not trained, which keeps more: on this CPU it takes {takes}; --distill STEPS does it")
        recipe = None
    text = None
    if options.source is not None:
        if options.uses_inputs:
            check_blocks(expert, device)
        recipe = _possible(recipe, expert, device, notice, is_asked=steps is not None)
        limit = options.tokens if recipe else min(options.tokens, measured_tokens(options, expert, device))
        text = gather(options.source, expert, limit, device=device, progress=progress, notice=notice, work=work)
        if steps is None and len(text.sequences) < DISTILL_SEQUENCES:
            recipe = None
    options.check_use_of_text(0 if recipe is None else recipe.steps)
    if recipe is None or text is None:
        return text, None
    check_text(text.sequences)
    notice(statement(recipe, cost_of(expert, [len(ids) for ids in text.sequences], recipe, device)))
    if shortage is not None and recipe != options.recipe_for("model"):  # nobody named the scope
        notice(shortage)
    return text, recipe


def measured_tokens(options: Options, expert: Checkpoint, device: torch.device) -> int:
    """How many tokens the inputs of layers are measured on, at most."""
    if device.type != "cpu" or options.calibration_tokens is not None:
        return MOMENT_TOKENS
    return min(MOMENT_TOKENS, max(CPU_MOMENT_TOKENS, int(CPU_WORK / expert.parameters)))


def _possible(
    recipe: TrainingRecipe | None,
    expert: Checkpoint,
    device: torch.device,
    notice: Callable[[str], None],
    *,
    is_asked: bool,
) -> TrainingRecipe | None:
    """How to train, None if nobody asked for it and the model cannot be trained."""
    if recipe is None:
        return None
    try:
        check_trainable(expert, recipe.scope, device)
    except IncompatibleError as error:
        if is_asked:
            raise
        notice(f"not distilled: {error}")
        return None
    return recipe


def _fits(expert: Checkpoint, device: torch.device, notice: Callable[[str], None]) -> bool:
    """Whether the full expert may be loaded whole to measure what it minds.

    A GPU that lacks the memory is told of: the same call may share out bits otherwise when others use less of it.
    """
    if device.type != "cuda":
        return expert.nbytes <= DISTILL_BYTES
    needed, free = 2 * expert.nbytes, torch.cuda.mem_get_info(device)[0]
    if free <= needed:
        notice(
            "bits are shared out without measuring what the model minds: that takes more than "
            f"{format_bytes(needed)} of the GPU's memory, and {format_bytes(free)} are free"
        )
    return free > needed
