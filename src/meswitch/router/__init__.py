"""Query -> scores over the experts -> who answers. Train, evaluate, save and load. See docs/use/router.md."""

from meswitch.router.base import OTHER, Route, RouteOption, Router, RouterError
from meswitch.router.cascade import CascadeRouter, fit_cascade
from meswitch.router.data import Leakage, Row, find_leakage, read_rows
from meswitch.router.described import (
    Decider,
    DescribedRouter,
    Selection,
    Space,
    parse_options,
    read_options,
)
from meswitch.router.embedding import EmbeddingRouter
from meswitch.router.encoder import Encoder, TextEncoder, open_encoder
from meswitch.router.evaluate import Evaluation, evaluate_router
from meswitch.router.llm import Llm, LlmRouter, LlmSettings, open_llm
from meswitch.router.llm_train import train_llm_router
from meswitch.router.rules import RoutingRequest, Rule, RulesRouter, read_rules
from meswitch.router.store import OpenOptions, load_router
from meswitch.router.train import add_experts, train_router

__all__ = [
    "OTHER",
    "CascadeRouter",
    "Decider",
    "DescribedRouter",
    "EmbeddingRouter",
    "Encoder",
    "Evaluation",
    "Leakage",
    "Llm",
    "LlmRouter",
    "LlmSettings",
    "OpenOptions",
    "Route",
    "RouteOption",
    "Router",
    "RouterError",
    "RoutingRequest",
    "Row",
    "Rule",
    "RulesRouter",
    "Selection",
    "Space",
    "TextEncoder",
    "add_experts",
    "evaluate_router",
    "find_leakage",
    "fit_cascade",
    "load_router",
    "open_encoder",
    "open_llm",
    "parse_options",
    "read_options",
    "read_rows",
    "read_rules",
    "train_llm_router",
    "train_router",
]
