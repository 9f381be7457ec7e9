import copy
from typing import Any

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.evaluate import answer
from meswitch.evaluate.questions import generate, prompt_ids, stop_ids
from meswitch_lab.toy import accuracy, draw

Loaded = tuple[Any, Any]


def test_the_math_expert_solves_its_own_task_and_the_base_does_not(math_expert: Loaded, base: Loaded) -> None:
    assert accuracy(*math_expert, "math", n=60).accuracy > 0.8
    assert accuracy(*base, "math", n=20).correct == 0


def test_an_expert_is_at_a_loss_outside_its_domain(math_expert: Loaded) -> None:
    assert accuracy(*math_expert, "instruct", n=20).correct == 0


def test_outcomes_follow_the_order_of_the_questions(code_expert: Loaded) -> None:
    score = accuracy(*code_expert, "code", n=12, seed=4, batch_size=5)
    assert (score.task, score.questions, score.outcomes) == ("code", 4, (True,) * 12)


def test_batches_of_any_size_give_the_answers_of_one_prompt_at_a_time(code_expert: Loaded) -> None:
    model, tokenizer = code_expert
    prompts = [question.prompt for question in draw("code", 6, 0)] + ["Hi", "Write a function. " * 12]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        alone.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert answer(model, tokenizer, prompts, max_new_tokens=24, batch_size=3) == alone
    assert answer(model, tokenizer, prompts, max_new_tokens=24) == alone


def test_answers_end_at_the_end_token_or_at_the_limit(code_expert: Loaded) -> None:
    model, tokenizer = code_expert
    prompts = [question.prompt for question in draw("code", 4, 0)]
    assert all(tokenizer.eos_token_id not in ids and len(ids) < 56 for ids in generate(model, tokenizer, prompts))
    assert all(len(ids) == 5 for ids in generate(model, tokenizer, prompts, max_new_tokens=5))


def test_every_end_token_of_tokenizer_and_generation_config_stops_an_answer(code_expert: Loaded) -> None:
    model, tokenizer = code_expert
    prompt = draw("code", 1, 0)[0].prompt
    (whole,) = generate(model, tokenizer, [prompt])
    configured = model.generation_config
    model.generation_config = copy.deepcopy(configured)
    try:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, whole[5]]
        assert stop_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, whole[5]})
        (cut,) = generate(model, tokenizer, [prompt])
    finally:
        model.generation_config = configured
    assert cut == whole[: whole.index(whole[5])]


def test_a_tokenizer_without_chat_template_gets_the_plain_prompt(base: Loaded) -> None:
    tokenizer = copy.deepcopy(base[1])
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "How many?") == tokenizer("How many?")["input_ids"]
    assert prompt_ids(base[1], "How many?") != prompt_ids(tokenizer, "How many?")


def test_no_prompts_give_no_answers(base: Loaded) -> None:
    assert answer(*base, []) == []


def test_a_domain_without_exact_answers_is_refused_by_name(base: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"'sql' has no exact check.*math, code, instruct"):
        accuracy(*base, "sql", n=1)
