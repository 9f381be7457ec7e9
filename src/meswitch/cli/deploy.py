"""`meswitch deploy`: a family's server on several machines."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Serve a family from several replicas behind one endpoint.")


@app.callback()
def _deploy() -> None:
    """Serve a family from several replicas behind one endpoint."""


@app.command()
def ray(
    family: Annotated[Path, typer.Argument(metavar="FILE", help="A family.toml that every node can read.")],
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the base, each with its own experts resident.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that Ray reserves for a replica.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores that Ray reserves for a replica.")] = 1,
    ongoing: Annotated[
        int, typer.Option(min=1, help="Requests that a replica takes at a time; more go to others.")
    ] = 64,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Ray cluster, `auto` for this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
) -> None:
    """Serve a family from several replicas on Ray Serve; needs `pip install 'meswitch[ray]'`.

    A request goes to a replica that has its expert on the device, if that one has room; a request whose replica is
    lost before it answered goes to another. Ctrl-C ends the application and, unless `--address` is given, Ray with it.

    Example:

        meswitch deploy ray family.toml --replicas 2 --gpus 1
    """
    console.quiet()
    try:
        import ray as cluster
        from ray import serve
    except ImportError:
        raise ConfigError("deploy ray: Ray is not installed; run `pip install 'meswitch[ray]'`") from None
    from meswitch.deploy.ray_app import Arguments, build

    arguments = Arguments(family=family, replicas=replicas, gpus=gpus, cpus=cpus, ongoing=ongoing)
    application = build(arguments)  # before the cluster is started: a typing error shows at once
    cluster.init(address=address, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name="meswitch", route_prefix="/")
        summary = {"url": f"http://{host}:{port}/v1", "replicas": replicas}
        text = f"meswitch serves {summary['url']} from {replicas} replicas of {family}"
        print(json.dumps(summary) if as_json else text, flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.note("stopping")
    finally:
        serve.delete("meswitch")
        if address is None:
            serve.shutdown()
            cluster.shutdown()
