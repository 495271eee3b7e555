"""What a report of ours looks like: one HTML page that needs nothing else, its tables, boxes, pictures and curves.

The inspection of bags, the offline evaluation and the simulated roll-outs write such pages. Colours are Okabe and
Ito's, which people with any colour vision can tell apart; nothing is said by colour alone.

Knows: HTML, CSS, inline SVG.
Must not know: what is reported. Every text that it is given is escaped here, unless a name ends in _html.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
)  # fmt: skip
ACROSS = 1000  # units of a row of curves, from its left to its right; 100 from top to bottom

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ddd; }
p.sub { color: #666; margin: .2rem 0 1.2rem; }
.verdicts { display: flex; flex-wrap: wrap; gap: .8rem; }
.verdict { flex: 1 1 20rem; border-left: 6px solid; padding: .6rem 1rem; background: #f6f7f8; font-weight: 600; }
.yes { border-color: #0072B2; } .no { border-color: #D55E00; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; } table.facts td { text-align: left; }
img { width: 100%; height: auto; margin: .5rem 0; } .wide { overflow-x: auto; }
ul.notes { background: #fdf6e3; padding: .7rem 1rem .7rem 2rem; margin: 1rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; } footer { color: #666; margin-top: 3rem; font-size: .9rem; }
"""


def head(title: str, more_style: str = "") -> str:
    """The page up to its body."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}{more_style}</style></head>\n<body>\n"
    )


END = "\n</body></html>\n"


def page(title: str, parts_html: Sequence[str], more_style: str = "") -> str:
    """A whole page."""
    return head(title, more_style) + "\n".join(part for part in parts_html if part) + END


def verdicts(claims: Sequence[tuple[bool, str]], more_html: str = "") -> str:
    """Boxes side by side, of (good or not, what is claimed)."""
    boxes = "".join(
        f'<div class="verdict {"yes" if good else "no"}">{"✓" if good else "✗"} {escape(text)}</div>'
        for good, text in claims
    )
    return f'<div class="verdicts">{boxes}{more_html}</div>'


def notes(lines: Sequence[str]) -> str:
    """A list of lines, nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def facts(name: str, values: Mapping[str, Any], opened: bool = False) -> str:
    """A folded list of names and values; those that are None are left out."""
    rows = "".join(
        f"<tr><td>{escape(key.replace('_', ' '))}</td><td><code>{escape(str(value))}</code></td></tr>"
        for key, value in values.items()
        if value is not None
    )
    summary = f"<summary>{escape(name)}</summary>"
    return f'<details{" open" * opened}>{summary}<table class="facts">{rows}</table></details>'


def data_uri(content: bytes, kind: str) -> str:
    """A file of a kind ("image/png") as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(alt: str, content: bytes, kind: str = "image/png") -> str:
    """A picture, inside the page."""
    return f'<img alt="{escape(alt)}" loading="lazy" src="{data_uri(content, kind)}">'


# -- curves, as inline SVG ----------------------------------------------------------------------------------------


def row_svg(inside_html: str, height_px: int, css_class: str = "row") -> str:
    """A row of a chart, as wide as its place: ACROSS x 100 units, which stretch."""
    return (
        f'<svg class="{css_class}" viewBox="0 0 {ACROSS} 100" preserveAspectRatio="none" '
        f'style="height:{height_px}px">{inside_html}</svg>'
    )


def line(x: np.ndarray, y: np.ndarray, breaks: np.ndarray, colour: str, width: float = 1.3) -> str:
    """A curve through (N,) points in units of a row; `breaks` (N,) bool: points to which no line leads."""
    xs, ys = np.rint(x).astype(int).tolist(), np.rint(y).astype(int).tolist()
    steps = "".join(f"{'M' if b else 'L'}{a} {c}" for a, c, b in zip(xs, ys, breaks.tolist(), strict=True))
    if not steps:
        return ""
    return (
        f'<path d="M{steps[1:]}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linejoin="round" vector-effect="non-scaling-stroke"/>'
    )


def band(x0: float, x1: float, colour: str, opacity: float = 0.25, y0: float = 0, y1: float = 100) -> str:
    """A box from x0 to x1, in units of a row."""
    width = max(2.0, x1 - x0)  # one that is as short as a moment is seen, too
    return (
        f'<rect x="{x0:.0f}" y="{y0:.0f}" width="{width:.0f}" height="{y1 - y0:.0f}" fill="{colour}" '
        f'opacity="{opacity:g}"/>'
    )


def envelope(x: np.ndarray, y: np.ndarray, bins: int) -> np.ndarray:
    """Which of (N,) points to draw where there are many: the lowest and the highest of each of `bins` parts of x.

    So no peak is lost. Returns (K,) int64, in order; `x` is sorted, and K at most 2 x `bins` + 2.
    """
    if len(x) <= 2 * bins:
        return np.arange(len(x))
    of = np.minimum(((x - x[0]) / max(float(x[-1] - x[0]), 1e-12) * bins).astype(int), bins - 1)
    starts = np.flatnonzero(np.diff(of, prepend=-1))  # where each part that has points begins
    stops = np.append(starts[1:], len(x))
    kept = {0, len(x) - 1}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        kept |= {start + int(y[start:stop].argmin()), start + int(y[start:stop].argmax())}
    return np.array(sorted(kept))
