"""DPO, reward modelling and RAFT against plain Python, one pair and one token at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experiments import dpo_functions, raft_functions, reward_functions
from tests.unit.experiments.fake_batch import FakeBatch, make_sequences, prepare_on_ranks, whole_batch

LENGTHS = (5, 1, 33, 8, 2, 64, 7, 1)
H: Mapping[str, Any] = {"beta": 0.3, "loss": "sigmoid", "label_smoothing": 0.1, "centre_coef": 0.2}


def samples(each: int, seed: int = 0) -> list[dict[str, Any]]:
    sequences = make_sequences(LENGTHS, seed)
    return [s | {"prompt": i // each, "sample": i % each} for i, s in enumerate(sequences)]


def batch_of(each: int, seed: int = 0) -> FakeBatch:
    return whole_batch(samples(each, seed), num_prompts=len(LENGTHS) // each, samples_per_prompt=each)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slow_pair_loss(chosen: dict[str, Any], rejected: dict[str, Any], h: Mapping[str, Any]) -> float:
    def ratio(s: dict[str, Any]) -> float:
        total: float = sum(s["output"]) - sum(s["ref_logprobs"])
        return total / len(s["output"]) if h["loss"] == "ipo" else total

    margin = ratio(chosen) - ratio(rejected)
    e = h["label_smoothing"]
    by_loss: Mapping[str, float] = {
        "sigmoid": -(1 - e) * log_sigmoid(h["beta"] * margin) - e * log_sigmoid(-h["beta"] * margin),
        "ipo": (margin - 1 / (2 * h["beta"])) ** 2,
        "hinge": max(0.0, 1 - h["beta"] * margin),
    }
    return by_loss[h["loss"]]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_dpo_loss_equals_the_formula_and_micro_batches_add_up(loss: str) -> None:
    h = {**H, "loss": loss}
    sequences, batch = samples(2), batch_of(2)
    value, metrics = dpo_functions.dpo_loss(batch["output"], batch, h)
    pairs = list(zip(sequences[0::2], sequences[1::2], strict=True))
    assert value.item() == pytest.approx(
        statistics.mean(slow_pair_loss(*pair, h) for pair in pairs), rel=1e-4
    )
    assert 0 < metrics["accuracy"].item() < 1
    parts = [FakeBatch(part, batch.global_sequences, 0) for part in (sequences[:2], sequences[2:])]
    total = sum(dpo_functions.dpo_loss(part["output"], part, h)[0].item() for part in parts)
    assert total == pytest.approx(value.item(), rel=1e-5)


def test_an_actor_equal_to_its_reference_starts_at_log_2() -> None:
    batch = batch_of(2)
    value, metrics = dpo_functions.dpo_loss(batch["ref_logprobs"], batch, {**H, "label_smoothing": 0.0})
    assert value.item() == pytest.approx(math.log(2), rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(0.0, abs=1e-5)


def select_on_ranks(select: Any, shares: Sequence[Sequence[Any]], h: Mapping[str, Any]) -> list[bool]:
    """What ranks select together, of two prompts with four samples each."""
    parts = prepare_on_ranks(
        lambda batch, h: {"chosen": select(batch, h)}, shares, h, num_prompts=2, samples_per_prompt=4
    )
    return [bool(chosen) for part in parts for chosen in part["chosen"]]


def test_online_pairs_are_the_best_and_the_worst_of_a_prompt() -> None:
    sequences = samples(4)
    flags = select_on_ranks(
        dpo_functions.select_best_and_worst, [sequences[:3], [], sequences[3:6], sequences[6:]], H
    )
    chosen, terms = [], []
    for group in (sequences[:4], sequences[4:]):
        best, worst = (choose(group, key=lambda s: s["scores"]) for choose in (max, min))
        chosen += [s for s in group if s in (best, worst)]
        terms.append(slow_pair_loss(best, worst, H))
    assert [s for s, flag in zip(sequences, flags, strict=True) if flag] == chosen
    assert chosen[0]["scores"] < chosen[1]["scores"] or chosen[2]["scores"] < chosen[3]["scores"]
    batch = whole_batch(chosen, num_prompts=2, samples_per_prompt=4)
    value, _ = dpo_functions.online_dpo_loss(batch["output"], batch, H)
    assert value.item() == pytest.approx(statistics.mean(terms), rel=1e-4)


def test_samples_of_equal_scores_still_make_a_pair_and_one_alone_does_not() -> None:
    sequences = [s | {"scores": 1.0} for s in samples(4)][:5]
    flags = select_on_ranks(dpo_functions.select_best_and_worst, [sequences], H)
    assert flags == [True, False, False, True, False]
    batch = whole_batch([sequences[0], sequences[3]], num_prompts=2, samples_per_prompt=4)
    value, _ = dpo_functions.online_dpo_loss(batch["output"], batch, H)
    assert value.item() == pytest.approx(slow_pair_loss(sequences[0], sequences[3], H), rel=1e-4)


def test_reward_loss_equals_the_formula() -> None:
    scores = torch.tensor([1.0, 0.5, -0.2, 0.7])
    batch = FakeBatch(samples(2)[:4], 4, 4)
    value, metrics = reward_functions.reward_loss(scores, batch, H)
    e, terms = H["label_smoothing"], []
    for a, b in ((1.0, 0.5), (-0.2, 0.7)):
        terms.append(-(1 - e) * log_sigmoid(a - b) - e * log_sigmoid(b - a) + H["centre_coef"] * (a + b) ** 2)
    assert value.item() == pytest.approx(statistics.mean(terms), rel=1e-5)
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == pytest.approx((0.5 - 0.9) / 2, rel=1e-5)


@pytest.mark.parametrize("keep", [1, 2])
def test_raft_learns_from_the_best_samples_alone(keep: int) -> None:
    sequences = samples(4)
    h = {"keep": keep}
    flags = select_on_ranks(raft_functions.select_best, [sequences[:3], [], sequences[3:]], h)
    kept, losses = [], []
    for group in (sequences[:4], sequences[4:]):
        best = sorted((s["scores"] for s in group), reverse=True)[:keep]
        for s in group:
            if s["scores"] in best:
                n = len(s["output"])
                kept.append(s | {"prompts": [0] * 3, "tokens": [0] * (3 + n)})
                losses.append(-statistics.mean(s["output"]))
    assert [s["scores"] for s, flag in zip(sequences, flags, strict=True) if flag] == [
        s["scores"] for s in kept
    ]
    batch = whole_batch(kept, num_prompts=2, samples_per_prompt=4)
    value, _ = raft_functions.actor_loss(batch["output"], batch, h)
    assert value.item() == pytest.approx(statistics.mean(losses), rel=1e-4)


def test_of_equal_scores_raft_keeps_the_earlier_samples() -> None:
    sequences = [s | {"scores": 1.0} for s in samples(4)]
    flags = select_on_ranks(raft_functions.select_best, [sequences[:1], sequences[1:]], {"keep": 3})
    assert flags == [True, True, True, False] * 2
