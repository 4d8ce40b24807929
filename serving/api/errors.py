"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` and a fitting status."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class ApiError(Exception):
    def __init__(
        self, status: int, message: str, *,
        code: str | None = None, param: str | None = None, retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message)  # what it is made of again on the other side of a process's border
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, object]:
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers or None)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """The framework's own refusals, of routes and methods that are not there, in the same shape."""
    assert isinstance(error, HTTPException)
    what = {404: "There is no such route", 405: "The method is not allowed here"}
    message = f"{what.get(error.status_code, error.detail)}: {request.method} {request.url.path[:200]}"
    code = "not_found" if error.status_code == 404 else None
    return ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})).response()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for the errors that a route may answer with."""
    content = {"application/json": {"schema": SCHEMA}}
    return {status: {"description": KINDS.get(status, "error"), "content": content} for status in statuses}
