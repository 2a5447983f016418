"""Numbers and paragraphs for people: the same everywhere in text, in at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

WIDTH = 100


def seconds(value: float) -> str:
    """`12.3 s`, `4.56 ms`: four digits are more than a prediction is worth."""
    if value >= 0.1 or value <= 0:
        return f"{value:.4g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.3g} us"


def share(part: float, whole: float) -> str:
    """`12%`; `0.3%` below one percent."""
    ratio = part / whole if whole > 0 else 0.0
    return f"{ratio:.1%}" if 0 < ratio < 0.01 else f"{ratio:.0%}"


def paragraph(text: str, indent: str = "", first: str | None = None) -> str:
    """Text wrapped to WIDTH; `first`: the indent of its first line, where it differs."""
    lines = wrap(
        text,
        WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def span(ranks: Sequence[int]) -> str:
    """Ranks as ranges: `0-7 and 12`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return " and ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
