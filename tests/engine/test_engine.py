"""The engine's behaviour around one request: streaming, stops, sampling, limits, errors."""

import random
import threading
import time
from collections import Counter

import pytest

import meswitch
from meswitch import Engine, EngineOptions, SamplingParams
from meswitch.engine import Request
from meswitch.engine.attention import PAGE
from meswitch.engine.request import StopText
from meswitch.errors import CapacityError, ConfigError, IncompatibleError, MeswitchError, UnknownExpertError

QUESTION = [{"role": "user", "content": "Ben shares 24 coins equally among 6 friends. How many does each friend get?"}]


@pytest.fixture(scope="module")
def engine(family, deltas):
    with Engine(family / "base", {k: deltas[k] for k in ("math", "code")}, device="cpu", max_queue=64) as engine:
        yield engine


def idle(engine):
    deadline = time.monotonic() + 20
    while engine.load() != {"waiting": 0, "running": 0} and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine.load() == {"waiting": 0, "running": 0} and all(r.pins == 0 for r in engine.store.residency())


def test_chunks_join_to_the_whole_text_and_end_with_a_reason(engine):
    (whole,) = engine.generate([QUESTION], model="math", max_new_tokens=40)
    chunks = list(engine.stream(QUESTION, model="math", max_new_tokens=40))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum(chunk.tokens for chunk in chunks) == len(whole.tokens)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"
    assert whole.text.startswith("24/6=4")
    assert "<|end|>" not in whole.text


def test_the_length_limit_ends_an_answer(engine):
    (answer,) = engine.generate([QUESTION], model="math", max_new_tokens=3)
    assert len(answer.tokens) == 3
    assert answer.finish_reason == "length"


def test_a_stop_text_ends_the_answer_before_it(engine):
    (answer,) = engine.generate([QUESTION], model="math", max_new_tokens=40, stop=("####",))
    (whole,) = engine.generate([QUESTION], model="math", max_new_tokens=40)
    assert answer.text == whole.text[: whole.text.index("####")]
    assert answer.finish_reason == "stop"
    pieces = [c.text for c in engine.stream(QUESTION, model="math", max_new_tokens=40, stop=("####",))]
    assert "".join(pieces) == answer.text
    assert idle(engine)


def test_a_seed_repeats_a_sampled_answer_whatever_shares_the_batch(engine):
    options = {"temperature": 1.5, "seed": 11, "max_new_tokens": 20}
    (alone,) = engine.generate([QUESTION], model="code", **options)
    crowd = [engine.submit(QUESTION, model="math") for _ in range(3)]
    (again,) = engine.generate([QUESTION], model="code", **options)
    (other,) = engine.generate([QUESTION], model="code", **options | {"seed": 12})
    for request in crowd:
        request.result()
    assert again.tokens == alone.tokens
    assert other.tokens != alone.tokens


def test_top_k_of_one_is_greedy(engine):
    greedy, narrow = (
        engine.generate([QUESTION], model="math", max_new_tokens=30, **options)[0].tokens
        for options in ({}, {"temperature": 2.0, "top_k": 1})
    )
    assert greedy == narrow


def test_cancelling_frees_the_slot_and_the_queue(engine):
    stream = engine.stream(QUESTION, model="code", max_new_tokens=400)
    next(stream)
    stream.close()
    assert idle(engine)


def test_cancelling_at_the_moment_of_admission_leaks_nothing(engine, monkeypatch):
    submit = engine._batch.submit

    def slowly(*arguments, **options):
        time.sleep(0.3)
        submit(*arguments, **options)

    monkeypatch.setattr(engine._batch, "submit", slowly)
    request = engine.submit(QUESTION, model="code", params=SamplingParams(max_new_tokens=400))
    while engine.load()["running"] == 0:
        time.sleep(0.01)
    engine.cancel(request)
    assert idle(engine)


def test_a_full_queue_refuses_and_recovers(family, deltas):
    with Engine(family / "base", {"math": deltas["math"]}, device="cpu", max_queue=3) as engine:
        requests = [engine.submit(QUESTION, model="base", params=SamplingParams(200)) for _ in range(3)]
        with pytest.raises(CapacityError, match=r"the queue is full \(3 requests\).*engine\.max_queue"):
            engine.submit(QUESTION, model="math")
        for request in requests:
            engine.cancel(request)
        assert idle(engine)
        assert engine.generate([QUESTION], model="math")[0].text


def test_prompts_that_are_given_together_begin_in_one_step(engine, monkeypatch):
    names = ["math", "base", "code"] * 8
    engine.generate([QUESTION] * 24, model=names, max_new_tokens=1)  # the experts are in their slots
    asked = engine.store.request

    def slowly(name):
        time.sleep(0.005)
        return asked(name)

    monkeypatch.setattr(engine.store, "request", slowly)
    before = Counter(engine.step_sizes())
    engine.generate([QUESTION] * 24, model=names, max_new_tokens=1)
    assert Counter(engine.step_sizes()) - before == {24: 1}


def test_if_one_of_several_prompts_is_refused_none_is_answered(family, deltas):
    with Engine(family / "base", {"math": deltas["math"]}, device="cpu", max_queue=3) as engine:
        steps = engine.steps
        with pytest.raises(ConfigError, match="prompt: it is empty"):
            engine.generate([QUESTION, ""])
        assert (engine.steps, idle(engine)) == (steps, True)
        with pytest.raises(CapacityError, match="the queue is full"):
            engine.generate([QUESTION] * 4, max_new_tokens=200)
        assert idle(engine)
        assert engine.steps <= steps + 2
        assert len(engine.generate([QUESTION] * 3, max_new_tokens=1)) == 3


def test_an_unknown_model_is_named_with_those_that_exist(engine):
    with pytest.raises(UnknownExpertError, match="model 'poetry' does not exist; there are base, math, code"):
        engine.submit(QUESTION, model="poetry")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(engine, prompt):
    with pytest.raises(ConfigError, match="prompt: it is empty"):
        engine.submit(prompt, model="math")


def test_a_prompt_longer_than_the_context_is_refused_and_long_answers_are_cut_to_fit(engine):
    with pytest.raises(ConfigError, match="prompt: 3000 tokens leave no room"):
        engine.submit([5] * 3000, model="math")
    request = engine.submit([5] * 2040, model="math", params=SamplingParams(max_new_tokens=500))
    assert len(request.result(60).tokens) <= 8


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": -1}, {"top_k": -1}])
def test_sampling_parameters_out_of_range_are_named(engine, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: .* is out of range"):
        engine.generate([QUESTION], model="math", **options)


@pytest.mark.parametrize("prompt", ["2 + 2 =", QUESTION, [5, 6]])
def test_one_prompt_in_place_of_several_is_refused(engine, prompt):
    with pytest.raises(ConfigError, match=r"prompts: this is one prompt; give a list of prompts, \[prompt\]"):
        engine.generate(prompt, model="math")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "both"}, "runner: 'both' is none of auto, batch, turns"),
        ({"dtype": "float8"}, "dtype: 'float8' is none of auto, float32, bfloat16, float16"),
        ({"slots": 0}, "slots: 0 is less than 1"),
        ({"kv_cache_tokens": 10}, "kv_cache_tokens: 10 is less than 256"),
        ({"max_queue": -1}, "max_queue: -1 is less than 1"),
        ({"slots": "two"}, "slots: 'two' is not a whole number"),
        ({"slots": True}, "slots: True is not a whole number"),
        ({"kv_cache_tokens": 512.5}, r"kv_cache_tokens: 512\.5 is not a whole number"),
        ({"host_bytes": "1MiB"}, "host_bytes: '1MiB' is not a whole number"),
        ({"cuda_graphs": "no"}, "cuda_graphs: 'no' is neither True nor False"),
        ({"device": "gpu"}, "device: 'gpu' is none of auto, cpu, cuda, cuda:1"),
        ({"host_bytes": 0}, "host_bytes: 0 is less than 1"),
        ({"merged_bytes": -1}, "merged_bytes: -1 is less than 0"),
        ({"backend": "tritn"}, "backend: 'tritn' is none of auto, triton, reference, cpu"),
        ({"backend": ["cpu"]}, r"backend: \['cpu'\] is none of auto, triton, reference, cpu"),
        ({"base_name": ""}, "base_name: '' is no name"),
        ({"base_name": 3}, "base_name: 3 is no name"),
        ({"device": "cudda"}, "device: 'cudda' is none of auto, cpu, cuda"),
        ({"device": "mps"}, "device: 'mps' is none of auto, cpu, cuda"),
        ({"device": "cuda:4711"}, r"device: 'cuda:4711': torch sees \d+ GPUs? here"),
    ],
)
def test_options_that_make_no_sense_are_named_before_anything_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        Engine("nowhere", {}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slot": 4}, r"slot: no such option of the engine; is it slots\?"),
        ({"kv_cache": 1024}, r"kv_cache: no such option of the engine; is it kv_cache_tokens\?"),
        ({"quality": 1}, "quality: no such option of the engine; there are base_name, device, dtype, slots"),
        ({"options": {"slots": 4}}, r"options: dict given; it takes an EngineOptions, and single options by name"),
    ],
)
def test_options_that_do_not_exist_are_named_with_the_nearest(options, message):
    with pytest.raises(ConfigError, match=message):
        Engine("nowhere", {}, **options)


def test_sampling_parameters_that_do_not_exist_are_named_with_the_nearest(engine):
    message = r"max_tokens: no such field of SamplingParams; is it max_new_tokens\?"
    with pytest.raises(ConfigError, match=message):
        engine.generate([QUESTION], model="math", max_tokens=5)
    with pytest.raises(ConfigError, match=message):
        next(engine.stream(QUESTION, model="math", max_tokens=5))
    with pytest.raises(ConfigError, match=r"give meswitch.SamplingParams"):
        engine.submit(QUESTION, model="math", params={"max_new_tokens": 5})


@pytest.mark.parametrize("runner", ["batch", "turns"])
def test_only_users_requests_are_counted(family, deltas, runner):
    with Engine(family / "base", {"math": deltas["math"]}, device="cpu", runner=runner) as engine:
        counts = engine.store.counts()["math"]
        assert (counts.requests, counts.hits) == (0, 0)
        known = engine.store.loads  # by the proof
        engine.generate([QUESTION, QUESTION], model="math", max_new_tokens=1)
        engine.generate([QUESTION], model="math", max_new_tokens=1)
        counts = engine.store.counts()["math"]
        assert (counts.requests, counts.hits) == (3, 3 if known else 1)


def test_options_may_be_given_whole_and_single_ones_beside(family, deltas):
    options = EngineOptions(base_name="plain", device="cpu", slots=1, max_queue=7)
    with Engine(family / "base", {"math": deltas["math"]}, options, max_queue=3) as engine:
        assert engine.names == ["plain", "math"]
        assert engine.max_queue == 3


def test_another_base_is_refused_at_the_start(family, deltas):
    with pytest.raises(IncompatibleError, match="its fingerprint"):
        Engine(family / "code", {"math": deltas["math"]}, device="cpu")


def test_a_missing_tokenizer_is_named(family, tmp_path):
    import shutil

    shutil.copytree(family / "math", tmp_path / "math")
    (tmp_path / "math/tokenizer.json").unlink()
    meswitch.compress(family / "base", tmp_path / "math", tmp_path / "delta")
    with pytest.raises(ConfigError, match=r"delta: 'math' has no tokenizer\.json"):
        Engine(family / "base", {"math": tmp_path / "delta"}, device="cpu")


def test_each_expert_has_its_own_template_and_end_token(family, deltas, tmp_path):
    import json
    import shutil

    shutil.copytree(family / "math", tmp_path / "shouting")
    file = tmp_path / "shouting/chat_template.jinja"
    file.write_text("<s><|user|>{{ messages[0]['content'] }} How many?<|end|><|assistant|>")
    config = tmp_path / "shouting/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [3, 15]}))
    meswitch.compress(family / "base", tmp_path / "shouting", tmp_path / "delta")
    experts = {"math": deltas["math"], "shouting": tmp_path / "delta"}
    with Engine(family / "base", experts, device="cpu") as engine:
        plain, shouting = engine.generate([QUESTION] * 2, model=["math", "shouting"])
        assert shouting.prompt_tokens > plain.prompt_tokens
        assert engine.tokenizers["shouting"].ends == [3, 15]
        assert not {3, 15} & set(shouting.tokens[:-1])


def test_a_waiting_request_is_not_starved_by_a_stream_of_others(family, deltas):
    """One slot, a steady flow for math: code still gets its turn."""
    with Engine(family / "base", {k: deltas[k] for k in ("math", "code")}, device="cpu", slots=1) as engine:
        stop = threading.Event()

        def flow():
            while not stop.is_set():
                engine.generate([QUESTION] * 2, model="math", max_new_tokens=6)

        threads = [threading.Thread(target=flow) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            request = engine.submit(QUESTION, model="code", params=SamplingParams(max_new_tokens=3))
            assert request.result(timeout=90).model == "code"
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_closing_fails_what_has_not_finished(family, deltas):
    engine = Engine(family / "base", {"math": deltas["math"]}, device="cpu")
    request = engine.submit(QUESTION, model="base", params=SamplingParams(max_new_tokens=1500))
    engine.close()
    engine.close()
    with pytest.raises(MeswitchError):
        request.result(timeout=10)
    with pytest.raises(MeswitchError, match="closed"):
        engine.submit(QUESTION)


def test_device_memory_is_the_base_the_slots_and_the_cache(engine):
    memory = engine.memory()
    places = 32768 + PAGE  # a page to spare
    tokens = places * 6 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, width, float32
    assert memory["kv_cache"] == tokens
    assert 0 < memory["merged"] <= 4 * memory["base"]  # of the experts that were asked: see test_merged
    assert memory["base"] == 2_000_512 * 4
    assert memory["slots"] == engine.store.slot_count * engine.store.slot_bytes
    assert engine.store.slot_bytes < 2_000_512 * 2 / 5  # packed, never a merged copy


@pytest.mark.parametrize("stop", ["<|user|>", "2<|user|>", "2<|user|>4", "<|user|>4<|assistant|>"])
def test_a_stop_that_names_a_special_token_ends_the_answer_at_that_token(engine, stop):
    """The family's special tokens are hidden from texts: <|user|> is 4, <|assistant|> is 5."""
    tokenizer = engine.tokenizers["math"]

    def ids(text):
        return tokenizer.tokenizer(text, add_special_tokens=False).input_ids

    for said in ("1 2<|user|>4<|assistant|>5", "1<|user|>1 2 <|user|> 2<|assistant|>"):
        visible = said.replace("<|user|>", "").replace("<|assistant|>", "")
        expected = said.partition(stop)[0].replace("<|user|>", "") if stop in said else visible
        for step in (1, 3, 100):
            request = Request("r", "math", ids("x"), SamplingParams(stop=(stop,)), tokenizer)
            tokens = ids(said)
            ends = [*range(step, len(tokens), step), len(tokens)]
            done = [request.feed(tokens[:end], finished=end == len(tokens)) for end in ends]
            assert done[-1]
            completion = request.result()
            assert completion.text == expected
            assert completion.finish_reason == ("stop" if stop in said else "length")
            assert "".join(chunk.text for chunk in request) == completion.text


def test_a_stop_spelt_by_ordinary_tokens_counts_too(engine):
    tokenizer = engine.tokenizers["math"]
    parts = ("1 <", "|user", "|>", " 2")
    spelt = [i for part in parts for i in tokenizer.tokenizer(part, add_special_tokens=False).input_ids]
    request = Request("r", "math", [0], SamplingParams(stop=("<|user|>",)), tokenizer)
    assert request.feed(spelt, finished=False)
    assert request.result().text == "1 "


def test_chunks_count_every_token_also_those_whose_text_is_held_back(engine):
    chunks = list(engine.stream(QUESTION, model="math", max_new_tokens=40, stop=("24/6=4.####", "nowhere")))
    (whole,) = engine.generate([QUESTION], model="math", max_new_tokens=40)
    assert sum(chunk.tokens for chunk in chunks) == len(whole.tokens)


def test_stop_texts_of_an_expert_s_own_generation_config_end_its_answers(family, deltas, tmp_path):
    import json
    import shutil

    expert = shutil.copytree(family / "math", tmp_path / "math")
    config = json.loads((expert / "generation_config.json").read_text())
    (expert / "generation_config.json").write_text(json.dumps(config | {"stop_strings": "####"}))
    meswitch.compress(family / "base", expert, tmp_path / "delta")
    with Engine(family / "base", {"math": deltas["math"], "short": tmp_path / "delta"}, device="cpu") as engine:
        whole, short = engine.generate([QUESTION] * 2, model=["math", "short"])
        assert short.text == whole.text.partition("####")[0]
        assert short.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_text_is_found_where_it_begins_first_and_its_beginning_is_held_back(seed):
    draw = random.Random(seed)
    for _ in range(200):
        text, stop = ("".join(draw.choices("ab", k=length)) for length in (draw.randrange(40), draw.randrange(1, 6)))
        finder, end, found = StopText(stop), 0, None
        while end < len(text) and found is None:
            end = min(len(text), end + draw.randrange(1, 5))
            found = finder.find(text[:end])
            if found is None:
                assert finder.begun == max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]))
        assert (text[:end].find(stop) if found is None else found) == (-1 if found is None else text.find(stop))


def test_long_stop_texts_take_time_in_proportion_to_the_answer():
    finder, text = StopText("a" * 1023 + "b"), "a" * 20000
    looks = 0
    after = finder._after

    def counted(begun, character):
        nonlocal looks
        looks += 1
        return after(begun, character)

    finder._after = counted
    for end in range(0, len(text) + 1, 4):
        assert finder.find(text[:end]) is None
    assert looks == len(text)
