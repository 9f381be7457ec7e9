"""Conversations: when a running one may change hands.

The router scores single turns. A follow-up says little alone: "make it shorter" is for whoever wrote it, "thanks" is
for nobody, "and now in Python" may be for somebody else. So the user's turns are read in their order, each with the
expert of the turn before: a newcomer must lead clearly to take over (hysteresis), and a turn that asks for nothing or
only refers back keeps whoever answered. Nothing is remembered between requests: the history is in the request.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Reason = Literal["scored", "abstained", "kept"]

STAY = 0.25  # probability by which a newcomer must lead to take over a conversation
STAY_BACK = 0.5  # the same where the turn refers back to what was said
TURNS = 8  # user turns that are read, the last ones

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
# Turns made of nothing but these words ask for no work.
_NOTHING = """
thanks thank thx ty cheers you u so very much many a lot that that's is that was this it it's great good nice cool
perfect awesome excellent wonderful super brilliant fine ok okay k alright right got i see understood sure yes yeah
yep no nope not really hi hello hey bye goodbye later helpful help for the your of course well done wow haha lol
hmm oh ah makes sense love job answer appreciate are been
"""
_SMALL_TALK = frozenset(_NOTHING.split())
# Words that point at what was said before.
_BACK = re.compile(
    r"^(?:and|but|now|also|so|then|or|again|why|what about|how about|what if|can you|could you|are you|try)\b"
    r"|\b(?:it|that|them|those|these|this one|the (?:same|first|second|third|last|previous|above|other) ?\w*|instead|"
    r"again|shorter|longer|simpler|more|another|your|you said|you)\b",
    re.IGNORECASE,
)
_SHORT = 12  # words; a longer turn stands on its own


def asks_for_nothing(text: str) -> bool:
    """Whether a turn is thanks, a greeting or a nod."""
    words = [word.lower() for word in _WORD.findall(text)]
    return 0 < len(words) <= 8 and "?" not in text and all(word in _SMALL_TALK for word in words)


def refers_back(text: str) -> bool:
    """Whether a turn can hardly be understood without the ones before."""
    words = _WORD.findall(text)
    return len(words) <= _SHORT and (len(words) <= 3 or _BACK.search(text.strip()) is not None)


def settle(
    turns: Sequence[tuple[str, Mapping[str, float]]], experts: Sequence[str], threshold: float
) -> tuple[str | None, Reason]:
    """Who answers the last of the user's turns (text and scores each, oldest first); None: nobody, it abstains."""
    holder: str | None = None
    reason: Reason = "abstained"
    for text, scores in turns:
        holder, reason = next_holder(holder, text, scores, experts, threshold)
    return holder, reason


def next_holder(
    holder: str | None, text: str, scores: Mapping[str, float], experts: Sequence[str], threshold: float
) -> tuple[str | None, Reason]:
    """Who answers this turn after `holder` answered the one before; None: nobody yet, or the fallback."""
    best = max(experts, key=lambda name: scores[name])  # ties go to the first named
    sure = scores[best] >= threshold
    if holder is None:
        return (best, "scored") if sure else (None, "abstained")
    if asks_for_nothing(text):
        return holder, "kept"
    back = refers_back(text)
    if best == holder:
        return (holder, "scored") if sure else ((holder, "kept") if back else (None, "abstained"))
    if sure and scores[best] - scores[holder] >= (STAY_BACK if back else STAY):
        return best, "scored"
    return (None, "abstained") if not sure and not back else (holder, "kept")
