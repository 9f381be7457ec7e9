"""A disk that is full: one clear error, the artifact of before is whole, and the same command goes on later."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# In a namespace of its own, where a small file system may be mounted: prints what each size led to, as JSON.
SCRIPT = """
import json, subprocess, sys
from pathlib import Path
import meswitch
from meswitch.errors import MeswitchError

family, place = map(Path, sys.argv[1:])
told = []

def compress(size, **options):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    try:
        meswitch.compress(family / "base", family / "math", place / "out", **options)
    except MeswitchError as error:
        told.append(str(error))
    else:
        told.append("")
    return (place / "out").is_dir()

sizes = [4096, 65536, 400_000, 640_000, 700_000, 760_000]
seen = [compress(size) for size in sizes]
more = compress(4_000_000)
before = {file.name: file.read_bytes() for file in (place / "out").iterdir()}
for size in (800_000, 1_200_000):
    compress(size, overwrite=True, bits=3)
kept = before == {file.name: file.read_bytes() for file in (place / "out").iterdir()}
compress(1_500_000, overwrite=True, calibration=str(family / "calibration/math.jsonl"), distill=1)
kept = kept and before == {file.name: file.read_bytes() for file in (place / "out").iterdir()}
print(json.dumps({"seen": seen, "more": more, "told": told, "kept": kept}))
"""


@pytest.fixture
def small(tmp_path):
    """A directory, and how to run something that may mount on it."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=4096,nr_inodes=200 none {place} && exec "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    return place, mount


@pytest.mark.slow
def test_every_write_of_compress_may_find_the_disk_full(family, small):
    place, mount = small
    command = [*mount, sys.executable, "-c", SCRIPT, str(family), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == [False] * len(found["seen"])
    assert found["more"]
    *failed, last = found["told"][: len(found["seen"]) + 1]
    assert last == ""
    for text in (*failed, *found["told"][len(found["seen"]) + 1 :]):
        assert str(place) in text
        assert "No space left on device" in text
        assert "run the same command again" in text
    assert found["kept"]
