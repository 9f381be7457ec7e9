"""The recipe of an artifact: what was asked for when it was made, kept in its manifest, and how to do it again.

Options are kept as the texts that the command line takes, those at their defaults left out. A path that was absolute is
kept as the file's name: an artifact tells nobody how a machine's directories are called.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.compression.options import SETTINGS, Options, Solver, TrainingRecipe
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.artifact.manifest import Recipe

_STRUCTURED: Mapping[str, type] = {
    "distill": TrainingRecipe,
    "solver": Solver,
}  # kept as JSON where they are such objects


def recipe_of(options: Options, base: str | Path, expert: str | Path) -> "Recipe":
    """As the manifest records it. base, expert: as they were given; a directory's name is not kept here."""
    from meswitch.artifact.manifest import Recipe
    from meswitch.configuration import is_hub_id

    texts = {name: _text(name, value) for name, value in options.given().items()}
    sources = (str(source) if is_hub_id(source) else None for source in (base, expert))
    return Recipe(texts, *sources)


@dataclasses.dataclass(frozen=True, slots=True)
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
            fields = {key: tuple(item) if isinstance(item, list) else item for key, item in json.loads(text).items()}
            return _STRUCTURED[name](**fields)
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
