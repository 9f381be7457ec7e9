"""A model whose parameters are loaded when they are asked for, wherever they are, by the rules of `from_pretrained`."""

import copy
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from meswitch.architecture import architecture_of
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError


class LazyModel:
    """A model on the meta device, with real buffers; its parameters are loaded when they are asked for.

    Args:
        config: its configuration.
        stored: names of the tensors that there are.
        read: gives one of them.
        source: where they are from, for messages.
        device: where the model computes.
        dtype: in which it computes.

    Raises:
        CheckpointError: transformers has no model for the configuration. IncompatibleError: parameters are missing.
    """

    def __init__(
        self,
        config: Any,
        stored: Collection[str],
        read: Callable[[str], Tensor],
        source: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        attend_at_any_length()
        self.source, self.device, self.dtype = source, device, dtype
        self._read = read
        self.architecture = architecture_of(config)
        self.plan = self.architecture.load_plan(stored)
        self.model: Any = self._skeleton()
        self._check_complete()
        self._float32 = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "LazyModel":
        """The model of a checkpoint."""
        return cls(checkpoint.config, checkpoint.tensors, checkpoint.read, checkpoint.directory, device, dtype)

    def _skeleton(self) -> Any:
        # experts of a mixture one after the other: the other ways are for speed, and not all of them train
        how: dict[str, Any] = {"dtype": self.dtype, "experts_implementation": "eager"}
        with init_empty_weights(include_buffers=False):
            model = self.architecture.model_class._from_config(copy.deepcopy(self.architecture.config), **how)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        return model.eval()

    def _check_complete(self) -> None:
        optional = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        parameters = {name for name, _ in self.model.named_parameters()}
        missing = [
            name
            for name in self.plan.missing
            if name in parameters and not any(re.search(pattern, name) for pattern in optional)
        ]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise IncompatibleError(
                f"{self.source}: {type(self.model).__name__} needs {', '.join(missing[:3])}{more}, which nothing "
                "stored gives; re-save it with the installed transformers"
            )

    def load(self, path: str = "", module: nn.Module | None = None, *, inside: bool = True) -> Any:
        """Give a module its weights, not to be trained. What is loaded already stays.

        Args:
            path: its name in the model; "" is the whole.
            module: a copy of it to load instead.
            inside: load what is inside it too.
        """
        module = self.model.get_submodule(path) if module is None else module
        prefix = f"{path}." if path else ""
        wanted: dict[str, list[str]] = {}  # stored parameter -> those in the module that have its values
        for name, tensor in _own(module, inside):
            source = self._source(f"{prefix}{name}") if _is_open(tensor) else None
            if source is not None:
                wanted.setdefault(source, []).append(name)
        while wanted:
            rule = self.plan.by_target[next(iter(wanted))]
            made = rule.build(self._read, self.architecture.model)
            for target in rule.targets:
                loaded: nn.Parameter | None = None
                for name in wanted.pop(target, ()):
                    loaded = self._set(module, name, loaded, made[target], f"{prefix}{name}")
        return module

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a parameter is kept: the model's, or float32 where its class says so."""
        return torch.float32 if any(re.search(pattern, name) for pattern in self._float32) else self.dtype

    def _source(self, name: str) -> str | None:
        """The parameter that is stored for this one: itself, or one that it is tied to."""
        given = self.plan.by_target
        of = self.plan.tied.get(name, name)
        tied = (name, of, *(other for other, source in self.plan.tied.items() if source == of))
        return next((found for found in tied if found in given), None)

    def _set(
        self, module: nn.Module, name: str, tied: nn.Parameter | None, value: Tensor, full_name: str
    ) -> nn.Parameter | None:
        """Give a module a value, or a parameter that it is tied to."""
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        buffer = owner._buffers.get(leaf)
        if buffer is not None:
            owner._buffers[leaf] = value.to(self.device, buffer.dtype)
            return None
        owner._parameters[leaf] = made = self._parameter(value, full_name) if tied is None else tied
        return made

    def _parameter(self, value: Tensor, name: str) -> nn.Parameter:
        value = value.to(self.device)  # moved in its own dtype: half the bytes, and the device converts faster
        if value.is_floating_point():
            value = value.to(self.dtype_of(name))
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.contiguous().clone()  # alone in its memory: `inputs.Observer` knows it by that
        return nn.Parameter(value, requires_grad=False)


def attend_at_any_length() -> None:
    """Let torch attend by kernels that take all shapes, in this process.

    Its first choice on some GPUs is cuDNN's, which makes a plan for each new shape of queries and keys: 0.1 to 0.4 s on
    an H200. Texts have all lengths, so most prompts of a server and batches of a training would wait for one.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def drop(modules: Iterable[nn.Module]) -> None:
    """Forget what modules own, without what is inside them."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _own(module: nn.Module, inside: bool) -> Iterable[tuple[str, Tensor]]:
    tensors = module.state_dict(keep_vars=True).items()
    return tensors if inside else [(name, tensor) for name, tensor in tensors if "." not in name]


def _is_open(tensor: Tensor) -> bool:
    """Whether a parameter is not loaded; of buffers nothing says so."""
    return tensor.is_meta or not isinstance(tensor, nn.Parameter)
