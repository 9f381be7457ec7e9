"""Log probabilities in OpenAI's two forms: of a chat, and of a text."""

from collections.abc import Sequence

from meswitch.engine.scores import TokenLogprobs
from meswitch.server.answers import ChatLogprobs, LogprobToken, TextLogprobs, TopLogprob
from meswitch.tokenizer import ChatTokenizer

_LEAST = -9999.0  # JSON has no infinity; vLLM writes the same


def chat_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: ChatTokenizer) -> ChatLogprobs:
    """As `/v1/chat/completions` has them."""

    def top(token: int, logprob: float) -> TopLogprob:
        spelt = tokenizer.token_bytes(token)
        return TopLogprob(token=spelt.decode(errors="replace"), logprob=max(logprob, _LEAST), bytes=list(spelt))

    return ChatLogprobs(
        content=[
            LogprobToken(
                **top(one.token, one.logprob).model_dump(),
                top_logprobs=[top(token, logprob) for token, logprob in one.top],
            )
            for one in tokens
        ]
    )


def text_logprobs(
    tokens: Sequence[TokenLogprobs | None], ids: Sequence[int], tokenizer: ChatTokenizer, top: int, start: int
) -> TextLogprobs:
    """As `/v1/completions` has them.

    Args:
        tokens: None for a prompt's first token, which nothing predicts.
        ids: of the tokens.
        tokenizer: of the expert.
        top: how many of the likeliest to name; the token itself is always named.
        start: characters before the first token.
    """
    names = [_name(token, tokenizer) for token in ids]
    offsets, at = [], start
    for name in names:
        offsets.append(at)
        at += len(name)
    tops: list[dict[str, float] | None] = []
    for one in tokens:
        if one is None:
            tops.append(None)
            continue
        found: dict[str, float] = {}
        for token, logprob in (*one.top[:top], (one.token, one.logprob)):
            found.setdefault(_name(token, tokenizer), max(logprob, _LEAST))
        tops.append(found)
    return TextLogprobs(
        tokens=names,
        token_logprobs=[None if one is None else max(one.logprob, _LEAST) for one in tokens],
        top_logprobs=tops,
        text_offset=offsets,
    )


def _name(token: int, tokenizer: ChatTokenizer) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two tokens look alike."""
    spelt = tokenizer.token_bytes(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
