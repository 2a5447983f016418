"""Writing checkpoints beside training: sharded, asynchronous, atomic.

Decides when a checkpoint is taken, what of this rank goes into it, and when it counts. Where the
files lie and what is in them is `checkpoint_files`; who writes which piece is `checkpoint_shares`.

Consistency without a barrier. Each rank takes its snapshot after its own last instruction of
iteration t and before its first of t + 1. What is saved of a role, its parameters in the home layout
and the optimizer states, is changed by one instruction alone, the role's train_step, which runs once
an iteration on all ranks of the home mesh. So every rank's snapshot holds exactly the steps of the
iterations up to t, however far the ranks have drifted apart in time, and together they are the state
after iteration t. (Losses, samples and data depend on the iteration's number and the seed alone.)

How often. Unless a number is given, after every iteration, so that a failure loses the iteration in
flight alone; but nobody waits for a disk: an iteration that ends while the last checkpoint is still
being written goes without one. Ranks must agree on that, and get there at different times: the first
one decides, in the run's key-value store, and the others read what it has decided.

Atomicity. Ranks write into a hidden folder, sync their files, and say so in the run's key-value
store, which threads may use while the main thread is inside a collective. Once all have, rank 0
writes the manifest, syncs, and renames the folder to its name: before that there is no checkpoint,
after it there is a whole one.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from realloc.errors import RunError
from realloc.experiment import experiment_content
from realloc.layout import Box
from realloc.model_shape import read_config
from realloc.plan import ExecutionPlan
from runtime.checkpoint_files import (
    MANIFEST,
    Manifest,
    Piece,
    RoleRecord,
    checkpoints_folder,
    index_text,
    list_checkpoints,
    manifest_text,
    name_of,
    partial_name,
    remove_checkpoint,
)
from runtime.checkpoint_shares import WEIGHT, shares, stored_of, trained_roles
from runtime.roles import RankRole
from runtime.tensor_file import FileRecord, sync_folder, write_synced, write_tensors

POLL_S = 0.02
METRICS_WAIT_S = 20.0
"""Longest wait for an iteration's metrics: weights are worth more than a line."""
SAVE, SKIP = "save", "skip"
WriteTensors = Callable[[Path, Mapping[str, torch.Tensor]], FileRecord]


@dataclass(frozen=True)
class SaveOptions:
    """When checkpoints are taken: every `every` iterations and after the last (0: only then).

    None: after each iteration but those that end while the one before is still being written. The
    last `keep` stay. `background` false writes in the iteration's gap itself, to compare.
    """

    every: int | None = None
    keep: int = 2
    background: bool = True


@dataclass(frozen=True)
class Held:
    """One state of a role on this rank: tensors and the boxes that they are."""

    boxes: Mapping[str, Box]
    tensors: Mapping[str, torch.Tensor]


def held_states(role: RankRole) -> Mapping[str, Held]:
    """State -> what this rank holds of it in the role's home layout; empty where it is not home."""
    model, trainer = role.home_model, role.trainer
    if model is None:
        return {}
    if trainer is None:  # of a moving average; nobody asks for a frozen role's
        return {WEIGHT: Held(model.params.boxes, model.params.views)}
    states = trainer.optimizer_state()
    return {
        WEIGHT: Held(model.params.boxes, model.params.views),
        **{name: Held(trainer.optimizer_boxes, tensors) for name, tensors in states.items()},
    }


class Saver:
    """Takes this rank's checkpoints. A context manager: leaving it waits for the last one.

    `store` must be this saver's own connection: its background thread waits on it.
    """

    def __init__(
        self,
        out: Path,
        plan: ExecutionPlan,
        roles: Mapping[str, RankRole],
        rank: int,
        store: dist.Store,
        options: SaveOptions,
        write: WriteTensors = write_tensors,
        has_metrics: Callable[[int], bool] = lambda _: True,
        states: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
    ) -> None:
        """`has_metrics`: whether the metrics of an iteration (and those before) are on disk.

        A checkpoint should not be newer than they are, or a run that goes on from it lacks a line.
        `states`: what this rank's calls keep between iterations (`Engine.states`).
        """
        self._folder = checkpoints_folder(out)
        self._plan, self._roles, self._rank = plan, roles, rank
        self._world_size = plan.cluster.num_gpus
        self._store, self._options, self._write_tensors = store, options, write
        self._has_metrics, self._states = has_metrics, states
        # read now: a long run may outlive the folders it began with
        self._configs = {
            role: read_config(plan.experiment.models[role].model) for role in trained_roles(plan)
        }
        everything = shares(stored_of(plan))
        self._pieces: tuple[Piece, ...] = everything.get(rank, ())
        self._snapshot: dict[str, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._last: int | None = None
        self._stop = threading.Event()

    def is_due(self, iteration: int) -> bool:
        """Whether a checkpoint follows iteration `iteration` (counted from 0): on all ranks, or none.

        Every rank asks, once, at its end of each iteration.
        """
        done, every = iteration + 1, self._options.every
        if done == self._plan.experiment.iterations:
            return True
        if every is not None:
            return every > 0 and done % every == 0
        is_free = self._last is None or self._store.check([_whole(self._last)])
        return bool(self._store.compare_set(_choice(done), "", SAVE if is_free else SKIP) == SAVE.encode())

    def check(self) -> None:
        """Raises what the background thread has failed with, if it has."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def save(self, iteration: int) -> None:
        """Takes the state after iteration `iteration`; every rank calls it at its end of that iteration.

        Returns once the state is copied; a thread writes it. Waits for the previous checkpoint first.
        Raises RunError when that one could not be written.
        """
        self._wait()
        before, self._last = self._last, iteration + 1
        snapshot = self._take()
        steps = {name: r.trainer.num_steps for name, r in self._roles.items() if r.trainer is not None}
        counts = {"steps": steps, "states": {call: dict(state) for call, state in self._states().items()}}
        self._pending = self._pool.submit(self._write, iteration + 1, before, snapshot, counts)
        if not self._options.background:
            self._wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()  # the run has failed: do not wait for ranks that may be gone
        try:
            if kind is None:
                self._wait()
        finally:
            self._stop.set()
            self._pool.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _take(self) -> dict[str, torch.Tensor]:
        """Copies this rank's pieces to host buffers, which are kept for the next checkpoint."""
        for name, role in self._roles.items():
            pieces = [piece for piece in self._pieces if piece.role == name]
            if not pieces:
                continue
            states = held_states(role)
            role.memory.wait()
            with role.memory.on_device(), torch.no_grad():  # what waits in host memory comes for a moment
                for piece in pieces:
                    held = states[piece.state]
                    source = held.tensors[piece.param][piece.box.within(held.boxes[piece.param])]
                    if piece.key not in self._snapshot:
                        self._snapshot[piece.key] = _host_buffer(source)
                    self._snapshot[piece.key].copy_(source, non_blocking=True)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        return self._snapshot

    # in the background ------------------------------------------------------------------------

    def _write(
        self,
        done: int,
        before: int | None,
        snapshot: Mapping[str, torch.Tensor],
        counts: Mapping[str, Any],
    ) -> None:
        """This rank's part of the checkpoint after `done` iterations; on rank 0, the rest of it too.

        `before` is the checkpoint before it, if this run has taken one.
        """
        partial = self._folder / partial_name(done)
        needed = sum(tensor.nbytes for tensor in snapshot.values())
        try:
            partial.mkdir(parents=True, exist_ok=True)
            files = self._write_files(partial, snapshot, needed)
            record = {"files": {name: asdict(file) for name, file in files.items()}, **counts}
            self._store.set(_key(done, self._rank), json.dumps(record))
            if self._rank == 0:
                self._commit(done, partial)
                self._forget(done, before)
        except OSError as error:
            message = self._describe(error, partial, needed)
            # what was written makes room for whatever else has to be said
            for path in partial.glob(f"rank-{self._rank}.*"):
                path.unlink(missing_ok=True)
            raise RunError(message) from None

    def _write_files(
        self, partial: Path, snapshot: Mapping[str, torch.Tensor], needed: int
    ) -> Mapping[str, FileRecord]:
        if not self._pieces:
            return {}
        tensors, index = f"rank-{self._rank}.safetensors", f"rank-{self._rank}.json"
        if shutil.disk_usage(partial).free < needed:
            # before the disk is full for everybody else
            raise OSError(errno.ENOSPC, "No space left on device", str(partial / tensors))
        return {
            tensors: self._write_tensors(partial / tensors, snapshot),
            index: write_synced(partial / index, index_text(tensors, self._pieces)),
        }

    def _commit(self, done: int, partial: Path) -> None:
        """Waits until all ranks have written, then makes the folder a checkpoint. On rank 0."""
        keys = [_key(done, rank) for rank in range(self._world_size)]
        while not self._store.check(keys):
            if self._stop.is_set():
                return
            time.sleep(POLL_S)
        deadline = time.monotonic() + METRICS_WAIT_S
        while not (self._has_metrics(done - 1) or self._stop.is_set() or time.monotonic() > deadline):
            time.sleep(POLL_S)
        files: dict[str, FileRecord] = {}
        steps: dict[str, int] = {}
        states: dict[str, Mapping[str, float]] = {}
        for key in keys:
            record = json.loads(self._store.get(key))
            files |= {name: FileRecord(**file) for name, file in record["files"].items()}
            steps |= record["steps"]
            states |= record["states"]  # ranks of a call keep the same
            self._store.delete_key(key)
        write_synced(
            partial / MANIFEST, manifest_text(replace(self._manifest(done, files, steps), states=states))
        )
        sync_folder(partial)
        final = self._folder / name_of(done)
        if final.exists():
            remove_checkpoint(final)
        partial.rename(final)
        sync_folder(self._folder)
        for old in list_checkpoints(self._folder)[: -self._options.keep]:
            remove_checkpoint(old)

    def _forget(self, done: int, before: int | None) -> None:
        """Says that the checkpoint is whole; drops what every rank has read since it wrote its part."""
        self._store.set(_whole(done), "")
        if before is not None:
            self._store.delete_key(_whole(before))
        for iteration in range((before or 0) + 1, done + 1):
            self._store.delete_key(_choice(iteration))

    def _manifest(self, done: int, files: Mapping[str, FileRecord], steps: Mapping[str, int]) -> Manifest:
        plan = self._plan
        roles = {
            name: RoleRecord(config, self._roles[name].shape.head, steps.get(name, 0))
            for name, config in self._configs.items()
        }
        return Manifest(
            iteration=done,
            experiment=experiment_content(replace(plan.experiment, cluster=None)),
            placements={name: str(placement) for name, placement in plan.placements.items()},
            world_size=self._world_size,
            roles=roles,
            files=dict(sorted(files.items())),
        )

    def _describe(self, error: OSError, partial: Path, needed: int) -> str:
        good = list_checkpoints(self._folder)
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = shutil.disk_usage(self._folder).free
            free = f" and {left / 1e6:.2f} MB are free; make room"
        return (
            f"the checkpoint {partial} cannot be written: {error.strerror}: rank {self._rank} needs "
            f"{needed / 1e6:.2f} MB for its part{free}; {last}."
        )


def _key(done: int, rank: int) -> str:
    return f"{done}/{rank}"


def _choice(done: int) -> str:
    """Where the first rank at the end of an iteration says whether a checkpoint follows."""
    return f"{done}/choice"


def _whole(done: int) -> str:
    """Set once the checkpoint is."""
    return f"{done}/whole"


def _host_buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
