"""The running batch: equal beginnings are computed once for an expert and never found by another; faults stay alone."""

import contextlib
import logging
import random
import threading
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from meswitch import Engine, SamplingParams, threads
from meswitch.compression.merge import load_merged
from meswitch.engine import graphs, sampling
from meswitch.engine.attention import PAGE
from meswitch.engine.batching import Batch
from meswitch.engine.context import StepContext, Switch
from meswitch.engine.proof import Trial, mixed_tokens
from meswitch.errors import CapacityError, ConfigError, MeswitchError
from tests.architectures import tiny
from tests.support.models import continued

SYSTEM = "Answer in few words. " + "The rules are these: river stone cloud table. " * 12
QUESTIONS = ["Tom has 23 apples. How many now?", "Write river in capital letters.", "What is 3 + 4?"]


@pytest.fixture(scope="module")
def engine(family, deltas):
    with Engine(family / "base", deltas, device="cpu", slots=3, kv_cache_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(family, deltas, engine):
    """An answer of the merged model by itself."""
    models = {}

    def answer(name, prompt):
        if name not in models:
            base = family / "base"
            models[name] = load_model(base) if name == "base" else load_merged(base, deltas[name])
        tokenizer = engine.tokenizers[name]
        return continued(models[name], tokenizer.encode(prompt), tokenizer.ends, 16)

    return answer


def load_model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_a_shared_beginning_is_computed_once_for_each_expert_and_changes_no_answer(engine, alone):
    asked = [(name, SYSTEM + question) for question in QUESTIONS for name in ("math", "base", "sql")]
    wanted = [alone(*pair) for pair in asked]
    before, found = engine._batch.reused_tokens, []
    for name, prompt in asked:
        found.append(engine.generate([prompt], model=name, max_new_tokens=16)[0].tokens)
    assert found == wanted
    prompt = len(engine.tokenizers["math"].encode(SYSTEM)) // PAGE * PAGE
    assert prompt >= 2 * PAGE
    assert engine._batch.reused_tokens - before == 6 * prompt  # the first of each expert is computed


def test_many_at_once_with_shared_beginnings_in_a_small_cache_stay_themselves(family, deltas, alone):
    draw = random.Random(3)
    asked = [
        (draw.choice(["math", "code", "instruct", "sql", "base"]), SYSTEM[: draw.choice([0, 120, 600])] + question)
        for question in QUESTIONS * 8
    ]
    wanted = {pair: alone(*pair) for pair in set(asked)}
    options = {"slots": 2, "kv_cache_tokens": 1024, "max_batch_tokens": 96}
    with Engine(family / "base", deltas, device="cpu", **options) as engine:
        requests = [engine.submit(text, model=name, params=SamplingParams(16)) for name, text in asked]
        found = [request.result(120).tokens for request in requests]
        assert engine._batch.reused_tokens > 0
    assert found == [wanted[pair] for pair in asked]


def test_what_a_step_raises_ends_the_request_that_caused_it_alone(engine):
    def refuse(module, args, options):
        if bool((options["input_ids"] == 2047).any()):
            raise IndexError("no such token")

    prompts = [[5, 6, 7] * 10, [5, 2047, 7], [9, 8, 7] * 10]
    wanted = [engine.generate([prompt], model="math", max_new_tokens=8)[0].tokens for prompt in prompts[::2]]
    hook = engine.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        together = [engine.submit(prompt, model="math", params=SamplingParams(8)) for prompt in prompts]
        with pytest.raises(MeswitchError, match=r"model 'math': IndexError: no such token"):
            together[1].result(60)
        assert [request.result(60).tokens for request in together[::2]] == wanted
    finally:
        hook.remove()
    assert engine.failure is None


def test_a_step_that_cannot_be_laid_out_leaves_its_owners_to_no_other_step(engine, monkeypatch):
    """The next step of the same requests has the same layout, but what is known is that of the step before."""
    prompt, build, left = [5], StepContext.build, []

    def answer(name):
        return engine.generate([prompt], model=name, max_new_tokens=8)[0].tokens

    def no_memory(*args):
        if left:
            raise RuntimeError(left.pop())
        return build(*args)

    monkeypatch.setattr(StepContext, "build", no_memory)
    wanted, others = answer("base"), answer("math")
    assert wanted != others
    left.append("out of memory")
    with pytest.raises(MeswitchError, match="out of memory"):
        answer("base")
    assert answer("base") == wanted


def test_a_listener_that_raises_ends_nothing(engine):
    done = threading.Event()
    engine._batch.submit("broken", [5, 6], -1, SamplingParams(3), [], lambda *told: 1 / 0)
    engine._batch.submit("whole", [5, 6], -1, SamplingParams(3), [], lambda t, finished, e: finished and done.set())
    assert done.wait(60)


def test_a_request_without_tokens_is_refused(engine):
    with pytest.raises(ConfigError, match="it is empty"):
        engine._batch.submit("empty", [], -1, SamplingParams(3), [], lambda *told: None)


def test_a_request_that_may_outgrow_the_cache_is_refused(engine):
    with pytest.raises(CapacityError, match="9000 tokens are more than the KV cache has, 8192"):
        engine._batch.submit("long", [5] * 8000, -1, SamplingParams(1000), [], lambda *told: None)


def test_an_expert_s_failed_numbers_are_not_left_in_the_cache(engine):
    """Whatever a page held before: a mask hides it, but zero times NaN is NaN."""
    wanted = engine.generate(["What is 3 + 4?"], model="math", max_new_tokens=8)[0].tokens
    cache = engine._batch._cache
    with torch.inference_mode():
        for _, keys, values in cache._layers.values():
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
        cache.clear(range(8192 // PAGE))
    assert engine.generate(["What is 3 + 4?"], model="math", max_new_tokens=8)[0].tokens == wanted


class Told:
    """A listener that can be waited for."""

    def __init__(self):
        self.tokens, self.error, self._finished = [], None, threading.Event()

    def __call__(self, tokens, finished, error):
        self.tokens, self.error = tokens, error
        if finished:
            self._finished.set()

    def wait(self):
        assert self._finished.wait(60), "never told that it is over"
        return self


@contextlib.contextmanager
def batch_of(model, **sizes):
    batch = Batch(model, Switch(), **sizes)
    try:
        yield batch
    finally:
        batch.close()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config_of("llama")).eval()


def ask(batch, name, tokens, new=4, params=None):
    told = Told()
    batch.submit(name, tokens, -1, params or SamplingParams(new), [], told)
    return told


def test_numbers_that_nobody_has_seen_are_not_left_for_the_next_in_their_pages(llama):
    """A request is cancelled in the middle of its prompt, before a row of logits shows that it overflows."""
    overflowing = 7

    def overflow(module, args, out):
        return out.masked_fill((args[0] == overflowing)[..., None], torch.nan)

    llama.get_input_embeddings().register_forward_hook(overflow)
    with batch_of(llama, max_batch_tokens=4 * PAGE, kv_tokens=5 * PAGE) as batch:
        first_step = llama.register_forward_pre_hook(lambda *call: batch.cancel("cancelled"))
        assert ask(batch, "cancelled", [overflowing] * (4 * PAGE + 9)).wait().tokens == []
        first_step.remove()
        with batch.together():  # the short one is padded to the long one, with what its page held before
            beside = [ask(batch, "long", [1] * (PAGE + 9)), ask(batch, "short", [2] * 9)]
        assert [one.wait().error for one in beside] == [None, None]
        assert ask(batch, "alone", [2] * 9).wait().tokens == beside[1].tokens


def test_a_prompt_that_fills_the_cache_alone_is_refused_even_if_nothing_is_to_be_made(llama):
    """It would wait for a page that there is not, and all after it with it."""
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=PAGE) as batch:
        with pytest.raises(CapacityError, match="65 tokens are more than the KV cache has, 64"):
            ask(batch, "whole", [5] * PAGE, new=0)
        assert ask(batch, "nearly", [5] * (PAGE - 1), new=0).wait().error is None
        assert len(ask(batch, "later", [5, 6]).wait().tokens) == 4


def test_what_a_failed_step_had_computed_is_free_before_its_requests_are_tried_alone(llama, monkeypatch):
    """Else a step that needs too much memory keeps it from those that need little."""
    monkeypatch.setattr(logging.getLogger("meswitch.engine"), "disabled", True)  # pytest keeps what is logged
    computed, still_there = [], []

    def run_out_of_memory(module, args, options):
        still_there.append(any(made() is not None for made in computed))
        made = torch.zeros(1)
        computed.append(weakref.ref(made))
        if bool((options["input_ids"] == 7).any()):
            raise torch.OutOfMemoryError("out of memory")

    llama.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        with batch.together():
            asked = [ask(batch, str(last), [5, last]) for last in (6, 7, 8)]
        assert [one.wait().error for one in asked] == [None, "OutOfMemoryError: out of memory", None]
    assert len(still_there) >= 5  # all together, each alone, a token of the base
    assert not any(still_there)


@pytest.mark.parametrize("length", [3, PAGE + 30], ids=["whole", "in-parts"])
def test_a_prompt_that_cannot_be_scored_ends_alone(llama, monkeypatch, length):
    score = sampling.token_logprobs

    def no_memory(logits, tokens, top):
        if 7 in tokens:
            raise torch.OutOfMemoryError("out of memory")
        return score(logits, tokens, top)

    monkeypatch.setattr(sampling, "token_logprobs", no_memory)
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=8 * PAGE) as batch:
        wanted = [ask(batch, "before", [5, 6, 8]).wait().tokens, ask(batch, "scored before", [5, 8, 6]).wait().tokens]
        with batch.together():
            scored = SamplingParams(4, prompt_logprobs=1)
            found = [ask(batch, "plain", [5, 6, 8]), ask(batch, "scored", [5, 7] * length, params=scored)]
            found.append(ask(batch, "scored well", [5, 8, 6], params=scored))
        assert found[1].wait().error == "its prompt cannot be scored (OutOfMemoryError)"
        assert [found[0].wait().tokens, found[2].wait().tokens] == wanted
        assert batch.failure is None


@pytest.mark.parametrize("pages", [3, 8, 100])
@pytest.mark.parametrize("most", [65, 100, 200, 511, 512])
def test_steps_of_the_proof_have_the_rows_of_each_graph(llama, most, pages):
    """Else a graph would serve whose logits nobody has compared. It takes steps of more rows than the next smaller."""

    def watch(model, args, given):
        seen.append(given["input_ids"].numel())

    trial, held, seen = Trial.of(llama, 256), SimpleNamespace(slot_count=1), []
    sizes = sorted({min(size, most) for size in graphs.SIZES})
    with batch_of(llama, max_batch_tokens=most, kv_tokens=pages * PAGE) as batch:
        llama.register_forward_pre_hook(
            lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
        )
        for smaller, size in pairwise([0, *sizes]):
            seen.clear()
            found = mixed_tokens(batch, held, {}, trial, size)
            if smaller < pages * (PAGE - 1):  # of others no step can be, if each request takes a page
                assert smaller < max(seen) <= size
                assert len(seen) == 1
            assert all(logits.isfinite().all() for _, _, logits in found)


@pytest.mark.parametrize("end", ["failed", "closed"])
def test_a_request_that_comes_in_the_batch_s_last_step_is_told_so(llama, end):
    late = []

    def last_step(names, logits):
        late.append(ask(batch, "late", [5, 6]))
        if end == "failed":
            raise OSError("no device any more")
        batch._closing.set()

    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        batch.see = last_step
        running = ask(batch, "running", [5, 6]).wait()
        reason = "OSError: no device any more" if end == "failed" else "the engine was closed"
        assert [running.error, late[0].wait().error] == [reason, reason]
        with pytest.raises(MeswitchError, match="the engine has stopped"):
            ask(batch, "later", [5, 6])


def test_an_id_that_is_in_the_batch_already_is_refused(llama):
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        with batch.together():
            first, second = ask(batch, "one", [5, 6]), ask(batch, "one", [5, 6, 7])
        assert second.wait().error == "a request 'one' is in the batch already"
        assert len(first.wait().tokens) == 4
        assert len(ask(batch, "one", [5, 6, 7]).wait().tokens) == 4


def test_what_belongs_together_waits_for_all_that_does(llama):
    """Two callers gather requests at a time; the one that ends first lets no step begin."""
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        with batch.together():
            first = ask(batch, "one", [5, 6])
            with batch.together():
                pass
            assert not batch._open.wait(0.2)
            assert batch.steps == 0
            second = ask(batch, "two", [5, 6, 7])
        assert first.wait().error is second.wait().error is None
        assert batch.sizes == {2: 4}


def test_whoever_gathers_when_a_batch_is_closed_keeps_nobody_waiting(llama):
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        with batch.together():
            waiting = ask(batch, "one", [5, 6])
            closing = threading.Thread(target=batch.close)
            closing.start()
            closing.join(20)
            assert not closing.is_alive()
            with batch.together():
                assert batch._open.is_set()
        assert "closed" in waiting.wait().error


def test_closing_waits_for_a_step_that_takes_long_and_says_so(llama, monkeypatch, caplog):
    monkeypatch.setattr(threads, "SAID_SECONDS", 0.01)
    computing, goes_on = threading.Event(), threading.Event()

    def look(names, logits):
        computing.set()
        goes_on.wait(60)

    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        batch.see = look
        asked = ask(batch, "one", [5, 6])
        assert computing.wait(60)
        closing = threading.Thread(target=batch.close)
        closing.start()
        while not caplog.records:
            pass
        assert "computes is still busy" in caplog.records[0].getMessage()
        assert closing.is_alive()
        goes_on.set()
        closing.join(60)
        assert not any(thread.is_alive() for thread in (closing, *batch.threads.values()))
        assert "closed" in asked.wait().error


def test_answers_are_told_while_others_are_gathered(llama, monkeypatch):
    """As on a GPU, where what a step gave is told in the course of the next one."""
    monkeypatch.setattr(Batch, "_tell", hold)
    with batch_of(llama, max_batch_tokens=PAGE, kv_tokens=4 * PAGE) as batch:
        gathering, entered = contextlib.ExitStack(), threading.Event()

        def gather(names, logits):  # in the first step
            if not entered.is_set():
                gathering.enter_context(batch.together())
                ask(batch, "two", [5, 6])
                entered.set()

        batch.see = gather
        with gathering:
            with batch.together():
                told = ask(batch, "one", [5, 6], new=1)
                ask(batch, "goes on", [5, 6], new=8)
            assert entered.wait(60)
            assert told._finished.wait(10)


def hold(self, job, *, finished=False, error=None):
    self._held.append((job.id, job.listener, job.made, finished, error))
