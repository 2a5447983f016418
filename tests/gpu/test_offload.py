"""On a GPU: memory really returns to the device, and loads run beside the kernels before their use."""

from __future__ import annotations

import pytest
import torch

from runtime.offload import Parked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MIB = 1 << 20


def test_memory_returns_and_contents_survive() -> None:
    device = torch.device("cuda")
    kept = torch.arange(64 * MIB, dtype=torch.float32, device=device)
    view = kept[MIB : 2 * MIB].view(1024, 1024)
    dropped = torch.empty(64 * MIB, dtype=torch.float32, device=device)
    expected = view.clone()
    parked = Parked([kept], [dropped])
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        parked.offload()
        assert torch.cuda.memory_allocated(device) <= before - 500 * MIB
        parked.load()
        parked.wait()
        assert torch.equal(view, expected)
        view += 1
        expected += 1
    assert torch.cuda.memory_allocated(device) <= before + MIB


def test_a_load_runs_beside_the_kernels_before_its_use() -> None:
    """Kernels and a copy that take about as long each: together clearly less than their sum."""
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    parked = Parked([torch.randn(512 * MIB, device=device)], [], is_constant=True)
    parked.offload()

    def timed(load: bool, products: int) -> float:
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if load:
            parked.load()
        for _ in range(products):
            matrix @ matrix
        parked.wait()
        end.record()
        torch.cuda.synchronize(device)
        parked.offload()
        return float(begin.elapsed_time(end))

    timed(True, 1)
    copy_ms, product_ms = timed(True, 0), timed(False, 50) / 50
    products = max(1, round(copy_ms / product_ms))
    assert timed(True, products) < 0.75 * (copy_ms + products * product_ms)
