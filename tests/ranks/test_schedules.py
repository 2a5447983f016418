"""Pipeline schedules and recomputation compute what one process does, over ragged micro-batches.

Six sequences a mini-batch in 3, 4 or 5 micro-batches of different lengths; actor and critic train
under different schedules in one run.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

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
