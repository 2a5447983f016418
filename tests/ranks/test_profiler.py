"""Measuring this machine: the file that `runtime.profiler` writes is one that cost models read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cost_models.profile import read_profile
from realloc.errors import InputError, RunError
from runtime import microbenchmarks as bench
from runtime.profiler import ProfileOptions, run_profile


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
    if profile.attention.per_sequence:  # a CPU
        assert profile.concurrency is not None
        assert [x for x, _ in profile.concurrency.points] == [1, 2]


def test_one_rank_needs_no_links(tmp_path: Path):
    path = tmp_path / "alone.yaml"
    run_profile(path, ProfileOptions(ranks=1, quick=True))
    profile = read_profile(path)
    assert profile.concurrency is None
    assert any("placeholders" in note for note in profile.provenance.notes)


def test_ranks_are_checked(tmp_path: Path):
    with pytest.raises(InputError, match="--ranks is 0"):
        run_profile(tmp_path / "p.yaml", ProfileOptions(ranks=0, quick=True))


def test_a_late_measurement_ends_with_a_message(tmp_path: Path):
    with pytest.raises(RunError, match="not done after 0 s"):
        run_profile(tmp_path / "p.yaml", ProfileOptions(ranks=2, quick=True, timeout_s=0.1))
    assert not (tmp_path / "p.yaml").exists()


def test_group_sizes_are_powers_of_two_and_everybody():
    assert bench.group_sizes(1, first=2) == []
    assert bench.group_sizes(2, first=2) == [2]
    assert bench.group_sizes(6, first=2) == [2, 4, 6]
    assert bench.group_sizes(4, first=1) == [1, 2, 4]
