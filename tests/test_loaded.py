"""What transformers loads alike counts as alike, whichever side stores it in which way."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
)

from meswitch.architecture import architecture_of
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import CheckpointError
from meswitch.lazymodel import LazyModel
from meswitch.loaded import alike, load_model
from tests.support.models import TINY, edit_config

WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY),
    "tied llama": lambda: LlamaConfig(**TINY, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=4),
    "gemma3": lambda: Gemma3Config(text_config=TINY | {"sliding_window": 64}, vision_config=VISION),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(kind)` is a small model as transformers saves it, and the tensors of the model in memory."""
    made = {}

    def build(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp("saved")
            torch.manual_seed(0)
            config = CONFIGS[kind]()
            whole = Gemma3ForConditionalGeneration if kind == "gemma3" else AutoModelForCausalLM
            model = whole(config) if kind == "gemma3" else whole.from_config(config)
            model.save_pretrained(directory)
            made[kind] = directory, model.state_dict()
        return made[kind]

    return build


@pytest.fixture
def stored(saved, tmp_path):
    """`stored(kind, change)` writes the model with what `change` makes of its tensors by name."""

    def write(kind, change):
        directory, _ = saved(kind)
        shutil.copytree(directory, tmp_path / "other")
        tensors = change(load_file(directory / WEIGHTS))
        clones = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(clones, tmp_path / "other" / WEIGHTS, metadata={"format": "pt"})
        return tmp_path / "other"

    return write


def buffers(*names):
    """Add buffers to each of the two layers; {} is its number."""
    return lambda tensors: tensors | {name.format(i): torch.ones(1, 4) for name in names for i in range(2)}


def with_prefix(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix):
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


WAYS = {
    "inv_freq": ("llama", buffers("model.layers.{}.self_attn.rotary_emb.inv_freq")),
    "masks": ("gpt_neox", buffers("gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.masked_bias")),
    "value head": ("llama", lambda tensors: tensors | {"v_head.weight": torch.ones(1, 64)}),
    "DataParallel": ("llama", with_prefix("module.")),
    "torch.compile in DDP": ("llama", with_prefix("module._orig_mod.")),
    "FSDP of layers that are compiled": (
        "llama",
        lambda tensors: {
            name.replace("layers.0.", "layers.0._fsdp_wrapped_module._orig_mod."): tensor
            for name, tensor in tensors.items()
        },
    ),
    "recomputed activations": (
        "llama",
        lambda tensors: {name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."): t for name, t in tensors.items()},
    ),
    "buffers of other types": (
        "llama",
        lambda tensors: tensors | {"freqs_cis": torch.ones(4).to(torch.complex64), "x": torch.ones(2).to(torch.uint16)},
    ),
    "out of a larger model": ("llama", with_prefix("language_model.")),
    "hub's gpt2": ("gpt2", lambda tensors: buffers("h.{}.attn.bias")(without_prefix("transformer.")(tensors))),
    "base model alone": ("tied llama", without_prefix("model.")),
    "tied head stored too": ("tied llama", lambda tensors: tensors | {HEAD: tensors[EMBEDDING]}),
    "tied head stored alone": (
        "tied llama",
        lambda tensors: {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()},
    ),
    "compiled mixture": ("mixtral", with_prefix("_orig_mod.")),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_model_is_alike_in_every_way_to_store_it(saved, stored, way):
    kind, change = WAYS[way]
    usual, other = Checkpoint.open(saved(kind)[0]), Checkpoint.open(stored(kind, change))
    for base, expert in ((usual, other), (other, usual)):
        ours, theirs = alike(base, expert)
        assert ours.tensors.keys() == theirs.tensors.keys() == usual.tensors.keys()
        assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.tensors)
        assert ours.aliases == theirs.aliases
    assert fingerprint(other.loaded) == fingerprint(usual)


@pytest.mark.parametrize("kind", ["mixtral", "gemma3"])
def test_stacks_and_the_names_in_memory_are_alike_too(saved, stored, kind):
    directory, in_memory = saved(kind)
    tied = {"lm_head.weight"} if kind == "gemma3" else set()
    kept = {name: tensor for name, tensor in in_memory.items() if name not in tied}
    usual, other = Checkpoint.open(directory), Checkpoint.open(stored(kind, lambda _: kept))
    assert usual.tensors.keys() != other.tensors.keys()
    for base, expert in ((usual, other), (other, usual)):
        ours, theirs = alike(base, expert)
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.tensors)
        assert all(ours.info(name).sha256() == theirs.info(name).sha256() for name in ours.tensors)
    assert fingerprint(alike(usual, other)[0]) == fingerprint(usual)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_as_transformers_saves_it_is_taken_as_it_is(saved, kind):
    checkpoint = Checkpoint.open(saved(kind)[0])
    assert checkpoint.loaded.tensors == checkpoint.tensors
    assert checkpoint.loaded.left_out == ()
    assert fingerprint(checkpoint.loaded) == fingerprint(checkpoint)


def test_what_is_not_loaded_is_named(saved, stored):
    other = Checkpoint.open(stored(*WAYS["value head"]))
    assert other.loaded.left_out == ("v_head.weight",)
    assert "v_head.weight" not in alike(Checkpoint.open(saved("llama")[0]), other)[1].tensors


def test_a_head_that_differs_from_the_embedding_stays_though_the_configuration_ties_it(stored):
    """As transformers decides it."""
    directory = stored("tied llama", lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 1})
    loaded = Checkpoint.open(directory).loaded
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.aliases == {}
    assert torch.equal(loaded.read(HEAD), model.lm_head.weight)
    assert not torch.equal(loaded.read(HEAD), loaded.read(EMBEDDING))


def test_a_tied_head_becomes_a_tensor_beside_a_base_that_has_its_own(saved):
    base, expert = alike(Checkpoint.open(saved("llama")[0]), Checkpoint.open(saved("tied llama")[0]))
    assert expert.tensors.keys() == base.tensors.keys()
    assert torch.equal(expert.read(HEAD), expert.read(EMBEDDING))
    assert expert.aliases == {}


def test_a_tensor_is_found_by_any_of_its_names(saved, stored):
    base = Checkpoint.open(stored("gpt2", WAYS["hub's gpt2"][1]))
    for name in ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"):
        assert base.read(name).shape == (32, 96)
    assert torch.equal(base.read("lm_head.weight"), base.read("wte.weight"))
    mixture = Checkpoint.open(saved("mixtral")[0])
    assert mixture.read("model.layers.0.mlp.experts.gate_up_proj").shape == (4, 256, 64)
    assert mixture.info("model.layers.9.mlp.experts.gate_up_proj") is None


def test_a_mixture_that_lacks_a_matrix_is_refused(stored):
    lost = "experts.3.w1"
    directory = stored("mixtral", lambda tensors: {name: t for name, t in tensors.items() if lost not in name})
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj: its 7 pieces .* some are missing"):
        _ = Checkpoint.open(directory).loaded


def test_a_parameter_that_is_not_stored_is_refused(stored):
    directory = stored("llama", lambda tensors: {name: t for name, t in tensors.items() if name != HEAD})
    with pytest.raises(
        CheckpointError, match=r"lacks lm_head.weight, which LlamaForCausalLM needs: transformers would"
    ):
        _ = Checkpoint.open(directory).loaded


def test_one_parameter_under_two_names_is_refused(stored):
    directory = stored("llama", lambda tensors: tensors | {f"module.{HEAD}": tensors[HEAD]})
    with pytest.raises(CheckpointError, match=r"lm_head.weight and module.lm_head.weight are one parameter"):
        _ = Checkpoint.open(directory).loaded


@pytest.mark.parametrize("change", [{}, {"rotary_emb.inv_freq": torch.ones(2)}], ids=["as saved", "with a buffer"])
def test_rows_that_the_configuration_does_not_have_are_refused(stored, change):
    directory = stored("llama", lambda tensors: tensors | change)
    edit_config(directory, vocab_size=2000)
    message = r"shape \[2048, 64\], but config.json makes it \[2000, 64\]; correct the configuration \(vocab_size"
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint.open(directory).loaded


def test_a_model_that_is_not_stored_whole_is_not_filled_up_with_random_numbers(pair):
    base, _ = pair()
    tensors = load_file(base / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != lost}, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(base)
    with pytest.raises(CheckpointError, match=rf"lacks {lost}.*random numbers"):
        load_model(checkpoint, architecture_of(checkpoint.config), torch.float32)


def test_a_loaded_model_attends_without_plans_for_each_length(saved):
    torch.backends.cuda.enable_cudnn_sdp(True)
    checkpoint = Checkpoint.open(saved("llama")[0])
    load_model(checkpoint, architecture_of(checkpoint.config), torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    LazyModel.of(checkpoint, torch.device("cpu"), torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
