"""API keys: who may ask, for which models, how much at a time, and who may change what is served."""

import hashlib
import hmac
import os
import secrets
import tomllib
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from meswitch.errors import ConfigError
from meswitch.family import NAME
from meswitch.server.errors import ApiError
from meswitch.server.logs import RECORD
from meswitch.server.page import PATHS
from meswitch.units import plural

API_KEY_VARIABLE = "MESWITCH_API_KEY"
ADMIN_KEY_VARIABLE = "MESWITCH_ADMIN_KEY"
OPEN = frozenset({"/health", *PATHS})  # probes carry no key, and the page asks for one
_RANDOM_BYTES = 32


class ApiKey(BaseModel):
    """One key, of which only the hash is kept.

    Args:
        name: for logs.
        sha256: of the key's text, in hexadecimal. Keys are random and long, so a slow hash would protect nothing more.
        models: that it may ask for; None for all. `auto` among them lets the router choose any expert.
        concurrency: requests at a time; None for no limit.
        admin: whether it may change what is served.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    models: tuple[str, ...] | None = None
    concurrency: int | None = Field(default=None, ge=1)
    admin: bool = False

    @classmethod
    def of(cls, name: str, text: str, *, admin: bool = False) -> "ApiKey":
        """A key without limits."""
        return cls(name=name, sha256=key_digest(text), admin=admin)

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


CALLER: ContextVar[ApiKey | None] = ContextVar("meswitch_caller", default=None)
"""The key of the request that is being answered; None where none is asked for."""


def new_key() -> str:
    """A key's text, to be given to a client once."""
    return f"msk-{secrets.token_urlsafe(_RANDOM_BYTES)}"


class Keys:
    """All keys of a server.

    Args:
        keys: without any, nobody needs one.
    """

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self.replace(keys)
        self._running: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether requests need a key. One for administration alone leaves the rest open."""
        return any(not key.admin for key in self._keys.values())

    @property
    def has_admin(self) -> bool:
        return any(key.admin for key in self._keys.values())

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Other keys from now on."""
        self._keys = {key.sha256: key for key in keys}

    def check(self, scope: Scope) -> ApiKey | None:
        """The key of an HTTP request, None for one that needs none.

        Raises:
            ApiError: it needs one.
        """
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").strip().partition(" ")
        hashed = key_digest(given.strip()) if scheme.lower() == "bearer" else ""
        found = None
        for known, key in self._keys.items():  # as long for a good guess as for a bad one
            if hmac.compare_digest(hashed, known):
                found = key
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers  # browsers add none
        if found is None and self and scope["path"] not in OPEN and not is_preflight:
            raise ApiError(
                401,
                "wrong or missing API key; send the header `Authorization: Bearer <key>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def begin(self, key: ApiKey) -> None:
        """One more request of a key.

        Raises:
            ApiError: it has as many as it may.
        """
        running = self._running.get(key.name, 0)
        if key.concurrency is not None and running >= key.concurrency:
            busy = plural(running, "request")
            message = f"key {key.name!r} has {busy} running, as many as it may; ask again when one has ended"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self._running[key.name] = running + 1

    def end(self, key: ApiKey) -> None:
        self._running[key.name] -= 1


def read_keys(file: Path | None) -> list[ApiKey]:
    """The keys of a file, and those of the environment.

    Args:
        file: TOML with a table `[[key]]` for each; None for none.

    Raises:
        ConfigError: it cannot be read, or a field is wrong.
    """
    keys = [
        ApiKey.of(name, text, admin=admin)
        for name, variable, admin in (("default", API_KEY_VARIABLE, False), ("admin", ADMIN_KEY_VARIABLE, True))
        if (text := os.environ.get(variable, ""))
    ]
    return keys if file is None else keys + _of_file(file)


def _of_file(file: Path) -> list[ApiKey]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"server.keys: {file}: cannot be read ({error.strerror}); "
            f"`meswitch key NAME >> {file.name}` makes a key in it"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    tables = data.pop("key", [])
    if data or not isinstance(tables, list):
        raise ConfigError(f"{file}: {next(iter(data), 'key')}: no such field; each key is a table [[key]]")
    keys = []
    for number, table in enumerate(tables):
        try:
            keys.append(ApiKey.model_validate(table))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{file}: key[{number}].{field}: {first['msg']}; see docs/use/serve.md") from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{file}: key.{field}: {twice!r} is used twice; every key needs its own")
    return keys


class ApiKeyMiddleware:
    """Lets only requests with a key pass, if keys are asked for; it runs before anything reads the body."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key = self._keys.check(scope)
            counts = key is not None and scope["method"] == "POST"
            if key is not None:
                if (record := RECORD.get()) is not None:
                    record.key = key.name
                if counts:
                    self._keys.begin(key)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        token = CALLER.set(key)
        try:
            await self._app(scope, receive, send)
        finally:
            CALLER.reset(token)
            if key is not None and counts:
                self._keys.end(key)


def key_digest(text: str) -> str:
    """Of a key's text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
