"""`--additional-config '{"meswitch": {...}}'`: what the engine must know before it has seen an expert.

And the words that several processes of a server share: names of variables, and what a worker says of an expert.
"""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from meswitch.artifact import Artifact
from meswitch.errors import ConfigError

KEY = "meswitch"
DIRECTORY_VARIABLE = "MESWITCH_DELTA_DIR"  # where a server finds experts by name
READY, LOADING, FAILED = "ready", "loading", "failed"  # what a worker says of an expert that is read ahead


@dataclass(frozen=True, slots=True)
class DeltaSettings:
    """Slots have fixed addresses, so their size is fixed at start.

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
