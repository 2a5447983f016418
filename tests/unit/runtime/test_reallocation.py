"""How copies become messages and rounds, without any process group."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from realloc.layout import Box
from realloc.reallocation import Copy, Schedule
from runtime.reallocation import Holding, Reallocator, wire_dtype
from runtime.reallocation_rounds import messages, rounds, split
from runtime.shared_memory import SharedMemory


def _copy(rows: int, columns: int = 4, src: int = 0, dst: int = 1) -> Copy:
    return Copy("w", Box((2, 0), (2 + rows, columns)), src, dst)


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 8, 1000])
def test_split_covers_once(limit: int) -> None:
    parts = list(split(_copy(5), limit))
    assert all(part.box.num_elements <= limit for part in parts)
    assert sum(part.box.num_elements for part in parts) == 20
    assert all(a.box.intersect(b.box) is None for a in parts for b in parts if a is not b)


def test_rounds_bound_what_is_staged() -> None:
    copies = [
        Copy(param, Box((0, 0), (rows, 4)), src, dst)
        for param, rows, src, dst in [
            ("a", 1, 0, 1),
            ("b", 2, 1, 2),
            ("b", 2, 0, 2),
            ("c", 9, 2, 3),
            ("d", 1, 0, 2),
        ]
    ]
    peaks = {"a": 4, "b": 16, "c": 36, "d": 4}
    result = rounds(copies, peaks, 16)
    for part in result.values():
        for rank in range(4):
            assert sum(c.box.num_elements for c in part if rank in (c.src, c.dst)) <= 16
    assert [key for key, _ in result.items()] == [
        (False, 0, 0),
        (False, 1, 0),
        *((False, 2, i) for i in range(3)),
        (False, 3, 0),
    ]
    assert [c for part in result.values() for c in part] == [*copies[:3], *split(copies[3], 12), copies[4]]
    assert len(rounds(copies, peaks, 1000)) == 1
    assert rounds([], {}, 16) == {}


def test_a_rank_alone_finds_the_same_rounds() -> None:
    copies = [_copy(5), _copy(5, src=0, dst=2), replace(_copy(5, src=2, dst=3), relay=True)]
    everybody = rounds(copies, {"w": 40}, 16)
    for rank in range(4):
        own = rounds([c for c in copies if rank in (c.src, c.dst)], {"w": 40}, 16)
        mine = {k: [c for c in part if rank in (c.src, c.dst)] for k, part in everybody.items()}
        assert own == {k: part for k, part in mine.items() if part}
    assert [relay for relay, _, _ in everybody] == sorted(relay for relay, _, _ in everybody)


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


def test_staging_counts_only_what_is_not_contiguous() -> None:
    box = Box((0, 0), (4, 4))
    src = Holding({"w": torch.ones(4, 4)}, {"w": box})
    rows, columns = Box((0, 0), (2, 4)), Box((0, 0), (4, 2))
    for part, expected in ((rows, 0), (columns, 8 * 4)):
        plan = Schedule((Copy("w", part, 0, 1),))
        mover = Reallocator(
            plan, 0, src, None, src_dtype=torch.float32, dst_dtype=torch.float32, coalesce_bytes=0
        )
        assert mover.staging_bytes == expected


def test_shared_memory_is_found_and_opened_again() -> None:
    memory = SharedMemory()
    tensor = memory.empty(10, torch.float32, torch.device("cpu"))
    tensor.copy_(torch.arange(10.0))
    place = memory.find(tensor[4:])
    assert place is not None
    assert place.offset == 16
    there = SharedMemory().open(os.getpid(), place)
    assert there is not None
    assert torch.equal(there.view(torch.float32), tensor)
    assert memory.find(torch.ones(3)) is None
    assert SharedMemory().open(os.getpid(), replace(place, inode=place.inode + 1)) is None


def test_where_there_is_no_shared_memory_there_is_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    memory = SharedMemory()
    tensor = memory.empty(10, torch.float32, torch.device("cpu"))
    assert tensor.shape == (10,)
    assert memory.find(tensor) is None
    assert "No space left" in caplog.text
