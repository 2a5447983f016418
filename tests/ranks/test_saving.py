"""How one rank saves: beside training, never waiting for a disk unless told to, and whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.distributed as dist

from realloc.plan import plan_text, read_plan
from runtime.checkpoint import SaveOptions, Saver, WriteTensors
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints, verify
from runtime.roles import load_roles
from runtime.tensor_file import FileRecord, write_tensors
from runtime.worker import make_plan_groups
from tests.ranks.engine import checkpoint_names, make_plan, ppo_content, write_models
from tests.ranks.launch import RankFailure, run_ranks

TOTAL = 4
ALONE = {"*": ("node0", "d1t1p1")}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saving")
    shape = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "tied": True}
    return ppo_content(folder, write_models(folder, **shape), iterations=TOTAL)


def test_training_goes_on_while_a_slow_disk_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    """The disk takes 1.5 s: only the second checkpoint has to wait for the first."""
    plan = make_plan(tmp_path, content, 1, ALONE)
    blocked = run_ranks(_save_slowly, 1, str(tmp_path), plan_text(plan), timeout_s=60)[0]
    assert blocked[0] < 0.75
    assert blocked[1] > 0.75
    assert checkpoint_names(tmp_path) == ["iteration-2"]


def _save_slowly(rank: int, _: int, folder: str, text: str) -> list[float]:
    """Seconds that `save` takes after the first iteration, and at once after the second."""

    def slow(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
        time.sleep(1.5)
        return write_tensors(path, tensors)

    seconds = []
    with _lone_saver(rank, Path(folder), text, slow) as saver:
        for iteration in range(2):
            began = time.monotonic()
            saver.save(iteration)
            seconds.append(time.monotonic() - began)
    return seconds


def test_nobody_waits_for_a_disk_unless_told_to(content: dict[str, Any], tmp_path: Path) -> None:
    """By default an iteration that ends while the last checkpoint is being written goes without one."""
    plan = make_plan(tmp_path, content, 1, ALONE)
    due = run_ranks(_save_when_free, 1, str(tmp_path), plan_text(plan), timeout_s=60)[0]
    # the third comes while the second is written, the last waits for it
    assert due == [True, True, False, True]
    assert checkpoint_names(tmp_path) == ["iteration-4"]


def _save_when_free(rank: int, _: int, folder: str, text: str) -> list[bool]:
    """Which of four iterations are followed by a checkpoint, when the disk is stuck during the third."""
    stuck, freed = threading.Event(), threading.Event()

    def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
        if path.parent.name == ".iteration-2.partial":
            stuck.set()
            assert freed.wait(30)
        return write_tensors(path, tensors)

    due = []
    with _lone_saver(rank, Path(folder), text, write, every=None) as saver:
        for iteration in range(TOTAL):
            if iteration == 1:
                while not checkpoint_names(Path(folder)):
                    time.sleep(0.01)
                time.sleep(0.1)  # from its renaming until it is said to be whole
            if iteration == 3:
                freed.set()
            due.append(saver.is_due(iteration))
            if due[-1]:
                saver.save(iteration)
            if iteration == 1:
                assert stuck.wait(30)
    return due


def _lone_saver(rank: int, out: Path, text: str, write: WriteTensors, every: int | None = 1) -> Saver:
    (out / "plan.yaml").write_text(text)
    plan = read_plan(out / "plan.yaml")
    roles = load_roles(plan, make_plan_groups(plan, rank, timedelta(seconds=60)), torch.device("cpu"))
    store = dist.FileStore(str(out / "store"), 1)
    return Saver(out, plan, roles, rank, store, SaveOptions(every, keep=1), write)


# moment -> function to die in, the last part of its path argument then, the checkpoints that are left
MOMENTS: Mapping[str, tuple[str, str, list[str]]] = {
    "a file is written but not synced": ("os.fsync", "", ["iteration-1"]),
    "the manifest is to be written": ("runtime.checkpoint.write_synced", "manifest.json", ["iteration-1"]),
    "it is to be renamed": ("runtime.checkpoint.sync_folder", ".iteration-2.partial", ["iteration-1"]),
    "it was renamed": ("runtime.checkpoint.sync_folder", "checkpoints", ["iteration-1", "iteration-2"]),
    "the old one is half removed": ("shutil.rmtree", ".iteration-1.removed", ["iteration-2"]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_leaves_whole_checkpoints(
    content: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    function, argument, left = MOMENTS[moment]
    plan = make_plan(tmp_path, content, 1, ALONE)
    with pytest.raises(RankFailure) as caught:
        run_ranks(_save_and_die, 1, str(tmp_path), plan_text(plan), function, argument, timeout_s=60)
    assert caught.value.error == "SIGKILL"
    assert checkpoint_names(tmp_path) == left
    for checkpoint in list_checkpoints(checkpoints_folder(tmp_path)):
        verify(checkpoint)


def _save_and_die(rank: int, _: int, folder: str, text: str, function: str, argument: str) -> None:
    """Saves a checkpoint, and dies while it saves the next, when `function` is called with that path."""

    def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
        if path.parent.name == ".iteration-2.partial":
            owner, _, name = function.rpartition(".")
            module = resolve_name(owner)
            setattr(module, name, DieOn(getattr(module, name), argument))
        return write_tensors(path, tensors)

    with _lone_saver(rank, Path(folder), text, write) as saver:
        for iteration in range(2):
            saver.save(iteration)


@dataclass(frozen=True)
class DieOn:
    """Stands for a function and kills the process when it is to act on this path ("": on any)."""

    function: Callable[..., Any]
    name: str

    def __call__(self, path: Any, *args: Any, **named: Any) -> Any:
        if not self.name or Path(path).name == self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(path, *args, **named)
