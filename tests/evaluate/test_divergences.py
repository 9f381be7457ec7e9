from typing import Any

import pytest

from meswitch.errors import ConfigError
from meswitch.evaluate import Text, divergences, fidelity, total
from meswitch_lab.toy import draw, own_answers

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def texts(math_expert: Loaded) -> list[Text]:
    return own_answers(*math_expert, "math", 12, 7)


def test_the_texts_add_up_to_the_fidelity(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    found = list(divergences(base[0], math_expert[0], texts))
    assert [one.tokens for one in found] == [len(text.ids) - text.start for text in texts]
    assert total(found) == fidelity(base[0], math_expert[0], texts)
    assert all(one.kl > 0 and 0 <= one.agreeing <= one.tokens for one in found)


def test_each_text_has_its_own_figure_in_the_given_order(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    together = [one.kl for one in divergences(base[0], math_expert[0], texts, batch_tokens=256)]
    alone = [next(divergences(base[0], math_expert[0], [text])).kl for text in texts]
    assert together == pytest.approx(alone, rel=1e-3)


def test_no_text_has_no_total() -> None:
    with pytest.raises(ConfigError, match="no token to compare"):
        total([])


def test_own_answers_start_where_the_prompt_ends(math_expert: Loaded, texts: list[Text]) -> None:
    tokenizer = math_expert[1]
    for text, question in zip(texts, draw("math", 12, 7), strict=True):
        assert question.prompt in tokenizer.decode(text.ids[: text.start + 1])
        assert "####" in tokenizer.decode(text.ids[text.start + 1 :])
