"""Runs the command line on damaged files, in this process, and judges how each case ends.

Right is: exit code 0, or a message and exit code 1 or 2. Wrong is a traceback, a case that takes too
long, or a file opened for writing outside the output folder, a process started or a connection made
(what Python reports to audit hooks).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml

from realloc.cli import main
from realloc.plan import ExecutionPlan
from realloc.trace import BatchLengths, Machine, TraceRecord, trace_lines
from tests.fuzz.mutations import damaged
from tests.ranks.engine import make_plan, ppo_content, write_models

CASE_S, CASE_CPU_S = 120.0, 20.0
"""A case may take so long, and so long of a core: the second is what counts on a busy machine."""

SEARCH = ("search", "experiment.yaml", "-o", "out/plan.yaml", "--time-limit", "0.2")
COMMANDS: Mapping[str, Sequence[Sequence[str]]] = {
    "experiment.yaml": (
        ("check", "experiment.yaml"),
        SEARCH,
        SEARCH,
        ("graph", "experiment.yaml"),
        ("graph", "experiment.yaml", "-o", "out/graph.svg"),
        ("compare", "experiment.yaml", "--time-limit", "0.2"),
    ),
    "plan.yaml": (
        ("check", "plan.yaml"),
        ("explain", "plan.yaml", "--time-limit", "0.2"),
        ("simulate", "plan.yaml", "--trace", "out/t.json"),
        ("report", "plan.yaml", "-o", "out/r.html", "--time-limit", "0.2"),
        ("diff", "plan.yaml", "run"),
        ("diff", "plan.yaml", "run", "--trace", "out/t.json", "--json"),
        ("run", "plan.yaml", "--out", "out/run"),
        ("run", "plan.yaml", "--out", "out/run"),
        ("run", "--resume", "run", "plan.yaml"),
        ("doctor", "plan.yaml", "--no-links", "--out", "out/run"),
    ),
    "profile.yaml": (
        ("check", "profile.yaml"),
        (*SEARCH, "--device", "profile.yaml"),
        ("simulate", "plan.yaml", "--device", "profile.yaml"),
        ("diff", "plan.yaml", "run", "--device", "profile.yaml"),
        ("calibrate", "run", "-o", "out/p.yaml", "--device", "profile.yaml"),
    ),
    "cluster.yaml": (("check", "cluster.yaml"), (*SEARCH, "--cluster", "cluster.yaml")),
    "run/trace.jsonl": (
        ("check", "run/trace.jsonl"),
        ("diff", "plan.yaml", "run"),
        ("calibrate", "run", "-o", "out/p.yaml"),
        ("lengths", "run"),
        ("report", "plan.yaml", "-o", "out/r.html", "--run", "run", "--time-limit", "0.2"),
    ),
    "run/plan.yaml": (
        ("calibrate", "run", "-o", "out/p.yaml"),
        ("diff", "plan.yaml", "run"),
        ("run", "--resume", "run"),
    ),
    "models/actor/config.json": (
        ("check", "experiment.yaml"),
        SEARCH,
        ("run", "plan.yaml", "--out", "out/run"),
        ("doctor", "plan.yaml", "--no-links", "--out", "out/run"),
    ),
    "models/actor/tokenizer.json": (("run", "plan.yaml", "--out", "out/run"),),
    "train.jsonl": (
        ("run", "plan.yaml", "--out", "out/run"),
        ("search", "measured.yaml", "-o", "out/p.yaml"),
    ),
}


class _Hang(BaseException):
    """Raised by the alarm; not an Exception, so that nothing catches it on the way."""


class _ChecksPassed(BaseException):
    """Raised where a run would begin to write."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `accepted`, `refused`, `traceback`, `hang`, `write` or `exit`."""

    name: str
    command: str
    kind: str
    text: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.kind not in ("accepted", "refused")


def write_originals(folder: Path) -> None:
    """Valid files of every kind, with paths that stay right wherever the folder is copied."""
    models = dict(write_models(folder / "models"))
    relative = {role: f"models/{role}" for role in models if role != "reward"}
    for name in ("train.jsonl", "test.jsonl"):
        (folder / "models" / name).rename(folder / name)
    content = ppo_content(Path(), relative, reward="experiments.rewards:cheerful_story", iterations=2)
    cluster = {"nodes": 1, "gpus_per_node": 2, "device": "cpu"}
    constraints = {"calls": {"actor_train": {"mesh": "node0"}}}
    full = {"realloc": "experiment/1", **content, "cluster": cluster}
    _dump(folder / "experiment.yaml", {**full, "constraints": _valid(folder, full, constraints)})
    workload = {**content["workload"], "prompt_tokens": "measured"}
    _dump(folder / "measured.yaml", {**full, "workload": workload})
    _dump(folder / "cluster.yaml", {"realloc": "cluster/1", **cluster, "memory_gib": 4.0})
    here = Path(__file__).resolve().parents[2]
    shutil.copy(here / "cost_models" / "profiles" / "cpu.yaml", folder / "profile.yaml")
    placements = {
        "*": ("node0", "d2t1p1"),
        "actor_train": ("node0", "d1t1p2m2"),
        "actor_gen": ("node0:gpu[0]", "d1t1p1"),
    }
    with _inside(folder):
        plan = make_plan(folder, content, 2, placements)
        (folder / "run").mkdir()
        shutil.copy("plan.yaml", "run/plan.yaml")
        # a plan has absolute paths once it is written by us; this one keeps what the experiment says
        (folder / "run" / "trace.jsonl").write_text("\n".join(_trace(plan)) + "\n")
        text = (
            (folder / "run" / "plan.yaml")
            .read_text()
            .replace("models/", "../models/")
            .replace("train.j", "../train.j")
        )
        (folder / "run" / "plan.yaml").write_text(text)


def _valid(folder: Path, full: Mapping[str, Any], constraints: Mapping[str, Any]) -> Mapping[str, Any]:
    """The constraints, which the reader must accept."""
    from realloc.experiment import read_experiment

    path = folder / "constrained.yaml"
    _dump(path, {**full, "constraints": constraints})
    read_experiment(path)
    path.unlink()
    return constraints


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))


def _trace(plan: ExecutionPlan) -> Iterator[str]:
    records = [
        TraceRecord(
            i, rank, node.name, str(node.kind), i + n / 50, i + (n + 1) / 50, predicted_s=0.02, cpu_s=0.01
        )
        for i in range(3)
        for n, node in enumerate(plan.augmented.by_name[name] for name in plan.node_order)
        for rank in node.ranks
    ]
    lengths = [BatchLengths(i, ((8, 6), (9, 6)), ((4, 6), (8, 6))) for i in range(3)]
    return iter(list(trace_lines(2, records, lengths, Machine("generic x86 host with 2 cores", 2))))


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Watch:
    """Hears what Python does: files opened for writing, processes started, connections made."""

    _CHANGES = (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
    )
    _NEVER = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "socket.connect",
    )

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._judge(event, arguments[0])
        elif event in self._CHANGES:
            self._judge(event, arguments[0])
        elif event == "socket.connect" and str(arguments[1][0]) in ("127.0.0.1", "::1"):
            pass  # a run's own ports
        elif event in self._NEVER and arguments[:1] != ("uname",):  # which Python's platform module asks
            self.heard.append(f"{event} {arguments!r:.200}")

    def _judge(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor that is open already
        place = os.path.realpath(os.fsdecode(path))
        inside = self.allowed is not None and (place + "/").startswith(f"{self.allowed}/")
        if not inside and place != "/dev/null":
            self.heard.append(f"{event} {place}")


def run_case(originals: Path, folder: Path, watch: Watch, random: Random, name: str | None = None) -> Outcome:
    """One case: one file of a fresh copy damaged, one command run on it."""
    name = name or random.choice(tuple(COMMANDS))
    command = random.choice(COMMANDS[name])
    content = damaged((originals / name).read_bytes(), random)
    return run_command(originals, folder, watch, command, name, content)


def run_command(
    originals: Path, folder: Path, watch: Watch, command: Sequence[str], name: str, content: bytes
) -> Outcome:
    """Runs a command in a fresh copy of the originals in which the file `name` has this content."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals, folder / "in", copy_function=_link)
    (folder / "in" / "out").mkdir()
    target = folder / "in" / name
    target.unlink()  # it is a link to the original
    target.write_bytes(content)
    before = _listing(folder)
    with _inside(folder / "in"):
        kind, text = _judged(command, folder / "in" / "out", watch)
    if kind in ("accepted", "refused") and (changed := _listing(folder) ^ before):
        kind, text = "write", f"changed: {sorted(changed)[:4]}"
    return Outcome(name, " ".join(command), kind, text)


def _link(source: str, target: str) -> None:
    """Copies are cheap: only the damaged file is another one."""
    os.link(source, target)


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    """Everything in the folder but the output, with sizes and times."""
    found = set()
    for root, folders, files in os.walk(folder):
        if Path(root) == folder / "in":
            folders.remove("out")
        for file in files:
            path = Path(root) / file
            status = path.lstat()
            found.add((str(path), status.st_size, status.st_mtime_ns))
    return found


def _judged(command: Sequence[str], out: Path, watch: Watch) -> tuple[str, str]:
    printed = io.StringIO()
    watch.heard.clear()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _alarm():
            watch.allowed = out.resolve()
            with (
                mock.patch("runtime.launch.prepare_folder", _stop),
                mock.patch("runtime.launch.rewind_folder", _stop),
            ):
                code = main(list(command))
    except _ChecksPassed:
        code = 0
    except _Hang:
        return "hang", traceback.format_exc()
    except SystemExit as error:
        return "exit", f"SystemExit {error.code}: {printed.getvalue()[-500:]}"
    except BaseException:  # noqa: BLE001 (whatever it is, it is what we look for)
        return "traceback", traceback.format_exc()
    finally:
        watch.allowed = None
    if watch.heard:
        return "write", "; ".join(watch.heard[:4])
    text = printed.getvalue()
    if code == 0:
        return "accepted", ""
    if code not in (1, 2) or "Traceback" in text or not ("error: " in text or command[0] == "doctor"):
        return "exit", f"code {code}: {text[-500:]}"
    return (
        ("refused", text[:2000])
        if len(text) < 20_000
        else ("exit", f"a message of {len(text)} characters: {text[:300]}")
    )


def _stop(*_: Any, **__: Any) -> None:
    raise _ChecksPassed


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring), signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_REAL, CASE_S)
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])
