"""Offload changes where things wait, not what is computed; and the memory is really given back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch

from realloc.plan import plan_text, read_plan
from runtime.data_store import IterationData
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer, Sums
from runtime.program import compile_program
from runtime.roles import RankRole, load_roles
from runtime.tracing import Recorder
from runtime.worker import make_plan_groups
from tests.ranks.engine import make_plan
from tests.ranks.launch import run_ranks
from tests.ranks.test_plan_invariance import GROUPED, Oracle

# every kind of offload at once, all calls on the same GPUs in different layouts
EVERYWHERE: Mapping[str, tuple[str, str]] = {
    "actor_gen": ("node0", "d2t1p1m2+offload"),
    "rew_inf": ("node0", "d1t2p1+offload"),
    "ref_inf": ("node0", "d1t1p2+offload"),
    "critic_inf": ("node0", "d1t2p1"),
    "actor_train": ("node0", "d1t1p2m2+offload"),
    "critic_train": ("node0", "d1t2p1+offload"),
}
ZERO: Mapping[str, tuple[str, str]] = {
    "actor_gen": ("node0:gpu[0-1]", "d1t2p1+offload"),
    "rew_inf": ("node0:gpu[2-3]", "d1t1p2m2+offload"),
    "ref_inf": ("node0", "d2t2p1+offload"),
    "critic_inf": ("node0", "d4t1p1"),
    "actor_train": ("node0", "d2t2p1m2z1+offload"),
    "critic_train": ("node0", "d2t1p2m2z1+offload"),
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("grouped"), GROUPED)


@pytest.mark.parametrize(("gpus", "placements"), [(2, EVERYWHERE), (4, ZERO)], ids=["everywhere", "zero 1"])
def test_plan_computes_what_one_process_does(
    grouped: Oracle, gpus: int, placements: Mapping[str, tuple[str, str]]
) -> None:
    outcome = grouped.compare(f"offload-{gpus}", gpus, placements)
    assert {"load:ref:ref_inf", "offload:actor:actor_gen"} <= set(outcome.nodes)


def test_memory_is_given_back(grouped: Oracle) -> None:
    plan = make_plan(grouped.folder, grouped.content, 2, EVERYWHERE)
    path = grouped.folder / "watched.yaml"
    path.write_text(plan_text(plan))
    for rank, seen in enumerate(run_ranks(_watch, 2, str(path), timeout_s=120)):
        whole = seen["whole"]
        nodes = [plan.augmented.by_name[name] for name in plan.node_order]
        assert seen["traced"] == [(i, node.name, str(node.kind)) for i in range(2) for node in nodes]
        for iteration, held in seen["held"]:
            at = dict(held)
            # before each node: what is on the device (part -> bytes), all or nothing
            for name, parts in at.items():
                assert all(size in (0, whole[part]) for part, size in parts.items()), (name, parts)
            on = {name: {part for part, size in parts.items() if size} for name, parts in at.items()}
            always = {"critic critic_inf"}  # shared by critic_inf and critic_train
            assert on["actor_gen"] == always | {"actor actor_gen"}, (rank, iteration)
            assert on["load:ref:ref_inf"] == always
            assert on["ref_inf"] == always | {"ref ref_inf"}
            assert on["rew_inf"] == always | {"reward rew_inf"}
            assert on["critic_inf"] == always
            state = {"actor gradients", "actor optimizer"}
            assert on["actor_train"] == always | state | {"actor actor_train"}
            assert on["reallocate:actor:actor_gen"] == always | {"actor actor_train"}
            assert on["critic_train"] >= always | {"critic gradients", "critic optimizer"}
            assert not on["critic_train"] & state


def _watch(rank: int, world_size: int, path: str) -> dict[str, Any]:
    """Bytes of each flat buffer before each instruction of two iterations."""
    plan = read_plan(path)
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    device = torch.device("cpu")
    roles = load_roles(plan, groups, device)
    program = compile_program(plan)
    engine = Engine(plan, program, rank, groups, roles, open_dataset(plan.experiment), device)
    buffers = {part: flat for name, role in roles.items() for part, flat in _buffers(name, role).items()}
    held: list[tuple[int, list[tuple[str, dict[str, int]]]]] = []

    def entering(iteration: int, index: int) -> None:
        if len(held) <= iteration:
            held.append((iteration, []))
        sizes = {part: sum(flat.untyped_storage().nbytes() for flat in f) for part, f in buffers.items()}
        held[iteration][1].append((program.instructions[index].node.name, sizes))

    def report(iteration: int, sums: Sums, data: IterationData) -> None:
        pass

    recorder = Recorder(rank, 0.0)
    engine.run(range(2), recorder, Observer(entering, report))
    whole = {part: sum(flat.numel() * flat.itemsize for flat in f) for part, f in buffers.items()}
    traced = [(record.iteration, record.node, record.kind) for record in recorder.records]
    return {"whole": whole, "held": held, "traced": traced}


def _buffers(name: str, role: RankRole) -> dict[str, tuple[torch.Tensor, ...]]:
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    seen: set[int] = set()
    for call, model in role.by_call.items():
        if id(model.params) not in seen:
            seen.add(id(model.params))
            found[f"{name} {call}"] = (model.params.flat,)
    if role.trainer is not None:
        found |= {f"{name} {cause}": flats for cause, flats in role.trainer.state_buffers.items()}
    return found


def test_frozen_contents_are_copied_once_and_changing_ones_each_time() -> None:
    from runtime.offload import Parked

    frozen, changing, scratch = torch.arange(8.0), torch.arange(8.0), torch.ones(8)
    view = changing[2:6].view(2, 2)
    constant, state = Parked([frozen], [], is_constant=True), Parked([changing], [scratch])
    for step in range(3):
        for parked in (constant, state):
            assert parked.num_bytes == 32 * (1 + (parked is state))
            parked.offload()
            parked.offload()  # nothing happens
            assert parked.num_bytes == 0
            assert not parked.is_on_device
            parked.load()
            parked.load()
            parked.wait()
        assert frozen.tolist() == list(range(8))
        assert changing.tolist() == [i + step for i in range(8)]
        assert view.tolist() == [[2 + step, 3 + step], [4 + step, 5 + step]]  # views stay views
        changing += 1
    assert scratch.shape == (8,)
