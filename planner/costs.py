"""What planning asks of a cost model, and a cache in front of it.

The planner knows no hardware: seconds and bytes come through this protocol alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from realloc.augmented import Placement
from realloc.dataflow import Call
from realloc.strategy import Schedule, Strategy


class Memory(Protocol):
    """Bytes on each GPU of one call's mesh.

    Parameters, gradients and optimizer are resident: they belong to (role, layout) and stay
    between calls. `working` (by cause) is in use only while the call runs.
    """

    @property
    def parameters(self) -> int: ...

    @property
    def gradients(self) -> int: ...

    @property
    def optimizer(self) -> int: ...

    @property
    def working(self) -> Mapping[str, int]: ...


class Costs(Protocol):
    """Seconds and bytes of everything that an augmented graph may hold."""

    @property
    def provenance(self) -> str: ...

    @property
    def overlaps_host_copies(self) -> bool: ...

    def host_copy_s(self, call: Call, placement: Placement, causes: tuple[str, ...]) -> float: ...

    def call_s(self, call: Call, placement: Placement) -> float: ...

    def transfer_s(self, keys: tuple[str, ...], src: Placement, dst: Placement) -> float: ...

    def reallocate_s(self, role: str, src: Placement, dst: Placement) -> float: ...

    def least_reallocate_s(self, role: str, src: Placement, dst: Placement, *, anywhere: bool) -> float: ...

    def call_memory(self, call: Call, placement: Placement) -> Memory: ...


class MoveCosts:
    """Transfers and reallocations, each asked once for placements that differ by whole nodes alone.

    All nodes of a cluster are alike, so moving both ends by the same number of nodes changes
    nothing. Only what decides a layout matters to where data and parameters lie.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._known: dict[tuple[object, ...], float] = {}

    def transfer_s(self, keys: tuple[str, ...], src: Placement, dst: Placement) -> float:
        src, dst = _near_origin(src, dst)
        key = (keys, src, dst)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._costs.transfer_s(keys, src, dst)
        return found

    def reallocate_s(self, role: str, src: Placement, dst: Placement) -> float:
        src, dst = _near_origin(src, dst)
        key = (role, src, dst)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._costs.reallocate_s(role, src, dst)
        return found

    def least_reallocate_s(self, role: str, src: Placement, dst: Placement) -> float:
        """At most `reallocate_s`, for a hundredth of the work where nobody has asked for that."""
        src, dst = _near_origin(src, dst)
        found = self._known.get((role, src, dst))
        if found is None:
            key = (role, src, dst, "least")
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._costs.least_reallocate_s(role, src, dst, anywhere=False)
        return found

    def least_anywhere_s(self, role: str, src: Placement, dst: Placement) -> float:
        """At most `reallocate_s`, wherever meshes of these sizes lie."""
        return self._costs.least_reallocate_s(role, src, dst, anywhere=True)


def _near_origin(src: Placement, dst: Placement) -> tuple[Placement, Placement]:
    """The pair moved to the first nodes of the cluster, without what does not change the layout."""
    node = src.mesh.gpus_per_node
    shift = min(src.mesh.first, dst.mesh.first) // node * node
    return _moved(src, shift), _moved(dst, shift)


def _moved(placement: Placement, shift: int) -> Placement:
    mesh, s = placement.mesh, placement.strategy
    layout = Strategy(
        s.dp,
        s.tp,
        s.pp,
        zero=3 if s.zero == 3 else 0,
        schedule=s.schedule if s.virtual_stages > 1 else Schedule.ONE_F_ONE_B,
        virtual_stages=s.virtual_stages,
    )
    return Placement(replace(mesh, first=mesh.first - shift), layout)
