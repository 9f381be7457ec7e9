"""Check what is in the wheel and the sdist: all modules and data of the packages, and nothing else."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"meswitch": ROOT / "src" / "meswitch", "meswitch_lab": ROOT / "lab" / "meswitch_lab"}


def wanted() -> set[str]:
    """Files of the packages, as a wheel names them."""
    return {
        f"{name}/{file.relative_to(root).as_posix()}"
        for name, root in PACKAGES.items()
        for file in root.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def main(dist: Path) -> None:
    """dist: holds one wheel and one sdist. Exits with what is wrong."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    packed = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in packed if ".dist-info/" not in name}
    meta = {name.partition(".dist-info/")[2] for name in packed - inside}
    problems = [f"{wheel.name}: lacks {name}" for name in sorted(wanted() - inside)]
    problems += [f"{wheel.name}: has {name}" for name in sorted(inside - wanted())]
    problems += [f"{wheel.name}: lacks {name}" for name in ("entry_points.txt", "licenses/LICENSE") if name not in meta]
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/meswitch/__init__.py"}
    problems += [f"{sdist.name}: lacks {name}" for name in sorted(needed - source)]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
