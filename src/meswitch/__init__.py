"""One GPU, many full fine-tunes of one base LLM: compress, route, serve."""

from meswitch.version import __version__

__all__ = ["__version__"]
