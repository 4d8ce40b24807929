"""Charts as inline SVG: bars without text, so that they stretch to any width; what they say stands beside them as HTML."""

from collections.abc import Mapping, Sequence

from infra.cli.report.html import Html, tag

COLOURS = 7
"""Classes `part-0` … of the style sheet."""


def memory_bar(parts: Mapping[str, float], *, limit_gib: float, value_gib: float) -> Html:
    """Parts of a memory, largest first, against its limit; what is above the limit is drawn beyond its mark."""
    full = max(limit_gib, value_gib) * 1.02
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    rects, at = [_rect(0, 100 * limit_gib / full, "track", "")], 0.0
    for index, (part, gib) in enumerate(largest_first):
        rects.append(_rect(at, 100 * gib / full, f"part-{index % COLOURS}", f"{part}: {gib:.2f} GiB"))
        at += 100 * gib / full
    mark = 100 * limit_gib / full
    rects.append(tag("line", x1=_n(mark), x2=_n(mark), y1="0", y2="10", class_="limit"))
    keys = [
        tag("li", tag("span", class_=f"key part-{index % COLOURS}"), part, " ", tag("b", f"{gib:.3g} GiB"))
        for index, (part, gib) in enumerate(largest_first)
    ]
    said = f"{value_gib:.1f} of {limit_gib:.1f} GiB"
    return tag("div", _svg(rects, said), tag("ul", *keys, class_="legend"), class_="chart")


def range_bars(rows: Sequence[tuple[str, float, float, str]]) -> Html:
    """One bar a row: what is always there, and what can be there at most. Rows: name, least, most, label."""
    full = max((most for _, _, most, _ in rows), default=0) or 1
    lines = [
        tag(
            "div",
            tag("span", name, class_="name"),
            _svg(
                [
                    _rect(0, 100 * most / full, "most", f"at most {most:,.2f}"),
                    _rect(0, 100 * least / full, "least", f"at least {least:,.2f}"),
                ],
                f"{name}: {label}",
            ),
            tag("span", label, class_="number"),
            class_="bar-row",
        )
        for name, least, most, label in rows
    ]
    return tag("div", *lines, class_="bars")


def _svg(shapes: Sequence[Html], said: str) -> Html:
    return tag("svg", *shapes, viewBox="0 0 100 10", preserveAspectRatio="none", role="img", aria_label=said)


def _rect(x: float, width: float, kind: str, said: str) -> Html:
    inside = [tag("title", said)] if said else []
    return tag("rect", *inside, x=_n(x), y="0", width=_n(max(width, 0)), height="10", class_=kind)


def _n(value: float) -> str:
    return f"{value:.3f}"
