"""The doctor on two hosts: it measures the link between them as it is, and finds a folder that both see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.namespaces import hosts, why_not
from tests.run.workplace import Workplace

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_two_hosts_with_a_slow_link(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    plan = place.plan("plan")
    content = yaml.safe_load(plan.read_text())
    content["cluster"] |= {"nodes": 2, "gpus_per_node": 1}
    for placement in content["placements"].values():
        placement |= {"mesh": "node[0-1]", "strategy": "d2t1p1"}
    plan.write_text(yaml.safe_dump(content))
    with hosts(2, "200mbit") as pair:
        shared = ["doctor", plan.name, "--trust", "--nnodes", "2", "--json"]
        shared += ["--rdzv-endpoint", f"{pair[0].address}:29511"]
        command = [sys.executable, "-m", "realloc", *shared, "--node-rank"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                host.command([*command, str(number)]),
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, host in enumerate(pair)
        ]
        out, _ = (process.communicate(timeout=110)[0] for process in started)
    found = {(f["check"], f["node"]): f for f in json.loads(out)["findings"]}
    link = found["link inter node", 0]
    measured = float(link["found"].split(" GB/s")[0])
    assert 0.01 < measured < 0.03, link  # 200 Mbit/s are 0.025 GB/s
    assert found["reachability", 0]["status"] == "ok"
    assert found["shared folder", 1]["status"] == "ok"
