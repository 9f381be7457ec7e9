"""Exact experts: served by turns, each with its own weights bit for bit, and never in a batch."""

import pytest
import torch

import meswitch
from meswitch import Engine
from meswitch.compression.merge import load_merged
from meswitch.errors import IncompatibleError

PROMPT = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def exact(family, tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    for name in ("math", "code"):
        meswitch.compress(family / "base", family / name, root / name, bits="exact")
    return {name: root / name for name in ("math", "code")}


def alone(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.ends)
    return tuple(out[0, ids.shape[1] :].tolist())


def test_exact_experts_answer_as_their_fine_tunes_beside_a_compressed_one(family, deltas, exact):
    experts = exact | {"sql": deltas["sql"]}
    with Engine(family / "base", experts, device="cpu") as engine:
        assert engine.takes_turns
        assert [reason.split(":")[0] for reason in engine.by_turns] == ["math is exact", "code is exact"]
        names = [*experts, *experts]
        answers = engine.generate([PROMPT] * len(names), model=names, max_new_tokens=NEW_TOKENS)
        for name, answer in zip(names, answers, strict=True):
            assert answer.tokens == alone(load_merged(family / "base", experts[name]), engine.tokenizers[name])
        assert engine.memory()["slots"] >= sum(meswitch.Artifact.open(path).nbytes for path in exact.values())


def test_the_weights_of_its_turn_are_the_fine_tunes_own(family, exact):
    from meswitch.checkpoint import Checkpoint

    with Engine(family / "base", exact, device="cpu", dtype="bfloat16") as engine:
        engine.generate([PROMPT], model="math", max_new_tokens=1)
        wanted, state = Checkpoint.open(family / "math"), engine.model.state_dict()
        for name in wanted.tensors:
            assert torch.equal(state[name], wanted.read(name)), name


def test_a_batch_of_exact_experts_is_refused_by_name(family, exact):
    with pytest.raises(
        IncompatibleError, match=r"--runner turns serves it\): math is exact: .*compress it with --bits"
    ):
        Engine(family / "base", exact, device="cpu", runner="batch")


def test_added_tokens_of_an_exact_expert_are_served(pair, tmp_path):
    base, expert = pair("llama", added_tokens=2)
    meswitch.compress(base, expert, tmp_path / "delta", bits="exact")
    with Engine(base, {"one": tmp_path / "delta"}, device="cpu") as engine:
        answer = engine.generate([PROMPT], model="one", max_new_tokens=NEW_TOKENS)[0]
        assert answer.tokens == alone(load_merged(base, tmp_path / "delta"), engine.tokenizers["one"])
