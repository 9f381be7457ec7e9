"""OpenAI error bodies: `{"error": {"message", "type", "param", "code"}}`, each naming the field and the fix."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from meswitch.errors import CapacityError, ConfigError, ContextLengthError, MeswitchError, UnknownExpertError

# What the engine calls a field -> what it is called here.
_ENGINE_FIELDS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
ANTHROPIC_PATH = "/v1/messages"
_FIELD = re.compile(r"[a-z_]+(?:\[\d+\]|\.\w+)*")

# two parts and more, as /etc/passwd; not the paths of the API
_PATH = re.compile(r"(?<![\w/.:])/(?!v1/)(?:[^\s/'\"`:,;()]+/)+[^\s/'\"`:,;()]*")


class ApiError(Exception):
    """An answer other than 200.

    Args:
        param: the request's field that is wrong.
        code: for programs.
    """

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

    def anthropic_body(self) -> dict[str, Any]:
        """The same in the form of Anthropic's protocol."""
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
        kind = kinds.get(self.status) or ("api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": _printable(self.message)}}

    def response(self, path: str = "") -> JSONResponse:
        """path: of the request; some protocols have a form of their own."""
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATH) else self.body()
        return JSONResponse(body, self.status, self.headers)

    @classmethod
    def refused(cls, error: MeswitchError, prompt_field: str, grammar_field: str = "structured_outputs") -> "ApiError":
        """From what `Engine.submit` raises.

        Args:
            error: raised.
            prompt_field: what the engine's `prompt` is called in this request.
            grammar_field: what its `grammar` is called.
        """
        if isinstance(error, UnknownExpertError):
            return cls(404, str(error), param="model", code="model_not_found")
        if isinstance(error, CapacityError):
            return cls(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        if isinstance(error, ConfigError):
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
            field, colon, text = str(error).partition(": ")
            field = {**_ENGINE_FIELDS, "prompt": prompt_field, "grammar": grammar_field}.get(field, field)
            if colon and _FIELD.fullmatch(field):
                return cls(400, f"{field}: {text}", param=field, code=code)
            return cls(400, str(error), param=prompt_field, code=code)
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

    async def api(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response(request.url.path)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return ApiError.invalid(error.errors()).response(request.url.path)

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
