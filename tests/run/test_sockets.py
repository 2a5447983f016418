"""A run of one machine listens on loopback alone: launcher, ranks and whatever they start."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from tests.run.workplace import Workplace


def test_a_run_listens_on_loopback_alone(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    plan = place.plan("slow", reward="my_rewards:slow")  # stays in its first iteration
    process = place.start("run", plan.name, "--out", "o")
    launcher = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "entered").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr
            time.sleep(0.1)
        family = [launcher, *launcher.children(recursive=True)]
        assert len(family) >= 4  # two ranks, and a reward at least
        listening = {
            (one.pid, connection.laddr.ip)
            for one in family
            for connection in one.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    finally:
        launcher.terminate()
        process.communicate(timeout=60)
    assert listening, "nobody listens: the test looks in the wrong place"
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1"}, listening
