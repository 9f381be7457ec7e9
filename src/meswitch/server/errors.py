"""OpenAI error bodies: `{"error": {"message", "type", "param", "code"}}`, each naming the field and the fix."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from meswitch.errors import CapacityError, ConfigError, MeswitchError, UnknownExpertError

# two parts and more, as /etc/passwd; not the paths of the API
_PATH = re.compile(r"(?<![\w/.:])/(?!v1/)(?:[^\s/'\"`:,;()]+/)+[^\s/'\"`:,;()]*")


class ApiError(Exception):
    """An answer other than 200. param: the request's field that is wrong. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        message = without_paths(self.message) if self.status >= 500 else self.message
        return {"error": {"message": _printable(message), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)

    @classmethod
    def refused(cls, error: MeswitchError, prompt_field: str) -> "ApiError":
        """From what `Engine.submit` raises. prompt_field: what the engine's `prompt` is called in this request."""
        if isinstance(error, UnknownExpertError):
            return cls(404, str(error), param="model", code="model_not_found")
        if isinstance(error, CapacityError):
            return cls(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        if isinstance(error, ConfigError):
            text = str(error)
            if text.startswith("prompt: "):
                text = f"{prompt_field}: {text.removeprefix('prompt: ')}"
            return cls(400, text, param=prompt_field, code="invalid_value")
        return cls(503, str(error), code="engine_unavailable")

    @classmethod
    def invalid(cls, errors: Sequence[Mapping[str, Any]]) -> "ApiError":
        """From pydantic's list of errors; the first one is reported."""
        error = errors[0]
        where = tuple(error["loc"])[1:]  # without "body"
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", "syntax error")
            return cls(400, f"the body is not valid JSON: {reason}", code="invalid_json")
        inside = error.get("ctx", {}).get("field", ())
        field = _dotted((*where, *((inside,) if isinstance(inside, str) else inside)))
        if not field:
            return cls(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
        message, code = error["msg"].removeprefix("Value error, "), "invalid_value"
        if error["type"] == "missing":
            message, code = "this field is required", "missing_required_parameter"
        elif error["type"] == "extra_forbidden":
            message, code = "no such field here; leave it out", "unknown_parameter"
        elif error["type"] == "unsupported":
            code = "unsupported_parameter"
        return cls(400, f"{field}: {message}", param=field, code=code)


def without_paths(text: str) -> str:
    """A text for clients, to whom files of this machine are no business; the log has them."""
    return _PATH.sub("(a file of the server)", text)


def _printable(text: str) -> str:
    """JSON may smuggle in half a surrogate pair, which could not be sent back."""
    return text.encode(errors="replace").decode()


def _dotted(where: tuple[Any, ...]) -> str:
    """`("messages", 0, "role")` -> `messages[0].role`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def install_error_handlers(app: FastAPI) -> None:
    """Answer every failure in OpenAI's form."""

    async def api(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return ApiError.invalid(error.errors()).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400 and error.__cause__ is not None:
            # what reading the body raised beside JSON errors
            reason = str(error.__cause__).partition(";")[0] or type(error.__cause__).__name__
            return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json").response()
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404 and not request.url.path.startswith("/v1/"):
            message += "; the API is under /v1"
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            message += "; pages of other sites may ask once `server.allow_origins` names their origin"
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:  # starlette then raises it for the log
        return ApiError(500, "the server failed on this request; its log says why", code="internal_error").response()

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
