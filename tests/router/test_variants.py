from meswitch.router import Row
from meswitch.router.data import as_sentences, disguises, in_lower_case, without_labels
from meswitch.router.embedding import WIDTH, style


def test_a_label_that_many_rows_of_a_domain_open_with_is_left_out_of_copies():
    rows = [Row(f"Write a SQL query: rivers of {i}", "sql") for i in range(5)]
    rows += [Row("Note: buy milk", "other"), Row("rivers", "sql")]
    copies = without_labels(rows)
    assert [i for i, _ in copies] == [0, 1, 2, 3, 4]
    assert copies[3][1] == Row("rivers of 3", "sql")


def test_copies_in_lower_case_are_made_of_what_is_not():
    assert in_lower_case([Row("How Many?", "sql"), Row("how many", "sql")]) == [(0, Row("how many", "sql"))]


def test_copies_as_sentences_are_made_of_what_has_neither_capital_nor_mark():
    rows = [Row("what should i do", "other"), Row("set an alarm", "other"), Row("Stop", "other"), Row("stop!", "other")]
    assert as_sentences(rows) == [(0, Row("What should I do?", "other")), (1, Row("Set an alarm.", "other"))]


def test_a_row_is_disguised_without_its_label_and_in_the_other_way_of_writing():
    rows = [Row(f"Query: rivers of {i}", "sql") for i in range(5)] + [Row("Stop", "other"), Row("2", "other")]
    found = disguises(rows)
    assert [row.query for row in found[3]] == ["rivers of 3", "query: rivers of 3", "Rivers of 3."]
    assert [row.query for row in found[5]] == ["stop"]
    assert [row.query for row in found[6]] == ["2."]


def test_style_sees_the_form_and_not_the_words():
    found = style(["What is the river?", "What is the table?", "def f(x):\n  return 3", ""])
    assert found.shape == (4, WIDTH)
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()
    assert found.isfinite().all()
