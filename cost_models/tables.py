"""Measured seconds of the runtime's own code: tables in a hardware profile, read and interpolated.

A table holds one quantity of one thing (a shard of a layer, a shard of a model's ends, the optimizer)
in one dtype: what it took, at the sizes where it was measured. Between them it is interpolated; beyond
them it goes on with the slope of a model that the caller brings, and says so. What the quantities
mean to a call is not known here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, log
from typing import Any

from cost_models.curve import positive
from realloc.errors import InputError
from realloc.files import Reader, nearest
from realloc.lengths import MOST_RAGGED
from realloc.model_shape import DTYPE_BYTES

# Quantity -> its variables. Packs have so many sequences of so many tokens each.
_PACK = ("sequences", "tokens_each")
VARIABLES: Mapping[str, tuple[str, ...]] = {
    # of a layer; "sp": hidden states between its matrices are split over the shards by rows
    "inference": _PACK,
    "inference_sp": _PACK,
    "prefill": _PACK,
    "forward": _PACK,
    "forward_sp": _PACK,
    "backward": _PACK,
    "backward_sp": _PACK,
    "weight": _PACK,
    "selective": _PACK,
    "full": _PACK,
    "decode": ("batch", "context"),
    "pack_weights": ("layers",),
    # of the ends
    "enter": ("tokens",),
    "enter_train": ("tokens",),
    "enter_backward": ("tokens",),
    "head": ("rows",),
    "head_train": ("rows",),
    "head_backward": ("rows",),
    "sample": ("batch",),
    # of a call, beside its model
    "call": ("sequences", "micro_batches"),
    # of the parameters that a rank steps
    "optimizer": ("elements",),
}

EDGE = 1.1
"""So far beyond the last point, as a factor, counts as measured still."""

Slope = Callable[[float, float], float]
"""Seconds by a model for the two variables (the second is 1 where there is only one)."""


@dataclass(frozen=True)
class Row:
    """`seconds` at (x, y), typical of the samples; `spread`: the distance of their quartiles, as a share.

    `beside`: how many times longer it takes while all ranks of the host are at the same, where that is known.
    """

    x: float
    y: float
    seconds: float
    spread: float = 0.0
    beside: float | None = None


@dataclass(frozen=True)
class Reading:
    """Seconds, and whether they lie outside of what was measured."""

    seconds: float
    extrapolated: bool


@dataclass(frozen=True)
class Table:
    """`of`: a name from `realloc.signature`, or `optimizer`.

    `ragged`: by which share of `tokens_each` the lengths of a pack differed from it at most, lying evenly
    between; 0 for equal ones.
    """

    of: str
    dtype: str
    quantity: str
    ragged: float
    rows: tuple[Row, ...]

    @property
    def key(self) -> tuple[str, str, str, float]:
        return (self.of, self.dtype, self.quantity, self.ragged)

    @property
    def squares(self) -> float:
        """Mean square of a pack's lengths over their squared mean."""
        return 1 + self.ragged**2 / 3

    @cached_property
    def together(self) -> Table | None:
        """The same with all ranks of the host at it; None where that was not measured."""
        if any(row.beside is None for row in self.rows):
            return None
        rows = (replace(row, seconds=row.seconds * (row.beside or 1.0), beside=None) for row in self.rows)
        return replace(self, rows=tuple(rows))

    @cached_property
    def _lines(self) -> tuple[tuple[float, ...], tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]]:
        """The values of y, and the points (x, seconds) along each."""
        ys = sorted({row.y for row in self.rows})
        lines = []
        for y in ys:
            points = sorted((row.x, row.seconds) for row in self.rows if row.y == y)
            lines.append((tuple(x for x, _ in points), tuple(s for _, s in points)))
        return tuple(ys), tuple(lines)

    def at(self, x: float, y: float, slope: Slope) -> Reading:
        """Seconds at (x, y): a straight line in x, since every pack has fixed costs and costs for each
        sequence; in y a straight line for contexts and a power law for lengths, which enter squared too.

        Exact where it was measured, continuous, and rising where the measured seconds do. Outside,
        the seconds at the edge grow as `slope` does.
        """
        ys, _ = self._lines
        place = bisect_left(ys, y)
        if place < len(ys) and ys[place] == y:
            return self._on_line(place, x, slope)
        if place in (0, len(ys)):
            edge = min(place, len(ys) - 1)
            reading = self._on_line(edge, x, slope)
            outside = reading.extrapolated or _is_far(y, ys[edge])
            return Reading(reading.seconds * slope(x, y) / slope(x, ys[edge]), outside)
        low, high = self._on_line(place - 1, x, slope), self._on_line(place, x, slope)
        below, above = ys[place - 1], ys[place]
        outside = low.extrapolated or high.extrapolated
        if VARIABLES[self.quantity] == _PACK:
            share = log(y / below) / log(above / below)
            power = (1 - share) * log(low.seconds) + share * log(high.seconds)
            return Reading(exp(power), outside)
        share = (y - below) / (above - below)
        return Reading((1 - share) * low.seconds + share * high.seconds, outside)

    def _on_line(self, line: int, x: float, slope: Slope) -> Reading:
        ys, lines = self._lines
        xs, seconds = lines[line]
        place = bisect_left(xs, x)
        if place < len(xs) and xs[place] == x:
            return Reading(seconds[place], False)
        if place in (0, len(xs)):
            edge = min(place, len(xs) - 1)
            grown = slope(x, ys[line]) / slope(xs[edge], ys[line])
            return Reading(seconds[edge] * grown, _is_far(x, xs[edge]))
        share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
        return Reading((1 - share) * seconds[place - 1] + share * seconds[place], False)

    @property
    def range_text(self) -> str:
        """What was measured, such as `sequences 1 to 16, tokens_each 64 to 512`."""
        names = VARIABLES[self.quantity]
        texts = [f"{names[0]} {_range([row.x for row in self.rows])}"]
        if len(names) > 1:
            texts.append(f"{names[1]} {_range([row.y for row in self.rows])}")
        return ", ".join(texts)


def _is_far(asked: float, edge: float) -> bool:
    return max(asked / edge, edge / asked) > EDGE


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def read_tables(rows: Any, where: str) -> tuple[Table, ...]:
    """Reads a profile's `tables`. Raises InputError naming the table and the row."""
    if not isinstance(rows, list):
        raise InputError(f"{where}: expected a list of tables.")
    tables: dict[tuple[str, str, str, float], Table] = {}
    for number, entry in enumerate(rows, 1):
        table = _read_table(Reader(entry, f"{where}, table {number}"))
        if table.key in tables:
            raise InputError(
                f"{where}, table {number}: {table.quantity} of '{table.of}' in {table.dtype} stands twice."
            )
        tables[table.key] = table
    return tuple(tables.values())


def _read_table(reader: Reader) -> Table:
    dtype = reader.choice("dtype", tuple(DTYPE_BYTES))
    quantity = reader.get("quantity", str)
    if quantity not in VARIABLES:
        raise InputError(
            f"{reader.at('quantity')}: no such quantity: '{quantity}'.{nearest(quantity, VARIABLES)}"
        )
    where = reader.at("rows")
    rows = tuple(
        _read_row(row, VARIABLES[quantity], f"{where}, row {number}")
        for number, row in enumerate(reader.get("rows", list), 1)
    )
    if not rows:
        raise InputError(f"{where}: needs at least one row.")
    if len({(row.x, row.y) for row in rows}) < len(rows):
        raise InputError(f"{where}: two rows are for the same {' and '.join(VARIABLES[quantity])}.")
    table = Table(
        of=reader.get("of", str),
        dtype=dtype,
        quantity=quantity,
        ragged=reader.number("ragged", 0.0, minimum=0.0, maximum=MOST_RAGGED),
        rows=rows,
    )
    reader.done()
    return table


def _read_row(row: Any, variables: Sequence[str], where: str) -> Row:
    names = [*variables, "seconds", "spread"]
    if not isinstance(row, list) or len(row) not in (len(names), len(names) + 1):
        raise InputError(f"{where}: expected [{', '.join(names)}] and perhaps beside, found {row!r}.")
    numbers = [positive(value, where) for value in row[: len(names) - 1]]
    spread = row[len(names) - 1]
    if isinstance(spread, bool) or not isinstance(spread, (int, float)) or not 0 <= spread <= 1e6:
        raise InputError(f"{where}: the spread must be a number from 0 on, found {spread!r}.")
    y = numbers[1] if len(variables) > 1 else 1.0
    beside = positive(row[-1], where) if len(row) > len(names) else None
    return Row(numbers[0], y, numbers[-1], float(spread), beside)


def tables_content(tables: Sequence[Table]) -> Sequence[Mapping[str, Any]]:
    """The tables as the list that a profile holds."""
    return [
        {
            "of": table.of,
            "dtype": table.dtype,
            "quantity": table.quantity,
            "ragged": table.ragged,
            "rows": [_row_content(row, table.quantity) for row in table.rows],
        }
        for table in tables
    ]


def _row_content(row: Row, quantity: str) -> Sequence[float]:
    sizes = (row.x, row.y) if len(VARIABLES[quantity]) > 1 else (row.x,)
    return [*sizes, row.seconds, row.spread, *(() if row.beside is None else (row.beside,))]
