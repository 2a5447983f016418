"""A run on two nodes: two launchers on loopback, and in two hosts with a shaped link between them.

The demo's experiment on 2 nodes x 2 ranks has to end in what one node of 4 ranks ends in, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from realloc.trace import read_trace
from tests.cluster import namespaces
from tests.cluster.demo import ITERATIONS, results, write_plans
from tests.cluster.launchers import LOOPBACK, Said, free_endpoint, node_command, run_command, start, wait

LINK = "200mbit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the plans, and in `local` a run of one node of four ranks."""
    found = tmp_path_factory.mktemp("two-nodes")
    write_plans(found)
    (said,) = wait([start(run_command("one.yaml", "--out", "local"), found)])
    assert said.code == 0, said.err
    return found


def run_both(folder: Path, *arguments: str) -> list[Said]:
    endpoint = free_endpoint()
    said = wait([start(node_command(node, endpoint, *arguments), folder) for node in (0, 1)])
    assert [one.code for one in said] == [0, 0], [one.err for one in said]
    return said


def assert_as_local(out: Path) -> None:
    """Bit for bit: the same ranks do the same sums, over whatever links."""
    metrics, weights = results(out)
    expected_metrics, expected = results(out.parent / "local")
    assert metrics == expected_metrics
    assert weights.keys() == expected.keys()
    for role, tensors in expected.items():
        assert weights[role].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (weights[role][name] == tensor).all(), (role, name)


@pytest.fixture(scope="module")
def loopback(folder: Path) -> list[Said]:
    """What two launchers said; their run is in `loopback`."""
    return run_both(folder, "two.yaml", "--out", "loopback")


def test_two_launchers_on_loopback(folder: Path, loopback: list[Said]) -> None:
    first, second = loopback
    assert f"iteration {ITERATIONS}/{ITERATIONS}" in first.out
    assert "predicted and measured" in first.out
    assert "node 0 shows how the run goes" in second.out
    assert "done. Logs of its ranks: loopback/logs/node-1" in second.out
    assert "iteration" not in second.out
    out = folder / "loopback"
    assert_as_local(out)
    hosts = json.loads((out / "hosts.json").read_text())["hosts"]
    assert [(host["node"], host["first_rank"], host["address"]) for host in hosts] == [
        (0, 0, LOOPBACK),
        (1, 2, LOOPBACK),
    ]
    assert {record.rank for record in read_trace(out / "trace.jsonl").records} == set(range(4))


def test_two_hosts_with_a_shaped_link(folder: Path) -> None:
    """Nothing is set by hand: the interfaces follow from the endpoint."""
    reason = namespaces.why_not()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.hosts(2, LINK) as hosts:
        endpoint = f"{hosts[0].address}:29400"
        commands = [
            host.command(node_command(node, endpoint, "two.yaml", "--out", "shaped"))
            for node, host in enumerate(hosts)
        ]
        said = wait([start(command, folder) for command in commands])
    assert [one.code for one in said] == [0, 0], [one.err for one in said]
    out = folder / "shaped"
    assert_as_local(out)
    kept = json.loads((out / "hosts.json").read_text())["hosts"]
    assert [(host["name"], host["address"]) for host in kept] == [(host.name, host.address) for host in hosts]


@pytest.mark.usefixtures("loopback")
def test_a_run_of_two_nodes_goes_on_from_a_checkpoint(folder: Path) -> None:
    shutil.copytree(folder / "loopback", folder / "half")
    first, _ = run_both(folder, "--resume", "half", "--from", "iteration-1")
    assert "continuing after 1 iterations" in first.out
    assert_as_local(folder / "half")


LOST = {
    0: "node 0 at {endpoint} does not answer any more",
    1: "node 1 ({host}, 127.0.0.1): nothing was heard of its launcher",
}


@pytest.mark.parametrize("killed", LOST)
def test_a_killed_launcher_ends_the_others(folder: Path, killed: int) -> None:
    """With its ranks; the other node says which host it was, within seconds."""
    endpoint = free_endpoint()
    arguments = ("two.yaml", "--out", f"killed-{killed}", "--iterations", "1000")
    processes = [start(node_command(node, endpoint, *arguments), folder) for node in (0, 1)]
    metrics = folder / f"killed-{killed}" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    ranks = psutil.Process(processes[killed].pid).children()
    killed_s = time.monotonic()
    os.kill(processes[killed].pid, signal.SIGKILL)
    said = wait(processes)
    assert time.monotonic() - killed_s < 20
    other = said[1 - killed]
    assert said[killed].code == -signal.SIGKILL
    assert other.code == 1
    assert LOST[killed].format(endpoint=endpoint, host=socket.gethostname()) in other.err
    assert "Traceback" not in other.err
    assert "frame #" not in other.err
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_a_killed_rank_of_another_node_is_named_and_all_begin_again(folder: Path) -> None:
    endpoint = free_endpoint()
    arguments = ("two.yaml", "--out", "again")
    processes = [start(node_command(node, endpoint, *arguments), folder) for node in (0, 1)]
    second = psutil.Process(processes[1].pid)
    wait_until(lambda: len(second.children()) == 2)
    time.sleep(0.5)
    os.kill(second.children()[1].pid, signal.SIGKILL)
    said = wait(processes)
    assert [one.code for one in said] == [0, 0], [one.err for one in said]
    # where it was by then depends on the machine
    host = re.escape(socket.gethostname())
    assert re.search(rf"rank 3 on {host} \(.*\) was killed by signal 9", said[0].err)
    assert "restart 1 of 3, from the beginning" in said[0].err
    assert_as_local(folder / "again")


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)


def test_wrong_input_is_said_on_every_node(folder: Path) -> None:
    alone = start(run_command("two.yaml", "--out", "alone"), folder)
    other = yaml.safe_load((folder / "two.yaml").read_text())
    other["experiment"]["seed"] = 99
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    endpoint = free_endpoint()
    differing = [
        start(node_command(node, endpoint, plan, "--out", "differing"), folder)
        for node, plan in enumerate(("two.yaml", "other.yaml"))
    ]
    nobody = [*node_command(1, free_endpoint(), "two.yaml", "--out", "nobody"), "--join-timeout", "1"]
    three = node_command(0, free_endpoint(), "two.yaml", "--out", "three", nnodes=3)
    said = wait([alone, *differing, start(nobody, folder), start(three, folder)])
    assert_refused(said[0], "--node-rank 1 --rdzv-endpoint HOST:29400", "--nnodes is not given")
    for one in said[1:3]:
        assert_refused(one, "node 1 (", "its plan differs from node 0's")
    assert_refused(said[3], "nobody answers within 1 s", "start node 0")
    assert_refused(said[4], "2 nodes, but --nnodes is 3")
    assert not any((folder / name).exists() for name in ("alone", "differing", "nobody", "three"))


def assert_refused(said: Said, *parts: str) -> None:
    assert said.code == 2, said.err
    assert "Traceback" not in said.err
    missing: Sequence[str] = [part for part in parts if part not in said.err]
    assert not missing, said.err
