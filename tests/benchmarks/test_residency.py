"""`serving/residency.py` runs with a small model as it does with a large one."""

import json

import pytest
import torch

from meswitch import Artifact


@pytest.fixture(scope="module")
def found(benchmark_script, tmp_path_factory):
    """What a short run measured, and its directory."""
    work = tmp_path_factory.mktemp("residency")
    numbers = {"experts": 16, "slots": 9, "host-experts": 12, "seconds": 0.5, "tokens": 3, "stream-seconds": 0.5}
    settings = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    script = benchmark_script("serving.residency")
    script.main(
        ["--model", "tiny", "--device", "cpu", "--work", str(work), "--json", str(work / "found.json"), *settings]
    )
    return json.loads((work / "found.json").read_text()), work


def test_experts_have_manifests_of_their_own_and_share_files_by_fours(found):
    directories = [found[1] / "experts" / f"e{number}" for number in range(16)]
    assert len({(path / "meswitch.json").stat().st_ino for path in directories}) == 16
    assert len({(path / "delta.safetensors").stat().st_ino for path in directories}) == 4
    name = "model.layers.0.mlp.down_proj.weight"
    first, second, *_ = (Artifact.open(path).read(name).dequantize() for path in directories)
    assert not torch.equal(first, second)
    assert torch.equal(first.roll(1, 0), second)


def test_every_row_is_there_and_nothing_failed(found):
    rows = found[0]["rows"]
    asked = [(row["what"], row["arrivals"], row["experts"], row["failed"]) for row in rows if "failed" in row]
    assert asked == [
        ("base alone", "poisson", 0, 0),
        ("as many experts as slots", "poisson", 9, 0),
        ("as many experts as slots", "bursts", 9, 0),
        ("many experts", "poisson", 16, 0),
        ("many experts", "bursts", 16, 0),
        ("many experts, whole models by turns", "poisson", 16, 0),
    ]


def test_experts_were_loaded_beside_running_answers(found):
    rows = {row["what"]: row for row in found[0]["rows"]}
    assert "loads" not in rows["8 running answers"]
    for source in ("host memory", "files"):
        row = rows[f"8 running answers, loads from {source}"]
        assert row["loads"] > 0 < row["tokens"]
    assert rows["copy into a slot"]["copies"] > 0


def test_the_page_shows_what_was_measured(found, benchmark_script):
    page = benchmark_script("serving.doc").residency(found[0])
    assert "| 8 running answers, loads from files |" in page
    assert "of a plain copy" in page
