"""Linear layers through oneDNN against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from runtime import linear as module
from runtime.linear import linear


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if module._onednn() is None:
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(module, "SMALL", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 33])
def test_outputs_and_gradients_equal_torch(onednn: None, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    data = [torch.randn(rows, 24), torch.randn(17, 24), torch.randn(17) if bias else None]
    results = []
    functions: list[Callable[..., torch.Tensor]] = [linear, F.linear]
    for function in functions:
        args = [None if t is None else t.clone().requires_grad_() for t in data]
        out = function(*args)
        out.square().sum().backward()
        broadcast = function(*args)
        broadcast.sum().backward()
        results.append([out.detach(), *(t.grad for t in args if t is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_arguments_get_no_gradient(onednn: None) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert not linear(x, weight.detach()).requires_grad


def test_decoder_through_onednn(onednn: None, tmp_path: Path) -> None:
    from tests.unit.runtime.test_decoder import test_logprob_gradients_equal_transformers

    test_logprob_gradients_equal_transformers("gpt_neox", tmp_path)
