"""`/openapi.json`: the routes as FastAPI sees them, with the bodies that we read ourselves."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi
