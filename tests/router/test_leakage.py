import pytest

from meswitch.router import RouterError, Row, find_leakage
from meswitch.router.data import drop_duplicates, hold_out, normal, shingles

TRAIN = [
    Row("What is the capital of France?", "instruct"),
    Row("Tom has 12 apples and buys 3 bags with 4 apples each. How many apples does Tom have now?", "math"),
    Row("List all employees of the sales department.", "sql"),
]


def leakage(*queries, domain="math"):
    return find_leakage(TRAIN, [Row(query, domain) for query in queries])


def test_equal_queries_are_found():
    assert leakage(TRAIN[0].query).exact == (0,)


def test_case_spaces_and_punctuation_do_not_hide_a_query():
    found = leakage("  what IS the   capital of france", "“List” all employees of the SALES department!")
    assert found.normalised == (0,)
    assert leakage("LIST all employees of the (sales) department!").normalised == (0,)


def test_a_changed_name_does_not_hide_a_query():
    text = TRAIN[1].query.replace("now?", "today?")
    assert leakage(text).near == (0,)


def test_other_queries_are_not_found():
    assert leakage("What is 3 + 4?", "What is the capital?", "Tom has a dog.").rows == ()


def test_another_domain_is_a_conflict():
    assert leakage(TRAIN[0].query, domain="math").conflicts == 1
    assert leakage(TRAIN[0].query, domain="instruct").conflicts == 0


def test_each_row_counts_once():
    found = leakage(TRAIN[0].query, TRAIN[0].query.upper())
    assert found.counts() == {"exact": 1, "normalised": 1, "near": 0, "conflicts": 2}
    assert found.rows == (0, 1)


def test_duplicates_keep_the_first():
    rows = [*TRAIN, Row("what is the capital of france", "other")]
    assert drop_duplicates(rows) == (TRAIN, 1)


def test_a_query_of_nothing_but_punctuation_is_itself():
    assert normal("???") == "???"
    assert normal("!!!") != normal("???")
    assert len(shingles("one two")) == 1


def test_the_held_out_rows_are_the_same_share_of_every_source(all_rows):
    seen, held_out = hold_out(all_rows, 0.1, seed=0)
    assert len(seen) + len(held_out) == len(all_rows)
    assert not {normal(row.query) for row in seen} & {normal(row.query) for row in held_out}
    for source in {row.source for row in all_rows}:
        mine = [row for row in all_rows if row.source == source]
        assert sum(row.source == source for row in held_out) == pytest.approx(len(mine) / 10, abs=len(mine) * 0.05 + 3)
    assert hold_out(all_rows, 0.1, seed=0)[1] == held_out
    assert hold_out(all_rows, 0.1, seed=1)[1] != held_out


def test_too_few_rows_to_hold_some_out():
    with pytest.raises(RouterError, match="none to calibrate on"):
        hold_out(TRAIN, 0.1, seed=0)
