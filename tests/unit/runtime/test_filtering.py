"""Top-k and top-p against a straightforward reference."""

from __future__ import annotations

import pytest
import torch

from runtime import filtering
from runtime.filtering import Filter, least_kept

NO_IDS = torch.empty(0, dtype=torch.int64)


def reference(row: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """Token ids that stay: sort, cut at k, then at the cumulative share p of what is left."""
    order = sorted(range(len(row)), key=lambda i: -row[i].item())
    order = order[: top_k or len(order)]
    probs = row[order].double().softmax(0)
    kept, share = set(), 0.0
    for index, prob in zip(order, probs.tolist(), strict=True):
        kept.add(index)
        share += prob
        if share >= top_p:
            break
    return kept


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.5), (0, 0.9), (0, 0.999), (20, 0.6), (400, 0.9), (3, 0.01)]
)
def test_equals_the_reference(
    top_k: int, top_p: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "CANDIDATES", (4, 32))
    logits = scale * torch.randn(9, 300, generator=torch.Generator().manual_seed(top_k))
    before = logits.clone()
    kept = Filter(top_k, top_p, NO_IDS).apply(logits, None, 0, None)
    assert kept is not None
    assert torch.equal(logits, before)
    for row, out in zip(logits, kept, strict=True):
        stays = set(out.isfinite().nonzero()[:, 0].tolist())
        assert stays == reference(row, top_k, top_p)
        assert torch.equal(out[list(stays)], row[list(stays)])


def test_equal_logits_stay_together() -> None:
    row = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert least_kept(row, 2, 1.0, None).item() == 2.0
    assert least_kept(row, 0, 0.6, None).item() == 2.0


def test_bans_reach_only_their_rows_and_shard() -> None:
    logits = torch.zeros(3, 4)
    banned = torch.tensor([True, False, True])
    kept = Filter(0, 1.0, torch.tensor([2, 11, 13])).apply(logits, banned, 10, None)
    assert kept is not None
    assert kept.isinf().nonzero().tolist() == [[0, 1], [0, 3], [2, 1], [2, 3]]


def test_no_filter_costs_nothing() -> None:
    assert Filter(0, 1.0, NO_IDS).apply(torch.zeros(2, 3), None, 0, None) is None
