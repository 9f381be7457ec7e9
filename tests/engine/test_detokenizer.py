"""Text that comes in pieces is the text that decoding everything at once gives."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meswitch.engine.request import Detokenizer
from meswitch.tokenizer import ChatTokenizer
from tests.support import tokenizers_of_all_kinds

KINDS = [(kind, clean) for kind in tokenizers_of_all_kinds.KINDS for clean in (False, True)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        (kind, clean): ChatTokenizer.open(
            kind, tokenizers_of_all_kinds.write(root / f"{kind}-{clean}", kind, clean=clean)
        )
        for kind, clean in KINDS
    }


def streamed(tokenizer, prompt, tokens, sizes):
    """The answer's text when its tokens come so many at a time."""
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces, start = [], 0
    while start < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.feed(tokens[start : start + size], last=start + size >= len(tokens)))
        start += size
    return "".join(pieces)


PROMPTS = ["Write the words", "don't", "a\n", "déjà", "x[0]", "<|user|>one<|end|>", "漢", "one,", ""]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(
    prompt=st.sampled_from(PROMPTS),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=24),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
@example(prompt="one", places=list(range(40)), sizes=[1])
@settings(max_examples=300, deadline=None)
def test_prompt_and_answer_are_what_both_decode_to_together(opened, kind, prompt, places, sizes):
    tokenizer = opened[kind]
    before = tokenizer.tokenizer(prompt).input_ids
    tokens = [place % (len(tokenizer.tokenizer) + 3) for place in places]  # a padded vocabulary has ids without text
    whole = tokenizer.decode(before + tokens)
    if whole.startswith(tokenizer.decode(before)):  # else no answer could be appended
        assert tokenizer.decode(before) + streamed(tokenizer, before, tokens, sizes) == whole


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(
    text=st.text(st.sampled_from("aé漢😀 .,'ntsverm?!\n▁<0x>"), max_size=40),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_text_survives_being_cut_anywhere(opened, kind, text, sizes):
    tokenizer = opened[kind]
    tokens = tokenizer.tokenizer(text, add_special_tokens=False).input_ids
    assert streamed(tokenizer, [], tokens, sizes) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
def test_hidden_tokens_and_broken_bytes_between_words(opened, kind):
    tokenizer = opened[kind, False]

    def ids(text):
        return tokenizer.tokenizer(text, add_special_tokens=False).input_ids

    end = ids("<|end|>")
    character = ids("漢字")
    answers = [
        ids("one two") + end + ids(" three"),
        end + ids("one"),
        character[:1] + ids("abc def"),
        character + character[:1] + end + ids(" x"),
        ids("x") + character[:2],
        ids("    x = 1\n\n  y"),
    ]
    for before in (ids("Write"), ids("<|user|>"), []):
        for answer in answers:
            whole = tokenizer.decode(before + answer)
            assert tokenizer.decode(before) + streamed(tokenizer, before, answer, [1]) == whole


def test_text_is_sent_as_soon_as_it_cannot_change(opened):
    tokenizer = opened["sentencepiece", False]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("Write"))
    tokens = tokenizer.tokenizer("the words 漢, one", add_special_tokens=False).input_ids
    pieces = [detokenizer.feed([token]) for token in tokens]
    assert "".join(pieces) == " the words 漢, one"
    waiting = [token in tokenizer.byte_tokens for token in tokens]
    assert [not piece for piece in pieces] == waiting
