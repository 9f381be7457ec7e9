"""Every tensor that an expert changes lands in a slot, or the expert is refused by name. No vLLM needed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import meswitch
from meswitch.artifact import Artifact
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.vllm.arena import Arena, stored_names
from meswitch.vllm.command import DeltaSettings
from meswitch.vllm.places import EMBEDDING, HEAD, LINEAR, NORM, Place, Source, Unserved
from meswitch.vllm.prepare import Target, check_covered, prepare

ROWS, WIDTH = 2048, 64
NORMS = "model.norm"


def layer(*shape):
    return SimpleNamespace(weight=torch.zeros(shape), bias=None, input_size=shape[-1])


def matrix(name, kind, rows=ROWS, tied=None):
    return Place(name, layer(rows, WIDTH), kind, (Source(name, 0, rows, rows),), rows, WIDTH, tied=tied)


@pytest.fixture
def artifact(pair, tmp_path):
    def make(**options):
        base, expert = pair("llama", change=0.3, **options.pop("case", {}))
        return Artifact.open(meswitch.compress(base, expert, tmp_path / f"delta-{len(options)}", **options).directory)

    return make


def slots(places, models):
    device = torch.device("cpu")
    return Arena(places, models, str, slots=2, device=device, dtype=torch.float32, base_vocabulary=ROWS)


def target(places, *, allowed=(), rename=str, unserved=()):
    return Target(places, unserved, rename, DeltaSettings(allow_uncovered=tuple(allowed)))


def test_whole_embeddings_do_not_fit_slots_made_for_packed_ones(artifact):
    places = [matrix("model.embed_tokens", EMBEDDING)]
    packed, whole = artifact(), artifact(embeddings="exact")
    arena = slots(places, [packed])
    others = target(places, allowed=["model.layers.*", "lm_head.*", "model.norm.*"])
    assert prepare(packed, arena, others).present == (True,)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens: does not fit the slots"):
        prepare(whole, arena, others)


def test_a_tied_head_has_the_embeddings_delta(artifact):
    tied = artifact(case={"tied": True})
    places = [matrix("model.embed_tokens", EMBEDDING), matrix("lm_head", HEAD, tied="model.embed_tokens")]
    names = stored_names(tied, str, places)
    assert names["lm_head.weight"] == "model.embed_tokens.weight"
    others = target(places, allowed=["model.layers.*", "model.norm.*"])
    assert prepare(tied, slots(places, [tied]), others).present == (True, True)


def test_two_tensors_of_one_name_are_refused(artifact):
    with pytest.raises(IncompatibleError, match=r"input_layernorm\.weight and .* are one tensor in vLLM"):
        stored_names(artifact(), lambda name: name.replace("post_attention", "input"), [])


def test_a_layer_of_another_shape_is_refused(artifact):
    name = "model.layers.0.mlp.up_proj"
    places = [matrix(name, LINEAR, rows=100)]
    others = target(places, allowed=["*norm*", "*proj*", "*embed*", "lm_head*"])
    with pytest.raises(IncompatibleError, match=r"up_proj\.weight: shape: \[160, 64\], vLLM's .* takes \[100, 64\]"):
        prepare(artifact(), slots(places, []), others)


def test_all_layers_that_are_not_served_are_named_at_once_with_class_and_reason(artifact):
    norm = nn.LayerNorm(WIDTH, bias=False)
    places = [Place(NORMS, norm, NORM, (Source(NORMS, 0, WIDTH, WIDTH),), WIDTH, 1)]
    places.append(matrix("lm_head", HEAD))
    unserved = [
        Unserved("model.embed_tokens", "OddEmbedding", "a table"),
        *(Unserved(f"model.layers.{i}.mlp.up_proj", "OddLinear", "its rows are odd") for i in range(2)),
    ]
    allowed = ["*_layernorm.weight", "*self_attn*", "*gate_proj*"]
    with pytest.raises(IncompatibleError) as refusal:
        check_covered(artifact(), target(places, allowed=allowed, unserved=unserved))
    lines = str(refusal.value).partition("to serve it without them: ")[2].split("; ")
    assert sorted(lines) == [
        "model.embed_tokens: OddEmbedding: a table",
        "model.layers.0.mlp.down_proj.weight and 1 more: vLLM's model has no layer of this name",
        "model.layers.0.mlp.up_proj and 1 more: OddLinear: its rows are odd",
    ]


def test_an_exact_artifact_is_refused_by_name(artifact):
    exact = artifact(bits="exact")
    places = [matrix("model.embed_tokens", EMBEDDING)]
    with pytest.raises(IncompatibleError, match=r"delta-1: method: exact .*compress with --bits 1 to 4"):
        prepare(exact, slots(places, [exact]), target(places))
