"""What is selected is dealt to replicas evenly, and nothing else is."""

from __future__ import annotations

import random

import pytest
import torch

from realloc.dataflow import Call, CallKind, DataKey, Output, Per
from realloc.errors import RunError
from runtime.batching import assign
from runtime.data_store import IterationData
from runtime.parallel import single_rank
from runtime.selection import deal, settle

TRAIN = Call(
    "train",
    CallKind.TRAIN_STEP,
    ("tokens",),
    (),
    "actor",
    "tokens",
    Output.LOGPROBS,
    loss="loss",
    mini_batches=2,
    select="pick",
    selected=4,
)


@pytest.mark.parametrize("together", [1, 2])
def test_replicas_get_as_many_whatever_is_selected(together: int) -> None:
    rng = random.Random(3)
    lengths = [rng.randint(90, 110) for _ in range(64)]
    positions = sorted(rng.sample(range(40), 24))  # all of them in the first part of the batch
    call = Call("train", CallKind.TRAIN_STEP, (), (), mini_batches=2, together=together)
    found = deal(positions, lengths, call, 3)
    assert found.positions == tuple(positions)
    assert [len(share) for shares in found.shares for share in shares] == [4] * 6
    assert {p for share in found.shares[0] for p in share} == set(positions[:12])
    if together == 2:
        pairs = set(zip(positions[0::2], positions[1::2], strict=True))
        for shares in found.shares:
            for share in shares:
                assert set(zip(share[0::2], share[1::2], strict=True)) <= pairs


def test_as_many_as_the_graph_says_may_be_selected() -> None:
    data = IterationData({"tokens": DataKey("tokens", Per.TOKEN, "int64")}, [2] * 6)
    data.lengths["tokens"] = [5, 6, 7, 8, 9, 10]
    data.values["tokens"] = {p: torch.zeros(n) for p, n in enumerate(data.lengths["tokens"])}
    before = assign(data.lengths["tokens"], 1, 1)
    after = settle(TRAIN, single_rank(), data, before, [0, 2, 4])
    assert after.shares == (((0,),), ((2, 4),))
    for chosen in ([], [0, 1, 2, 3, 4]):
        with pytest.raises(RunError, match=f"pick selects {len(chosen)} of this iteration's 6 samples"):
            settle(TRAIN, single_rank(), data, before, chosen)
