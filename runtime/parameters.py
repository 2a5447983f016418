"""Parameters of one role in one layout, as views of one flat buffer.

The flat buffer is what gradients are reduced over and what the optimizer steps; the views are
what the decoder computes with. Loading and reallocation write into the views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from realloc.layout import Box

Allocator = Callable[[int, torch.dtype, torch.device], torch.Tensor]
"""(elements, dtype, device) -> an uninitialised flat tensor."""


def empty(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised flat tensor in ordinary memory."""
    return torch.empty(num_elements, dtype=dtype, device=device)


@dataclass(frozen=True)
class FlatParameters:
    """`views[name]` has the shape of `boxes[name]` and shares memory with `flat`."""

    boxes: Mapping[str, Box]
    flat: torch.Tensor
    views: Mapping[str, torch.Tensor]


def allocate(
    boxes: Mapping[str, Box], dtype: torch.dtype, device: torch.device, allocator: Allocator = empty
) -> FlatParameters:
    """Uninitialised parameters for these boxes."""
    total = sum(box.num_elements for box in boxes.values())
    flat = allocator(total, dtype, device)
    return FlatParameters(boxes, flat, views_of(flat, boxes))


def views_of(flat: torch.Tensor, boxes: Mapping[str, Box]) -> Mapping[str, torch.Tensor]:
    """Views of a flat buffer, box after box."""
    views, start = {}, 0
    for name, box in boxes.items():
        views[name] = flat[start : start + box.num_elements].view(box.shape)
        start += box.num_elements
    return views


def adjacent(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One matrix over matrices of equal width that follow each other in memory; None if they do not.

    The result shares their memory and has no history.
    """
    first = parts[0].detach()
    if len(parts) == 1:
        return first
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel() * part.element_size()
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None  # neighbours by chance: different allocations
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def beside(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One matrix over matrices whose rows continue each other in memory; None if they do not."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.stride() != first.stride() or part.stride(1) != 1:
            return None
        end += part.shape[1] * part.element_size()
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None  # neighbours by chance: different allocations
    return first.as_strided((first.shape[0], sum(part.shape[1] for part in parts)), first.stride())
