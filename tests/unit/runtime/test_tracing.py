"""What a rank records of itself."""

from __future__ import annotations

import pytest
import torch

from runtime.tracing import Recorder


def test_each_record_has_the_allocators_peak_since_the_one_before(monkeypatch: pytest.MonkeyPatch):
    peak = [0]

    def reset(device: torch.device) -> None:
        peak[0] = 100  # what stays allocated

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    on_gpu, on_host = Recorder(0, 0.0, torch.device("cuda", 0)), Recorder(0, 0.0, torch.device("cpu"))
    peak[0] = 700
    for recorder in (on_gpu, on_host):
        recorder.add(0, "actor_train", "call", 0.0, predicted_s=None)
    for recorder in (on_gpu, on_host):
        recorder.add(0, "transfer", "transfer", 0.0, predicted_s=None)
    assert [record.peak_bytes for record in on_gpu.records] == [700, 100]
    assert [record.peak_bytes for record in on_host.records] == [0, 0]
