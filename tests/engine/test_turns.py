"""Exact experts: served by turns, each with its own weights bit for bit, and never in a batch."""

import itertools
import threading

import pytest
import torch

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.errors import IncompatibleError, MeswitchError

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


def test_an_answer_that_is_whole_stays_as_it_is_when_its_turn_fails_later(family):
    params = [SamplingParams(2), SamplingParams(8), SamplingParams(8)]
    with Engine(family / "base", {}, device="cpu", runner="turns") as engine:
        prompt, turns = engine.tokenizers["base"].encode(PROMPT), engine._batch
        whole = engine.generate([prompt], max_new_tokens=8)[0].tokens
        eos = [whole[2]]  # of the second: its third token is its end
        steps = itertools.count()

        def fail_once(*call):
            if next(steps) == 4:
                raise MemoryError("for a moment")

        hook = engine.model.register_forward_pre_hook(fail_once)
        found, over = {}, threading.Semaphore(0)

        def listen(number):
            def told(tokens, finished, error):
                if finished:
                    found[number] = tokens, error
                    over.release()

            return told

        with turns._changed:  # in one turn
            for number, one in enumerate(params):
                turns.submit(f"t{number}", prompt, -1, one, eos if number == 1 else [], listen(number))
        assert all(over.acquire(timeout=60) for _ in params)
        hook.remove()
    assert [found[n] for n in range(3)] == [(list(tokens), None) for tokens in (whole[:2], whole[:3], whole)]


def test_a_listener_that_raises_ends_nothing(family):
    over = threading.Event()
    with Engine(family / "base", {}, device="cpu", runner="turns") as engine:
        engine._batch.submit("broken", [5, 6], -1, SamplingParams(3), [], lambda *told: 1 / 0)
        engine._batch.submit("whole", [5, 6, 7], -1, SamplingParams(3), [], lambda t, done, e: done and over.set())
        assert over.wait(60)


def test_who_waits_for_a_turn_when_the_engine_ends_is_told_so(family):
    told, over = [], threading.Event()

    def listen(tokens, finished, error):
        if finished:
            told.append(error)
            over.set()

    with Engine(family / "base", {}, device="cpu", runner="turns") as engine:
        turns = engine._batch

        def fail():
            raise OSError("no device any more")

        turns._threads.settle = fail
        first_turn = engine.model.register_forward_pre_hook(
            lambda *call: turns.submit("second", [5, 6, 7], -1, SamplingParams(3), [], listen)
        )
        turns.submit("first", [5, 6], -1, SamplingParams(1), [], lambda *told: None)
        assert over.wait(60)
        first_turn.remove()
        assert told == ["OSError: no device any more"]
        assert engine.failure == told[0]
        with pytest.raises(MeswitchError, match="the engine has stopped: OSError"):
            turns.submit("third", [5, 6], -1, SamplingParams(3), [], listen)
