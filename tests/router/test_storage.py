import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.router import RouterError, load_router
from meswitch.router.store import VERSION

QUERIES = ["What is 17 + 25?", "Write f(x) that doubles x.", "How many users are there?", "book a table for two"]


@pytest.fixture
def copy(saved, tmp_path):
    path = tmp_path / "router"
    shutil.copytree(saved, path)
    return path


def edit(path, change):
    file = path / "router.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_a_loaded_router_scores_as_the_saved_one(router, saved, base):
    loaded = load_router(saved, base, experts=["math", "code", "instruct", "sql"])
    assert loaded.threshold == router.threshold
    assert [r.scores for r in loaded.route_batch(QUERIES)] == [r.scores for r in router.route_batch(QUERIES)]


def test_a_router_keeps_how_it_was_made(router, saved, base):
    loaded = load_router(saved, base)
    assert (loaded.settings, loaded.calibration) == (router.settings, router.calibration)
    assert loaded.provenance == router.provenance


def test_threshold_and_fallback_can_be_set(saved, base, router, encoder):
    loaded = load_router(saved, base, threshold=1.0, fallback="math", model=encoder.model, tokenizer=encoder.tokenizer)
    assert loaded.route(QUERIES[1]).choice == "math"


def test_a_base_that_is_loaded_already_is_used(router, saved, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    loaded = load_router(saved, base, model=model, tokenizer=AutoTokenizer.from_pretrained(base))
    assert loaded.encoder.model is model.base_model
    for ours, theirs in zip(loaded.route_batch(QUERIES), router.route_batch(QUERIES), strict=True):
        assert ours.choice == theirs.choice
        assert ours.scores == pytest.approx(theirs.scores, abs=0.1)


def test_saving_again_replaces_the_router_and_leaves_nothing_else(router, copy):
    (copy.parent / "router.partial").mkdir()
    (copy.parent / "router.partial" / "left over").write_text("")
    edit(copy, lambda data: data.update(version=99))
    router.save(copy)
    assert json.loads((copy / "router.json").read_text())["version"] == VERSION
    assert [path.name for path in copy.parent.iterdir()] == ["router"]


def test_a_directory_that_is_no_router_is_never_replaced(router, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(RouterError, match="not a router"):
        router.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="something"), "format"),
        (lambda d: d.update(version=VERSION + 1), rf"version: {VERSION + 1} is newer .* upgrade meswitch"),
        (lambda d: d.update(version="1"), "version"),
        (lambda d: d.update(kind="oracle"), "kind: 'oracle'"),
        (lambda d: d.update(colour="red"), "colour: unknown field"),
        (lambda d: d["settings"].update(depth=3), r"settings\.depth: unknown field"),
        (lambda d: d["calibration"].pop("threshold"), r"calibration\.threshold: missing"),
        (lambda d: d["settings"].update(buckets="many"), r"settings\.buckets: expected int, found 'many'"),
        (lambda d: d["settings"].update(buckets=True), r"settings\.buckets: expected int"),
        (lambda d: d["settings"].update(layers=[4, "six"]), r"settings\.layers\[1\]: expected int"),
        (lambda d: d.update(base=[]), "base: expected an object"),
        (lambda d: d.update(experts=[]), "experts: empty"),
        (lambda d: d["experts"].append("poetry"), "shape"),
        (lambda d: d["settings"].update(layers=[2, 4, 6]), "shape"),
        (lambda d: d["base"].update(vocab_size=7), r"base\.vocab_size"),
        (lambda d: d["base"].update(fingerprint="sampled-sha256:0"), r"base\.fingerprint"),
        (lambda d: d.update(tensors_sha256="0"), "tensors_sha256"),
    ],
)
def test_a_changed_router_json_is_refused_and_the_field_named(copy, base, change, message):
    edit(copy, change)
    with pytest.raises(RouterError, match=message):
        load_router(copy, base)


def test_changed_weights_are_refused(copy, base):
    file = copy / "router.safetensors"
    tensors = load_file(file)
    tensors["states.bias"][0] += 5
    save_file(tensors, file)
    with pytest.raises(RouterError, match="tensors_sha256"):
        load_router(copy, base)


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_missing_or_truncated_file_is_refused(copy, base, name):
    file = copy / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RouterError, match=name):
        load_router(copy, base)
    file.unlink()
    with pytest.raises(RouterError):
        load_router(copy, base)


def test_no_router_says_how_to_make_one(tmp_path, base):
    with pytest.raises(RouterError, match="meswitch router train"):
        load_router(tmp_path / "nothing", base)


def test_a_router_of_another_base_is_refused(saved, pair):
    other, _ = pair()
    with pytest.raises(RouterError, match="trained on the hidden states of another base"):
        load_router(saved, other)


def test_a_router_of_other_experts_is_refused_and_they_are_named(saved, base):
    with pytest.raises(RouterError, match=r"knows instruct, sql, which the family has not and does not know law"):
        load_router(saved, base, experts=["math", "code", "law"])
