"""Measures the machine and writes a hardware profile: the measuring side of `realloc profile`.

Starts one process per rank on this machine, or is one of those that a launcher has started on a
whole cluster; runs the micro-benchmarks, then the runtime's own code for the models asked for, and
writes a `profile/1` file. Decides in what order, what is kept of a measurement that is interrupted,
and what is said about it. Knows nothing of how the numbers are used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from realloc.errors import InputError, RunError
from realloc.experiment import read_experiment
from realloc.files import dump_yaml, write_text
from runtime.host_memory import arena_environment
from runtime.machine import OthersUse, device_name
from runtime.profile_content import Links, profile_content
from runtime.profile_launch import last_line, run_ranks
from runtime.profile_progress import Progress
from runtime.profile_rank import fingerprint, measure_joined
from runtime.table_profiler import TableSpec, wanted

# What a launcher (torchrun, srun with the same variables) tells each rank.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_CPU_DTYPES, _GPU_DTYPES = ("float32",), ("bfloat16",)
_CROWDED = 0.1
"""Of a machine's cores: what others may use of them while it is measured without a word about it."""
_MOST_ON_HOST = 8
"""Processes that share a host's cores, unless more are asked for."""


@dataclass(frozen=True)
class ProfileOptions:
    """What `realloc profile` is asked for.

    `ranks`: processes that measure links, on each node; None: one for each GPU; on hosts as many as the
    experiments have on a node, or two. `models` (folders or names of shapes) and
    `experiments` (files): whose code is timed, in `dtypes` (empty: the device's usual one; experiments
    have their own). `tp`: highest tensor-parallel degree of a shard (0: `ranks`, or 8 on GPUs). `timeout_s`
    bounds the micro-benchmarks. This process is `node` of `nodes`, which meet at `endpoint`, of node 0.
    `links_of`: what is known of the links of devices by their name, for those that are not seen here.
    """

    ranks: int | None = None
    quick: bool = False
    models: tuple[str, ...] = ()
    experiments: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    tp: int = 0
    timeout_s: float = 600.0
    node: int = 0
    nodes: int = 1
    endpoint: tuple[str, int] = ("", 0)
    links_of: Callable[[str], Links | None] = lambda device: None


def run_profile(output: Path, options: ProfileOptions) -> bool:
    """Measures and writes the profile to `output`; returns whether this process wrote it.

    What was measured before an interruption is found again beside `output`, by the same command.
    Under a launcher, rank 0 alone writes; of several nodes, node 0. Raises InputError for what cannot be
    measured, RunError when a process fails.
    """
    gpus = torch.cuda.device_count()
    ranks = _ranks(options, gpus)
    launched = all(name in os.environ for name in _LAUNCHED)
    if gpus and ranks > gpus and not launched:
        raise InputError(f"realloc profile: --ranks is {ranks}, but there are {gpus} GPUs.")
    spec = _table_spec(output, options, ranks, gpus)
    wanted(spec, gpu=gpus > 0)  # what cannot be read is said before the measuring begins
    if launched:
        return _run_launched(output, options, spec)
    if options.node > 0:
        with tempfile.TemporaryDirectory(prefix="realloc-profile-") as folder:
            run_ranks(Path(folder), options, ranks)
        return False
    others = OthersUse()
    with Progress() as progress:
        measured = _measured(output, options, ranks, progress)
        tables = _tables(spec, progress)
    if (share := others.share()) > _CROWDED:
        note = f"others used {share:.0%} of the machine's cores meanwhile, which makes messages look slow"
        print(f"realloc: warning: {note}; measure again on a quiet machine.", file=sys.stderr)
        measured = {**measured, "notes": [*measured.get("notes", []), note]}
    _write(output, options, measured, tables, spec)
    return True


def _ranks(options: ProfileOptions, gpus: int) -> int:
    """Processes that measure on this node. Raises InputError."""
    if options.ranks is not None:
        if options.ranks < 1:
            raise InputError(f"realloc profile: --ranks is {options.ranks}, must be at least 1.")
        return options.ranks
    if gpus:
        return gpus
    wanted_ranks = [read_experiment(path).cluster for path in options.experiments]
    most = max((cluster.gpus_per_node for cluster in wanted_ranks if cluster is not None), default=2)
    return min(max(2, most), _MOST_ON_HOST)


def _table_spec(output: Path, options: ProfileOptions, ranks: int, gpus: int) -> TableSpec:
    dtypes = options.dtypes or (_GPU_DTYPES if gpus else _CPU_DTYPES)
    kept = _beside(output, "tables")
    tp = options.tp or (8 if gpus else ranks)
    return TableSpec(options.models, options.experiments, dtypes, tp, options.quick, str(kept), ranks)


def _beside(output: Path, what: str) -> Path:
    """Where a part of the measurement is kept until the profile is whole."""
    return output.absolute().parent / f".{output.name}.{what}.json"


def _write(
    output: Path,
    options: ProfileOptions,
    measured: Mapping[str, Any],
    tables: Mapping[str, Any] | None,
    spec: TableSpec,
) -> None:
    known = options.links_of(measured["device"])
    content = profile_content(measured, output.stem, tables, known)
    write_text(output, dump_yaml("profile", content))
    for part in (Path(spec.kept), _beside(output, "device")):
        part.unlink(missing_ok=True)


def _measured(output: Path, options: ProfileOptions, ranks: int, progress: Progress) -> Mapping[str, Any]:
    """What the micro-benchmarks measure, or measured before an interruption."""
    kept = _beside(output, "device")
    mark = f"{fingerprint(options.quick)}, {ranks} ranks, {options.nodes} nodes"
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["fingerprint"] == mark and options.nodes == 1:  # others would wait for this node
            found: Mapping[str, Any] = content["measured"]
            return found
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # nothing that could be used
    where = f" on each of {options.nodes} nodes" if options.nodes > 1 else ""
    progress.say(f"device and links, {ranks} ranks{where}")
    with tempfile.TemporaryDirectory(prefix="realloc-profile-") as folder:
        run_ranks(Path(folder), options, ranks)
        measured: Mapping[str, Any] = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    write_text(kept, json.dumps({"fingerprint": mark, "measured": measured}))
    return measured


def _run_launched(output: Path, options: ProfileOptions, spec: TableSpec) -> bool:
    """One rank of those that a launcher has started: all measure links, rank 0 also the tables."""

    def finish(measured: Mapping[str, Any]) -> None:
        tp = options.tp or max(spec.tp, int(measured["ranks"]))
        with Progress() as progress:
            tables = _tables(replace(spec, tp=tp), progress)
        _write(output, options, measured, tables, spec)

    measure_joined(options.quick, finish)
    return os.environ["RANK"] == "0"


def _tables(spec: TableSpec, progress: Progress) -> Mapping[str, Any] | None:
    """Runs the process that measures tables; None where no model was asked for."""
    if not spec.models and not spec.experiments:
        return None
    with tempfile.TemporaryDirectory(prefix="realloc-profile-") as name:
        folder = Path(name)
        content = {**asdict(spec), "fingerprint": fingerprint(spec.quick)}
        (folder / "spec.json").write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "runtime.table_profiler"]
        command += [str(folder / "spec.json"), str(folder / "result.json")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=_environment(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            failure = progress.follow(process)
            if process.wait():
                if failure is not None:
                    raise InputError(failure)
                raise RunError(f"realloc profile: {last_line(folder / 'log')}")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        result: Mapping[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result


def _environment() -> Mapping[str, str]:
    """That of a process which measures alone, whatever launched this one."""
    kept = {key: value for key, value in os.environ.items() if key not in (*_LAUNCHED, "LOCAL_RANK")}
    return {**kept, **arena_environment(), "OMP_NUM_THREADS": "1"}


def found_device() -> str:
    """The name of the device that a run on this machine would use."""
    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
