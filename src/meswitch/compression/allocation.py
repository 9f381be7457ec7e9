"""Bits and salient channels for each tensor under one budget of bytes.

Every tensor offers a few ways to be stored, each with its bytes and with the harm it is expected to do to the whole
model. Harms add up, so the best mix under a budget takes the tensors' convex hulls in the order of harm avoided per
byte: the Lagrangian solution, as Delta-CoMe (arXiv 2406.08903) and PrinMix (2506.11087) solve it by search and by ILP.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meswitch.codec import Spec


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a tensor. nbytes: of all its parts. harm: nats a token, or any unit that all tensors share."""

    spec: Spec
    nbytes: int
    harm: float


def hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those on the lower convex hull of harm over bytes, by rising bytes: every next one pays less for each byte."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.harm)):
        if found and candidate.harm >= found[-1].harm:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-2], candidate):
            found.pop()
        found.append(candidate)
    return found


def _gain(before: Candidate, after: Candidate) -> float:
    return (before.harm - after.harm) / (after.nbytes - before.nbytes)


def allocate(offers: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Spec] | None:
    """The mix of least harm: tensor -> spec; None if even the cheapest mix takes more than `budget` bytes."""
    hulls = {name: hull(candidates) for name, candidates in offers.items()}
    left = budget - sum(candidates[0].nbytes for candidates in hulls.values())
    if left < 0:
        return None
    level = dict.fromkeys(hulls, 0)
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        candidates, at = hulls[name], level[name]
        if at + 1 < len(candidates):
            heapq.heappush(steps, (-_gain(candidates[at], candidates[at + 1]), name))

    for name in hulls:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        candidates, at = hulls[name], level[name]
        cost = candidates[at + 1].nbytes - candidates[at].nbytes
        if cost <= left:  # what does not fit is passed over: a smaller step of another tensor still may
            left -= cost
            level[name] = at + 1
            offer(name)
    return {name: candidates[level[name]].spec for name, candidates in hulls.items()}
