"""Experts come and go: what is served now, and how that is changed while it is."""

import asyncio
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from meswitch.engine import Engine, holds_expert
from meswitch.errors import CapacityError, LoadError, MeswitchError, UnknownExpertError
from meswitch.family import NAME, RESERVED, Family
from meswitch.router import RouteOption
from meswitch.server.auto import AutoPolicy
from meswitch.server.errors import ApiError, without_paths
from meswitch.server.keys import ADMIN_KEY_VARIABLE, CALLER, Keys

logger = logging.getLogger("meswitch.server")

WATCH_SECONDS = 2.0
_NO_ROUTER = (
    "this server has no router, so it is asked by its name; give every [[expert]] of family.toml `description` and "
    "`examples`, and start the server again"
)
_NOTHING_SAID = (
    "nothing was said of it to the router: give it `description` and `examples`, by POST /v1/experts or in family.toml"
)
_UNCHANGED = (
    "expert %s: what %s says of it has changed, and this router keeps what it learnt of it; train the router again, or "
    "start the server again if it was not trained with this expert"
)

_PREFIX = re.compile(r"^(routes|domain): ")  # the field in a router's own messages

Action = Literal["load", "reload", "pin", "unpin"]


class Experts:
    """The experts of a running server. Its methods wait for disks: call them in a thread.

    Args:
        engine: serves them.
        sources: name -> directory of those that are served.
        said: what the family says of them.
        directory: those that clients with an admin key may load are in it; None: they may load none.
        family: the file that `reread` reads again.
        auto: is told of experts that come.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Mapping[str, Path],
        said: Iterable[RouteOption],
        *,
        directory: Path | None = None,
        family: Path | None = None,
        is_watched: bool = False,
        auto: AutoPolicy | None = None,
    ) -> None:
        self._said = {option.name: option for option in said}  # what the router was last told of each
        # what they are good at, by name; kept up to date for the models page
        self.descriptions = {name: option.description for name, option in self._said.items()}
        self.is_watched, self._auto = is_watched, auto
        self._engine, self._directory = engine, directory
        # what the file says at the start: options of the command line, which go before it, are not in it
        self._family = None if family is None else Family.load(family)
        self._sources, self._of_family = dict(sources), set(sources)
        self._found: dict[str, Any] = {}  # by `scan`: name -> signature of what was tried last
        self._not_learned: dict[str, str] = {}  # name -> why the router did not learn it
        self._lock = threading.Lock()  # one change at a time

    def rows(self) -> list[dict[str, Any]]:
        """One expert a row: where it is, its bytes, version and counts."""
        counts, kept = self._engine.store.counts(), self._engine.store.kept
        rows = []
        for row in self._engine.store.residency():
            done, reason = counts.get(row.expert), self._not_routed(row.expert)
            rows.append(
                {
                    "id": row.expert,
                    "object": "expert",
                    "place": row.place,
                    "slot": row.slot,
                    "bytes": row.bytes,
                    "running": row.pins,
                    "pinned": row.expert in kept,
                    "routed": reason is None,
                    **({} if reason is None else {"not_routed": reason}),
                    "version": row.version.rpartition(":")[2][:16],
                    "description": self.descriptions.get(row.expert, ""),
                    **(asdict(done) if done is not None else {}),
                }
            )
        return rows

    def add(self, name: str, path: str, description: str = "", examples: Sequence[str] = ()) -> str | None:
        """Serve what is in a directory below the allowed one.

        Args:
            name: of the expert.
            path: of an artifact or an adapter, relative to the allowed directory, or absolute and inside it.
            description: what it is good at. Of a new version of which nothing is said, what was said before holds.
            examples: queries for it.

        Returns:
            Why `auto` does not choose it by what is said; None if it does.

        Raises:
            ApiError: nothing may be loaded, or not from there.
            MeswitchError: see `Engine.add_expert`.
        """
        if name in RESERVED:
            raise ApiError(400, f"name: {name!r} is reserved for routing", param="name", code="invalid_value")
        if self._directory is None:
            raise ApiError(403, "no experts may be loaded: server.experts_dir is not set", code="not_allowed")
        root = self._directory.resolve()
        source = (root / path).resolve()
        if not source.is_relative_to(root) or source == root:
            raise ApiError(403, f"path: {path!r} is outside server.experts_dir", param="path", code="not_allowed")
        if not source.is_dir():
            raise ApiError(404, f"path: {path!r}: no such directory", param="path", code="not_found")
        option = RouteOption(name, description, tuple(examples))
        if not (description or examples):
            option = self._said.get(name, option)
        self._serve(name, source, option.description)
        return self._join(option)

    def remove(self, name: str) -> None:
        """Serve an expert no more.

        Raises:
            UnknownExpertError: no such expert.
        """
        with self._lock:
            self._engine.remove_expert(name)
            self._sources.pop(name, None)
            self.descriptions.pop(name, None)
            self._not_learned.pop(name, None)
            self._said.pop(name, None)

    def act(self, name: str, action: Action) -> None:
        """`load` it to a slot, `reload` its files, `pin` it to a slot or `unpin` it.

        Raises:
            MeswitchError: no such expert, no slot may be pinned, or its files do not fit.
        """
        store = self._engine.store
        if name not in store.artifacts:
            raise UnknownExpertError(f"no expert {name!r}; there are {', '.join(store.artifacts) or 'none'}")
        if action == "load":
            store.prefetch(name)
        elif action == "pin":
            store.keep(name)
        elif action == "unpin":
            store.let_go(name)
        else:
            self._serve(name, self._sources[name], self.descriptions.get(name, ""))

    def reread(self) -> None:
        """Read the family again: experts that are new there are served, those that are gone are not any more, and the
        router is told what is said of them now.

        Everything else of the file needs a restart, and the log says what of it has changed. What fails leaves that
        expert as it is.

        Raises:
            ConfigError: the file is wrong; then nothing changes.
        """
        if self._family is None:
            return
        family = Family.load(self._family.file)
        wanted = {section.name: section for section in family.expert}
        logger.warning("%s is read again", family.file)
        if late := _changed(self._family, family):
            logger.warning("%s: restart the server for what has changed: %s", family.file, ", ".join(late))
        for name in self._of_family - wanted.keys():
            self._of_family.discard(name)
            if name in self._sources:
                self.remove(name)
        for name, section in wanted.items():
            source = family.resolve(section.delta)
            is_served = self._sources.get(name) == source
            if is_served:
                self.descriptions[name] = section.description
            else:
                self._try(name, source, section.description)
            if name in self._sources:
                self._tell(RouteOption(name, section.description, section.examples), family.file, is_new=not is_served)
            self._of_family.add(name)

    def scan(self) -> None:
        """Serve what has appeared in the allowed directory, under its directory's name, and no more what has gone."""
        assert self._directory is not None
        there = {}
        root = self._directory.resolve()
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if not re.match(NAME, path.name) or path.suffix == ".partial" or not path.resolve().is_relative_to(root):
                continue
            if holds_expert(path):
                there[path.name] = path
        for name in [name for name in self._found if name not in there]:
            del self._found[name]
            if name in self._sources:
                self.remove(name)
        for name, path in there.items():
            if name in self._sources and name not in self._found:
                continue  # the family's, or loaded by hand
            signature = max(file.stat().st_mtime_ns for file in path.iterdir())
            if self._found.get(name) != signature:
                known = name in self._found and name in self._sources
                self._found[name] = signature
                if not known:  # a new version of one that is served is noticed by its next request
                    self._try(name, path.resolve(), self.descriptions.get(name, ""))

    def _tell(self, option: RouteOption, file: Path, is_new: bool) -> None:
        """Pass on to the router what the family's file says of an expert, where that is news to it."""
        name = option.name
        is_changed = self._said.get(name) != option
        if not (is_new or is_changed or name in self._not_learned or self._not_routed(name) is not None):
            return
        before = None if self._auto is None else self._auto.router
        reason = self._join(option)
        if is_changed and not is_new and reason is None and self._auto is not None and self._auto.router is before:
            logger.warning(_UNCHANGED, name, file)

    def _join(self, option: RouteOption) -> str | None:
        """Let the router know of an expert. Gives the reason why it does not choose it by that, None if it does."""
        self._said[option.name] = option
        if self._auto is None:
            return _NO_ROUTER
        reason = self._auto.learn(option)
        is_known = option.name in self._auto.experts
        if reason is not None and self._auto.has_router:
            is_bare = not (option.description.strip() or option.examples)
            reason = _NOTHING_SAID if is_bare else f"the router does not take it in: {_PREFIX.sub('', reason)}"
            if is_known:
                reason = f"auto chooses it by what was said of it before: {reason}"
        self._not_learned.pop(option.name, None)
        if reason is not None:
            self._not_learned[option.name] = reason
            logger.warning("%s %s: %s", "expert" if is_known else "auto does not choose expert", option.name, reason)
        return reason

    def _not_routed(self, name: str) -> str | None:
        """Why `auto` does not choose an expert; None if it may."""
        if self._auto is None:
            return _NO_ROUTER
        if name in self._auto.experts:
            return None
        return self._not_learned.get(name) or self._auto.no_router or _NOTHING_SAID

    def _try(self, name: str, source: Path, description: str) -> None:
        try:
            self._serve(name, source, description)
        except (MeswitchError, OSError) as error:
            logger.error("expert %s is not served: %s", name, error)

    def _serve(self, name: str, source: Path, description: str) -> None:
        with self._lock:
            self._engine.add_expert(name, source)
            self._sources[name] = source
            self.descriptions[name] = description


def _changed(before: Family, now: Family) -> list[str]:
    """The fields of a running server that differ, as `engine.slots`."""
    return [
        f"{section}.{field}"
        for section in ("base", "router", "engine", "server")
        for field, value in getattr(now, section)
        if value != getattr(getattr(before, section), field)
    ]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewExpert(_Body):
    """`POST /v1/experts`."""

    name: str = Field(pattern=NAME, max_length=128)
    path: str = Field(min_length=1)
    description: str = Field(default="", max_length=1024)
    examples: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(default_factory=list, max_length=256)


class LoadLora(BaseModel):
    """vLLM's `POST /v1/load_lora_adapter`; its other fields say nothing here."""

    lora_name: str = Field(pattern=NAME, max_length=128)
    lora_path: str = Field(min_length=1)


class UnloadLora(BaseModel):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: str


def expert_routes(experts: Experts, engine: Engine, keys: Keys) -> APIRouter:
    """The routes under `/v1/experts`, and vLLM's names for two of them."""
    routes = APIRouter()

    def check_admin() -> None:
        caller = CALLER.get()
        if caller is not None and caller.admin:
            return
        if not keys.has_admin:
            message = (
                f"experts cannot be changed: set {ADMIN_KEY_VARIABLE}, or give a key of server.keys `admin = true`"
            )
        else:
            message = "this needs an admin key; send the header `Authorization: Bearer <key>`"
        raise ApiError(403, message, code="not_allowed")

    async def done(work: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.to_thread(work, *arguments)
        except MeswitchError as error:
            logger.warning("experts: %s", error)
            raise _refused(error) from error

    @routes.get("/v1/experts")
    async def list_experts() -> dict[str, Any]:
        """Every expert's place, bytes, version and counts, and the engine's memory and load."""
        rows = [row for row in experts.rows() if (caller := CALLER.get()) is None or caller.allows(row["id"])]
        memory = engine.memory()
        state = {
            "base": engine.base_name,
            "slots": engine.store.slot_count,
            "memory": memory,
            "device_bytes": sum(size for purpose, size in memory.items() if purpose != "host"),
            "kv_tokens": engine.kv_tokens,
            "kv_used_tokens": engine.kv_used_tokens,
            "generated_tokens": engine.generated_tokens,
            "host_budget": engine.store.host.budget,
            **engine.load(),
        }
        return {"object": "list", "data": rows, "engine": state}

    @routes.post("/v1/experts", status_code=201)
    async def load_expert(body: NewExpert) -> dict[str, Any]:
        """Serve one more expert; `auto` chooses it too if the router learns it by what is said of it here."""
        check_admin()
        reason = await done(experts.add, body.name, body.path, body.description, body.examples)
        row = next(row for row in experts.rows() if row["id"] == body.name)
        return row | ({} if reason is None else {"not_routed": reason})

    @routes.delete("/v1/experts/{name}")
    async def unload_expert(name: str) -> dict[str, Any]:
        """Serve an expert no more; running requests end on it."""
        check_admin()
        await done(experts.remove, name)
        return {"id": name, "object": "expert", "deleted": True}

    @routes.post("/v1/experts/{name}/{action}")
    async def act_on_expert(name: str, action: Action) -> dict[str, Any]:
        """Load, reload, pin or unpin an expert."""
        check_admin()
        await done(experts.act, name, action)
        return next(row for row in experts.rows() if row["id"] == name)

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadLora) -> Response:
        """As vLLM has it: `POST /v1/experts`."""
        check_admin()
        await done(experts.add, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLora) -> Response:
        """As vLLM has it: `DELETE /v1/experts/{name}`."""
        check_admin()
        await done(experts.remove, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _refused(error: MeswitchError) -> ApiError:
    text = without_paths(str(error))
    if isinstance(error, UnknownExpertError):
        return ApiError(404, text, param="name", code="model_not_found")
    if isinstance(error, CapacityError):
        return ApiError(409, text, code="no_room")
    if isinstance(error, LoadError):
        return ApiError(500, text, code="engine_error")
    return ApiError(400, text, param="path", code="invalid_value")
