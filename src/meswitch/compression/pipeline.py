"""Checkpoint pair -> artifact: the steps of a compression, in their order.

Options and pair are checked; calibration text is read or written; bits are shared out if there is a budget; one pass
encodes every tensor (`convert`); what was encoded is trained against the full expert (`distill`).
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meswitch.adapter import Adapter, is_adapter, write_artifact
from meswitch.artifact import Artifact, rewrite
from meswitch.artifact.writer import check_destination
from meswitch.checkpoint import Checkpoint
from meswitch.compression.budget import specs_within
from meswitch.compression.compatibility import matched, remarks
from meswitch.compression.convert import Conversion, Progress
from meswitch.compression.distill.blockwise import train_blocks
from meswitch.compression.distill.end_to_end import train
from meswitch.compression.distill.training import check_text
from meswitch.compression.large_delta import check_same_base
from meswitch.compression.options import Options, check_none_given
from meswitch.compression.text import gather
from meswitch.threads import fitting_threads

DISTILL_BYTES, DISTILL_SEQUENCES = 256 << 20, 32
MOMENT_TOKENS = 32768  # that second moments are taken over; more text is for training only


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    **settings: Any,
) -> Artifact:
    """Compress a fine-tune into an artifact of its difference from the base.

    Args:
        base, expert: checkpoint directories or hub ids. A PEFT adapter as the expert is kept as it was trained.
        out: the directory to create.
        options: what decides its bytes (`meswitch.Options`); None is data-free at 2 bits.
        device: where the arithmetic runs, `cpu` or `cuda`.
        overwrite: replace an artifact that exists.
        force: compress an expert of another base too, whose matrices have nothing to do with the base's.
        progress: is told what was done.
        notice: is told, in a line each, what a person should know: large deltas, self-written text.
        settings: single options by name instead, such as `bits=3, calibration="math.jsonl"`.

    Raises:
        MeswitchError: see `meswitch.errors`; nothing half-written is left under the name `out`.
    """
    options = dataclasses.replace(options or Options(), **settings)
    out, where = Path(out), torch.device(device)
    if is_adapter(expert):
        check_none_given(options.given(), expert)
        check_destination(out, overwrite)
        adapter = Adapter.open(expert)
        return write_artifact(
            Checkpoint.open(base), adapter, out, overwrite=overwrite, progress=progress, notice=notice
        )
    source, target = matched(Checkpoint.open(base), Checkpoint.open(expert))
    if not force:
        check_same_base(source, target)
    if notice is not None:
        for line in remarks(source, target):
            notice(line)
    check_destination(out, overwrite)
    steps = options.asked_steps
    if steps is None and not (options.has_scales and target.nbytes <= DISTILL_BYTES):
        steps = 0
    text = None
    if options.source is not None:
        limit = min(options.tokens, MOMENT_TOKENS) if steps == 0 else options.tokens
        text = gather(options.source, target, limit, device=where, progress=progress, notice=notice)
    recipe = options.recipe
    if steps is None:
        steps = 0 if text is None or len(text.sequences) < DISTILL_SEQUENCES else recipe.steps
    options.check_use_of_text(steps)
    if steps and text is not None:
        check_text(text.sequences)
    stage = out.with_name(out.name + ".undistilled") if steps else out
    moments = None if text is None else text.first(MOMENT_TOKENS)
    specs = None
    if options.target_bpw is not None:
        with fitting_threads(where, target.config.hidden_size):
            fits = _fits(target, where)
            specs = specs_within(source, target, options, moments, measure=fits, device=where, progress=progress)
    replace = overwrite or stage != out
    conversion = Conversion(source, target, stage, options, specs, text, moments, where, replace, progress)
    artifact = conversion.run()
    bits = None if options.target_bpw is not None else options.bits
    if notice is not None and (warning := conversion.large.warning(bits)):
        notice(warning)
    if not steps or text is None:
        return artifact
    by = train_blocks if recipe.scope == "block" else train
    changed, info = by(source, target, artifact, text, recipe, device=where, progress=progress)
    distilled = dataclasses.replace(artifact.manifest.method, distillation=info)
    artifact = rewrite(artifact, out, changed, distilled, overwrite=overwrite)
    shutil.rmtree(stage)
    return artifact


def _fits(expert: Checkpoint, device: torch.device) -> bool:
    """Whether the full expert may be loaded whole to measure its tensors one by one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > 2 * expert.nbytes
    return expert.nbytes <= DISTILL_BYTES
