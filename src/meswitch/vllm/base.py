"""Whether an artifact belongs to the base that vLLM serves, and whether its rows lie as places say.

The base may be quantised.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from meswitch.artifact import Artifact, fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError, listed
from meswitch.tensorfile import INDEX, WEIGHT_DTYPES, WEIGHTS, BuiltTensor, TensorInfo
from meswitch.vllm.places import NORM, Place, Source, Unserved
from meswitch.vllm.support import CONVOLVES, ORDERED, TURNED

_WHOLE = (torch.bfloat16, torch.float16, torch.float32)


class Base:
    """The base of one server. source: its directory or hub id, as vLLM was started with."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._sums: dict[str, str] = {}

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.source)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._checkpoint)

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._checkpoint.tensors)

    def misplaced(self, places: Sequence[Place], rename: Callable[[str], str]) -> list[Unserved]:
        """See `placement.misplaced`."""
        names: dict[str, str] = {}
        for name in self._checkpoint.tensors:
            names.setdefault(rename(name), name)
        return misplaced(places, self._checkpoint, names)

    def check(self, artifact: Artifact) -> None:
        """Refuse an artifact of another base, by content.

        Of a quantised base it is the content of what is not quantised: embeddings, norms, biases. FP8, GPTQ and plain
        rounding leave those as they are. AWQ and SmoothQuant move scales of input channels between norms and weights,
        and to such weights no delta can be added.

        Raises:
            IncompatibleError: naming what differs.
        """
        base, wanted = self._checkpoint, artifact.manifest.base
        if base.ignored_shards:
            raise IncompatibleError(
                f"{base.directory}: holds {WEIGHTS}, which {artifact.directory} was compressed against, and {INDEX} of "
                f"other files ({listed(base.ignored_shards)}), which vLLM loads; move the files away that are not meant"
            )
        if self._fingerprint == wanted.fingerprint or not base.is_quantised:
            artifact.check_base(base, known=self._fingerprint)
            return
        compared = 0
        for name, entry in artifact.manifest.tensors.items():
            info = base.info(name)
            if entry.role == "linear" or entry.base_sha256 is None or info is None or info.dtype not in _WHOLE:
                continue
            if isinstance(info, BuiltTensor):  # of codes: an embedding or a head may be quantised too
                continue
            if name not in self._sums:
                self._sums[name] = info.sha256()
            if self._sums[name] != entry.base_sha256:
                raise IncompatibleError(
                    f"{base.directory}: {name} is not that of {wanted.name!r}, against which {artifact.directory} was "
                    "compressed: another base, or quantised by a method that rescales channels (AWQ, SmoothQuant) or "
                    "converts other tensors too; use that base in 16 bit, FP8, GPTQ or rounded"
                )
            compared += 1
        if not compared:
            raise IncompatibleError(
                f"{base.directory}: quantised in whole, so that nothing says whether it is {wanted.name!r}, against "
                f"which {artifact.directory} was compressed; set check_base to false if it is"
            )


_ROWS = 8  # of each source
_PROBES = 16
_NEAR = 0.02  # of the norm: what rounding to the served dtype may change
_QUANTISED = 0.3  # what a base that vLLM quantises as it loads may change; other rows differ by 1.4


def misplaced(places: Sequence[Place], base: Checkpoint, names: Mapping[str, str]) -> list[Unserved]:
    """Layers whose weights are not the checkpoint's at the same place.

    Args:
        places: nothing is wrapped yet.
        base: what vLLM loaded; tensors that are quantised in it are not compared.
        names: vLLM's name of a tensor -> its name in the checkpoint.
    """
    found = []
    for place in places:
        reason = next(_differences(place, base, names), None)
        if reason is not None:
            found.append(Unserved.of(place, reason))
    return found


def _differences(place: Place, base: Checkpoint, names: Mapping[str, str]) -> Iterator[str]:
    at = 0
    for source in place.sources:
        count = source.last - source.first
        for leaf in ("weight", "bias"):
            info = _info(base, names, f"{source.module}.{leaf}")
            if info is None and leaf == "weight" and place.tied is not None:
                info = _info(base, names, f"{place.tied}.weight")
            if info is None or isinstance(info, BuiltTensor) or info.dtype not in WEIGHT_DTYPES or not count:
                continue  # there is none, or it is quantised
            compare = _vector if leaf == "bias" or place.kind == NORM else _matrix
            if (reason := compare(place, source, at, info, leaf)) is not None:
                yield reason
        at += count


def _short(info: TensorInfo) -> str:
    """A name without the layer's, so that layers which are alike are refused in one line."""
    return ".".join(info.name.split(".")[-2:])


def _info(base: Checkpoint, names: Mapping[str, str], name: str) -> TensorInfo | None:
    return base.info(names[name]) if name in names else None


def _vector(place: Place, source: Source, at: int, info: TensorInfo, leaf: str) -> str | None:
    own = getattr(place.module, leaf, None)
    if own is None:
        return f"the checkpoint has {_short(info)}, which the layer has not"
    stored = info.read().reshape(-1)
    if stored.numel() != source.rows:
        return f"{_short(info)} has {stored.numel()} elements in the checkpoint, the layer takes {source.rows}"
    mine = own.detach().reshape(-1)[at : at + source.last - source.first]
    if not _is_near(mine.float().cpu(), stored[source.first : source.last].to(own.dtype).float()):
        return f"{_short(info)} is another in the checkpoint: vLLM changes it as it loads it"
    return None


def _matrix(place: Place, source: Source, at: int, info: TensorInfo, leaf: str) -> str | None:
    wanted = place.stored_shape(source)
    if len(info.shape) == 3:
        return CONVOLVES
    if info.shape != wanted and info.shape == wanted[::-1]:
        return TURNED
    if info.shape != wanted:
        return f"{_short(info)} is {list(info.shape)} in the checkpoint, the layer takes {list(wanted)}"
    rows = torch.linspace(source.first, source.last - 1, _ROWS).round().long().unique()
    columns = slice(None) if place.columns is None else slice(*place.columns)
    stored = torch.stack([_row(info, int(row)) for row in rows])[:, columns]
    if _has_rows(place, rows - source.first + at, stored):
        return None
    is_square = info.shape[0] == info.shape[1]
    if is_square and _has_rows(place, rows - source.first + at, info.read().T[rows][:, columns]):
        return TURNED
    return ORDERED


def _row(info: TensorInfo, row: int) -> Tensor:
    size = info.shape[1] * info.dtype.itemsize
    return torch.frombuffer(info.read_bytes(row * size, size), dtype=info.dtype)


def _has_rows(place: Place, rows: Tensor, stored: Tensor) -> bool:
    """Whether these rows of a layer are `stored`, as they lie there or by what they make of some inputs."""
    module: Any = place.module
    weight: Any = getattr(module, "weight", None)
    is_plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if is_plain and weight.shape == (place.rows, place.in_features):
        return _is_near(weight.detach()[rows.to(weight.device)].float().cpu(), stored.to(weight.dtype).float())
    # quantised, or on a CPU only as its kernels read it
    device = next(module.parameters()).device
    x = torch.randn(_PROBES, place.in_features, generator=torch.Generator().manual_seed(0))
    y = module.quant_method.apply(module, x.to(device, module.params_dtype), None)
    return _is_near(y.float().cpu()[:, rows], x @ stored.float().T, _NEAR if is_plain else _QUANTISED)


def _is_near(mine: Tensor, stored: Tensor, near: float = _NEAR) -> bool:
    return bool((mine - stored).norm() <= near * stored.norm() + 1e-12)
