"""Checkpoints of a training run: weights and optimizer as safetensors, the rest as JSON; replaced in one step.

Steps draw their rows and their dropout from (seed, step), so a step number is all the random state there is, and a
resumed run goes on with the very bits of one that was never interrupted.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meswitch.durable import fsync_path, recover_directory, replace_directory
from meswitch.router.base import RouterError

_STATE = "state.json"
_TENSORS = "state.safetensors"
_FORMAT = "meswitch-router-training"


def save_checkpoint(
    path: Path,
    step: int,
    run: str,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor],
) -> None:
    """Replace the checkpoint at `path`. run: identifies data and settings. weights: name -> trained parameter.

    mean: of the last steps' weights, or empty.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"weight.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    tensors |= {f"mean.{name}": value.detach().cpu().contiguous() for name, value in mean.items()}
    for name, value in weights.items():
        for key, item in optimizer.state.get(value, {}).items():
            tensors[f"optimizer.{key}.{name}"] = item.detach().cpu().contiguous()
    save_file(tensors, partial / _TENSORS)
    (partial / _STATE).write_text(json.dumps({"format": _FORMAT, "step": step, "run": run}) + "\n")
    for part in (partial / _TENSORS, partial / _STATE):
        fsync_path(part)
    replace_directory(partial, path)


def load_checkpoint(
    path: Path,
    run: str,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: dict[str, Tensor],
) -> int:
    """Put a checkpoint's state into `weights`, `optimizer` and `mean`; the steps that are done, 0 without a checkpoint.

    Raises:
        RouterError: a checkpoint of another run, or a damaged one.
    """
    recover_directory(path)
    if not path.exists():
        return 0
    state = _state(path)
    if state["run"] != run:
        raise RouterError(
            f"{path}: run: a checkpoint of other data, settings or another model; remove the directory to start anew"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise RouterError(f"{path / _TENSORS}: cannot be read ({error}); remove the directory to start anew") from None
    averaged = any(name.startswith("mean.") for name in tensors)
    for name, value in weights.items():
        with torch.no_grad():
            value.copy_(_taken(tensors, f"weight.{name}", value, path))
        if averaged:
            mean[name] = _taken(tensors, f"mean.{name}", value, path).to(value.device)
        keys = ("step", "exp_avg", "exp_avg_sq")
        found = {key: tensors.pop(f"optimizer.{key}.{name}", None) for key in keys}
        if any(item is not None for item in found.values()):
            if any(item is None for item in found.values()):
                raise RouterError(f"{path / _TENSORS}: optimizer.{name}: incomplete; remove the directory")
            optimizer.state[value] = {
                key: item if key == "step" else item.to(value.device) for key, item in found.items() if item is not None
            }
    if tensors:
        raise RouterError(f"{path / _TENSORS}: {min(tensors)}: unknown tensor; remove the directory to start anew")
    return int(state["step"])


def _taken(tensors: dict[str, Tensor], name: str, like: Tensor, path: Path) -> Tensor:
    """A tensor out of a checkpoint's, of another's shape."""
    saved = tensors.pop(name, None)
    if saved is None or saved.shape != like.shape:
        raise RouterError(f"{path / _TENSORS}: {name}: missing or of another shape; remove the directory")
    return saved


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouterError(f"{path / _STATE}: cannot be read ({error}); remove the directory to start anew") from None
    fits = isinstance(state, dict) and state.get("format") == _FORMAT
    if not fits or type(state.get("step")) is not int or not isinstance(state.get("run"), str):
        raise RouterError(f"{path / _STATE}: not a checkpoint of router training; choose another place")
    return dict(state)
