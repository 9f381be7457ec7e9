"""Rules that decide before any model is asked: by the request's headers and metadata, or by patterns in the text."""

import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from meswitch.jsonfile import Decoder
from meswitch.router.base import OTHER, Messages, Route, RouteOption, Router, RouterError, as_messages, clip, text_of
from meswitch.router.store import (
    OpenOptions,
    check_members,
    check_no_tensors,
    open_member,
    register_router,
    write_router,
)


@dataclass(frozen=True)
class RoutingRequest(Sequence[Mapping[str, Any]]):
    """A conversation with what came along with it: pass it to a router in place of the messages.

    Args:
        headers: names in any case.
        metadata: OpenAI's `metadata` field, a flat object. Routers without rules see only the messages.
    """

    messages: Messages
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        return self.messages[index]

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.messages)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. choose: an expert's name, or `other` for the fallback.

    Args:
        field: `text` (what the user asks), `system` (the system message), `header:NAME` or `metadata:NAME` of the
            request.
        pattern: a regular expression that is searched there.
    """

    choose: str
    field: str
    pattern: str


@dataclass(frozen=True, slots=True)
class RulesFile:
    """`router.json` of rules; the router for what no rule decides, if there is one, is the directory `router`."""

    kind: str
    experts: tuple[str, ...]
    rules: tuple[Rule, ...]
    members: dict[str, str]
    tensors_sha256: str = ""


@register_router("rules")
class RulesRouter(Router):
    """The first rule that matches decides; what none matches goes to `router`, or abstains if there is none.

    Raises:
        RouterError: no rules, a pattern that is not valid, an unknown field, or a choice that is no expert.
    """

    file = RulesFile

    def __init__(
        self,
        rules: Sequence[Rule],
        experts: Sequence[str],
        router: Router | None = None,
        *,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        if router is not None and set(router.experts) != set(experts):
            raise RouterError(
                f"experts: the rules are for {', '.join(experts)}, the router knows {', '.join(router.experts)}"
            )
        if not rules:
            raise RouterError("rule: none; a rules router needs at least one")
        self.experts = tuple(experts)
        self.labels = (*self.experts, OTHER)
        self.rules = tuple(rules)
        self.router = router
        self.fallback = fallback
        inner = 0.5 if router is None else router.threshold
        self.threshold = inner if threshold is None else threshold
        self._compiled = [_compile(rule, number, self.labels) for number, rule in enumerate(self.rules)]

    def match(self, messages: Messages) -> Rule | None:
        """The rule that decides this conversation."""
        for rule, pattern in zip(self.rules, self._compiled, strict=True):
            value = _value(rule.field, messages)
            if value is not None and pattern.search(value):
                return rule
        return None

    def inputs(self, query: str | Messages) -> list[str]:
        """What the rules look at, there or not, and what the router behind them does."""
        messages = as_messages(query)
        looked_at = [_value(rule.field, messages) for rule in self.rules]
        return [*("" if value is None else f"={value}" for value in looked_at), *super().inputs(messages)]

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        matched = [self.match(messages) for messages in messages_batch]
        rest = [i for i, rule in enumerate(matched) if rule is None]
        decided = [dict.fromkeys(self.labels, 0.0) | {rule.choose if rule else OTHER: 1.0} for rule in matched]
        if self.router is not None and rest:
            for i, scores in zip(rest, self.router.scores([messages_batch[i] for i in rest]), strict=True):
                decided[i] = dict.fromkeys(self.labels, 0.0) | scores
        return decided

    def route_batch(self, queries: Sequence[str | Messages]) -> list[Route]:
        """As every router does; but a rule is matched against the whole request, not against each turn alone."""
        start = time.perf_counter()
        matched = [self.match(as_messages(query)) for query in queries]
        latency_ms = (time.perf_counter() - start) * 1e3 / max(1, len(queries))
        rest = iter(super().route_batch([query for query, rule in zip(queries, matched, strict=True) if rule is None]))
        return [
            next(rest)
            if rule is None
            else self.decide(dict.fromkeys(self.labels, 0.0) | {rule.choose: 1.0}, latency_ms)
            for rule in matched
        ]

    def with_expert(self, option: RouteOption) -> "RulesRouter":
        if self.router is None:
            if option.name in self.experts:
                return self
            raise RouterError(
                f"rule: none chooses {option.name!r}, and there is no router behind the rules; add a [[rule]] for it"
            )
        behind = self.router.with_expert(option)
        if behind is self.router and option.name in self.experts:
            return self
        names = tuple(dict.fromkeys((*self.experts, option.name)))
        own = None if self.threshold == self.router.threshold else self.threshold
        return RulesRouter(self.rules, names, behind, fallback=self.fallback, threshold=own)

    def save(self, path: str | Path) -> None:
        """Write the rules, and the router behind them, as a directory in one step.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        members = {} if self.router is None else {"router": self.router}
        write_router(Path(path), RulesFile("rules", self.experts, self.rules, {}), {}, members)  # type: ignore[arg-type]

    @classmethod
    def open(cls, directory: Path, file: RulesFile, given: OpenOptions) -> "RulesRouter":
        """
        Raises:
            RouterError: damaged, or the router behind is not the one that it was saved with.
        """
        check_no_tensors(directory, file)
        names = ("router",) if file.members else ()
        check_members(directory, file, names)
        behind = open_member(directory / "router", given) if names else None
        try:
            return cls(file.rules, file.experts, behind, fallback=given.fallback, threshold=given.threshold)
        except RouterError as error:
            raise RouterError(f"{directory}: {error}") from None


def read_rules(path: str | Path) -> list[Rule]:
    """Rules from a TOML file of `[[rule]]` tables with `choose`, `field` and `pattern`.

    Raises:
        RouterError: no such file, not TOML, or a rule with a field that is missing, unknown or of another type.
    """
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RouterError(f"{file}: no such file; give a TOML file of [[rule]] tables") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RouterError(f"{file}: not valid TOML ({error})") from None
    unknown = data.keys() - {"rule"}
    if unknown or not isinstance(data.get("rule"), list):
        raise RouterError(f"{file}: {min(unknown, default='rule')}: expected [[rule]] tables and nothing else")
    decoder = Decoder(file, RouterError, "a rule has choose, field and pattern", complete=True)
    rules: list[Rule] = [decoder.decode(Rule, item, f"rule[{i}]") for i, item in enumerate(data["rule"])]
    return rules


def _compile(rule: Rule, number: int, labels: Sequence[str]) -> "re.Pattern[str]":
    where = f"rule[{number}]"
    if rule.choose not in labels:
        raise RouterError(f"{where}.choose: {rule.choose!r} is none of {', '.join(labels)}")
    kind, _, name = rule.field.partition(":")
    if not ((kind in ("text", "system") and not name) or (kind in ("header", "metadata") and name)):
        raise RouterError(f"{where}.field: {rule.field!r} is none of text, system, header:NAME and metadata:NAME")
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise RouterError(f"{where}.pattern: {rule.pattern!r} is no regular expression ({error})") from None


def _value(field_name: str, messages: Messages) -> str | None:
    """What a rule looks at; None if it is not there, and then the rule does not match."""
    kind, _, name = field_name.partition(":")
    if kind == "text":
        return clip(text_of(messages))
    if kind == "system":
        system = [message for message in messages if message.get("role") in ("system", "developer")]
        return clip(text_of(system)) if system else None
    if not isinstance(messages, RoutingRequest):
        return None
    if kind == "header":
        return next((value for key, value in messages.headers.items() if key.lower() == name.lower()), None)
    return str(messages.metadata[name]) if name in messages.metadata else None
