"""What every router has in common: scores over the experts, and the decision made from them.

A router gives each query a probability for every expert. One that has learnt what none of its experts is for adds the
label `other`, so that the numbers always sum to one. The decision is the same for all routers: the best expert
answers if its probability reaches the threshold; otherwise the router abstains and the fallback answers.

A router scores single turns. A follow-up says little alone: "make it shorter" is for whoever wrote it, "thanks" is
for nobody, "and now in Python" may be for somebody else. So the user's turns are read in their order, each with the
expert of the turn before: another expert must lead clearly to take over (hysteresis), and a turn that asks for nothing
or only refers back keeps whoever answered. Nothing is remembered between requests: the history is in the request."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from meswitch.errors import ConfigError, MeswitchError

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
TEXT_LIMIT = 4096  # characters of a query that are read; keeps the time of one bounded
OTHER = "other"  # the label of queries that none of the experts is for
Messages = Sequence[Mapping[str, Any]]  # OpenAI chat messages: {"role": ..., "content": ...}


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


class RouterError(MeswitchError):
    """A router on disk, or its training data, is incomplete, damaged or made for something else."""


@dataclass(frozen=True, slots=True)
class Route:
    """One decision.

    Args:
        choice: who answers, an expert's name or the fallback's.
        scores: label -> probability, summing to one, of the last turn.
        margin: the best expert's probability less the second best's.
        reason: `scored`; `abstained` if the best expert's probability is below the threshold; `kept` if the expert of
            the turn before keeps the conversation.
        latency_ms: wall time; of a batch, the time of one query's share.
    """

    choice: str
    scores: dict[str, float]
    margin: float
    reason: Reason
    latency_ms: float


@dataclass(frozen=True, slots=True)
class RouteOption:
    """One route to choose from.

    Args:
        name: what is answered.
        description: what it is for, in a sentence or two.
        examples: queries for it; five different ones do much.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()


class Router(ABC):
    """Scores over `experts`; `threshold` and `fallback` decide what an unsure score leads to."""

    experts: tuple[str, ...]
    threshold: float
    fallback: str
    unknown: ClassVar[str] = ""  # what to do about experts that a router on disk does not know, but to train it again

    @classmethod
    def upgraded(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        """What `router.json` of an older version says, as this version says it."""
        return data

    @abstractmethod
    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        """For each conversation a probability for every expert, and for `other` if the router knows that label.

        Raises:
            ConfigError: a conversation without any text.
        """

    def with_expert(self, option: RouteOption) -> "Router":
        """This router with one more expert, or with other things said of one that it knows.

        Raises:
            RouterError: too little is said of it, or this kind learns nothing without being trained again.
        """
        if option.name in self.experts:
            return self
        raise RouterError(
            f"domain: {option.name!r}: a router of the kind {type(self).__name__} must be trained again for one more "
            "expert; `meswitch router train`"
        )

    def inputs(self, query: str | Messages) -> list[str]:
        """The texts that the decision depends on: two queries with equal ones get the same answer."""
        return user_turns(as_messages(query))

    def route(self, query: str | Messages) -> Route:
        """Who answers this query (a text is one user message)?"""
        return self.route_batch([query])[0]

    def route_batch(self, queries: Sequence[str | Messages]) -> list[Route]:
        """`route` of many queries at once; the results are the same, the time is less.

        Of a conversation every user turn is scored alone, and the last one is decided in the light of the others:
        see `meswitch.router.base`.
        """
        start = time.perf_counter()
        turns = [user_turns(as_messages(query)) for query in queries]
        scored = self.scores([as_messages(text) for texts in turns for text in texts])
        latency_ms = (time.perf_counter() - start) * 1e3 / max(1, len(turns))
        found = iter(scored)
        return [self._route([(text, next(found)) for text in texts], latency_ms) for texts in turns]

    def decide(self, scores: dict[str, float], latency_ms: float = 0.0) -> Route:
        """The decision that follows from the scores of one query."""
        return self._route([("", scores)], latency_ms)

    def _route(self, turns: list[tuple[str, dict[str, float]]], latency_ms: float) -> Route:
        holder, reason = settle(turns, self.experts, self.threshold)
        scores = turns[-1][1]
        ranked = sorted((scores[name] for name in self.experts), reverse=True)
        margin = ranked[0] - (ranked[1] if len(ranked) > 1 else 0.0)
        return Route(self.fallback if holder is None else holder, scores, margin, reason, latency_ms)


def as_messages(query: str | Messages) -> Messages:
    """A plain query as a conversation of one user message."""
    return [{"role": "user", "content": query}] if isinstance(query, str) else query


def text_of(messages: Messages) -> str:
    """What the user asks now: the last of `user_turns`."""
    return user_turns(messages)[-1]


def user_turns(messages: Messages) -> list[str]:
    """The texts of the user's messages, oldest first, the last `TURNS` (the last message if none is the user's).

    Content may be a string or OpenAI content parts, of which the text parts count. Of earlier messages those without
    text are left out.

    Raises:
        ConfigError: no messages, or content of another form in the last one.
    """
    if not messages:
        raise ConfigError("messages: empty; routing needs at least one message")
    asked = [message for message in messages if message.get("role") == "user"] or list(messages[-1:])
    texts = [_text(message.get("content")) for message in asked[-TURNS:]]
    if texts[-1] is None:
        raise ConfigError(
            f"messages: content of the last user message is {asked[-1].get('content')!r:.40}; give a text"
        )
    return [text for text in texts if text is not None]


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(
            str(part.get("text", "")) for part in content if isinstance(part, Mapping) and part.get("type") == "text"
        )
    return None


def clip(text: str) -> str:
    """A long text's beginning and end: that is where people say what they want."""
    if len(text) <= TEXT_LIMIT:
        return text
    head = TEXT_LIMIT * 3 // 4
    return f"{text[:head]}\n{text[head - TEXT_LIMIT :]}"
