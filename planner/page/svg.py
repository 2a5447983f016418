"""Drawings as SVG text: shapes, labels that fit, axes. Knows nothing of plans.

Everything is drawn in a view box of its own; sizes are in its units, which are pixels on a laptop.
Colours of text and lines are CSS classes, so that one style sheet serves light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

WIDTH = 1200.0
TEXT = 12.0
_CHARACTER = 0.58
"""Width of a character over its size, on average."""
_TEXT_STYLE = "text{font-family:system-ui,sans-serif}.faint{fill:#5b6470}.strong{font-weight:600}"
"""Of files that stand alone."""


class Drawing:
    """Collects shapes. `label` is read to those who do not see it."""

    def __init__(self, height: float, label: str, width: float = WIDTH) -> None:
        self.width, self.height, self._label = width, height, label
        self._parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "",
        *,
        css: str = "",
        title: str = "",
        call: str = "",
    ) -> None:
        """A rectangle; `title` shows on hover, `call` lets the legend find it."""
        attributes = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}"'
        attributes += f' fill="{fill}"' if fill else ""
        attributes += f' class="{css}"' if css else ""
        attributes += f' data-call="{escape(call)}"' if call else ""
        inner = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(f"<rect {attributes}>{inner}</rect>")

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "axis") -> None:
        self._parts.append(f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{css}"/>')

    def polyline(self, points: Sequence[tuple[float, float]], css: str) -> None:
        text = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._parts.append(f'<polyline points="{text}" class="{css}"/>')

    def circle(self, x: float, y: float, radius: float, css: str) -> None:
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="{css}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        css: str = "",
        size: float = TEXT,
        fill: str = "",
    ) -> None:
        attributes = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"'
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        attributes += f' class="{css}"' if css else ""
        attributes += f' fill="{fill}"' if fill else ""
        self._parts.append(f"<text {attributes}>{escape(text)}</text>")

    def label(
        self, x: float, y: float, width: float, height: float, words: Sequence[str], fill: str = ""
    ) -> None:
        """The first of the words that fits into the box, centred; nothing when none does."""
        for text in words:
            if text and text_width(text, 11) <= width - 4:
                self.text(x + width / 2, y + height / 2 + 4, text, anchor="middle", size=11, fill=fill)
                return

    def markup(self) -> str:
        body = "".join(self._parts)
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" '
            f'aria-label="{escape(self._label)}">{body}</svg>'
        )

    def file(self, style: str) -> str:
        """The text of an SVG file, on white; `style`: the classes of its shapes but `faint` and `strong`."""
        head, _, rest = self.markup().partition(">")
        paper = f'<rect width="{_n(self.width)}" height="{_n(self.height)}" fill="#fff"/>'
        return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_TEXT_STYLE}{style}</style>{paper}{rest}\n'


def text_width(text: str, size: float = TEXT) -> float:
    """About how wide a text is."""
    return len(text) * size * _CHARACTER


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def ticks(high: float, most: int = 8) -> Sequence[float]:
    """Round numbers from 0 to `high`, at most `most` and at least two."""
    if high <= 0:
        return [0.0]
    raw = high / most
    power = 10.0 ** floor(log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [step * i for i in range(ceil(high / step * (1 - 1e-9)) + 1) if step * i <= high * (1 + 1e-9)]
