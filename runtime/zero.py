"""ZeRO: optimizer states, gradients and parameters split over data-parallel ranks by rows.

Decides what travels over the data-parallel group, when, and what is kept: one flat collective for
each unit (the embedding, a layer, final norm with head), never one per parameter. Which rows are
whose stands in `realloc.layout.zero_boxes`. Knows no model and no optimizer.

Rajbhandari et al., arXiv 1910.02054. Between two micro-batches a rank keeps gradients of all its
elements (stage 1) or of its own rows (2, 3); under stage 3 the parameters of a unit exist while the
unit computes, and are gathered once more for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from realloc.layout import Box
from realloc.params import EMBED, split_range
from runtime.collectives import all_gather, reduce_scatter
from runtime.decoder import EMBEDDING_UNIT, HEAD_UNIT
from runtime.parallel import ParallelContext
from runtime.parameters import FlatParameters, views_of
from runtime.tensor_parallel import add_rows

Tensors = Mapping[str, torch.Tensor]


def unit_of(name: str) -> str:
    """The unit that a parameter travels with."""
    if name == EMBED:
        return EMBEDDING_UNIT
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else HEAD_UNIT


def own_views(boxes: Mapping[str, Box], own: Mapping[str, Box], tensors: Tensors) -> Tensors:
    """The parts `own` of tensors that hold `boxes`, without a copy."""
    return {name: tensors[name].detach()[box.within(boxes[name])] for name, box in own.items()}


class Staging:
    """Memory for one collective at a time: made when first needed in a mini-batch, then released."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised elements, valid until the next call."""
        num_bytes = num_elements * dtype.itemsize
        if self._memory.numel() < num_bytes:
            self.release()
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._memory.device)
        return self._memory[:num_bytes].view(dtype)

    def release(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=self._memory.device)


@dataclass(frozen=True)
class _Slot:
    """Where one parameter stands in the part of each rank: `offset`, and its rows by rank."""

    name: str
    offset: int
    row_elements: int
    rows: tuple[tuple[int, int], ...]

    @property
    def is_even(self) -> bool:
        return len({stop - start for start, stop in self.rows}) == 1


class UnitExchange:
    """The collectives of one unit over the data-parallel group.

    A buffer [dp, width] has a part for each rank, a parameter at the same offset in all of them;
    where rows do not divide by dp, parts have room for the longest range.
    """

    def __init__(self, boxes: Mapping[str, Box], context: ParallelContext, staging: Staging) -> None:
        """`boxes` are what a rank holds of the unit's parameters before any split."""
        assert context.dp_group is not None, "ZeRO needs data-parallel ranks"
        self.names = tuple(boxes)
        self._group, self._staging = context.dp_group, staging
        self._dp, self._rank = context.strategy.dp, context.at.dp
        slots, width = [], 0
        for name, box in boxes.items():
            num_rows = box.shape[0]
            rows = tuple(split_range(num_rows, self._dp, rank) for rank in range(self._dp))
            slots.append(_Slot(name, width, box.num_elements // num_rows, rows))
            width += -(-num_rows // self._dp) * slots[-1].row_elements
        self._slots, self.width = slots, width

    def reduce(self, whole: Tensors, own: Tensors, *, accumulate: bool) -> None:
        """Sums `whole` over the group in fp32; puts this rank's rows into `own`, or adds them to it."""
        buffer, local = self._take(torch.float32)
        for mine, theirs in self._parts(whole, buffer):
            theirs.copy_(mine)
        reduce_scatter(local, buffer.view(-1), self._group)
        for mine, reduced in self._own_parts(own, local):
            if accumulate:
                mine.add_(reduced)
            else:
                mine.copy_(reduced)

    def gather(self, own: Tensors, whole: Tensors) -> None:
        """Fills `whole` with the rows that every rank has in its `own`."""
        dtype = next(iter(whole.values())).dtype
        buffer, local = self._take(dtype)
        for mine, sent in self._own_parts(own, local):
            sent.copy_(mine)
        all_gather(buffer.view(-1), local, self._group)
        for mine, received in self._parts(whole, buffer):
            mine.copy_(received)

    def _take(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A buffer for the parts of all ranks [dp, width] and one for this rank's [width]."""
        memory = self._staging.take((self._dp + 1) * self.width, dtype)
        return memory[self.width :].view(self._dp, self.width), memory[: self.width]

    def _parts(self, whole: Tensors, buffer: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The elements of whole parameters with their places in the buffer, as pairs of one shape."""
        for slot in self._slots:
            rows = whole[slot.name].detach().view(-1, slot.row_elements)
            if slot.is_even:
                size = rows.numel() // self._dp
                yield rows.view(self._dp, size), buffer[:, slot.offset : slot.offset + size]
                continue
            for rank, (start, stop) in enumerate(slot.rows):
                part = rows[start:stop].view(-1)
                yield part, buffer[rank, slot.offset : slot.offset + part.numel()]

    def _own_parts(self, own: Tensors, local: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The elements of this rank's rows with their places in its part of the buffer."""
        for slot in self._slots:
            if slot.name in own:
                part = own[slot.name].detach().view(-1)
                yield part, local[slot.offset : slot.offset + part.numel()]


def exchanges(
    boxes: Mapping[str, Box], context: ParallelContext, staging: Staging
) -> Mapping[str, UnitExchange]:
    """The exchange of each unit, in the order of the forward pass."""
    units: dict[str, dict[str, Box]] = {}
    for name, box in boxes.items():
        units.setdefault(unit_of(name), {})[name] = box
    return {unit: UnitExchange(part, context, staging) for unit, part in units.items()}


class GatheredParameters:
    """Whole parameters of a rank that keeps only its rows of them (ZeRO 3).

    `params` are leaves for the decoder, whose memory exists only from `before` a unit computes until
    `after` it, and again from its output's gradient to `release`. All data-parallel ranks must run
    the same passes, as each gathers in its turn.
    """

    def __init__(
        self,
        boxes: Mapping[str, Box],
        held: FlatParameters,
        context: ParallelContext,
        *,
        tied: bool,
    ) -> None:
        """`boxes` is what the rank computes with, `held` its rows. `tied`: the head is the embedding."""
        self.boxes = boxes
        self._held, self._tied = held.views, tied
        self.staging = Staging(context.device)
        self.exchanges = exchanges(boxes, context, self.staging)
        self.params: dict[str, torch.Tensor] = {}
        self._whole: dict[str, tuple[torch.Tensor, Tensors]] = {}
        for unit, exchange in self.exchanges.items():
            part = {name: boxes[name] for name in exchange.names}
            total = sum(box.num_elements for box in part.values())
            flat = torch.empty(total, dtype=held.flat.dtype, device=context.device)
            views = views_of(flat, part)
            self._whole[unit] = flat, views
            # `.data` has a version of its own: refilling the memory does not count as a change
            self.params.update({name: view.data for name, view in views.items()})
            _resize(flat, 0)

    def before(self, unit: str) -> None:
        """The decoder is about to compute with the unit's parameters."""
        assert torch.is_grad_enabled(), "parameters split by ZeRO 3 serve training alone"
        self._fill(unit)
        if unit == HEAD_UNIT and self._tied:
            self._fill(EMBEDDING_UNIT)

    def after(self, unit: str, output: torch.Tensor) -> None:
        """The unit has computed `output`. The head's stay: the loss and its backward come next."""
        if unit == HEAD_UNIT:
            return
        self.release(unit)
        if unit != EMBEDDING_UNIT:  # whose backward pass needs no values
            output.register_hook(lambda _: self._fill(unit))

    def release(self, unit: str) -> None:
        _resize(self._whole[unit][0], 0)

    def _fill(self, unit: str) -> None:
        flat, views = self._whole[unit]
        _resize(flat, flat.numel())
        with torch.no_grad():
            self.exchanges[unit].gather(self._held, views)


def _resize(flat: torch.Tensor, num_elements: int) -> None:
    """Gives the memory back, or takes new; all views stay views of it."""
    flat.untyped_storage().resize_(num_elements * flat.itemsize)


class GradientSharder:
    """Reduces the gradients of each unit as soon as a backward pass has made them all (ZeRO 2 and 3)."""

    def __init__(
        self,
        units: Mapping[str, UnitExchange],
        params: Tensors,
        own: Tensors,
        release: Callable[[str], None] | None = None,
    ) -> None:
        """`params` are the leaves, `own` this rank's fp32 gradients; `release` is told of units done with."""
        self._units, self._params, self._own, self._release = units, params, own, release
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._missing = {unit: len(exchange.names) for unit, exchange in units.items()}
        for unit, exchange in units.items():
            for name in exchange.names:
                params[name].register_post_accumulate_grad_hook(self._arrived(unit))

    def check(self) -> None:
        """All units must have been reduced, or ranks would differ in what they send."""
        late = [unit for unit, n in self._missing.items() if n != len(self._units[unit].names)]
        assert not late, f"a backward pass left out parameters of {late}"
        assert not self._rows, "rows of the embedding's gradient were kept and forgotten"

    def _arrived(self, unit: str) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            self._missing[unit] -= 1
            if self._missing[unit] == 0:
                self._reduce(unit)

        return hook

    def add_rows(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps values [T, hidden] for rows of a tied embedding's gradient, until the head's is there."""
        self._rows.append((rows, values))

    @torch.no_grad()
    def _reduce(self, unit: str) -> None:
        exchange = self._units[unit]
        self._missing[unit] = len(exchange.names)
        gradients = {}
        for name in exchange.names:
            gradient = self._params[name].grad
            assert gradient is not None, name
            gradients[name] = gradient.contiguous()
            self._params[name].grad = None
        while unit == EMBEDDING_UNIT and self._rows:
            add_rows(gradients[EMBED], *self._rows.pop())
        exchange.reduce(gradients, self._own, accumulate=True)
        if self._release is not None:
            self._release(unit)
