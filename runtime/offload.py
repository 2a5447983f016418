"""What leaves the device between its uses: memory given back, contents in host memory.

Executes `realloc.augmented.residences` on one rank; decides how tensors move, not when. A tensor
keeps its identity: its storage shrinks to nothing and grows again, and all views of it (decoders,
optimizers, reallocations) stay valid. On a CPU the host's memory is the device's; the contents
still move to another buffer and the tensor's own memory is freed, so that a use at the wrong time
shows. On a GPU host buffers are pinned and loads run on a stream of their own, from the load
instruction on, beside whatever comes before the call that needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from realloc.augmented import GRADIENTS, OPTIMIZER, PARAMETERS, Placement, Residence, residences
from realloc.dataflow import DataflowGraph


class Parked:
    """Flat tensors that are on the device only between `load` and `offload`. They begin there.

    The contents of `kept` survive, through a host copy that is made anew at every offload, or once
    when they never change (`is_constant`). Of `dropped` only the memory comes and goes.
    """

    def __init__(
        self, kept: Sequence[torch.Tensor], dropped: Sequence[torch.Tensor], *, is_constant: bool = False
    ) -> None:
        """Each tensor must own its storage, from its start."""
        self._kept, self._dropped, self._is_constant = tuple(kept), tuple(dropped), is_constant
        self._host: list[torch.Tensor] = []
        self._arrival: torch.cuda.Event | None = None
        self.is_on_device = True

    @property
    def is_kept(self) -> bool:
        return bool(self._kept)

    @property
    def num_bytes(self) -> int:
        """Of device memory that it takes now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self._kept, *self._dropped))

    @torch.no_grad()
    def offload(self) -> None:
        """Gives the device memory back. Nothing happens when it is given back already."""
        if not self.is_on_device:
            return
        self.wait()
        if not (self._is_constant and self._host):
            self._host = self._host or [_host_buffer(tensor) for tensor in self._kept]
            for host, tensor in zip(self._host, self._kept, strict=True):
                host.copy_(tensor)  # from a GPU: returns when the contents have arrived
        for tensor in (*self._kept, *self._dropped):
            tensor.untyped_storage().resize_(0)
        self.is_on_device = False

    @torch.no_grad()
    def load(self) -> None:
        """Takes device memory and begins to fill it; `wait` before use. Nothing when it is there."""
        if self.is_on_device:
            return
        for tensor in (*self._kept, *self._dropped):
            tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
        self.is_on_device = True
        if self._kept and self._kept[0].is_cuda:
            self._begin_copy(self._kept[0].device)
            return
        for host, tensor in zip(self._host, self._kept, strict=True):
            tensor.copy_(host)
        if not self._is_constant:
            self._host = []  # on a CPU both are one memory

    def wait(self) -> None:
        """Has the kernels that follow wait for what is on its way."""
        if self._arrival is not None:
            torch.cuda.current_stream(self._kept[0].device).wait_event(self._arrival)
            self._arrival = None

    def _begin_copy(self, device: torch.device) -> None:
        side = torch.cuda.Stream(device)
        # the memory may have belonged to what kernels launched so far still work on
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for host, tensor in zip(self._host, self._kept, strict=True):
                tensor.copy_(host, non_blocking=True)
            self._arrival = side.record_event()


def _host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


@dataclass(frozen=True)
class RoleMemory:
    """The parts of one role on this rank that come and go, by the nodes that move them."""

    comes: Mapping[str, Sequence[Parked]] = field(default_factory=dict)
    """Load or reallocation -> what must be on the device from then on."""
    goes: Mapping[str, Sequence[Parked]] = field(default_factory=dict)
    """Offload -> what leaves the device."""

    def load(self, node: str) -> None:
        for parked in self.comes.get(node, ()):
            parked.load()

    def offload(self, node: str) -> None:
        for parked in self.goes.get(node, ()):
            parked.offload()

    def wait(self) -> None:
        """Before any call of the role: what was begun to load must have arrived."""
        for parked in self._all:
            parked.wait()

    @property
    def num_bytes(self) -> int:
        """Device memory that all of them take now."""
        return sum(parked.num_bytes for parked in self._all)

    @property
    def _all(self) -> Iterator[Parked]:
        return (parked for group in self.goes.values() for parked in group)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Everything whose contents are kept is on the device within: to save it, or to write it."""
        absent = [parked for parked in self._all if parked.is_kept and not parked.is_on_device]
        for parked in absent:
            parked.load()
            parked.wait()
        try:
            yield
        finally:
            for parked in absent:
                parked.offload()


def role_memory(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    role: str,
    params: Mapping[str, torch.Tensor],
    state: Mapping[str, Sequence[torch.Tensor]],
) -> RoleMemory:
    """What of a role comes and goes on this rank; what begins in host memory is there on return.

    `params`: the flat parameters of each call that this rank takes part in. `state`: the flat
    OPTIMIZER and GRADIENTS tensors of the role's trainer on this rank, if it has one.
    """
    comes: dict[str, list[Parked]] = {}
    goes: dict[str, list[Parked]] = {}
    for item in residences(graph, placements):
        if item.role != role or item.call not in params:
            continue
        parked = _parked(graph, item, params[item.call], state)
        comes.setdefault(item.first, []).append(parked)
        goes.setdefault(item.last, []).append(parked)
        if parked.is_kept:
            parked.offload()
    return RoleMemory(comes, goes)


def _parked(
    graph: DataflowGraph, item: Residence, params: torch.Tensor, state: Mapping[str, Sequence[torch.Tensor]]
) -> Parked:
    if PARAMETERS not in item.causes:
        return Parked(state[OPTIMIZER], state[GRADIENTS])
    if graph.trainer(item.role) is None:
        return Parked([params], [], is_constant=True)
    # another copy of what is trained elsewhere is filled anew by each reallocation
    return Parked([params], []) if item.is_kept else Parked([], [params])
