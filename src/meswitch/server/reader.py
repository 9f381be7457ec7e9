"""A chat answer's text -> thoughts, what is said, and calls of tools; a piece at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meswitch.server.tools import ToolCall, ToolFormat

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer; `text` of thoughts and of what is said, `call` of a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class AnswerReader:
    """Reads one answer. What it gives, joined, is the whole text: what cannot be read as a call is said.

    Args:
        thinks: whether the model may begin with `<think>`.
        thinking: whether its prompt ends with `<think>` already.
        tools: how it writes calls; None if there are no tools.
        names: of the tools. A call that stands alone, without a mark, counts only if it names one.
        forced: whether the answer is one call as JSON, and nothing else.
        one: whether calls after the first are left out.
    """

    def __init__(
        self,
        *,
        thinks: bool = False,
        thinking: bool = False,
        tools: ToolFormat | None = None,
        names: Sequence[str] = (),
        forced: bool = False,
        one: bool = False,
    ) -> None:
        self._tools, self._names, self._forced, self._one = tools, set(names), forced, one
        self._state: Literal["beginning", "thinking", "thought", "saying", "calling"]
        self._state = "thinking" if thinking else "beginning" if thinks else "saying"
        self._said = ""  # everything since the thoughts
        self._held = ""
        self.called = 0
        """How many calls it gave."""

    def feed(self, text: str, *, last: bool = False) -> list[Part]:
        """New text -> new parts. last: nothing waits any longer."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts, last):
            pass
        return [part for part in parts if part.text or part.call]

    def _step(self, parts: list[Part], last: bool) -> bool:
        """Take some of the held text; False if more is needed."""
        if self._state == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._state, self._held = "thinking", begun.removeprefix(THINK)
                return True
            if THINK.startswith(begun) and not last:
                return False
            self._state = "saying"
            return True
        if self._state == "thinking":
            before, found, after = self._held.partition(THOUGHT)
            kept = 0 if found or last else _begun(self._held, THOUGHT)
            text = before[: len(before) - kept]
            text = text if last and not found else text.rstrip("\n")
            parts.append(Part("reasoning", text))
            self._held = after if found else before[len(text) :]
            if found:
                self._state = "thought"
            return bool(found)
        if self._state == "thought":
            self._held = self._held.lstrip("\n")
            if not self._held and not last:
                return False
            self._state = "saying"
            return True
        if self._tools is None and not self._forced:
            parts.append(self._say(self._held))
            return False
        if self._forced or (self._tools is not None and not self._tools.start):
            return self._take_whole(parts, last)
        return self._take_marked(parts, last)

    def _say(self, text: str) -> Part:
        self._held = self._held[len(text) :]
        self._said += text
        return Part("content", text)

    def _take_whole(self, parts: list[Part], last: bool) -> bool:
        """An answer that is a call, or none, from its first character on."""
        assert self._tools is not None
        body = self._held.lstrip()
        mark = next((mark for mark in self._tools.shown if body.startswith(mark)), "")
        may_call = not self._said and (not body or body[0] in "{[" or mark or self._is_begun_mark(body))
        if may_call and not last:
            return False
        calls = self._tools.calls(body.removeprefix(mark)) if may_call and body else []
        if calls and all(call.name in self._names for call in calls):
            self._held = ""
            self._give(parts, calls)
        else:
            parts.append(self._say(self._held))
        return False

    def _is_begun_mark(self, body: str) -> bool:
        assert self._tools is not None
        return any(mark.startswith(body) for mark in self._tools.shown)

    def _take_marked(self, parts: list[Part], last: bool) -> bool:
        assert self._tools is not None
        start, end = self._tools.start, self._tools.end
        if self._state == "saying":
            before, found, _ = self._held.partition(start)
            kept = 0 if last else _begun(self._held, start)
            if not found:
                before = before[: len(before) - kept]
                parts.append(self._say(before if last else before.rstrip()))  # before a call spaces are no text
                return False
            parts.append(self._say(before.rstrip()))
            self._held = self._held.lstrip()
            self._state = "calling"
            return True
        body = self._held.removeprefix(start)
        place = body.find(end) if end else (len(body) if last else -1)
        if place < 0 and not last:
            return False
        calls = self._tools.calls(body[:place]) if place >= 0 else self._tools.calls(body)
        self._state = "saying"
        if not calls:
            parts.append(self._say(self._held[: len(start) + max(place, 0) + len(end)] if place >= 0 else self._held))
            return bool(self._held)
        self._held = body[place + len(end) :].lstrip() if place >= 0 else ""
        self._give(parts, calls)
        return bool(self._held)

    def _give(self, parts: list[Part], calls: Sequence[ToolCall]) -> None:
        for call in calls:
            if not (self._one and self.called):
                parts.append(Part("call", call=call))
                self.called += 1


def _begun(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
