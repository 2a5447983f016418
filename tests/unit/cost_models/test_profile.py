"""Profiles: curves, links, files, and what bad input says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cost_models.communication import Communication, GroupShape
from cost_models.curve import Curve
from cost_models.link import CollectiveCost, Link, traffic_share
from cost_models.profile import (
    HardwareProfile,
    Transfer,
    built_in_profiles,
    load_profile,
    profile_content,
    read_profile,
    write_profile,
)
from realloc.errors import InputError
from realloc.files import dump_yaml
from realloc.mesh import DeviceMesh
from realloc.pace import Pace
from tests.unit.cost_models.cases import profile


def test_curve_follows_a_power_law_between_points():
    curve = Curve(((10.0, 100.0), (1000.0, 1.0)))
    assert curve.at(100.0) == pytest.approx(10.0)
    assert curve.at(10.0) == 100.0
    assert curve.at(1000.0) == 1.0


@given(st.floats(1e-6, 1e15))
def test_curve_never_leaves_the_range_of_its_points(x: float):
    curve = Curve(((1.0, 5.0), (10.0, 50.0), (100.0, 20.0)))
    assert 5.0 * (1 - 1e-9) <= curve.at(x) <= 50.0 * (1 + 1e-9)
    if x <= 1.0:
        assert curve.at(x) == 5.0
    if x >= 100.0:
        assert curve.at(x) == 20.0


def test_ring_shares():
    assert traffic_share("all_reduce", 4) == pytest.approx(1.5)
    assert traffic_share("all_gather", 4) == pytest.approx(0.75)
    assert traffic_share("reduce_scatter", 2) == pytest.approx(0.5)


def test_collectives_without_measurements_follow_the_ring():
    link = Link(latency_s=1e-3, bytes_per_s=1e9)
    # two latencies per doubling, 2 * 3/4 of the bytes through each rank's link
    assert link.collective_s("all_reduce", 4, 1e9) == pytest.approx(4e-3 + 1.5)
    assert link.collective_s("all_gather", 4, 1e9) == pytest.approx(2e-3 + 0.75)
    assert link.collective_s("all_reduce", 1, 1e9) == 0.0


def test_collectives_use_measured_group_sizes_and_interpolate_bus_bandwidth():
    rows = (CollectiveCost(2, 1e-3, 1e9), CollectiveCost(8, 3e-3, 1e9))
    link = Link(1.0, 1.0, (("all_reduce", rows),))
    assert link.collective_s("all_reduce", 8, 1e9) == pytest.approx(1.003)
    middle = link.cost("all_reduce", 4)  # half way in log2: bus bandwidth (1.0 + 1.75) / 2
    assert middle.latency_s == pytest.approx(2e-3)
    assert middle.bytes_per_s == pytest.approx(1e9 * 1.375 / 1.5)
    beyond = link.cost("all_reduce", 64)  # twice the doublings of 8, the same bus bandwidth
    assert beyond.latency_s == pytest.approx(6e-3)
    assert beyond.bytes_per_s == pytest.approx(1e9 * 1.75 / (2 * 63 / 64))


def test_knees_are_met_from_both_sides():
    row = CollectiveCost(2, 1e-3, 1e9, ((1e5, 3e-3), (3e5, 4e-3)))
    sizes = (0.0, 5e4, 1e5, 2e5, 3e5, 3e5 + 1e9)
    assert [row.seconds(x) for x in sizes] == pytest.approx([1e-3, 2e-3, 3e-3, 3.5e-3, 4e-3, 1.004])
    inter = Link(1e-3, 1e9, (("all_gather", (row,)),))
    two_nodes = Communication(profile(inter_node=inter), DeviceMesh(0, 4, 2))
    across = GroupShape(2, 1)
    for size in (*sizes, 1e12):
        assert two_nodes.collective_s("all_gather", across, size) == pytest.approx(row.seconds(size))


def test_what_hosts_add_round_trips(tmp_path: Path):
    row = CollectiveCost(2, 1e-3, 1e9, ((1e5, 3e-3),))
    made = profile(
        intra_node=Link(1e-3, 1e9, (("all_reduce", (row,)),)),
        pace=Pace(1e-3, 1.25e-3, 2, 0.1),
        transfer=Transfer(1e-4, 1e-6, 2e-6, 3e-4),
    )
    write_profile(made, tmp_path / "copy.yaml")
    assert read_profile(tmp_path / "copy.yaml") == made


@pytest.mark.parametrize("name", built_in_profiles())
def test_built_in_profiles_load_name_their_sources_and_round_trip(name: str, tmp_path: Path):
    loaded = load_profile(name)
    assert loaded.name == name
    assert loaded.provenance.source == "analytic"
    assert loaded.provenance.notes
    assert str(loaded) == f"analytic ({name})"
    write_profile(loaded, tmp_path / "copy.yaml")
    assert read_profile(tmp_path / "copy.yaml") == loaded


def test_the_built_in_profiles_are_there():
    assert {"a100-40gb", "a100-80gb", "h100-sxm", "h200", "h800", "b200", "cpu"} <= set(built_in_profiles())


def test_gpu_efficiency_rises_with_size_and_stays_below_the_peak():
    for name, peak in (("a100-80gb", 312e12), ("h100-sxm", 989e12), ("h800", 989e12), ("b200", 2250e12)):
        rates = [y for _, y in load_profile(name).matmul_curve("bfloat16").points]
        assert rates == sorted(rates)
        assert rates[-1] < peak


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(InputError, match=r"device 'h100-sxn'.*Did you mean 'h100-sxm'"):
        load_profile("h100-sxn")


def test_a_missing_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        load_profile(str(tmp_path / "none.yaml"))


def _written(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(yaml.safe_dump(dict(profile_content(profile()))))
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path = tmp_path / "p.yaml"
    path.write_text(dump_yaml("profile", content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"launch_s": None}, "'launch_s' is missing"),
        ({"lanch_s": 1.0}, "unknown key 'lanch_s'.*launch_s"),
        ({"launch_s": -1.0}, "below the least allowed"),
        ({"memory": []}, "memory: needs at least one point"),
        ({"memory": [[1.0]]}, "memory, point 1: expected a pair"),
        ({"memory": [[2.0, 1.0], [1.0, 1.0]]}, "memory, point 2: 1 must be above 2"),
        ({"memory": [[1.0, 0.0]]}, "above 0"),
        ({"memory": [[1.0, float("inf")]]}, "above 0"),
        ({"matmul": {"float31": [[1.0, 1.0]]}}, "float31: not a dtype.*float32"),
        ({"matmul": {}}, "at least one dtype"),
        ({"memory_bytes": 0}, "memory_bytes: 0 is below"),
        ({"intra_node": {"latency_s": 1.0, "bytes_per_s": 1.0, "collectives": {"all_sum": []}}}, "all_sum"),
        (
            {
                "intra_node": {
                    "latency_s": 1.0,
                    "bytes_per_s": 1.0,
                    "collectives": {
                        "all_reduce": [
                            {"ranks": 4, "latency_s": 1.0, "bytes_per_s": 1.0},
                            {"ranks": 4, "latency_s": 1.0, "bytes_per_s": 1.0},
                        ]
                    },
                }
            },
            "row 2: 4 ranks must be more than the 4 before it",
        ),
        ({"provenance": {"source": "guessed", "device": "x", "date": "y"}}, "'guessed' is not known"),
        ({"concurrency": [[1, 1.0], [2, "x"]]}, "concurrency, point 2: expected a number"),
    ],
)
def test_bad_profiles_name_the_key(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        read_profile(_written(tmp_path, **changes))


def test_a_missing_dtype_says_what_there_is():
    with pytest.raises(InputError, match="no matmul throughput for float16.*bfloat16, float32"):
        profile().matmul_curve("float16")


def test_slowdown_grows_with_ranks_beyond_the_measured_ones():
    crowded: HardwareProfile = profile(concurrency=Curve(((1.0, 1.0), (2.0, 1.1), (4.0, 2.2))))
    assert crowded.slowdown(1) == 1.0
    assert crowded.slowdown(4) == pytest.approx(2.2)
    assert crowded.slowdown(8) == pytest.approx(4.4)
    assert profile().slowdown(64) == 1.0


def test_a_measured_profile_says_so():
    measured = profile()
    measured = replace(measured, provenance=replace(measured.provenance, source="measured"))
    assert str(measured) == "measured (round, 2026-01-01)"


def test_a_built_in_profile_takes_another_fabric():
    usual, slower = load_profile("h100-sxm"), load_profile("h100-sxm@200gb")
    assert slower.inter_node.bytes_per_s == usual.inter_node.bytes_per_s / 2
    assert slower.intra_node == usual.intra_node
    assert str(slower) == "analytic (h100-sxm@200gb)"
    with pytest.raises(InputError, match=r"no such fabric '20gb'.*Did you mean '200gb'"):
        load_profile("h100-sxm@20gb")


def test_the_switch_adds_up_large_messages_of_the_groups_that_were_measured_so():
    link = load_profile("h100-sxm").intra_node
    rings = link.cost("all_reduce", 8).bytes_per_s * 2 * 7 / 8
    assert rings == pytest.approx(370e9, rel=1e-3)
    assert 1e12 / link.collective_s("all_reduce", 8, 1e12) * 2 * 7 / 8 == pytest.approx(480e9, rel=1e-3)
    assert 1e12 / link.collective_s("all_reduce", 4, 1e12) * 2 * 3 / 4 == pytest.approx(370e9, rel=1e-3)
    assert len(link.ways("all_gather", 8)) == 1
