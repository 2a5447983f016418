"""Signs of reward hacking: a calm run has none, each kind of trouble has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from runtime.reward_hacking import WINDOW, signs

LAST = 11


def course(**changes: Callable[[float], float]) -> list[Mapping[str, float]]:
    """Twelve iterations of a run that learns; `changes`: metric -> its value at a time from 0 to 1."""
    calm: Mapping[str, Callable[[float], float]] = {
        "actor_gen/response_tokens": lambda t: 40 + 30 * t,
        "actor_gen/entropy": lambda t: 2.0 - 1.5 * t,
        "actor_gen/distinct_2": lambda t: 0.95 - 0.2 * t,
        "rew_inf/scores": lambda t: 0.2 + 0.7 * t,
        "rew_inf/scores_std": lambda t: 0.3,
        "ref_inf/ref_logprobs": lambda t: -2.0 - 0.4 * t,
        "actor_train/ref_kl": lambda t: 0.5 * t,
        "evaluation/reward": lambda t: 0.2 + 0.6 * t - 0.1 * t * t,
        "eval_actor_gen/response_tokens": lambda t: 10 + 200 * t,
    }
    names = {name.rpartition("/")[2]: name for name in calm if not name.startswith("eval_")}
    chosen = {**calm, **{names[short]: change for short, change in changes.items()}}
    return [{name: value(i / LAST) for name, value in chosen.items()} for i in range(LAST + 1)]


def test_a_run_that_learns_has_no_signs() -> None:
    for length in range(LAST + 2):
        assert signs(course()[:length]) == []


TROUBLES: Mapping[str, tuple[Mapping[str, Callable[[float], float]], str]] = {
    "divergence": ({"ref_kl": lambda t: 3 * t}, "nats a token"),
    "diversity": ({"distinct_2": lambda t: 0.95 - 0.8 * t}, "repeat themselves"),
    "length": ({"response_tokens": lambda t: 20 + 200 * t}, "grown from"),
    "held out": ({"reward": lambda t: 1.0 - (2 * t - 0.8) ** 2}, "held-out prompts has fallen"),
    "unlikely": ({"ref_logprobs": lambda t: -2.0 - 2.5 * t}, "unlikely"),
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_each_trouble_has_its_sign_and_no_other(kind: str) -> None:
    changes, words = TROUBLES[kind]
    history = course(**changes)
    (sign,) = signs(history)
    assert sign.kind == kind
    assert words in sign.message
    assert not signs(history[: 2 * WINDOW - 1])


def test_other_ways_to_lose_diversity_and_length() -> None:
    (sign,) = signs(course(entropy=lambda t: 2.0 * (1 - t) ** 2))
    assert (sign.kind, "hardly chooses" in sign.message) == ("diversity", True)
    (sign,) = signs(course(response_tokens=lambda t: 60 - 55 * t))
    assert (sign.kind, "shrunk from" in sign.message) == ("length", True)


def test_a_reward_that_stays_has_no_sign_though_the_reference_is_surprised() -> None:
    assert signs(course(ref_logprobs=lambda t: -2.0 - 2.5 * t, scores=lambda t: 0.2)) == []


def test_metrics_that_are_not_there_are_left_out() -> None:
    assert signs([{"actor_train/loss": 1.0}] * 12) == []
