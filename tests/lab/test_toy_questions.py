import hashlib

import pytest

from meswitch.errors import ConfigError
from meswitch_lab.toy import CHECKABLE, DOMAINS, Question, draw

# Made once from the generator that the example experts were trained with. If a draw changes, figures measured before
# and after are no longer about the same questions.
DIGESTS = {
    ("math", 0): "f3f146304035ff6331779a331a69a61e56c0ea653fa7377e915107bf9c7597eb",
    ("math", 2): "b9a2a5756c241fd776b56e6191387631276b9dc9b7de1c848fbe4782a538a02c",
    ("math", 1001): "b93de3c2bde93d62d2d13d73f5bda65c562d303bc75f0316b787b50421b76cbf",
    ("code", 0): "8a77ac71a7c8b2d73782a48246dd59eda31335283cc6060b35d6f005ff903e61",
    ("code", 2): "4aca84ed86bfe9d0eb0ed7acd747022a900632908d23d3946e7a912cf5728e6b",
    ("code", 1001): "8465f1f8a40452a5a56d748d2cfa39a78ef0e6f8722f5127ebecd7daed763e61",
    ("instruct", 0): "f65a1bba77e381ff46d6054e8bb750ed16c29ca4f4b3f02e34af2706488de7ba",
    ("instruct", 2): "464e3a03d33f6294c87db216ee574262328d99da8fb9de2fec4a656a3e8bf833",
    ("instruct", 1001): "5037420e8585d9cc3af8008716e5cf3b160015763f5c841111793a15285a1684",
}


def verdict(question: Question, text: str | None) -> bool:
    assert question.check is not None
    assert text is not None
    return question.check(text)


@pytest.mark.parametrize(("domain", "seed"), DIGESTS)
def test_a_seed_always_means_the_same_questions_answers_and_verdicts(domain: str, seed: int) -> None:
    questions = draw(domain, 200, seed)
    digest = hashlib.sha256()
    for i, question in enumerate(questions):
        # its own answer, then those of the next eleven questions, most of which are wrong here
        verdicts = "".join("01"[verdict(question, other.response)] for other in questions[i : i + 12])
        digest.update(f"{question.prompt}\n{question.response}\n{verdicts}\n".encode())
    assert digest.hexdigest() == DIGESTS[domain, seed]


@pytest.mark.parametrize("domain", CHECKABLE)
def test_the_reference_answer_passes_and_a_spoiled_one_fails(domain: str) -> None:
    for question in draw(domain, 100, 5):
        assert question.response is not None
        assert verdict(question, question.response)
        assert not verdict(question, "")
        assert not verdict(question, question.response[:-1])


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_longer_draw_starts_with_a_shorter_one(domain: str) -> None:
    assert [q.prompt for q in draw(domain, 50, 3)][:20] == [q.prompt for q in draw(domain, 20, 3)]


def test_seeds_and_domains_draw_different_questions() -> None:
    assert [q.prompt for q in draw("math", 20, 3)] != [q.prompt for q in draw("math", 20, 4)]


def test_math_accepts_any_working_before_the_right_number() -> None:
    question = draw("math", 1, 0)[0]
    assert question.response is not None
    number = question.response.rpartition("#### ")[2]
    assert verdict(question, f"I think it is #### {number}")
    assert not verdict(question, f"it is {number}")
    assert not verdict(question, f"#### {int(number) + 1}")


def test_code_is_judged_by_what_it_computes_not_by_how_it_is_written() -> None:
    question = next(q for q in draw("code", 200, 0) if q.response and "sum([x for x in" in q.response)
    assert question.response is not None
    assert verdict(
        question, question.response.replace("[", "(").replace("]", ")").replace(" x ", " y ").replace("(x", "(y")
    )


def test_sql_has_prompts_but_no_answers_and_half_ask_for_a_query() -> None:
    questions = draw("sql", 400, 0)
    assert all(q.response is None and q.check is None for q in questions)
    asking = sum(q.prompt.startswith("Write a SQL query: ") for q in questions)
    assert 150 < asking < 250
    assert len({q.prompt for q in questions}) > 350
    assert not any("{" in q.prompt for q in questions)


def test_an_unknown_domain_or_an_empty_draw_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'law'.*math, code, instruct, sql"):
        draw("law", 1, 0)
    with pytest.raises(ConfigError, match="n: 0"):
        draw("math", 0, 0)
