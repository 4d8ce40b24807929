"""HTML from values: every text is escaped once, where it becomes a part of the page."""

from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """`<name …>children</name>`. Children that are no `Html` are escaped; `class_` is `class`, `_` in names is `-`."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value, quote=True)}"' for key, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Html) else escape(child, quote=False) for child in children)
    return Html(f"<{name}{said}>{inside}</{name}>")


def join(*parts: str) -> Html:
    """Parts one after another, escaped where they are no `Html`."""
    return Html("".join(part if isinstance(part, Html) else escape(part, quote=False) for part in parts))


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]], *, numbers_from: int = 1) -> Html:
    """A table whose columns from `numbers_from` on are numbers, to the right."""

    def cell(name: str, index: int, text: str) -> Html:
        return tag(name, text, class_="number") if index >= numbers_from else tag(name, text)

    head = tag("thead", tag("tr", *(cell("th", index, text) for index, text in enumerate(heads))))
    body = tag("tbody", *(tag("tr", *(cell("td", index, text) for index, text in enumerate(row))) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll")
