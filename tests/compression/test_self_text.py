"""An expert that writes its own calibration text."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.text import ANSWER, LENGTH, TextSampler, repeats, self_calibration
from meswitch.errors import ConfigError

END = 3


@pytest.fixture(scope="module")
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "math")


@pytest.fixture(scope="module")
def written(family):
    return self_calibration(Checkpoint.open(family / "math"), 1500)


def with_template(expert, template):
    """The expert with another chat template, or none."""
    (expert / "chat_template.jinja").unlink()
    if template:
        (expert / "chat_template.jinja").write_text(template)
    return Checkpoint.open(expert)


def always(expert, token):
    """The expert made to say one token whatever it is asked."""
    model = AutoModelForCausalLM.from_pretrained(expert)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    model.save_pretrained(expert)
    return Checkpoint.open(expert)


def test_it_writes_whole_conversations_up_to_the_wanted_tokens(written, tokenizer):
    assert sum(map(len, written.sequences)) == written.info.tokens == 1500
    assert written.info.sequences == len(written.sequences) > 5
    assert (written.info.source, written.info.seed) == ("self", 0)
    for sequence in written.sequences[:-1]:
        text = tokenizer.decode(sequence)
        assert text.startswith("<s><|user|>")
        assert text.count("<|end|><|assistant|>") == 1
        answer = sequence[sequence.index(END) + 2 :]
        assert answer[-1] == END or len(answer) == ANSWER
        assert len(sequence) <= LENGTH
    assert any(sequence[-1] == END for sequence in written.sequences)


def test_the_same_seed_writes_the_same_text_and_another_does_not(pair):
    expert = Checkpoint.open(pair()[1])
    first, again, other = (self_calibration(expert, 600, seed=seed) for seed in (0, 0, 1))
    assert again == first
    assert other.info.sha256 != first.info.sha256
    assert other.info.seed == 1


def test_it_leaves_the_global_random_numbers_alone(pair):
    expert = Checkpoint.open(pair()[1])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    self_calibration(expert, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_answers_questions_of_a_file(family, tmp_path, tokenizer):
    questions = [f"Ben has {n} nuts and finds 3. How many nuts does Ben have?" for n in (11, 12)]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in questions))
    found = self_calibration(Checkpoint.open(family / "math"), 300, prompts=file)
    assert found.info.source == "self:asked.jsonl"
    asked = {tokenizer.decode(s).removeprefix("<s><|user|>").partition("<|end|>")[0] for s in found.sequences[:-1]}
    assert asked == set(questions)
    assert "####" in tokenizer.decode(found.sequences[0])


def test_a_question_that_leaves_no_room_for_an_answer_is_dropped(family, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "How many? " * 400}) + '\n{"prompt": "How many are 2 and 3?"}')
    lines = []
    found = self_calibration(Checkpoint.open(family / "math"), 100, prompts=file, notice=lines.append)
    assert found.info.tokens == 100
    assert "too long a question (" in lines[-1]


def test_few_questions_are_asked_again_but_no_answer_is_kept_twice(family, tmp_path):
    file = tmp_path / "asked.txt"
    file.write_text("Give the first letter of each word: cloud hammer")
    lines = []
    found = self_calibration(Checkpoint.open(family / "instruct"), 2000, prompts=file, notice=lines.append)
    assert len({tuple(sequence) for sequence in found.sequences}) == len(found.sequences)
    assert f"{found.info.tokens} tokens of 2000 wanted; dropped a copy (" in lines[-1]


def test_a_turn_that_ends_with_text_is_cut_there(pair, tokenizer):
    """As `[INST] ... [/INST]` of Mistral-7B-Instruct, whose brackets are ordinary tokens."""
    _, expert = pair()
    checkpoint = with_template(
        expert, "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    found = self_calibration(checkpoint, 600)
    for sequence in found.sequences[:-1]:
        text = tokenizer.decode(sequence)
        assert text.startswith("<s>[INST] ")
        assert "[/INST]" in text


def test_without_a_chat_template_it_writes_from_its_first_token(pair, tokenizer):
    _, expert = pair()
    found = self_calibration(with_template(expert, None), 600)
    assert all(sequence[0] == tokenizer.bos_token_id for sequence in found.sequences)
    assert found.info.tokens == 600


def test_a_template_that_refuses_every_question_is_named(pair):
    _, expert = pair()
    with pytest.raises(ConfigError, match="the chat template cannot show a user's message: system first"):
        self_calibration(with_template(expert, "{{ raise_exception('system first') }}"), 100)


@pytest.mark.parametrize(("token", "fault"), [(END, "empty"), (300, "endless repetition|empty")])
def test_text_of_no_use_is_an_error_that_says_why(pair, token, fault):
    _, expert = pair()
    with pytest.raises(ConfigError, match=f"expert wrote only text that is ({fault}) .*; give a file of text"):
        self_calibration(always(expert, token), 200)


def test_memory_and_progress_are_told(family):
    lines, steps = [], []
    self_calibration(
        Checkpoint.open(family / "sql"), 200, notice=lines.append, progress=lambda *step: steps.append(step)
    )
    assert lines[0] == "calibration: the full expert is loaded on cpu (8 MB) to write its own text"
    assert lines[1].startswith("calibration: it wrote ")
    assert steps[-1][:3] == ("writing calibration text", 200, 200)


def test_an_artifact_says_that_the_expert_wrote_its_text(pair, tmp_path):
    options = {"calibration": "self", "calibration_tokens": 2500, "distill": 2}
    artifact = meswitch.compress(*pair(), tmp_path / "delta", **options)
    again = meswitch.Artifact.open(tmp_path / "delta").manifest.method
    assert again == artifact.manifest.method
    assert (again.calibration.source, again.calibration.tokens, again.calibration.seed) == ("self", 2500, 0)
    assert again.distillation.steps == 2


def test_an_artifact_that_exists_is_noticed_before_the_expert_writes(family, tmp_path):
    shutil.copytree(family / "sql", tmp_path / "delta")
    lines = []
    with pytest.raises(meswitch.errors.MeswitchError, match="already exists"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", calibration="self", notice=lines.append)
    assert lines == []


# --- the sampler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mistral", "llama", "qwen2", "qwen3"])
def test_rows_of_a_batch_do_not_depend_on_each_other_or_on_rows_that_left(pair, arch):
    """With a head so sharp that sampling is greedy, each row is what transformers generates for it alone."""
    _, expert = pair(arch)
    model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float64).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    heads = [[0, 40, 50], [0], [0, 7], [0, 9, 9, 9, 9, 100, 101], [0, 300]]
    alone = []
    for head in heads:
        config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=END, pad_token_id=1)
        ids = torch.tensor([head])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        alone.append(out[0].tolist())
    tails = TextSampler(model, 1, seed=0).sample(heads, 30, {END})
    together = [head + tail for head, tail in zip(heads, tails, strict=True)]
    for row, wanted in zip(together, alone, strict=True):
        assert row == wanted[: len(row)]
        assert len(row) == len(wanted) or row[-1] == END or repeats(row)


def test_no_text_is_longer_than_the_model_s_positions(pair):
    _, expert = pair("gpt2", max_position_embeddings=16)
    model = AutoModelForCausalLM.from_pretrained(expert).eval()
    tails = TextSampler(model, 1, seed=0, longest=16).sample([[0, 40, 50], [0]], 30, set())
    assert list(map(len, tails)) == [13, 13]


def test_repetition_is_a_short_piece_over_and_over():
    assert repeats([9, 9] + [1, 2, 3] * 30)
    assert not repeats([1, 2, 3] * 10)
    assert not repeats(list(range(100)))
    assert not repeats([1, 2, 3] * 30 + [9])
