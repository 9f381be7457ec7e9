"""What decides the bytes of an artifact: one object for Python, the command line, `family.toml` and the manifest.

Every option is stated here once, with its help. The command line and `[compress]` of a `family.toml` are made from the
fields below that have a `Setting`, and `Options.describe` is what the manifest says of them. Importing this costs no
torch: what only counts while something is compressed is imported there.

An artifact's manifest also keeps what was asked for, so that it can be done again (`recipe_of`, `read_recipe`): as the
texts that the command line takes, those at their defaults left out. A path that was absolute is kept as the file's
name: an artifact tells nobody how a machine's directories are called.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.artifact.manifest import Recipe
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from meswitch.artifact.manifest import Calibration, Method
    from meswitch.codec import Codec, CodecRequest, Spec
    from meswitch.compression.text import TextSource

LOSSES = ("kl", "mse")
SCOPES = ("model", "block")
Scope = Literal["model", "block"]
ROW_FLOOR = 0.1  # rows of an embedding that changed less than this share of the average are taken as unchanged
TOKENS, WRITTEN_TOKENS = 524288, 32768  # of calibration text: of a file, and those that the expert writes
Embeddings = Literal["quantised", "exact"]


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """How to train: a recipe.

    Args:
        steps: of training, every block's where it is done block by block.
        batch: sequences a step.
        learning_rate: of AdamW, falling to 0 as a cosine, after ten steps of rising.
        relative: the learning rate is a share of what is trained: 0.02 moves a scale by about 2 % a step at most. If
            not, it moves a scale by that much itself; packed tensors are always trained relatively.
        betas: of AdamW.
        loss: `kl`, the divergence from the full expert, or `mse` of the logits.
        hidden: weight of a second loss, the squared error of every block's output, relative to that output.
        question_weight: what a token that is not the assistant's counts in both, against 1 for one that is.
        length: training sequences are cut at so many tokens; None uses them whole.
        norms: train them too.
        codes: train the codes of packed tensors with their scales.
        check_every: steps between looks at the held-out text (a tenth of the sequences).
        scope: `model` trains end to end, `block` one block after the other and the head last, so many steps each; the
            loss on logits is then that of the head, `hidden` has no meaning (`compression.distill.blockwise`).
    """

    steps: int = 300
    learning_rate: float = 2e-2
    relative: bool = True
    betas: tuple[float, float] = (0.8, 0.99)
    batch: int = 16
    loss: Literal["kl", "mse"] = "kl"
    hidden: float = 5.0
    question_weight: float = 0.1
    length: int | None = None
    norms: bool = True
    codes: bool = True
    check_every: int = 100
    seed: int = 0
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"recipe: scope: {self.scope!r} is none of {', '.join(SCOPES)}")
        if self.scope == "block" and self.loss != "kl":
            raise ConfigError(f"recipe: scope: block by block, the loss is kl, not {self.loss}")
        if self.loss not in LOSSES:
            raise ConfigError(f"recipe: loss: {self.loss!r} is none of {', '.join(LOSSES)}")
        for name in ("batch", "length", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"recipe: {name}: {value} is not a positive number")
        if self.steps < 0 or not self.learning_rate > 0:
            raise ConfigError(f"recipe: {self.steps} steps at learning rate {self.learning_rate}: nothing to train")


def recipe_for(method: str, steps: int | None = None, scope: Scope = "model") -> TrainingRecipe:
    """A method's own recipe: the published one, or the default. steps: instead of its own.

    Raises:
        ConfigError: a published recipe is to be followed block by block.
    """
    from meswitch.codec import find_codec  # reading the options' help needs no torch

    published = find_codec(method).recipe
    if scope == "block" and published is not None:
        raise ConfigError(f"distill_scope: block: {method}'s published recipe trains end to end; leave it out")
    recipe = TrainingRecipe(scope=scope) if published is None else published
    return recipe if steps is None else dataclasses.replace(recipe, steps=steps)


@dataclass(frozen=True, slots=True)
class Setting:
    """How an option is given as text.

    Args:
        help: what it does, its default, and what it costs.
        kind: the type of its value, or the words that there are.
        none: the word that stands for None.
        metavar: what stands for the value in `--help`.
        word: stands for itself, beside numbers.
        least: the lowest value of a number.
        most: the highest.
        shared: whether a family may say it for all its experts.
    """

    help: str
    kind: type | tuple[str, ...]
    none: str | None = None
    metavar: str | None = None
    word: str | None = None
    least: float | None = None
    most: float | None = None
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Solver:
    """How the default method finds its codes. All but the defaults are there to compare.

    Args:
        salient_rule: how salient channels are chosen, one of `codec.delta.RULES`.
        scales: the search that starts scales, one of `codec.quantize.SCALES`.
        feedback: let later columns absorb the rounding errors of earlier ones (needs calibration).
        refit: solve for scales once the codes are chosen (needs calibration).
        damping: what error feedback adds to the diagonal of the inputs' second moment, as a share of its mean.
    """

    salient_rule: str = "error"
    scales: str = "mse"
    feedback: bool = True
    refit: bool = True
    damping: float = 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of an artifact.

    Beside what the fields' help says: `calibration` may be a `text.TextSource`, and `distill` a `TrainingRecipe`.
    Three fields are for research and on no command line: `method`, the name of a codec; `parameters`, what only this
    codec takes (`Codec.parameters`); `solver`, the switches of the default one.

    Raises:
        ConfigError: a value that is out of range, or does not fit the others.
    """

    bits: Annotated[
        int | Literal["exact"],
        Setting(
            "Bits of a code, 2 by default. Each bit more costs one bit a weight and leaves less than half of the "
            "error: 1 does for small deltas, 4 is close to exact. `exact` rounds nothing: `meswitch merge` gives the "
            "fine-tune back bit for bit, from about a third of its size, less where few weights changed; it is served "
            "by turns.",
            int,
            metavar="1-4|exact",
            word="exact",
            least=1,
            most=4,
        ),
    ] = 2
    target_bpw: Annotated[
        float | None,
        Setting(
            "Instead of --bits and --salient: a budget in bits a weight for the whole file of tensors. How "
            "every tensor is stored is chosen within it: its bits, salient channels and scales, an embedding as a pair "
            "of thin matrices where its codes would take too much.",
            float,
            metavar="BITS",
            least=0,
            most=16,
        ),
    ] = None
    salient: Annotated[
        int | None,
        Setting(
            "Input channels of each linear layer that stay 16 bit, the ones whose rounding costs most. By default one "
            "in 512, at least one: 0.03 bits a weight.",
            int,
            metavar="K",
            least=0,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        Setting(
            "Input channels that share a 16-bit scale, 128 by default. It costs 16/G bits a weight: a smaller G "
            "follows the weights better; `row` is one scale a row.",
            int,
            metavar="G|row",
            none="row",
            least=8,
        ),
    ] = 128
    calibration: Annotated[
        "str | Path | TextSource | None",
        Setting(
            "Text like the expert's own inputs: .txt (one a line), .jsonl or .json (rows of training data). It chooses "
            "the salient channels and corrects rounding errors, in one forward pass of the expert. `self` lets the "
            "expert write the text, `self:FILE` lets it answer the file's questions, `FILE+self` lets it fill up a "
            "short file; all three load the full expert into memory. `none`, the default without `--family`, is "
            "data-free: faster, and worse at 1 and 2 bits.",
            str,
            metavar="FILE|self|none",
            none="none",
            shared=False,
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None,
        Setting(
            "Use at most so many tokens of it; more cost time, not bytes. Default: 524288 of a file, 32768 that the "
            "expert writes.",
            int,
            metavar="N",
            least=1,
        ),
    ] = None
    distill: Annotated[
        int | TrainingRecipe | None,
        Setting(
            "Train codes, scales, salient weights and norms against the full expert on the calibration text for so "
            "many steps; 0 does not. It costs no bytes and closes most of the gap at 2 bits and less; how long it "
            "takes is said before it starts. Default with calibration text: 300 steps, end to end or of each block; on "
            "a CPU 0 for an expert of more than 256 MB. At 1 bit 1000 pay.",
            int,
            metavar="STEPS",
            least=0,
        ),
    ] = None
    distill_scope: Annotated[
        Scope | None,
        Setting(
            "`model` trains end to end, with both models in memory. `block` trains one decoder block after the other, "
            "each for --distill steps, with one block's weights in memory: for experts of any size. Default: `model` "
            "up to 2 billion parameters if the GPU's free memory holds it, else `block`; on a CPU `model`.",
            ("model", "block"),
        ),
    ] = None
    embeddings: Annotated[
        Embeddings | None,
        Setting(
            "`quantised`, the default, treats embedding and head like every other matrix; `exact` keeps them as they "
            "are, at their full size. Rows of added tokens are exact either way.",
            ("quantised", "exact"),
        ),
    ] = None
    # For research, from Python only: another method than the product's, and other ways to its own codes.
    method: str = "me-switch"
    parameters: Mapping[str, float] = field(default_factory=dict)
    solver: Solver = field(default_factory=Solver)

    def __post_init__(self) -> None:
        if self.is_exact:
            check_beside_exact(self.given())
            return
        if self.target_bpw is not None and not (0 < self.target_bpw <= 16 and self.method == "me-switch"):
            raise ConfigError(f"target_bpw: {self.target_bpw}: between 0 and 16, and for the method me-switch only")
        if self.embeddings not in ("quantised", "exact", None):
            raise ConfigError(f"embeddings: {self.embeddings!r} is neither quantised nor exact")
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise ConfigError(f"calibration_tokens: {self.calibration_tokens} is not a positive number")
        try:
            self._check_parameters()
            self.codec.check(self.request("linear", 512, 512, 0))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        steps = self.asked_steps
        if steps and not self.has_scales:
            raise ConfigError(f"distill: the method {self.method} has no scales to train: 0 steps, or another method")
        if isinstance(self.distill, TrainingRecipe) and self.distill_scope not in (None, self.distill.scope):
            scope = self.distill.scope
            raise ConfigError(f"distill_scope: {self.distill_scope}: the recipe says {scope}; say it there")
        if steps == 0 and self.distill_scope == "block":
            raise ConfigError("distill_scope: block: 0 steps train nothing; give steps, or leave it out")
        if steps and self.calibration is None:
            raise ConfigError("distill: needs calibration text to train on; give a calibration file")
        self.check_use_of_text(steps)

    @property
    def is_exact(self) -> bool:
        """Whether what changed is kept bit for bit; then no other option has an effect."""
        return self.bits == "exact"

    # How much is trained, and on what.

    @property
    def asked_steps(self) -> int | None:
        """Steps of training that were asked for; None if that depends on the expert's size and the text."""
        if self.distill is None and self.distill_scope == "block":  # naming it asks for training, whatever the size
            return recipe_for(self.method, None, "block").steps
        return self.distill.steps if isinstance(self.distill, TrainingRecipe) else self.distill

    def recipe_for(self, scope: Scope) -> TrainingRecipe:
        """How to train, the method's own steps where none were asked for. scope: where none was."""
        if isinstance(self.distill, TrainingRecipe):
            return self.distill
        from meswitch.codec import find_codec

        published = find_codec(self.method).recipe is not None
        return recipe_for(self.method, self.distill, self.distill_scope or ("model" if published else scope))

    def check_use_of_text(self, steps: int | None) -> None:
        """Refuse calibration text that would do nothing. steps: of training, None if that is not yet decided.

        Raises:
            ConfigError: the method has no use for it.
        """
        if self.calibration is None or self.uses_inputs or steps or (steps is None and self.has_scales):
            return
        use = " without distillation" if self.has_scales else ""
        raise ConfigError(f"calibration: the method {self.method} makes no use of it{use}; leave it out")

    @property
    def source(self) -> "TextSource | None":
        """Where calibration text comes from."""
        from meswitch.compression.text import TextSource

        return TextSource.parse(self.calibration) if isinstance(self.calibration, str | Path) else self.calibration

    @property
    def tokens(self) -> int:
        """How many tokens of calibration text are used at most."""
        if self.calibration_tokens is not None:
            return self.calibration_tokens
        return WRITTEN_TOKENS if self.source is not None and self.source.own else TOKENS

    # What happens to a tensor.

    @property
    def codec(self) -> "Codec":
        """The method."""
        from meswitch.codec import find_codec

        return find_codec(self.method)

    @property
    def makes_packed(self) -> bool:
        """Whether the method's tensors are those that the kernels read, so that its artifacts can be served."""
        from meswitch.codec import PackedCodec

        return isinstance(self.codec, PackedCodec)

    @property
    def uses_inputs(self) -> bool:
        """Whether calibration text changes the codes."""
        return not self.is_exact and self.codec.uses_inputs

    @property
    def exact_embeddings(self) -> bool:
        return self.codec.blocks_only if self.embeddings is None else self.embeddings == "exact"

    @property
    def has_scales(self) -> bool:
        """Whether distillation has something to train."""
        return not self.is_exact and self.codec.is_trainable

    def _check_parameters(self) -> None:
        known = {parameter.name: parameter for parameter in self.codec.parameters}
        for name, value in self.parameters.items():
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"{name}: the method {self.method} has no such parameter; {has}")
            known[name].check(value)

    def packs(self, role: str) -> bool:
        """Whether a tensor that changed is compressed, not stored whole."""
        from meswitch.architecture import EMBEDDING, HEAD, LINEAR, STACKS, TRANSPOSED

        if role in (EMBEDDING, HEAD):
            return not self.exact_embeddings
        return role in (LINEAR, TRANSPOSED, *STACKS)

    def spec(self, role: str, in_features: int) -> "Spec":
        """How one matrix is quantised, or would be by the default method."""
        from meswitch.architecture import EMBEDDING, STACKS
        from meswitch.codec import PackedCodec, Spec

        if self.bits == "exact":
            raise ValueError("bits: exact: nothing is quantised")
        # an embedding's "input" picks a row; the experts of a stack see different tokens: no salient channels for them
        salient = max(1, in_features // 512) if self.salient is None else self.salient
        solver = self.solver
        spec = Spec(
            self.bits,
            self.group_size,
            0 if role in (EMBEDDING, *STACKS) else salient,
            solver.damping,
            ROW_FLOOR if role == EMBEDDING else 0.0,
            solver.salient_rule,
            solver.scales,
            solver.feedback,
            solver.refit,
        )
        codec = self.codec
        return codec.adapt(spec) if isinstance(codec, PackedCodec) else spec

    def request(self, role: str, rows: int, in_features: int, seed: int, share: float | None = None) -> "CodecRequest":
        """What a codec is asked for.

        The budget is what the default method would store for this matrix, or `bpw` bits a weight if that is given.

        Args:
            role: of the tensor.
            rows: of the matrix that the base has too.
            in_features: its columns.
            seed: of this tensor.
            share: what `Sharing.allocate` found for it.
        """
        import torch

        from meswitch.codec import BPW, CodecRequest, nbytes, stored_shapes

        spec = self.spec(role, in_features)
        if BPW.name in self.parameters:
            budget = int(self.parameters[BPW.name] * rows * in_features / 8)
        else:
            budget = nbytes(stored_shapes(rows, in_features, spec, 0, torch.float32))
        return CodecRequest(spec, budget, seed + int(self.parameters.get("seed", 0)), self.parameters, share)

    # What the manifest says.

    def describe(self, calibration: "Calibration | None") -> "Method":
        """As the manifest records it, what was trained left out. calibration: the text that was used."""
        from meswitch.artifact.manifest import Method, SolverInfo
        from meswitch.codec import EXACT

        if self.bits == "exact":
            return Method(EXACT, None, None, 0, "exact", 0.0)
        codec, solver = self.codec, self.solver
        parameters = {known.name: known.default for known in codec.parameters if known.default is not None}
        parameters |= {name: float(value) for name, value in self.parameters.items()}
        switches = SolverInfo(solver.salient_rule, solver.scales, solver.feedback, solver.refit)
        plain = Solver()
        usual = SolverInfo(plain.salient_rule, plain.scales, plain.feedback, plain.refit)
        return Method(
            name=self.method,
            bits=None if self.target_bpw is not None else codec.bits or self.bits,
            target_bpw=self.target_bpw,
            solver=None if switches == usual else switches,
            group_size=self.group_size,
            salient=self.salient if self.method == "me-switch" else 0,
            embeddings="exact" if self.exact_embeddings else "quantised",
            damping=solver.damping,
            calibration=calibration,
            parameters=parameters or None,
        )

    def given(self) -> dict[str, Any]:
        """What is not at its default: name -> value."""
        plain = Options()
        names = [item.name for item in fields(Options)]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}


# by name, in the order in which they are documented
SETTINGS: Mapping[str, Setting] = {
    name: hint.__metadata__[0] for name, hint in Options.__annotations__.items() if hasattr(hint, "__metadata__")
}


def given_options(given: Mapping[str, Any]) -> Options:
    """Options from what somebody wrote down, the rest at its defaults.

    Raises:
        ConfigError: as `Options`, and as `check_given`.
    """
    check_given(given)
    return Options(**given)


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse what would have no effect beside the rest that was written down.

    Raises:
        ConfigError: bits or salient channels beside a budget, which chooses them; anything beside exact bits.
    """
    if given.get("bits") == "exact":
        check_beside_exact({name: value for name, value in given.items() if value is not None})
    for name in ("bits", "salient"):
        if given.get("target_bpw") is not None and name in given:
            raise ConfigError(f"{name}: target_bpw chooses this for every tensor; give one of the two")


def check_beside_exact(given: Mapping[str, Any]) -> None:
    """Refuse options that say how something is rounded, where nothing is.

    Args:
        given: name -> value, `bits` among them.

    Raises:
        ConfigError: naming the first of them.
    """
    name = next((name for name in given if name != "bits"), None)
    if name is not None:
        raise ConfigError(f"{name}: bits: exact: nothing is rounded, chosen or trained; leave {name} out")


def check_none_given(given: Mapping[str, Any], adapter: str | Path) -> None:
    """Refuse options that would have no effect on an adapter.

    Args:
        given: name -> value, None for one that was not given.

    Raises:
        ConfigError: naming the first of them.
    """
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise ConfigError(
            f"{name}: {adapter} is a PEFT adapter, which is kept as it was trained; leave it out. To compress it "
            "like a full fine-tune, merge it first (`meswitch merge`)"
        )


# Kept as JSON in a recipe, where they are such objects.
_STRUCTURED: Mapping[str, type] = {"distill": TrainingRecipe, "solver": Solver}


def recipe_of(options: Options, base: str | Path, expert: str | Path) -> "Recipe":
    """The options as a manifest records them.

    Args:
        base: as it was given; a directory's name is not kept.
        expert: likewise.
    """
    from meswitch.artifact.manifest import Recipe
    from meswitch.hub import is_hub_id

    texts = {name: _text(name, value) for name, value in options.given().items()}
    sources = (str(source) if is_hub_id(source) else None for source in (base, expert))
    return Recipe(texts, *sources)


@dataclass(frozen=True, slots=True)
class Again:
    """A recipe to follow.

    Args:
        source: where it was read.
        options: by name, as `Options` takes them.
        base, expert: hub ids; None where they were directories.
        calibration_sha256: of the file that it was calibrated on, None if there was none.
    """

    source: Path
    options: dict[str, Any]
    base: str | None = None
    expert: str | None = None
    calibration_sha256: str | None = None


def read_recipe(path: str | Path) -> Again:
    """The recipe of an artifact's directory or manifest, or of a TOML file of options by name.

    Raises:
        ConfigError: no such file, an artifact without a recipe, an unknown option or a value that it does not take.
        ArtifactError: the manifest is damaged.
    """
    from meswitch.artifact.manifest import MANIFEST_NAME, Manifest

    file = Path(path)
    if file.is_dir():
        file = file / MANIFEST_NAME
    if not file.is_file():
        raise ConfigError(f"--recipe: {file}: no such file; give an artifact's directory or a TOML file of options")
    if file.suffix == ".toml":
        try:
            said = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
        return Again(file, {name: _value(file, name, _toml_text(file, name, value)) for name, value in said.items()})
    if file.suffix != ".json":
        raise ConfigError(f"--recipe: {file}: give an artifact's directory or a TOML file of options (.toml)")
    manifest: Manifest = Manifest.from_json(file.read_text(encoding="utf-8"), file)
    if manifest.recipe is None:
        why = "it is a PEFT adapter's" if manifest.method.name == "lora" else "an earlier version wrote it"
        raise ConfigError(f"{file}: recipe: there is none, because {why}; give the options themselves")
    recipe = manifest.recipe
    options = {name: _value(file, name, text) for name, text in recipe.options.items()}
    calibration = manifest.method.calibration
    sha256 = calibration.sha256 if calibration is not None and "self" not in calibration.source else None
    return Again(file, options, recipe.base, recipe.expert, sha256)


def _text(name: str, value: Any) -> str:
    from meswitch.compression.text import TextSource

    if dataclasses.is_dataclass(value) and not isinstance(value, TextSource | type):
        return json.dumps(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    if name == "calibration":
        return str((value if isinstance(value, TextSource) else TextSource.parse(value)).resolved(_portable))
    if value is None:
        return str(SETTINGS[name].none)
    return str(value)


def _portable(file: str) -> Path:
    path = Path(file)
    return Path(path.name) if path.is_absolute() else path


def _toml_text(file: Path, name: str, value: Any) -> str:
    if name == "calibration" and isinstance(value, str) and value != "none":
        from meswitch.compression.text import TextSource

        return str(TextSource.parse(value).resolved(lambda text: file.parent / text))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{file}: {name}: {value!r} is neither a text nor a number")
    return str(value)


def _value(file: Path, name: str, text: str) -> Any:
    """A text as the value that `Options` takes."""
    try:
        if name in _STRUCTURED and text.startswith("{"):
            given = {key: tuple(item) if isinstance(item, list) else item for key, item in json.loads(text).items()}
            return _STRUCTURED[name](**given)
        if name == "parameters":
            return {key: float(number) for key, number in json.loads(text).items()}
        if name == "method":
            return text
        setting = SETTINGS[name]
        if text == setting.none:
            return None
        if not isinstance(setting.kind, type):
            return setting.kind[setting.kind.index(text)]
        if text == setting.word:
            return text
        return setting.kind(text)
    except KeyError:
        known = ", ".join(SETTINGS)
        raise ConfigError(f"{file}: recipe: {name}: no such option; there are {known}") from None
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{file}: recipe: {name}: {text!r} is not a value that it takes") from None
