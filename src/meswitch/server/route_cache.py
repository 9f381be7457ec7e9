"""Decisions of the router by what was asked, the least recently used forgotten first."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

ENTRY_BYTES = 512  # of a key, a decision and their places; 273 by tracemalloc, the rest is reserve


class RouteCache(Generic[T]):
    """At most `budget` bytes, counting ENTRY_BYTES an entry. For one thread."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[bytes, T] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, value: T) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while self.nbytes > self.budget:
            self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return len(self._entries) * ENTRY_BYTES


def key_of(turns: Sequence[str]) -> bytes:
    """32 bytes that stand for these texts in this order; nobody can make two conversations share them."""
    digest = hashlib.sha256()
    for turn in turns:
        raw = turn.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.digest()
