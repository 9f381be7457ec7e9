"""`meswitch doctor` says what is here, and what is wrong or slow of a machine with other things."""

import copy

import pytest

from meswitch import __version__
from meswitch.cli import doctor


@pytest.fixture(scope="module")
def facts():
    return doctor.examine()


@pytest.fixture
def server(facts):
    """A machine with a GPU where all is well."""
    gpu = {"name": "NVIDIA H200", "memory": 141 << 30, "free": 140 << 30, "capability": [9, 0]}
    return copy.deepcopy(facts) | {
        "gpus": [gpu],
        "nvidia_driver": True,
        "torch_cuda": "13.0",
        "compiler": "/usr/bin/cc",
        "packages": facts["packages"] | {"triton": "3.7.1", "vllm": "0.33.0"},
        "kernels": {"ok": True, "reason": "compiled", "seconds": 2.0},
        "cpu": {"cores": 16, "threads": 16, "bfloat16": True, "free_memory": 100 << 30},
        "environment": {},
        "hub_cache": {"path": "/models", "free": 500 << 30},
        "unfit": {},
    }


def said(facts):
    return {item.what: (item.level, item.fix) for item in doctor.findings(facts)}


def test_it_reports_this_machine(cli):
    found = cli.json("doctor")
    assert found["meswitch"] == __version__
    assert found["packages"]["torch"]
    assert found["unfit"] == {}
    assert found["extras"]["grammar"]["llguidance"][2] is True
    assert "me-switch" in found["codecs"]
    assert found["cpu"]["cores"] >= 1


def test_it_shows_the_same_as_tables(cli):
    shown = cli.ok("doctor").stdout
    assert f"meswitch {__version__}, Python" in " ".join(shown.split())
    assert "grammar: installed" in shown


def test_the_kernel_that_is_tried_computes_what_plain_arithmetic_does():
    import torch

    assert doctor.kernel_error("cuda" if torch.cuda.is_available() else "cpu") < 1e-2


def test_nothing_is_found_where_all_is_well(server):
    assert doctor.findings(server) == []


def test_versions_that_do_not_fit_are_errors_that_say_what_to_install(server):
    server["unfit"] = {"transformers": (">=5.17", "4.57.0")}
    server["extras"]["vllm"] = {"vllm": ("<0.34,>=0.25", "0.9.0", False)}
    assert said(server) == {
        "transformers: 4.57.0, and meswitch needs >=5.17": ("error", "pip install 'transformers>=5.17'"),
        "vllm: 0.9.0, and meswitch[vllm] needs <0.34,>=0.25": ("error", "pip install 'meswitch[vllm]'"),
    }


def test_an_extra_that_is_missing_is_nothing_to_mend(server):
    server["extras"]["lora"] = {"peft": (">=0.17", None, False)}
    assert doctor.findings(server) == []


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({"compiler": None}, "no C compiler", "error"),
        ({"kernels": {"ok": False, "reason": "RuntimeError: PTX"}}, "do not run here: RuntimeError: PTX", "error"),
        ({"environment": {"TRITON_INTERPRET": "1"}}, "kernels are interpreted", "slow"),
        ({"environment": {"OMP_NUM_THREADS": "1"}, "cpu": {"cores": 16, "threads": 1, "free_memory": 1 << 40}},
         "OMP_NUM_THREADS is 1: 16 cores", "slow"),
        ({"gpus": [], "torch_cuda": None}, "built for the CPU, sees no GPU", "slow"),
        ({"gpus": [], "nvidia_driver": False}, "no GPU: everything is computed on the CPU", "slow"),
        ({"hub_cache": {"path": "/models", "free": 5 << 30}}, "/models: 5.37 GB free", "slow"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_slow_is_said_with_its_reason(server, change, what, level):
    ((found, (severity, _)),) = said(server | change).items()
    assert what in found
    assert severity == level


def test_old_gpus_and_missing_vllm_are_said(server):
    server["gpus"][0] |= {"name": "Tesla T4", "capability": [7, 5]}
    server["packages"]["vllm"] = None
    assert any("Tesla T4: no bfloat16" in what for what in said(server))
    assert any("vLLM is missing" in what for what in said(server))


def test_errors_come_first_and_fail_the_command(cli, monkeypatch, server):
    server |= {"unfit": {"torch": (">=2.11", "2.4")}, "environment": {"TRITON_INTERPRET": "1"}}
    assert [item.level for item in doctor.findings(server)] == ["error", "slow"]
    monkeypatch.setattr(doctor, "examine", lambda: server)
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    assert '"level": "error"' in result.stdout
