"""Experiments, clusters, plans and traces: what is written is read back; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from realloc.algorithm import resolve
from realloc.cluster import Cluster, cluster_content, read_cluster
from realloc.dataflow import CallKind, Per
from realloc.errors import InputError, PlanError, ReallocError
from realloc.experiment import Experiment, experiment_content, read_experiment
from realloc.files import dump_yaml, write_text
from realloc.plan import ExecutionPlan, read_plan, write_plan
from realloc.sampling import Sampling
from realloc.strategy import Strategy
from realloc.trace import TraceRecord, median, read_trace, trace_lines
from tests.tiny import write_tiny_llama
from tests.unit.realloc.make import experiment_mapping, plan_mapping, write


def load_experiment(folder: Path, content: Any) -> Experiment:
    return read_experiment(write(folder / "experiment.yaml", content))


def load_plan(folder: Path, content: Any) -> ExecutionPlan:
    return read_plan(write(folder / "plan.yaml", content))


def test_an_experiment_is_read_with_its_defaults(tmp_path: Path) -> None:
    found = load_experiment(tmp_path, experiment_mapping())
    assert found.models["actor"].optimizer.learning_rate == 2e-6
    assert found.models["critic"].optimizer.learning_rate == 1e-5
    assert not found.models["actor"].has_weights
    assert found.workload.prompt.mean == 100.0
    assert found.workload.response.mean == found.workload.response.maximum == 256
    assert found.mean_elements(Per.TOKEN) == 356.0
    assert found.dtype_bytes == 2
    assert found.data is not None
    assert found.data.path == str(tmp_path.resolve() / "prompts.jsonl")
    assert found.hyperparameters is not None
    assert found.hyperparameters["mini_batches"] == 4
    assert len(found.hyperparameters) > 3
    assert found.cluster == Cluster(2, 8, "h100", int(79.5 * 2**30))
    graph = found.graph()
    assert len(graph.calls) == 6
    assert found.role_shape(graph, "actor").head == "lm"
    assert found.role_shape(graph, "critic").head == "scalar"


def test_an_experiment_round_trips(tmp_path: Path) -> None:
    first = load_experiment(tmp_path, experiment_mapping())
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "copy.yaml"
    write_text(path, dump_yaml("experiment", experiment_content(first)))
    assert read_experiment(path) == first
    bare = experiment_mapping()
    for key in ("data", "cluster", "sampling", "hyperparameters", "seed", "dtype", "iterations"):
        del bare[key]
    second = load_experiment(tmp_path, bare)
    write_text(path, dump_yaml("experiment", experiment_content(second)))
    assert read_experiment(path) == second


def test_sampling_is_read_and_written(tmp_path: Path) -> None:
    content = experiment_mapping()
    content["workload"]["samples_per_prompt"] = 8
    content["sampling"] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_new_tokens": 4, "stop": "END"}
    found = load_experiment(tmp_path, content)
    assert found.sampling == Sampling(0.7, False, 50, 0.9, 4, ("END",))
    assert found.workload.prompts == found.workload.sequences // 8
    path = tmp_path / "copy.yaml"
    write_text(path, dump_yaml("experiment", experiment_content(found)))
    assert read_experiment(path) == found
    content["sampling"]["stop"] = ["\n\n", "Question:"]
    assert load_experiment(tmp_path, content).sampling.stop == ("\n\n", "Question:")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("workload", "samples_per_prompt", 7, "7 samples of each prompt do not divide the"),
        ("workload", "samples_per_prompt", 0, "samples_per_prompt"),
        ("sampling", "top_p", 1.5, "top_p"),
        ("sampling", "top_k", -1, "top_k"),
        ("sampling", "min_new_tokens", 257, "min_new_tokens 257 exceeds the 256 tokens"),
        ("sampling", "stop", "", "expected a list of strings that are not empty"),
        ("sampling", "stop", ["a", 3], "expected a list of strings that are not empty"),
        ("sampling", "top_n", 3, "top_n"),
    ],
)
def test_wrong_sampling_is_named(section: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    content = experiment_mapping()
    content[section] = {**content[section], field: value}
    with pytest.raises(InputError, match=message):
        load_experiment(tmp_path, content)


def test_models_may_be_folders(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "models" / "tiny")
    content = experiment_mapping()
    content["models"] = dict.fromkeys(content["models"], "models/tiny")
    content["workload"]["prompt_tokens"] = content["workload"]["response_tokens"] = 64
    found = load_experiment(tmp_path, content)
    assert found.models["ref"].model == str(tmp_path.resolve() / "models" / "tiny")
    assert found.models["ref"].has_weights
    assert found.models["ref"].shape.hidden == 32
    content["workload"]["response_tokens"] = 65
    with pytest.raises(InputError, match="make 129, but actor's model has a context of 128"):
        load_experiment(tmp_path, content)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets a dotted key; a value of `...` removes it."""

    def change(content: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            content = content[parent]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("algoritm", "ppo", "unknown key 'algoritm'. Did you mean 'algorithm'?"),
        ("algorithm", ..., "the key 'algorithm' is missing"),
        ("algorithm", "pppo", "algorithm 'pppo' is not known"),
        ("algorithm", "no_such_module_here:X", "cannot import 'no_such_module_here'"),
        ("algorithm", "realloc.errors:Nothing", "module 'realloc.errors' has no 'Nothing'"),
        ("algorithm", "os:getcwd", "'os:getcwd' is not an algorithm"),
        ("algorithm", "realloc.mesh:DeviceMesh", "it lacks 'name'"),
        ("algorithm", ":X", "is not known"),
        ("algorithm", ".x:X", "is not known"),
        ("algorithm", "a..b:X", "is not known"),
        ("models", [], "models: expected a mapping"),
        ("models", {}, "this one has neither; give exactly one"),
        ("models.actr", "llama-7b", "has no role 'actr'. Did you mean 'actor'?"),
        ("models.critic", ..., "needs a model for the role 'critic'"),
        ("models.actor", "llama-7c", "models.actor: 'llama-7c' is neither a folder nor a named"),
        ("models.actor", "./llama-7c", "a named model shape. Put a Hugging Face model there."),
        ("models.actor", "a\0b", "models.actor.path: 'a\\x00b' has characters"),
        ("models.actor", "~nobody-of-this-name/x", "is not a usable path"),
        ("models.actor", "x" * 5000, "is not a usable path"),
        ("models.actor", 7, "models.actor: expected a mapping of keys, found 7"),
        ("models.actor.optimizer.lr", 1, "unknown key 'lr'"),
        ("models.actor.optimizer.beta1", 1, "beta1: 1.0 is above the most allowed"),
        ("models.actor.optimizer.learning_rate", float("nan"), "learning_rate: nan is not a number"),
        ("workload", ..., "the key 'workload' is missing"),
        ("workload.sequences", 0, "workload.sequences: 0 is below the least allowed, 1"),
        ("workload.sequences", True, "workload.sequences: expected a whole number"),
        ("workload.prompt_tokens", {"mean": 200, "max": 128}, "mean: 200.0 is above the most allowed, 128"),
        ("workload.prompt_tokens", {"mean": 5}, "the key 'max' is missing"),
        ("workload.prompt_tokens", None, "prompt_tokens: expected a whole number, found nothing"),
        ("workload.response_tokens", 4096, "but actor's model has a context of 4096; shorten one"),
        ("iterations", 1.5, "iterations: expected a whole number, found 1.5"),
        ("dtype", "float8", "dtype: 'float8' is not known"),
        ("seed", -1, "seed: -1 is below"),
        ("seed", 2**31, "seed: 2147483648 is above"),
        ("data.paht", "x", "data: unknown key 'paht'. Did you mean 'path'?"),
        ("sampling.temperature", float("inf"), "temperature: inf is not a number to use"),
        ("sampling.ignore_eos", "yes", "ignore_eos: expected true or false"),
        ("hyperparameters", [1], "hyperparameters: expected a mapping"),
        ("hyperparameters.kl", 1, "hyperparameters: unknown key 'kl'. Did you mean 'kl_coef'?"),
        ("hyperparameters.mini_batches", 65, "65 mini-batches cannot be made of the 64 sequences"),
        ("cluster.nodes", 0, "cluster.nodes: 0 is below"),
        ("cluster.memory_gib", float("inf"), "memory_gib: inf is not a number"),
        ("cluster.device", 100, "device: expected text"),
        ("cluster.gpus", 8, "unknown key 'gpus'. Did you mean 'gpus_per_node'?"),
    ],
)
def test_wrong_experiments(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    content = experiment_mapping()
    put(key, value)(content)
    with pytest.raises(InputError) as caught:
        load_experiment(tmp_path, content)
    assert expected in str(caught.value)


def test_empty_sections_are_as_good_as_none(tmp_path: Path) -> None:
    content = experiment_mapping()
    for key in ("data", "sampling", "hyperparameters", "cluster"):
        content[key] = None
    found = load_experiment(tmp_path, content)
    assert found.data is None
    assert found.cluster is None


class NotAnAlgorithm:
    name = "not"
    functions = "tests"


def test_algorithms_are_checked_before_they_are_made() -> None:
    assert resolve("ppo", "here").name == "ppo"
    assert resolve("experiments.ppo:PPO", "here").name == "ppo"
    with pytest.raises(InputError, match="it lacks 'hyperparameters'"):
        resolve(f"{__name__}:NotAnAlgorithm", "here")


def test_clusters_round_trip(tmp_path: Path) -> None:
    for cluster in (
        Cluster(1, 4, "cpu"),
        Cluster(128, 8, "h100", 80 * 2**30),
        Cluster(2, 8, "/x/p.yaml", 12345),
    ):
        path = tmp_path / "cluster.yaml"
        write_text(path, dump_yaml("cluster", {**cluster_content(cluster), "memory_gib": None}))
        with pytest.raises(InputError, match="memory_gib: expected a number, found nothing"):
            read_cluster(path)
        write_text(path, dump_yaml("cluster", cluster_content(replace(cluster, memory_bytes=2**30))))
        assert read_cluster(path) == replace(cluster, memory_bytes=2**30)
    write(path, "realloc: cluster/1\ngpus_per_node: 4\ndevice: mine.yaml\n")
    assert read_cluster(path) == Cluster(1, 4, str(tmp_path.resolve() / "mine.yaml"))


def test_a_plan_round_trips(tmp_path: Path) -> None:
    first = load_plan(tmp_path, plan_mapping())
    assert first.placements["actor_gen"].strategy == Strategy(4, 4, 1)
    assert first.placements["rew_inf"].strategy == Strategy(2, 2, 1, 4)
    assert str(first.placements["rew_inf"].mesh) == "node1:gpu[0-3]"
    write_plan(first, tmp_path / "copy.yaml")
    assert read_plan(tmp_path / "copy.yaml") == first
    ordered = replace(first, order=first.augmented.default_order(), predictions=None)
    write_plan(ordered, tmp_path / "copy.yaml")
    again = read_plan(tmp_path / "copy.yaml")
    assert again == ordered
    assert again.node_order == first.node_order
    assert {node.call for node in again.augmented.nodes if node.call} == set(first.placements)


def test_predictions_keep_six_digits(tmp_path: Path) -> None:
    first = load_plan(tmp_path, plan_mapping())
    assert first.predictions is not None
    precise = replace(first, predictions=replace(first.predictions, iteration_s=1.23456789e-7))
    write_plan(precise, tmp_path / "copy.yaml")
    found = read_plan(tmp_path / "copy.yaml").predictions
    assert found is not None
    assert found.iteration_s == 1.23457e-7


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("placements.actor_gen", ..., "placements: the call 'actor_gen' has no placement"),
        ("placements.actor_gne", {"mesh": "node0", "strategy": "d8t1p1"}, "unknown call 'actor_gne'"),
        ("placements.actor_gen.mesh", "node[0-2]", "placements.actor_gen.mesh: mesh node[0-2] lies outside"),
        ("placements.actor_gen.mesh", 0, "placements.actor_gen.mesh: expected text"),
        ("placements.actor_gen.strategy", "d4t2p1", "dp 4 x tp 2 x pp 1 = 8, but mesh node[0-1] has 16"),
        ("placements.actor_gen.strategy", "d16t1p1m0", "every degree of"),
        ("placements.actor_gen.strategy", {"pp": 16, "dpp": 1}, "strategy: unknown key 'dpp'"),
        ("placements.actor_gen.strategi", "x", "unknown key 'strategi'. Did you mean 'strategy'?"),
        ("experiment.workload.sequences", 2, "hyperparameters.mini_batches: 4 mini-batches"),
        ("experiment.realloc", "experiment/1", "experiment: unknown key 'realloc'"),
        ("cluster.nodes", 1, "lies outside the cluster"),
        ("order", "actor_gen", "order: expected a list"),
        ("order", [1, 2], "order: expected a list of node names"),
        ("order", ["actor_gen"], "the order lacks"),
        ("predictions.iteration_s", -1, "iteration_s: -1.0 is below"),
        ("predictions.node_s", {"x": "long"}, "node_s.x: expected a number"),
        ("prediction", {}, "unknown key 'prediction'. Did you mean 'predictions'?"),
    ],
)
def test_wrong_plans(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    content = plan_mapping()
    put(key, value)(content)
    with pytest.raises(InputError) as caught:
        load_plan(tmp_path, content)
    assert expected in str(caught.value)


def test_dp_beyond_the_sequences_and_models_that_do_not_split(tmp_path: Path) -> None:
    content = plan_mapping()
    put("experiment.workload.sequences", 4)(content)
    put("placements.ref_inf", {"mesh": "node0", "strategy": "d8t1p1"})(content)
    with pytest.raises(PlanError, match="placements.ref_inf: dp 8 exceeds the 4 sequences"):
        load_plan(tmp_path, content)
    content = plan_mapping()
    put("placements.ref_inf", {"mesh": "node0", "strategy": "d1t1p8"})(content)
    put("experiment.models.ref", "pythia-14m")(content)
    with pytest.raises(PlanError, match="placements.ref_inf: strategy d1t1p8 is not possible: pp 8 exceeds"):
        load_plan(tmp_path, content)


def test_compute_calls_split_by_data_alone(tmp_path: Path) -> None:
    content = plan_mapping()
    put("experiment.models.reward", ...)(content)
    put("experiment.reward", "experiments.rewards:any")(content)
    with pytest.raises(PlanError, match="placements.rew_inf: a compute call has no model to split"):
        load_plan(tmp_path, content)
    put("placements.rew_inf.strategy", "d4t1p1")(content)
    plan = load_plan(tmp_path, content)
    assert plan.graph.by_name["rew_inf"].kind is CallKind.COMPUTE


RECORDS = tuple(
    TraceRecord(
        iteration=iteration,
        rank=rank,
        node=node,
        kind="call",
        start_s=iteration * 10.0 + start,
        end_s=iteration * 10.0 + start + seconds + rank,
        wait_s=0.5,
        predicted_s=None if rank else 1.5,
        sent_bytes=100,
        tokens=7,
    )
    for iteration, extra in enumerate([5.0, 0.0, 1.0, 0.0])
    for rank in range(2)
    for node, start, seconds in [("gen", 0.0, 3.0 + extra), ("train", 4.0 + extra, 2.0)]
)


def test_a_trace_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(trace_lines(2, RECORDS)) + "\n", encoding="utf-8")
    trace = read_trace(path)
    assert trace.records == RECORDS
    assert trace.world_size == 2
    # the slower rank counts, waiting does not, the first iteration is skipped: medians of 3 numbers
    assert trace.node_seconds() == {"gen": 3.5, "train": 2.5}
    assert trace.node_seconds(skip_iterations=0) == {"gen": 4.0, "train": 2.5}
    # ends at 12, 17, 28, 37
    assert trace.iteration_seconds() == median([5.0, 11.0, 9.0])
    assert trace.iteration_seconds(skip_iterations=2) == median([11.0, 9.0])
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0]) == 2.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank": 2}, "rank: 2 is above the most allowed, 1"),
        ({"rank": True}, "rank: expected a whole number"),
        ({"end_s": float("nan")}, "end_s: nan is not a number"),
        ({"end_s": float("inf")}, "end_s: inf is not a number"),
        ({"end_s": -1.0}, "ends at -1.0 s, before its start at 0.0 s"),
        ({"wait_s": -1.0}, "wait_s: -1.0 is below"),
        ({"nodes": "x"}, "unknown key 'nodes'. Did you mean 'node'?"),
        ({"tokens": 10**30}, "tokens: the number is too large"),
    ],
)
def test_wrong_trace_records(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [*list(trace_lines(2, RECORDS))[:2], json.dumps({**asdict(RECORDS[0]), **change})]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert f"{path}, line 3" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"realloc": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("[]", "expected a mapping"),
        ('{"realloc": "plan/1"}', "is 'plan/1', expected trace/1"),
        ('{"realloc": "trace/1"}', "'world_size' is missing"),
        ('{"realloc": "trace/1", "world_size": 1, "x": 2}', "unknown key 'x'"),
        ('{"realloc": "trace/1", "world_size": 1}\n{"iteration": 0', "line 2: not valid JSON"),
    ],
)
def test_wrong_traces(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReallocError) as caught:
        read_trace(path)
    assert expected in str(caught.value)
