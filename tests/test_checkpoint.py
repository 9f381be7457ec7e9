"""A checkpoint is what transformers loads from a directory; what is none is told in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meswitch.checkpoint import Checkpoint
from meswitch.errors import AdapterError, CheckpointError, MeswitchError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(pair):
    """A checkpoint in one file."""
    return pair()[1]


@pytest.fixture
def shards(pair):
    """Another model's, in several."""
    return pair("llama", shard="300KB", seed=5)[1]


def refused(directory, error=CheckpointError) -> str:
    with pytest.raises(error) as raised:
        Checkpoint.open(directory)
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_a_single_file_wins_over_an_older_index_as_in_transformers(model, shards):
    wanted = load_file(model / WEIGHTS)
    for file in shards.glob("model*"):
        shutil.copyfile(file, model / file.name)
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    checkpoint = Checkpoint.open(model)
    for name in wanted:
        assert torch.equal(checkpoint.read(name), wanted[name])
        assert torch.equal(loaded[name], wanted[name])
    (remark,) = checkpoint.remarks
    assert f"{model / WEIGHTS} is read, as transformers reads it; {INDEX} beside it names other files" in remark


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {', "{}"])
def test_an_index_that_is_not_needed_may_be_wrong(model, content):
    (model / INDEX).write_text(content)
    assert Checkpoint.open(model).tensors


def test_an_index_that_names_the_single_file_is_no_remark(model):
    names = dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert Checkpoint.open(model).remarks == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "model-00', "is cut off after 30 bytes; fetch the file again"),
        ('{"metadata": {"total_size": 5}}', "weight_map: missing or empty"),
        ('{"weight_map": {"a": "../other/x.safetensors"}}', "weight_map: a: '../other/x.safetensors' is no name"),
        ('{"weight_map": {"a": 3}}', "weight_map: a: 3 is no name of a safetensors file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
    ],
)
def test_an_index_that_is_needed_must_be_right(shards, content, message):
    (shards / INDEX).write_text(content)
    assert refused(shards).startswith(f"{shards / INDEX}: {message}")


def second_copy(shards, last: bool, value: float | None):
    """Store the embedding in one more shard, the first or the last; value: of the copy, None for an equal one."""
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    names = sorted(set(weight_map.values()) - {weight_map[EMBEDDING]})
    other = shards / names[-1 if last else 0]
    tensors, own = load_file(other), load_file(shards / weight_map[EMBEDDING])[EMBEDDING]
    tensors[EMBEDDING] = own.clone() if value is None else torch.full_like(own, value)
    save_file(tensors, other, metadata={"format": "pt"})
    return weight_map[EMBEDDING], other.name


def test_a_tensor_in_two_shards_is_refused_where_transformers_and_the_index_disagree(shards):
    owner, last = second_copy(shards, last=True, value=0.5)
    line = refused(shards)
    assert line.startswith(f"{shards / INDEX}: {EMBEDDING}: is that of {owner}, but {last} holds other values")


@pytest.mark.parametrize(("last", "value"), [(True, None), (False, None)])
def test_an_equal_copy_of_a_tensor_does_no_harm(shards, last, value):
    second_copy(shards, last, value)
    loaded = AutoModelForCausalLM.from_pretrained(shards).state_dict()
    assert torch.equal(Checkpoint.open(shards).read(EMBEDDING), loaded[EMBEDDING])


def move_weights(directory, name):
    (directory / WEIGHTS).rename(directory / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["pytorch_model.bin"],
            "no model.safetensors, but weights as a pickle, which is not read (pytorch_model.bin); ",
        ),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "weights as a pickle"),
        (["pytorch_model_fsdp_0"], "a distributed training state (pytorch_model_fsdp_0); export the model from it"),
        (["model-Q4_K_M.gguf"], "GGUF files (model-Q4_K_M.gguf); give the checkpoint in safetensors"),
        (["model-00001-of-00002.safetensors"], "shards without their index (model-00001-of-00002.safetensors); fetch"),
        (["model.fp16.safetensors"], "a variant of the weights (model.fp16.safetensors); rename it"),
        (["consolidated.safetensors"], "other safetensors files (consolidated.safetensors)"),
        ([], "no model.safetensors and no model.safetensors.index.json (it holds chat_template.jinja, config.json, "),
    ],
)
def test_weights_of_another_kind_are_named_with_what_to_do(model, names, message):
    (model / WEIGHTS).unlink()
    for name in names:
        (model / name).write_bytes(b"x")
    assert message in refused(model)


def test_a_link_to_nothing_is_told(model):
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model / "blobs" / "4d7a")
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: a link to a file that is not there, .* \(`cp -L`\)"):
        Checkpoint.open(model)


def test_an_empty_directory_holds_nothing(tmp_path):
    assert "(it holds nothing)" in refused(tmp_path)


def test_a_trainers_output_directory_names_the_last_checkpoint(model, tmp_path):
    for step in (50, 100, 1000):
        shutil.copytree(model, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "runs").mkdir()
    line = refused(tmp_path / "run")
    assert "a Trainer's output directory, with 3 checkpoints" in line
    assert f"give the last one, {tmp_path / 'run' / 'checkpoint-1000'}," in line


def test_a_directory_around_the_checkpoint_names_it(model, tmp_path):
    shutil.copytree(model, tmp_path / "outer" / "final")
    assert refused(tmp_path / "outer").endswith(f"no weights in it, but in final; give {tmp_path / 'outer' / 'final'}")


def test_an_adapter_is_recognised(model):
    move_weights(model, "adapter_model.safetensors")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert f"{model}/adapter_config.json: this is a PEFT adapter of org/base" in refused(model, AdapterError)


def test_an_adapter_beside_the_weights_is_remarked(model):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (remark,) = Checkpoint.open(model).remarks
    assert "adapter_config.json: the adapter beside the weights is not applied" in remark


def test_weights_under_a_name_that_only_transformers_reads_are_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "ema.safetensors"}))
    assert "transformers_weights: the weights are those of ema.safetensors" in refused(model)


def test_a_distributed_checkpoint_is_refused(model):
    (model / "shard-00001-model-00001-of-00002.safetensors").write_bytes(b"x")
    assert "a distributed checkpoint" in refused(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (WEIGHTS, b"", "is empty"),
        (WEIGHTS, b"\x1f\x8b" + bytes(range(200)), "is compressed with gzip"),
        (WEIGHTS, b"GGUF\x03\0\0\0" + b"x" * 50, "is a GGUF file"),
        (WEIGHTS, b"PK\x03\x04\0\0\x08\x08" + b"x" * 50, "is a PyTorch file (pickle)"),
        (WEIGHTS, b"\0" * 4096, "holds nothing but zeros"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    ],
)
def test_files_of_another_kind_are_told(model, name, content, message):
    (model / name).write_bytes(content)
    assert refused(model, MeswitchError).startswith(f"{model / name}: {message}")


def test_weights_that_end_early_are_told(model):
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-100])
    assert "truncated: tensor" in refused(model, MeswitchError)
    (model / WEIGHTS).write_bytes(data[:40])
    assert "is not a safetensors file, or cut off in its header" in refused(model, MeswitchError)


def test_weights_that_overlap_or_go_on_are_told(model):
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data + b"\0\0")
    assert "2 bytes follow its last tensor" in refused(model, MeswitchError)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).ljust(length)
    (model / WEIGHTS).write_bytes(data[:8] + text.encode() + data[8 + length :])
    assert "begins at byte" in refused(model, MeswitchError)


def test_a_header_that_begins_like_a_compressed_file_is_read(tmp_path):
    """A safetensors file begins with the length of its header, which may be any number."""
    for size in (0x8B1F, 0x0280 + 0x10000):
        file = tmp_path / WEIGHTS
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        file.write_bytes(size.to_bytes(8, "little") + header.ljust(size).encode() + b"\0\0\0\0")
        assert Checkpoint.open(tmp_path).read("w").item() == 0


def test_a_file_in_place_of_the_directory_is_told(model):
    assert refused(model / WEIGHTS).endswith("is a file; give the directory that it lies in")
    (model / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "is a GGUF file" in refused(model / "x.gguf")
