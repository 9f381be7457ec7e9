"""Artifacts in repositories of the Hugging Face hub: fetched whole, pushed whole.

An artifact of the hub is named `hf://org/name` or `hf://org/name@revision`. Its manifest says which files are its own;
nothing else of a repository is fetched, and every file is checked against the manifest when it is opened.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meswitch.artifact.manifest import MANIFEST_NAME, Manifest
from meswitch.durable import replace_directory
from meswitch.errors import ArtifactError, ConfigError
from meswitch.hub import Why, ask_hub
from meswitch.units import Progress, format_bytes, plural, silent

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
    notice(f"uploading {plural(len(files), 'file')}")
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
        ArtifactError: it cannot be reached, refuses, or has too much to do.
    """

    def error(why: Why, reason: str) -> ArtifactError:
        if why == "unreachable":
            return ArtifactError(
                f"{name}: the hub cannot be reached ({reason}); check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
            )
        if why == "refused":
            return ArtifactError(
                f"{name}: the hub refuses ({reason}); check the name and that you may (`hf auth login`, or HF_TOKEN)"
            )
        if why == "busy":
            return ArtifactError(f"{name}: the hub answers with an error of its own ({reason}); try again later")
        return ArtifactError(f"{name}: failed here ({reason})")

    return ask_hub(ask, error)


GENERATED = "<!-- generated by meswitch push -->"


@dataclass(frozen=True, slots=True)
class About:
    """What a card says that the artifact does not know.

    Args:
        repository: `org/name`, for the commands that it shows.
        base, expert: hub ids; None where there are none, or where the recipe knows them.
        license: an identifier of the hub, such as `apache-2.0`; `other` with `license_name` and `license_link`.
        license_name, license_link: of a licence that the hub does not know.
        language: codes such as `en`.
        quality: what `meswitch eval --json` wrote; None if nothing was measured.
    """

    repository: str
    base: str | None = None
    expert: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    quality: Mapping[str, Any] | None = None


def model_card(artifact: "Artifact", about: About) -> str:
    """The text of README.md: YAML that the hub reads, then what people read."""
    manifest = artifact.manifest
    recipe = manifest.recipe
    base = about.base or (recipe.base if recipe else None)
    expert = about.expert or (recipe.expert if recipe else None)
    method = manifest.method
    name = about.repository.rpartition("/")[2]
    sha = manifest.base.fingerprint
    facts = {
        "base": f"[{base}](https://huggingface.co/{base})" if base else manifest.base.name,
        "base's fingerprint": f"`{sha[:28]}...`" if len(sha) > 31 else f"`{sha}`",
        "fine-tune": f"[{expert}](https://huggingface.co/{expert})" if expert else manifest.expert.name,
        "architecture": manifest.base.model_type,
        "parameters": f"{manifest.expert.parameters:,}",
        "full checkpoint": f"{format_bytes(manifest.expert.bytes)} ({manifest.expert.dtype})",
        "this artifact": f"{format_bytes(artifact.nbytes)}, {_ratio(artifact)}",
        "bits per weight": f"{artifact.bits_per_weight:.3f}: all bytes of tensors x 8 / all parameters",
        "method": _method(method),
        "calibration": "none: data-free"
        if method.calibration is None
        else f"{method.calibration.tokens:,} tokens of {method.calibration.source}",
        "made with": f"meswitch {manifest.provenance.meswitch}, {manifest.provenance.created[:10]}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    where = base or "BASE"
    return f"""---
{_front_matter(about, base)}
---
{GENERATED}

# {name}

{manifest.expert.name} as its difference from {manifest.base.name}, compressed by meswitch
([ME-Switch](https://arxiv.org/abs/2406.09041)). It is no checkpoint of its own: it is served beside other fine-tunes of
the same base, all in one batch, or merged into a checkpoint.

| | |
| --- | --- |
{table}

## Quality

{_quality(about.quality)}

## How to use it

```
meswitch pull {about.repository} --out {name}
meswitch merge --base {where} --delta {name} --out {name}-full    # an ordinary checkpoint, for any other tool
```

To serve it, write a `family.toml` and run `meswitch serve family.toml` (on a GPU with many users: `--engine vllm`):

```toml
[base]
path = "{where}"

[[expert]]
name = "{_expert_name(name)}"
delta = "hf://{about.repository}"
description = ""
```

## Licence

{_license(about, base, expert)}
"""


def read_quality(file: Path) -> dict[str, Any]:
    """What `meswitch eval --json` or `--out FILE.json` wrote.

    Raises:
        ConfigError: it is something else.
    """
    from meswitch.jsonfile import read_json

    found = read_json(file, ConfigError)
    rows = found.get("rows")
    fits = isinstance(rows, list) and all(isinstance(row, dict) and {"task", "kind"} <= row.keys() for row in rows)
    if not fits:
        raise ConfigError(f"{file}: rows: missing; give what `meswitch eval --out FILE.json` wrote")
    return found


def _front_matter(about: About, base: str | None) -> str:
    """Strings are written as JSON, which YAML reads; so no value can end the block or begin another field."""
    fields: dict[str, Any] = {
        "library_name": "meswitch",
        "pipeline_tag": "text-generation",
        "tags": ["meswitch", "delta-compression", "text-generation"],
    }
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    named = {"license": about.license, "license_name": about.license_name, "license_link": about.license_link}
    fields |= {key: value for key, value in named.items() if value is not None}
    if about.language:
        fields["language"] = list(about.language)
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())


def _ratio(artifact: "Artifact") -> str:
    return (
        f"{artifact.manifest.expert.bytes / artifact.nbytes:.1f}x smaller" if artifact.nbytes else "no tensor changed"
    )


def _method(method: Any) -> str:
    if method.name in ("exact", "lora"):
        return {"exact": "exact: nothing is rounded", "lora": "a LoRA adapter, kept as it was trained"}[method.name]
    bits = f"{method.target_bpw:g} bits a weight in all" if method.target_bpw else plural(method.bits, "bit")
    group = "a row" if method.group_size is None else f"{method.group_size} weights"
    trained = "" if method.distillation is None else f", {plural(method.distillation.steps, 'step')} of distillation"
    return f"{method.name}: {bits}, a scale for {group}, embeddings {method.embeddings}{trained}"


def _quality(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "Not measured. `meswitch eval` compares base, fine-tune and this artifact on any questions."
    lines = ["| task | questions | base | fine-tune | this artifact | gain retained | KL, nats a token |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = quality["rows"]
    for row in (row for row in rows if row["kind"] == "delta"):
        others = [one for one in rows if (one["task"], one.get("metric")) == (row["task"], row.get("metric"))]
        base, full = (next((one for one in others if one["kind"] == kind), None) for kind in ("base", "expert"))
        cells = [row["task"], _count(row), *(_share(one) for one in (base, full, row)), _gain(row), _kl(row)]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += [
        "",
        f"By `meswitch eval` ({quality.get('meswitch', '-')}): all models were asked the same questions; gain",
    ]
    lines.append("retained is (this - base) / (fine-tune - base), with its 95 % interval; KL is against the fine-tune.")
    return "\n".join(lines)


def _count(row: Mapping[str, Any]) -> str:
    score, fidelity = row.get("score"), row.get("fidelity")
    return str(score["total"] if score else fidelity["sequences"] if fidelity else "-")


def _share(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None or row.get("value") is None else f"{row['value']:.3f}"


def _gain(row: Mapping[str, Any]) -> str:
    gain = row.get("gain")
    if not gain or gain.get("value") is None:
        return "-"
    low, high = gain["interval"]
    return f"{gain['value']:.3f} [{low:.3f}, {high:.3f}]"


def _kl(row: Mapping[str, Any]) -> str:
    return f"{row['fidelity']['kl']:.4f}" if row.get("fidelity") else "-"


def _expert_name(name: str) -> str:
    return name if name not in ("auto", "base", "other", "error") else f"{name}-expert"


def _license(about: About, base: str | None, expert: str | None) -> str:
    of: Iterable[str] = [f"[{one}](https://huggingface.co/{one})" for one in (base, expert) if one]
    bound = (
        f"The licences of {' and '.join(of)} apply to it." if of else "The licences of base and fine-tune apply to it."
    )
    named = about.license_name or about.license
    if named is None:
        return f"Not stated. {bound}"
    return f"{f'[{named}]({about.license_link})' if about.license_link else named}. {bound}"
