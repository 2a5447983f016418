"""What a machine says about the plan it is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from realloc.cluster import GIB, Cluster
from realloc.errors import InputError
from runtime.nvml import Gpus
from runtime.profile_rank import hosts_of
from runtime.supported import check_cluster, check_memory, other_device

TWO = Gpus("570.1", ("NVIDIA X", "NVIDIA X"), (80 * GIB, 80 * GIB), ({-1: 18}, {-1: 18}))


def test_a_cluster_that_the_driver_contradicts_is_refused_with_the_numbers():
    check_cluster(Cluster(1, 2, "x", 80 * GIB), TWO)
    check_cluster(Cluster(1, 64, "cpu"), None)
    with pytest.raises(
        InputError, match=r"gpus_per_node is 4, but the driver finds 2 here \(NVIDIA X, NVIDIA X\)"
    ):
        check_cluster(Cluster(1, 4, "x"), TWO)
    with pytest.raises(InputError, match="memory_gib is 96, but a NVIDIA X here has 80 GiB"):
        check_cluster(Cluster(1, 2, "x", 96 * GIB), TWO)


def test_a_plan_that_needs_more_than_a_gpu_has_is_refused_with_the_numbers():
    uneven = replace(TWO, memory_bytes=(80 * GIB, 40 * GIB))
    check_memory(41 * GIB, 2, uneven)
    check_memory(79 * GIB, 1, uneven)
    check_memory(10**15, 2, None)
    with pytest.raises(InputError, match=r"need 60 GiB on a GPU, but GPU 1 here \(NVIDIA X\) has 40 GiB"):
        check_memory(60 * GIB, 2, uneven)


def test_topology_is_said_in_one_line():
    assert TWO.topology == "NVLink: 18 links of each GPU to a switch"
    pair = Gpus("570.1", ("X", "X"), (1, 1), ({1: 4}, {0: 4}))
    assert pair.topology == "NVLink: 4 links of each GPU to other GPUs"
    assert Gpus("570.1", ("X",), (1,), ({},)).topology == "NVLink: none; GPUs talk over PCIe"


def test_another_device_is_named_beside_this_one():
    assert other_device("a host", "a host") is None
    assert "measured on 'a host', this is 'NVIDIA X'" in str(other_device("a host", "NVIDIA X"))
    sheets = other_device("NVIDIA Y", "NVIDIA X", how="taken from data sheets of")
    assert "taken from data sheets of 'NVIDIA Y', this is 'NVIDIA X'" in str(sheets)


def test_ranks_of_one_host_belong_together():
    assert hosts_of([7, 7, 3, 3]) == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="different numbers of ranks: 2, 1"):
        hosts_of([7, 7, 3])
