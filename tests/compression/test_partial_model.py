"""A model taken apart computes what the whole does; what cannot be taken apart is refused before any work."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.convert import LEAST_TOKENS
from meswitch.compression.inputs import Walk
from meswitch.compression.partial_model import PartialModel
from meswitch.compression.text import load_calibration
from meswitch.errors import CheckpointError, IncompatibleError
from meswitch.loaded import LazyModel
from tests.architectures import tiny

CPU = torch.device("cpu")
LOOPED = "hrm_text"  # runs its blocks again and again


@pytest.fixture
def checkpoint(tmp_path, family):
    def build(model_type, **fields):
        return Checkpoint.open(tiny.write(tiny.config_of(model_type, **fields), tmp_path / "model", family / "base"))

    return build


# hidden states beside others, of four dimensions, with states that later blocks take from earlier ones, with ids that
# are sent to where the embedding is
@pytest.mark.parametrize(
    "model_type",
    [
        "gpt2",
        "bloom",
        "rwkv",
        "gemma3n_text",
        "gemma4_text",
        "gemma4",
        "recurrent_gemma",
        "gemma3",
        "opt",
        "llama4_text",
    ],
)
def test_a_model_taken_apart_computes_what_the_whole_does(checkpoint, model_type):
    stored = checkpoint(model_type).loaded
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    whole = LazyModel.of(stored, CPU, torch.float32).load()
    parts = PartialModel(stored, CPU, torch.float32)
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False, output_hidden_states=False).logits
        given = None
        for call in parts.calls(ids):
            given = (call if given is None else call.after(given)).run(parts.block(call.block))
        (hidden,) = parts.head_inputs(ids, given)
        head = whole.get_output_embeddings()
        found = head(hidden)
    # what follows the head, such as a cap of the logits, keeps their order
    assert torch.equal(found.argsort(-1)[..., -5:], wanted.argsort(-1)[..., -5:])


def test_an_expert_that_hardly_a_token_reaches_is_compressed_as_without_calibration(checkpoint, tmp_path):
    base = checkpoint("mixtral").directory
    expert = tiny.tune(base, tmp_path / "expert", 1)
    text = tmp_path / "text.txt"
    text.write_text("what is one plus two and three plus four and five plus six?")
    free = meswitch.compress(base, expert, tmp_path / "free").manifest.tensors
    made = meswitch.compress(base, expert, tmp_path / "made", calibration=text, distill=0).manifest.tensors
    stored, sequences = Checkpoint.open(expert).loaded, load_calibration(text, expert).sequences
    told = []
    for _, seen in Walk(stored, sequences, CPU, torch.float32).steps():
        for name, inputs in seen.items():
            if free[name].kind != "packed":
                continue
            same = free[name].stored["weight_packed"].sha256 == made[name].stored["weight_packed"].sha256
            few = all(own.tokens < LEAST_TOKENS for _, own in inputs)
            assert same == few, name
            told.append((few, ".experts." in name))
    assert set(told) == {(True, True), (False, True), (False, False)}


def test_a_model_that_runs_its_blocks_again_is_refused_before_any_work(checkpoint, family, tmp_path):
    if LOOPED not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {LOOPED}")
    base = checkpoint(LOOPED).directory
    expert = tiny.tune(base, tmp_path / "expert", 1)
    calibration = family / "calibration/math.jsonl"
    with pytest.raises(IncompatibleError, match=r"cannot be run block by block: .*--calibration none"):
        meswitch.compress(base, expert, tmp_path / "delta", calibration=calibration)
    assert not list(tmp_path.glob("delta*"))


def test_weights_that_are_not_finite_are_told_from_computation_that_overflows(checkpoint):
    stored = checkpoint("llama")
    file = stored.directory / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    def run():
        walk = Walk(Checkpoint.open(stored.directory).loaded, [[5, 6, 7]], CPU, torch.float32)
        return list(walk.steps())

    save_file(weights | {name: weights[name].fill_(3e38)}, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"model\.layers\.1 .* though its weights are finite.*none"):
        run()
    save_file(weights | {name: weights[name].fill_(float("nan"))}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        run()
