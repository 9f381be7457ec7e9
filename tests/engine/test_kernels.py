"""The engine on the GPU kernels, interpreted where there is no GPU: each request is its own, whatever the batch."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.engine import context, graphs, joined, layers
from meswitch.engine.tables import OwnTables
from meswitch.errors import ConfigError
from tests.support.adapters import pairs, write_adapter
from tests.support.deltas import DEVICE

pytest.importorskip("triton")

PROMPTS = {"short": list(range(5, 25)), "long": list(range(30, 110))}
PARAMS = SamplingParams(max_new_tokens=2)
FEW_ROWS = {"vocab_size": 300}  # the head's: two tiles and a part of one, for the interpreter takes its time for each


def keep_tokens(directory, count):
    """Leave a tokenizer its first tokens."""
    file = directory / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = {token: number for token, number in data["model"]["vocab"].items() if number < count}
    merges = [(*pair,) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in data["model"]["merges"]]
    kept = [list(pair) for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    data["model"] |= {"vocab": vocabulary, "merges": kept}
    file.write_text(json.dumps(data))


@pytest.fixture
def experts(pair, tmp_path):
    """A base, and two experts of other bit widths and salient channels whose answers differ."""

    def make(arch="mistral", **case):
        base, expert = pair(arch, change=0.5, num_hidden_layers=1, **case)
        for directory in (base, expert) if "vocab_size" in case else ():
            keep_tokens(directory, case["vocab_size"])
        made = {"one": {"bits": 1, "salient": 0}, "three": {"bits": 3, "salient": 5}}
        for name, options in made.items():
            meswitch.compress(base, expert, tmp_path / name, **options)
        return base, {name: tmp_path / name for name in made}

    return make


def logits_alone(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float()


def check(engine, models, asked):
    """Every answer is greedy by its own merged model, up to what rounding to 16 bits decides."""
    requests = [engine.submit(PROMPTS[prompt], model=name, params=PARAMS) for name, prompt in asked]
    for request, (name, prompt) in zip(requests, asked, strict=True):
        tokens = list(request.result(timeout=300).tokens)
        logits = logits_alone(models[name], PROMPTS[prompt] + tokens)[len(PROMPTS[prompt]) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 0.02 * logits.std(), (name, prompt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "case"),
    [("mistral", FEW_ROWS), ("qwen2", {"tied": True, "added_tokens": 3} | FEW_ROWS)],
    ids=["plain", "all-at-once"],
)
def test_mixed_batches_of_all_experts_and_the_base(experts, arch, case):
    """all-at-once: biases, a tied head, added tokens, and decode steps over static buffers."""
    base, artifacts = experts(arch, **case)
    models = {name: load_merged(base, path) for name, path in artifacts.items()}
    models["base"] = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    best = {name: tuple(logits_alone(model, PROMPTS["short"]).argmax(-1).tolist()) for name, model in models.items()}
    assert len(set(best.values())) == 3  # a mix-up would show
    from_tables = arch == "qwen2"  # proving them takes the interpreter as long as all the rest
    options = {"device": DEVICE, "dtype": "float16", "backend": "triton", "slots": 2, "cuda_graphs": from_tables}
    with Engine(base, artifacts, **options) as engine:
        assert (engine.memory()["graphs"] > 0) == from_tables
        check(engine, models, [("one", "short"), ("base", "short"), ("three", "short"), ("three", "long")])


@pytest.mark.slow
def test_one_slot_for_a_delta_and_an_adapter(experts, tmp_path, caplog, monkeypatch):
    """Pairs are not the kernels' business: they are added to what the kernels give."""
    for module in (context, joined, layers) if DEVICE == "cpu" else ():  # without the interpreter's time
        monkeypatch.setattr(module, "TRITON", "reference")
    base, artifacts = experts(**FEW_ROWS)
    targets = ("q_proj", "down_proj", "embed_tokens", "lm_head")
    adapter = write_adapter(tmp_path / "adapter", pairs(base, *targets, size=0.5), target_modules=list(targets))
    models = {"three": load_merged(base, artifacts["three"]), "adapter": load_merged(base, adapter)}
    experts = {"three": artifacts["three"], "adapter": adapter}
    with Engine(base, experts, device=DEVICE, dtype="float16", backend="triton", slots=1) as engine:
        check(engine, models, [("adapter", "short"), ("three", "short")])
        assert engine.store.evictions >= 1
        assert engine.memory()["graphs"] > 0
    assert "tables" not in caplog.text  # the pairs of the adapter are in some, too


def lost_norms(self, slot, name, table, own):
    table.values[slot].zero_()
    return True


def no_kernel(*_):
    raise NotImplementedError("no kernel for heads of this width")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name", "fault", "said"),
    [
        (OwnTables, "_put", lost_norms, "norm"),
        (graphs, "reference", no_kernel, "no kernel for heads of this width"),
    ],
    ids=["wrong", "impossible"],
)
def test_decode_steps_that_are_not_right_are_not_taken(experts, monkeypatch, caplog, part, name, fault, said):
    base, artifacts = experts("mistral", **FEW_ROWS)
    monkeypatch.setattr(part, name, fault)
    with caplog.at_level("WARNING"):
        engine = Engine(base, {"one": artifacts["one"]}, device=DEVICE, dtype="float16", backend="triton", slots=1)
    with engine:
        assert engine.memory()["graphs"] == 0
        assert not engine.takes_turns
    assert "without CUDA graphs" in caplog.text
    assert said in caplog.text


def test_a_dtype_that_the_kernels_do_not_take_names_another_backend(experts):
    base, artifacts = experts()
    with pytest.raises(ConfigError, match=r"triton: takes bfloat16 and float16, the model is float32.*'reference'"):
        Engine(base, artifacts, device="cpu", backend="triton")


def test_an_unknown_backend_is_refused(experts):
    base, artifacts = experts()
    with pytest.raises(ConfigError, match="backend: 'cuda' is none of auto, triton, reference, cpu"):
        Engine(base, artifacts, device="cpu", backend="cuda")
