"""Imports point inward, and nothing below the command line and HTTP needs pydantic, fastapi or typer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "meswitch"
# Each package may import those to its left: codec <- artifact <- adapter <- compression, codec <- ops <- slots
# <- engine <- server.
ALLOWED = {
    "codec": set(),
    "artifact": {"codec"},
    "adapter": {"codec", "artifact"},
    "compression": {"codec", "artifact", "adapter"},
    "ops": {"codec"},
    "slots": {"codec", "artifact", "ops"},
    "engine": {"codec", "artifact", "adapter", "ops", "slots"},
    "router": {"artifact"},
    "evaluate": {"artifact", "adapter", "compression"},
    "server": {"engine", "router"},
}
ROOT = {
    "architecture",
    "checkpoint",
    "configuration",
    "cpu",
    "durable",
    "errors",
    "hub",
    "jsonfile",
    "loaded",
    "pagelock",
    "tensorfile",
    "threads",
    "units",
}
EDGES = {"pydantic", "fastapi", "typer", "uvicorn", "rich", "prometheus_client", "starlette"}
CORE = ("codec", "artifact", "adapter", "compression", "ops", "slots", "engine")


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_further_in(package):
    allowed = (
        ALLOWED[package] | ROOT | {package, "family", "launch"}
        if package == "server"
        else (ALLOWED[package] | ROOT | {package})
    )
    for file in (PACKAGE / package).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "meswitch" and len(parts) > 1 and (PACKAGE / parts[1]).exists():
                assert parts[1] in allowed, f"{file.relative_to(PACKAGE)} imports {name}"


def test_the_product_does_not_import_the_lab():
    for file in PACKAGE.rglob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] == "meswitch_lab"], file.relative_to(PACKAGE)


def test_the_lab_imports_nothing_that_serves():
    for file in (PACKAGE.parent.parent / "lab").rglob("*.py"):
        inner = {name.split(".")[1] for name in imports(file) if name.startswith("meswitch.")}
        allowed = {"codec", "compression", "errors", "evaluate"} | ({"cli"} if file.name == "__main__.py" else set())
        assert inner <= allowed, f"{file.name} imports {inner - allowed}"


@pytest.mark.parametrize("package", CORE)
def test_the_core_does_without_the_edges_libraries(package):
    for file in (PACKAGE / package).rglob("*.py"):
        used = {name.split(".")[0] for name in imports(file)} & EDGES
        assert not used, f"{file.relative_to(PACKAGE)} imports {used}"


def test_the_core_runs_where_the_edges_libraries_are_not_installed():
    code = (
        "import sys\n"
        f"for name in {sorted(EDGES - {'rich'})}: sys.modules[name] = None\n"
        "import meswitch\n"
        "from meswitch import Engine, compress, merge, load_merged, Artifact, SamplingParams\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_importing_the_package_does_not_import_torch():
    code = "import sys, meswitch; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
