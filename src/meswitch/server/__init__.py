"""The OpenAI-compatible server: every expert is a model, and `auto` lets the router choose. See docs/use/serve.md."""

from meswitch.server.app import OnDemandModels, Web, create_app
from meswitch.server.errors import ApiError

__all__ = ["ApiError", "OnDemandModels", "Web", "create_app"]
