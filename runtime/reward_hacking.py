"""Signs that a run games its reward instead of learning what it stands for.

Reads the metrics of the iterations so far, by what their names end in, and decides whether to warn; it
never stops anything. Most signs compare the mean over the last `WINDOW` iterations with that over the
first. The limits are rules of thumb, chosen so that runs which learn are left alone: a policy that has
moved by a nat a token, that repeats itself or that answers three times as long is worth a look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

WINDOW = 3
ASIDE = ("eval_", "rival_")
"""Calls of evaluation, which are not what is trained on (`realloc.evaluation`)."""
KL_LIMIT = 1.0
"""Nats a token from the reference model."""
REPETITION_LIMIT = 0.6
"""What is left of the share of different pairs of tokens within responses."""
ENTROPY_LIMIT = 0.1
"""What is left of the entropy at the start."""
LENGTH_FACTOR = 3.0
HELD_OUT = "evaluation/reward"
HELD_OUT_LOSS = 0.5
"""Of what the held-out reward had gained at its best."""
REFERENCE_DROP = 1.0
"""Nats a token by which the reference model finds responses less likely than at the start."""

History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Sign:
    """`kind` names it, so that it is told once; `message` has the numbers and what to try."""

    kind: str
    message: str


def signs(history: History) -> list[Sign]:
    """The signs that the metrics show now; none before two windows of iterations."""
    if len(history) < 2 * WINDOW:
        return []
    found = (
        _divergence(history),
        _diversity(history),
        _length(history),
        _unlikely(history),
        _held_out(history),
    )
    return [sign for sign in found if sign is not None]


def _ends(history: History, ending: str) -> tuple[float, float] | None:
    """Means over the first and over the last window of the metric whose name ends so."""
    names = (name for name in history[0] if name.endswith(ending) and not name.startswith(ASIDE))
    name = next((name for name in names if all(name in metrics for metrics in history)), None)
    if name is None:
        return None
    first, last = history[:WINDOW], history[-WINDOW:]
    return fmean(m[name] for m in first), fmean(m[name] for m in last)


def _divergence(history: History) -> Sign | None:
    ends = _ends(history, "/ref_kl")
    if ends is None or ends[1] <= max(KL_LIMIT, 2 * ends[0]):
        return None
    return Sign(
        "divergence",
        f"the policy has left its reference: {ends[1]:.2f} nats a token, {ends[0]:.2f} at the start. Raise "
        f"kl_coef, lower the learning rate, or take an earlier checkpoint.",
    )


def _diversity(history: History) -> Sign | None:
    pairs, entropy = _ends(history, "/distinct_2"), _ends(history, "/entropy")
    if pairs is not None and pairs[1] < REPETITION_LIMIT * pairs[0]:
        return Sign(
            "diversity",
            f"responses repeat themselves: {pairs[1]:.0%} of their pairs of tokens differ, {pairs[0]:.0%} at "
            f"the start. Read samples.jsonl; raise kl_coef, or take repetition out of the reward.",
        )
    if entropy is not None and entropy[0] > 0 and entropy[1] < ENTROPY_LIMIT * entropy[0]:
        return Sign(
            "diversity",
            f"the policy hardly chooses any more: an entropy of {entropy[1]:.3f} nats a token, "
            f"{entropy[0]:.3f} at the start. Read samples.jsonl; raise kl_coef or clip_range_high, or lower "
            f"the learning rate.",
        )
    return None


def _length(history: History) -> Sign | None:
    ends = _ends(history, "/response_tokens")
    if ends is None or ends[0] == 0:
        return None
    before, now = ends
    if now > LENGTH_FACTOR * before:
        return Sign(
            "length",
            f"responses have grown from {before:.0f} to {now:.0f} tokens. Take length out of the reward, or "
            f"give it a price (missing_eos_penalty, overlong_buffer).",
        )
    if now * LENGTH_FACTOR < before:
        return Sign(
            "length",
            f"responses have shrunk from {before:.0f} to {now:.0f} tokens. See whether the reward likes them "
            f"short; sampling.min_new_tokens is a floor.",
        )
    return None


def _unlikely(history: History) -> Sign | None:
    """The reward rises by what it varied by at the start, on responses that the reference finds absurd."""
    scores, spread = _ends(history, "/scores"), _ends(history, "/scores_std")
    reference = _ends(history, "/ref_logprobs")
    if scores is None or spread is None or reference is None:
        return None
    if scores[1] - scores[0] < spread[0] or reference[0] - reference[1] < REFERENCE_DROP:
        return None
    return Sign(
        "unlikely",
        f"the reward has risen from {scores[0]:.3f} to {scores[1]:.3f} on responses that the reference finds "
        f"unlikely: {reference[1]:.2f} nats a token, {reference[0]:.2f} at the start. Read samples.jsonl; "
        f"raise kl_coef, or score them with another reward.",
    )


def _held_out(history: History) -> Sign | None:
    """Evaluation finds that the held-out reward falls, though that of training does not."""
    judged = [metrics for metrics in history if HELD_OUT in metrics]
    scores = next(
        (name for name in history[0] if name.endswith("/scores") and not name.startswith(ASIDE)), None
    )
    if len(judged) < 4 or scores is None or not all(scores in metrics for metrics in judged):
        return None
    best = max(judged[:-2], key=lambda metrics: metrics[HELD_OUT])
    now = fmean(metrics[HELD_OUT] for metrics in judged[-2:])
    gained, lost = best[HELD_OUT] - judged[0][HELD_OUT], best[HELD_OUT] - now
    training = fmean(metrics[scores] for metrics in judged[-2:])
    if gained <= 0 or lost < HELD_OUT_LOSS * gained or training < best[scores]:
        return None
    return Sign(
        "held out",
        f"the reward on held-out prompts has fallen from {best[HELD_OUT]:.3f} to {now:.3f}, while that of "
        f"training went from {best[scores]:.3f} to {training:.3f}. Stop earlier, or raise kl_coef.",
    )
