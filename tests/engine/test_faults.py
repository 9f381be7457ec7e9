"""What goes wrong with one request, or with one expert, fails that request alone and by name."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.errors import ConfigError, MeswitchError

PROMPT = "Ben has 3 nuts"
LONG = PROMPT * 40  # more tokens than a step takes


def overflowing(source, directory, tensor, value=1e38):
    """A copy of a checkpoint with one huge, finite weight: its products overflow."""
    shutil.copytree(source, directory)
    weights = load_file(directory / "model.safetensors")
    weights[tensor] = weights[tensor].clone()
    weights[tensor].view(-1)[3] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=["batch", "turns"])
def engine(family, deltas, tmp_path_factory, request):
    """The math expert, one whose second block overflows, and one whose head does."""
    root = tmp_path_factory.mktemp("overflow")
    tensors = {"block": "model.layers.1.post_attention_layernorm.weight", "head": "model.norm.weight"}
    for name, tensor in tensors.items():
        expert = overflowing(family / "math", root / name, tensor, 3e38 if name == "head" else 1e38)
        meswitch.compress(family / "base", expert, root / f"delta-{name}")
    experts = {"math": deltas["math"]} | {name: root / f"delta-{name}" for name in tensors}
    with Engine(family / "base", experts, device="cpu", max_batch_tokens=64, runner=request.param) as engine:
        yield engine


@pytest.mark.parametrize("broken", ["block", "head"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_an_expert_that_overflows_fails_by_name_and_changes_no_other_answer(engine, broken, prompt):
    others = [("math", PROMPT), ("base", PROMPT), ("math", LONG)]
    params = SamplingParams(max_new_tokens=12)
    alone = [engine.submit(text, model=name, params=params).result(60).tokens for name, text in others]
    running = [engine.submit(text, model=name, params=params) for name, text in others]
    next(iter(running[0]))  # its keys and values are in the cache when the broken one comes
    failing = [engine.submit(prompt, model=broken, params=params) for _ in range(2)]
    beside = [engine.submit(text, model=name, params=params) for name, text in others]
    for request in failing:
        with pytest.raises(MeswitchError, match=f"model '{broken}': its numbers are not finite.* overflow in float32"):
            request.result(60)
    assert [request.result(60).tokens for request in running + beside] == alone * 2
    assert engine.failure is None


def test_a_base_that_overflows_fails_its_requests_and_not_the_engine(family, tmp_path):
    base = overflowing(family / "base", tmp_path / "base", "model.layers.0.input_layernorm.weight")
    with Engine(base, {}, device="cpu") as engine:
        for _ in range(2):
            with pytest.raises(MeswitchError, match="model 'base': its numbers are not finite"):
                engine.submit(PROMPT).result(60)
        assert engine.failure is None
        assert engine.load() == {"waiting": 0, "running": 0} or not engine.submit(PROMPT).done


def test_a_callback_that_raises_ends_its_own_request(engine):
    def broken(chunk):
        raise RuntimeError("the loop is closed")

    params = SamplingParams(max_new_tokens=20)
    beside = engine.submit(PROMPT, model="math", params=params)
    failing = engine.submit(PROMPT, model="math", params=params, on_chunk=broken)
    with pytest.raises(MeswitchError, match="on_chunk: RuntimeError: the loop is closed"):
        failing.result(60)
    assert len(beside.result(60).tokens) == len(engine.generate([PROMPT], model="math", max_new_tokens=20)[0].tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": float("nan")},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"seed": 1.5},
        {"max_new_tokens": 2.0},
        {"top_k": True},
        {"stop": ("",)},
        {"stop": (3,)},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": "much"},
        {"logit_bias": {3: 101}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"3": 1}},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"min_new_tokens": 300},
        {"stop_token_ids": (-1,)},
        {"ignore_eos": 1},
        {"grammar": "json"},
    ],
)
def test_a_parameter_that_no_sampler_takes_is_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: .* is out of range"):
        SamplingParams(**options)


@pytest.mark.parametrize("stop", ["ab", ["ab"], ("ab",)])
def test_a_stop_may_be_one_text_a_list_or_a_tuple(stop):
    assert SamplingParams(stop=stop).stop == ("ab",)
