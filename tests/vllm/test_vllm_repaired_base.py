"""Experts that were compressed against a quantised base, served over it."""

import pytest

import meswitch
from meswitch.quantised import quantise
from tests.support.vllm_engines import PROMPT, adapters_of, ask, behind, with_deltas

PROMPTS = [PROMPT, PROMPT[:12], PROMPT[::3]]


@pytest.mark.vllm
def test_a_token_over_a_base_of_four_bits_is_its_own_experts(family, tmp_path):
    base = quantise(family / "base", tmp_path / "base", "int4")
    deltas = {name: tmp_path / name for name in ("math", "code", "sql")}
    for name, out in deltas.items():
        meswitch.compress(base, family / name, out)
    known = adapters_of(deltas)
    settings = {"experts": [str(path) for path in deltas.values()], "lora": False}
    # in bfloat16: on a CPU vLLM's product with four bits takes no other
    with with_deltas(base, dtype="bfloat16", additional_config={"meswitch": settings}) as engine:
        asked = [(name, prompt) for prompt in PROMPTS for name in known]
        mixed = ask(engine, [prompt for _, prompt in asked], [known[name] for name, _ in asked])
        for (name, prompt), answer in zip(asked, mixed, strict=True):
            assert behind(engine, known[name], prompt, answer) < 0.1, (name, prompt)
            stranger = known["math" if name == "sql" else "sql"]
            assert behind(engine, stranger, prompt, answer) > 1, (name, prompt)
