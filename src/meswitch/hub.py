"""The Hugging Face hub: which names may be of it, whether it has a model, and what it says when it gives nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from meswitch.errors import CheckpointError, MeswitchError

T = TypeVar("T")
Why = Literal["unreachable", "refused", "busy", "failed"]  # busy: ask again later; failed: here, as on a full disk
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CONFIGS = ("config.json", "adapter_config.json")  # one of them is in every repository of a model
_SECONDS = 10.0  # for a hub to say that it has a model
_TOO_MANY_REQUESTS, _SERVER_ERRORS = 429, 500  # statuses, the latter with all above: nothing is wrong with the name


def is_hub_id(source: str | Path) -> bool:
    """Whether a text may name a repository: it is `org/name`, and no file or directory here."""
    text = str(source)
    return _ID.fullmatch(text) is not None and not Path(text).exists()


def ask_hub(ask: Callable[[], T], error: Callable[[Why, str], MeswitchError]) -> T:
    """What the hub gives.

    Args:
        ask: calls the hub's library.
        error: makes the error to raise, of why there is nothing and the reason in one line.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, as the hub's library has it
    try:
        return ask()
    except MeswitchError:
        raise
    except Exception as problem:  # of HTTP, of the transfer, of the cache and of the disk: they share no class
        why: Why = "failed"
        text = str(problem)
        causes = (problem, problem.__cause__)  # a file that is neither there nor in the cache: the status is the cause
        if answer := next((one for one in causes if isinstance(one, HfHubHTTPError)), None):
            status = answer.response.status_code
            why = "busy" if status == _TOO_MANY_REQUESTS or status >= _SERVER_ERRORS else "refused"
            text = f"status {status}: {answer}"
        elif any(isinstance(one, HFValidationError) for one in causes):
            why = "refused"
        elif isinstance(problem, (transport_error, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
            why = "unreachable"
        reason = " ".join(text.split())[:400] or type(problem).__name__
        raise error(why, reason) from problem


def from_hub(source: str, ask: Callable[[], str]) -> Path:
    """Where what was asked of the hub is.

    Args:
        source: the repository, for messages.
        ask: fetches, and gives a path.

    Raises:
        CheckpointError: the hub does not give it.
    """

    def error(why: Why, reason: str) -> CheckpointError:
        if why == "unreachable":
            return CheckpointError(
                f"{source}: no such directory here, and the hub cannot be reached for a model of this name; check the "
                f"path or the connection ({reason})"
            )
        if why == "refused":
            return CheckpointError(
                f"{source}: neither a directory here nor a model that the hub gives ({reason}); "
                "check the name, or log in with `hf auth login`"
            )
        if why == "busy":
            return CheckpointError(
                f"{source}: no such directory here, and the hub answers with an error of its own ({reason}); try again "
                "later"
            )
        return CheckpointError(f"{source}: cannot be fetched from the hub ({reason})")

    return Path(ask_hub(ask, error))


def check_model(source: str) -> None:
    """See that a model can be had: it is in the cache, or the hub says that it has it. Nothing is fetched.

    Raises:
        CheckpointError: the hub does not have it, or cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    def ask() -> str:  # the cache too refuses a name that no repository may have
        for name in _CONFIGS:
            if isinstance(file := try_to_load_from_cache(source, name), str):
                return file
        return str(HfApi().model_info(source, timeout=_SECONDS).id)

    from_hub(source, ask)
