"""Artifacts by name from one directory: vLLM's plugin `meswitch_resolver` (entry points `vllm.general_plugins`).

A request for a model that the server does not know asks vLLM's resolvers. This one answers with the artifact of that
name in the directory that MESWITCH_DELTA_DIR names, and with none from elsewhere. Without that variable nothing is
registered, so the plugin costs other servers of the same environment nothing.
"""

import asyncio
import logging
import os
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError
from meswitch.vllm.command import DIRECTORY_VARIABLE
from meswitch.vllm.places import Base

NAME = "meswitch"
log = logging.getLogger("vllm.meswitch")  # a child of vLLM's: its level, its handlers


def register_resolver() -> None:
    """Called by vLLM in each of its processes.

    Raises:
        ConfigError: the variable names no directory.
    """
    given = os.environ.get(DIRECTORY_VARIABLE)
    if not given:
        return
    directory = Path(given).expanduser()
    if not directory.is_dir():
        raise ConfigError(f"{DIRECTORY_VARIABLE}: {given}: not a directory; name the one that holds the artifacts")
    LoRAResolverRegistry.register_resolver(NAME, DeltaResolver(directory))


class DeltaResolver(LoRAResolver):
    """Names are paths below `directory`; vLLM gives an adapter its id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self._bases: dict[str, Base] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The artifact of that name, or None where there is none: another resolver may know it.

        Raises:
            ValueError: which vLLM answers with status 400: a name that leads out of the directory, a damaged artifact,
                one of another base.
        """
        try:
            # in a thread, for a base's first fingerprint reads some of its files
            found = await asyncio.to_thread(self.find, base_model_name, lora_name)
        except MeswitchError as error:
            log.warning("%s", error)
            # vLLM cuts absolute paths out of what it tells a client; the name is what the client knows
            raise ValueError(str(error).replace(f"{self.directory}{os.sep}", "")) from error
        return None if found is None else LoRARequest(lora_name, 1, str(found))

    def find(self, base: str, name: str) -> Path | None:
        """The directory of a checked artifact; the worker compares its tensors' checksums when it loads them.

        Args:
            base: the base's directory or hub id, as vLLM was started with.

        Raises:
            MeswitchError: see `resolve_lora`.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"model: {name!r}: not a name below {DIRECTORY_VARIABLE}; give one without '..' and root")
        try:
            directory = (self.directory / name).resolve()
            if not (directory / MANIFEST_NAME).is_file():
                return None
        except (OSError, RuntimeError, ValueError):  # longer than names may be, a link to itself, a zero byte
            return None
        if not directory.is_relative_to(self.directory):
            raise ConfigError(
                f"model: {name!r}: a link out of {DIRECTORY_VARIABLE}; put the artifact itself there, or start the "
                "server with the directory that holds it"
            )
        artifact = Artifact.open(directory)
        try:
            self._bases.setdefault(base, Base(base)).check(artifact)
        except IncompatibleError as error:
            raise IncompatibleError(f"{directory / MANIFEST_NAME}: base.fingerprint: {error}") from None
        return directory
