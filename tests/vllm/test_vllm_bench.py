"""`benchmarks/serving/vllm_server.py` in small: vLLM's own serving benchmark against a server with deltas."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving" / "vllm_server.py"


@pytest.mark.vllm
def test_vllms_benchmark_asks_the_base_and_the_experts_of_one_server(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--engines", "meswitch", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [(row["engine"], row["experts"]) for row in results["rows"]] == [("meswitch", count) for count in (0, 1, 4)]
    for row in results["rows"]:
        assert (row["completed"], row["failed"]) == (8, 0)
        assert row["output_throughput"] > 0
    assert {"torch", "python"} < results["meta"]["versions"].keys()
    assert results["meta"]["card"]
    assert str(tmp_path) not in out.read_text()
    assert "| meswitch | 4 |" in done.stdout
