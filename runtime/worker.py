"""One rank's process: joins the group, loads its models, runs its program, exports weights."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from realloc.augmented import home_call
from realloc.dataflow import CallKind
from realloc.named_code import place_of
from realloc.plan import ExecutionPlan, read_plan
from realloc.trace import Trace
from runtime.checkpoint import SaveOptions, Saver
from runtime.checkpoint_files import iteration_of, read_manifest
from runtime.checkpoint_shares import trained_roles
from runtime.data_store import IterationData
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer, Sums
from runtime.export import export_role
from runtime.heartbeat import ENDED, EXPORTING, SAVING, Board, Heartbeat
from runtime.host_memory import keep_freed_memory
from runtime.machine import cores_mark, pin
from runtime.metrics import MetricsChannel
from runtime.pace import RunPace
from runtime.parallel import Groups, make_groups
from runtime.parent import die_with
from runtime.program import compile_program
from runtime.restore import restore
from runtime.roles import RankRole, load_roles
from runtime.samples import SampleReporter
from runtime.shared_memory import host_token
from runtime.tracing import CHECKPOINT, Recorder, write_trace
from runtime.verdict import OTHER, RankError, cause_of


@dataclass(frozen=True)
class WorkerSpec:
    """What every rank of a machine is told. `store_host`, `store_port`: where the run's store listens.

    Rank = `node` * `ranks_per_node` + the number that this machine's agent gives its process.
    `checkpoint` is the folder of the checkpoint to go on from; None starts from the models' folders.
    `attempt` counts the restarts of the run; `beat_s` is the time between two beats of a rank.
    """

    plan: str
    out: str
    store_host: str
    store_port: int
    timeout_s: float
    launcher_pid: int
    saving: SaveOptions
    node: int
    num_nodes: int
    ranks_per_node: int
    checkpoint: str | None = None
    attempt: int = 0
    beat_s: float = 1.0
    pin: bool = False
    samples: int = 0


def run_worker(spec: WorkerSpec, board: Board) -> None:
    """Runs one rank; which one of its machine it is, LOCAL_RANK says, set by the launcher's agent."""
    local_rank = int(os.environ["LOCAL_RANK"])
    rank = spec.node * spec.ranks_per_node + local_rank
    world_size = spec.num_nodes * spec.ranks_per_node
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}  # for libraries that ask
    die_with(spec.launcher_pid)  # an orphan would go on writing
    keep_freed_memory()
    # what the launcher has imported is here for good: looking for garbage in it would copy its pages
    gc.freeze()
    try:
        with Heartbeat(board, local_rank, spec.beat_s) as heartbeat:
            _run(spec, rank, world_size, heartbeat)
            sys.stdout.flush()
            heartbeat.at(0, ENDED)  # the launcher may end this process now
    except BaseException as error:
        # the last chance to say why this process dies: the launcher reads it, then we die anyway
        _write_error(Path(spec.out), rank, error)
        with suppress(OSError):  # the disk that the log is on may be full
            traceback.print_exc()
        raise


def _run(spec: WorkerSpec, rank: int, world_size: int, heartbeat: Heartbeat) -> None:
    torch.set_num_threads(1)
    out = Path(spec.out)
    timeout = timedelta(seconds=spec.timeout_s)
    main_store = _connect(spec)
    if spec.pin:
        _pin(spec, main_store)
    device = pick_device()
    _join(dist.PrefixStore("ranks", main_store), rank, world_size, timeout, device)
    plan = read_plan(spec.plan, trust=True)  # the launcher has asked
    program = compile_program(plan)
    dataset = open_dataset(plan.experiment)
    groups = make_plan_groups(plan, rank, timeout)
    roles = load_roles(plan, groups, device)
    engine = Engine(plan, program, rank, groups, roles, dataset, device)
    first = 0 if spec.checkpoint is None else _resume(Path(spec.checkpoint), plan, roles, engine)
    channel = MetricsChannel(dist.PrefixStore("metrics", main_store), reporting_ranks(plan))
    # a connection of its own: the background thread waits on it while the main thread uses the other
    own = _connect(spec)
    confirmed = MetricsChannel(dist.PrefixStore("metrics", own), ()).is_written
    store = dist.PrefixStore("checkpoints", own)
    saver = Saver(
        out, plan, roles, rank, store, spec.saving, has_metrics=confirmed, states=lambda: engine.states
    )
    dist.barrier()
    samples = SampleReporter(plan, rank, spec.samples, dataset.decode)
    recorder, pace = Recorder(rank, _shared_epoch(rank), device), RunPace(plan, device)

    def entering(iteration: int, index: int) -> None:
        heartbeat.at(iteration, index)
        saver.check()

    teller, sequences = sequence_teller(plan)

    def report(iteration: int, sums: Sums, data: IterationData) -> None:
        if rank in channel.reporters:
            channel.report(iteration, rank, sums, samples.parts(iteration, data))
        if rank == teller:
            recorder.add_lengths(iteration, data.prompt_lengths, data.key_lengths(sequences))
        start = recorder.now()
        heartbeat.at(iteration, SAVING)
        if saver.is_due(iteration):
            saver.save(iteration)
            recorder.add(iteration, CHECKPOINT, CHECKPOINT, start, predicted_s=None)
        pace.at_end(iteration, recorder)

    with saver:
        engine.run(range(first, plan.experiment.iterations), recorder, Observer(entering, report))
        if plan.experiment.evaluation is not None:  # of the models as they are exported
            found = engine.evaluate(plan.experiment.iterations, entering)
            if rank in channel.reporters:
                channel.report(plan.experiment.iterations, rank, found)
        heartbeat.at(plan.experiment.iterations, EXPORTING)
        trace = Trace(world_size, tuple(recorder.records), tuple(recorder.lengths))
        write_trace(out / "trace" / f"rank-{rank}.jsonl", trace)
        export_models(plan, roles, out / "models", rank)
    dist.barrier()
    dist.destroy_process_group()


def _join(store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device) -> None:
    """Makes the group of all ranks."""
    is_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if is_gpu:
        # batches of messages are of the whole world, and NCCL wants a collective of it before the first
        dist.all_reduce(torch.zeros(1, device=device))


def _resume(checkpoint: Path, plan: ExecutionPlan, roles: dict[str, RankRole], engine: Engine) -> int:
    """Takes this rank to where the checkpoint was taken; returns the iteration to go on with."""
    restore(checkpoint, roles, trained_roles(plan))
    engine.resume(read_manifest(checkpoint).states)
    return iteration_of(checkpoint)


def _connect(spec: WorkerSpec) -> dist.Store:
    """The run's store, without what earlier attempts have left in it, such as addresses of ranks."""
    timeout = timedelta(seconds=spec.timeout_s)
    store = dist.TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{spec.attempt}", store)


def _pin(spec: WorkerSpec, store: dist.Store) -> None:
    """A core for this rank, which no rank of another launcher on the same cores gets either."""
    first, mark = 0, cores_mark()
    if spec.num_nodes > 1:
        store.set(f"cores/{spec.node}", mark)
        before = [store.get(f"cores/{node}").decode() for node in range(spec.node)]
        first = spec.ranks_per_node * before.count(mark)
    pin(first + int(os.environ["LOCAL_RANK"]))


def make_plan_groups(plan: ExecutionPlan, rank: int, timeout: timedelta) -> Groups:
    """The process groups of all placements, in the order of the graph's calls."""
    return make_groups((plan.placements[c.name] for c in plan.graph.calls), rank, timeout)


def reporting_ranks(plan: ExecutionPlan) -> tuple[int, ...]:
    """The ranks that report metrics: last stage, first tensor shard, of any call."""
    ranks = set()
    for placement in plan.placements.values():
        for index, rank in enumerate(placement.mesh.ranks):
            at = placement.strategy.coordinates(index)
            if at.pp == placement.strategy.pp - 1 and at.tp == 0:
                ranks.add(rank)
    return tuple(sorted(ranks))


def sequence_teller(plan: ExecutionPlan) -> tuple[int, str]:
    """A rank that knows how long an iteration's whole sequences are, and the key that says it."""
    call = plan.graph.calls[0]
    key = call.writes[0] if call.kind is CallKind.GENERATE else str(call.sequence)
    return plan.placements[call.name].mesh.first, key


def export_models(plan: ExecutionPlan, roles: dict[str, RankRole], folder: Path, rank: int) -> None:
    """Writes every trained role as a Hugging Face folder `folder/ROLE`."""
    for name, role in roles.items():
        trainer = plan.graph.trainer(name)
        if trainer is not None and home_call(plan.graph, name) == trainer:
            source = plan.experiment.models[name].model
            export_role(role, source, folder / name, rank, plan.cluster.gpus_per_node)


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _shared_epoch(rank: int) -> float:
    """The moment the run begins, by this rank's clock: the same number where all ranks share one.

    Clocks of several machines differ, so there it is the moment when a barrier opens.
    """
    token = host_token()
    ends = torch.tensor([token, -token], dtype=torch.int64)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        dist.barrier()
        return time.time()
    epoch = torch.tensor([time.time() if rank == 0 else 0.0], dtype=torch.float64)
    dist.all_reduce(epoch)
    return float(epoch.item())


def _write_error(out: Path, rank: int, error: BaseException) -> None:
    folder = out / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    cause = cause_of(error)
    message = str(error) + (place_of(error) if cause == OTHER else "")
    record = RankError(rank, time.time(), type(error).__name__, message, cause)
    path = folder / f"rank-{rank}.json"
    # into the room that the launcher has reserved: the disk may be full, which may be what it says
    with path.open("r+b" if path.exists() else "wb") as stream:
        stream.write(json.dumps(asdict(record)).encode())
