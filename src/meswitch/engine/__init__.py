"""The embedded engine: a base model with switchable layers in one running batch."""

from meswitch.engine.engine import Engine, holds_expert
from meswitch.engine.request import Chunk, Completion, Request
from meswitch.engine.sampling import SamplingParams

__all__ = ["Chunk", "Completion", "Engine", "Request", "SamplingParams", "holds_expert"]
