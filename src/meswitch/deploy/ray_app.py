"""The Ray Serve application: one `Front`, several `Replica`s, requests placed by `ExpertAware`.

`serve run meswitch.deploy.ray_app:build family=/shared/family.toml replicas=2` runs it, as does a `serveConfigV2` of
KubeRay; `meswitch deploy ray` is the short way.
"""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig

from meswitch.deploy.expert_aware import ExpertAware
from meswitch.deploy.front import Front
from meswitch.deploy.replica import Replica
from meswitch.family import Family
from meswitch.server.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

_RESIDENCY_SECONDS = 1.0  # between two looks at what a replica holds


class Arguments(BaseModel):
    """What the application is built from.

    family: path of the family.toml on every node. replicas: copies of the base. gpus, cpus: that Ray reserves for each.
    ongoing: requests that a replica takes at a time before others are asked; queued: that may wait for a replica, more
    are answered with 503.
    """

    model_config = ConfigDict(extra="forbid")

    family: Path
    replicas: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    cpus: float = Field(default=1, ge=0)
    ongoing: int = Field(default=64, ge=1)
    queued: int = Field(default=1024, ge=1)


def build(arguments: Arguments) -> serve.Application:
    """The application, for `serve.run`.

    Raises:
        ConfigError: the family.toml cannot be read here.
    """
    file = str(Path(arguments.family).resolve())
    Family.load(file)  # a typing error shows before anything is started
    given = {name: key for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE) if (key := os.environ.get(name))}
    environment = {"env_vars": given} if given else {}
    router = RequestRouterConfig(request_router_class=ExpertAware, request_routing_stats_period_s=_RESIDENCY_SECONDS)
    replica = serve.deployment(
        Replica,
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.ongoing,
        max_queued_requests=arguments.queued,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus, "runtime_env": environment},
        request_router_config=router,
    ).bind(file)
    front = serve.deployment(
        Front,
        max_ongoing_requests=arguments.queued,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
    )
    return front.bind(replica, file)
