"""Whether an artifact belongs to the base that vLLM serves, which may be quantised."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from meswitch.artifact import Artifact, fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError, listed
from meswitch.tensorfile import INDEX, WEIGHTS
from meswitch.vllm.placement import misplaced
from meswitch.vllm.places import Place, Unserved

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
