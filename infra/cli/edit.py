"""Values of a stack file set in its text: comments, order and layout stay, byte for byte, outside of what is set."""

from difflib import unified_diff
from pathlib import Path
from typing import Any, cast

import yaml

from infra.checks import Patch
from infra.spec.load import PREFIX


class EditError(ValueError):
    """The text cannot be changed in this one place: it shares it with others, by an anchor."""


def apply(text: str, patch: Patch) -> str:
    """The stack file `text` with the values of `patch`. Raises EditError where no edit of one place does it."""
    for path, value in patch.items():
        text = _set(text, path.split("."), list(value) if isinstance(value, tuple) else value)
    return text


def difference(before: str, after: str, *, file: Path) -> str:
    """A unified diff, for people."""
    lines = unified_diff(before.splitlines(), after.splitlines(), str(file), str(file), n=1, lineterm="")
    return "\n".join(lines)


def _set(text: str, path: list[str], value: Any) -> str:
    keys: list[str] = ["config", PREFIX + path[0], *path[1:]]
    edited = _edit(text, keys, value)
    wanted = _unshared(yaml.safe_load(text))
    _assign(wanted, keys, value)
    try:
        right = yaml.safe_load(edited) == wanted
    except yaml.YAMLError:
        right = False
    if not right:
        raise EditError(f"{'.'.join(path)} cannot be set by itself; edit the file by hand")
    return edited


def _edit(text: str, keys: list[str], value: Any) -> str:
    """Follow `keys` as far as the file goes, then replace the value there or add the rest."""
    node: Any = cast(Any, yaml).compose(text, Loader=yaml.SafeLoader)
    for depth, key in enumerate(keys):
        inner = _child(node, key)
        if inner is None:
            return _add(text, node, keys[depth:], value)
        node = inner
    return _replace(text, node, _flow(value))


def _child(node: Any, key: str) -> Any:
    """The value of `key` in a mapping, or the item of a sequence whose `name` is `key`."""
    if isinstance(node, yaml.MappingNode):
        pairs = cast(list[tuple[Any, Any]], node.value)
        return next((inner for name, inner in pairs if name.value == key), None)
    if isinstance(node, yaml.SequenceNode):
        named = ((_child(item, "name"), item) for item in cast(list[Any], node.value))
        return next((item for name, item in named if name is not None and name.value == key), None)
    return None


def _add(text: str, node: Any, keys: list[str], value: Any) -> str:
    """`keys` under `node`, which has not the first of them; those below it come as a flow mapping."""
    for key in reversed(keys[1:]):
        value = {key: value}
    if not isinstance(node, yaml.MappingNode):
        return _replace(text, node, _flow({keys[0]: value}))
    entry = f"{keys[0]}: {_flow(value)}"
    if node.flow_style:
        pairs = cast(list[tuple[Any, Any]], node.value)
        at = _end(pairs[-1][1]) if pairs else cast(int, node.start_mark.index) + 1
        return text[:at] + (", " if pairs else "") + entry + text[at:]
    return _insert_line(text, after=_end(node), line=" " * cast(int, node.start_mark.column) + entry)


def _insert_line(text: str, *, after: int, line: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    if after and text[after - 1] == "\n":  # a block scalar ends with its line
        return text[:after] + line + newline + text[after:]
    end = text.find(newline, after)
    end = len(text) if end < 0 else end
    return text[:end] + newline + line + text[end:]


def _replace(text: str, node: Any, value: str) -> str:
    start, end = cast(int, node.start_mark.index), _end(node)
    nothing = start == end and text[start - 1 : start] == ":"  # `key:` with nothing after it
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style  # may stand at its key's own column
    return text[:start] + (" " if nothing else "  " if block else "") + value + text[end:]


def _end(node: Any) -> int:
    """Index after the last character of the node itself; of block collections, of their last value."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = cast(list[Any], node.value)[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return cast(int, node.end_mark.index)


def _flow(value: Any) -> str:
    """`value` on one line, in the form that it has inside a flow collection, which may stand anywhere."""
    listed = yaml.safe_dump([value], default_flow_style=True, width=2**31, allow_unicode=True)
    return listed.strip().removeprefix("[").removesuffix("]")


def _unshared(value: Any) -> Any:
    """`value` with a copy for each alias of an anchor."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in cast(dict[Any, Any], value).items()}
    return [_unshared(inner) for inner in cast(list[Any], value)] if isinstance(value, list) else value


def _assign(document: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if isinstance(document, list):
            document = next(item for item in cast(list[Any], document) if item.get("name") == key)
        else:
            if document.get(key) is None:
                document[key] = {}
            document = document[key]
    document[keys[-1]] = value
