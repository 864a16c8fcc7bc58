"""The demo's report: one self-contained HTML page, its pictures drawn as SVG."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from heedful.demo import Demo

# A single-hue sequential scale from the page's own paper to its ink-blue, dark enough at the end for white text.
_LOW, _HIGH = (244, 241, 234), (23, 62, 108)


def colour(value: float) -> str:
    """A colour for a value in [0, 1]."""
    share = min(1.0, max(0.0, value))
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(_LOW, _HIGH, strict=True))


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    title: str,
    highest: float = 1.0,
    rows: str = "layer",
    columns: str = "head",
    digits: int = 2,
    cell: int = 46,
) -> Markup:
    """A labelled heat map with the value in each cell. ``values[row][column]``; nan cells stay empty."""
    left, top, height = 56, 30, 26
    width = left + cell * len(values[0]) + 10
    parts = [
        _text(left + cell * len(values[0]) / 2, 12, columns, "axis"),
        _text(12, top + height * len(values) / 2, rows, "axis", rotate=True),
    ]
    for column in range(len(values[0])):
        parts.append(_text(left + cell * (column + 0.5), top - 5, str(column), "tick"))
    for row, line in enumerate(values):
        y = top + height * row
        parts.append(_text(left - 8, y + height / 2 + 4, str(row), "tick", anchor="end"))
        for column, value in enumerate(line):
            x = left + cell * column
            if value != value:
                continue
            share = value / highest if highest else 0.0
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{height - 2}" rx="2" fill="{colour(share)}">'
                f"<title>{escape(f'{rows} {row}, {columns} {column}: {value:.4f}')}</title></rect>"
            )
            if value >= 0.5 * 10**-digits:
                tone = "#fff" if share > 0.55 else "#1d1c1a"
                parts.append(_text(x + (cell - 2) / 2, y + height / 2 + 3.5, f"{value:.{digits}f}", "cell", fill=tone))
    return _svg(width, top + height * len(values) + 6, parts, title)


def bars(
    values: Sequence[tuple[str, float]], *, title: str, highest: float | None = None, percent: bool = False
) -> Markup:
    """Horizontal bars with their values, in the order given."""
    highest = highest or max((value for _, value in values), default=1.0) or 1.0
    left, length, height = 210, 330, 30
    parts = []
    for row, (label, value) in enumerate(values):
        y = height * row + 4
        parts.append(_text(left - 10, y + 15, label, "tick", anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length}" height="20" rx="2" fill="{colour(0.06)}"/>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{max(1.0, length * value / highest):.1f}" height="20" rx="2" fill="{colour(0.85)}"/>'
        )
        shown = f"{value:.0%}" if percent else f"{value:.1f}"
        parts.append(_text(left + length + 10, y + 15, shown, "value", anchor="start"))
    return _svg(left + length + 70, height * len(values) + 6, parts, title)


def histogram(values: Sequence[int], *, title: str) -> Markup:
    """How often each whole number occurs: one column a number, with its share."""
    counts = Counter(values)
    last = max(counts, default=1)
    width, height, left, base = 46, 150, 20, 178
    most = max(counts.values(), default=1)
    parts = []
    for number in range(1, last + 1):
        x = left + width * (number - 1)
        count = counts.get(number, 0)
        tall = height * count / most
        parts.append(
            f'<rect x="{x}" y="{base - tall:.1f}" width="{width - 8}" height="{tall:.1f}" rx="2" fill="{colour(0.85)}">'
            f"<title>{number} tokens: {count} forwards</title></rect>"
        )
        parts.append(_text(x + (width - 8) / 2, base + 16, str(number), "tick"))
        parts.append(_text(x + (width - 8) / 2, base - tall - 5, f"{count / len(values):.0%}" if count else "", "tick"))
    parts.append(_text(left + width * last / 2, base + 36, "tokens gained by one forward of the model", "axis"))
    return _svg(left * 2 + max(width * last, 300), base + 44, parts, title)


def grid(values: Sequence[Sequence[float]], *, title: str, rows: str, columns: str, cell: int = 6) -> Markup:
    """A picture without numbers: one small square a value in [0, 1]."""
    left, top = 26, 22
    side = cell * len(values)
    parts = [
        f'<rect x="{left}" y="{top}" width="{cell * len(values[0])}" height="{side}" fill="{colour(0)}"/>',
        _text(left + cell * len(values[0]) / 2, 14, columns, "axis"),
        _text(14, top + side / 2, rows, "axis", rotate=True),
    ]
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value > 0:
                parts.append(
                    f'<rect x="{left + cell * column}" y="{top + cell * row}" width="{cell}" height="{cell}" fill="{colour(0.15 + 0.85 * value)}"/>'
                )
    return _svg(left + cell * len(values[0]) + 4, top + side + 4, parts, title)


def token_view(tokens: Sequence[str], weights: Sequence[float]) -> Markup:
    """Text coloured by weight, with the weight on hover. Colours are relative to the largest weight behind the first token."""
    highest = max(weights[1:], default=1.0) or 1.0
    spans = []
    for token, weight in zip(tokens, weights, strict=True):
        share = weight / highest
        style = (
            f"background:{colour(min(1.0, share))};" + ("color:#fff;" if share > 0.55 else "color:#1d1c1a;")
            if share > 0.02
            else ""
        )
        shown = escape(token).replace("\n", Markup("<br>"))
        spans.append(Markup('<span class="token" style="{}" title="{:.4f}">{}</span>').format(style, weight, shown))
    return Markup("").join(spans)


def _text(
    x: float, y: float, text: str, kind: str, *, anchor: str = "middle", rotate: bool = False, fill: str = ""
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if rotate else ""
    ink = f' fill="{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{turn}{ink}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> Markup:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")  # every label in it went through escape


def render(demo: Demo) -> str:
    """The whole page as a string."""
    assert demo.scores is not None
    assert demo.removal is not None
    assert demo.sinks is not None
    figures = demo.to_json()
    scores = demo.scores.scores.tolist()
    late = demo.late_mass().tolist()
    layers, heads = len(scores), len(scores[0])
    moved = [[demo.mass_moved.get((layer, head), 0.0) for head in range(heads)] for layer in range(layers)]
    shown = _around(demo.tokens, [weight for view in demo.views[:1] for weight in view.weights])
    views: list[dict[str, Any]] = [
        {"name": f"head {view.layer}.{view.head}", "html": token_view(demo.tokens[shown], view.weights[shown])}
        for view in demo.views
    ]
    environment = Environment(loader=PackageLoader("heedful", "templates"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        demo=demo,
        figures=figures,
        removed=demo.removed,
        histogram=histogram(demo.accepted, title="Tokens gained by one forward of the model"),
        speeds=bars(
            [("plain decoding", demo.plain_tokens_per_second), ("Token Recycling", demo.tokens_per_second)],
            title="Tokens per second",
        ),
        scores=heat_map(scores, title="Retrieval score of each head"),
        recalls=bars(
            [
                ("all heads", figures["recall"]),
                (f"without {demo.removed} random others", figures["recall_without_random_heads"]),
                (f"without {demo.removed} retrieval heads", figures["recall_without_retrieval_heads"]),
            ],
            title="Recall of needles",
            highest=1.0,
            percent=True,
        ),
        views=views,
        skipped=shown.start,
        hip=grid(demo.hip_picture, title="Keys that HiP reads", rows="queries (time runs down)", columns="keys"),
        first=heat_map(demo.sinks.first_token.tolist(), title="Mean attention to the first token", cell=40),
        late=heat_map(late, title="Share of attention on late sinks", cell=40),
        moved=heat_map(
            moved, title="Attention mass moved by ACT", highest=max(map(max, moved)) or 1.0, digits=3, cell=46
        ),
        sink_tokens=[(token.replace("\n", "\\n"), count) for token, count in demo.sinks.by_token()[:12]],
    )


def _around(tokens: Sequence[str], weights: Sequence[float], before: int = 60) -> slice:
    """The part of the prompt to show: from a little before the most attended token (the first one aside) to the end."""
    most = max(range(1, len(tokens)), key=weights.__getitem__) if weights else 0
    return slice(max(0, min(most, len(tokens) - 1) - before), len(tokens))


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a whole file or none: a kill or a full disk leaves the old file as it was."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
