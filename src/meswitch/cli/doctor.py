"""`meswitch doctor`: what this machine has, whether it works, and what is slow."""

import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from meswitch import __version__
from meswitch.cli import console
from meswitch.errors import MeswitchError
from meswitch.units import format_bytes, plural

_SHOWN = ("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "triton", "vllm")
_FOR_DEVELOPERS = ("dev", "clients", "lab")
_TOLERANCE = 1e-2  # of bfloat16
_LITTLE_MEMORY, _LITTLE_DISK = 4 << 30, 20 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a person may want to change. `error`: meswitch does not work so; `slow`: it works, slower."""

    level: Literal["error", "slow"]
    what: str
    fix: str


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this installation: versions, GPU, kernels, extras, and what is slow and why.

    On a GPU one of the kernels is compiled and compared with plain arithmetic. Nothing is loaded or fetched. Exit code
    1 means that something does not work.

    Example:

        meswitch doctor
    """
    console.quiet()
    facts = examine()
    found = findings(facts)
    if as_json:
        console.print_json(facts | {"findings": [asdict(item) for item in found]})
    else:
        _show(facts, found)
    if any(item.level == "error" for item in found):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """What there is, for JSON."""
    import platform

    import torch

    from meswitch.codec import codec_names
    from meswitch.cpu import free_bytes, multiplies_bfloat16

    required, extras = _requirements()
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return {
        "meswitch": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _SHOWN},
        "unfit": required,
        "extras": extras,
        "codecs": list(codec_names()),
        "cpu": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
            "bfloat16": multiplies_bfloat16(),
            "free_memory": free_bytes(),
        },
        "gpus": _gpus(),
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
        "torch_cuda": torch.version.cuda,
        "compiler": next(
            filter(None, (shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))), None
        ),
        "kernels": _kernels(),
        "environment": {
            name: value
            for name in ("OMP_NUM_THREADS", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES")
            if (value := os.environ.get(name)) is not None
        },
        "hub_cache": {"path": str(cache), "free": _free_disk(cache)},
    }


def findings(facts: dict[str, Any]) -> list[Finding]:
    """What is wrong or slow, of what `examine` found; errors first."""
    found = [
        Finding("error", f"{name}: {have or 'missing'}, and meswitch needs {wanted}", f"pip install '{name}{wanted}'")
        for name, (wanted, have) in facts["unfit"].items()
    ]
    found += [
        Finding("error", f"{package}: {have}, and meswitch[{extra}] needs {wanted}", f"pip install 'meswitch[{extra}]'")
        for extra, packages in facts["extras"].items()
        for package, (wanted, have, fits) in packages.items()
        if have is not None and not fits and extra not in _FOR_DEVELOPERS
    ]
    found += _of_gpus(facts) if facts["gpus"] else _without_gpu(facts)
    cpu, environment = facts["cpu"], facts["environment"]
    if environment.get("TRITON_INTERPRET", "0") != "0":
        what = "TRITON_INTERPRET is set: kernels are interpreted, thousands of times slower"
        found.append(Finding("slow", what, "unset TRITON_INTERPRET"))
    if cpu["threads"] < cpu["cores"] and "OMP_NUM_THREADS" in environment:
        what = f"OMP_NUM_THREADS is {environment['OMP_NUM_THREADS']}: {cpu['cores']} cores are there"
        found.append(
            Finding("slow", what, "unset OMP_NUM_THREADS; threads are fitted to the model and to what is free")
        )
    if cpu["free_memory"] < _LITTLE_MEMORY:
        what = f"{format_bytes(cpu['free_memory'])} of memory are free, within this container's limit"
        found.append(
            Finding("slow", what, "compression takes what one layer and a batch of text need; serving the base")
        )
    cache = facts["hub_cache"]
    if cache["free"] is not None and cache["free"] < _LITTLE_DISK:
        what = f"{cache['path']}: {format_bytes(cache['free'])} free for models of the hub; a 7B model takes 15 GB"
        found.append(Finding("slow", what, "free some, or set HF_HOME to a larger disk"))
    return sorted(found, key=lambda item: item.level)


def _of_gpus(facts: dict[str, Any]) -> list[Finding]:
    found = []
    kernels = facts["kernels"]
    if facts["packages"]["triton"] is None:
        found.append(Finding("slow", "triton is missing: deltas are computed without kernels", "pip install triton"))
    elif facts["compiler"] is None:
        found.append(Finding("error", "no C compiler: Triton needs one to launch kernels", "install gcc, or set CC"))
    elif not kernels["ok"]:
        what = f"the kernels do not run here: {kernels['reason']}"
        found.append(Finding("error", what, 'set engine.backend = "reference" in family.toml until it is mended'))
    for gpu in facts["gpus"]:
        if gpu["capability"] < [8, 0]:
            capability = ".".join(map(str, gpu["capability"]))
            what = f"{gpu['name']}: no bfloat16 in hardware (compute capability {capability})"
            found.append(Finding("slow", what, 'set engine.dtype = "float16" in family.toml'))
    if facts["packages"]["vllm"] is None:
        what = "vLLM is missing: it answers many users at a time several times faster than the embedded engine"
        found.append(Finding("slow", what, "pip install 'meswitch[vllm]', then `meswitch serve --engine vllm`"))
    return found


def _without_gpu(facts: dict[str, Any]) -> list[Finding]:
    if facts["nvidia_driver"]:
        build = "built for the CPU" if facts["torch_cuda"] is None else f"built for CUDA {facts['torch_cuda']}"
        what = f"there is an NVIDIA driver, and torch, which is {build}, sees no GPU"
        return [Finding("slow", what, "install torch for this driver's CUDA: https://pytorch.org/get-started/locally")]
    found = [Finding("slow", "no GPU: everything is computed on the CPU", "fine for small models and for compression")]
    if not facts["cpu"]["bfloat16"]:
        what = "this CPU has no bfloat16 instructions: calibration multiplies in float32, about 5 times slower"
        found.append(
            Finding("slow", what, "a CPU with AVX512-BF16 or AMX (EPYC from Zen 4, Xeon from Sapphire Rapids)")
        )
    return found


def _requirements() -> tuple[dict[str, tuple[str, str | None]], dict[str, dict[str, tuple[str, str | None, bool]]]]:
    """What meswitch needs and does not have: package -> (wanted, installed); and each extra's packages with whether
    they fit. Both as the installed package states them."""
    import importlib.metadata

    from packaging.requirements import Requirement

    unfit: dict[str, tuple[str, str | None]] = {}
    extras: dict[str, dict[str, tuple[str, str | None, bool]]] = {}
    try:
        stated = importlib.metadata.requires("meswitch") or []
        names = importlib.metadata.metadata("meswitch").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # run from a directory that was never installed
        return {}, {}
    for line in stated:
        item = Requirement(line)
        have = _version(item.name)
        fits = have is not None and item.specifier.contains(have, prereleases=True)
        if item.marker is None or item.marker.evaluate({"extra": ""}):
            if not fits:
                unfit[item.name] = (str(item.specifier), have)
            continue
        for extra in names:
            if item.marker.evaluate({"extra": extra}):
                extras.setdefault(extra, {})[item.name] = (str(item.specifier), have, fits)
    return unfit, extras


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = [properties.major, properties.minor]
        found.append({"name": properties.name, "memory": total, "free": free, "capability": capability})
    return found


def _kernels() -> dict[str, Any]:
    """Whether the kernels work here; `ok` is None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"ok": None, "reason": "no GPU: the CPU's own arithmetic is used", "seconds": None}
    started = time.perf_counter()
    try:
        error = kernel_error("cuda")
    except (MeswitchError, RuntimeError, ImportError, OSError) as reason:
        return {"ok": False, "reason": f"{type(reason).__name__}: {str(reason).partition(chr(10))[0]}", "seconds": None}
    if not error < _TOLERANCE:
        return {"ok": False, "reason": f"they differ from plain arithmetic by {error:.2g}", "seconds": None}
    seconds = round(time.perf_counter() - started, 2)
    return {"ok": True, "reason": f"compiled, and as plain arithmetic has it ({seconds} s)", "seconds": seconds}


def kernel_error(device: str) -> float:
    """How far a kernel's result is from plain arithmetic's: the norm of the difference over that of the result."""
    import torch

    from meswitch.codec import PackedDelta, pack
    from meswitch.ops import Routing, SlotLinear, expert_linear

    rows, width = 256, 512
    draw = torch.Generator().manual_seed(0)
    delta = PackedDelta(
        packed=pack(torch.randint(0, 4, (rows, width), generator=draw), 2),
        scale=(torch.rand(rows, width // 128, generator=draw) * 0.01).bfloat16(),
        salient_index=torch.tensor([3], dtype=torch.int32),
        salient_weight=torch.randn(rows, 1, generator=draw).bfloat16(),
        bits=2,
        group_size=128,
        in_features=width,
    )
    layer, routing = SlotLinear.build([delta], device), Routing.build([0, 0, -1], device)
    x = torch.randn(3, width, generator=draw).to(device, torch.bfloat16)
    ours, plain = (
        expert_linear(x.new_zeros(3, rows), x, layer, routing, backend).float() for backend in ("triton", "reference")
    )
    return float((ours - plain).norm() / plain.norm())


def _free_disk(path: Path) -> int | None:
    place = next((one for one in (path, *path.parents) if one.exists()), None)
    return None if place is None else shutil.disk_usage(place).free


def _show(facts: dict[str, Any], found: list[Finding]) -> None:
    cpu = facts["cpu"]
    rows = {
        "meswitch": f"{facts['meswitch']}, Python {facts['python']}, {facts['platform']}",
        "packages": ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()),
        "CPU": f"{plural(cpu['cores'], 'core')}, {plural(cpu['threads'], 'thread')}, "
        + f"{format_bytes(cpu['free_memory'])} of memory free"
        + (", bfloat16" if cpu["bfloat16"] else ""),
        "GPU": "\n".join(
            f"{gpu['name']}, {format_bytes(gpu['memory'])}, {format_bytes(gpu['free'])} free" for gpu in facts["gpus"]
        )
        or "none",
        "kernels": facts["kernels"]["reason"],
        "methods": ", ".join(facts["codecs"]),
        "extras": "\n".join(f"{name}: {_extra(packages)}" for name, packages in facts["extras"].items() if packages)
        + "\n(pip install 'meswitch[NAME]' adds one)",
    }
    if facts["environment"]:
        rows["environment"] = ", ".join(f"{name}={value}" for name, value in facts["environment"].items())
    shown = [console.pairs("", rows)]
    if found:
        table = console.table("What could be better", "", "what", "what helps")
        for column in table.columns:
            column.justify = "left"
        for item in found:
            table.add_row(item.level, item.what, item.fix)
        shown.append(table)
    console.show(*shown)
    sys.stdout.flush()


def _extra(packages: dict[str, tuple[str, str | None, bool]]) -> str:
    missing = [name for name, (_, have, _) in packages.items() if have is None]
    return f"missing {', '.join(missing)}" if missing else "installed"
