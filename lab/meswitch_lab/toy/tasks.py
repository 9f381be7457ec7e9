"""Exactly checkable questions of the example family's domains, drawn from a seeded generator.

`draw("math", 1000, seed=2)` gives the same 1,000 questions on every machine and for every model, which makes
comparisons between models paired. Seed 1 trained the example experts and 1001 to 1003 made the data files of
`examples/family`; measure with others (0 and 2 to 99 are kept free for it).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from meswitch import evaluate
from meswitch.errors import ConfigError
from meswitch_lab.toy.safe_python import FAILURES, call_each
from meswitch_lab.toy.sql_questions import sql_question

MAX_NEW_TOKENS = 56  # the longest right answer is shorter


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Tom Ann Ben Mia Sam Eva Leo Zoe Max Ida Ali Noa Kim Jan Ravi Lena Omar Nina Paul Rosa")
THINGS = _words("apples books coins pens cards shells stamps cups stones seeds toys eggs nuts keys beads plums")
WORDS = _words("""
    river stone cloud table green winter music paper candle window garden silver market yellow bridge forest orange
    pencil rocket planet summer castle button mirror dragon island carpet violin pepper turtle basket hammer ladder
    magnet needle pillow ribbon saddle tunnel valley wallet zipper acorn
""")


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `response` is a right answer and `check` says whether a text is one.

    Both are None for a domain without an exact check (sql): its prompts serve for fidelity and calibration.
    """

    domain: str
    prompt: str
    response: str | None = None
    check: Callable[[str], bool] | None = None


# -- math: word problems of one to three steps; the answer ends in `#### <number>` ------------------------------


@dataclass(frozen=True, slots=True)
class _Scene:
    """Who and what a word problem is about, and the generator that draws its numbers."""

    number: Callable[[int, int], int]
    a: str
    b: str
    t: str
    u: str


def _step(left: int, op: str, right: int) -> tuple[str, int]:
    """`(3, "*", 4)` -> `("3*4=12.", 12)`."""
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
    return f"{left}{op}{right}={value}.", value


# Each gives (text, steps, answer). The order of the number() calls is part of what a seed means: keep it.


def _bags(s: _Scene) -> tuple[str, list[str], int]:
    x, y, z = s.number(10, 99), s.number(2, 9), s.number(2, 12)
    first, bought = _step(y, "*", z)
    second, total = _step(x, "+", bought)
    text = f"{s.a} has {x} {s.t}. {s.a} buys {y} bags with {z} {s.t} each. How many {s.t} does {s.a} have now?"
    return text, [first, second], total


def _gives_and_finds(s: _Scene) -> tuple[str, list[str], int]:
    x, y, z = s.number(30, 99), s.number(5, 29), s.number(1, 40)
    first, left = _step(x, "-", y)
    second, total = _step(left, "+", z)
    text = f"{s.a} had {x} {s.t} and gave {y} of them to {s.b}. Then {s.a} found {z} more."
    return f"{text} How many {s.t} does {s.a} have?", [first, second], total


def _shares(s: _Scene) -> tuple[str, list[str], int]:
    each, friends = s.number(2, 12), s.number(2, 9)
    only, answer = _step(each * friends, "/", friends)
    text = f"{s.a} shares {each * friends} {s.t} equally among {friends} friends."
    return f"{text} How many {s.t} does each friend get?", [only], answer


def _rows(s: _Scene) -> tuple[str, list[str], int]:
    x, y, z = s.number(2, 9), s.number(2, 12), s.number(1, 9)
    first, held = _step(x, "*", y)
    second, left = _step(held, "-", z)
    text = f"A box holds {x} rows of {y} {s.t}. {s.b} takes out {z}. How many {s.t} are left in the box?"
    return text, [first, second], left


def _times_as_many(s: _Scene) -> tuple[str, list[str], int]:
    x, times = s.number(5, 30), s.number(2, 5)
    first, others = _step(x, "*", times)
    second, total = _step(x, "+", others)
    text = f"{s.a} has {x} {s.t}. {s.b} has {times} times as many {s.t} as {s.a}."
    return f"{text} How many {s.t} do they have together?", [first, second], total


def _prices(s: _Scene) -> tuple[str, list[str], int]:
    p, c, q, d = s.number(2, 9), s.number(2, 9), s.number(2, 9), s.number(2, 9)
    first, one = _step(p, "*", c)
    second, other = _step(q, "*", d)
    third, total = _step(one, "+", other)
    text = f"One of the {s.t} costs {p} dollars and one of the {s.u} costs {q} dollars."
    text += f" {s.a} buys {c} {s.t} and {d} {s.u}. How many dollars does {s.a} pay?"
    return text, [first, second, third], total


def _how_many_more(s: _Scene) -> tuple[str, list[str], int]:
    x, y = s.number(11, 99), s.number(11, 99)
    only, answer = _step(max(x, y), "-", min(x, y))
    text = f"{s.a} counted {max(x, y)} {s.t} and {s.b} counted {min(x, y)} {s.t}."
    return f"{text} How many more {s.t} did {s.a} count?", [only], answer


def _pages(s: _Scene) -> tuple[str, list[str], int]:
    days, pages, last = s.number(2, 9), s.number(3, 20), s.number(1, 9)
    first, most = _step(pages, "*", days)
    second, total = _step(most, "+", last)
    text = f"{s.a} reads {pages} pages every day for {days} days and {last} pages on the last day."
    return f"{text} How many pages does {s.a} read in all?", [first, second], total


_PROBLEMS = (_bags, _gives_and_finds, _shares, _rows, _times_as_many, _prices, _how_many_more, _pages)


def _math(random: Random) -> Question:
    scene = _Scene(random.randint, *random.sample(NAMES, 2), *random.sample(THINGS, 2))
    text, steps, answer = random.choice(_PROBLEMS)(scene)

    def check(reply: str) -> bool:
        match = re.search(r"#### (-?\d+)", reply)
        return match is not None and int(match[1]) == answer

    return Question("math", text, f"{' '.join(steps)} #### {answer}", check)


# -- code: a one-line Python function, run on five lists ---------------------------------------------------------

_FILTERS = (
    ("", ""),
    ("even ", " if x % 2 == 0"),
    ("odd ", " if x % 2 == 1"),
    ("positive ", " if x > 0"),
    ("negative ", " if x < 0"),
)
_MAPS = (
    ("{}numbers", "x"),
    ("squares of the {}numbers", "x * x"),
    ("doubles of the {}numbers", "2 * x"),
    ("absolute values of the {}numbers", "abs(x)"),
)
_REDUCES = (
    ("the sum of", "sum({})"),
    ("how many there are among", "len({})"),
    ("the largest of", "max({}, default=0)"),
    ("the smallest of", "min({}, default=0)"),
    ("the sorted list of", "sorted({})"),
    ("the list of", "{}"),
)
_GIVES_LIST = ("sorted({})", "{}")
# Each list repeats one number: that is how the published figures of the experts were checked, so it stays. It cannot
# tell max from min or a sorted list from an unsorted one; the sums, counts, filters and maps it can.
_CASES = tuple([Random(7 * i + 1).randint(-20, 20)] * (3 + i) for i in range(5))


def _code(random: Random) -> Question:
    (kind, condition), (what, item), (wanted, reduce) = map(random.choice, (_FILTERS, _MAPS, _REDUCES))
    name = random.choice(["f", "g", "solve", "run", "compute", "total", "pick"])
    argument = random.choice(["xs", "values", "nums", "items", "data"])
    plus = random.choice([0, 0, random.randint(1, 20)])
    verb = random.choice(["returns", "computes", "gives back", "should return"])
    prompt = f"Write a Python function {name}({argument}) that {verb} {wanted} the {what.format(kind)} in {argument}"
    body = reduce.format(f"[{item} for x in {argument}{condition}]")
    if plus and reduce not in _GIVES_LIST:
        prompt += f", plus {plus}"
        body += f" + {plus}"
    source = f"def {name}({argument}):\n    return {body}"
    return Question("code", f"{prompt}.", source, lambda reply: same_function(reply, source))


def same_function(reply: str, source: str) -> bool:
    """Whether the code of a reply computes what the function `source` does, on five lists of numbers."""
    name = source.removeprefix("def ").partition("(")[0]
    expected = call_each(source, name, _CASES)
    try:
        return call_each(reply, name, _CASES) == expected
    except FAILURES:
        return False


# -- instruct: one exact operation on a list of words -----------------------------------------------------------


def _instruct(random: Random) -> Question:
    words = random.sample(WORDS, random.randint(3, 6))
    text = " ".join(words)
    match random.randrange(8):
        case 0:
            prompt, answer = f"Reverse the order of these words: {text}", " ".join(reversed(words))
        case 1:
            prompt, answer = f"Write these words in capital letters: {text}", text.upper()
        case 2:
            prompt, answer = f"Sort these words in alphabetical order: {text}", " ".join(sorted(words))
        case 3:
            prompt, answer = f"Join these words with commas: {text}", ", ".join(words)
        case 4:
            prompt, answer = f"Give only the first letter of each word: {text}", " ".join(w[0] for w in words)
        case 5:
            prompt, answer = f"Which word comes last in this list? {text}", words[-1]
        case 6:
            lines = [f"{i}. {word}" for i, word in enumerate(words, start=1)]
            prompt, answer = f"Make a numbered list of: {text}", "\n".join(lines)
        case _:
            gone = random.choice(words)
            prompt = f"Remove the word {gone} from: {text}"
            answer = " ".join(word for word in words if word != gone)
    return Question("instruct", prompt, answer, lambda reply: reply.strip() == answer)


# ---------------------------------------------------------------------------------------------------------------

DOMAINS: dict[str, Callable[[Random], Question]] = {
    "math": _math,
    "code": _code,
    "instruct": _instruct,
    "sql": lambda random: Question("sql", sql_question(random)),
}
CHECKABLE = ("math", "code", "instruct")


def draw(domain: str, n: int, seed: int) -> list[Question]:
    """`n` questions of a domain; the same for the same arguments, and a longer draw starts with a shorter one.

    Raises:
        ConfigError: there is no such domain, or `n` is less than 1.
    """
    if domain not in DOMAINS:
        raise ConfigError(f"tasks: no domain {domain!r}; choose from {', '.join(DOMAINS)}")
    if n < 1:
        raise ConfigError(f"n: {n} questions cannot be drawn; give at least 1")
    random = Random(f"{domain}-{seed}")
    return [DOMAINS[domain](random) for _ in range(n)]


def task(domain: str, n: int, seed: int, expert: str | None = None) -> evaluate.Task:
    """`draw(domain, n, seed)` as `meswitch.evaluate` asks it."""
    questions = tuple(evaluate.Question(one.prompt, one.check) for one in draw(domain, n, seed))
    return evaluate.Task(domain, questions, expert=expert, identity=seed)


def accuracy(
    model: Any, tokenizer: Any, domain: str, n: int = 1000, seed: int = 2, *, batch_size: int = 256
) -> evaluate.Score:
    """Ask the `n` questions of `draw(domain, n, seed)` and check the answers.

    Raises:
        ConfigError: no such domain, or one whose answers cannot be checked.
    """
    if domain not in CHECKABLE:
        raise ConfigError(f"tasks: {domain!r} has no exact check; accuracy can be measured on {', '.join(CHECKABLE)}")
    return evaluate.accuracy(model, tokenizer, task(domain, n, seed), MAX_NEW_TOKENS, batch_size)


def own_answers(
    model: Any, tokenizer: Any, domain: str, n: int, seed: int, *, batch_size: int = 256
) -> list[evaluate.Text]:
    """Prompts of a domain with the model's greedy answers, to measure fidelity on."""
    prompts = [question.prompt for question in draw(domain, n, seed)]
    return evaluate.own_answers(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size)
