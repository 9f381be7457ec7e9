"""What a training takes is said before it starts, and decides which way is taken."""

import pytest
import torch

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression import pipeline
from meswitch.compression.distill.training import (
    Cost,
    Sample,
    about_duration,
    cost_of,
    end_to_end_bytes,
    in_batches,
    scope_for,
    statement,
    step_tokens_for,
)
from meswitch.compression.options import TrainingRecipe
from meswitch.units import format_bytes

CPU = torch.device("cpu")


@pytest.fixture
def expert(family):
    return Checkpoint.open(family / "math")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1.2, "about 1 second"),
        (40, "about 40 seconds"),
        (89, "about 89 seconds"),
        (300, "about 5 minutes"),
        (9e4, "25 hours"),
    ],
)
def test_a_duration_is_told_in_one_unit(seconds, said):
    assert about_duration(seconds).endswith(said)


def test_the_statement_says_how_long_how_much_and_how_to_leave_it_out():
    said = statement(TrainingRecipe(steps=300, scope="block"), Cost(600, 12_000_000_000))
    assert said.startswith("training block by block for 300 steps: takes about 10 minutes more than compressing alone")
    assert ", and 12 GB of memory; " in said
    assert said.endswith("--distill 0 leaves it out")


def test_twice_the_steps_take_twice_as_long(expert, monkeypatch):
    monkeypatch.setattr("meswitch.compression.distill.training._operations_a_second", lambda dtype, device: 1e10)
    once, twice = (cost_of(expert, [100] * 40, TrainingRecipe(steps=steps), CPU).seconds for steps in (1000, 2000))
    assert twice == pytest.approx(2 * once)


def test_a_gpu_trains_end_to_end_what_fits_in_its_free_memory(expert, monkeypatch):
    def found(bytes_free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_free, 2 * bytes_free))
        return scope_for(expert, torch.device("cuda"))

    needed = end_to_end_bytes(expert)
    assert found(int(1.5 * needed)) == ("model", None)
    scope, why = found(needed)
    assert scope == "block"
    said = f"only {format_bytes(needed)} of memory free: end to end takes {format_bytes(needed)}, which 80% of"
    assert said in why
    assert scope_for(expert, CPU) == ("model", None)


def test_an_expert_too_large_to_train_end_to_end_lacks_no_memory(expert, monkeypatch):
    monkeypatch.setattr("meswitch.compression.distill.training.END_TO_END_PARAMETERS", expert.parameters - 1)
    assert scope_for(expert, torch.device("cuda")) == ("block", None)


@pytest.mark.parametrize(
    ("settings", "scope", "is_told"),
    [({}, "block", True), ({"distill_scope": "block"}, "block", False), ({"distill_scope": "model"}, "model", False)],
)
def test_training_by_blocks_for_want_of_memory_is_told_unless_a_scope_was_named(
    family, pair, tmp_path, monkeypatch, settings, scope, is_told
):
    monkeypatch.setattr("meswitch.compression.pipeline.scope_for", lambda expert, device: ("block", "too little free"))
    said = []
    made = meswitch.compress(
        *pair(),
        tmp_path / "delta",
        calibration=family / "calibration" / "math.jsonl",
        calibration_tokens=2000,
        distill=1,
        notice=said.append,
        **settings,
    )
    assert made.manifest.method.distillation.scope == scope
    assert ("too little free" in said) == is_told


@pytest.mark.parametrize(("free", "is_told"), [(2, True), (3, False)])
def test_a_gpu_without_room_to_measure_the_model_is_told_of(expert, monkeypatch, free, is_told):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * expert.nbytes, 0))
    said = []
    assert pipeline._fits(expert, torch.device("cuda"), said.append) is not is_told
    assert [line.split(":")[0] for line in said] == [
        "bits are shared out without measuring what the model minds"
    ] * is_told


def test_a_gpu_takes_a_step_in_parts_as_large_as_its_free_memory_allows(expert, monkeypatch):
    def tokens(bytes_free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_free, 2 * bytes_free))
        return step_tokens_for(expert, torch.device("cuda"))

    least, most = tokens(0), tokens(1 << 50)
    assert least == step_tokens_for(expert, CPU) < most
    between = end_to_end_bytes(expert, least + 1000) - end_to_end_bytes(expert, 0)
    assert least < tokens(4 * between) <= least + 1000
    assert tokens(1 << 49) == most


def test_text_is_read_every_sample_once_in_batches_of_bounded_size():
    samples = [Sample([1] * length, 0, number) for number, length in enumerate([512] * 20 + [3] * 500 + [9000])]
    found = list(in_batches(samples))
    assert sorted(sample.number for batch in found for sample in batch) == list(range(len(samples)))
    assert max(len(batch) * max(len(sample.ids) for sample in batch) for batch in found if len(batch) > 1) <= 8192
    assert len(found) < 6


def test_what_a_cpu_leaves_out_is_said_before_the_work_with_its_price(family, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("meswitch.compression.pipeline.DISTILL_BYTES", 1)
    said = []
    text = family / "calibration" / "math.jsonl"
    options = {"calibration": text, "calibration_tokens": 2000}
    made = meswitch.compress(*pair(), tmp_path / "delta", notice=said.append, **options)
    assert made.manifest.method.distillation is None
    assert said[0].startswith("not trained, which keeps more: on this CPU it takes about ")


def test_the_price_of_a_training_is_said_before_it(family, pair, tmp_path):
    said, at = [], []
    text = family / "calibration" / "math.jsonl"
    meswitch.compress(
        *pair(),
        tmp_path / "delta",
        calibration=text,
        calibration_tokens=2000,
        distill=2,
        notice=lambda line: said.append((line, len(at))),
        progress=lambda *step: at.append(step),
    )
    line, when = said[0]
    assert line.startswith("training end to end for 2 steps: takes about ")
    assert when == 0
