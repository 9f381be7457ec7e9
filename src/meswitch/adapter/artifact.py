"""An adapter as an artifact: its pairs as they were trained, the base's tokenizer where it brings none of its own."""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from meswitch import __version__
from meswitch.adapter.changes import AdaptedTensor, Changes, changes_of
from meswitch.adapter.weights import WEIGHTS_NAME, Adapter, adapts
from meswitch.architecture import HEAD, architecture_of
from meswitch.artifact import Artifact, ArtifactWriter, Entry, Manifest, Method, fingerprint
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance, Stored
from meswitch.artifact.writer import companion_digests
from meswitch.checkpoint import ADAPTER_CONFIG, COMPANION_FILES, Checkpoint, sha256_file
from meswitch.codec import LowRankDelta
from meswitch.jsonfile import read_json
from meswitch.tensorfile import NAMES
from meswitch.tokenizer import ChatTokenizer, has_tokenizer
from meswitch.units import Progress, silent

METHOD = "lora"  # as manifests name it
_CONFIG = "config.json"
_OF_MODEL = (_CONFIG, "generation_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def open_expert(source: str | Path, base: Checkpoint) -> Artifact:
    """Open an artifact, or a PEFT adapter as one.

    Args:
        source: the directory of either. An adapter is laid out in a directory for temporary files, which goes when the
            artifact does.
        base: what the expert changes.

    Raises:
        MeswitchError: see `Artifact.open` and `write_artifact`.
    """
    if not adapts(source, base):
        return Artifact.open(source)
    room = Path(tempfile.mkdtemp(prefix="meswitch-"))
    try:
        artifact = write_artifact(base, Adapter.open(source), room / Path(source).resolve().name, checksums=False)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    weakref.finalize(artifact, shutil.rmtree, room, ignore_errors=True)
    return artifact


def write_artifact(
    base: Checkpoint,
    adapter: Adapter,
    out: Path,
    *,
    overwrite: bool = False,
    checksums: bool = True,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda line: None,
) -> Artifact:
    """Write an adapter as an artifact. Nothing is rounded.

    Args:
        base: the model that it changes, in 16 bit or more.
        out: the directory to create.
        overwrite: replace an artifact that exists.
        checksums: record the SHA-256 of every tensor of the base, which reads all of it.
        progress: is told how far it is.
        notice: is told, in a line each, what a person should know.

    Raises:
        CheckpointError: the adapter holds something that is not applied here, or has no place in this base.
        IncompatibleError: it is of another base.
        ArtifactError: `out` exists, or cannot be written.
    """
    import transformers

    changes = changes_of(adapter, base)
    for line in changes.notes:
        notice(line)
    base, content = base.loaded, fingerprint(base.loaded)
    files = [sha256_file(adapter.directory / name) for name in (ADAPTER_CONFIG, WEIGHTS_NAME)]
    plan = hashlib.sha256(json.dumps([__version__, content, checksums, files]).encode()).hexdigest()
    writer = ArtifactWriter(out, plan, overwrite=overwrite)
    entries = planned_entries(base, changes)
    with writer, tempfile.TemporaryDirectory(prefix="meswitch-") as room:
        companions = _companions(base, adapter, changes, Path(room))
        if has_tokenizer(Path(room)):
            ChatTokenizer.open(adapter.directory.name, Path(room))
        else:
            notice(f"{adapter.directory}: neither it nor its base has a tokenizer: it can be merged, not served")
        for done, (name, entry) in enumerate(entries.items(), start=1):
            if name not in writer.entries:
                _add(writer, name, entry, changes.by_name.get(name), base if checksums else None)
            progress("copying the adapter", done, len(entries), name)
        made = Provenance(
            __version__, torch.__version__, transformers.__version__, datetime.now(UTC).isoformat(timespec="seconds")
        )
        manifest = _manifest(base, adapter, changes, content, dict(sorted(writer.final_entries().items())))
        writer.finish(replace(manifest, companions=companion_digests(companions), provenance=made), companions)
    return Artifact.open(out)


def planned_artifact(base: Checkpoint, adapter: Adapter) -> Artifact:
    """The artifact that `write_artifact` writes, from shapes alone: no bytes, no checksums.

    Args:
        base: with or without weights.

    Raises:
        CheckpointError, IncompatibleError: as `write_artifact`.
    """
    changes = changes_of(adapter, base)
    entries = planned_entries(base.loaded, changes)
    return Artifact(adapter.directory, _manifest(base, adapter, changes, "", entries), {})


def planned_entries(base: Checkpoint, changes: Changes) -> dict[str, Entry]:
    """The manifest's entries, from shapes alone: as if every tensor that the adapter holds changed."""
    roles = architecture_of(base.config).roles({name: info.shape for name, info in base.tensors.items()})
    own_head = () if changes.tied else base.aliases  # of a base that stores none
    entries = {}
    for name in sorted({*base.tensors, *changes.by_name, *own_head}):
        change, info = changes.by_name.get(name), base.info(name)
        if change is None:
            assert info is not None
            entries[name] = Entry("same", roles.get(name, HEAD), info.shape, {}, None)
            continue
        stored = {
            suffix: Stored("", NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize, "")
            for suffix, (shape, dtype) in change.stored.items()
        }
        entries[name] = Entry(change.kind, change.role, change.shape, stored, None, scale=change.scale)
    return entries


def _add(
    writer: ArtifactWriter, name: str, entry: Entry, change: AdaptedTensor | None, base: Checkpoint | None
) -> None:
    made = None if change is None else change.make()
    info = None if base is None else base.info(name)
    entry = replace(entry, base_sha256=None if info is None else info.sha256())
    if isinstance(made, LowRankDelta):
        writer.add(name, replace(entry, kind="lowrank", scale=made.scale), made.tensors())
    elif made is not None:
        writer.add(name, replace(entry, kind="dense", scale=None), {"": made})
    else:
        writer.add(name, replace(entry, kind="same", scale=None), {})


def _manifest(
    base: Checkpoint, adapter: Adapter, changes: Changes, content: str, entries: dict[str, Entry]
) -> Manifest:
    return Manifest(
        base=BaseInfo(
            Path(base.source).name, content, base.config.model_type, base.config.get_text_config().vocab_size
        ),
        expert=adapted_expert_info(base, adapter, changes, entries),
        method=method(adapter),
        tensors=entries,
        companions={},
        provenance=Provenance("", "", "", ""),
    )


def method(adapter: Adapter) -> Method:
    """How the manifest says what the adapter is."""
    config = adapter.config
    parameters = {"r": float(config.rank), "lora_alpha": config.alpha}
    parameters |= {"use_rslora": 1.0} if config.rank_stabilised else {}
    parameters |= {"use_dora": 1.0} if config.dora else {}
    return Method(METHOD, None, None, 0, "exact", 0.0, parameters=parameters)


def adapted_expert_info(base: Checkpoint, adapter: Adapter, changes: Changes, entries: dict[str, Entry]) -> ExpertInfo:
    """The model that the adapter makes of the base, as a full checkpoint would be."""
    count = total = 0
    dtypes = set()
    for name, entry in entries.items():
        info = base.info(name)
        dtype = info.dtype if info is not None else next(iter(changes.by_name[name].stored.values()))[1]
        numbers = torch.Size(entry.shape).numel()
        count, total = count + numbers, total + numbers * dtype.itemsize
        dtypes.add(NAMES[dtype])
    name = adapter.directory.resolve().name
    return ExpertInfo(name, count, total, "+".join(sorted(dtypes)), changes.vocabulary, changes.tied)


def _companions(base: Checkpoint, adapter: Adapter, changes: Changes, room: Path) -> list[Path]:
    """What makes the expert speak, gathered in `room`: the adapter's own files, and the base's where it has none.

    Files of two tokenizers are never mixed.
    """
    own, theirs = adapter.directory, base.directory
    own_tokenizer = has_tokenizer(own)
    own_template = any((own / name).is_file() for name in _TEMPLATES) or _template_of(own) is not None
    for name in COMPANION_FILES:
        source = own / name
        if not source.is_file():
            if (name in _TEMPLATES and own_template) or (name not in _OF_MODEL + _TEMPLATES and own_tokenizer):
                continue
            source = theirs / name
        if source.is_file():
            shutil.copyfile(source, room / name)
    template = None if own_template else _template_of(theirs)
    if template is not None and not any((room / name).is_file() for name in _TEMPLATES):
        (room / _TEMPLATES[0]).write_text(template, encoding="utf-8")
    _adjust(room / _CONFIG, base, changes)
    return sorted(room.iterdir())


def _template_of(directory: Path) -> str | None:
    """The chat template in a tokenizer's configuration."""
    file = directory / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else None


def _adjust(file: Path, base: Checkpoint, changes: Changes) -> None:
    """Make a configuration say what the expert is: how many tokens it has, whether its head is its own."""
    wanted: dict[str, object] = {}
    if changes.vocabulary != base.config.get_text_config().vocab_size:
        wanted["vocab_size"] = changes.vocabulary
    if base.aliases and not changes.tied:
        wanted["tie_word_embeddings"] = False
    data = read_json(file)
    data.pop("quantization_config", None)  # of the copy of the base that it was trained over
    for name, value in wanted.items():
        places = [part for part in (data, data.get("text_config")) if isinstance(part, dict) and name in part]
        for part in places or [data]:
            part[name] = value
    file.write_text(json.dumps(data, indent=2) + "\n")
