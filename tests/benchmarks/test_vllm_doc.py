"""docs/results/serving.md says what the stored result says."""

import pytest


@pytest.fixture(scope="module")
def doc(benchmark_script):
    return benchmark_script("serving.vllm_doc")


def test_the_page_is_made_from_the_stored_result(doc) -> None:
    doc.main(["--check"])


def test_shares_are_of_the_base_with_as_many_requests(doc) -> None:
    def row(engine: str, concurrency: int, experts: int, throughput: float, step: float) -> dict:
        counts = {"engine": engine, "concurrency": concurrency, "experts": experts}
        times = {"median_ttft_ms": 50.0, "median_tpot_ms": step + 1, "median_itl_ms": step}
        return counts | times | {"output_throughput": throughput}

    rows = [row("meswitch", 8, 4, 60.0, 10.0), row("base", 32, 0, 300.0, 6.0), row("base", 8, 0, 100.0, 8.0)]
    assert "| meswitch | 8 | 4 | 60 | 0.60 | 50.0 | 11.0 | 10.0 | 0.80 |" in doc.table(rows)


def test_a_profiled_step_is_accounted_for(doc) -> None:
    kernels = [
        {"kernel": "fused_kernel", "a_step": 2.0, "us": 100.0},
        {"kernel": "kernel_unified_attention", "a_step": 2.0, "us": 10.0},
        {"kernel": "triton_red_fused", "a_step": 2.0, "us": 2.0},
        {"kernel": "decode_kernel", "a_step": 1.0, "us": 60.0},
        {"kernel": "sample", "a_step": 1.0, "us": 30.0},
    ]
    step = {"engine": "deltas", "experts": 4, "step_us": 320.0, "gaps_us": 5.0, "kernels": kernels}
    lines = doc.profile_table({"meta": {"settings": {"layers": 2}}, "rows": [step]}).splitlines()
    shown = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lines[2:]}
    assert shown["linears, a layer"] == 100.0
    assert shown["head"] == 60.0
    layers = sum(value for name, value in shown.items() if "a layer" in name)
    assert 2 * layers + sum(value for name, value in shown.items() if "a layer" not in name) == pytest.approx(320.0)


def test_waits_are_shown_where_there_were_launches_to_wait(doc) -> None:
    steps = {"seconds": {"gigabytes": 2.0, "page-lock": 0.5}, "waits_ms": {}}
    assert doc.steps_table(steps).splitlines()[-1] == "| page-lock | 0.50 | 4.0 |"
    assert (
        doc.steps_table(steps | {"waits_ms": {"page-lock": 3.04}}).splitlines()[-1]
        == "| page-lock | 0.50 | 4.0 | 3.0 |"
    )
