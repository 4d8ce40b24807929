"""`/openapi.json`: the routes as FastAPI sees them, with the bodies that we read ourselves."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.api.gate import COOKIE, is_open

REFERENCE = "#/components/schemas/{model}"


def takes(schema: type[BaseModel] | dict[str, Any], *, media_type: str = "application/json") -> dict[str, Any]:
    """OpenAPI's description of a body that a route reads itself, so that its errors are ours."""
    described = schema if isinstance(schema, dict) else {"$ref": REFERENCE.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": described}}}}


def path_parameter(name: str, *, pattern: str | None = None) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1, **({"pattern": pattern} if pattern else {})}
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": schema}]}


def install(app: FastAPI, bodies: list[type[BaseModel]], *, secured: bool) -> None:
    """Makes `app` describe its `bodies`, and the key that its routes need when it has keys."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, definitions = models_json_schema([(kind, "validation") for kind in bodies], ref_template=REFERENCE)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            if secured:
                _secure(document)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


def _secure(document: dict[str, Any]) -> None:
    """A key opens every route, and so does the chat page's session; a history has an owner, who is logged in."""
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "session": {"type": "apiKey", "in": "cookie", "name": COOKIE},
    }
    document["security"] = [{"key": []}, {"session": []}]
    for path, operations in document["paths"].items():
        if is_open(path):
            for operation in operations.values():
                operation["security"] = [{"session": []}] if path.startswith("/web/conversations") else []
