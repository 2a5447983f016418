"""The messages that stages of a real run exchange would all meet on a backend without tags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from realloc.errors import PlanError
from realloc.plan import read_plan
from runtime.channels import Channel, Channels
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer
from runtime.program import compile_program
from runtime.roles import load_roles
from runtime.tracing import Recorder
from runtime.worker import make_plan_groups
from tests.ranks.engine import make_plan, ppo_content, write_models
from tests.ranks.launch import run_ranks
from tests.rendezvous import Operation, check_rendezvous

STAGES = 3


@dataclass(frozen=True)
class Recording(Channels):
    """Channels that remember what went through them, numbered as NCCL's groups would be."""

    steps: list[Operation] = field(default_factory=list)

    def send(self, tensor: torch.Tensor, rank: int, channel: Channel) -> dist.Work:
        number = 2 * channel + (dist.get_rank() < rank)
        self.steps.append(Operation(rank, True, number, tensor.numel()))
        return super().send(tensor, rank, channel)

    def receive(self, buffer: torch.Tensor, rank: int, channel: Channel) -> torch.Tensor:
        number = 2 * channel + (rank < dist.get_rank())
        self.steps.append(Operation(rank, False, number, buffer.numel()))
        return super().receive(buffer, rank, channel)

    def to_come(
        self, make: Callable[[], torch.Tensor], rank: int, channel: Channel
    ) -> Callable[[], torch.Tensor]:
        number = 2 * channel + (rank < dist.get_rank())
        arrived = super().to_come(make, rank, channel)

        def received() -> torch.Tensor:
            tensor = arrived()
            # where groups are channels, it is only now received
            self.steps.append(Operation(rank, False, number, tensor.numel()))
            return tensor

        return received


def test_generation_inference_and_training_meet(tmp_path: Path) -> None:
    models = write_models(tmp_path, hidden=32, layers=6, heads=4, kv_heads=2, ffn=48)
    placements = {
        "*": ("node0", f"d1t1p{STAGES}m4"),
        "actor_train": ("node0", f"d1t1p{STAGES}m4+i2"),
        "critic_train": ("node0", f"d1t1p{STAGES}m4+zb"),
    }
    plan = make_plan(tmp_path, ppo_content(tmp_path, models, iterations=1), STAGES, placements)
    steps = dict(enumerate(run_ranks(_rank, STAGES, str(tmp_path / "plan.yaml"), timeout_s=120)))
    assert plan.cluster.num_gpus == STAGES
    assert {operation.channel for own in steps.values() for operation in own} == {0, 1, 2, 3}
    check_rendezvous(steps)
    one = {rank: [replace(operation, channel=0) for operation in own] for rank, own in steps.items()}
    with pytest.raises(PlanError, match="messages:"):
        check_rendezvous(one)


def _rank(rank: int, _: int, path: str) -> list[Operation]:
    plan = read_plan(path)
    channels = Recording()
    groups = replace(make_plan_groups(plan, rank, timedelta(seconds=60)), channels=channels)
    device = torch.device("cpu")
    roles = load_roles(plan, groups, device)
    engine = Engine(plan, compile_program(plan), rank, groups, roles, open_dataset(plan.experiment), device)
    engine.run(range(1), Recorder(rank, 0.0), Observer(lambda *_: None, lambda *_: None))
    return channels.steps
