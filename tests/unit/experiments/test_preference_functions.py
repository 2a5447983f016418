"""DPO, reward modelling and RAFT against plain Python, one pair and one token at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from experiments import dpo_functions, raft_functions, reward_functions
from tests.unit.experiments.fake_batch import FakeBatch, make_sequences, prepare_on_ranks, whole_batch

LENGTHS = (5, 1, 33, 8, 2, 64, 7, 1)
H: Mapping[str, Any] = {"beta": 0.3, "loss": "sigmoid", "label_smoothing": 0.1, "centre_coef": 0.2}


def samples(each: int, seed: int = 0) -> list[dict[str, Any]]:
    sequences = make_sequences(LENGTHS, seed)
    return [
        s | {"prompt": i // each, "sample": i % each, "weights": s["values"]} for i, s in enumerate(sequences)
    ]


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


def test_online_pairs_are_the_best_and_the_worst_of_a_prompt() -> None:
    sequences = samples(4)
    shares = [sequences[:3], [], sequences[3:]]
    parts = prepare_on_ranks(
        dpo_functions.prepare_best_and_worst, shares, H, num_prompts=2, samples_per_prompt=4
    )
    choices = torch.cat([part["choices"] for part in parts])
    expected = []
    for group in (sequences[:4], sequences[4:]):
        scores = [s["scores"] for s in group]
        expected += [float(x == max(scores)) - float(x == min(scores)) for x in scores]
    assert choices.tolist() == expected
    chosen = [s | {"choices": c} for s, c in zip(sequences, expected, strict=True)]
    batch = whole_batch(chosen, num_prompts=2, samples_per_prompt=4)
    value, _ = dpo_functions.online_dpo_loss(batch["output"], batch, H)
    terms = []
    for group in (chosen[:4], chosen[4:]):
        best, worst = (next(s for s in group if s["choices"] == which) for which in (1.0, -1.0))
        terms.append(slow_pair_loss(best, worst, H))
    assert value.item() == pytest.approx(statistics.mean(terms), rel=1e-4)


def test_samples_of_equal_scores_still_make_a_pair() -> None:
    sequences = [s | {"scores": 1.0} for s in samples(4)]
    batch = whole_batch(sequences, num_prompts=2, samples_per_prompt=4)
    choices = dpo_functions.prepare_best_and_worst(batch, H)["choices"]
    assert choices.tolist() == [1.0, 0.0, 0.0, -1.0] * 2


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
    shares = [sequences[:3], [], sequences[3:]]
    parts = prepare_on_ranks(
        raft_functions.prepare_actor, shares, {"keep": keep}, num_prompts=2, samples_per_prompt=4
    )
    weights = torch.cat([part["weights"] for part in parts])
    expected: list[float] = []
    losses = []
    for group in (sequences[:4], sequences[4:]):
        best = sorted((s["scores"] for s in group), reverse=True)[:keep]
        for s in group:
            n = len(s["output"])
            expected += [4 / keep / n if s["scores"] in best else 0.0] * n
            if s["scores"] in best:
                losses.append(-statistics.mean(s["output"]))
    torch.testing.assert_close(weights, torch.tensor(expected))
    batch = whole_batch(sequences, num_prompts=2, samples_per_prompt=4)
    for s, part in zip(sequences, weights.split(list(LENGTHS)), strict=True):
        s["weights"] = part.tolist()
    value, _ = raft_functions.actor_loss(batch["output"], batch, {"keep": keep})
    assert value.item() == pytest.approx(statistics.mean(losses), rel=1e-4)
