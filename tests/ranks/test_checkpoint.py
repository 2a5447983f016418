"""Checkpoints on ranks: a resumed run is the undisturbed one, bit for bit or under another plan.

Two iterations, a checkpoint, two more in new processes; compared with four at once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from realloc.plan import ExecutionPlan, plan_text, read_plan
from runtime.checkpoint import SaveOptions, Saver, WriteTensors
from runtime.checkpoint_files import checkpoints_folder, choose, list_checkpoints, read_manifest, verify
from runtime.checkpoint_shares import trained_roles
from runtime.data_store import IterationData
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer, Sums
from runtime.export import export_checkpoint
from runtime.metrics import combine
from runtime.program import compile_program
from runtime.restore import check_resumable, restore
from runtime.roles import load_roles
from runtime.tensor_file import FileRecord, write_tensors
from runtime.tracing import Recorder
from runtime.worker import export_models, make_plan_groups, reporting_ranks
from tests.ranks.engine import (
    Outcome,
    assert_same,
    checkpoint_names,
    make_plan,
    ppo_content,
    read_weights,
    write_models,
)
from tests.ranks.launch import RankFailure, run_ranks

TOTAL, STOP = 4, 2
SHAPE = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "tied": True}
# whatever keeps numbers between iterations
KEEPING = {"kl_target": 0.02, "kl_horizon": 20, "score_normalization": "running", "critic_warmup": 1}
DETAILS = {"whiten_rewards": True, "missing_eos_penalty": 0.5, "ref_ema_decay": 0.6}
CHANGES = {"hyperparameters": {"mini_batches": 2, "epochs": 1, **KEEPING, **DETAILS}}
Placements = Mapping[str, tuple[str, str]]

SAME_PLAN: Placements = {
    "*": ("node0", "d2t2p1"),
    "actor_gen": ("node0:gpu[0-1]", "d2t1p1"),
    "actor_train": ("node0", "d2t1p2m2z1"),
    "critic_train": ("node0:gpu[2-3]", "d2t1p1z3+offload"),
}
OTHER_PLANS: Mapping[str, tuple[int, Placements]] = {
    "one rank": (1, {"*": ("node0", "d1t1p1")}),
    "other splits, generation away from home": (
        2,
        {
            "*": ("node0", "d1t2p1"),
            "actor_gen": ("node0:gpu[1]", "d1t1p1"),
            "actor_train": ("node0", "d2t1p1z2+offload"),
            "critic_train": ("node0", "d1t1p2m2"),
        },
    ),
}


class Workplace:
    """Models, a plan of four iterations, and its undisturbed run, which left checkpoints after 2 and 4."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        optimizer = {"learning_rate": 2e-3, "eps": 1e-5, "warmup_steps": 3, "decay": "cosine"}
        self.content = ppo_content(
            folder, write_models(folder, **SHAPE), iterations=TOTAL, **(CHANGES | changes)
        )
        for role in ("actor", "critic"):
            self.content["models"][role]["optimizer"] = optimizer
        self.plan = make_plan(folder, self.content, 4, SAME_PLAN)
        self.out = folder / "whole"
        self.whole = run_part(self.plan, self.out, 0, TOTAL, save=SaveOptions(every=STOP, keep=2))

    def resume(self, plan: ExecutionPlan, name: str) -> Outcome:
        checkpoint, manifest = choose(self.out, f"iteration-{STOP}")
        assert manifest.iteration == STOP
        check_resumable(checkpoint, manifest, plan)
        return run_part(plan, self.folder / name, STOP, TOTAL, checkpoint=checkpoint)

    @property
    def expected(self) -> Outcome:
        """What a run resumed after two iterations has to compute."""
        return replace(self.whole, metrics=self.whole.metrics[STOP:], tokens=self.whole.tokens[STOP:])


def run_part(
    plan: ExecutionPlan,
    folder: Path,
    first: int,
    stop: int,
    *,
    save: SaveOptions | None = None,
    checkpoint: Path | None = None,
    write: WriteTensors = write_tensors,
) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(plan_text(plan))
    results = run_ranks(
        _rank, plan.cluster.num_gpus, str(folder), range(first, stop), save, checkpoint, write, timeout_s=120
    )
    tokens: list[dict[int, tuple[int, ...]]] = [{} for _ in range(first, stop)]
    for result in results:
        for number, sequences in enumerate(result["tokens"]):
            tokens[number].update(sequences)
    metrics = tuple(
        combine(result["sums"][number] for result in results if result["reports"])
        for number in range(stop - first)
    )
    weights = {role.name: read_weights(role) for role in (folder / "models").iterdir()}
    return Outcome(metrics, tuple(tokens), weights, plan.node_order)


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    iterations: range,
    save: SaveOptions | None,
    checkpoint: Path | None,
    write: WriteTensors,
) -> dict[str, Any]:
    out = Path(folder)
    plan = read_plan(out / "plan.yaml")
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    device = torch.device("cpu")
    roles = load_roles(plan, groups, device)
    if checkpoint is not None:
        restore(checkpoint, roles, trained_roles(plan))
    engine = Engine(plan, compile_program(plan), rank, groups, roles, open_dataset(plan.experiment), device)
    if checkpoint is not None:
        engine.resume(read_manifest(checkpoint).states)
    sums_by_iteration: list[Sums] = []
    tokens: list[dict[int, tuple[int, ...]]] = []
    store = dist.FileStore(str(out / "store"), world_size)
    options, states = save or SaveOptions(every=0), lambda: engine.states
    saver = Saver(out, plan, roles, rank, store, options, write, states=states)

    def report(iteration: int, sums: Sums, data: IterationData) -> None:
        sums_by_iteration.append(sums)
        tokens.append({p: tuple(t.tolist()) for p, t in data.values.get("tokens", {}).items()})
        if save is not None and saver.is_due(iteration):
            saver.save(iteration)

    with saver:
        engine.run(iterations, Recorder(rank, 0.0), Observer(lambda *_: saver.check(), report))
    export_models(plan, roles, out / "models", rank)
    return {"sums": sums_by_iteration, "tokens": tokens, "reports": rank in reporting_ranks(plan)}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("checkpoint"))


def assert_identical(actual: Outcome, expected: Outcome) -> None:
    assert actual.tokens == expected.tokens
    assert actual.metrics == expected.metrics
    for role, tensors in expected.weights.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(actual.weights[role][name], tensor, err_msg=f"{role} {name}")


def test_same_plan_resumes_bit_for_bit(workplace: Workplace) -> None:
    assert workplace.whole.metrics[0] != workplace.whole.metrics[STOP]
    assert_identical(workplace.resume(workplace.plan, "resumed"), workplace.expected)
    kept = verify(checkpoints_folder(workplace.out) / f"iteration-{STOP}").states
    names = {"kl_coef", "score_count", "score_mean", "score_squares"}
    assert kept["critic_train"].keys() == names
    assert kept["actor_train"].keys() == names | {"iterations"}


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_another_plan_goes_on_with_the_same_run(workplace: Workplace, name: str) -> None:
    gpus, placements = OTHER_PLANS[name]
    plan = make_plan(workplace.folder, workplace.content, gpus, placements)
    assert_same(workplace.resume(plan, name.replace(" ", "-")), workplace.expected)


def test_newest_checkpoint_is_the_final_state(workplace: Workplace) -> None:
    folder = checkpoints_folder(workplace.out)
    assert [path.name for path in sorted(folder.iterdir())] == ["iteration-2", "iteration-4"]
    for role in ("actor", "critic"):
        model = workplace.folder / f"exported-{role}"
        export_checkpoint(workplace.out, model, iteration=None, role=role)
        got, want = read_weights(model), workplace.whole.weights[role]
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            np.testing.assert_array_equal(got[name], tensor)
        for file in ("config.json", "tokenizer.json"):
            ours = (model / file).read_text()
            assert ours == (workplace.out / "models" / role / file).read_text()


def test_every_element_is_stored_once_and_replicas_share_the_work(workplace: Workplace) -> None:
    """Three fp32 states of both trained roles, and no rank with much more than its part of what it could."""
    manifest = verify(checkpoints_folder(workplace.out) / f"iteration-{STOP}")
    stored = {name: file.num_bytes for name, file in manifest.files.items() if name.endswith("tensors")}
    graph, experiment = workplace.plan.graph, workplace.plan.experiment
    sizes = {
        role: size * experiment.role_shape(graph, role).num_params
        for role, size in (("actor", 12), ("critic", 12), ("ref", 4))  # a moving average has weights alone
    }
    headers = 20_000 * len(stored)
    assert sum(sizes.values()) < sum(stored.values()) < sum(sizes.values()) + headers
    # ranks 2 and 3 write all of the critic, and with 0 and 1 the actor
    assert max(stored.values()) < 0.6 * sum(sizes.values())


def test_bfloat16_with_masters_resumes_bit_for_bit(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path, dtype="bfloat16")
    assert_identical(workplace.resume(workplace.plan, "resumed"), workplace.expected)
    kept = verify(checkpoints_folder(workplace.out) / f"iteration-{STOP}").states
    names = {"kl_coef", "score_count", "score_mean", "score_squares"}
    assert kept["critic_train"].keys() == names
    assert kept["actor_train"].keys() == names | {"iterations"}


@dataclass(frozen=True)
class FullDisk:
    """Writes as a disk does that has no room for rank 1's part of one checkpoint."""

    checkpoint: int

    def __call__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
        if path.name == "rank-1.safetensors" and path.parent.name == f".iteration-{self.checkpoint}.partial":
            path.write_bytes(b"begun")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_tensors(path, tensors)


def test_full_disk_fails_the_run_and_leaves_the_last_good_one(workplace: Workplace, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, workplace.content, 2, {"*": ("node0", "d2t1p1")})
    with pytest.raises(RankFailure) as caught:
        run_part(plan, tmp_path, 0, TOTAL, save=SaveOptions(every=1), write=FullDisk(2))
    assert (caught.value.rank, caught.value.error) == (1, "RunError")
    text = str(caught.value)
    assert ".iteration-2.partial cannot be written: No space left on device" in text
    assert "rank 1 needs 0." in text
    assert "the last good checkpoint is" in text
    assert checkpoint_names(tmp_path) == ["iteration-1"]
    verify(checkpoints_folder(tmp_path) / "iteration-1")
    assert not list(checkpoints_folder(tmp_path).glob(".*/rank-1.*"))


@dataclass(frozen=True)
class SlowDisk:
    """Takes a while for rank 1's part: about as long as a few iterations do."""

    def __call__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
        if path.name == "rank-1.safetensors":
            time.sleep(0.5)
        return write_tensors(path, tensors)


def test_ranks_agree_on_what_to_save(workplace: Workplace, tmp_path: Path) -> None:
    """On meshes that drift apart, and a disk that is slow for one of them."""
    placements = {"*": ("node0:gpu[0]", "d1t1p1"), "critic_train": ("node0:gpu[1]", "d1t1p1")}
    plan = make_plan(tmp_path, workplace.content, 2, placements)
    run_part(plan, tmp_path, 0, TOTAL, save=SaveOptions(keep=TOTAL), write=SlowDisk())
    found = checkpoint_names(tmp_path)
    assert found[0] == "iteration-1"
    assert found[-1] == f"iteration-{TOTAL}"
    for checkpoint in list_checkpoints(checkpoints_folder(tmp_path)):
        verify(checkpoint)
