"""Checkpoint pair -> artifact: the steps of a compression, in their order.

Options and pair are checked; calibration text is read or written; bits are shared out if there is a budget; one pass
encodes every tensor (`convert`); what was encoded is trained against the full expert (`distill`, `blockwise`).
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from meswitch.artifact import Artifact, rewrite
from meswitch.artifact.writer import check_destination
from meswitch.checkpoint import Checkpoint
from meswitch.compression.budget import specs_within
from meswitch.compression.compatibility import check_same_computation, check_same_tensors
from meswitch.compression.convert import Conversion, Progress
from meswitch.compression.distill.blockwise import train_blocks
from meswitch.compression.distill.end_to_end import train
from meswitch.compression.distill.recipe import Recipe, Scope, recipe_for
from meswitch.compression.distill.training import check_text
from meswitch.compression.options import Embeddings, Options
from meswitch.compression.text import Source, gather
from meswitch.errors import ConfigError
from meswitch.threads import fitting_threads

DISTILL_BYTES, DISTILL_SEQUENCES = 256 << 20, 32
TOKENS, WRITTEN_TOKENS = 524288, 32768
MOMENT_TOKENS = 32768  # that second moments are taken over; more text is for training only


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    bits: int = 2,
    salient: int | None = None,
    group_size: int | None = 128,
    calibration: str | Path | Source | None = None,
    calibration_tokens: int | None = None,
    embeddings: Embeddings | None = None,
    damping: float = 0.01,
    distill: int | Recipe | None = None,
    distill_scope: Scope | None = None,
    method: str = "me-switch",
    rank: int | None = None,
    drop: float | None = None,
    target_bpw: float | None = None,
    salient_rule: str = "error",
    scales: str = "mse",
    feedback: bool = True,
    refit: bool = True,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Artifact:
    """Compress a fine-tune into an artifact of its difference from the base.

    Args:
        base, expert: checkpoint directories or hub ids.
        out: the directory to create.
        bits: 1-4 a code. salient: input channels of each linear layer that stay 16 bit; None is one in 512.
        group_size: input channels that share a scale; None is one scale a row.
        calibration: text (`.txt`, `.jsonl`) that shows typical inputs, or what lets the expert write it (`self`,
            `self:FILE`, `FILE+self`: see `calibration.Source`); None compresses data-free.
        calibration_tokens: at most so many are used, to train; the inputs of layers are measured on the first 32768.
            None is 524288, or 32768 if the expert has to write them.
        embeddings: `exact` keeps embedding and head whole, `quantised` compresses them like other matrices; None is
            `quantised`, unless the method's paper leaves them whole.
        distill: steps of training codes, scales and norms against the full expert on the calibration text, by the
            method's recipe (`compression.distill.recipe`), or another one; 0 does not. It needs both models in memory:
            None is the recipe's steps if the expert has at most 256 MB and the text at least 32 sequences, else 0.
        distill_scope: `model` trains end to end; `block` one block after the other, by `recipe_for(..., scope="block")`
            for an expert of any size, with one block in memory. None is `model`, or what a `Recipe` says.
        method: `me-switch`, or another paper's for comparison (`codec.METHODS`, docs/baselines.md). rank: of `svd`.
            drop: share of weights that `dare` sets to zero, 0.9 by default.
        target_bpw: bits a weight of the whole tensor file; bits and salient channels of each tensor are then chosen
            (`compression.budget`), and `bits` and `salient` are not used.
        salient_rule, scales, feedback, refit: the parts of the solver, see `codec.Spec`; to compare.
        device: where the arithmetic runs, `cpu` or `cuda`.
        notice: is told, in a line each, what a person should know: large deltas, self-written text.

    Raises:
        MeswitchError: see `meswitch.errors`; nothing half-written is left under the name `out`.
    """
    source_of_text = Source.parse(calibration) if isinstance(calibration, str | Path) else calibration
    if calibration_tokens is None:
        calibration_tokens = WRITTEN_TOKENS if source_of_text is not None and source_of_text.own else TOKENS
    options = Options(
        bits=bits,
        group_size=group_size,
        salient=salient,
        damping=damping,
        embeddings=embeddings,
        calibration_tokens=calibration_tokens,
        method=method,
        rank=rank,
        drop=drop,
        target_bpw=target_bpw,
        salient_rule=salient_rule,
        scales=scales,
        feedback=feedback,
        refit=refit,
    )
    if distill_scope is not None:
        distill = _with_scope(distill, distill_scope, method)
    options.check_distillation(distill.steps if isinstance(distill, Recipe) else distill, calibration is not None)
    source, target = Checkpoint.open(base), Checkpoint.open(expert)
    check_same_computation(source, target)
    check_same_tensors(source, target)
    out, where = Path(out), torch.device(device)
    check_destination(out, overwrite)
    if distill is None and not (options.has_scales and target.nbytes <= DISTILL_BYTES):
        distill = 0
    text = None
    if source_of_text is not None:
        limit = min(calibration_tokens, MOMENT_TOKENS) if distill == 0 else calibration_tokens
        text = gather(source_of_text, target, limit, device=where, progress=progress, notice=notice)
    if distill is None and (text is None or len(text.sequences) < DISTILL_SEQUENCES):
        distill = 0
    recipe = distill if isinstance(distill, Recipe) else recipe_for(method, distill)
    options.check_distillation(recipe.steps, calibration is not None)
    if recipe.steps and text is None:
        raise ConfigError("distill: needs calibration text to train on; give a calibration file")
    if recipe.steps and text is not None:
        check_text(text.sequences)
    stage = out.with_name(out.name + ".undistilled") if recipe.steps else out
    moments = None if text is None else text.first(MOMENT_TOKENS)
    specs = None
    if target_bpw is not None:
        with fitting_threads(where, target.config.hidden_size):
            fits = _fits(target, where)
            specs = specs_within(source, target, options, moments, measure=fits, device=where, progress=progress)
    replace = overwrite or stage != out
    conversion = Conversion(source, target, stage, options, specs, text, moments, where, replace, progress)
    artifact = conversion.run()
    if notice is not None and (warning := conversion.large.warning(bits if target_bpw is None else None)):
        notice(warning)
    if not recipe.steps or text is None:
        return artifact
    by = train_blocks if recipe.scope == "block" else train
    changed, info = by(source, target, artifact, text, recipe, device=where, progress=progress)
    distilled = dataclasses.replace(artifact.manifest.method, distillation=info)
    artifact = rewrite(artifact, out, changed, distilled, overwrite=overwrite)
    shutil.rmtree(stage)
    return artifact


def _with_scope(distill: int | Recipe | None, scope: Scope, method: str) -> int | Recipe | None:
    """What is asked of distillation by steps and scope together. Naming `block` asks for it, whatever the size."""
    if isinstance(distill, Recipe):
        if distill.scope != scope:
            raise ConfigError(f"distill_scope: {scope}: the recipe says {distill.scope}; say it there")
        return distill
    if scope == "model":
        return distill
    if distill == 0:
        raise ConfigError("distill_scope: block: 0 steps train nothing; give steps, or leave it out")
    return recipe_for(method, distill, scope)


def _fits(expert: Checkpoint, device: torch.device) -> bool:
    """Whether the full expert may be loaded whole to measure its tensors one by one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > 2 * expert.nbytes
    return expert.nbytes <= DISTILL_BYTES
