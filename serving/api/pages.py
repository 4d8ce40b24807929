"""Lists in pages, as OpenAI's clients turn them: `after` an id, `limit` at most, the newest first unless `order` says otherwise."""

from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import Request

from serving.api.errors import ApiError, bad_request


def parameters(*, most: int) -> list[dict[str, Any]]:
    """OpenAPI's description of what `page` reads."""
    schemas = {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": most},
        "order": {"type": "string", "enum": ["asc", "desc"]},
    }
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in schemas.items()]


def page(request: Request, bodies: list[dict[str, Any]], *, most: int, default: int) -> JSONResponse:
    """The part of `bodies`, which are in order, that the request asks for. Raises `ApiError`."""
    asked = request.query_params
    limit, order, after = asked.get("limit", str(default)), asked.get("order", "desc"), asked.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 6 and 1 <= int(limit) <= most):
        raise bad_request(f"'limit' must be a number from 1 to {most}", param="limit")
    if order not in ("asc", "desc"):
        raise bad_request("'order' must be 'asc' or 'desc'", param="order")
    found = bodies if order == "desc" else bodies[::-1]
    if after is not None:
        ids = [body["id"] for body in found]
        if after not in ids:
            raise ApiError(404, "The list has nothing with the id that 'after' gives", param="after", code="not_found")
        found = found[ids.index(after) + 1 :]
    shown = found[: int(limit)]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(shown) < len(found), **ends})
