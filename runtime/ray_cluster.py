"""Starting a run through Ray: a placement group with a bundle a node, in each one launcher.

Decides where the nodes of a plan are in a Ray cluster, and when to end them all. It refuses to know
anything about ranks: in each bundle the same launcher runs as without Ray. What crosses Ray's own
wire are strings and numbers.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from realloc.errors import InputError, RunError

START = """
import ctypes, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
from realloc.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""A launcher that ends with the actor that started it: Ray would leave it running."""

PLACE_S = 60.0
"""How long Ray may take to find room for the bundles."""

END_S = 20.0
"""How long the other nodes may take to end after the first has failed: they find out by themselves."""


@dataclass(frozen=True)
class RayJob:
    """`arguments`: what follows `realloc` on every node, without the options that tell it its place."""

    arguments: tuple[str, ...]
    num_nodes: int
    gpus_per_node: int
    uses_gpus: bool
    folder: str
    address: str | None = None

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one node of the plan."""
        return {"GPU" if self.uses_gpus else "CPU": float(self.gpus_per_node)}


class NodeRunner:
    """An actor in one bundle: runs a node's launcher and passes on what it prints."""

    def meeting_point(self) -> str:
        """HOST:PORT on this node, as the other nodes reach it; the port was free a moment ago."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(self, arguments: list[str], folder: str) -> Iterator[str | int]:
        """Yields the launcher's lines, and its exit code as the last."""
        environment = dict(os.environ)
        devices = environment.get("CUDA_VISIBLE_DEVICES", "")
        if devices:  # neighbours in the plan should be neighbours on the board, however Ray ordered them
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(devices.split(","), key=_device_order))
        process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:  # noqa: UP028 - Ray sends into the generator, which a file does not take
            yield line
        yield process.wait()


def _device_order(device: str) -> tuple[int, str]:
    return (int(device), "") if device.isdecimal() else (sys.maxsize, device)


def run_by_ray(job: RayJob) -> int:
    """Runs the job and returns the exit code of the first node that failed, or 0.

    Raises InputError where Ray is missing or the cluster lacks room, RunError when a node is lost.
    """
    ray = _connect(job)
    try:
        _check_room(ray, job)
        group = ray.util.placement_group([job.bundle] * job.num_nodes, strategy="STRICT_SPREAD")
        try:
            ray.get(group.ready(), timeout=PLACE_S)
        except ray.exceptions.GetTimeoutError:
            raise InputError(
                f"--launcher ray: no room for {job.num_nodes} bundles of {job.bundle} on different nodes "
                f"within {PLACE_S:.0f} s: others use the cluster (`ray status`); try again or plan for fewer."
            ) from None
        return _run_nodes(ray, job, group)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise RunError(
            f"--launcher ray: {cause}; realloc must be installed on every node of the cluster."
        ) from None
    finally:
        ray.shutdown()


def _connect(job: RayJob) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if job.address is None:
        if job.num_nodes > 1:
            raise InputError(
                f"--launcher ray: the plan is for {job.num_nodes} nodes; give the cluster as --ray-address "
                f"HOST:PORT (or 'auto' on one of its nodes). Without it a local Ray of one node is started."
            )
        # a local Ray listens on loopback alone
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise InputError("--launcher ray: ray is not installed; pip install 'realloc[ray]'.") from None
    options: dict[str, Any] = {"address": job.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if job.address is None:
        options |= {"include_dashboard": False, "num_cpus": max(job.gpus_per_node, os.cpu_count() or 1)}
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise InputError(f"--launcher ray: no Ray cluster at {job.address}: {error}") from None
    return ray


def _check_room(ray: Any, job: RayJob) -> None:
    """Raises InputError when the cluster could not hold the plan even if it were idle."""
    ((kind, needed),) = job.bundle.items()
    nodes = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    large = sum(has >= needed for has in nodes)
    if large < job.num_nodes:
        raise InputError(
            f"--launcher ray: the plan needs {job.num_nodes} nodes of {needed:.0f} {kind}s; of the cluster's "
            f"{len(nodes)} nodes {large} have as many. Plan for the cluster there is."
        )


def _run_nodes(ray: Any, job: RayJob, group: Any) -> int:
    """Starts a launcher a bundle and follows them until all have ended or one has failed."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote = ray.remote(NodeRunner)
    amounts = {"num_gpus": job.gpus_per_node} if job.uses_gpus else {"num_cpus": job.gpus_per_node}
    actors = [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            max_restarts=0,
            **amounts,
        ).remote()
        for index in range(job.num_nodes)
    ]
    endpoint = ray.get(actors[0].meeting_point.remote(), timeout=PLACE_S)
    followers = []
    try:
        for index, actor in enumerate(actors):
            place = ["--nnodes", str(job.num_nodes), "--node-rank", str(index), "--rdzv-endpoint", endpoint]
            arguments = [*job.arguments, *(place if job.num_nodes > 1 else [])]
            lines = actor.run.options(num_returns="streaming").remote(arguments, job.folder)
            followers.append(_Follower(ray, index, lines))
        return _verdict(followers)
    finally:
        for actor in actors:
            ray.kill(actor)


class _Follower(threading.Thread):
    """Reads what one node says; node 0's lines are shown, since its launcher speaks for all."""

    def __init__(self, ray: Any, node: int, lines: Any) -> None:
        super().__init__(name=f"node-{node}", daemon=True)
        self._ray, self._lines = ray, lines
        self.node = node
        self.code: int | None = None
        self.lost: str | None = None
        self.last: list[str] = []
        self.start()

    def run(self) -> None:
        try:
            for reference in self._lines:
                item = self._ray.get(reference)
                if isinstance(item, int):
                    self.code = item
                elif self.node == 0:
                    print(item, end="", flush=True)
                else:
                    self.last = [*self.last[-9:], item]
        except self._ray.exceptions.RayError as error:
            self.lost = str(error).strip().splitlines()[-1]  # the cause; before it comes where Ray was

    @property
    def failed(self) -> bool:
        return not self.is_alive() and self.code != 0


def _verdict(followers: list[_Follower]) -> int:
    """Waits for all nodes, but not long for the others once one has failed."""
    while any(follower.is_alive() for follower in followers):
        for follower in followers:
            follower.join(0.1)
        if any(follower.failed for follower in followers):
            for follower in followers:
                follower.join(END_S / len(followers))
            break
    for follower in followers:
        if follower.lost is not None:
            raise RunError(f"--launcher ray: node {follower.node} of the plan was lost: {follower.lost}")
    failed = [follower for follower in followers if follower.code]
    if not failed:
        return 0
    if failed[0].node:  # node 0 said nothing of it, or this would not be the first
        print("".join(failed[0].last), end="", file=sys.stderr)
    return int(failed[0].code or 1)
