"""Which tokens of which requests are in the next step.

A step holds the next token of every running request, and then parts of prompts, oldest request first, up to a number of
tokens. After the oldest that waits, those come next whose experts have prompts in the step already: an expert's weights
are restored once for all of its tokens in a step, which takes longer than their products. While requests decode, a step
gets only as many tokens of prompts as let it take `PAUSE` seconds, so that no stream stands still because others
arrive. A request that finds no page for its next token gives its own pages back, if it came last, or takes those of the
one that came last, which is computed again later: some request always goes on.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meswitch.engine.attention import PAGE, Pages, Piece, page_keys, pages_for
from meswitch.engine.request import Listener
from meswitch.engine.sampling import SamplingParams, SamplingState

PAUSE = 0.1  # seconds of a step with prompts beside running answers
_NEAR = 64  # requests that wait, among which others of an expert are looked for
_LEAST = 16  # tokens of prompts in a step, however slow it is
_KEPT = 0.98  # of what a step counts for, after another one
_ALIKE = 0.002  # of the mean square: steps whose sizes vary less say nothing of what a token takes


@dataclass(slots=True)
class Pace:
    """What a step with prompts takes, `fixed + tokens x slope` seconds, by the steps that were measured last.

    A GPU's steps take nearly the same time for 10 tokens and for 500, a CPU's time grows with each token. So both
    numbers are fitted, by least squares in which a step counts for less with each one after it.
    """

    _sums: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, n, s, n n, n s
    _largest: float = 0.0  # step of late
    _last: tuple[int, float] = (0, 0.0)  # step: tokens, seconds

    def add(self, tokens: int, seconds: float) -> None:
        self._last = tokens, seconds
        self._largest = max(_KEPT * self._largest, tokens)
        own = 1.0, tokens, seconds, tokens * tokens, tokens * seconds
        one, n, s, nn, ns = (_KEPT * total + new for total, new in zip(self._sums, own, strict=True))
        self._sums = one, n, s, nn, ns

    def within(self, seconds: float) -> float:
        """How many tokens a step may have to take so long; infinite where nothing is known.

        At most four times as many as the largest step of late had: what more of them take is seen step by step. Where
        all steps were alike, half as many again, so that the next one tells. Where even a step of few tokens takes
        longer than half of the time, the tokens have the other half.

        If the last step took less than half of the time, the next may have half as many tokens again, whatever the
        steps before say: among them may be one that waited for something else, such as a kernel that was compiled.
        """
        if not self._sums[0]:
            return float("inf")
        tokens, took = self._last
        return max(self._fitted(seconds), 1.5 * tokens if took < seconds / 2 else 0.0)

    def _fitted(self, seconds: float) -> float:
        """`within` by the line, and by the steps' mean where they do not tell a line."""
        one, n, s, nn, ns = self._sums
        spread = nn / one - (n / one) ** 2
        if spread < _ALIKE * nn / one:
            return 1.5 * min(n / one, seconds * n / s) if s else 4 * self._largest
        slope = (ns / one - n / one * s / one) / spread
        fixed = max(0.0, s / one - slope * n / one)
        most = 4 * self._largest
        return min(most, max(seconds - fixed, seconds / 2) / slope) if slope > 0 else most


@dataclass(eq=False)
class Job:
    """A request in the batch.

    Args:
        id: of the request.
        tokens: of the prompt, then also those that were made.
        slot: of the expert store, or the base's.
        owner: whose keys and values these are; only requests of one owner share pages.
        params: how it is continued.
        ends: tokens that end the answer.
        listener: is told what was made.
        sampling: what chooses its tokens; made of `params` if it is not given.
    """

    id: str
    tokens: list[int]
    slot: int
    owner: str
    params: SamplingParams
    ends: frozenset[int]
    listener: Listener
    sampling: SamplingState | None = None
    prompt: int = 0  # tokens
    computed: int = 0  # tokens whose keys and values are in the cache
    seen: int = 0  # of these, those whose numbers have been seen to be finite
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages
    known: int = 0  # pages that the cache knows by key

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        if self.sampling is None:
            self.sampling = SamplingState(self.params, list(self.tokens), self.ends)

    @property
    def state(self) -> SamplingState:
        """Of its sampling."""
        assert self.sampling is not None
        return self.sampling

    @property
    def made(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def is_complete(self) -> bool:
        made = len(self.tokens) - self.prompt
        return made >= self.params.max_new_tokens or (made > 0 and self.tokens[-1] in self.ends)


class Scheduler:
    """The requests of one running batch, and their pages.

    Args:
        pages: of the KV cache.
        max_tokens: of a step.
        max_requests: of a step.
    """

    def __init__(self, pages: Pages, max_tokens: int, max_requests: int) -> None:
        self.pages, self.max_tokens, self.max_requests = pages, max_tokens, max_requests
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # oldest first
        self.reused = 0  # tokens of prompts that were in the cache
        self.unsure: list[int] = []
        """Free pages whose numbers nobody has seen to be finite: to be cleared before the next step."""
        self.pace = Pace()

    def plan(self) -> list[tuple[Job, Piece]]:
        """The next step: requests of one token first. Empty if nothing can be done."""
        singles = [job for job in self.running if len(job.tokens) - job.computed == 1]
        before = len(self.running)
        for job in singles:
            if job in self.running:  # it has not lost its pages to an older one
                self._make_room(job)
        is_full = len(self.running) < before
        singles = [job for job in singles if job in self.running]
        step = [(job, Piece(1, job.computed, job.pages)) for job in singles]
        left = self.max_tokens - len(step)
        if step:
            left = int(min(left, max(_LEAST, self.pace.within(PAUSE) - len(step))))
        for job in [job for job in self.running if job not in singles]:
            left -= self._add_prompt(step, job, left)
        slots: set[int] = set()  # of experts with prompts in the step, once the oldest that waits is among them
        while self.waiting and left > 0 and len(self.running) < self.max_requests and not is_full:
            near = itertools.islice(self.waiting, _NEAR) if slots else ()
            job = next((job for job in near if job.slot in slots), self.waiting[0])
            if not self._admit(job):
                if job is self.waiting[0]:
                    break
                slots.remove(job.slot)  # one that came later must not stop those before it
                continue
            self.waiting.remove(job)
            self.running.append(job)
            slots = slots or {one.slot for one, piece in step if piece.length > 1}
            slots.add(job.slot)
            left -= self._add_prompt(step, job, left)
        # rows of one owner lie side by side; the last token of a prompt is one of one token, too
        step.sort(key=lambda item: (item[1].length > 1, item[0].slot))
        return step

    def _add_prompt(self, step: list[tuple[Job, Piece]], job: Job, left: int) -> int:
        count = min(left, len(job.tokens) - job.computed)
        if count <= 0 or len(step) >= self.max_requests:
            return 0
        step.append((job, Piece(count, job.computed, job.pages)))
        return count

    def _admit(self, job: Job) -> bool:
        """Give a waiting job pages for its text and one token, known ones first; False if there are not enough."""
        job.keys += page_keys(job.owner, job.tokens, job.keys)
        found: list[int] = []
        known = (len(job.tokens) - 1) // PAGE  # one token at least is computed, for its logits
        for key in () if job.state.scores_prompt else job.keys[:known]:
            page = self.pages.find(key)
            if page is None:
                break
            found.append(page)
        more = pages_for(len(job.tokens) + 1) - len(found)
        if more > self.pages.available:
            self.pages.give_back(found)
            return False
        job.known = len(found)
        job.computed = job.seen = len(found) * PAGE
        job.pages = found + [self.pages.take() for _ in range(more)]
        self.reused += job.computed
        return True

    def _make_room(self, job: Job) -> None:
        """Give a running job a page for its next token, taken from the one that came last; that may be itself."""
        while job in self.running and len(job.pages) < pages_for(job.computed + 1):
            if self.pages.available:
                job.pages.append(self.pages.take())
            else:
                self._preempt(self.running[-1])

    def _preempt(self, job: Job) -> None:
        """Let a job wait again; its text is computed anew, without what the cache still knows of it."""
        self.running.remove(job)
        self.waiting.appendleft(job)
        self._drop_pages(job)

    def _drop_pages(self, job: Job, *, failed: bool = False) -> None:
        left = self.pages.give_back(job.pages, forget=failed)
        if failed or job.computed > job.seen:
            self.unsure += left
        job.pages, job.computed, job.seen, job.known = [], 0, 0, 0

    def done(self, step: Sequence[tuple[Job, Piece]], seconds: float) -> None:
        """Say that a step's keys and values are in the cache. seconds: what it took."""
        for job, piece in step:
            job.computed = piece.past + piece.length
        prompts = sum(piece.length for _, piece in step if piece.length > 1)
        if prompts >= _LEAST:
            self.pace.add(sum(piece.length for _, piece in step), seconds)

    def know(self, job: Job) -> None:
        """Let others find a job's full pages, whose numbers have been seen to be finite."""
        job.seen = job.computed
        full = job.computed // PAGE
        if full > job.known:
            job.keys += page_keys(job.owner, job.tokens[: full * PAGE], job.keys)
            for number in range(job.known, full):
                self.pages.know(job.pages[number], job.keys[number])
            job.known = full

    def remove(self, job: Job, *, failed: bool = False) -> None:
        """Take a job out. failed: its numbers are not to be found again."""
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        self._drop_pages(job, failed=failed)
