"""Artifacts in repositories of the Hugging Face hub: fetched whole, pushed whole.

An artifact of the hub is named `hf://org/name` or `hf://org/name@revision`. Its manifest says which files are its own;
nothing else of a repository is fetched, and every file is checked against the manifest when it is opened.
"""

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meswitch.artifact.card import GENERATED
from meswitch.artifact.manifest import MANIFEST_NAME, Manifest
from meswitch.durable import replace_directory
from meswitch.errors import ArtifactError, ConfigError
from meswitch.progress import Progress, silent

if TYPE_CHECKING:
    from meswitch.artifact.reader import Artifact

T = TypeVar("T")
CARD_NAME = "README.md"
INDEX_NAME = "delta.safetensors.index.json"
# `pathlib` makes one slash of two
_NAME = re.compile(r"hf:/{1,2}([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")

_TENSORS = re.compile(r"delta(-\d+)?\.safetensors(\.index\.json)?")  # files of tensors, of any artifact


@dataclass(frozen=True, slots=True)
class RemoteName:
    """A repository of the hub. revision: a branch, tag or commit; None is its main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def remote_name(source: str | Path) -> RemoteName | None:
    """The repository that `hf://org/name[@revision]` names; None for anything else.

    Raises:
        ConfigError: it begins with `hf:/` and is no such name.
    """
    text = str(source)
    if not text.startswith("hf:/"):
        return None
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text}: a repository of the hub is named hf://org/name or hf://org/name@revision")
    return RemoteName(match[1], match[2])


def local_artifact(source: str | Path) -> Path:
    """The directory of an artifact: a path as it is, `hf://org/name` fetched into the Hugging Face cache.

    Raises:
        ArtifactError: the hub does not give it, or it is no artifact.
    """
    name = remote_name(source)
    return Path(source) if name is None else _snapshot(name)


@functools.cache  # an engine asks more than once, and all should be of one commit
def _snapshot(name: RemoteName) -> Path:
    from huggingface_hub import snapshot_download

    manifest, commit = _manifest(name)
    files = files_of(manifest, with_card=False)
    return _asked(name, lambda: Path(snapshot_download(name.repository, revision=commit, allow_patterns=files)))


def pull(
    name: RemoteName, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> tuple["Artifact", str]:
    """Fetch an artifact into a directory of its own, and check every byte of it.

    Args:
        name: the repository.
        out: the directory to create; it gets its name when everything in it is complete.
        overwrite: replace an artifact that exists.
        progress: is told how far checking is.

    Returns:
        the artifact, and the commit that it is of.

    Raises:
        ArtifactError: the hub does not give it, it is no artifact or damaged, or `out` exists.
    """
    from huggingface_hub import snapshot_download

    from meswitch.artifact.reader import Artifact
    from meswitch.artifact.writer import check_destination, partial_directory

    check_destination(out, overwrite)
    manifest, commit = _manifest(name)
    partial = partial_directory(out)
    stage = partial / "pulled"
    stage.mkdir(parents=True, exist_ok=True)
    files = files_of(manifest)
    _asked(
        name,
        lambda: snapshot_download(name.repository, revision=commit, local_dir=stage, allow_patterns=files),
    )
    shutil.rmtree(stage / ".cache", ignore_errors=True)
    Artifact.open(stage).verify(progress)
    replace_directory(stage, out)
    shutil.rmtree(partial, ignore_errors=True)
    return Artifact.open(out), commit


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did. url: of the commit. kept_card: the repository's own card was left as it is."""

    url: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    kept_card: bool


def push(
    artifact: "Artifact",
    name: RemoteName,
    card: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload an artifact to a repository in one commit; the repository is created if it is not there.

    Files of an earlier artifact in it that this one does not have are removed. A card that somebody wrote stays: only
    one that was generated is replaced.

    Args:
        artifact: whose bytes were checked (`Artifact.verify`).
        name: the repository; its revision is the branch to commit to.
        card: the text of its README.md.
        private: of a repository that is created; None is what the account does by default.
        message: of the commit.
        notice: is told a line before each step.

    Raises:
        ArtifactError: the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    notice(f"creating {name.repository}, if it is not there")
    _asked(name, lambda: api.create_repo(name.repository, private=private, exist_ok=True))
    if name.revision is not None:
        _asked(name, lambda: api.create_branch(name.repository, branch=str(name.revision), exist_ok=True))
    there = _asked(name, lambda: api.list_repo_files(name.repository, revision=name.revision))
    files = files_of(artifact.manifest, with_card=False)
    files = [file for file in files if (artifact.directory / file).is_file()]
    stale = [
        file for file in there if re.fullmatch(r"delta(-\d+)?\.safetensors(\.index\.json)?", file) and file not in files
    ]
    keeps = CARD_NAME in there and GENERATED not in _text(api, name)
    operations: list[Any] = [CommitOperationAdd(file, str(artifact.directory / file)) for file in files]
    operations += [CommitOperationDelete(file) for file in stale]
    if not keeps:
        operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
    notice(f"uploading {len(files)} files")
    done = _asked(
        name,
        lambda: api.create_commit(
            name.repository,
            operations,
            commit_message=message or f"meswitch push: {artifact.manifest.expert.name}",
            revision=name.revision,
        ),
    )
    return Pushed(str(done.commit_url), done.oid, tuple(files), tuple(stale), keeps)


def files_of(manifest: Manifest, with_card: bool = True) -> list[str]:
    """The names of all files that an artifact may have; an index only if it has several files of tensors.

    Raises:
        ArtifactError: a name that is a path: a manifest of the hub must not reach out of its directory.
    """
    tensors = sorted({part.file for entry in manifest.tensors.values() for part in entry.stored.values()})
    index = [INDEX_NAME] if len(tensors) > 1 else []
    files = [MANIFEST_NAME, *tensors, *index, *sorted(manifest.companions)]
    for file in files:
        if Path(file).name != file or file.startswith(".") or any(letter in file for letter in "*?["):
            raise ArtifactError(f"{MANIFEST_NAME}: {file!r} is no plain file name; the artifact is not to be trusted")
    return [*files, *([CARD_NAME] if with_card else [])]


def _manifest(name: RemoteName) -> tuple[Manifest, str]:
    """The manifest of a repository and the commit that it is of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def ask() -> Path:
        try:
            return Path(hf_hub_download(name.repository, MANIFEST_NAME, revision=name.revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise ArtifactError(
                f"{name}: has no {MANIFEST_NAME}, so it is not an artifact; a full checkpoint's is org/name, without hf://"
            ) from None

    file = _asked(name, ask)
    return Manifest.from_json(file.read_text(encoding="utf-8"), file), file.parent.name


def _text(api: Any, name: RemoteName) -> str:
    path = _asked(name, lambda: api.hf_hub_download(name.repository, CARD_NAME, revision=name.revision))
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _asked(name: RemoteName, ask: Callable[[], T]) -> T:
    """What the hub answers.

    Raises:
        ArtifactError: it does not, or refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return ask()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(
            f"{name}: the hub does not do it ({reason:.400}); check the name and that you may (`hf auth login`, or "
            "HF_TOKEN)"
        ) from error
