"""All methods by name: the default, plain rounding, and the baselines of other papers."""

from collections.abc import Mapping

from torch import Tensor

from meswitch.codec.baselines import bitdelta, dare, delta_come, deltazip, per_axis, svd
from meswitch.codec.baselines.coded import Baseline, CodedDelta, Meta, Request
from meswitch.codec.delta import check_finite

ME_SWITCH, RTN = "me-switch", "rtn"
BASELINES: dict[str, Baseline] = {
    module.METHOD.name: module.METHOD for module in (bitdelta, svd, per_axis, delta_come, deltazip, dare)
}
# `rtn` rounds to nearest with scales of least squared error: packed like the default, without salient channels and
# without a look at the inputs. The scales' search and the levels without zero are ours.
METHODS = (ME_SWITCH, RTN, *BASELINES)


def encode_baseline(
    method: str,
    delta: Tensor,
    request: Request,
    *,
    name: str,
    second_moment: Tensor | None = None,
    extra: Tensor | None = None,
) -> CodedDelta:
    """Compress one delta by a baseline.

    Args:
        delta: [rows, in_features] float32. name: of the tensor, for errors.
        second_moment: [in_features, in_features] float32, `X^T X / n` of the layer's inputs.
        extra: [extra_rows, in_features], stored as it is.

    Raises:
        MeswitchError: the delta has NaN or infinite values.
    """
    check_finite(delta, name)
    baseline = BASELINES[method]
    parts, meta = baseline.encode(delta, second_moment, request)
    return CodedDelta(baseline, parts, meta, delta.shape[0], delta.shape[1], extra)


def find_baseline(method: str | None, meta: Meta | None) -> Baseline:
    """The baseline of a stored tensor, its integers complete and known.

    Raises:
        ValueError: an unknown method, an unknown or a missing field.
    """
    if method not in BASELINES:
        raise ValueError(f"method: {method!r} is none of {', '.join(BASELINES)}; it was written by another version")
    baseline, given = BASELINES[method], set(meta or {})
    for name in sorted(given ^ set(baseline.fields)):
        problem = "unknown field" if name in given else "missing field"
        raise ValueError(f"meta.{name}: {problem} of the method {method!r}")
    return baseline


def restore_baseline(
    method: str | None, meta: Meta | None, parts: Mapping[str, Tensor], rows: int, in_features: int
) -> CodedDelta:
    """A `CodedDelta` over stored parts, `weight_extra` among them if there is one. rows: those of the base."""
    own = {suffix: tensor for suffix, tensor in parts.items() if suffix != "weight_extra"}
    return CodedDelta(find_baseline(method, meta), own, meta or {}, rows, in_features, parts.get("weight_extra"))
