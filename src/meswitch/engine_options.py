"""What an engine may take, and how it computes: defaults and limits, which `family.toml` has from here.

Nothing here imports torch until a device is asked for, or a backend that meswitch does not ship.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from meswitch.errors import ConfigError, check_names
from meswitch.units import plural

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
BackendName = Literal["auto", "triton", "cpu", "reference"]
RunnerName = Literal["auto", "batch", "turns"]
DEVICE = r"auto|cpu|cuda(:\d+)?"  # a regular expression
LEAST = {
    "slots": 1,
    "host_bytes": 1,
    "merged_bytes": 0,
    "max_batch_tokens": 1,
    "kv_cache_tokens": 256,  # less leaves no room for an answer
    "max_queue": 1,
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine may take, and how it computes.

    Args:
        base_name: the base's own name.
        device: `auto`, `cpu`, `cuda` or one of several GPUs, such as `cuda:1`.
        dtype: `float32`, `bfloat16` or `float16`; `auto` is float32 on a CPU, the checkpoint's on a GPU.
        slots: experts on the device at a time.
        host_bytes: budget in bytes for experts in host memory, None for no limit.
        merged_bytes: budget in bytes for experts' merged weights where no kernels run, which makes a CPU several times
            as fast; None for half of the memory that is free in float32 on a CPU, 0 for none.
        max_batch_tokens: tokens of one step.
        kv_cache_tokens: tokens of all running requests together.
        max_queue: waiting and running requests; one more is refused.
        backend: what computes deltas: `triton` (bfloat16 or float16), `cpu`, `reference`, or one that was registered;
            `auto` is triton on a GPU, cpu elsewhere.
        cuda_graphs: record decode steps when the engine opens, where the kernels run: several times as fast, for some
            seconds at the start.
        runner: `batch`, one running batch for all experts; `turns`, one expert at a time, for any model; `auto`, the
            batch if it is proven right for this base and these experts when the engine opens.
        grows: make all slots, also those that no expert needs yet, for experts that are added later.

    Raises:
        ConfigError: a value that makes no sense; the message names the option.
    """

    base_name: str = "base"
    device: str = "auto"
    dtype: str = "auto"
    slots: int = 4
    host_bytes: int | None = None
    merged_bytes: int | None = None
    max_batch_tokens: int = 2048
    kv_cache_tokens: int = 32768
    max_queue: int = 1024
    backend: str = "auto"
    cuda_graphs: bool = True
    runner: RunnerName = "auto"
    grows: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base_name, str) or not self.base_name:
            raise ConfigError(f"base_name: {self.base_name!r} is no name")
        for name, words in (("runner", get_args(RunnerName)), ("dtype", get_args(DtypeName))):
            if getattr(self, name) not in words:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is none of {', '.join(words)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("host_bytes", "merged_bytes"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name}: {value!r} is not a whole number")
            if value < least:
                raise ConfigError(f"{name}: {value} is less than {least}")
        for name in ("cuda_graphs", "grows"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is neither True nor False")
        if self.backend not in get_args(BackendName):
            from meswitch.ops import BACKENDS  # also those that others registered

            if not isinstance(self.backend, str) or self.backend not in BACKENDS:
                raise ConfigError(f"backend: {self.backend!r} is none of auto, triton, {', '.join(BACKENDS)}")
        if not isinstance(self.device, str) or re.fullmatch(DEVICE, self.device) is None:
            raise ConfigError(f"device: {self.device!r} is none of auto, cpu, cuda, cuda:1 and so on")

    @classmethod
    def of(cls, options: "EngineOptions | None", settings: Mapping[str, Any]) -> "EngineOptions":
        """Options with single ones changed.

        Args:
            options: None for the defaults.
            settings: by name.

        Raises:
            ConfigError: no options, a name that there is not, or a value that makes no sense.
        """
        if not isinstance(options, EngineOptions | None):
            raise ConfigError(
                f"options: {type(options).__name__} given; it takes an EngineOptions, and single options by name "
                "beside it: Engine(base, experts, slots=8)"
            )
        check_names(settings, [field.name for field in dataclasses.fields(cls)], "option of the engine")
        return dataclasses.replace(options or cls(), **settings)

    @property
    def asked_backend(self) -> str | None:
        """The backend that was asked for; None where the device and the model's dtype decide."""
        return None if self.backend == "auto" else self.backend

    @property
    def target(self) -> "torch.device":
        """Where it computes.

        Raises:
            ConfigError: a GPU is asked for that torch does not see.
        """
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        seen = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= seen:
            fix = "use auto or cpu" if seen == 0 else f"the last one is cuda:{seen - 1}"
            raise ConfigError(f"device: {self.device!r}: torch sees {plural(seen, 'GPU')} here; {fix}")
        return device
