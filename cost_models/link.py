"""Links: seconds of messages and collectives between devices, as latency plus bytes over bandwidth.

A collective's bytes are those of the whole tensor: what each rank holds before an all_reduce or a
reduce_scatter, and after an all_gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

from cost_models.curve import read_curve
from realloc.errors import InputError
from realloc.files import Reader

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
IN_SWITCH = "all_reduce_in_switch"
"""Table of all_reduces that the switch adds up (NVLink SHARP), for the group sizes in it alone."""


def traffic_share(collective: str, ranks: int) -> float:
    """Bytes that each rank must send, as a share of the tensor.

    (n - 1) / n for all_gather and reduce_scatter and twice that for all_reduce: the lower bound,
    which ring algorithms reach (Patarasu and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """
    share = (ranks - 1) / ranks
    return 2 * share if collective == "all_reduce" else share


@dataclass(frozen=True)
class CollectiveCost:
    """A collective in a group of `ranks`: latency plus tensor bytes / `bytes_per_s`.

    With `knees`, (bytes, seconds) that were measured between, in the order of their bytes: straight lines
    from one to the next, and `bytes_per_s` from the last on. Small tensors go another way than large ones,
    and those of a cache another than those beyond it.
    `spread`: the distance of the samples' quartiles as a share of their median, where it was measured.
    """

    ranks: int
    latency_s: float
    bytes_per_s: float
    knees: tuple[tuple[float, float], ...] = ()
    spread: float = 0.0

    def seconds(self, size_bytes: float) -> float:
        before, before_s = 0.0, self.latency_s
        for at, knee_s in self.knees:
            if size_bytes < at:
                return before_s + (knee_s - before_s) * (size_bytes - before) / (at - before)
            before, before_s = at, knee_s
        return before_s + (size_bytes - before) / self.bytes_per_s


@dataclass(frozen=True)
class Link:
    """One kind of link. `latency_s` and `bytes_per_s` are of one point-to-point message.

    `bytes_per_s` is one device's share when all devices of the node use the link. `estimate`: in a profile
    that was measured, where the numbers of a link come from that was not. `spread`: of messages, as above.
    """

    latency_s: float
    bytes_per_s: float
    collectives: tuple[tuple[str, tuple[CollectiveCost, ...]], ...] = ()
    estimate: str = ""
    spread: float = 0.0

    def measured_ranks(self, collective: str) -> tuple[int, ...]:
        """The group sizes that the collective has numbers for."""
        return tuple(row.ranks for name, rows in self.collectives if name == collective for row in rows)

    def message_s(self, size_bytes: float, messages: float = 1.0) -> float:
        return messages * self.latency_s + size_bytes / self.bytes_per_s

    def cost(self, collective: str, ranks: int) -> CollectiveCost:
        """The measured cost of that group size, or one derived from the nearest measured ones.

        Between two measured sizes, latency and the bandwidth of each rank's traffic (bus bandwidth)
        are interpolated over log2 of the group size; beyond them the bus bandwidth of the nearest
        size holds and the latency grows with log2 of the size, as trees do (NCCL 2.4 notes on
        double binary trees). Unmeasured collectives come from the point-to-point numbers: 2 log2(n)
        latencies for an all_reduce, log2(n) for the others, at the message bandwidth.
        """
        rows = next((rows for name, rows in self.collectives if name == collective), ())
        share = traffic_share(collective, ranks)
        hops = log2(ranks)
        if not rows:
            steps = 2 * hops if collective == "all_reduce" else hops
            return CollectiveCost(ranks, steps * self.latency_s, self.bytes_per_s / share)
        above = next((row for row in rows if row.ranks >= ranks), rows[-1])
        below = next((row for row in reversed(rows) if row.ranks <= ranks), rows[0])
        if above.ranks == below.ranks:
            if above.ranks == ranks:
                return above
            latency = above.latency_s * hops / log2(above.ranks)
            bus = above.bytes_per_s * traffic_share(collective, above.ranks)
        else:
            part = (hops - log2(below.ranks)) / (log2(above.ranks) - log2(below.ranks))
            latency = below.latency_s + part * (above.latency_s - below.latency_s)
            low = below.bytes_per_s * traffic_share(collective, below.ranks)
            bus = low + part * (above.bytes_per_s * traffic_share(collective, above.ranks) - low)
        return CollectiveCost(ranks, latency, bus / share)

    def ways(self, collective: str, ranks: int) -> tuple[CollectiveCost, ...]:
        """Every algorithm that a library has for it; it takes the fastest for the size at hand."""
        switched = next((rows for name, rows in self.collectives if name == IN_SWITCH), ())
        if collective == "all_reduce":
            return self.cost(collective, ranks), *(row for row in switched if row.ranks == ranks)
        return (self.cost(collective, ranks),)

    def collective_s(self, collective: str, ranks: int, size_bytes: float) -> float:
        """Seconds of one collective over `ranks` ranks; 0 for one rank."""
        if ranks < 2:
            return 0.0
        return min(way.seconds(size_bytes) for way in self.ways(collective, ranks))


def read_link(reader: Reader) -> Link:
    """Reads a link of a profile. Raises InputError naming the key."""
    tables = reader.optional_child("collectives")
    collectives = []
    if tables is not None:
        names = (*COLLECTIVES, IN_SWITCH)
        collectives = [(name, _read_rows(tables, name)) for name in names if tables.has(name)]
        tables.done()
    link = Link(
        latency_s=reader.number("latency_s", minimum=0.0, maximum=60.0),
        bytes_per_s=reader.number("bytes_per_s", minimum=1.0),
        collectives=tuple(collectives),
        estimate=reader.get("estimate", str, ""),
        spread=reader.number("spread", 0.0, minimum=0.0),
    )
    reader.done()
    return link


def _read_rows(tables: Reader, name: str) -> tuple[CollectiveCost, ...]:
    rows: list[CollectiveCost] = []
    for number, value in enumerate(tables.get(name, list), 1):
        reader = Reader(value, f"{tables.at(name)}, row {number}")
        row = CollectiveCost(
            ranks=reader.integer("ranks", minimum=2, maximum=1_000_000),
            latency_s=reader.number("latency_s", minimum=0.0, maximum=60.0),
            bytes_per_s=reader.number("bytes_per_s", minimum=1.0),
            knees=read_curve(reader, "knees").points if reader.has("knees") else (),
            spread=reader.number("spread", 0.0, minimum=0.0),
        )
        reader.done()
        if rows and row.ranks <= rows[-1].ranks:
            raise InputError(
                f"{reader.where}: {row.ranks} ranks must be more than the {rows[-1].ranks} before it."
            )
        rows.append(row)
    return tuple(rows)


def _row_content(row: CollectiveCost) -> Mapping[str, Any]:
    content = {
        key: value for key, value in vars(row).items() if key != "knees" and (value or key != "spread")
    }
    return {**content, "knees": [list(knee) for knee in row.knees]} if row.knees else content


def link_content(link: Link) -> Mapping[str, Any]:
    """The link as the mapping that a profile file holds."""
    told = {"estimate": link.estimate, "spread": link.spread}
    return {
        **{key: value for key, value in told.items() if value},
        "latency_s": link.latency_s,
        "bytes_per_s": link.bytes_per_s,
        "collectives": {name: [_row_content(row) for row in rows] for name, rows in link.collectives},
    }
