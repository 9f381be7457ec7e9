"""`meswitch.json`: what an artifact holds, in a form that is checked strictly.

Unknown fields, missing fields and wrong types are errors that name the file and the field.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meswitch.architecture import ROLES, matrix_shape
from meswitch.codec.exact import EXACT_DTYPES
from meswitch.codec.words import LENGTHS
from meswitch.errors import ArtifactError
from meswitch.jsonfile import Decoder
from meswitch.tensorfile import DTYPES

FORMAT = "meswitch-delta"
# 2: packed tensors may leave out rows (`row_index`). 3: low-rank pairs (`lowrank`), stacks of matrices and transposed
# ones are packed. 4: `recipe`. A new kind alone needs no new number: who does not know it refuses it by name (`exact`)
VERSION = 4
MANIFEST_NAME = "meswitch.json"
KINDS = ("packed", "coded", "lowrank", "exact", "dense", "same")
_OWN_FIELDS = {
    "packed": ("bits", "group_size", "block"),
    "coded": ("method", "meta"),
    "lowrank": ("scale",),
    "exact": ("dtype",),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a safetensors file: its dtype in safetensors' spelling, bytes and SHA-256."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the expert.

    Args:
        kind: `packed` (base + quantised delta), `coded` (base + delta of another codec), `lowrank` (base + product of
            two thin matrices), `exact` (what changed, bit for bit), `dense` (the expert's own values) or `same` (the
            base's).
        role: one of `architecture.ROLES`; it says how the tensor lies as a matrix. Before version 3 all matrices but
            embedding and head were `linear`.
        shape: the expert's.
        stored: suffix -> where its parts are; a dense tensor has the one suffix "".
        base_sha256: of the base's tensor, None where the base has none.
        bits: of a packed tensor.
        group_size: of a packed tensor.
        block: of one whose 1-bit codes are words of so many signs (`codec.words`).
        method: of a coded one (`codec.registry`).
        meta: of a coded one.
        scale: of a low-rank one.
        dtype: of an exact one, as it is restored, in safetensors' spelling.
    """

    kind: str
    role: str
    shape: tuple[int, ...]
    stored: dict[str, Stored]
    base_sha256: str | None
    bits: int | None = None
    group_size: int | None = None
    block: int | None = None
    method: str | None = None
    meta: dict[str, int] | None = None
    scale: float | None = None
    dtype: str | None = None

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.stored.values())

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix that a packed or coded tensor is (`architecture.as_matrix`)."""
        return matrix_shape(self.shape, self.role)

    @property
    def base_rows(self) -> int:
        """Rows of the matrix that the base has too, of a tensor with a delta."""
        extra = self.stored.get("weight_extra")
        return self.matrix[0] - (extra.shape[0] if extra and extra.shape else 0)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base that the deltas are taken from; `fingerprint` identifies it by content."""

    name: str
    fingerprint: str
    model_type: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """The fine-tune: its parameters and bytes as a full checkpoint."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    vocab_size: int
    tied_head: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that the salient channels and the error feedback were measured on.

    Args:
        sha256: of the file; of the token ids where the expert wrote the text.
        seed: of its sampling, None for a file.
        measured_tokens: those that layers' inputs were measured on, None for all; the rest is for training.
    """

    source: str
    sha256: str
    sequences: int
    tokens: int
    seed: int | None = None
    measured_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Distillation:
    """How scales, salient weights and norms were trained on the calibration text, and the divergence (KL from the full
    expert, nats a token) on its held-out tenth before and after. The rest as in `compression.options.TrainingRecipe`.

    Args:
        steps: for each part where the scope is `block`.
    """

    steps: int
    learning_rate: float
    batch: int
    seed: int
    held_out_before: float
    held_out_after: float
    loss: str = "kl"
    codes: bool = False
    norms: bool = True
    hidden: float = 0.0
    question_weight: float = 1.0
    scope: str = "model"


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """The parts of the solver, see `codec.Spec`."""

    salient_rule: str
    scales: str
    feedback: bool
    refit: bool


@dataclass(frozen=True, slots=True)
class Method:
    """Every parameter of the compression.

    Args:
        name: of the codec, or `exact`.
        bits: of a code, or of the budget for methods whose size is free; None where each tensor has its own under
            `target_bpw`, and where nothing is rounded.
        solver: None is the default one.
        parameters: what only this method has.
    """

    name: str
    bits: int | None
    group_size: int | None
    salient: int | None
    embeddings: str
    damping: float
    calibration: Calibration | None = None
    distillation: Distillation | None = None
    parameters: dict[str, float] | None = None
    target_bpw: float | None = None
    solver: SolverInfo | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was asked for: options that are not at their defaults, by name, as the command line takes them; base and
    expert as hub ids, None for directories. See `compression.options`."""

    options: dict[str, str]
    base: str | None = None
    expert: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who made it, with what, when (UTC, ISO 8601)."""

    meswitch: str
    torch: str
    transformers: str
    created: str


@dataclass(frozen=True, slots=True)
class Quality:
    """One measurement: accuracy of base, expert and compressed expert on the same `questions`."""

    task: str
    questions: int
    base: float
    expert: float
    compressed: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. companions: file name -> SHA-256 of tokenizer, template and config files."""

    base: BaseInfo
    expert: ExpertInfo
    method: Method
    tensors: dict[str, Entry]
    companions: dict[str, str]
    provenance: Provenance
    quality: tuple[Quality, ...] = ()
    recipe: Recipe | None = None  # since version 4
    format: str = FORMAT
    version: int = field(default=VERSION)

    def to_json(self) -> str:
        def plain(value: Any) -> Any:
            if dataclasses.is_dataclass(value):
                pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
                return {name: plain(item) for name, item in pairs if item is not None}
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        data = plain(self)
        head = {"format": data.pop("format"), "version": data.pop("version")}
        return json.dumps(head | data, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, file: Path) -> "Manifest":
        """Parse and check.

        Raises:
            ArtifactError: not JSON, another format, a newer version, or a field that does not fit.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{file}: not valid JSON ({error}); the artifact is damaged, compress again") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"{file}: format: not a meswitch artifact (expected {FORMAT!r})")
        version = data.get("version")
        if not isinstance(version, int) or version < 1:
            raise ArtifactError(f"{file}: version: {version!r} is not a version number")
        if version > VERSION:
            raise ArtifactError(
                f"{file}: version: {version} is newer than this meswitch reads ({VERSION}); upgrade meswitch"
            )
        manifest: Manifest = decoder(file).decode(cls, data)
        if not manifest.tensors:  # it would be served as its base
            raise ArtifactError(f"{file}: tensors: empty; the artifact is damaged, compress again")
        for name, entry in manifest.tensors.items():
            if entry.kind not in KINDS:
                raise ArtifactError(f"{file}: tensors.{name}.kind: {entry.kind!r} is none of {', '.join(KINDS)}")
            if entry.role not in ROLES:
                raise ArtifactError(f"{file}: tensors.{name}.role: {entry.role!r} is none of {', '.join(ROLES)}")
            for kind, items in _OWN_FIELDS.items():
                for item in items if kind != entry.kind else ():
                    if getattr(entry, item) is not None:
                        raise ArtifactError(f"{file}: tensors.{name}.{item}: not a field of a {entry.kind} tensor")
            if entry.kind == "packed" and entry.bits not in (1, 2, 3, 4):
                raise ArtifactError(f"{file}: tensors.{name}.bits: {entry.bits!r} is none of 1, 2, 3, 4")
            if entry.block is not None and not (entry.bits == 1 and entry.block in LENGTHS):
                raise ArtifactError(f"{file}: tensors.{name}.block: {entry.block!r} is none of {LENGTHS}, with bits 1")
            if entry.kind == "lowrank" and (entry.scale is None or not math.isfinite(entry.scale)):
                raise ArtifactError(f"{file}: tensors.{name}.scale: {entry.scale!r} is not a finite number")
            if entry.kind == "exact" and DTYPES.get(entry.dtype or "") not in EXACT_DTYPES:
                raise ArtifactError(f"{file}: tensors.{name}.dtype: {entry.dtype!r} is none of F16, BF16, F32")
        return manifest


def labels(base: str, expert: str, method: str) -> dict[str, str]:
    """What viewers of safetensors files show of an artifact."""
    return {"base": base, "expert": expert, "codec": method}


def stored_name(tensor: str, suffix: str) -> str:
    """`model.norm.weight` + `weight_packed` -> `model.norm.weight_packed`; the suffix "" keeps the name."""
    return f"{tensor.removesuffix('weight')}{suffix}" if suffix else tensor


def decoder(file: Path) -> Decoder:
    """Reads the parts of a manifest."""
    return Decoder(file, ArtifactError, "the artifact is damaged")
