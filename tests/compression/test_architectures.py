"""Every kind of architecture: compressed with and without calibration, verified, planned, merged whole."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import meswitch
from meswitch.architecture import HEAD, LINEAR, STACKS, TRANSPOSED, matrix_shape
from meswitch.artifact import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.compression.inputs import Walk
from meswitch.compression.merge import load_merged, merge
from meswitch.compression.plan import outline, predict
from meswitch.compression.text import load_calibration
from tests.architectures import tiny
from tests.architectures.course import load

MODELS = (
    "apertus",  # parameters of an activation, beside matrices
    "dbrx",  # stacks of expert matrices in two dimensions
    "gemma3",  # vision-language, scaled embedding
    "gpt2",  # Conv1D, learned positions
    "gpt_oss",  # stacks that lie transposed, with biases; attention without sdpa
    "granitemoe",  # stacks of other names than in memory
    "jamba",  # Mamba and a mixture
    "lfm2",  # convolutions
    "llava",  # vision-language, other names than in memory
    "mixtral",  # expert matrices one by one
    "qwen3_5_text",  # linear attention
    "qwen3_moe",
    "qwen3_next",  # linear attention and a mixture, shared experts
)
FIELDS = {"dbrx": {"vocab_size": 2048}}
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Made:
    """A pair of checkpoints and what was made of it, calibrated on `text` and data-free."""

    model_type: str
    base: Path
    expert: Path
    text: Path
    free: Path
    calibrated: Path


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory, family) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    base = tiny.write(tiny.config_of(request.param, **FIELDS.get(request.param, {})), root / "base", family / "base")
    (base / PROCESSOR).write_text("{}")
    expert = tiny.tune(base, root / "expert", 1)
    text = root / "text.jsonl"
    text.write_text("\n".join((family / "calibration/math.jsonl").read_text().splitlines()[:24]))
    for name, options in (("free", {}), ("calibrated", {"calibration": text, "distill": 0})):
        meswitch.compress(base, expert, root / name, **options)
    return Made(request.param, base, expert, text, root / "free", root / "calibrated")


@torch.no_grad()
def divergence(full, ours, sequences):
    """KL of a model from the full one, in nats a token."""
    total = tokens = 0.0
    for ids in sequences:
        p, q = (
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            for model in (full, ours)
        )
        total += float((p.exp() * (p - q)).sum())
        tokens += len(ids)
    return total / tokens


def test_what_is_merged_is_near_the_fine_tune_and_nearer_with_calibration(made):
    for artifact in (made.free, made.calibrated):
        Artifact.open(artifact).verify()
    full, plain = load(made.expert), load(made.base)
    sequences = load_calibration(made.text, made.expert).sequences[:8]
    free, calibrated = (
        divergence(full, load_merged(made.base, artifact), sequences) for artifact in (made.free, made.calibrated)
    )
    assert free < 0.5 * divergence(full, plain, sequences)
    assert calibrated < 0.95 * free


def test_the_merged_checkpoint_is_whole(made, tmp_path):
    merge(made.base, made.calibrated, tmp_path / "merged")
    wanted, found = (load_file(directory / "model.safetensors") for directory in (made.expert, tmp_path / "merged"))
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in wanted.items()
    }
    assert (tmp_path / "merged" / PROCESSOR).is_file()
    loaded, in_memory = load(tmp_path / "merged"), load_merged(made.base, made.calibrated)
    ids = torch.tensor([[5, 77, 1200, 300]])
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (loaded, in_memory)]
    assert torch.allclose(*logits, atol=1e-4)


def test_every_matrix_is_packed_and_a_plan_has_the_bytes_of_the_artifact(made):
    found = Artifact.open(made.free).manifest.tensors
    planned = predict(outline(made.base / "config.json"), outline(made.expert / "config.json")).manifest.tensors
    assert set(found) == set(planned)
    for name, entry in found.items():
        if "row_index" in entry.stored or entry.kind == "same":  # what did not change, a plan cannot know
            continue
        ours, theirs = (
            {suffix: (part.dtype, part.shape, part.bytes) for suffix, part in e.stored.items()}
            for e in (entry, planned[name])
        )
        assert (entry.kind, entry.role, ours) == (planned[name].kind, planned[name].role, theirs), name
        assert (entry.kind == "packed") == (entry.role in ("embedding", HEAD, LINEAR, TRANSPOSED, *STACKS)), name


def test_text_shows_the_inputs_of_every_matrix_that_it_passes(made):
    checkpoint = Checkpoint.open(made.expert).loaded
    sequences = load_calibration(made.text, made.expert).sequences
    walk = Walk(checkpoint, sequences, torch.device("cpu"), torch.float32)
    seen = {name: rows for names, inputs in walk.steps() for name, rows in inputs.items() if rows}
    roles = {name: entry.role for name, entry in Artifact.open(made.free).manifest.tensors.items()}
    for name in walk.order:
        if roles[name] in (HEAD, LINEAR, TRANSPOSED, *STACKS) and not _transposed_in_dbrx(made, name):
            assert name in seen, name
            rows, _ = matrix_shape(checkpoint.tensors[name].shape, roles[name])
            assert sum(len(part) for part, _ in seen[name]) == rows, name
    towers = [name for name in roles if name not in walk.order and roles[name] == LINEAR]
    assert bool(towers) == (made.model_type in ("gemma3", "llava"))


def _transposed_in_dbrx(made, name):
    """The way back of DBRX's experts: matrices of other dimensions, which its own code takes apart."""
    return made.model_type == "dbrx" and name.endswith("w2")


def test_towers_are_compressed_as_without_calibration(made):
    free, calibrated = (Artifact.open(artifact).manifest.tensors for artifact in (made.free, made.calibrated))
    towers = [name for name in free if "vision" in name and free[name].kind == "packed"]
    assert bool(towers) == (made.model_type in ("gemma3", "llava"))
    for name in towers:
        assert {s: p.sha256 for s, p in free[name].stored.items()} == {
            s: p.sha256 for s, p in calibrated[name].stored.items()
        }


def test_the_manifest_says_the_vocabulary_of_the_language_model(made):
    manifest = Artifact.open(made.free).manifest
    wanted = Checkpoint.open(made.expert).config.get_text_config().vocab_size
    assert manifest.expert.vocab_size == manifest.base.vocab_size == wanted
