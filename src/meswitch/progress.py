"""How long work says how far it is."""

from collections.abc import Callable

# (phase, done, in all, what is being done); done and in all count what takes time: parameters, tokens, steps, bytes
Progress = Callable[[str, int, int, str], None]


def silent(phase: str, done: int, total: int, what: str) -> None:
    """A `Progress` that tells nobody."""
