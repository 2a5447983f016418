"""How copies become messages and rounds, without any process group."""

from __future__ import annotations

import pytest
import torch

from realloc.layout import Box
from realloc.reallocation import Copy, Schedule
from runtime.reallocation import Holding, Reallocator, messages, rounds, split, wire_dtype


def _copy(rows: int, columns: int = 4, src: int = 0, dst: int = 1) -> Copy:
    return Copy("w", Box((2, 0), (2 + rows, columns)), src, dst)


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 8, 1000])
def test_split_covers_once(limit: int) -> None:
    parts = list(split(_copy(5), limit))
    assert all(part.box.num_elements <= limit for part in parts)
    assert sum(part.box.num_elements for part in parts) == 20
    assert all(a.box.intersect(b.box) is None for a in parts for b in parts if a is not b)


def test_rounds_bound_every_rank_and_keep_order() -> None:
    copies = [_copy(n, src=s, dst=d) for n, s, d in [(1, 0, 1), (2, 1, 2), (3, 0, 2), (1, 3, 0), (9, 2, 3)]]
    result = rounds(copies, 16)
    for part in result:
        for rank in range(4):
            assert sum(c.box.num_elements for c in part if rank in (c.src, c.dst)) <= 16
    assert [c for part in result for c in part] == [p for c in copies for p in split(c, 16)]
    assert len(rounds(copies, 1000)) == 1
    assert rounds([], 16) == []


def test_small_copies_share_a_message_per_pair() -> None:
    small = [_copy(1), _copy(1, src=1, dst=0), _copy(2)]
    large = _copy(3)
    assert messages([small[0], large, *small[1:]], 9) == [(large,), (small[0], small[2]), (small[1],)]
    assert messages(small, 0) == [(copy,) for copy in small]


def test_wire_dtype_is_the_narrower() -> None:
    assert wire_dtype(torch.float32, torch.bfloat16) == torch.bfloat16
    assert wire_dtype(torch.bfloat16, torch.float32) == torch.bfloat16
    assert wire_dtype(torch.float16, torch.bfloat16) == torch.bfloat16
    assert wire_dtype(torch.float32, torch.float32) == torch.float32


def test_local_copies_need_no_process_group() -> None:
    box = Box((0, 0), (2, 4))
    src, dst = Holding({"w": torch.ones(2, 4)}, {"w": box}), Holding({"w": torch.zeros(2, 4)}, {"w": box})
    plan = Schedule((Copy("w", box, 5, 5),))
    mover = Reallocator(plan, 5, src, dst, src_dtype=torch.float32, dst_dtype=torch.float32)
    assert mover.run() == 0
    assert torch.equal(dst.tensors["w"], src.tensors["w"])


@pytest.mark.parametrize("tensor", [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.float64)])
def test_tensors_that_do_not_fit_their_boxes_are_refused(tensor: torch.Tensor) -> None:
    src = Holding({"w": tensor}, {"w": Box((0, 0), (2, 4))})
    with pytest.raises(ValueError, match=r"expected torch.float32 \(2, 4\)"):
        Reallocator(Schedule(()), 0, src, None, src_dtype=torch.float32, dst_dtype=torch.float32)
