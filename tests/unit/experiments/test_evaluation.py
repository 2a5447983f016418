"""Evaluation: the calls that it adds to every algorithm's graph, what they cost, and what they report."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from cost_models.model import CostModel
from cost_models.profile import load_profile
from experiments import evaluation_functions as functions
from realloc.augmented import NodeKind, Placement, augment
from realloc.cluster import Cluster
from realloc.dataflow import CallKind
from realloc.errors import InputError
from realloc.experiment import Experiment, experiment_content, parse_experiment
from realloc.files import Reader
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from realloc.trace import Trace, TraceRecord
from tests.unit.experiments.fake_batch import FakeBatch

ONLINE = {
    "ppo": ("actor", "critic", "ref", "reward"),
    "grpo": ("actor", "ref", "reward"),
    "rloo": ("actor", "ref", "reward"),
    "remax": ("actor", "ref", "reward"),
    "reinforce_pp": ("actor", "ref", "reward"),
    "iterative_dpo": ("actor", "ref", "reward"),
}
OFFLINE = {"reward": ("reward",), "dpo": ("actor", "ref"), "sft": ("actor",)}


def parse(algorithm: str, evaluation: Mapping[str, Any] | None, **changes: Any) -> Experiment:
    content: dict[str, Any] = {
        "algorithm": algorithm,
        "models": dict.fromkeys((ONLINE | OFFLINE)[algorithm], "llama-7b"),
        "workload": {
            "sequences": 8,
            "samples_per_prompt": 2,
            "prompt_tokens": 16,
            "response_tokens": 16,
        },
    }
    if evaluation is not None:
        content["evaluation"] = evaluation
    return parse_experiment(Reader(content | changes, "experiment.yaml"), Path("/nowhere"))


@pytest.mark.parametrize("algorithm", ONLINE)
def test_responses_are_judged_by_copies_of_what_judges_in_training(algorithm: str) -> None:
    experiment = parse(algorithm, {"every": 5, "win_rate": True})
    graph = experiment.graph()
    evaluation = {call.name: call for call in graph.calls if call.every}
    assert set(evaluation) == {
        "eval_actor_gen",
        "eval_ref_gen",
        "eval_rew_inf",
        "eval_ref_inf",
        "rival_rew_inf",
        "evaluation",
    }
    assert all(call.every == 5 for call in evaluation.values())
    assert evaluation["eval_actor_gen"].greedy
    assert not parse(algorithm, {"every": 5, "sampled": True}).graph().by_name["eval_actor_gen"].greedy
    assert set(evaluation["evaluation"].reads) == {
        "eval_tokens",
        "eval_logprobs",
        "eval_scores",
        "eval_ref_logprobs",
        "rival_scores",
    }
    # nothing of training depends on it
    edges = graph.data_edges()
    assert not [(src, dst) for src, dst in edges if (src in evaluation) != (dst in evaluation)]
    again = parse_experiment(Reader(dict(experiment_content(experiment)), "again"), Path("/nowhere"))
    assert again.evaluation == experiment.evaluation


def test_all_samples_are_judged_where_training_selects() -> None:
    work = {"sequences": 8, "samples_per_prompt": 4, "prompt_tokens": 16, "response_tokens": 16}
    graph = parse("iterative_dpo", {"every": 5}, workload=work).graph()
    trained, judged = graph.by_name["ref_inf"], graph.by_name["eval_ref_inf"]
    assert (trained.reads, trained.num_sequences(8)) == (("tokens", "scores"), 4)
    assert (judged.reads, judged.select, judged.num_sequences(8)) == (("eval_tokens",), None, 8)


def test_models_on_held_out_rows() -> None:
    gold = parse("reward", {"every": 2, "gold": "m:f"}).graph()
    assert [call.name for call in gold.calls if call.every] == ["eval_reward_inf", "eval_gold", "evaluation"]
    assert gold.by_name["evaluation"].together == 2
    judged = parse("grpo", {"every": 2, "gold": "m:f", "sampled": True}).graph().by_name
    assert judged["eval_gold"].reads == ("eval_tokens",)
    assert "eval_gold" in judged["evaluation"].reads
    assert judged["evaluation"].report == "experiments.evaluation_functions:sampled_responses"
    for algorithm in ("dpo", "sft"):
        workload = {"sequences": 8, "prompt_tokens": 16, "response_tokens": 16}
        changes = {"workload": workload} if algorithm == "sft" else {}
        graph = parse(algorithm, {"every": 2}, **changes).graph()
        assert [call.name for call in graph.calls if call.every] == ["eval_actor_inf", "evaluation"]


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="needs a reference model"):
        parse("grpo", {"every": 1, "win_rate": True}, hyperparameters={"kl_coef": 0}, models=_no_reference())
    with pytest.raises(InputError, match="generates no responses"):
        parse("reward", {"every": 1, "win_rate": True})
    with pytest.raises(InputError, match="is for reward modelling"):
        parse("dpo", {"every": 1, "gold": "m:f"})
    with pytest.raises(InputError, match="below the least allowed, 1"):
        parse("ppo", {"every": 0})
    with pytest.raises(InputError, match=r"keep some with data\.holdout"):
        parse("ppo", {"every": 1}, data={"path": "/nowhere/prompts.jsonl"})


def _no_reference() -> Mapping[str, str]:
    return {"actor": "llama-7b", "reward": "llama-7b"}


def test_an_nth_of_its_seconds_is_counted() -> None:
    cluster = Cluster(1, 8, "h100-sxm")
    node_s = {}
    for every in (1, 10):
        experiment = parse("ppo", {"every": every, "win_rate": True})
        graph = experiment.graph()
        costs = CostModel(experiment, graph, cluster, load_profile(cluster.device))
        half = [Placement(DeviceMesh(first, 4, 8), Strategy(2, 2, 1)) for first in (0, 4)]
        placements = {
            call.name: half[call.kind is CallKind.INFERENCE]
            if call.role is not None
            else Placement(DeviceMesh(0, 8, 8), Strategy(8, 1, 1))
            for call in graph.calls
        }
        augmented = augment(graph, placements)
        node_s[every] = {node.name: (node, costs.node_s(node, placements)) for node in augmented.nodes}
    moved, lengths_alone = 0, 0
    for name, (node, seconds) in node_s[10].items():
        share = 10 if node.every else 1
        if node.kind is NodeKind.TRANSFER and node.every:
            moved += 1
            lengths_alone += not graph.values_read(str(node.dst), node.keys) and seconds > 0
        assert seconds * share == pytest.approx(node_s[1][name][1], rel=1e-9), name
    assert moved > 2
    assert lengths_alone
    actor_gen, eval_gen = node_s[1]["actor_gen"][1], node_s[1]["eval_actor_gen"][1]
    assert eval_gen == pytest.approx(actor_gen)


def test_rank_correlations() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])
    assert functions.spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert functions.kendall(a, b) == pytest.approx((8 - 2) / 10)
    assert functions.spearman(a, -a.exp()) == functions.kendall(a, -a.exp()) == pytest.approx(-1.0)
    tied = torch.tensor([1.0, 1.0, 2.0, 2.0])
    other = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert functions.spearman(tied, other) == pytest.approx(4 / math.sqrt(4 * 5))
    assert functions.kendall(tied, other) == pytest.approx(4 / math.sqrt(4 * 6))
    assert functions.spearman(torch.ones(4), other) == functions.kendall(torch.ones(4), other) == 0.0


def test_calibration() -> None:
    sure = math.log(0.9 / 0.1)  # a probability of 0.9
    margins = torch.tensor([sure] * 9 + [-sure], dtype=torch.float64)
    assert functions.calibration_error(margins) == pytest.approx(0.0, abs=1e-9)
    assert functions.calibration_error(-margins) == pytest.approx(0.8)
    assert functions.calibration_error(torch.tensor([50.0, -50.0])) == pytest.approx(0.5)


def test_pairs_and_responses_by_hand() -> None:
    scores, gold = [2.0, 1.0, 0.0, 3.0], [1.0, 0.0, 5.0, 2.0]
    rows = [
        {"prompt": i // 2, "sample": i % 2, "eval_scores": s, "eval_gold": g}
        for i, (s, g) in enumerate(zip(scores, gold, strict=True))
    ]
    found = functions.pairs(FakeBatch(rows, 4, 4, num_prompts=2, samples_per_prompt=2), ("eval_gold",))
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx((1 - 3) / 2)
    assert found["best_of_2"] == pytest.approx((0.5 - 1.5) / (0.5 + 1.5))
    answers = [
        {
            "eval_logprobs": [-1.0, -2.0],
            "eval_ref_logprobs": [-2.0, -2.5],
            "eval_scores": 1.0,
            "rival_scores": 1.0,
        },
        {"eval_logprobs": [-1.0], "eval_ref_logprobs": [-0.5], "eval_scores": 3.0, "rival_scores": 2.0},
        {"eval_logprobs": [-1.0], "eval_ref_logprobs": [-1.0], "eval_scores": math.nan, "rival_scores": 0.0},
    ]
    keys = ("eval_logprobs", "eval_ref_logprobs", "eval_scores", "rival_scores")
    found = functions.responses(FakeBatch(answers, 3, 4), keys)
    assert found["length"] == pytest.approx(4 / 3)
    assert found["kl"] == pytest.approx((1.5 - 0.5) / 3)
    assert found["reward"] == 2.0
    assert found["win_rate"] == pytest.approx(0.75)


def test_a_reward_model_that_cannot_tell_chooses_by_chance() -> None:
    rows = [{"prompt": 0, "sample": i, "eval_scores": 1.0, "eval_gold": g} for i, g in enumerate((1.0, 0.0))]
    found = functions.pairs(FakeBatch(rows, 2, 2, num_prompts=1, samples_per_prompt=2), ("eval_gold",))
    assert found["best_of_2"] == 0.0


def test_best_of_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    prompts, each = 4, 6
    rows: list[dict[str, Any]] = [
        {
            "prompt": p,
            "sample": i,
            "eval_logprobs": [0.0],
            # few different scores, so that there are ties; the last prompt lacks some, which leaves it three
            "eval_scores": math.nan if p == prompts - 1 and i % 2 else float(rng.randrange(4)),
            "eval_gold": rng.gauss(0, 1),
        }
        for p in range(prompts)
        for i in range(each)
    ]
    shuffled = rng.sample(rows, len(rows))
    batch = FakeBatch(shuffled, len(rows), len(rows), num_prompts=prompts, samples_per_prompt=each)
    found = functions.sampled_responses(batch, ("eval_logprobs", "eval_scores", "eval_gold"))

    def brute(k: int, judge: str) -> float:
        means: list[float] = []
        for p in range(prompts):
            samples = [r for r in rows if r["prompt"] == p and not math.isnan(r["eval_scores"])]
            values = []
            for subset in combinations(samples, k):
                best = max(r["eval_scores"] for r in subset)
                values.append(mean(r[judge] for r in subset if r["eval_scores"] == best))
            if values:
                means.append(mean(values))
        return mean(means)

    for k in range(2, each + 1):
        assert found[f"best_of_{k}"] == pytest.approx(brute(k, "eval_scores"), rel=1e-6), k
        assert found[f"gold_best_of_{k}"] == pytest.approx(brute(k, "eval_gold"), rel=1e-6), k
    assert found["gold"] == pytest.approx(mean(r["eval_gold"] for r in rows), rel=1e-6)
    assert "best_of_1" not in found
    assert f"best_of_{each + 1}" not in found


def test_best_of_many_samples_is_exact() -> None:
    n = 400
    values = torch.arange(n, dtype=torch.float64)[None]
    found = functions.best_of(values, values, torch.ones(1, n, dtype=torch.bool))
    # the expected largest of k of 0..n-1 without replacement
    expected = torch.tensor([k * (n + 1) / (k + 1) - 1 for k in range(1, n + 1)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_a_trace_counts_evaluation_by_its_share() -> None:
    records = []
    start = 0.0
    for iteration in range(9):
        calls = {"train": 2.0} | ({"evaluation": 4.0} if iteration % 4 == 0 else {})
        for node, seconds in calls.items():
            records.append(TraceRecord(iteration, 0, node, "call", start, start + seconds))
            start += seconds
    trace = Trace(1, tuple(records))
    assert trace.node_seconds() == {"train": 2.0, "evaluation": pytest.approx(4.0 * 2 / 8)}
    assert trace.iteration_seconds() == pytest.approx(3.0)
