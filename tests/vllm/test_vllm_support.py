"""What is known of an architecture without vLLM, all reasons at once. No vLLM needed."""

import subprocess
import sys

import pytest
from transformers import AutoConfig

from meswitch.architecture import architecture_of, model_class
from meswitch.vllm.support import MIXTURE, ORDERED, ROUTES, TABLE, TRIED, TURNED, vllm_support
from tests.support.models import TINY
from tests.vllm.test_vllm_architectures import SERVED

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}


def support(model_type, **fields):
    return vllm_support(architecture_of(AutoConfig.for_model(model_type, **(TINY | fields))))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "olmo2", "stablelm"])
def test_architectures_that_were_tried_are_served(model_type):
    assert support(model_type) == []


@pytest.mark.parametrize(
    ("model_type", "fields", "reasons"),
    [
        ("gpt2", {}, {TABLE, TURNED}),
        ("qwen3_moe", EXPERTS, {MIXTURE, ROUTES}),
        ("bloom", {}, {ORDERED}),
        ("falcon", {"head_dim": None, "new_decoder_architecture": True}, {ORDERED}),
    ],
)
def test_every_reason_is_given_with_its_module_and_class(model_type, fields, reasons):
    fields = {name: value for name, value in fields.items() if value is not None}
    tiny = {name: value for name, value in TINY.items() if not (name == "head_dim" and model_type == "falcon")}
    found = vllm_support(architecture_of(AutoConfig.for_model(model_type, **(tiny | fields))))
    assert {line.split(": ", 2)[2] for line in found} == reasons
    assert all("." in line.split(": ")[0] for line in found)


def test_an_architecture_that_nobody_tried_is_said_to_be_so():
    assert support("helium") == [
        "HeliumForCausalLM: not tried in vLLM; its engine proves every layer when it opens, and refuses by name"
    ]


def test_what_is_said_to_be_tried_is_what_the_tests_try():
    model_types = {model_type for model_type, _ in SERVED.values()} | {"llama", "mistral", "qwen2", "qwen3"}
    assert {model_class(AutoConfig.for_model(name)).__name__ for name in model_types} == TRIED


def test_it_needs_no_vllm():
    code = "import sys; sys.modules['vllm'] = None; from meswitch.vllm.support import vllm_support"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
