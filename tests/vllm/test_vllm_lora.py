"""Plain LoRA adapters with our worker answer as in plain vLLM, alone and beside deltas, however they come and go."""

import shutil

import pytest

from meswitch.vllm import compat
from tests.support.vllm_adapters import make_lora
from tests.support.vllm_engines import PROMPT, ask, running, with_deltas
from tests.support.vllm_http import answer_of, completion
from tests.support.vllm_http import ask as request

pytestmark = pytest.mark.vllm
KINDS = {  # name -> rank and targets
    "style": (4, ("q_proj", "o_proj", "up_proj", "down_proj")),
    "facts": (8, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    "tone": (1, ("v_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def loras(family, tmp_path_factory):
    """(name, id, directory) by name."""
    root = tmp_path_factory.mktemp("loras")
    return {
        name: (name, 11 + i, make_lora(root / name, family / "base", rank, seed=i, targets=targets))
        for i, (name, (rank, targets)) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def plain(family, loras, expected):
    """What each adapter answers in vLLM without us, alone: vLLM's CPU kernels may err in a batch that mixes them."""
    with running(family / "base", enable_lora=True, max_loras=3, max_lora_rank=8) as engine:
        answers = {name: ask(engine, [PROMPT], [lora])[0] for name, lora in loras.items()}
    answers["base"] = expected["base", len(PROMPT)]
    assert len(set(answers.values())) == len(answers)
    return answers


@pytest.fixture(scope="module")
def engine(family, plain):  # one engine at a time in a process: `plain` comes first
    with with_deltas(family / "base", max_loras=2, max_cpu_loras=4) as engine:
        yield engine


def test_adapters_alone_answer_as_in_plain_vllm(engine, loras, plain):
    for name in ("style", "facts", "tone", "style"):  # the third evicts the first
        assert ask(engine, [PROMPT, PROMPT], [loras[name]] * 2) == [plain[name]] * 2, name


def test_adapters_deltas_and_the_base_in_one_batch(engine, loras, plain, deltas, expected):
    known = {"base": None, "math": ("math", 1, deltas["math"]), "sql": ("sql", 2, deltas["sql"])} | loras
    wanted = plain | {name: expected[name, len(PROMPT)] for name in deltas}
    for names in (
        ("style", "math", "base", "style", "math"),
        ("facts", "base", "tone", "facts"),
        ("sql", "style", "base", "base", "sql"),
        ("tone", "math", "facts", "sql", "base", "style"),  # five adapters, two slots
    ):
        answers = ask(engine, [PROMPT] * len(names), [known[name] for name in names])
        assert answers == [wanted[name] for name in names], names


def test_adapters_are_listed_pinned_and_removed_among_deltas(engine, loras, plain, deltas, expected):
    from vllm.lora.request import LoRARequest

    core = engine.llm_engine
    requests = {name: LoRARequest(name, number, str(path)) for name, number, path in loras.values()}
    requests |= {name: LoRARequest(name, 1 + i, str(deltas[name])) for i, name in enumerate(("math", "sql", "code"))}
    for number in list(core.list_loras()):
        core.remove_lora(number)
    assert set(core.list_loras()) == set()
    for name in ("style", "math", "facts"):
        core.add_lora(requests[name])
    assert set(core.list_loras()) == {11, 1, 12}
    core.pin_lora(11)
    for name in ("sql", "code", "tone"):  # four places in host memory; the pinned one stays
        core.add_lora(requests[name])
    assert set(core.list_loras()) == {11, 2, 3, 13}
    core.remove_lora(11)
    assert set(core.list_loras()) == {2, 3, 13}
    answers = ask(engine, [PROMPT] * 2, [loras["style"], ("sql", 2, deltas["sql"])])
    assert answers == [plain["style"], expected["sql", len(PROMPT)]]


def test_adapters_come_and_go_in_a_server_with_deltas(by_hand, loras, plain, expected):
    url = by_hand[0]
    for name in ("style", "facts"):
        body = {"lora_name": name, "lora_path": str(loras[name][2])}
        assert request(url, "/v1/load_lora_adapter", body)[0] == 200
    for name in ("style", "math", "facts", "base", "style"):
        assert answer_of(url, name) == (plain | {"math": expected["math", len(PROMPT)]})[name], name
    assert request(url, "/v1/unload_lora_adapter", {"lora_name": "style"})[0] == 200
    assert completion(url, "style")[0] == 404
    assert answer_of(url, "facts") == plain["facts"]


def test_a_name_changes_from_an_adapter_to_a_delta_in_place(by_hand, loras, plain, deltas, expected):
    url = by_hand[0]
    for path, wanted in (
        (loras["tone"][2], plain["tone"]),
        (deltas["instruct"], expected["instruct", len(PROMPT)]),
        (loras["style"][2], plain["style"]),
    ):
        body = {"lora_name": "changing", "lora_path": str(path), "load_inplace": True}
        status, _, problem = request(url, "/v1/load_lora_adapter", body)
        if path == deltas["instruct"] and not compat.cache_knows_paths():  # its prompts would be the adapter's
            assert status == 500  # as vLLM answers every load that fails
            assert "under a new name" in str(problem)
            return
        assert status == 200
        assert answer_of(url, "changing") == wanted


def test_other_weights_in_the_place_of_a_deltas_need_a_new_name(by_hand, deltas, expected):
    url, directory = by_hand
    place = directory / "edited"
    shutil.copytree(deltas["math"], place)
    body = {"lora_name": "edited", "lora_path": str(place)}
    assert request(url, "/v1/load_lora_adapter", body)[0] == 200
    assert answer_of(url, "edited") == expected["math", len(PROMPT)]
    shutil.rmtree(place)
    shutil.copytree(deltas["code"], place)
    status, _, problem = request(url, "/v1/load_lora_adapter", body | {"load_inplace": True})
    assert status == 500  # as vLLM answers every load that fails
    assert "edited: other weights had this name" in str(problem)
    assert request(url, "/v1/load_lora_adapter", body | {"lora_name": "edited-2"})[0] == 200
    assert answer_of(url, "edited-2") == expected["code", len(PROMPT)]
