"""Checkpoints of the Hugging Face hub: the files that a model is loaded from, and no others.

A repository often holds the same weights several times (`consolidated.safetensors`, `original/`,
`model.fp16.safetensors`, `pytorch_model.bin`). What is fetched is what transformers would load: `model.safetensors`, or
the files that its index names.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from meswitch.errors import CheckpointError
from meswitch.tensorfile import INDEX, WEIGHTS, read_index


def is_hub_id(source: str | Path) -> bool:
    """Whether a text may name a repository (`org/name` or `name`): it is no path, and nothing of that name is here."""
    text = str(source)
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and not Path(text).exists()


def fetch_config(source: str) -> Path:
    """The `config.json` of a repository, in the Hugging Face cache.

    Raises:
        CheckpointError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    return _asked(source, lambda: hf_hub_download(source, "config.json"))


def fetch_checkpoint(source: str, companions: Iterable[str]) -> Path:
    """A repository's weights and companion files, in the Hugging Face cache.

    Args:
        source: `org/name`.
        companions: names of files to fetch beside the weights, where the repository has them.

    Returns:
        the directory of the snapshot. It has no weights if the repository has none in safetensors.

    Raises:
        CheckpointError: the hub does not give it, or its index is damaged.
    """
    from huggingface_hub import snapshot_download

    def fetch(names: Iterable[str], revision: str | None = None) -> Path:
        return _asked(source, lambda: snapshot_download(source, revision=revision, allow_patterns=list(names)))

    directory = fetch([*companions, INDEX])
    commit = directory.name  # all files are those of one commit, though the repository changes meanwhile
    directory = fetch([WEIGHTS], commit)
    if not (directory / WEIGHTS).is_file() and (directory / INDEX).is_file():
        directory = fetch(sorted(set(read_index(directory / INDEX).values())), commit)
    return directory


def _asked(source: str, ask: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(ask())
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory here, and the hub cannot be reached for a model of this name; check the path "
            "or the connection"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: neither a directory here nor a model that the hub gives ({reason}); "
            "check the name, or log in with `hf auth login`"
        ) from error
