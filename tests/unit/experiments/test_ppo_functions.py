"""PPO's tensor functions against plain Python, one sequence and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch

from experiments import ppo_functions as ppo
from experiments.sft_functions import sft_loss
from tests.unit.experiments.fake_batch import (
    FakeBatch,
    Sequence_,
    make_sequences,
    prepare_on_ranks,
    whole_batch,
)

HYPERPARAMETERS: Mapping[str, Any] = {
    "kl_coef": 0.1,
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "clip_range": 0.2,
    "value_clip_range": 0.3,
    "reward_clip": 1.5,
    "whiten_advantages": True,
    "clip_range_high": 0.25,
    "whiten_rewards": False,
    "kl_target": 0.0,
    "kl_horizon": 100.0,
    "kl_estimator": "k1",
    "score_normalization": "none",
    "missing_eos_penalty": 0.0,
    "critic_warmup": 0,
}
EVERYTHING: Mapping[str, Any] = {
    **HYPERPARAMETERS,
    "whiten_rewards": True,
    "kl_target": 0.5,
    "kl_estimator": "k3",
    "score_normalization": "running",
    "missing_eos_penalty": 0.7,
}
LENGTHS = (5, 1, 33, 8, 2, 64, 7, 1, 17)


def slow_advantages(sequence: Sequence_, h: Mapping[str, Any]) -> list[float]:
    """Advantages straight from the definition: a double sum over the temporal-difference errors."""
    n = len(sequence["values"])
    rewards = [
        -h["kl_coef"] * (p - q) for p, q in zip(sequence["logprobs"], sequence["ref_logprobs"], strict=True)
    ]
    limit = h["reward_clip"]
    rewards[-1] += max(-limit, min(limit, sequence["scores"])) if limit else sequence["scores"]
    values = [*sequence["values"], 0.0]
    errors = [rewards[t] + h["gamma"] * values[t + 1] - values[t] for t in range(n)]
    return [sum((h["gamma"] * h["gae_lambda"]) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"gae_lambda": 0.0},
        {"gamma": 0.0},
        {"kl_coef": 0.0},
        {"reward_clip": 0.0},
    ],
    ids=str,
)
def test_returns_are_advantages_from_the_definition_plus_values(changes: Mapping[str, float]) -> None:
    h = {**HYPERPARAMETERS, **changes}
    sequences = make_sequences(LENGTHS)
    expected = [a + v for s in sequences for a, v in zip(slow_advantages(s, h), s["values"], strict=True)]
    actual = ppo.prepare_critic(whole_batch(sequences), h)["returns"]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_with_lambda_and_gamma_one_returns_are_sums_of_rewards() -> None:
    h = {**HYPERPARAMETERS, "gamma": 1.0, "gae_lambda": 1.0, "kl_coef": 0.0, "reward_clip": 0.0}
    sequences = make_sequences((4, 9))
    expected = [sequences[0]["scores"]] * 4 + [sequences[1]["scores"]] * 9
    actual = ppo.prepare_critic(whole_batch(sequences), h)["returns"]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_advantages_are_whitened_over_the_whole_batch() -> None:
    sequences = make_sequences(LENGTHS)
    raw = [a for s in sequences for a in slow_advantages(s, HYPERPARAMETERS)]
    mean = sum(raw) / len(raw)
    variance = sum((a - mean) ** 2 for a in raw) / len(raw)
    expected = [(a - mean) / math.sqrt(variance + 1e-8) for a in raw]
    actual = ppo.prepare_actor(whole_batch(sequences), HYPERPARAMETERS)["advantages"]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_advantages_stay_as_they_are_without_whitening() -> None:
    h = {**HYPERPARAMETERS, "whiten_advantages": False}
    sequences = make_sequences(LENGTHS)
    raw = [a for s in sequences for a in slow_advantages(s, h)]
    actual = ppo.prepare_actor(whole_batch(sequences), h)["advantages"]
    torch.testing.assert_close(actual, torch.tensor(raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(9,), (3, 9), (1, 2, 9), (0, 4, 4, 9), tuple(range(1, 10))], ids=str)
def test_prepared_values_do_not_depend_on_the_split_over_ranks(cuts: Sequence[int]) -> None:
    sequences = make_sequences(LENGTHS)
    shares = [sequences[a:b] for a, b in zip((0, *cuts), cuts, strict=False)]
    both = (HYPERPARAMETERS, EVERYTHING)
    for (prepare, key), h in product(
        ((ppo.prepare_actor, "advantages"), (ppo.prepare_critic, "returns")), both
    ):
        whole = prepare(whole_batch(sequences), h)[key]
        split = torch.cat([result[key] for result in prepare_on_ranks(prepare, shares, h)])
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_an_empty_share_sums_with_the_others() -> None:
    batch = FakeBatch([], 4, 20)
    assert ppo.prepare_actor(batch, HYPERPARAMETERS)["advantages"].shape == (0,)
    assert batch.num_sums == 2  # as often as a rank with sequences
    batch = FakeBatch([], 4, 20)
    assert ppo.prepare_critic(batch, EVERYTHING)["returns"].shape == (0,)
    full = whole_batch(make_sequences(LENGTHS))
    ppo.prepare_critic(full, EVERYTHING)
    assert batch.num_sums == full.num_sums


def test_a_sequence_without_response_leaves_the_others_alone() -> None:
    sequences = make_sequences((4, 0, 6, 0))
    expected = ppo.prepare_critic(whole_batch([sequences[0], sequences[2]]), HYPERPARAMETERS)
    actual = ppo.prepare_critic(whole_batch(sequences), HYPERPARAMETERS)
    torch.testing.assert_close(actual["returns"], expected["returns"])


def slow_actor_loss(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    low, high = 1 - h["clip_range"], 1 + h["clip_range_high"]
    terms, clipped, divergence, reference, advantages, largest = [], 0, 0.0, 0.0, 0.0, 0.0
    for s in sequences:
        for new, old, ref, a in zip(
            s["output"], s["logprobs"], s["ref_logprobs"], s["advantages"], strict=True
        ):
            ratio = math.exp(new - old)
            terms.append(-min(ratio * a, max(low, min(high, ratio)) * a))
            clipped += max(low, min(high, ratio)) * a < ratio * a
            divergence += ratio - 1 - (new - old)
            reference += old - ref
            advantages += a
            largest = max(largest, ratio)
    n = len(terms)
    metrics = {
        "clip_fraction": clipped / n,
        "approx_kl": divergence / n,
        "ref_kl": reference / n,
        "advantage": advantages / n,
        "ratio_max": largest,
    }
    return sum(terms) / n, metrics


def slow_critic_loss(sequences: Sequence[Sequence_], h: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    limit = h["value_clip_range"]
    terms, clipped, returns = [], 0, 0.0
    for s in sequences:
        for new, old, target in zip(s["output"], s["values"], s["returns"], strict=True):
            error = (new - target) ** 2
            bounded = (old + max(-limit, min(limit, new - old)) - target) ** 2 if limit else error
            terms.append(0.5 * max(error, bounded))
            clipped += bounded > error
            returns += target
    n = len(terms)
    return sum(terms) / n, {"value_clip_fraction": clipped / n, "return": returns / n}


LOSSES = [(ppo.actor_loss, slow_actor_loss), (ppo.critic_loss, slow_critic_loss)]


@pytest.mark.parametrize(("loss", "slow"), LOSSES, ids=["actor", "critic"])
@pytest.mark.parametrize("value_clip_range", [0.3, 0.0])
def test_losses_and_metrics_equal_the_formula(loss: Any, slow: Any, value_clip_range: float) -> None:
    h = {**HYPERPARAMETERS, "value_clip_range": value_clip_range}
    sequences = make_sequences(LENGTHS, seed=1)
    batch = whole_batch(sequences)
    value, metrics = loss(batch["output"], batch, h)
    expected, expected_metrics = slow(sequences, h)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", [ppo.actor_loss, ppo.critic_loss, sft_loss], ids=["actor", "critic", "sft"])
def test_micro_batches_add_up_to_the_whole(loss: Any) -> None:
    """Losses, metrics and gradients: contributions of any split sum to those of the batch."""
    sequences = make_sequences(LENGTHS, seed=2)
    batch = whole_batch(sequences)
    output = batch["output"].requires_grad_()
    whole, whole_metrics = loss(output, batch, HYPERPARAMETERS)
    whole.backward()
    total, totals, gradients = 0.0, dict.fromkeys(whole_metrics, 0.0), []
    for part in (sequences[:2], sequences[2:3], sequences[3:]):
        piece = FakeBatch(part, batch.global_sequences, batch.global_elements)
        piece_output = piece["output"].requires_grad_()
        value, metrics = loss(piece_output, piece, HYPERPARAMETERS)
        value.backward()
        assert piece_output.grad is not None
        gradients.append(piece_output.grad)
        total += value.item()
        for k, v in metrics.items():
            totals[k] = max(totals[k], float(v)) if k.endswith("_max") else totals[k] + float(v)
    assert total == pytest.approx(whole.item(), rel=1e-5)
    assert totals == pytest.approx({k: float(v) for k, v in whole_metrics.items()}, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(torch.cat(gradients), output.grad)


def test_clipped_tokens_pull_no_more() -> None:
    """Past the clip range in the direction of the advantage the gradient is 0; against it, it is not."""
    one = {"logprobs": [0.0] * 4, "ref_logprobs": [0.0] * 4, "values": [0.0] * 4, "scores": 0.0}
    one["advantages"] = [1.0, 1.0, -1.0, -1.0]
    batch = whole_batch([one])
    output = torch.tensor([0.5, -0.5, -0.5, 0.5]).requires_grad_()
    loss, metrics = ppo.actor_loss(output, batch, HYPERPARAMETERS)
    loss.backward()
    assert output.grad is not None
    assert (output.grad != 0).tolist() == [False, True, False, True]
    assert float(metrics["clip_fraction"]) == 0.5


def test_sft_loss_is_the_mean_negative_logprob() -> None:
    batch = whole_batch(make_sequences((3, 5)))
    output = -torch.arange(8.0)
    loss, _ = sft_loss(output, batch, {})
    assert loss.item() == pytest.approx(28 / 8)


def test_the_divergence_from_the_reference_is_reported_though_nothing_is_made_of_it() -> None:
    batch = whole_batch(make_sequences(LENGTHS))
    expected = ppo.actor_loss(batch["output"], batch, HYPERPARAMETERS)[1]["ref_kl"]
    actual = ppo.actor_loss(batch["output"], batch, {**HYPERPARAMETERS, "kl_coef": 0.0})[1]["ref_kl"]
    assert actual.item() == expected.item() != 0.0


def returns_of_rewards(sequences: Sequence[Sequence_], **changes: Any) -> tuple[list[list[float]], FakeBatch]:
    """Rewards as the functions make them: with no discount, no decay and no values, each token's reward is
    its return less the next one's."""
    h = {**HYPERPARAMETERS, "gamma": 1.0, "gae_lambda": 1.0, "reward_clip": 0.0, **changes}
    plain = [{**s, "values": [0.0] * len(s["values"])} for s in sequences]
    batch = whole_batch(plain)
    sums = ppo.prepare_critic(batch, h)["returns"].split([len(s["values"]) for s in sequences])
    return [
        [a - b for a, b in zip(p, [*p[1:], 0.0], strict=True)] for p in map(torch.Tensor.tolist, sums)
    ], batch


def close(actual: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_of_a_token_is_the_estimator_of_its_divergence(estimator: str) -> None:
    formula = {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
    }[estimator]
    sequences = make_sequences((3, 6))
    expected = []
    for s in sequences:
        rewards = [-0.1 * formula(p, q) for p, q in zip(s["logprobs"], s["ref_logprobs"], strict=True)]
        expected.append([*rewards[:-1], rewards[-1] + s["scores"]])
    close(returns_of_rewards(sequences, kl_estimator=estimator)[0], expected)


def test_whitened_rewards_have_variance_one_and_their_own_mean() -> None:
    sequences = make_sequences(LENGTHS)
    raw = returns_of_rewards(sequences)[0]
    mean, deviation = fmean(flat := [x for r in raw for x in r]), pstdev(flat)
    expected = [[(x - mean) / math.sqrt(deviation**2 + 1e-8) + mean for x in r] for r in raw]
    close(returns_of_rewards(sequences, whiten_rewards=True)[0], expected)


def test_responses_without_an_end_are_penalised_beyond_the_clip() -> None:
    sequences = make_sequences((4, 5, 6))
    assert [s["finished"] for s in sequences] == [True, False, True]
    raw = returns_of_rewards(sequences, reward_clip=0.5)[0]
    raw[1][-1] -= 0.7
    close(returns_of_rewards(sequences, reward_clip=0.5, missing_eos_penalty=0.7)[0], raw)


def test_scores_are_normalised_by_the_batch_or_by_all_so_far() -> None:
    h = {**HYPERPARAMETERS, "kl_coef": 0.0, "gamma": 1.0, "gae_lambda": 1.0, "reward_clip": 0.0}
    parts = [make_sequences((2,) * n, seed=n) for n in (3, 7, 4)]
    for how in ("batch", "running"):
        state: dict[str, float] = {}
        seen: list[float] = []
        for part in parts:
            scores = [s["scores"] for s in part]
            seen = seen + scores if how == "running" else scores
            expected = [(x - fmean(seen)) / (pstdev(seen) + 1e-5) for x in scores]
            batch = whole_batch([{**s, "values": [0.0, 0.0]} for s in part], state=state)
            actual = ppo.prepare_critic(batch, {**h, "score_normalization": how})["returns"]
            assert actual[1::2].tolist() == pytest.approx(expected, rel=1e-5)
        assert bool(state) == (how == "running")


def test_the_adaptive_coefficient_follows_ziegler() -> None:
    """The first iteration uses `kl_coef`; each changes the next one's by its own divergence."""
    h = {**HYPERPARAMETERS, "kl_target": 0.5, "kl_horizon": 40.0}
    for prepare in (ppo.prepare_actor, ppo.prepare_critic):
        state: dict[str, float] = {}
        expected = HYPERPARAMETERS["kl_coef"]
        for seed in range(4):
            sequences = make_sequences(LENGTHS, seed=seed)
            batch = whole_batch(sequences, state=state)
            prepare(batch, h)
            assert batch.reported["kl_coef"] == pytest.approx(expected)
            pairs = [zip(s["logprobs"], s["ref_logprobs"], strict=True) for s in sequences]
            divergence = sum(p - q for pair in pairs for p, q in pair) / len(sequences)
            error = max(-0.2, min(0.2, divergence / 0.5 - 1))
            expected *= 1 + error * len(sequences) / 40
            assert state["kl_coef"] == pytest.approx(expected)
    assert expected != HYPERPARAMETERS["kl_coef"]


def test_the_actor_waits_for_the_critic() -> None:
    h, state = {**HYPERPARAMETERS, "critic_warmup": 2}, dict[str, float]()
    moved = []
    for _ in range(3):
        advantages = ppo.prepare_actor(whole_batch(make_sequences(LENGTHS), state=state), h)["advantages"]
        moved.append(bool(advantages.any()))
    assert moved == [False, False, True]


def test_the_loss_on_texts_is_their_mean_negative_logprob_and_waits_too() -> None:
    """Micro-batches add up; whatever the coefficient, the metric is the loss itself."""
    texts = make_sequences((4, 9, 1))
    values = [value for text in texts for value in text["output"]]
    expected = -fmean(values)
    h = {**HYPERPARAMETERS, "ptx_coef": 2.5, "critic_warmup": 1}
    for counted, factor in ((2.0, 2.5), (1.0, 0.0)):  # iterations so far, this one included
        parts = [
            FakeBatch(part, 3, len(values), state={"iterations": counted}) for part in (texts[:1], texts[1:])
        ]
        found = [ppo.ptx_loss(batch["output"], batch, h) for batch in parts]
        assert sum(float(loss) for loss, _ in found) == pytest.approx(factor * expected, rel=1e-6)
        assert sum(float(more["ptx_loss"]) for _, more in found) == pytest.approx(expected, rel=1e-6)


def test_explained_variance_is_reported() -> None:
    sequences = make_sequences(LENGTHS)
    batch = whole_batch(sequences)
    returns = ppo.prepare_critic(batch, HYPERPARAMETERS)["returns"].tolist()
    errors = [r - v for r, v in zip(returns, batch["values"].tolist(), strict=True)]
    expected = 1 - pstdev(errors) ** 2 / pstdev(returns) ** 2
    assert batch.reported["explained_variance"] == pytest.approx(expected, rel=1e-5)
