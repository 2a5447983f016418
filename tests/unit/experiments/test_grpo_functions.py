"""GRPO's tensor functions against plain Python, one group and one token at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experiments import grpo_functions as grpo
from experiments import rloo_functions
from tests.unit.experiments.fake_batch import (
    FakeBatch,
    Sequence_,
    make_sequences,
    prepare_on_ranks,
    whole_batch,
)

H: Mapping[str, Any] = {
    "kl_coef": 0.1,
    "clip_range": 0.2,
    "clip_range_high": 0.3,
    "scale": "group",
    "aggregation": "sequence",
    "overlong_buffer": 0,
}
LENGTHS = (5, 1, 33, 8, 2, 64, 7, 1, 17)
SAMPLES = 3
LIMIT = 64


def groups(seed: int = 0) -> list[dict[str, Any]]:
    sequences = make_sequences(LENGTHS, seed)
    return [s | {"prompt": i // SAMPLES, "advantages": s["scores"] / 2} for i, s in enumerate(sequences)]


def batch_of(sequences: Sequence[Sequence_]) -> FakeBatch:
    return whole_batch(sequences, num_prompts=len(LENGTHS) // SAMPLES, max_response_tokens=LIMIT)


def slow_advantages(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> list[float]:
    scores = []
    for s in sequences:
        over = len(s["logprobs"]) - (LIMIT - h["overlong_buffer"])
        penalty = min(1.0, max(0.0, over / h["overlong_buffer"])) if h["overlong_buffer"] else 0.0
        scores.append(s["scores"] - penalty)
    result = []
    for s, score in zip(sequences, scores, strict=True):
        group = [x for other, x in zip(sequences, scores, strict=True) if other["prompt"] == s["prompt"]]
        spread = {"group": statistics.stdev(group), "batch": statistics.stdev(scores), "none": 1.0 - 1e-4}
        result.append((score - statistics.mean(group)) / (spread[h["scale"]] + 1e-4))
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("buffer", [0, 40])
def test_advantages_compare_the_samples_of_a_prompt(scale: str, buffer: int) -> None:
    h = {**H, "scale": scale, "overlong_buffer": buffer}
    actual = grpo.prepare_actor(batch_of(groups()), h)["advantages"]
    torch.testing.assert_close(actual, torch.tensor(slow_advantages(groups(), h)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_may_be_split_over_ranks(scale: str) -> None:
    h = {**H, "scale": scale}
    sequences = groups()
    whole = grpo.prepare_actor(batch_of(sequences), h)["advantages"]
    shares = [sequences[:4], [], sequences[4:5], sequences[5:]]
    parts = prepare_on_ranks(grpo.prepare_actor, shares, h, num_prompts=3, max_response_tokens=LIMIT)
    torch.testing.assert_close(torch.cat([part["advantages"] for part in parts]), whole)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_sample_whose_others_have_no_score_teaches_nothing(scale: str) -> None:
    alone = whole_batch(groups()[:1], num_prompts=1, max_response_tokens=LIMIT)
    assert grpo.prepare_actor(alone, {**H, "scale": scale})["advantages"].tolist() == [0.0]


def test_equal_scores_teach_nothing() -> None:
    sequences = [s | {"scores": 0.7} for s in groups()]
    advantages = grpo.prepare_actor(batch_of(sequences), H)["advantages"]
    assert advantages.abs().max() < 1e-6


@pytest.mark.parametrize("functions", [grpo, rloo_functions])
def test_dynamic_sampling_takes_prompts_with_signal_first_in_order(functions: Any) -> None:
    """Of five prompts the second and the fourth teach something; 1e-5 is rounding, not signal."""
    table = [[1.0] * 3, [0.0, 1.0, 0.0], [0.0, 1e-5, 0.0], [2.0, 2.0, -1.0], [0.5] * 3]
    sequences = make_sequences([4] * 15)
    rows = [
        s | {"prompt": i // 3, "sample": i % 3, "scores": table[i // 3][i % 3]}
        for i, s in enumerate(sequences)
    ]
    for count, prompts, missing in ((1, {1}, 0), (2, {1, 3}, 0), (4, {0, 1, 2, 3}, 2)):
        h = {**H, "dynamic_sampling": count}
        for shares in ([rows], [rows[:4], [], rows[4:]]):
            reports: list[Mapping[str, float]] = []

            def select(batch: Any, given: Mapping[str, Any], found: Any = reports) -> Mapping[str, Any]:
                flags = functions.select_prompts(batch, given)
                found.append(batch.reported)
                return {"flags": flags}

            parts = prepare_on_ranks(select, shares, h, num_prompts=5, samples_per_prompt=3)
            flags = [bool(flag) for part in parts for flag in part["flags"]]
            assert {row["prompt"] for row, flag in zip(rows, flags, strict=True) if flag} == prompts
            assert sum(flags) == 3 * count
            assert all(r == {"without_signal": 3, "missing": missing} for r in reports)


def test_signal_is_of_the_scores_after_the_overlong_punishment() -> None:
    rows = [
        s | {"prompt": i // 2, "sample": i % 2, "scores": 1.0}
        for i, s in enumerate(make_sequences([4, 4, 4, 60]))
    ]
    batch = whole_batch(rows, num_prompts=2, samples_per_prompt=2, max_response_tokens=LIMIT)
    h = {**H, "overlong_buffer": 16, "dynamic_sampling": 1}
    assert grpo.select_prompts(batch, h).tolist() == [False, False, True, True]
    assert grpo.select_prompts(batch, {**h, "overlong_buffer": 0}).tolist() == [True, True, False, False]


def slow_loss(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> float:
    means, every = [], []
    for s in sequences:
        losses = []
        for new, old, ref in zip(s["output"], s["logprobs"], s["ref_logprobs"], strict=True):
            ratio, a = math.exp(new - old), s["advantages"]
            bounded = max(1 - h["clip_range"], min(1 + h["clip_range_high"], ratio))
            divergence = math.exp(ref - new) - 1 - (ref - new)
            losses.append(-min(ratio * a, bounded * a) + h["kl_coef"] * divergence)
        means.append(statistics.mean(losses))
        every += losses
    n = len(sequences)
    losses_by_aggregation: Mapping[str, float] = {
        "sequence": statistics.mean(means),
        "token": statistics.mean(every),
        "constant": sum(every) / (n * LIMIT),
    }
    return losses_by_aggregation[h["aggregation"]]


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_coef", [0.1, 0.0])
def test_the_loss_equals_the_formula_and_micro_batches_add_up(aggregation: str, kl_coef: float) -> None:
    h = {**H, "aggregation": aggregation, "kl_coef": kl_coef}
    sequences = groups(seed=1)
    batch = batch_of(sequences)
    value, metrics = grpo.actor_loss(batch["output"], batch, h)
    assert value.item() == pytest.approx(slow_loss(sequences, h), rel=1e-5)
    assert ("ref_kl" in metrics) == (kl_coef > 0)
    total = 0.0
    for part in (sequences[:2], sequences[2:3], sequences[3:]):
        piece = FakeBatch(part, batch.global_sequences, batch.global_elements, max_response_tokens=LIMIT)
        total += grpo.actor_loss(piece["output"], piece, h)[0].item()
    assert total == pytest.approx(value.item(), rel=1e-5)


def test_a_sequence_without_response_counts_as_a_sequence_without_loss() -> None:
    sequences = groups()[:3]
    empty = {key: [] if isinstance(value, list) else value for key, value in sequences[0].items()}
    batch = batch_of([empty, *sequences[1:]])
    value, _ = grpo.actor_loss(batch["output"], batch, H)
    assert value.item() == pytest.approx(slow_loss(sequences[1:], H) * 2 / 3, rel=1e-5)
