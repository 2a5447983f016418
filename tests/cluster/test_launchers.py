"""The demo's experiment on 2 nodes x 2 ranks under Slurm and under Ray: the same results as here alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.demo import assert_equal_runs, environment, write_plans
from tests.cluster.slurm import slurm_cluster, why_no_slurm

LIMIT_S = 240
NO_SLURM = why_no_slurm()


def realloc(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "realloc", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both plans, in which the plan of one node has been run, to `out/one`."""
    folder = tmp_path_factory.mktemp("cluster")
    write_plans(folder)
    done = realloc(folder, "run", "one.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def ray_address() -> Iterator[str]:
    """A Ray cluster of two nodes with two CPUs each, on loopback."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install '.[ray]'")
    start = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    variables = environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "no Ray cluster came up"
    yield address
    process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_under_ray_a_run_is_what_it_is_alone(alone: Path, ray_address: str) -> None:
    env = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = realloc(
        alone, "run", "two.yaml", "--out", "ray", "--launcher", "ray", "--ray-address", ray_address, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration 2/2" in done.stdout
    assert_equal_runs(alone / "ray", alone / "out" / "one")


def test_a_plan_of_two_nodes_needs_a_ray_cluster(alone: Path) -> None:
    done = realloc(alone, "run", "two.yaml", "--launcher", "ray")
    assert done.returncode == 2
    assert "--ray-address" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.skipif(NO_SLURM is not None, reason=str(NO_SLURM))
def test_under_slurm_a_run_is_what_it_is_alone(alone: Path, tmp_path: Path) -> None:
    with slurm_cluster(tmp_path) as env:
        done = realloc(alone, "run", "two.yaml", "--out", "slurm", "--launcher", "slurm", env=env)
        assert done.returncode == 0, done.stderr
        assert "submitted job" in done.stdout
        state = _final_state(env)
        (log,) = alone.glob("slurm.slurm-*.log")
        assert state == "COMPLETED", log.read_text()
        assert_equal_runs(alone / "slurm", alone / "out" / "one")


def _final_state(env: Mapping[str, str]) -> str:
    """Waits for the one job that was submitted, and returns how it ended."""
    end = time.monotonic() + LIMIT_S
    state = ""
    while time.monotonic() < end:
        shown = subprocess.run(
            ["scontrol", "show", "job", "1"], env=env, capture_output=True, text=True, check=True
        ).stdout
        state = shown.partition("JobState=")[2].split()[0]
        if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return state
        time.sleep(0.5)
    return state
