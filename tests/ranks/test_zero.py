"""ZeRO stages compute what one process computes, and keep the bytes that they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from realloc.layout import Box
from realloc.plan import plan_text, read_plan
from realloc.strategy import Coordinates
from runtime import zero
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer
from runtime.program import compile_program
from runtime.roles import load_roles
from runtime.tracing import Recorder
from runtime.training import Trainer
from runtime.worker import make_plan_groups
from runtime.zero import unit_of
from tests.ranks.engine import Outcome, assert_same, make_plan, ppo_content, run, write_models
from tests.ranks.launch import run_ranks

ALONE: Mapping[str, tuple[str, str]] = {"*": ("node0", "d1t1p1")}
# one kv head, which tp 2 replicates; its 6 rows and the 34 of the MLP do not divide by dp 4
GROUPED = {"hidden": 24, "layers": 2, "heads": 4, "kv_heads": 1, "ffn": 34}
TIED = {**GROUPED, "tied": True}

# name -> shape, GPUs, call -> (mesh, strategy)
PLANS: Mapping[str, tuple[Mapping[str, Any], int, Mapping[str, tuple[str, str]]]] = {
    "zero 1 and 3 over four, more passes than sequences": (
        GROUPED,
        4,
        {
            "*": ("node0", "d4t1p1"),
            "actor_train": ("node0", "d4t1p1m3z3"),
            "critic_train": ("node0", "d4t1p1z1"),
        },
    ),
    "zero 2 over four, empty replicas": (
        GROUPED,
        4,
        {
            "*": ("node0", "d4t1p1"),
            "actor_train": ("node0", "d4t1p1m3z2"),
            "critic_train": ("node0", "d4t1p1z2"),
        },
    ),
    "tp and pp, tied": (
        TIED,
        8,
        {
            "*": ("node0:gpu[0-3]", "d2t2p1"),
            "actor_train": ("node0", "d2t2p2m2z1"),
            "critic_train": ("node0:gpu[4-7]", "d2t2p1m2z3"),
        },
    ),
    "tied embedding, zero 3 with recomputation, generation elsewhere": (
        TIED,
        4,
        {
            "*": ("node0:gpu[0-1]", "d2t1p1"),
            "actor_train": ("node0:gpu[2-3]", "d2t1p1m2z3+full"),
            "critic_train": ("node0:gpu[0-1]", "d2t1p1m2z2+selective"),
            "critic_inf": ("node0:gpu[2-3]", "d1t2p1"),
        },
    ),
    "tied embedding, zero 2 and tensor parallel": (
        TIED,
        4,
        {
            "*": ("node0", "d2t2p1"),
            "actor_train": ("node0", "d2t2p1m3z2"),
            "critic_train": ("node0", "d2t2p1z3"),
        },
    ),
    "sequence parallel": (
        GROUPED,
        4,
        {
            "*": ("node0", "d2t2p1"),
            "actor_train": ("node0", "d2t2p1m2z3+sp"),
            "critic_train": ("node0", "d2t2p1m2z2+sp+full"),
        },
    ),
}


class Oracle:
    """The single-process run of one model shape, made when first asked for."""

    def __init__(self, folder: Path, shape: Mapping[str, Any], **changes: Any) -> None:
        self.folder = folder
        self.content = ppo_content(folder, write_models(folder, **shape), **changes)
        self.outcome: Outcome = run(make_plan(folder, self.content, 1, ALONE), folder / "alone")

    def run(self, name: str, gpus: int, placements: Mapping[str, tuple[str, str]]) -> Outcome:
        plan = make_plan(self.folder, self.content, gpus, placements)
        return run(plan, self.folder / name.replace(" ", "-"))


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Oracle]:
    # 5 sequences in 2 mini-batches: some of four replicas have none
    changes = {
        "workload": {
            "sequences": 5,
            "prompt_tokens": {"mean": 10, "max": 16},
            "response_tokens": {"mean": 8, "max": 12},
        }
    }
    return {
        tied: Oracle(tmp_path_factory.mktemp("zero"), TIED if tied else GROUPED, **changes)
        for tied in (False, True)
    }


@pytest.mark.parametrize("name", PLANS)
def test_zero_computes_what_one_process_does(oracles: Mapping[bool, Oracle], name: str) -> None:
    shape, gpus, placements = PLANS[name]
    oracle = oracles["tied" in shape]
    assert_same(oracle.run(name, gpus, placements), oracle.outcome)


@dataclass(frozen=True)
class Report:
    """One trained role on one rank after a run."""

    at: Coordinates
    num_bytes: Mapping[str, int]
    num_steps: int
    states: Mapping[str, Mapping[str, NDArray[Any]]]
    boxes: Mapping[str, Box]
    held: Mapping[str, NDArray[Any]]
    held_boxes: Mapping[str, Box]
    most_gathered: int
    """Elements of whole parameters that ZeRO 3 had in memory at once."""
    left_gathered: int


def _train_and_report(rank: int, world_size: int, plan_path: str) -> Mapping[str, Report]:
    """Runs the plan; returns what each trained role keeps on this rank."""
    plan = read_plan(plan_path)
    device = torch.device("cpu")
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    now: dict[int, int] = {}
    most = [0]
    resize = zero._resize

    def record(flat: torch.Tensor, num_elements: int) -> None:
        now[id(flat)] = num_elements
        most[0] = max(most[0], sum(now.values()))
        resize(flat, num_elements)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "_resize", record)
        roles = load_roles(plan, groups, device)
        dataset = open_dataset(plan.experiment)
        most[0] = 0
        engine = Engine(plan, compile_program(plan), rank, groups, roles, dataset, device)
        observer = Observer(lambda *_: None, lambda *_: None)
        engine.run(range(plan.experiment.iterations), Recorder(rank, 0.0), observer)
    reports = {}
    for name in ("actor", "critic"):
        trainer, model = roles[name].trainer, roles[name].home_model
        assert isinstance(trainer, Trainer)
        assert model is not None
        reports[name] = Report(
            model.decoder.context.at,
            dict(trainer.num_bytes),
            trainer.num_steps,
            {s: {n: t.numpy() for n, t in by.items()} for s, by in trainer.optimizer_state().items()},
            trainer.optimizer_boxes,
            {n: t.detach().float().numpy() for n, t in model.params.views.items()},
            model.params.boxes,
            most[0],
            sum(now.values()),
        )
    return reports


Runs = Mapping[str, list[Mapping[str, Report]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """bf16 with masters, one iteration of three steps: alone, and with each stage on dp 2."""
    folder = tmp_path_factory.mktemp("kept")
    content = ppo_content(folder, write_models(folder, **GROUPED), dtype="bfloat16", iterations=1)
    content["hyperparameters"]["mini_batches"] = 3
    # bf16 would carry some tokens across the clipping range, and with it their whole gradient
    content["hyperparameters"] |= {"value_clip_range": 0.0, "clip_range": 100.0}
    result = {}
    for name in ("d1t1p1m2", *(f"d2t1p1m2z{stage}" for stage in range(4))):
        gpus = int(name[1])
        others = ("node0:gpu[0]", "d1t1p1")  # so that all train on the same data, to the bit
        plan = make_plan(
            folder,
            content,
            gpus,
            {"*": others, "actor_train": ("node0", name), "critic_train": ("node0", name)},
        )
        path = folder / f"{name}.yaml"
        path.write_text(plan_text(plan))
        result[name] = run_ranks(_train_and_report, gpus, str(path), timeout_s=120)
    return result


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_states_are_those_of_the_single_process(runs: Runs, role: str) -> None:
    """Masters and moments, put together from the ranks' rows, by parameter name.

    Between one process and many, bf16 rounds other partial sums; so it does between stages 0 and 1, which
    add gradients up in fp32 as they come, and 2 and 3, which reduce each one first. Otherwise only fp32 does.
    """
    alone = runs["d1t1p1m2"][0][role]
    assert set(alone.states) == {"master", "exp_avg", "exp_avg_sq"}
    whole = {stage: _assembled(runs, stage, role) for stage in range(4)}
    for state, wanted in alone.states.items():
        for name, want in wanted.items():
            for stage in range(4):
                _assert_near(whole[stage][state][name], want, 0.006 if state == "master" else 0.1)
                _assert_near(whole[stage][state][name], whole[stage // 2 * 2][state][name], 1e-6)


def _assembled(runs: Runs, stage: int, role: str) -> Mapping[str, Mapping[str, NDArray[Any]]]:
    """State -> parameter -> the whole of it, NaN where no rank has it."""
    alone = runs["d1t1p1m2"][0][role]
    whole = {s: {n: np.full_like(t, np.nan) for n, t in by.items()} for s, by in alone.states.items()}
    for by_role in runs[f"d2t1p1m2z{stage}"]:
        report = by_role[role]
        assert report.num_steps == alone.num_steps == 3
        for state, by_name in report.states.items():
            for name, tensor in by_name.items():
                whole[state][name][report.boxes[name].slices] = tensor
    return whole


def _assert_near(actual: NDArray[Any], want: NDArray[Any], tolerance: float) -> None:
    assert np.linalg.norm(actual - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("stage", range(4))
def test_parameters_are_the_rounded_masters(runs: Runs, stage: int) -> None:
    for by_role in runs[f"d2t1p1m2z{stage}"]:
        for report in by_role.values():
            for name, box in report.boxes.items():
                held = report.held[name][box.within(report.held_boxes[name])]
                master = torch.from_numpy(report.states["master"][name])
                assert np.array_equal(held, master.bfloat16().float().numpy()), name
                assert not np.array_equal(held, master.numpy()), name


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_bytes_kept_shrink_with_the_stage(runs: Runs, role: str) -> None:
    """The table in `runtime.training`: 2 bytes a parameter, 4 a gradient, 12 of optimizer states."""
    sizes = {
        stage: {
            by_role[role].at: sum(box.num_elements for box in by_role[role].boxes.values())
            for by_role in runs[f"d2t1p1m2z{stage}"]
        }
        for stage in (0, 1)
    }
    for stage in range(4):
        for by_role in runs[f"d2t1p1m2z{stage}"]:
            report = by_role[role]
            whole, rows = sizes[0][report.at], sizes[1][report.at]
            assert 0.45 * whole < rows < 0.55 * whole
            assert report.num_bytes == {
                "parameters": 2 * (rows if stage == 3 else whole),
                "gradients": 4 * (rows if stage >= 2 else whole),
                "optimizer": 12 * (rows if stage >= 1 else whole),
            }


def test_whole_parameters_exist_one_unit_at_a_time(runs: Runs) -> None:
    for stage in range(4):
        for by_role in runs[f"d2t1p1m2z{stage}"]:
            actor = by_role["actor"]
            assert actor.left_gathered == 0
            assert (actor.most_gathered > 0) == (stage == 3)
    for by_role in runs["d2t1p1m2z0"]:
        boxes = by_role["actor"].boxes
        units: dict[str, int] = {}
        for name, box in boxes.items():
            units[unit_of(name)] = units.get(unit_of(name), 0) + box.num_elements
        layer = max(size for unit, size in units.items() if unit.startswith("layers."))
        for sharded in runs["d2t1p1m2z3"]:
            assert sharded["actor"].most_gathered <= units["head"] + layer < sum(units.values())
