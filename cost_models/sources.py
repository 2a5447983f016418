"""Where the seconds of a plan come from: measured, measured elsewhere and carried over, or calculated.

Words about costs that were asked for; prices nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum

from cost_models.communication import Communication
from cost_models.link import Link
from cost_models.profile import HardwareProfile, Transfer
from realloc.augmented import NodeKind
from realloc.mesh import DeviceMesh


class Source(IntEnum):
    """What stands behind a number, best first."""

    MEASURED = 0
    EXTRAPOLATED = 1
    """Measured, but not so far."""
    SCALED = 2
    """From something related that was measured."""
    ANALYTIC = 3


Found = tuple[Source, str]
"""A source, and of what."""


def describe(found: Iterable[Found]) -> str:
    """Such as `measured: head, inference; analytic: all_reduce across nodes (one 200 Gb/s NIC per GPU)`."""
    texts: dict[Source, set[str]] = {source: set() for source in Source}
    for source, text in found:
        texts[source].add(text)
    parts = [f"{source.name.lower()}: {', '.join(sorted(of))}" for source, of in texts.items() if of]
    return "; ".join(parts)


def message_sources(
    profile: HardwareProfile, communication: Communication, mesh: DeviceMesh, *, stages: bool
) -> Iterator[Found]:
    """Of collectives that were priced on a mesh; `stages`: and of messages between its pipeline stages."""
    for collective, group in communication.asked:
        if group.nodes == 1:
            yield _collective(profile.intra_node, collective, group.per_node, "")
            continue
        yield _collective(profile.inter_node, collective, group.nodes, " across nodes")
        if group.per_node > 1:
            for part in ("reduce_scatter", "all_gather"):
                if collective in (part, "all_reduce"):
                    yield _collective(profile.intra_node, part, group.per_node, "")
    if stages:
        yield _messages(profile, across=mesh.num_nodes > 1)


def _collective(link: Link, collective: str, ranks: int, where: str) -> Found:
    name, measured = f"{collective}{where}", link.measured_ranks(collective)
    if link.estimate:
        return Source.ANALYTIC, f"{name} ({link.estimate})"
    if not measured:
        return Source.SCALED, f"{name} (from messages)"
    if measured[0] <= ranks <= measured[-1]:
        return Source.MEASURED, name
    span = f"{measured[0]}" if len(measured) == 1 else f"{measured[0]} to {measured[-1]}"
    return Source.EXTRAPOLATED, f"{name} (groups of {ranks}, measured {span})"


def _messages(profile: HardwareProfile, *, across: bool) -> Found:
    link = profile.inter_node if across else profile.intra_node
    name = "messages across nodes" if across else "messages"
    return (Source.ANALYTIC, f"{name} ({link.estimate})") if link.estimate else (Source.MEASURED, name)


def neighbour_sources(profile: HardwareProfile, ranks: int) -> Iterator[Found]:
    """Of how much `ranks` ranks of one host slow each other down; nothing where that was measured."""
    if not profile.attention.per_sequence or ranks < 2:
        return  # devices of their own
    if profile.concurrency is None:
        yield Source.ANALYTIC, f"{ranks} ranks on a host (taken not to slow each other down)"
    elif ranks > (most := profile.concurrency.points[-1][0]):
        yield Source.EXTRAPOLATED, f"{ranks} ranks on a host (measured up to {most:g})"


def move_sources(profile: HardwareProfile, kind: NodeKind, across: bool) -> Iterator[Found]:
    """Of nodes of one kind between calls; `across`: some of them move something across nodes."""
    if kind in (NodeKind.LOAD, NodeKind.OFFLOAD):
        yield Source.MEASURED, "host copies"
        return
    if kind is NodeKind.REALLOCATE and profile.attention.per_sequence:
        yield Source.MEASURED, "memory"  # ranks of a host read each other's
    else:
        yield _messages(profile, across=False)
    if across:
        yield _messages(profile, across=True)
    if kind is NodeKind.TRANSFER:
        is_known = profile.transfer != Transfer()
        how = "work beside messages" + ("" if is_known else " (taken as none)")
        yield Source.MEASURED if is_known else Source.ANALYTIC, how
