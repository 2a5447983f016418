"""Executes reallocation schedules: the copies of one schedule become messages and local copies.

Decides how copies are grouped into messages and messages into rounds, and where staging buffers
are needed. Does not decide who sends what (`realloc.reallocation`), nor when (the program).

Every rank derives the same rounds and messages from the schedule and executes its own, so sends
and receives meet in the same order on both sides. Within a round everything is posted at once and
then waited for; rounds come in one order; so no rank can wait for another in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist

from realloc.layout import Box
from realloc.reallocation import Copy, Schedule

COALESCE_BYTES = 64 << 10
"""Pieces smaller than this travel in one message per pair of ranks and round.

Measured on gloo with staging memory kept, 2 and 4 ranks on 2 cores, 64 pieces per pair: packing is
1.3-2.2x faster at 4 KiB, 1.15-1.5x at 64 KiB, 0.8-1.15x at 256 KiB. (With fresh buffers it loses from
64 KiB on: their pages cost more than the messages.) In whole schedules of models with few pieces
below 256 KiB, anything from 16 to 256 KiB was equal within the noise.
"""
STAGING_BYTES = 256 << 20
"""Bytes that a rank may have under way, and so staged, at once."""


@dataclass(frozen=True)
class Holding:
    """A rank's part of a layout: its local tensors and which box of the parameter each holds."""

    tensors: Mapping[str, torch.Tensor]
    boxes: Mapping[str, Box]

    def view(self, param: str, box: Box) -> torch.Tensor:
        """The part `box` (global indices) of a parameter, without a copy."""
        return self.tensors[param].detach()[box.within(self.boxes[param])]

    def check(self, dtype: torch.dtype) -> None:
        """Raises ValueError unless every tensor has its box's shape and this dtype."""
        for param, box in self.boxes.items():
            tensor = self.tensors[param]
            if tuple(tensor.shape) != box.shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{param} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {box.shape}"
                )


def wire_dtype(src: torch.dtype, dst: torch.dtype) -> torch.dtype:
    """The narrower of the two: nothing is lost that the destination could hold."""
    return src if src.itemsize < dst.itemsize else dst


def split(copy: Copy, max_elements: int) -> Iterable[Copy]:
    """The copy in parts of at most `max_elements`, cut along its outermost dims."""
    if copy.box.num_elements <= max_elements:
        yield copy
        return
    start, stop = copy.box.start, copy.box.stop
    dim = next(d for d, n in enumerate(copy.box.shape) if n > 1)
    row = copy.box.num_elements // copy.box.shape[dim]
    step = max(1, max_elements // row)
    for low in range(start[dim], stop[dim], step):
        high = min(low + step, stop[dim])
        box = Box((*start[:dim], low, *start[dim + 1 :]), (*stop[:dim], high, *stop[dim + 1 :]))
        yield from split(Copy(copy.param, box, copy.src, copy.dst), max_elements)


def rounds(copies: Iterable[Copy], max_elements: int) -> list[list[Copy]]:
    """The copies in order, in rounds in which no rank sends and receives more than `max_elements`."""
    result: list[list[Copy]] = []
    under_way: dict[int, int] = {}
    current: list[Copy] = []
    for whole in copies:
        for copy in split(whole, max(1, max_elements)):
            size = copy.box.num_elements
            if max(under_way.get(copy.src, 0), under_way.get(copy.dst, 0)) + size > max_elements and current:
                result.append(current)
                current, under_way = [], {}
            under_way[copy.src] = under_way.get(copy.src, 0) + size
            under_way[copy.dst] = under_way.get(copy.dst, 0) + size
            current.append(copy)
    if current:
        result.append(current)
    return result


def messages(copies: Iterable[Copy], coalesce_elements: int) -> list[tuple[Copy, ...]]:
    """The copies of a round as messages: large ones alone, small ones together per pair of ranks."""
    large: list[tuple[Copy, ...]] = []
    small: dict[tuple[int, int], list[Copy]] = {}
    for copy in copies:
        if copy.box.num_elements >= coalesce_elements:
            large.append((copy,))
        else:
            small.setdefault((copy.src, copy.dst), []).append(copy)
    return large + [tuple(together) for together in small.values()]


@dataclass(frozen=True)
class _Message:
    """One message of this rank: the parts of its tensors that it carries, one after the other."""

    peer: int
    sending: bool
    views: tuple[torch.Tensor, ...]

    @property
    def num_elements(self) -> int:
        return sum(view.numel() for view in self.views)

    def direct(self, wire: torch.dtype) -> torch.Tensor | None:
        """The tensor to send from or receive into without staging, where that is possible."""
        if len(self.views) == 1 and self.views[0].is_contiguous() and self.views[0].dtype == wire:
            return self.views[0]
        return None


class Staging:
    """Memory for the messages of one round, kept between rounds and runs: fresh pages are slow.

    Reallocators of one process may share one, as they do not run at the same time.
    """

    _ALIGN = 64

    def __init__(self, device: torch.device | None = None) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    def start(self, num_bytes: int, num_buffers: int) -> None:
        """Frees all buffers and makes room for so many of so many bytes altogether."""
        self._used = 0
        needed = num_bytes + num_buffers * self._ALIGN
        if self._memory.numel() < needed:
            device = self._memory.device
            del self._memory  # the old memory goes before the new one comes
            self._memory = torch.empty(needed, dtype=torch.uint8, device=device)

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer, valid until the next `start`."""
        end = self._used + num_elements * dtype.itemsize
        buffer = self._memory[self._used : end].view(dtype)
        self._used = -(-end // self._ALIGN) * self._ALIGN
        return buffer


class Reallocator:
    """Moves the parameters of one role from one layout to another, as often as asked.

    Built once: it keeps views of the tensors, which must stay in place. `src` and `dst` are what
    this rank holds before and after, None outside the layout. Both dtypes are needed on all
    ranks, as a sender casts to the narrower one before sending. Ranks are global ranks, of
    `group` or of the whole world.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        src: Holding | None,
        dst: Holding | None,
        *,
        src_dtype: torch.dtype,
        dst_dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
        coalesce_bytes: int = COALESCE_BYTES,
        staging_bytes: int = STAGING_BYTES,
        staging: Staging | None = None,
    ) -> None:
        if src is not None:
            src.check(src_dtype)
        if dst is not None:
            dst.check(dst_dtype)
        self._wire = wire_dtype(src_dtype, dst_dtype)
        self._group = group
        self._staging = staging or Staging(_device(src, dst))
        width = self._wire.itemsize
        self._local = [
            (_holding(dst).view(copy.param, copy.box), _holding(src).view(copy.param, copy.box))
            for copy in schedule.local
            if copy.dst == rank
        ]
        self._rounds = [
            _own(messages(copies, coalesce_bytes // width), rank, src, dst)
            for copies in rounds(schedule.cross, staging_bytes // width)
        ]
        self.sent_bytes = schedule.sent_elements(rank) * width
        """What one run sends to other ranks."""
        self.received_bytes = schedule.received_elements(rank) * width

    @torch.no_grad()
    def run(self) -> int:
        """Moves the parameters; returns the bytes sent to other ranks.

        Every rank of the schedule must call it, in the same order among reallocations.
        """
        started = False
        for own in self._rounds:
            if not own:
                continue
            staged = [message.num_elements for message in own if message.direct(self._wire) is None]
            self._staging.start(sum(staged) * self._wire.itemsize, len(staged))
            buffers = [self._buffer(message) for message in own]
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(
                        dist.isend if message.sending else dist.irecv, buffer, message.peer, self._group
                    )
                    for message, buffer in zip(own, buffers, strict=True)
                ]
            )
            if not started:  # while the first messages travel
                self._copy_local()
                started = True
            if len(works) != len(own):  # one for all of them, where the backend batches
                for work in works:
                    work.wait()
                works = []
            for message, buffer, work in zip_longest(own, buffers, works):
                if work is not None:
                    work.wait()
                if not message.sending:
                    _unpack(message, buffer)
        if not started:
            self._copy_local()
        return self.sent_bytes

    def _copy_local(self) -> None:
        for target, source in self._local:
            target.copy_(source)

    def _buffer(self, message: _Message) -> torch.Tensor:
        """The contiguous tensor that the message is sent from or received into."""
        direct = message.direct(self._wire)
        if direct is not None:
            return direct
        buffer = self._staging.take(message.num_elements, self._wire)
        if message.sending:
            for part, view in _parts(buffer, message.views):
                part.copy_(view)
        return buffer


def _holding(holding: Holding | None) -> Holding:
    assert holding is not None, "the schedule uses a layout that this rank is not part of"
    return holding


def _device(*holdings: Holding | None) -> torch.device | None:
    """Where the tensors are; None for a rank without any."""
    tensors = (tensor for holding in holdings if holding for tensor in holding.tensors.values())
    return next((tensor.device for tensor in tensors), None)


def _own(
    all_messages: Sequence[tuple[Copy, ...]], rank: int, src: Holding | None, dst: Holding | None
) -> list[_Message]:
    """This rank's messages of a round, receives first so that no send finds nobody waiting."""
    receives, sends = [], []
    for copies in all_messages:
        first = copies[0]
        if first.src == rank:
            views = tuple(_holding(src).view(copy.param, copy.box) for copy in copies)
            sends.append(_Message(first.dst, True, views))
        elif first.dst == rank:
            views = tuple(_holding(dst).view(copy.param, copy.box) for copy in copies)
            receives.append(_Message(first.src, False, views))
    return receives + sends


def _parts(
    buffer: torch.Tensor, views: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The buffer cut to the sizes and shapes of the views, with each view."""
    start = 0
    for view in views:
        yield buffer[start : start + view.numel()].view(view.shape), view
        start += view.numel()


def _unpack(message: _Message, buffer: torch.Tensor) -> None:
    if len(message.views) == 1 and buffer is message.views[0]:
        return
    for part, view in _parts(buffer, message.views):
        view.copy_(part)
