"""Which tokens of which requests are in the next step.

A step holds the next token of every running request, and then parts of prompts, oldest request first, up to a number of
tokens. While requests decode, prompts get only as many tokens as take `PAUSE` seconds, so that no stream stands still
because others arrive. A request that finds no page for its next token gives its own pages back, if it came last, or
takes those of the one that came last, which is computed again later: some request always goes on.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meswitch.engine.attention import Piece
from meswitch.engine.pages import PAGE, Pages, page_keys, pages_for
from meswitch.engine.request import Listener
from meswitch.engine.sampling import SamplingParams, SamplingState

PAUSE = 0.1  # seconds of a step for prompts beside running answers
_LEAST = 16  # tokens of prompts in a step, however slow it is


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
        self.pages, self._max_tokens, self.max_requests = pages, max_tokens, max_requests
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # oldest first
        self.reused = 0  # tokens of prompts that were in the cache
        self.unsure: list[int] = []
        """Free pages whose numbers nobody has seen to be finite: to be cleared before the next step."""
        self._seconds_a_token = 0.0  # of prompts, as they were measured last

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
        left = self._max_tokens - len(step)
        if step and self._seconds_a_token:
            left = min(left, max(_LEAST, int(PAUSE / self._seconds_a_token)))
        for job in [job for job in self.running if job not in singles]:
            left -= self._add_prompt(step, job, left)
        while self.waiting and left > 0 and len(self.running) < self.max_requests and not is_full:
            job = self.waiting[0]
            if not self._admit(job):
                break
            self.waiting.popleft()
            self.running.append(job)
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
            self._seconds_a_token = seconds / sum(piece.length for _, piece in step)

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
