"""Launchers that meet: who may take part, what each is told, and that nobody waits for one that is gone.

Launchers are threads here: what they share is a store on loopback.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from realloc.errors import InputError, ReallocError, RunError
from runtime.place import Place, check_place
from runtime.team import Order, Report, Team

HASH = "a" * 64
ORDER = Order("iteration-3", {"timeout_s": 5.0})
Launcher = Callable[[Team], object]


def place(node: int, nnodes: int = 2, timeout_s: float = 20.0) -> Place:
    return Place(nnodes, node, ("127.0.0.1", 0), timeout_s)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def started(port: int, *launchers: tuple[Place, Launcher]) -> Iterator[list[Future[object]]]:
    def run(where: Place, what: Launcher) -> object:
        with Team(replace(where, endpoint=("127.0.0.1", port))) as team:
            return what(team)

    with ThreadPoolExecutor(len(launchers)) as pool:
        yield [pool.submit(run, where, what) for where, what in launchers]


def failure(future: Future[object]) -> ReallocError:
    error = future.exception(timeout=60)
    assert isinstance(error, ReallocError), error
    return error


def leads(out: Path, then: Launcher = lambda team: team.conclude("")) -> Launcher:
    def run(team: Team) -> object:
        team.meet(HASH)
        team.give(0, ORDER, out)
        return then(team)

    return run


def follows(out: Path, then: Launcher = lambda team: None) -> Launcher:
    def run(team: Team) -> object:
        team.meet(HASH)
        order = team.take(0, out)
        then(team)
        return order

    return run


def test_all_begin_with_what_node_0_has_decided(tmp_path: Path, port: int) -> None:
    def conclude(team: Team) -> object:
        reports = team.end(Report(0))
        team.conclude("")
        return [host.node for host in team.hosts], [report.node for report in reports]

    def end(team: Team) -> None:
        team.end(Report(team.node))
        assert team.take(1, tmp_path) is None

    nodes = [
        (place(0, 3), leads(tmp_path, conclude)),
        *((place(n, 3), follows(tmp_path, end)) for n in (1, 2)),
    ]
    with started(port, *nodes) as (first, *others):
        assert first.result(60) == ([0, 1, 2], [0, 1, 2])
        assert [other.result(60) for other in others] == [ORDER, ORDER]


def test_a_failure_stops_all_and_the_next_attempt_is_another(tmp_path: Path, port: int) -> None:
    def stopped(team: Team) -> bool:
        deadline = time.monotonic() + 30
        while (reason := team.reason_to_stop()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return reason == "node 1 has failed"

    def lead(team: Team) -> object:
        assert team.reason_to_stop() is None
        assert stopped(team)
        reports = team.end(Report(0, reason="node 1 has failed"))
        team.give(1, Order("iteration-4", {}), tmp_path)
        assert team.reason_to_stop() is None
        team.end(Report(0))
        team.conclude("")
        return [report.failure for report in reports]

    def follow(team: Team) -> None:
        team.end(Report(1, failure={"rank": 3}))
        assert team.take(1, tmp_path) == Order("iteration-4", {})
        team.end(Report(1))
        assert team.take(2, tmp_path) is None

    with started(port, (place(0), leads(tmp_path, lead)), (place(1), follows(tmp_path, follow))) as futures:
        assert futures[0].result(60) == [None, {"rank": 3}]
        futures[1].result(60)


def test_differing_plans_are_refused_everywhere(tmp_path: Path, port: int) -> None:
    def other_plan(team: Team) -> object:
        team.meet("b" * 64)
        return team.take(0, tmp_path)

    with started(port, (place(0), leads(tmp_path)), (place(1), other_plan)) as futures:
        for future in futures:
            error = failure(future)
            assert isinstance(error, InputError)
            assert "node 1 (" in str(error)
            assert "plan differs" in str(error)


def test_another_number_of_nodes_is_refused(tmp_path: Path, port: int) -> None:
    with started(port, (place(0), leads(tmp_path)), (place(1, 3), follows(tmp_path))) as futures:
        for future in futures:
            assert "--nnodes 3, node 0 with 2" in str(failure(future))


def test_two_launchers_of_one_number(tmp_path: Path, port: int) -> None:
    twins = [(place(1, 3), follows(tmp_path)) for _ in range(2)]
    with started(port, (place(0, 3), leads(tmp_path)), *twins) as futures:
        for future in futures:
            assert "--node-rank 1 is given twice" in str(failure(future))


def test_another_folder_is_refused(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.team.TOKEN_WAIT_S", 0.2)
    elsewhere = tmp_path / "elsewhere"
    with started(port, (place(0), leads(tmp_path)), (place(1), follows(elsewhere))) as futures:
        for future in futures:
            assert f"{elsewhere}: is not the folder that node 0 writes to ({tmp_path})" in str(
                failure(future)
            )


def test_a_node_that_does_not_come_is_named(tmp_path: Path, port: int) -> None:
    with started(port, (place(0, 3, 0.5), leads(tmp_path)), (place(2, 3), follows(tmp_path))) as futures:
        assert "node 1 of 3 did not come to 127.0.0.1:" in str(failure(futures[0]))
        assert "node 1 of 3 did not come" in str(failure(futures[1]))


def test_what_a_node_finds_wrong_is_told_to_all(tmp_path: Path, port: int) -> None:
    def lacks(team: Team) -> None:
        team.meet(HASH)
        raise InputError("needs 2 GPUs")

    with started(port, (place(0), leads(tmp_path)), (place(1), lacks)) as futures:
        message = str(failure(futures[0]))
        assert message.startswith("node 1 (")
        assert message.endswith("needs 2 GPUs")


def test_nobody_listens(port: int) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="nobody answers within 1 s.*start node 0"):
        Team(Place(2, 1, ("127.0.0.1", port), 1.0))
    assert time.monotonic() - began < 10


def test_the_endpoint_is_of_another_host() -> None:
    with pytest.raises(InputError, match="--rdzv-endpoint 192.0.2.1:29400.*must run on that host"):
        Team(Place(2, 0, ("192.0.2.1", 29400), 1.0))


def test_a_silent_launcher_is_lost(tmp_path: Path, port: int) -> None:

    def falls_silent(team: Team) -> None:
        time.sleep(0.5)
        assert team._presence is not None
        team._presence.stop()
        time.sleep(3.0)

    def waits(team: Team) -> None:
        team.end(Report(0))

    first = replace(place(0), lost_s=1.0)
    nodes = [(first, leads(tmp_path, waits)), (place(1), follows(tmp_path, falls_silent))]
    with started(port, *nodes) as futures:
        error = failure(futures[0])
        assert isinstance(error, RunError)
        assert str(error).startswith("node 1 (")
        assert "nothing was heard of its launcher for 1 s" in str(error)


def test_an_interrupted_launcher_ends_the_others(tmp_path: Path, port: int) -> None:
    def is_interrupted(team: Team) -> None:
        raise KeyboardInterrupt

    def waits(team: Team) -> None:
        while team.reason_to_stop() is None:
            time.sleep(0.05)
        team.end(Report(0, reason="node 1 has failed"))

    nodes = [(place(0), leads(tmp_path, waits)), (place(1), follows(tmp_path, is_interrupted))]
    with started(port, *nodes) as futures:
        message = str(failure(futures[0]))
        assert message.startswith("node 1 (")
        assert message.endswith("was interrupted")


def test_a_plan_of_several_nodes_says_what_to_type() -> None:
    with pytest.raises(InputError) as caught:
        check_place(Place(), 2, ["run", "plan.yaml", "--out", "here"])
    message = str(caught.value)
    for node in (0, 1):
        command = f"realloc run plan.yaml --out here --nnodes 2 --node-rank {node} --rdzv-endpoint HOST:29400"
        assert command in message
    with pytest.raises(InputError, match="2 nodes, but --nnodes is 3"):
        check_place(Place(3), 2, [])
    with pytest.raises(InputError, match="1 node, but --nnodes is 2"):
        check_place(Place(2), 1, [])
    with pytest.raises(InputError, match="numbered 0 to 1"):
        check_place(Place(2, 2, ("h", 1)), 2, [])
    with pytest.raises(InputError, match="--rdzv-endpoint is not given"):
        check_place(Place(2, 1), 2, [])
