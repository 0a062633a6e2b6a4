"""Pieces of a self-contained HTML page: page, tables, line charts as inline SVG. No script, no external resource."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 76em; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: .2em; } h2 { margin-top: 2em; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #d0d7de; text-align: right; vertical-align: top; }
th { background: #f6f8fa; } th:first-child, td:first-child { text-align: left; }
.facts th, .facts td { text-align: left; } .facts td { overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; }
.better { color: #0a6b2d; font-weight: 600; } .worse { color: #b3261e; font-weight: 600; } .note { color: #57606a; }
.wide { overflow-x: auto; } .charts { display: flex; flex-wrap: wrap; gap: 1em; }
details td { white-space: nowrap; }
figure { margin: 0; } figcaption { font-size: .9em; } .legend span { margin-right: 1.2em; white-space: nowrap; }
pre { background: #f6f8fa; padding: .8em; overflow-x: auto; font-size: .85em; } svg text { font: 11px sans-serif; }
"""
COLOURS = ("#1b1f24", "#0969da", "#bf5700", "#1a7f37", "#8250df", "#bc1c66")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 270, 210, 60, 18, 12, 34


class Cell(NamedTuple):
    """A table cell with a CSS class."""

    text: str
    css: str = ""


def number(value: float) -> str:
    """Four significant digits or all before the point, thousands separated."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def tag(name: str, text: str, css: str = "") -> str:
    """<name class=css>text</name>, the text escaped."""
    return f"<{name}{_class(css)}>{html.escape(text)}</{name}>"


def table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], css: str = "") -> str:
    """A table; every text is escaped."""
    lines = [f'<div class="wide"><table{_class(css)}>']
    if head:
        lines.append("<tr>" + "".join(tag("th", text) for text in head) + "</tr>")
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        lines.append("<tr>" + "".join(tag("td", cell.text, cell.css) for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def legend(names: Sequence[str]) -> str:
    """The colours that `line_chart` gives to series in this order."""
    spans = (
        f'<span style="color:{COLOURS[place % len(COLOURS)]}">&#9679; {html.escape(name)}</span>'
        for place, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(spans)}</p>'


def line_chart(title: str, unit: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Lines over context lengths (logarithmic) from zero up; series: {name: [(tokens, value)]}, colours by order."""
    places = sorted({x for points in series.values() for x, _ in points})
    highest = _round_up(max(y for points in series.values() for _, y in points))
    low, high = math.log(places[0]), math.log(places[-1])

    def across(tokens: int) -> float:
        share = (math.log(tokens) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - value / highest * (HEIGHT - TOP - BOTTOM)

    parts = [f"<figure><figcaption>{html.escape(title)}</figcaption>"]
    parts.append(f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">')
    for step in range(5):
        value = highest * step / 4
        y = down(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.10g}</text>')
    for tokens in places:
        parts.append(
            f'<text x="{across(tokens):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{length(tokens)}</text>'
        )
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(unit)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">prompt, tokens</text>')
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        at = [(across(x), down(y)) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (tokens, value) in zip(at, sorted(points)):
            hint = html.escape(f"{name}, {length(tokens)}: {number(value)} {unit}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{hint}</title></circle>')
    return "\n".join([*parts, "</svg></figure>"])


def length(tokens: int) -> str:
    """131072 as 128K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file, well-formed as XML too."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""


def _round_up(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten: five grid lines then have short labels."""
    if value <= 0:
        return 1.0
    unit = 10 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 4, 8, 10) if step * unit >= value * 0.999999)
