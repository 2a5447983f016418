"""Faults made from outside, one a run, and what became of each."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.fault_tools import Command, Launcher, lines, small_disk, state_of, wait
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints
from tests.cluster.namespaces import Host, hosts, why_not
from tests.run.workplace import Workplace

ITERATIONS = 6
RANKS = 2
PORT = 29400
TWO_NODES = 0.25
"""The share of faults of ranks that hit a run of two nodes."""
RESTART, ERROR = "realloc: restart 1 of", "realloc: error:"
_OPTIONS = ("--save-every", "1", "--trust")
_PLACES = {
    "*": ("node[0-1]", "d2t1p1"),
    "actor_gen": ("node0", "d1t1p1"),
    "actor_train": ("node[0-1]", "d1t1p2m2"),
    "critic_train": ("node1", "d1t1p1m2"),
}
"""The same calls on two nodes of one rank as on one node of two."""


@dataclass(frozen=True)
class Moment:
    """When something happens: `delay_s` after `iterations` are done, None: while the ranks start.

    `while_saving`: when a checkpoint begins to be written after that.
    """

    iterations: int | None
    delay_s: float
    while_saving: bool


@dataclass
class Outcome:
    """What became of one fault. `detection_s`: from the fault until the launcher has said what it found."""

    kind: str
    moment: Moment
    said: str = ""
    detection_s: float | None = None
    is_named: bool = False
    has_resumed: bool = False
    is_identical: bool = False
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seconds = "never" if self.detection_s is None else f"{self.detection_s:.1f} s"
        ends = "identical" if self.is_identical else f"NOT IDENTICAL: {'; '.join(self.problems)}"
        return f"{self.kind}: found after {seconds}, {ends}: {self.said}"


class Campaign:
    """A workplace with a tiny experiment, its undisturbed runs, and the faults."""

    def __init__(self, folder: Path, bound_s: float, seed: int) -> None:
        torch.set_num_threads(1)
        self._place = Workplace(folder)
        self._folder, self._bound_s, self._seed = folder, bound_s, seed
        self._place.plan("one", gpus=RANKS, iterations=ITERATIONS)
        self._two_nodes()
        self._calm: dict[str, Mapping[str, Any]] = {}
        self._iteration_s = 0.0
        self._can_mount = self._mounts()

    def why_not(self, kind: str) -> str | None:
        """Why such faults cannot be made here; None when they can."""
        return why_not() if kind == "link" else None

    def run(self, kind: str, number: int) -> Outcome:
        """One fault. A moment that comes after the run has ended is drawn again."""
        draw = random.Random(f"{self._seed}/{number}")
        do = {"disk": self._disk, "link": self._link}.get(kind, self._rank)
        name = f"{kind}-{number}"
        while True:
            with ExitStack() as stack:
                outcome = do(stack, kind, name, draw)
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if outcome is not None:
                return outcome

    # faults ---------------------------------------------------------------------------------------

    def _rank(self, stack: ExitStack, kind: str, name: str, draw: random.Random) -> Outcome | None:
        """A rank gets a signal, on one node or of two; the launchers go on by themselves."""
        plan = "two" if draw.random() < TWO_NODES else "one"
        calm = self._undisturbed(plan)
        out = self._folder / name
        launchers = self._start_all(stack, plan, name, "run", f"{plan}.yaml", "--out", name)
        launcher = launchers[0]
        outcome = Outcome(kind, self._moment(draw))
        rank = draw.randrange(RANKS)

        def ranks() -> list[int]:
            return [pid for each in launchers for pid in each.ranks()]

        if not self._await(outcome.moment, out, lambda: launcher.has_ended, lambda: len(ranks()) == RANKS):
            return None
        try:
            os.kill(ranks()[rank], signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        except (IndexError, ProcessLookupError):
            return None
        began = time.monotonic()
        if not wait(lambda: RESTART in launcher.text or launcher.has_ended):
            outcome.problems.append("never found")
            return outcome
        if launcher.has_ended and launcher.code == 0 and RESTART not in launcher.text:
            return None  # it had done its work
        outcome.detection_s = time.monotonic() - began
        launcher.wait()
        rows = lines(out / "restarts.jsonl")
        outcome.said = rows[0]["message"] if rows else launcher.text[-300:]
        outcome.is_named = len(rows) == 1 and rows[0]["rank"] == rank
        self._check(outcome, launchers, out, calm)
        return outcome

    def _disk(self, stack: ExitStack, kind: str, name: str, draw: random.Random) -> Outcome | None:
        """The disk is full; when there is room again, the run is resumed."""
        calm = self._undisturbed("one")
        out = self._folder / name / "out"
        out.parent.mkdir()
        fill = stack.enter_context(small_disk(out.parent)) if self._can_mount else None
        target = str(out.relative_to(self._folder))
        launcher = self._start(stack, name, "run", "one.yaml", "--out", target, *_OPTIONS)
        outcome = Outcome(kind, self._moment(draw))
        if not self._await(
            outcome.moment, out, lambda: launcher.has_ended, lambda: len(launcher.ranks()) == RANKS
        ):
            return None
        if fill is not None:
            fill(True)
        else:
            for pid in (launcher.pid, *launcher.ranks()):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        began = time.monotonic()
        if not wait(lambda: ERROR in launcher.text or launcher.has_ended):
            outcome.problems.append("never found")
            return outcome
        outcome.detection_s = time.monotonic() - began
        launcher.wait()
        if fill is not None:
            fill(False)
        if launcher.code == 0:
            return None  # it had written everything
        message = [line for line in launcher.text.splitlines() if line.startswith(ERROR)]
        causes = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG)]
        outcome.said = message[0] if message else launcher.text[-300:]
        outcome.is_named = bool(message) and any(cause in outcome.said for cause in causes)
        again = self._resume(stack, f"{name}-again", out)
        self._check(outcome, again, out, calm)
        return outcome

    def _link(self, stack: ExitStack, kind: str, name: str, draw: random.Random) -> Outcome | None:
        """One of two nodes goes off the network; when it is back, the run is resumed."""
        calm = self._undisturbed("two")
        out = self._folder / name
        nodes = stack.enter_context(hosts(2))
        started = self._start_nodes(stack, nodes, name, "run", "two.yaml", "--out", name, *_OPTIONS)
        outcome = Outcome(kind, self._moment(draw))
        if not self._await(
            outcome.moment, out, lambda: any(each.has_ended for each in started), lambda: _has_logs(out)
        ):
            return None
        nodes[1].cut()
        began = time.monotonic()
        if not wait(lambda: ERROR in started[0].text or started[0].has_ended):
            outcome.problems.append("never found")
            return outcome
        outcome.detection_s = time.monotonic() - began
        started[0].wait()
        started[1].wait()
        nodes[1].restore()
        if started[0].code == 0:
            return None
        message = [line for line in started[0].text.splitlines() if line.startswith(ERROR)]
        outcome.said = message[0] if message else started[0].text[-300:]
        outcome.is_named = nodes[1].name in outcome.said
        arguments: tuple[str, ...] = ("run", "--resume", name, *_OPTIONS)
        if not list_checkpoints(checkpoints_folder(out)):
            arguments = ("run", "two.yaml", "--out", name, "--overwrite", *_OPTIONS)
        again = self._start_nodes(stack, nodes, f"{name}-again", *arguments)
        self._check(outcome, again, out, calm)
        return outcome

    # runs -----------------------------------------------------------------------------------------

    def _two_nodes(self) -> None:
        content = yaml.safe_load((self._folder / "one.yaml").read_text())
        content["cluster"] |= {"nodes": 2, "gpus_per_node": 1}
        for call in content["placements"]:
            mesh, strategy = _PLACES.get(call, _PLACES["*"])
            content["placements"][call] = {"mesh": mesh, "strategy": strategy}
        (self._folder / "two.yaml").write_text(yaml.safe_dump(content))

    def _undisturbed(self, plan: str) -> Mapping[str, Any]:
        """The state that a plan's run leaves when nobody disturbs it."""
        if plan in self._calm:
            return self._calm[plan]
        name = f"calm-{plan}"
        arguments = ("run", f"{plan}.yaml", "--out", name)
        with ExitStack() as stack:
            for launcher in self._start_all(stack, plan, name, *arguments):
                if launcher.wait() != 0:
                    raise RuntimeError(f"the undisturbed run has failed: {launcher.text}")
        out = self._folder / name
        seconds = [row["seconds"] for row in lines(out / "metrics.jsonl")]
        self._iteration_s = sum(seconds[1:]) / len(seconds[1:])
        self._calm[plan] = state_of(out)
        print(
            f"undisturbed, {plan} node: {self._iteration_s:.2f} s an iteration", file=sys.stderr, flush=True
        )
        return self._calm[plan]

    def _start_all(self, stack: ExitStack, plan: str, name: str, *arguments: str) -> list[Launcher]:
        """The launchers that a plan needs, all of them on this machine's loopback."""
        if plan == "one":
            return [self._start(stack, name, *arguments, *_OPTIONS)]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        places = [("--nnodes", "2", "--node-rank", str(n), "--rdzv-endpoint", endpoint) for n in range(2)]
        return [
            self._start(stack, f"{name}-node{number}", *arguments, *_OPTIONS, *place)
            for number, place in enumerate(places)
        ]

    def _start(self, stack: ExitStack, name: str, *arguments: str) -> Launcher:
        launcher = Launcher(self._folder, name, *arguments)
        stack.callback(launcher.end)
        return launcher

    def _start_nodes(
        self, stack: ExitStack, nodes: Sequence[Host], name: str, *arguments: str
    ) -> list[Launcher]:
        """A launcher in each host, started there anew."""
        started = []
        for number, node in enumerate(nodes):
            place = ["--nnodes", str(len(nodes)), "--node-rank", str(number)]
            place += ["--rdzv-endpoint", f"{nodes[0].address}:{PORT}"]
            command = node.command([sys.executable, "-m", "realloc", *arguments, *place])
            launcher = Command(self._folder, f"{name}-node{number}", command)
            stack.callback(launcher.end)
            started.append(launcher)
        return list(started)

    def _resume(self, stack: ExitStack, name: str, out: Path) -> list[Launcher]:
        target = str(out.relative_to(self._folder))
        if list_checkpoints(checkpoints_folder(out)):
            return [self._start(stack, name, "run", "--resume", target, *_OPTIONS)]
        arguments = ("run", "one.yaml", "--out", target, "--overwrite", *_OPTIONS)
        return [self._start(stack, name, *arguments)]

    def _moment(self, draw: random.Random) -> Moment:
        iterations = draw.choice([None, *range(ITERATIONS)])
        longest = 1.5 if iterations is None else 1.2 * self._iteration_s
        while_saving = iterations is not None and draw.random() < 0.3
        return Moment(iterations, draw.uniform(0, 0.03 if while_saving else longest), while_saving)

    def _await(
        self, moment: Moment, out: Path, has_ended: Callable[[], bool], has_started: Callable[[], bool]
    ) -> bool:
        """Waits for the moment; false when the run has ended before."""

        def has_come() -> bool:
            if moment.iterations is None:
                return has_started()
            return len(lines(out / "metrics.jsonl")) >= moment.iterations and has_started()

        def is_saving() -> bool:
            return any(checkpoints_folder(out).glob(".iteration-*.partial"))

        if not wait(lambda: has_come() or has_ended()) or has_ended():
            return False
        if moment.while_saving and (not wait(lambda: is_saving() or has_ended()) or has_ended()):
            return False
        time.sleep(moment.delay_s)
        return not has_ended()

    def _check(
        self, outcome: Outcome, launchers: Sequence[Launcher], out: Path, calm: Mapping[str, Any]
    ) -> None:
        """Whether the run came to its end, with the undisturbed run's state and nothing left behind."""
        for launcher in launchers:
            if launcher.wait() != 0:
                outcome.problems.append(f"did not end well: {launcher.text[-500:]}")
                return
            if left := launcher.leftovers():
                outcome.problems.append(f"{len(left)} processes outlive it")
        outcome.has_resumed = True
        found = state_of(out)
        outcome.problems += [f"differs: {name}" for name in calm if found.get(name) != calm[name]]
        outcome.problems += [f"too much: {name}" for name in found if name not in calm]
        outcome.is_identical = not outcome.problems

    def _mounts(self) -> bool:
        try:
            probe = self._folder / "probe"
            probe.mkdir()
            with small_disk(probe):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _has_logs(out: Path) -> bool:
    """Whether the ranks of both nodes have started."""
    return all(any((out / "logs").glob(f"node-{node}/*/*/0")) for node in range(2))
