"""Pages of the KV cache: nobody gets a page of another, and a known beginning is found by its owner alone."""

import random

import pytest

from meswitch.engine.attention import PAGE, Pages, page_keys
from meswitch.errors import CapacityError

TEXT = list(range(3 * PAGE + 5))


def test_a_key_is_of_an_owner_and_of_all_tokens_up_to_the_page_s_end():
    keys = list(page_keys("math", TEXT))
    assert len(keys) == 3
    assert keys[:2] == list(page_keys("math", TEXT[: 2 * PAGE]))
    assert not set(keys) & set(page_keys("code", TEXT))
    other = [TEXT[0] + 1, *TEXT[1:]]
    assert not set(keys) & set(page_keys("math", other))


def test_keys_go_on_where_they_are_known():
    keys = list(page_keys("math", TEXT))
    assert list(page_keys("math", TEXT, keys[:1])) == keys[1:]
    assert list(page_keys("math", TEXT, keys)) == []


def test_a_known_page_is_found_after_its_user_has_left_and_while_others_use_it():
    pages = Pages(4)
    mine = pages.take()
    pages.know(mine, b"a")
    assert pages.find(b"a") == mine
    pages.give_back([mine])
    pages.give_back([mine])
    assert pages.available == 4
    assert pages.find(b"a") == mine
    assert pages.available == 3
    assert pages.find(b"b") is None


def test_what_was_given_back_first_is_overwritten_first_and_the_end_of_a_text_before_its_beginning():
    pages = Pages(4)
    texts = [[pages.take(), pages.take()] for _ in range(2)]
    for number, text in enumerate(texts):
        for place, page in enumerate(text):
            pages.know(page, bytes([number, place]))
    for text in texts:
        pages.give_back(text)
    assert [pages.take() for _ in range(4)] == [page for text in texts for page in reversed(text)]
    assert pages.find(b"\0\0") is None


def test_what_is_forgotten_is_not_found():
    pages = Pages(2)
    mine = pages.take()
    pages.know(mine, b"a")
    assert pages.give_back([mine], forget=True) == [mine]
    assert pages.find(b"a") is None


def test_there_are_no_more_pages_than_there_are():
    pages = Pages(1)
    pages.take()
    with pytest.raises(CapacityError, match="no page"):
        pages.take()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_a_page_has_one_owner_and_none_is_lost(seed):
    draw = random.Random(seed)
    pages, held, content = Pages(12), [], {}
    for _ in range(2000):
        action = draw.random()
        if action < 0.5 and pages.available:
            key = bytes([draw.randrange(20)])
            page = pages.find(key)
            if page is None:
                page = pages.take()
                assert not any(page in text for text in held)
                content[page] = key
                pages.know(page, key)
            assert content[page] == key
            held.append([page])
        elif held:
            pages.give_back(held.pop(draw.randrange(len(held))), forget=draw.random() < 0.2)
        assert pages.available == 12 - len({page for text in held for page in text})
