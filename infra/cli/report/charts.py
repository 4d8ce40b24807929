"""Charts as inline SVG: bars without text, so that they stretch to any width; what they say stands beside them as HTML."""

from collections.abc import Mapping, Sequence

from infra.cli.report.html import Html, tag

COLOURS = 7
"""Classes `part-0` … of the style sheet."""


def memory_bar(parts: Mapping[str, float], *, limit_gib: float, value_gib: float) -> Html:
    """Parts of a memory, largest first, against its limit; what is above the limit is drawn beyond its mark."""
    full = max(limit_gib, value_gib) * 1.02
    mark = 100 * limit_gib / full
    track = _rect(0, mark, "track", "")
    limit = tag("line", x1=_n(mark), x2=_n(mark), y1="0", y2="10", class_="limit")
    said = f"{value_gib:.1f} of {limit_gib:.1f} GiB"
    shapes = [track, *_stacked(parts, full=full, form=".2f", unit="GiB"), limit]
    return tag("div", _svg(shapes, said), _legend(parts, form=".3g", unit="GiB"), class_="chart")


def part_bar(parts: Mapping[str, float], *, form: str, unit: str) -> Html:
    """What a whole is made of, largest first, over the full width."""
    shapes = _stacked(parts, full=sum(parts.values()), form=form, unit=unit)
    said = ", ".join(f"{part} {amount:{form}} {unit}" for part, amount in parts.items())
    return tag("div", _svg(shapes, said), _legend(parts, form=form, unit=unit), class_="chart")


def _largest_first(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: -part[1])


def _stacked(parts: Mapping[str, float], *, full: float, form: str, unit: str) -> list[Html]:
    rects, at = list[Html](), 0.0
    for index, (part, amount) in enumerate(_largest_first(parts)):
        share = 100 * amount / full
        rects.append(_rect(at, share, f"part-{index % COLOURS}", f"{part}: {amount:{form}} {unit}"))
        at += share
    return rects


def _legend(parts: Mapping[str, float], *, form: str, unit: str) -> Html:
    keys = [
        tag("li", tag("span", class_=f"key part-{index % COLOURS}"), part, " ", tag("b", f"{amount:{form}} {unit}"))
        for index, (part, amount) in enumerate(_largest_first(parts))
    ]
    return tag("ul", *keys, class_="legend")


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
