import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.errors import ConfigError
from meswitch.router import OTHER, LlmSettings, RouterError, Row, load_router, open_llm, train_llm_router
from meswitch.router.choice import NONE_OF_THESE, ChoiceModel
from meswitch.router.llm import rotations
from meswitch.router.llm_train import balanced, rate
from meswitch.router.store import VERSION

DESCRIPTIONS = {
    "math": "Arithmetic word problems.",
    "code": "Programming.",
    "instruct": "General instructions.",
    "sql": "Questions about a database.",
}
QUERIES = ["What is 17 + 25?", "Write f(x) that doubles x.", "How many users are there?", "", "word " * 400]
FAST = LlmSettings(weights="full", steps=6, batch=4, question=2, learning_rate=3e-4, max_tokens=24, average=0.5, seed=3)
REFERENCE = LlmSettings(weights="reference", max_tokens=32)


def train(base, rows, settings, descriptions=None, **options):
    return train_llm_router(rows, descriptions or DESCRIPTIONS, open_llm(base), settings=settings, **options)


@pytest.fixture(scope="module")
def few(all_rows):
    return all_rows[::16]


@pytest.fixture(scope="module")
def llm(base, few):
    return train(base, few, FAST)


@pytest.fixture(scope="module")
def plain(base, few):
    """The model as it is."""
    return train(base, few, REFERENCE)


@pytest.fixture
def copy(llm, tmp_path):
    llm.save(tmp_path / "llm")
    return tmp_path / "llm"


def same_scores(one, other):
    for ours, theirs in zip(one.route_batch(QUERIES), other.route_batch(QUERIES), strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)


def edit(path, change):
    data = json.loads((path / "router.json").read_text())
    change(data)
    (path / "router.json").write_text(json.dumps(data))


def test_scores_are_probabilities_over_the_experts_and_other(plain):
    for route in plain.route_batch(QUERIES):
        assert list(route.scores) == [*DESCRIPTIONS, OTHER]
        assert sum(route.scores.values()) == pytest.approx(1)


def test_a_batch_gives_what_single_queries_give(plain):
    for query, together in zip(QUERIES, plain.route_batch(QUERIES), strict=True):
        assert plain.route(query).scores == pytest.approx(together.scores, abs=1e-4)
    assert plain.route_batch([]) == []


def test_averaged_over_all_rotations_the_start_does_not_matter(base, few):
    everywhere = train(base, few, LlmSettings(weights="reference", max_tokens=32, permutations=5))
    names = list(DESCRIPTIONS)
    # rotating the five options; `other` is always the last of them, so only its place relative to the rest is kept
    odds = everywhere.log_odds(QUERIES[:3])
    queries = [everywhere.chooser.prompt.query(text) for text in QUERIES[:3]]
    options = [everywhere.descriptions[name] for name in names] + ["None of these."]
    turned = options[2:] + options[:2]
    total = torch.zeros(3, 5)
    for shift in range(5):
        order = [(i + shift) % 5 for i in range(5)]
        total[:, order] += everywhere.chooser.answer(queries, [turned[i] for i in order]).log_softmax(1)
    back = total[:, [3, 4, 0, 1, 2]] / 5
    assert torch.allclose(back[:, :4] - back[:, 4:], odds[:, :4], atol=1e-4)


def test_rotations_are_spread_evenly():
    assert rotations(5, 1) == [0]
    assert rotations(5, 9) == [0, 1, 2, 3, 4]
    assert rotations(6, 3) == [0, 2, 4]


def test_more_experts_than_options_are_asked_for_in_several_questions(base, few):
    small = LlmSettings(weights="reference", max_tokens=32, max_options=3)
    router = train(base, few, small)
    both = router.with_descriptions({name: DESCRIPTIONS[name] for name in ("math", "code")})
    assert torch.allclose(router.log_odds(QUERIES)[:, :2], both.log_odds(QUERIES)[:, :2], atol=1e-4)
    many = router.with_descriptions({f"expert-{i}": f"Topic number {i}." for i in range(70)})
    assert len(many.route(QUERIES[0]).scores) == 71


def test_an_expert_is_added_by_its_description(plain):
    more = plain.with_descriptions(DESCRIPTIONS | {"law": "Contracts and statutes."})
    assert set(more.route(QUERIES[0]).scores) == {*DESCRIPTIONS, "law", OTHER}
    assert more.with_descriptions(DESCRIPTIONS).route(QUERIES[0]).scores == pytest.approx(
        plain.route(QUERIES[0]).scores, abs=1e-5
    )


def test_training_lowers_the_loss(base, few):
    losses = []
    train(base, few, LlmSettings(weights="full", steps=24, batch=8, question=4, learning_rate=1e-3, max_tokens=24),
          report=lambda step, steps, loss: losses.append(loss))  # fmt: skip
    assert len(losses) == 24
    assert sum(losses[-8:]) < sum(losses[:8])


def options_of(base, rows, monkeypatch, **settings):
    """The options of all questions that a training asks."""
    seen = []
    forward = ChoiceModel.forward

    def watched(self, asked, **options):
        seen.extend(options for _, options in asked)
        return forward(self, asked, **options)

    monkeypatch.setattr(ChoiceModel, "forward", watched)
    train(base, rows, LlmSettings(weights="full", steps=12, batch=4, question=1, max_tokens=24, settle=0.0, **settings))
    return seen


def test_experts_that_a_question_leaves_out_leave_none_of_these(base, few, monkeypatch):
    questions = options_of(base, few, monkeypatch, drop=0.5, reword=0.0)
    assert {len(options) for options in questions} == {2, 3, 4, 5}
    assert all(set(options) <= {*DESCRIPTIONS.values(), NONE_OF_THESE} for options in questions)
    assert all(NONE_OF_THESE in options for options in questions)


def test_options_are_in_other_words_at_times(base, few, monkeypatch):
    told = {text for options in options_of(base, few, monkeypatch, drop=0.0, reword=0.5) for text in options}
    assert {*DESCRIPTIONS.values(), NONE_OF_THESE} < told
    assert sum(text.startswith("Requests such as") for text in told) > 5
    assert told & {"Arithmetic word problems", "Programming", "General instructions", "Questions about a database"}


def test_training_twice_gives_the_same_router(base, few, llm):
    again = train(base, few, FAST)
    assert again.calibration == llm.calibration
    assert all(torch.equal(again.tuned[name], value) for name, value in llm.tuned.items())


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_training_goes_on_with_the_same_bits(base, few, llm, tmp_path, at):
    class Stop(Exception):
        pass

    def stop(step, steps, loss):
        if step == at:
            raise Stop

    seen = []
    options = {"checkpoint": tmp_path / "state", "save_every": 2}
    with pytest.raises(Stop):
        train(base, few, FAST, report=stop, **options)
    again = train(base, few, FAST, report=lambda step, steps, loss: seen.append(step), **options)
    assert seen[0] == at // 2 * 2 + 1
    assert all(torch.equal(again.tuned[name], value) for name, value in llm.tuned.items())
    assert again.calibration == llm.calibration


def test_a_checkpoint_of_another_run_is_refused(base, few, tmp_path):
    options = {"checkpoint": tmp_path / "state", "save_every": 1}
    train(base, few, FAST, **options)
    with pytest.raises(RouterError, match="checkpoint of other data, settings or another model"):
        train(base, few[1:], FAST, **options)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(base, few, tmp_path, name):
    options = {"checkpoint": tmp_path / "state", "save_every": 1}
    train(base, few, FAST, **options)
    file = tmp_path / "state" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RouterError, match=name):
        train(base, few, FAST, **options)


def test_adapters_of_the_upper_half_train_and_load_without_changing_the_model(base, few, tmp_path):
    pytest.importorskip("peft", reason="the extra `lora`")
    router = train(base, few, LlmSettings(weights="lora", steps=4, batch=4, max_tokens=24, rank=4, alpha=8))
    assert all("lora_" in name for name in router.tuned)
    assert {int(name.split(".")[2]) for name in router.tuned} == {3, 4, 5}
    router.save(tmp_path / "lora")
    same_scores(load_router(tmp_path / "lora", base), router)


def test_adapters_without_peft_say_what_to_install(base, few, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"meswitch\[lora\]"):
        train(base, few, LlmSettings(weights="lora", steps=2))


def test_a_loaded_router_scores_as_the_saved_one(llm, copy, base):
    loaded = load_router(copy, base, experts=list(DESCRIPTIONS))
    same_scores(loaded, llm)
    assert (loaded.settings, loaded.calibration, loaded.provenance) == (llm.settings, llm.calibration, llm.provenance)


def test_a_model_that_moved_is_found_by_its_content(copy, base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    edit(copy, lambda data: data["model"].update(path="/nowhere/model"))
    assert load_router(copy, base).experts == tuple(DESCRIPTIONS)  # the base is that model
    assert load_router(copy, base, llm=tmp_path / "moved").experts == tuple(DESCRIPTIONS)


def test_another_model_is_refused(copy, base, pair):
    other, _ = pair()
    with pytest.raises(RouterError, match=r"model\.fingerprint"):
        load_router(copy, base, llm=other)
    edit(copy, lambda data: data["model"].update(path=str(other)))
    with pytest.raises(RouterError, match=r"model\.path.*--model"):
        load_router(copy, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=VERSION + 1), "newer"),
        (lambda d: d.update(colour="red"), "colour: unknown field"),
        (lambda d: d.pop("descriptions"), "descriptions: missing"),
        (lambda d: d["descriptions"].update(law="x"), "descriptions: not of the router's experts"),
        (lambda d: d["descriptions"].update(math=3), r"descriptions\.math: expected str"),
        (lambda d: d["settings"].update(weights="all"), r"settings\.weights: 'all'"),
        (lambda d: d["settings"].update(weights="reference"), "has no tensors"),
        (lambda d: d["settings"].update(weights="lora"), "no adapter of a linear layer"),
        (lambda d: d["model"].pop("fingerprint"), r"model\.fingerprint: missing"),
        (lambda d: d.update(tensors_sha256="0"), "tensors_sha256"),
        (lambda d: d.update(kind="rules"), "unknown field"),
    ],
)
def test_a_changed_router_json_is_refused_and_the_field_named(copy, base, change, message):
    edit(copy, change)
    with pytest.raises(RouterError, match=message):
        load_router(copy, base)


def test_an_expert_that_the_router_does_not_know_can_be_described(copy, base):
    with pytest.raises(RouterError, match=r"does not know law.*meswitch router update"):
        load_router(copy, base, experts=[*DESCRIPTIONS, "law"])


def test_an_expert_without_a_description_is_named(base, few):
    with pytest.raises(ConfigError, match=r"expert\.description: 'code' has none"):
        train(base, few, REFERENCE, DESCRIPTIONS | {"code": " "})


def test_rows_of_an_unknown_domain_are_refused(base, few):
    with pytest.raises(RouterError, match="'chess' is no expert"):
        train(base, [*few, Row("e4", "chess")], REFERENCE)
    with pytest.raises(RouterError, match="at least 20"):
        train(base, few[:10], REFERENCE)


def test_rare_domains_and_sources_are_drawn_more_often():
    rows = [Row("a", "math", "big")] * 81 + [Row("b", "math", "small")] * 9 + [Row("c", "sql", "only")] * 10
    as_they_come, alike = balanced(rows, 0.0), balanced(rows, 1.0)
    assert as_they_come.std() == pytest.approx(0, abs=1e-9)
    assert alike[:81].sum() == pytest.approx(float(alike[81:90].sum()))
    assert alike[:90].sum() == pytest.approx(float(alike[90:].sum()))


def test_the_learning_rate_rises_and_falls():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] < rates[9] == max(rates)
    assert rates[-1] < 0.11


def test_the_models_own_letters_are_what_is_scored(base, plain):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompt = plain.chooser.prompt
    question = prompt.question([*DESCRIPTIONS.values(), "None of these."])
    ids = torch.tensor([[*question.before, *prompt.query(QUERIES[0]), *question.after]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1, list(prompt.letter_ids[:5])] / plain.calibration.temperature
    assert list(plain.route(QUERIES[0]).scores.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    assert AutoTokenizer.from_pretrained(base).decode(list(question.after)).endswith("<|assistant|>")
