"""All that can be compared by flat names: the product's options, a method's parameters, the solver's switches."""

import dataclasses
from typing import Any

from meswitch.codec import find_codec
from meswitch.compression.options import Options, Solver
from meswitch.errors import ConfigError

SWITCHES = tuple(item.name for item in dataclasses.fields(Solver))


def options(method: str = "me-switch", **named: Any) -> Options:
    """Options of a compression by any method.

    `options("svd", rank=8)` is `Options(method="svd", parameters={"rank": 8})`, and `options(feedback=False)` is
    `Options(solver=Solver(feedback=False))`.

    Args:
        method: name of a codec.
        named: fields of `meswitch.Options`, parameters of the method, fields of `Solver`.

    Raises:
        ConfigError: as `meswitch.Options`.
    """
    try:
        own = {parameter.name for parameter in find_codec(method).parameters}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    known = {item.name for item in dataclasses.fields(Options)}
    parameters = dict(named.pop("parameters", {}))
    solver: Solver = named.pop("solver", Solver())
    switches = {name: named.pop(name) for name in SWITCHES if name in named}
    parameters |= {name: named.pop(name) for name in list(named) if name in own or name not in known}
    return Options(method=method, parameters=parameters, solver=dataclasses.replace(solver, **switches), **named)
