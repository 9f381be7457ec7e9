"""Which replica should answer for an expert: one that holds it on the device, or else the expert's own first choice."""

import hashlib
from collections.abc import Collection, Mapping


def ranked(resident: Mapping[str, Collection[str]], expert: str) -> list[list[str]]:
    """Replicas in groups, the best first; within a group the one with the shortest queue is taken.

    Replicas that hold the expert come first. Of the others, each expert has an order of its own (rendezvous hashing,
    Thaler and Ravishankar 1998): requests that come before the first one has loaded it meet at one replica, replicas
    get different experts, and a lost replica moves only its own.

    Args:
        resident: the experts on each replica's device. expert: "" for a request that any replica answers as well.
    """
    if not expert:
        return [list(resident)] if resident else []
    holders = [replica for replica, experts in resident.items() if expert in experts]
    others = sorted(resident.keys() - set(holders), key=lambda replica: _weight(replica, expert))
    return [*([holders] if holders else []), *([replica] for replica in others)]


def _weight(replica: str, expert: str) -> bytes:
    return hashlib.sha256(f"{replica}\0{expert}".encode()).digest()
