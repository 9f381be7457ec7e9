"""Errors a user can act on: every message names the file, the field and the fix."""

import difflib
from collections.abc import Iterable, Sequence


class MeswitchError(Exception):
    """Base of all errors that meswitch raises on purpose."""


class CheckpointError(MeswitchError):
    """A Hugging Face checkpoint is missing, truncated or in a format that is not read."""


class AdapterError(CheckpointError):
    """A PEFT adapter (LoRA and the like) was given where a full model is expected."""


class ArtifactError(MeswitchError):
    """A compressed expert on disk is incomplete, damaged, or not a meswitch artifact."""


class IncompatibleError(MeswitchError):
    """Two things that are each fine do not fit together: another base, another architecture."""


class ConfigError(MeswitchError):
    """A configuration file or an option has a value that cannot be used."""


class ContextLengthError(ConfigError):
    """A prompt leaves no room for an answer."""


class UnknownExpertError(MeswitchError):
    """A request named an expert that the family does not have."""


class LoadError(MeswitchError):
    """An expert cannot be loaded now. Its text is for whoever asked: the expert and the kind of fault, no path of this
    machine. Its `__cause__` says where and what, for the log."""


class CapacityError(MeswitchError):
    """A byte budget or a queue is full, or an expert does not fit the slots."""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse an argument that does not exist.

    Args:
        given: names of arguments.
        known: those that exist.
        what: they are, such as "option of the engine".

    Raises:
        ConfigError: it names the first one that does not exist, and the nearest that does.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"is it {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{name}: no such {what}; {hint}")
