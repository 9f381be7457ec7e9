"""Which tokens are in the next step."""

import pytest

from meswitch.engine import scheduler
from meswitch.engine.attention import PAGE, Pages
from meswitch.engine.sampling import SamplingParams
from meswitch.engine.scheduler import Job, Scheduler


def job(name, tokens, owner=None, new=1000, slot=0):
    ids = list(tokens) if not isinstance(tokens, int) else [hash(name) % 1000 + i for i in range(tokens)]
    return Job(name, ids, slot, owner or name, SamplingParams(max_new_tokens=new), frozenset(), lambda *told: None)


def make(pages=20, tokens=256, requests=8, jobs=()):
    made = Scheduler(Pages(pages), tokens, requests)
    made.waiting.extend(jobs)
    return made


def advance(made, seconds=0.0):
    """Run one step; who got a token says it."""
    step = made.plan()
    made.done(step, seconds)
    for one, _ in step:
        if one.computed == len(one.tokens):
            made.know(one)
            one.tokens.append(7)
            if one.is_complete:
                made.remove(one)
    return [(one.id, piece.length) for one, piece in step]


def test_a_prompt_is_computed_in_parts_beside_tokens_of_others():
    made = make(tokens=100, jobs=[job("a", 10), job("b", 230)])
    assert advance(made) == [("a", 10), ("b", 90)]
    assert advance(made) == [("a", 1), ("b", 99)]
    assert advance(made) == [("a", 1), ("b", 41)]
    assert advance(made) == [("a", 1), ("b", 1)]


def test_single_tokens_come_first_also_the_last_one_of_a_prompt():
    made = make(tokens=20, jobs=[job("a", 21), job("b", 20), job("c", 40)])
    assert advance(made) == [("a", 20)]
    assert advance(made) == [("a", 1), ("b", 19)]
    assert advance(made) == [("a", 1), ("b", 1), ("c", 18)]


def test_beside_running_answers_prompts_get_what_takes_a_pause():
    made = make(tokens=4096, pages=400, jobs=[job("a", 100)])
    advance(made, seconds=100 * scheduler.PAUSE / 50)  # 50 tokens take one pause
    made.waiting.extend([job("b", 500), job("c", 500)])
    assert advance(made, seconds=75 * scheduler.PAUSE / 50) == [("a", 1), ("b", 74)]  # half as many again, to see
    assert advance(made, seconds=scheduler.PAUSE) in ([("a", 1), ("b", 49)], [("a", 1), ("b", 48)])


def test_where_few_tokens_take_as_long_as_many_prompts_are_not_cut():
    made = make(tokens=4096, pages=400, requests=100, jobs=[job("a", 24)])
    advance(made, 0.9 * scheduler.PAUSE)
    made.waiting.extend(job(f"b{number}", 24, new=1) for number in range(60))
    steps = []
    while len(made.running) + len(made.waiting) > 1:
        steps.append(sum(length for _, length in advance(made, 0.9 * scheduler.PAUSE)))
    assert len(steps) <= 6


def test_prompts_of_few_experts_share_a_step():
    made = make(tokens=100, pages=400, requests=100)
    made.waiting.extend(job(f"{place % 4}-{place}", 20, new=1, slot=place % 4) for place in range(40))
    experts = []
    while made.waiting:
        experts.append(len({name[0] for name, _ in advance(made)}))
    assert experts == [1] * 8  # one after the other they would be 4 in each step


def test_the_oldest_that_waits_is_next_however_many_of_other_experts_come():
    made = make(tokens=100, pages=400, requests=100)
    made.waiting.extend(job(f"many-{place}", 20, new=1, slot=1) for place in range(10))
    made.waiting.append(job("one", 20, new=1, slot=2))
    seen = []
    for number in range(4):
        made.waiting.extend(job(f"more-{number}-{place}", 30, new=1, slot=1) for place in range(10))
        seen.append([name.partition("-")[0] for name, _ in advance(made)])
    assert seen[:2] == [["many"] * 5] * 2
    assert "one" in seen[2]


def test_a_long_prompt_of_an_expert_in_the_step_does_not_stop_those_that_came_before_it():
    lengths = {"a": 20, "b": 20, "c": 20, "a-long": 19 * PAGE}
    made = make(tokens=1000, pages=20, jobs=[job(name, n, slot=ord(name[0])) for name, n in lengths.items()])
    available = made.pages.available
    assert [name for name, _ in advance(made)] == ["a", "b", "c"]
    assert made.pages.available == available - sum(len(one.pages) for one in made.running)


def test_a_pace_is_a_line_through_the_steps_of_late():
    pace = scheduler.Pace()
    assert pace.within(1.0) == float("inf")
    for _ in range(3):
        for tokens in (20, 50, 400):
            pace.add(tokens, 0.02 + 0.001 * tokens)
    assert pace.within(0.12) == pytest.approx(100)
    assert pace.within(0.022) == pytest.approx(11)  # half of it, for a step of no tokens takes nearly all
    for _ in range(300):  # the machine is another
        for tokens in (20, 50, 100):
            pace.add(tokens, 0.002 * tokens)
    assert pace.within(0.1) == pytest.approx(50, rel=0.01)


def test_noise_lets_a_step_grow_only_so_much():
    pace = scheduler.Pace()
    pace.add(50, 0.11)
    pace.add(55, 0.10)
    assert pace.within(0.1) == 220


@pytest.mark.parametrize("before", [0, 30], ids=["first", "later"])
def test_one_very_slow_step_does_not_hold_prompts_up_for_long(before):
    made = make(tokens=4096, pages=400, requests=100, jobs=[job("a", 100)])
    for number, seconds in enumerate([*[0.02] * before, 60.0]):
        made.waiting.append(job(f"b{number}", 300 - 50 * (number % 3), new=1))
        advance(made, seconds)
    while made.waiting or len(made.running) > 1:
        advance(made, 0.02)
    made.waiting.append(job("c", 2000, new=1))
    steps = 0
    while made.waiting or len(made.running) > 1:
        advance(made, 0.02)
        steps += 1
    assert steps <= 12


def test_a_step_goes_on_however_slow_prompts_are():
    made = make(jobs=[job("a", 100)])
    advance(made, seconds=1000)
    made.waiting.append(job("b", 50))
    assert advance(made) == [("a", 1), ("b", 16)]


def test_who_waits_is_not_passed_by_later_ones():
    made = make(pages=4, jobs=[job("a", 2 * PAGE), job("long", 3 * PAGE), job("short", 3)])
    assert [name for name, _ in advance(made)] == ["a"]
    assert [one.id for one in made.waiting] == ["long", "short"]


def test_without_a_free_page_the_last_one_gives_its_own_back_and_starts_again_later():
    made = make(pages=3, tokens=1000, jobs=[job("a", PAGE - 2), job("b", PAGE - 2)])
    for _ in range(3):
        assert [name for name, _ in advance(made)] == ["a", "b"]
    advance(made)  # a takes the third page
    assert [advance(made) for _ in range(PAGE)] == [[("a", 1)]] * PAGE
    made.remove(made.running[0])
    (b,) = made.waiting
    ((name, count),) = advance(made)
    assert name == "b"
    assert count + made.reused == len(b.tokens) - 1


def test_every_request_ends_whatever_the_cache_holds():
    jobs = [job(f"j{i}", 20 + 37 * i % 190, new=150) for i in range(30)]
    made = make(pages=7, tokens=64, requests=5, jobs=jobs)
    for _ in range(20000):
        if not made.running and not made.waiting:
            break
        advance(made)
    assert all(len(one.made) == 150 for one in jobs)
    assert made.pages.available == 7


def test_the_same_beginning_is_computed_once_for_an_owner_and_anew_for_another():
    text = range(3 * PAGE)
    made = make(jobs=[job("a", text, "math", new=1)], tokens=1000)
    assert advance(made) == [("a", 3 * PAGE)]
    made.waiting.extend([job("b", text, "math"), job("c", [*text, 1, 2], "math"), job("d", text, "code")])
    assert advance(made) == [("b", PAGE), ("c", 2), ("d", 3 * PAGE)]
    assert made.reused == 5 * PAGE


def test_pages_of_one_that_failed_are_not_found_again():
    text = range(2 * PAGE)
    made = make(jobs=[job("a", text, "math")], tokens=1000)
    advance(made)
    made.remove(made.running[0], failed=True)
    assert len(made.unsure) == 3
    made.waiting.append(job("b", text, "math"))
    assert advance(made) == [("b", 2 * PAGE)]


def test_pages_of_a_prompt_that_is_not_seen_to_its_end_are_unsure_but_for_those_that_others_know():
    made = make(jobs=[job("a", range(2 * PAGE), "math", new=1)], tokens=2 * PAGE)
    advance(made)
    made.waiting.append(job("b", range(5 * PAGE), "math"))
    advance(made)
    (b,) = made.running
    assert (b.computed, b.known) == (4 * PAGE, 2)
    own = b.pages[2:]
    made.remove(b)
    assert sorted(made.unsure) == sorted(own)
    made.waiting.append(job("c", [*range(2 * PAGE), 1], "math"))
    assert advance(made) == [("c", 1)]


@pytest.mark.parametrize("known", [False, True])
def test_answers_of_one_s_own_are_found_as_well(known):
    made = make(jobs=[job("a", range(10), "math", new=2 * PAGE)], tokens=1000)
    while made.running or made.waiting:
        step = advance(made)
    text = [*range(10), *[7] * (2 * PAGE - 1)]
    made.waiting.append(job("b", [*text, 3], "math" if known else "code"))
    step = advance(made)
    assert step == [("b", len(text) + 1 - (2 * PAGE if known else 0))]
