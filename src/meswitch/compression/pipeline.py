"""Checkpoint pair -> artifact: the steps of a compression, in their order.

Options and pair are checked; calibration text is read or written; bits are shared out if there is a budget; one pass
encodes every tensor (`convert`); what was encoded is trained against the full expert (`distill`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meswitch.adapter import Adapter, find_adapter, write_artifact
from meswitch.artifact import Artifact, rewrite
from meswitch.artifact.writer import check_destination
from meswitch.checkpoint import Checkpoint
from meswitch.compression.budget import specs_within
from meswitch.compression.compatibility import matched, remarks
from meswitch.compression.convert import Converter
from meswitch.compression.distill.blockwise import train_blocks
from meswitch.compression.distill.end_to_end import train
from meswitch.compression.distill.recipe import Recipe
from meswitch.compression.distill.student import check_trainable
from meswitch.compression.distill.training import check_text
from meswitch.compression.large_delta import check_same_base
from meswitch.compression.options import Options, check_none_given
from meswitch.compression.partial_model import check_blocks
from meswitch.compression.saved_work import SavedWork
from meswitch.compression.text import CalibrationSet, gather
from meswitch.cpu import fitting_threads
from meswitch.errors import IncompatibleError
from meswitch.progress import Progress, silent
from meswitch.tokenizer import ChatTokenizer, has_tokenizer

DISTILL_BYTES, DISTILL_SEQUENCES = 256 << 20, 32
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
        base, expert: checkpoint directories or hub ids. A PEFT adapter as the expert is kept as it was trained.
        out: the directory to create.
        options: what decides its bytes (`meswitch.Options`); None is data-free at 2 bits, `bits="exact"` loses nothing.
        device: where the arithmetic runs, `cpu` or `cuda`.
        overwrite: replace an artifact that exists.
        force: compress an expert of another base too, whose matrices have nothing to do with the base's.
        progress: is told how far each phase is (`meswitch.progress`).
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
        notice(f"{target.directory}: no tokenizer's files: what is made can be merged, not served")
    else:
        ChatTokenizer.open(target.directory.name, target.directory)
    with SavedWork(out) as work:
        text, recipe = _text_and_recipe(options, target, where, progress, notice, work)
        moments = None if text is None else text.first(measured_tokens(options, target, where))
        specs = None
        if options.target_bpw is not None:
            with fitting_threads(where, target.config.get_text_config().hidden_size):
                fits = _fits(target, where)
                specs = specs_within(source, target, options, moments, fits, where, progress, work)
        stage = out if recipe is None else work.directory / "undistilled"
        replace = overwrite or recipe is not None
        converter = Converter(source, target, stage, options, specs, text, moments, where, replace, progress)
        artifact = converter.run(is_made=stage.is_dir() and work.load("undistilled", converter.plan) is not None)
        bits = None if isinstance(options.bits, str) or options.target_bpw is not None else options.bits
        if warning := converter.large.warning(bits):
            notice(warning)
        if recipe is None or text is None:
            return artifact
        work.save("undistilled", converter.plan, True)
        by = train_blocks if recipe.scope == "block" else train
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
) -> tuple[CalibrationSet | None, Recipe | None]:
    """Calibration text, if any is asked for, and how to train on it, if that is done."""
    steps = options.asked_steps
    if steps is None and not (options.has_scales and expert.nbytes <= DISTILL_BYTES):
        steps = 0
    text = None
    if options.source is not None:
        if options.uses_inputs:
            check_blocks(expert, device)
        steps = _possible_steps(options, expert, steps, device, notice)
        limit = min(options.tokens, measured_tokens(options, expert, device)) if steps == 0 else options.tokens
        text = gather(options.source, expert, limit, device=device, progress=progress, notice=notice, work=work)
    if steps is None:
        steps = 0 if text is None or len(text.sequences) < DISTILL_SEQUENCES else options.recipe.steps
    options.check_use_of_text(steps)
    if not steps or text is None:
        return text, None
    check_text(text.sequences)
    return text, options.recipe


def measured_tokens(options: Options, expert: Checkpoint, device: torch.device) -> int:
    """How many tokens the inputs of layers are measured on, at most."""
    if device.type != "cpu" or options.calibration_tokens is not None:
        return MOMENT_TOKENS
    return min(MOMENT_TOKENS, max(CPU_MOMENT_TOKENS, int(CPU_WORK / expert.parameters)))


def _possible_steps(
    options: Options, expert: Checkpoint, steps: int | None, device: torch.device, notice: Callable[[str], None]
) -> int | None:
    """The steps of training, none if nobody asked for them and the model cannot be trained."""
    if steps == 0:
        return 0
    try:
        check_trainable(expert, options.recipe.scope, device)
    except IncompatibleError as error:
        if steps is not None:
            raise
        notice(f"not distilled: {error}")
        return 0
    return steps


def _fits(expert: Checkpoint, device: torch.device) -> bool:
    """Whether the full expert may be loaded whole to measure its tensors one by one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > 2 * expert.nbytes
    return expert.nbytes <= DISTILL_BYTES
