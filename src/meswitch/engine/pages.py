"""Pages of the KV cache: which are free, who uses which, and which hold the beginning of a text that may come again.

A full page is known by a key: a SHA-256 chain over the owner's name and all tokens up to the page's end. The owner is
an expert in one version, or the base, so a page is never found by another expert's text. A page that nobody uses keeps
its contents until its place is needed; the one that was given back first goes first.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from meswitch.errors import CapacityError

PAGE = 64  # tokens


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def page_keys(owner: str, tokens: Sequence[int], known: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The key of each full page of a text that is not among those that are known.

    Args:
        owner: whose keys and values these are: an expert and its version, or the base.
        tokens: ids of the whole text.
        known: keys of its first pages.
    """
    last = known[-1] if known else hashlib.sha256(owner.encode()).digest()
    for start in range(len(known) * PAGE, len(tokens) - PAGE + 1, PAGE):
        last = hashlib.sha256(last + array("q", tokens[start : start + PAGE]).tobytes()).digest()
        yield last


class Pages:
    """The pages of one cache.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._empty = deque(range(count))
        self._kept: OrderedDict[int, None] = OrderedDict()  # without a user, first given back first
        self._key: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._empty) + len(self._kept)

    def take(self) -> int:
        """A page for one user; what it holds is forgotten.

        Raises:
            CapacityError: none is left.
        """
        if self._empty:
            page = self._empty.popleft()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page[self._key.pop(page)]
        else:
            raise CapacityError("no page of the KV cache is free")
        self._users[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page of this key for one more user, None if there is none."""
        page = self._page.get(key)
        if page is not None:
            self._users[page] += 1
            self._kept.pop(page, None)
        return page

    def know(self, page: int, key: bytes) -> None:
        """Say what a full page holds, unless it or another page is known for that."""
        if key not in self._page and page not in self._key:
            self._page[key] = page
            self._key[page] = key

    def give_back(self, pages: Sequence[int], *, forget: bool = False) -> list[int]:
        """One user's pages, in the order of the text. The end of a text is overwritten before its beginning.

        Args:
            forget: what they hold is not to be found any more.

        Returns:
            those that nobody uses now and nobody can find.
        """
        left = []
        for page in reversed(pages):
            self._users[page] -= 1
            if forget and page in self._key:
                del self._page[self._key.pop(page)]
            if not self._users[page]:
                if page in self._key:
                    self._kept[page] = None
                else:
                    left.append(page)
                    self._empty.append(page)
        return left
