"""Encoders other than the family's base: a small BERT and a table, both random, as a directory holds them."""

import json
from dataclasses import replace
from importlib.resources import as_file, files

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from meswitch.errors import ConfigError
from meswitch.router import (
    DescribedRouter,
    Encoder,
    RouteOption,
    RouterError,
    Space,
    load_router,
    open_encoder,
    train_router,
)
from meswitch.router import described as described_module
from meswitch.router import embedding as embedding_module
from meswitch.router import encoder as encoder_module
from meswitch.router.described import LEARNT_SHA256, Form, fit_prototypes
from meswitch.router.encoder import UPDATE_SHA256, SentenceEncoder, StaticEncoder, Update, shipped_update, taught

EXPERTS = ("math", "code", "instruct", "sql")
TEXTS = ["How many apples?", "Write a function.", "", "word " * 500]


@pytest.fixture(scope="module")
def bert(base, tmp_path_factory):
    """A random BERT with the base's tokenizer."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def table(base, tmp_path_factory):
    """Random static embeddings."""
    directory = tmp_path_factory.mktemp("table")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(0)
    save_file({"embedding.weight": torch.randn(tokenizer.get_vocab_size(), 24)}, directory / "model.safetensors")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_directory_says_which_kind_of_encoder_it_is(bert, table, base):
    assert isinstance(open_encoder(bert), SentenceEncoder)
    assert isinstance(open_encoder(table), StaticEncoder)
    assert open_encoder(base).depth == 6


def test_a_sentence_encoder_gives_the_mean_of_its_hidden_states(bert):
    encoder = open_encoder(bert)
    ids = torch.tensor([encoder._tokens(TEXTS[0], 64)])
    states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[1].mean(1), states[3].mean(1)], 1)
    torch.testing.assert_close(encoder.encode(TEXTS, (1, 3), 64)[:1], expected, atol=1e-5, rtol=1e-4)


def test_broad_routes_are_scored_without_the_layers_that_do_not_count(bert):
    space = Space(open_encoder(bert))
    lines = [("apples 1", "boats 2"), ("boats 3", "apples 4")]  # broad routes
    few = DescribedRouter([RouteOption(f"route {i}", "", some) for i, some in enumerate(lines)], space)
    assert (space.layers, few.prototypes.layers) == ((2, 3), (2,))
    every = few.prototypes.logits(space(TEXTS))
    torch.testing.assert_close(few.prototypes.logits(space(TEXTS, few.prototypes.layers)), every)
    many = DescribedRouter([RouteOption(f"route {i}", "", (f"number {i}",)) for i in range(16)], space)
    assert many.prototypes.layers == (2, 3)


def learnt(width, rank=2):
    """A map as `tasks.safetensors` has it, of `width` rows."""
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(width, rank, generator=draw).half() for _ in range(2))
    return {"scale": torch.tensor([0.5]), "left": left, "right": right}


def test_a_form_scales_and_turns_the_layers_that_count_and_drops_the_others(bert):
    space = Space(open_encoder(bert))
    parts = learnt(32)
    form, x = space.form.with_learnt(parts), space(TEXTS)
    low = 0.5 * 2**0.5 * x[:, :32]
    torch.testing.assert_close(form(x)[:, :32], low + low @ parts["left"].float() @ parts["right"].float().T)
    assert not form(x)[:, 32:].any()
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(x @ form.back(weight), form(x) @ weight)


def test_lines_and_queries_of_broad_routes_are_both_given_the_learnt_form(bert):
    space = Space(open_encoder(bert))
    options = [RouteOption("a", "", ("apples 1", "boats 2")), RouteOption("b", "", ("boats 3", "apples 4"))]
    plain = fit_prototypes(options, space, broad=True)
    narrow = fit_prototypes(options, space, broad=False)
    space.form = space.form.with_learnt(learnt(32))
    turned, x = fit_prototypes(options, space, broad=True), space(TEXTS)
    assert not torch.allclose(turned.logits(x), plain.logits(x))
    # a line is nearest to itself: nearness is - distance² / 2, but for what the query adds to all
    lines = space([*options[0].examples, *options[1].examples])
    distance = (space.form(lines)[:, None] - space.form(lines)).square().sum(2)
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]
    assert (lines @ turned.weight + turned.bias)[:, :4].argmax(1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(fit_prototypes(options, space, broad=False).weight, narrow.weight)


def test_what_public_sets_taught_counts_for_its_own_encoder_alone(bert):
    with as_file(files("meswitch.router") / "tasks.safetensors") as path, safe_open(path, "pt") as found:
        made_for = found.metadata()["encoder"]
        assert path.stat().st_size < 400_000
    # routers of version 3 do not say beside which map they were trained, so that it stays; later ones say `base.update`
    assert LEARNT_SHA256.startswith("cc64337733a291df")
    encoder = open_encoder(bert)
    assert Space(encoder).form.left.shape == (64, 0)
    encoder.fingerprint, encoder.hidden_size = made_for, 384
    form = Form.of(encoder, (4, 5, 6), (4, 5), learnt=True)
    assert form.left.shape == form.right.shape == (3 * 384, 32)
    assert form.left[: 2 * 384].any(1).all()
    assert not form.left[2 * 384 :].any()
    assert Form.of(encoder, (4, 5, 6), (4, 5), learnt=False).left.shape == (3 * 384, 0)


@pytest.fixture
def update(bert, monkeypatch):
    """An update for the random BERT, as if it came with the package."""
    torch.manual_seed(1)
    names = [f"encoder.layer.{i}.{name}.weight" for i in (0, 1) for name in ("attention.self.key", "output.dense")]
    tensors = {}
    for name in names:
        outputs, inputs = BertModel.from_pretrained(bert).get_parameter(name).shape
        tensors |= {f"{name}.left": torch.randn(outputs, 2), f"{name}.right": torch.randn(inputs, 2)}
    tensors |= {f"form.{name}": part for name, part in learnt(32).items()}
    made = Update.of("1" * 64, open_encoder(bert).fingerprint, tensors)
    for module in (encoder_module, described_module, embedding_module):
        monkeypatch.setattr(module, "shipped_update", lambda: made)
    return made


@pytest.mark.parametrize("bits", [32, 8])
def test_an_update_changes_the_weights_of_its_own_encoder(bert, update, bits, tmp_path):
    model = BertModel.from_pretrained(bert)
    for name in {name.rpartition(".")[0] for name in update.weights}:
        weight = model.get_parameter(name)
        weight.data += update.weights[f"{name}.left"] @ update.weights[f"{name}.right"].T
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    changed, other = open_encoder(bert, bits=bits), open_encoder(tmp_path, bits=bits)
    plain = open_encoder(bert, bits=bits, updated=False)
    assert (changed.update, other.update, plain.update) == (update.sha256, "", "")
    assert changed.fingerprint == plain.fingerprint
    states = [encoder.encode(TEXTS, (1, 2, 3), 64) for encoder in (changed, other, plain)]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-2)
    assert Space(changed).form.left.any()
    assert not Space(plain).form.left.any()


def test_a_router_is_opened_with_the_weights_that_it_was_trained_with(bert, update, rows, base, tmp_path, monkeypatch):
    encoders = {"with": open_encoder(bert), "without": open_encoder(bert, updated=False)}
    options = [RouteOption(name, "", tuple(r.query for r in rows if r.domain == name)[:5]) for name in EXPERTS]
    for name, encoder in encoders.items():
        router = train_router(rows, EXPERTS, encoder, options=options)
        router.save(tmp_path / name)
        loaded = load_router(tmp_path / name, base)
        assert loaded.encoder.update == encoder.update
        assert loaded.route("How many?").scores == pytest.approx(router.route("How many?").scores, abs=1e-6)
    data = json.loads((tmp_path / "without" / "router.json").read_text())
    del data["base"]["update"]
    (tmp_path / "without" / "router.json").write_text(json.dumps(data | {"version": 3}))
    before = load_router(tmp_path / "without", base)
    assert before.encoder.update == ""
    assert before.settings.tasks
    assert before.route("How many?").scores == pytest.approx(
        train_router(rows, EXPERTS, encoders["without"], options=options).route("How many?").scores, abs=1e-6
    )
    monkeypatch.setattr(embedding_module, "shipped_update", lambda: replace(update, sha256="0" * 64))
    load_router(tmp_path / "without", base)
    with pytest.raises(RouterError, match=r"with: base\.update: trained with weights that this meswitch does not have"):
        load_router(tmp_path / "with", base)


def test_the_update_that_is_shipped_is_for_the_encoder_of_the_map_and_small(bert):
    update = shipped_update()
    assert len((files("meswitch.router") / "adapted.safetensors").read_bytes()) < 500_000
    assert update.encoder == taught("tasks.safetensors", LEARNT_SHA256)[0]
    assert update.form.keys() == {"scale", "left", "right"}
    sides = [update.weights[f"encoder.layer.5.intermediate.dense.weight.{side}"].shape for side in ("left", "right")]
    assert sides == [(1536, 4), (384, 4)]
    assert len(update.weights) == 2 * 6 * 6
    assert open_encoder(bert).update == ""  # another encoder stays as it comes


@pytest.mark.parametrize("name", ["tasks.safetensors", "adapted.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_file_of_what_public_sets_taught_is_named(tmp_path, monkeypatch, damage, name):
    raw = (files("meswitch.router") / name).read_bytes()
    if damage != "gone":
        (tmp_path / name).write_bytes(raw[:1000] if damage == "cut" else raw[:-1] + b"!")
    monkeypatch.setattr(encoder_module, "files", lambda package: tmp_path)
    with pytest.raises(RouterError, match=rf"^{tmp_path / name}: .*; install meswitch again$"):
        taught(name, {"tasks.safetensors": LEARNT_SHA256, "adapted.safetensors": UPDATE_SHA256}[name])


def test_few_routes_whose_examples_are_alike_are_the_mean_of_these(bert):
    space = Space(open_encoder(bert))
    narrow = [RouteOption(word, "", tuple(f"{word} {i}" for i in range(4))) for word in ("apples", "boats")]
    broad = [RouteOption("a", "", ("apples 1", "boats 2")), RouteOption("b", "", ("boats 3", "apples 4"))]
    points = [fit_prototypes(options, space).weight.shape[1] for options in (narrow, broad)]
    assert points == [2, 4]  # of the latter, each line
    assert fit_prototypes(narrow, space, broad=True).weight.shape[1] == 8


def test_every_layer_of_a_bert_is_what_transformers_computes_padded_or_not(bert):
    encoder = open_encoder(bert)
    tokens = [encoder._tokens(text, 64) for text in TEXTS]
    theirs = [
        torch.cat([state[0].mean(0) for state in encoder.model(torch.tensor([ids]), output_hidden_states=True)[2]])
        for ids in tokens
    ]
    ours = encoder.encode(TEXTS, (0, 1, 2, 3), 64)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-4)
    alone = torch.cat([encoder.encode([text], (0, 1, 2, 3), 64) for text in TEXTS])
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=1e-4)


def test_layers_that_nobody_reads_are_dropped_and_change_nothing(bert):
    whole, short = open_encoder(bert), open_encoder(bert)
    expected = whole.encode(TEXTS, (2, 3), 64)[:, :32]
    torch.testing.assert_close(short.encode(TEXTS, (2,), 64), expected, atol=1e-5, rtol=1e-4)
    assert short.nbytes() < whole.nbytes()
    with pytest.raises(ConfigError, match="layers: 3 is above layer 2"):
        short.encode(TEXTS, (3,), 64)


def test_eight_bits_are_close_and_smaller(bert):
    exact, packed = open_encoder(bert), open_encoder(bert, bits=8)
    ours, theirs = packed.encode(TEXTS, (3,), 64), exact.encode(TEXTS, (3,), 64)
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.99
    assert packed.nbytes() < exact.nbytes()


def test_the_bases_first_layers_alone_give_the_same_states(encoder):
    expected = encoder.encode(TEXTS, (2, 4, 6), 64).view(4, 3, -1)
    torch.testing.assert_close(encoder.encode(TEXTS, (2, 4), 64).view(4, 2, -1), expected[:, :2])
    states = encoder.model(torch.tensor([encoder._tokens(TEXTS[0], 64)]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[6][0, 1:].mean(0), expected[0, 2], atol=1e-5, rtol=1e-4)


def test_layers_of_the_base_that_no_router_reads_are_not_loaded(encoder, router, saved, base, capfd):
    whole = encoder.encode(TEXTS, (0, 2, 4), 64)
    short = Encoder.load(base, last=4)
    assert torch.equal(short.encode(TEXTS, (0, 2, 4), 64), whole)
    loaded = load_router(saved, base)
    assert loaded.encoder.nbytes() < encoder.nbytes()
    assert loaded.encoder.depth == encoder.depth
    queries = ["What is 3 + 4?", "Write a poem."]
    for ours, theirs in zip(loaded.route_batch(queries), router.route_batch(queries), strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["bert", "table"])
def test_a_router_with_another_encoder_is_kept_and_finds_it_again(kind, request, rows, unseen, base, tmp_path):
    directory = request.getfixturevalue(kind)
    router = train_router(rows, EXPERTS, open_encoder(directory))
    router.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", base, experts=EXPERTS)
    queries = [row.query for row in unseen[:20]]
    for ours, theirs in zip(loaded.route_batch(queries), router.route_batch(queries), strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)
    known = [row for row in unseen if row.domain in EXPERTS]
    right = [router.decide(s).scores[r.domain] > 0.5 for r, s in zip(
        known, router.scores([[{"role": "user", "content": r.query}] for r in known]), strict=True)]  # fmt: skip
    assert sum(right) > 0.75 * len(right)  # the words alone give that


def test_an_encoder_that_changed_is_refused(table, rows, base, tmp_path):
    train_router(rows, EXPERTS, open_encoder(table)).save(tmp_path / "router")
    save_file({"embedding.weight": torch.zeros(2048, 24)}, table / "model.safetensors")
    with pytest.raises(RouterError, match=r"base\.fingerprint"):
        load_router(tmp_path / "router", base)
