"""The `rewards` section of an experiment: what it says, what it refuses, and the calls it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from planner.drawing import graph_text
from realloc.dataflow import CallKind
from realloc.errors import InputError
from realloc.experiment import Experiment, experiment_content, parse_experiment
from realloc.files import Reader
from realloc.rewards import RewardSource, parse_rewards, rewards_content

EVERY: Sequence[Mapping[str, Any]] = (
    {"function": "my:score", "weight": -0.5, "time_limit_s": 5, "on_failure": "skip"},
    {"function": "my:score", "name": "other", "options": {"scale": 2, "kind": "x"}, "sample_time_limit_s": 1},
    {"verifier": "arithmetic", "weight": 0.5, "answer": "gold", "tolerance": 0.01},
    {"verifier": "exact", "ignore_case": True},
    {"verifier": "math"},
    {"verifier": "regex", "pattern": "^a+$", "whole": True},
    {"verifier": "json", "keys": ["a", "b"]},
    {"verifier": "length", "minimum": 3},
    {"model": "reward_a", "weight": 0.3},
)
ONLINE = {
    "ppo": ("actor", "critic", "ref"),
    "grpo": ("actor", "ref"),
    "rloo": ("actor", "ref"),
    "remax": ("actor", "ref"),
    "reinforce_pp": ("actor", "ref"),
    "raft": ("actor",),
    "iterative_dpo": ("actor", "ref"),
}


def parse(algorithm: str, rewards: Any, *models: str, **more: Any) -> Experiment:
    content = {
        "algorithm": algorithm,
        "models": dict.fromkeys((*ONLINE[algorithm], *models), "llama-7b"),
        "workload": {
            "sequences": 8,
            "samples_per_prompt": 4,
            "prompt_tokens": 16,
            "response_tokens": 16,
        },
        "rewards": rewards,
    }
    return parse_experiment(Reader(content | more, "experiment.yaml"), Path("/nowhere"))


def test_every_source_survives_a_round_trip() -> None:
    sources = parse_rewards(list(EVERY), "rewards")
    assert len(sources) == len(EVERY)
    assert parse_rewards(rewards_content(sources), "rewards") == sources
    experiment = parse("grpo", [dict(source) for source in EVERY], "reward_a")
    again = parse_experiment(Reader(dict(experiment_content(experiment)), "again"), Path("/nowhere"))
    assert again.rewards == experiment.rewards == sources


@pytest.mark.parametrize("algorithm", ONLINE)
def test_models_are_calls_of_their_own_and_functions_one(algorithm: str) -> None:
    rewards = [{"model": "a", "weight": 0.5}, {"model": "b"}, {"function": "m:f"}, {"verifier": "json"}]
    graph = parse(algorithm, rewards, "a", "b").graph()
    for prefix in ("", "greedy_") if algorithm == "remax" else ("",):
        names = [f"{prefix}{name}" for name in ("a_inf", "b_inf", "rew_functions", "rew_sum")]
        first, second, functions, add = (graph.by_name[name] for name in names)
        assert [c.kind for c in (first, second)] == [CallKind.INFERENCE] * 2
        assert [c.role for c in (first, second)] == ["a", "b"]
        assert [s.name for s in functions.functions] == ["f", "json"]
        keys = [key for call in (first, second, functions) for key in call.writes]
        assert add.weights == tuple(zip(keys, (0.5, 1.0, 1.0), strict=True))
        # it gets the scores, and of the tokens the lengths alone
        assert graph.values_read(add.name, add.reads) == tuple(keys)
    assert "f (m:f) + json (experiments.verifiers:json_object)" in graph_text(graph)


def test_one_source_needs_no_sum() -> None:
    graph = parse("grpo", [{"model": "a"}], "a").graph()
    assert graph.by_name["rew_inf"].role == "a"
    graph = parse("grpo", [{"function": "m:f", "weight": 2}, {"verifier": "json"}]).graph()
    assert [call.name for call in graph.calls if call.role is None] == ["rew_inf"]
    graph = parse("grpo", [{"model": "a", "weight": 2}], "a").graph()
    assert graph.by_name["rew_sum"].weights == (("a_scores", 2.0),)


WRONG: Mapping[str, tuple[Any, str]] = {
    "no list": ({"function": "m:f"}, "expected a list of sources"),
    "empty": ([], "expected a list of sources"),
    "no source": ([{"weight": 1}], "has none of them"),
    "two sources": ([{"function": "m:f", "model": "a"}], "has function and model"),
    "no module": ([{"function": "f"}], "module:function"),
    "an unknown verifier": ([{"verifier": "arithmetik"}], "Did you mean 'arithmetic'"),
    "an unknown key": ([{"verifier": "json", "key": []}], "Did you mean 'keys'"),
    "another's option": ([{"model": "a", "time_limit_s": 1}], "unknown key 'time_limit_s'"),
    "a bad policy": ([{"function": "m:f", "on_failure": "zero"}], "on_failure: 'zero' is not known"),
    "a bad pattern": ([{"verifier": "regex", "pattern": "("}], "no regular expression"),
    "a bad range": ([{"verifier": "length", "minimum": 3, "maximum": 2}], "is below minimum 3"),
    "one name twice": ([{"function": "m:f"}, {"function": "n:f"}], "two rewards are named 'f'"),
    "one model twice": ([{"model": "a"}, {"model": "a", "name": "b"}], "stands twice"),
    "no such model": ([{"model": "b"}], "needs a model for the role 'b'"),
    "an infinite weight": ([{"function": "m:f", "weight": float("inf")}], "not a number to use"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    rewards, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        parse("grpo", rewards, *(["a"] if "model" in str(rewards) and name != "no such model" else []))


def test_the_short_form_and_the_list_exclude_each_other() -> None:
    with pytest.raises(InputError, match="has both reward and rewards"):
        parse("grpo", [{"function": "m:f"}], reward="m:g")


def test_the_limit_of_one_sample() -> None:
    assert RewardSource("f", time_limit_s=60).alone_limit_s(64) == pytest.approx(3.75)
    assert RewardSource("f", time_limit_s=60).alone_limit_s(1) == 60
    assert RewardSource("f", time_limit_s=5).alone_limit_s(1000) == 1
    assert RewardSource("f", time_limit_s=5, sample_time_limit_s=2).alone_limit_s(1000) == 2
