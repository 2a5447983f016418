"""Measuring this machine: the file that `runtime.profiler` writes is one that cost models read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml

from cost_models.model import CostModel
from cost_models.profile import load_profile, read_profile
from cost_models.tables import VARIABLES
from realloc.augmented import Placement
from realloc.cli.profile import _links_of
from realloc.cluster import Cluster
from realloc.dataflow import CallKind
from realloc.errors import InputError, RunError
from realloc.experiment import read_experiment
from realloc.files import dump_yaml, write_text
from realloc.mesh import DeviceMesh
from realloc.signature import ends_signature, layer_signature
from realloc.strategy import Strategy
from runtime import machine
from runtime import microbenchmarks as bench
from runtime.call_benchmarks import CallBenchmarks
from runtime.layer_benchmarks import Effort, ShardBenchmarks
from runtime.profile_content import profile_content
from runtime.profiler import ProfileOptions, _ranks, run_profile
from tests.ranks.engine import ppo_content, write_models


@pytest.mark.slow
def test_a_quick_profile_is_read_by_the_cost_models(tmp_path: Path):
    path = tmp_path / "here.yaml"
    run_profile(path, ProfileOptions(ranks=2, quick=True))
    profile = read_profile(path)
    assert profile.name == "here"
    assert profile.provenance.source == "measured"
    assert profile.provenance.samples > 0
    assert dict(profile.provenance.versions)["torch"]
    assert {dtype for dtype, _ in profile.matmul} == {"float32", "bfloat16"}
    # any machine that runs torch: between a million and a quadrillion flops/s, 10 MB/s and 10 TB/s
    assert 1e6 < profile.matmul_curve("float32").highest < 1e15
    assert 1e7 < profile.memory.highest < 1e13
    assert 1e-8 < profile.launch_s < 1e-2
    tables = dict(profile.intra_node.collectives)
    assert set(tables) == {"all_reduce", "all_gather", "reduce_scatter"}
    assert [row.ranks for row in tables["all_reduce"]] == [2]
    # every number of a link says how far its samples lay apart
    assert profile.intra_node.spread > 0
    assert all(row.spread > 0 for rows in tables.values() for row in rows)
    if profile.attention.per_sequence:  # a CPU
        assert profile.concurrency is not None
        assert [x for x, _ in profile.concurrency.points] == [1, 2]
        beside = profile.transfer
        # Python on every sequence and value: some are moved
        assert 1e-7 < beside.sequence_s + beside.value_s < 1e-3
        assert beside.lane_s < 0.1


def test_ranks_are_checked(tmp_path: Path):
    with pytest.raises(InputError, match="--ranks is 0"):
        run_profile(tmp_path / "p.yaml", ProfileOptions(ranks=0, quick=True))


def test_ranks_are_as_many_as_the_experiment_has(tmp_path: Path):
    """Nothing is to be told by hand: groups that a plan will have are measured."""
    content = ppo_content(tmp_path, write_models(tmp_path, hidden=32, layers=1, heads=4, kv_heads=2, ffn=64))
    path = tmp_path / "experiment.yaml"
    for on_node, expected in ((4, "4 ranks"), (1, "2 ranks"), (64, "8 ranks")):
        content["cluster"] = {"gpus_per_node": on_node, "device": "cpu"}
        path.write_text(yaml.safe_dump({"realloc": "experiment/1", **content}), encoding="utf-8")
        options = ProfileOptions(quick=True, experiments=(str(path),))
        assert f"{_ranks(options, gpus=0)} ranks" == expected
    assert _ranks(ProfileOptions(), gpus=0) == 2
    assert _ranks(ProfileOptions(), gpus=1) == 1


def test_own_work_is_nobody_elses(monkeypatch: pytest.MonkeyPatch):
    others_s = [0.0]
    monkeypatch.setattr(machine, "_busy_s", lambda: 100.0 + sum(os.times()[:4]) + others_s[0])
    use = machine.OthersUse()
    # of this process, and of a child that has ended
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        pass
    assert use.share() == pytest.approx(0.0, abs=0.01)
    others_s[0] = 1000.0
    assert use.share() > 1.0


def test_one_gpu_takes_its_links_from_what_is_known(tmp_path: Path):
    """A GPU alone cannot see NVLink or the network; placeholders would say that they are terribly slow."""
    measured = {
        "device_type": "cuda",
        "device": "NVIDIA H200",
        "ranks": 1,
        "nodes": 1,
        "samples": 5,
        "versions": {},
        "memory_bytes": 10**11,
        "matmul": {"bfloat16": [[1e6, 1e12]]},
        "memory": [[1e9, 1e12]],
        "attention": {"dtype": "bfloat16", "flops_per_s": 5e11, "launch_s": 1e-5},
        "launch_s": 1e-5,
        "optimizer_bytes_per_s": 1e12,
        "host_bytes_per_s": 1e10,
    }
    content = profile_content(measured, "here", known=_links_of("NVIDIA H200"))
    write_text(tmp_path / "here.yaml", dump_yaml("profile", content))
    read, known = read_profile(tmp_path / "here.yaml"), load_profile("h200")
    for found, expected in ((read.intra_node, known.intra_node), (read.inter_node, known.inter_node)):
        for ranks in (2, 8):
            assert found.collective_s("all_reduce", ranks, 1e8) == pytest.approx(
                expected.collective_s("all_reduce", ranks, 1e8), rel=1e-3
            )
        assert found.message_s(1e8) == pytest.approx(expected.message_s(1e8), rel=1e-3)
    assert "built-in profile h200" in read.intra_node.estimate
    assert _links_of("a device that nobody knows") is None


def test_a_late_measurement_ends_with_a_message(tmp_path: Path):
    with pytest.raises(RunError, match="not done after 0 s"):
        run_profile(tmp_path / "p.yaml", ProfileOptions(ranks=2, quick=True, timeout_s=0.1))
    assert not (tmp_path / "p.yaml").exists()


def test_group_sizes_are_powers_of_two_and_everybody():
    assert bench.group_sizes(1, first=2) == []
    assert bench.group_sizes(2, first=2) == [2]
    assert bench.group_sizes(6, first=2) == [2, 4, 6]
    assert bench.group_sizes(4, first=1) == [1, 2, 4]


@pytest.mark.slow
def test_tables_of_an_experiment_predict_its_calls(tmp_path: Path):
    """Measured and predicted by the same profile, on one rank: within a factor of two on any machine."""
    models = write_models(tmp_path, hidden=32, layers=2, heads=4, kv_heads=2, ffn=64)
    content = ppo_content(tmp_path, models)
    path, output = tmp_path / "experiment.yaml", tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump({"realloc": "experiment/1", **content}), encoding="utf-8")
    assert run_profile(output, ProfileOptions(ranks=1, quick=True, experiments=(str(path),), tp=2))
    assert sorted(p.name for p in tmp_path.glob(".here*")) == []  # nothing kept is left behind

    experiment, profile = read_experiment(path), read_profile(output)
    assert profile.concurrency is None  # one rank has no links either
    assert any("placeholders" in note for note in profile.provenance.notes)
    graph = experiment.graph()
    shape = experiment.role_shape(graph, "actor")
    measured = {table.of for table in profile.tables}
    assert {layer_signature(shape, 1), layer_signature(shape, 2), ends_signature(shape, 2)} <= measured
    costs = CostModel(experiment, graph, Cluster(1, 2, "here"), profile)
    alone, sharded = (Placement(DeviceMesh(0, tp, 2), Strategy(tp=tp)) for tp in (1, 2))
    effort = Effort(5, 0.2)
    for call in graph.calls:
        if call.role is None:
            continue
        for placement in (alone, sharded):
            # but for links and neighbours, which one rank has not
            analytic = costs.call_sources(call, placement).partition("analytic: ")[2]
            assert not any(quantity in analytic for quantity in VARIABLES), call.name
            assert "2 ranks on a host (taken not to slow each other down)" in analytic
        bench = ShardBenchmarks(
            experiment.role_shape(graph, call.role), "float32", 1, None, torch.device("cpu")
        )
        if call.kind is CallKind.GENERATE:
            # as many steps as the longest response takes
            longest = experiment.workload.response.maximum
            calls = bench.generate(12, 10, longest, experiment.sampling, effort)
            seconds = median(call.total for call in calls)
        else:
            seconds = median(CallBenchmarks(experiment, bench).whole(call, 12, 1, effort))
        assert costs.call_s(call, alone) == pytest.approx(seconds, rel=1.0), call.name
        assert seconds < 2 * costs.call_s(call, alone), call.name
