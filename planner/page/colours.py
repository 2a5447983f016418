"""Colours that people with any colour vision tell apart, and the text that reads on them.

The set is Okabe and Ito's (Color Universal Design, 2008), without its black. Labels carry the
meaning; a colour alone never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
NEUTRAL = "#8A8F98"
_SHADES = (1.0, 0.62, 1.35)


def of(names: Iterable[str]) -> Mapping[str, str]:
    """A colour for each name; beyond the palette darker and lighter shades of it."""
    return {name: shaded(i) for i, name in enumerate(dict.fromkeys(names))}


def shaded(index: int) -> str:
    base = PALETTE[index % len(PALETTE)]
    factor = _SHADES[index // len(PALETTE) % len(_SHADES)]
    channels = (min(255, round(int(base[i : i + 2], 16) * factor)) for i in (1, 3, 5))
    return "#" + "".join(f"{channel:02X}" for channel in channels)


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more (relative luminance as in WCAG 2)."""

    def linear(channel: int) -> float:
        value = channel / 255
        return float(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#FFFFFF"
