"""RLOO, REINFORCE++ and ReMax against plain Python, one group and one token at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experiments import reinforce_pp_functions, remax_functions, rloo_functions
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
    "gamma": 0.95,
    "reward_clip": 1.0,
    "group_baseline": True,
    "whiten_advantages": False,
}
LENGTHS = (5, 1, 33, 8, 2, 64, 7, 1, 17)
SAMPLES = 3


def groups(seed: int = 0, *, per_token: bool = True) -> list[dict[str, Any]]:
    sequences = make_sequences(LENGTHS, seed)
    for i, s in enumerate(sequences):
        s |= {"prompt": i // SAMPLES, "greedy_scores": math.sin(i)}
        if not per_token:
            s["advantages"] = s["scores"] / 2
    return sequences


def batch_of(sequences: Sequence[Sequence_]) -> FakeBatch:
    return whole_batch(sequences, num_prompts=len(LENGTHS) // SAMPLES)


def log_ratios(s: Sequence_) -> list[float]:
    return [p - q for p, q in zip(s["logprobs"], s["ref_logprobs"], strict=True)]


def slow_returns(s: Sequence_, score: float, h: Mapping[str, Any]) -> list[float]:
    rewards = [-h["kl_coef"] * x for x in log_ratios(s)]
    rewards[-1] += score
    return [
        sum(h["gamma"] ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))
    ]


def slow_rloo(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> list[float]:
    rewards = [s["scores"] - h["kl_coef"] * sum(log_ratios(s)) for s in sequences]
    result = []
    for i, s in enumerate(sequences):
        others = [r for j, r in enumerate(rewards) if j != i and sequences[j]["prompt"] == s["prompt"]]
        result.append(rewards[i] - statistics.mean(others))
    return result


def slow_reinforce_pp(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> list[float]:
    limit = h["reward_clip"]
    scores = [max(-limit, min(limit, s["scores"])) for s in sequences]
    if h["group_baseline"]:
        means = {
            p: statistics.mean(x for x, s in zip(scores, sequences, strict=True) if s["prompt"] == p)
            for p in range(len(LENGTHS) // SAMPLES)
        }
        scores = [x - means[s["prompt"]] for x, s in zip(scores, sequences, strict=True)]
    raw = [a for s, x in zip(sequences, scores, strict=True) for a in slow_returns(s, x, h)]
    return [(a - statistics.mean(raw)) / statistics.pstdev(raw) for a in raw]


def slow_remax(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> list[float]:
    return [a for s in sequences for a in slow_returns(s, s["scores"] - s["greedy_scores"], h)]


PREPARES: Mapping[str, tuple[Any, Any]] = {
    "rloo": (rloo_functions.prepare_actor, slow_rloo),
    "reinforce_pp": (reinforce_pp_functions.prepare_actor, slow_reinforce_pp),
    "remax": (remax_functions.prepare_actor, slow_remax),
}


@pytest.mark.parametrize("name", PREPARES)
@pytest.mark.parametrize("changes", [{}, {"gamma": 1.0, "group_baseline": False}], ids=str)
def test_advantages_are_those_of_the_paper(name: str, changes: Mapping[str, Any]) -> None:
    prepare, slow = PREPARES[name]
    h = {**H, **changes}
    actual = prepare(batch_of(groups()), h)["advantages"]
    torch.testing.assert_close(actual, torch.tensor(slow(groups(), h)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PREPARES)
def test_groups_may_be_split_over_ranks(name: str) -> None:
    prepare, _ = PREPARES[name]
    sequences = groups()
    whole = prepare(batch_of(sequences), H)["advantages"]
    parts = prepare_on_ranks(prepare, [sequences[:4], [], sequences[4:]], H, num_prompts=3)
    torch.testing.assert_close(torch.cat([part["advantages"] for part in parts]), whole)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    h = {**H, "whiten_advantages": True}
    advantages = rloo_functions.prepare_actor(batch_of(groups()), h)["advantages"]
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert advantages.var(correction=0).item() == pytest.approx(1.0, rel=1e-4)


def test_rloo_clips_the_ratio_of_whole_responses() -> None:
    sequences = groups(1, per_token=False)
    for s in sequences:  # near enough for some to stay within the clip range
        s["output"] = [x + 0.02 * math.cos(k) for k, x in enumerate(s["logprobs"])]
    batch = batch_of(sequences)
    value, metrics = rloo_functions.actor_loss(batch["output"], batch, H)
    terms = []
    for s in sequences:
        ratio = math.exp(sum(s["output"]) - sum(s["logprobs"]))
        bounded = max(1 - H["clip_range"], min(1 + H["clip_range"], ratio))
        terms.append(-min(ratio * s["advantages"], bounded * s["advantages"]))
    assert value.item() == pytest.approx(statistics.mean(terms), rel=1e-4)
    assert metrics["ref_kl"].item() == pytest.approx(
        statistics.mean(x for s in sequences for x in log_ratios(s)), rel=1e-4
    )


@pytest.mark.parametrize("functions", [rloo_functions, reinforce_pp_functions, remax_functions])
def test_the_first_step_is_reinforce_and_micro_batches_add_up(functions: Any) -> None:
    """At the policy that generated, the gradient is -advantage over what the loss is a mean of."""
    sequences = groups(2, per_token=functions is not rloo_functions)
    for s in sequences:
        s["output"] = s["logprobs"]
    batch = batch_of(sequences)
    gradients = []
    for part in (sequences[:2], sequences[2:3], sequences[3:]):
        piece = FakeBatch(part, batch.global_sequences, batch.global_elements)
        output = piece["output"].requires_grad_()
        functions.actor_loss(output, piece, H)[0].backward()
        assert output.grad is not None
        gradients.append(output.grad)
    if functions is rloo_functions:
        expected = [-s["advantages"] / len(sequences) for s in sequences for _ in s["output"]]
    else:
        expected = [-a / batch.global_elements for s in sequences for a in s["advantages"]]
    torch.testing.assert_close(torch.cat(gradients), torch.tensor(expected), rtol=1e-4, atol=1e-7)
