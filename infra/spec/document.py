"""The YAML of a stack file, as the Pulumi engine reads it (YAML 1.2: `off` is a word, 4e4 a number), with the line of each value.

What one reader takes and another does not, or takes for something else, is refused: a key that is there twice, a value
that holds itself, aliases that multiply without end.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

import yaml

Loc = tuple[str | int, ...]
STR = "tag:yaml.org,2002:str"
MOST_VALUES = 200_000
"""Values of a document with its aliases written out; 500 pools and 500 services have about 20,000."""


class DocumentError(ValueError):
    """No document; `line` is where, from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, kw_only=True)
class Document:
    values: Any
    lines: dict[Loc, int]
    """Line (from 1) of every key and item."""


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, in which `no` and `off` are false, 2026-11-21 is a date, 1:30 is ninety and 1e-3 a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    cast(Any, _Loader).add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class Dumper(yaml.SafeDumper):
    """Writes what every reader takes alike: PyYAML quotes what YAML 1.1 takes for no text, and to others 1e3 is a number too.

    Texts of many lines are blocks, which a person can read and a diff can show.
    """


_resolver = _Loader("")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    taken = cast(Any, _resolver).resolve(yaml.ScalarNode, text, (True, False)) != STR
    return cast(Any, dumper).represent_scalar(STR, text, style="|" if "\n" in text else '"' if taken else None)


Dumper.add_representer(str, _text)


def read_document(text: str) -> Document:
    """The one document in `text`. Raises DocumentError for what is none, or not one that everybody reads alike."""
    loader: Any = _Loader("")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines: dict[Loc, int] = {}
        if root is not None:
            _walk(root, (), lines, within=())
        return Document(values=None if root is None else loader.construct_document(root), lines=lines)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        raise DocumentError(_problem(str(error.problem or error.context)), mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise DocumentError(f"character {text[int(error.position)]!r} cannot stand there", line) from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"a value cannot be read: {error}", 1) from None
    except RecursionError:
        raise DocumentError("it is nested too deep", 1) from None
    finally:
        loader.dispose()


def _problem(says: str) -> str:
    if "'\\t'" in says:
        return "a tab cannot indent; use spaces"
    if "but found another document" in says:
        return "there is a second document (`---`); a stack file holds one"
    return says


def _walk(node: Any, loc: Loc, lines: dict[Loc, int], *, within: tuple[Any, ...]) -> None:
    """Note the lines of all that is in `node`; `within` are the nodes around it."""
    if node in within:
        raise DocumentError("an alias stands within its own anchor", node.start_mark.line + 1)
    if len(lines) > MOST_VALUES:
        raise DocumentError(f"its aliases make more than {MOST_VALUES:,} values", node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in cast(list[tuple[Any, Any]], node.value):
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag.endswith(":merge"):
                _walk(value, loc, lines, within=(*within, node))
                continue
            if name in seen:
                raise DocumentError(f"key `{name}` is there twice, first on line {seen[name]}; leave one out", line)
            seen[name] = line
            lines[(*loc, name)] = line
            _walk(value, (*loc, name), lines, within=(*within, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(cast(list[Any], node.value)):
            lines[(*loc, index)] = item.start_mark.line + 1
            _walk(item, (*loc, index), lines, within=(*within, node))
