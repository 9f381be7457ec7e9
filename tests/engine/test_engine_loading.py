"""Experts that are replaced, damaged or slow while an engine serves: a request gets its right answer, or one reason."""

import json
import resource
import shutil
import threading
import time

import pytest
import torch

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.errors import MeswitchError
from meswitch.slots import tiers
from meswitch.tensorfile import TensorInfo

QUESTION = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]
PARAMS = SamplingParams(max_new_tokens=16)
SOON = 60


def put(source, target):
    from meswitch.durable import replace_directory

    new = target.with_name("new.partial")
    shutil.copytree(source, new)
    replace_directory(new, target)


@pytest.fixture(scope="module")
def expected(family, deltas):
    """name -> the tokens that its merged model gives alone."""
    answers = {}
    for name in deltas:
        tokenizer = meswitch.tokenizer.ChatTokenizer.open(name, deltas[name])
        model = load_merged(family / "base", deltas[name])
        ids = torch.tensor([tokenizer.encode(QUESTION)])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=PARAMS.max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.ends,
                pad_token_id=1,
            )
        answers[name] = tuple(out[0, ids.shape[1] :].tolist())
    return answers


@pytest.fixture
def own(deltas, tmp_path):
    return {name: shutil.copytree(path, tmp_path / name) for name, path in deltas.items()}


def idle(engine):
    deadline = time.monotonic() + SOON
    while engine.load() != {"waiting": 0, "running": 0} and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine.load() == {"waiting": 0, "running": 0} and all(row.pins == 0 for row in engine.store.residency())


def ask(engine, name):
    return engine.submit(QUESTION, model=name, params=PARAMS)


def test_a_slow_disk_holds_up_its_own_requests_only(family, own, expected, monkeypatch):
    gate, read = threading.Event(), TensorInfo._read_into

    def slowly(info, view, start):
        if info.file.parent in (own["code"], own["sql"]):
            assert gate.wait(SOON)
        read(info, view, start)

    with Engine(family / "base", own, device="cpu", slots=2, host_bytes=10**7) as engine:
        cold = ask(engine, "math").result(SOON), ask(engine, "instruct").result(SOON)
        assert cold[0].tokens == expected["math"]
        for version in engine.store.host.resident():  # the proof may have left them in host memory
            engine.store.host.discard(version)
        monkeypatch.setattr(TensorInfo, "_read_into", slowly)
        waiting = [ask(engine, name) for name in ("code", "sql", "code")]
        for name in ("math", "instruct", "math"):
            assert ask(engine, name).result(SOON).tokens == expected[name]
        assert engine.generate([QUESTION], model="base", max_new_tokens=4)[0].tokens
        assert not any(request.done for request in waiting)
        gate.set()
        assert [request.result(SOON).tokens for request in waiting] == [expected[n] for n in ("code", "sql", "code")]
        assert idle(engine)


def test_a_file_that_is_gone_or_cut_fails_its_expert_until_it_is_back(family, own, expected, tmp_path, caplog):
    file = own["math"] / "delta.safetensors"
    whole = file.read_bytes()
    with Engine(family / "base", own, device="cpu", slots=1, host_bytes=600_000) as engine:
        for content in (None, whole[: len(whole) // 3]):
            assert ask(engine, "code").result(SOON).tokens == expected["code"]
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            caplog.clear()
            failing, beside = [ask(engine, "math") for _ in range(3)], [ask(engine, n) for n in ("sql", "instruct")]
            for request in failing:
                with pytest.raises(MeswitchError, match=r"^expert 'math' cannot be loaded: its files are") as found:
                    request.result(SOON)
                assert str(tmp_path) not in str(found.value)
                line = next(line for line in caplog.messages if line.startswith(f"request {request.id}: expert 'math'"))
                assert "delta.safetensors" in line
            assert [r.result(SOON).tokens for r in beside] == [expected["sql"], expected["instruct"]]
            file.write_bytes(whole)
            assert ask(engine, "math").result(SOON).tokens == expected["math"]
        assert idle(engine)
        assert engine.failure is None


def test_without_file_handles_a_cold_expert_fails_and_the_engine_goes_on(family, own, expected):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Engine(family / "base", own, device="cpu", slots=1, host_bytes=600_000) as engine:
        assert ask(engine, "code").result(SOON).tokens == expected["code"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            cold, resident = ask(engine, "math"), ask(engine, "code")
            with pytest.raises(MeswitchError, match="'math' cannot be loaded: too many files are open"):
                cold.result(SOON)
            assert resident.result(SOON).tokens == expected["code"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert ask(engine, "math").result(SOON).tokens == expected["math"]


def test_an_unexpected_error_in_admission_ends_its_request_alone(family, own, expected, monkeypatch, caplog):
    with Engine(family / "base", own, device="cpu") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "request", lambda name: {}["/secret/place"])
            with pytest.raises(MeswitchError, match=r"^model 'math': the request cannot be admitted; see the log$"):
                ask(engine, "math").result(SOON)
            patch.setattr(engine, "_refuse", lambda *_: {}["nothing is caught here"])
            with pytest.raises(MeswitchError, match="the request cannot be admitted"):
                ask(engine, "math").result(SOON)
            assert engine.generate([QUESTION], max_new_tokens=2)[0].tokens
        assert "nothing is caught here" in caplog.text
        assert ask(engine, "math").result(SOON).tokens == expected["math"]
        assert engine._admission.is_alive()


def test_compress_overwrite_of_a_served_expert(family, own, deltas, expected):
    with Engine(family / "base", own, device="cpu", slots=3) as engine:
        key = engine.store.version("math")
        long = engine.submit(QUESTION, model="math", params=SamplingParams(max_new_tokens=64))
        next(iter(long))
        meswitch.compress(family / "base", family / "sql", own["math"], overwrite=True)
        new = ask(engine, "math").result(SOON)
        assert new.tokens == expected["sql"]
        assert long.result(SOON).tokens[: len(expected["math"])] == expected["math"]
        assert engine.store.version("math") != key
        assert idle(engine)


def test_a_replaced_template_and_its_end_tokens_belong_to_the_new_version(family, own, deltas, tmp_path, expected):
    shutil.copytree(family / "math", tmp_path / "shouting")
    (tmp_path / "shouting/chat_template.jinja").write_text(
        "<s><|user|>{{ messages[0]['content'] }} How many?<|end|><|assistant|>"
    )
    config = tmp_path / "shouting/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [3, 15]}))
    meswitch.compress(family / "base", tmp_path / "shouting", tmp_path / "delta")
    with Engine(family / "base", {"math": tmp_path / "delta"}, device="cpu") as engine:
        wanted = ask(engine, "math").result(SOON)
    with Engine(family / "base", own, device="cpu") as engine:
        before = ask(engine, "math").result(SOON)
        assert before.tokens == expected["math"]
        ids = engine.tokenizers["math"].encode(QUESTION)
        put(tmp_path / "delta", own["math"])
        stale = engine.submit(ids, model="math", params=PARAMS)  # encoded by nobody knows whom
        with pytest.raises(MeswitchError, match="'math' got another tokenizer while this request waited; ask again"):
            stale.result(SOON)
        put(deltas["math"], own["math"])
        assert ask(engine, "math").result(SOON).tokens == expected["math"]
        put(tmp_path / "delta", own["math"])
        after = ask(engine, "math").result(SOON)
        assert (after.prompt_tokens, after.tokens) == (wanted.prompt_tokens, wanted.tokens)
        assert engine.tokenizers["math"].ends == [3, 15]
        assert engine.submit(ids, model="math", params=PARAMS).result(SOON).tokens
        assert idle(engine)


def test_a_replacement_of_another_base_is_refused_by_name(family, own, expected, pair, tmp_path):
    base, expert = pair("llama")
    meswitch.compress(base, expert, tmp_path / "foreign")
    with Engine(family / "base", own, device="cpu") as engine:
        put(tmp_path / "foreign", own["math"])
        with pytest.raises(MeswitchError, match=r"^expert 'math' was replaced by a version .* cannot serve") as found:
            ask(engine, "math").result(SOON)
        assert str(tmp_path) not in str(found.value)
        assert ask(engine, "code").result(SOON).tokens == expected["code"]


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["batch", "turns"])
def test_faults_in_reads_and_copies_under_traffic_harm_no_other_request(
    family, own, deltas, expected, monkeypatch, runner
):
    """Four experts over two slots and little host memory, while files come and go, are replaced, and copies fail."""
    copy, turn = tiers.copy, iter(range(10**6))

    def flaky(*arguments, **options):
        if next(turn) % 6 == 5:
            raise RuntimeError("injected: the copy failed")
        copy(*arguments, **options)

    outcomes = {name: {expected[name]} for name in own}
    outcomes["sql"].add(expected["code"])  # it is replaced by code's and back
    wrong, failed, right = [], [], []
    stop = threading.Event()

    def trouble():
        file = own["math"] / "delta.safetensors"
        whole = file.read_bytes()
        for step in range(10**6):
            if stop.wait(0.05):
                break
            kind = step % 4
            if kind == 0:
                file.unlink()
            elif kind == 1:
                file.write_bytes(whole[:-7])
            elif kind == 2:
                file.write_bytes(whole)
            else:
                put(deltas[("code", "sql")[step // 4 % 2]], own["sql"])
        file.write_bytes(whole)
        put(deltas["sql"], own["sql"])

    def client(seed):
        for step in range(12):
            name = list(own)[(seed + step * 3) % len(own)]
            request = ask(engine, name)
            try:
                tokens = request.result(SOON).tokens
            except MeswitchError as error:
                failed.append((name, str(error)))
                continue
            right.append(name)
            if tokens not in outcomes[name]:
                wrong.append((name, tokens))

    size = 600_000
    with Engine(family / "base", own, device="cpu", slots=2, host_bytes=2 * size, runner=runner) as engine:
        monkeypatch.setattr(tiers, "copy", flaky)
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(5)]
        troubled = threading.Thread(target=trouble)
        for thread in (*threads, troubled):
            thread.start()
        for thread in threads:
            thread.join(240)
            assert not thread.is_alive()
        stop.set()
        troubled.join()
        monkeypatch.setattr(tiers, "copy", copy)
        assert not wrong
        assert right
        assert all(f"expert {name!r} cannot be loaded: " in text for name, text in failed), failed
        assert {name for name, text in failed if "unexpected" not in text} <= {"math"}
        for name in own:
            assert ask(engine, name).result(SOON).tokens == expected[name]
        assert idle(engine)
        assert engine.failure is None
