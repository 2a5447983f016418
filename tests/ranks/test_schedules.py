"""Pipeline schedules and recomputation compute what one process does, over ragged micro-batches,
and ranks wait for each other as long as the cost model says.

Six sequences a mini-batch in 3, 4 or 5 micro-batches of different lengths; actor and critic train
under different schedules in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from realloc.mesh import DeviceMesh
from realloc.pipeline_schedule import Pipeline, makespan
from realloc.strategy import Schedule, Strategy
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.linear import WeightGradients
from runtime.parallel import ParallelContext
from runtime.pipeline import MicroBatch, run_training
from tests.ranks.launch import run_ranks
from tests.ranks.test_plan_invariance import GROUPED, SINGLE_KV, Oracle

# name -> GPUs, strategy of actor_train, strategy of critic_train
PLANS: Mapping[str, tuple[int, str, str]] = {
    "two stages": (2, "d1t1p2m5+zb", "d1t1p2m3+gpipe"),
    "two stages of two chunks": (2, "d1t1p2m3+i2", "d1t1p2m5+i2+selective"),
    "four stages": (4, "d1t1p4m5+zb+full", "d1t1p4m3+gpipe+selective"),
    "tensor and pipeline": (4, "d1t2p2m5+i2+full", "d1t2p2m3+zb+selective"),
    "data and pipeline": (4, "d2t1p2m2+zb", "d2t1p2m3z1+i2"),
    "sequence parallel": (4, "d1t2p2m4+sp+zb+full", "d1t2p2m3+sp+i2+selective"),
}
TIED_PLANS: Mapping[str, tuple[int, str, str]] = {
    "tied, one kv head": (4, "d1t2p2m3+i2", "d1t2p2m4+zb"),
}
RECOMPUTE: Mapping[str, tuple[int, str, str]] = {
    "tensor parallel": (2, "d1t2p1m3+full", "d1t2p1m2+selective"),
    "parameters split": (2, "d2t1p1m2z3+full", "d2t1p1m2z3+selective"),
}


def placements(actor: str, critic: str) -> Mapping[str, tuple[str, str]]:
    return {
        "*": ("node0:gpu[0]", "d1t1p1"),
        "actor_train": ("node0", actor),
        "critic_train": ("node0", critic),
    }


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("grouped"), GROUPED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("tied"), SINGLE_KV)


@pytest.mark.parametrize("name", [*PLANS, *RECOMPUTE])
def test_training_equals_one_process(grouped: Oracle, name: str) -> None:
    gpus, actor, critic = {**PLANS, **RECOMPUTE}[name]
    grouped.compare(name, gpus, placements(actor, critic))


@pytest.mark.parametrize("name", TIED_PLANS)
def test_tied_embeddings_equal_one_process(tied: Oracle, name: str) -> None:
    gpus, actor, critic = TIED_PLANS[name]
    tied.compare(name, gpus, placements(actor, critic))


FORWARD, BACKWARD, WEIGHT = 3.0, 4.0, 2.0


class Clock:
    """Stands in for a decoder: a pass advances the rank's time, and hidden states carry the time."""

    def __init__(self, context: ParallelContext) -> None:
        strategy = context.strategy
        self.now = 0.0
        self.shape, self.dtype = SimpleNamespace(hidden=1), torch.float32
        self.weight_gradients = WeightGradients() if strategy.schedule is Schedule.ZERO_BUBBLE else None
        self._first, self._last = context.is_first, context.is_last
        self._last_chunk = strategy.virtual_stages - 1
        self._leaf = torch.zeros(1, requires_grad=True)

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens

    def embeds(self, chunk: int) -> bool:
        return self._first and chunk == 0

    def ends(self, chunk: int) -> bool:
        return self._last and chunk == self._last_chunk

    def forward(self, entry: torch.Tensor, packed: Any, chunk: int) -> torch.Tensor:
        result: torch.Tensor = _Pass.apply(entry.float(), self._leaf, self)
        return result

    def spend(self, took: float) -> None:
        self.now += took

    def advance(self, arrived: torch.Tensor, took: float) -> torch.Tensor:
        self.now = max(self.now, arrived.max().item())
        self.spend(took)
        return torch.full_like(arrived, self.now)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entry: torch.Tensor, leaf: torch.Tensor, clock: Clock) -> torch.Tensor:
        ctx.clock = clock
        return clock.advance(entry, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        clock: Clock = ctx.clock
        later = clock.weight_gradients
        if later is None:
            return clock.advance(grads[0], BACKWARD + WEIGHT), None, None
        later.add(lambda: clock.spend(WEIGHT))
        return clock.advance(grads[0], BACKWARD), None, None


CLOCKED = [
    (Schedule.GPIPE, 1, 7),
    (Schedule.ONE_F_ONE_B, 1, 2),
    (Schedule.ONE_F_ONE_B, 1, 9),
    (Schedule.INTERLEAVED, 2, 3),
    (Schedule.INTERLEAVED, 3, 11),
    (Schedule.ZERO_BUBBLE, 1, 3),
    (Schedule.ZERO_BUBBLE, 1, 9),
]


def clocked(rank: int, world_size: int) -> list[float]:
    """This rank's time after each of CLOCKED."""
    times = []
    for schedule, virtual, number in CLOCKED:
        strategy = Strategy(pp=world_size, schedule=schedule, virtual_stages=virtual)
        mesh = DeviceMesh(0, world_size, world_size)
        context = ParallelContext(mesh, strategy, rank, strategy.coordinates(rank), torch.device("cpu"))
        clock = Clock(context)
        lengths = [1 + 5 * i % 7 for i in range(number)]
        batches = [MicroBatch((i,), pack([n]), torch.zeros(n, 1)) for i, n in enumerate(lengths)]
        run_training(cast("Decoder", clock), context, batches, lambda hidden, _: 0.0 * hidden.sum())
        times.append(clock.now)
    return times


def test_ranks_take_as_long_as_is_priced() -> None:
    """Over real messages, in a time that passes only when a rank computes or waits for another."""
    ended = run_ranks(clocked, 4)
    for (schedule, virtual, number), *times in zip(CLOCKED, *ended, strict=True):
        priced = makespan(Pipeline(schedule, 4, virtual, number), FORWARD, BACKWARD, WEIGHT)
        assert max(times) == priced, (schedule, virtual, number)
