"""The stack reference as Markdown, from the same JSON schema that editors complete with."""

from typing import Any, cast

Json = dict[str, Any]


def reference(schema: Json) -> str:
    """`docs/stack-reference.md`: each key of a stack file with its type, default and meaning."""
    lines = [
        "# Stack reference",
        "",
        "Every key of `stacks/Pulumi.<stack>.yaml`. Made by `slipway schema --markdown` from `infra/spec/`; do not edit.",
    ]
    definitions = cast(dict[str, Json], schema["$defs"])
    config = cast(Json, schema["properties"]["config"])
    for key, value in cast(dict[str, Json], config["properties"]).items():
        needed = " (required)" if key in config["required"] else ""
        lines += ["", f"## `{key}`{needed}", "", str(value.get("description", ""))]
        for name in _parts(value, definitions):
            lines += ["", *_table(name, definitions[name])]
    return "\n".join(lines) + "\n"


def _parts(value: Json, definitions: dict[str, Json]) -> list[str]:
    """Names of the definitions that `value` uses, itself first, each once, depth first."""
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            mapping = cast(Json, node)
            name = str(mapping.get("$ref", "")).removeprefix("#/$defs/")
            if name and name not in found:
                found.append(name)
                walk(definitions[name].get("properties", {}))
            for inner in mapping.values():
                walk(inner)
        elif isinstance(node, list):
            for inner in cast(list[Any], node):
                walk(inner)

    walk(value)
    return [name for name in found if "properties" in definitions[name]]


def _table(name: str, definition: Json) -> list[str]:
    heading = [f"### {name}", "", *([str(definition["description"]), ""] if "description" in definition else [])]
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in cast(dict[str, Json], definition["properties"]).items():
        default = f"`{_yaml(value['default'])}`" if "default" in value else "required"
        rows.append(f"| `{key}` | {_type(value)} | {default} | {' '.join(str(value.get('description', '')).split())} |")
    return heading + rows


def _type(value: Json) -> str:
    if "$ref" in value:
        return str(value["$ref"]).removeprefix("#/$defs/")
    if "enum" in value:
        return " \\| ".join(f"`{item}`" for item in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in value:
            return " \\| ".join(_type(inner) for inner in value[union] if inner.get("type") != "null")
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}" if "items" in value else "pair"
    return str(value.get("type", "any"))


def _yaml(default: Any) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return str(default).lower()
        case dict() | list():
            return "{}" if default == {} else "[]" if default == [] else str(cast(Any, default)).replace("'", "")
        case _:
            return str(default)
