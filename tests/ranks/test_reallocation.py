"""Reallocation over gloo against a dense copy, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from realloc.augmented import Placement
from realloc.layout import Box, layout, optimizer_layout
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.params import parameters
from realloc.reallocation import STAGING_BYTES, schedule
from realloc.strategy import Strategy, parse_strategy
from runtime.parameters import views_of
from runtime.reallocation import Holding, Reallocator, Staging
from runtime.shared_memory import SharedMemory
from tests.ranks.launch import run_ranks

SHAPE = ModelShape(
    family="llama",
    hidden=24,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=40,
    vocab=53,
    max_positions=16,
)
SHAPES = {
    "gqa": SHAPE,
    "tied": replace(SHAPE, tied_embeddings=True),
    "bias": replace(SHAPE, family="qwen2", qkv_bias=True),
    "three kv heads": replace(SHAPE, num_heads=6, num_kv_heads=3, num_layers=3),
    "critic": replace(SHAPE, head="scalar"),
}


def _place(first: int, size: int, dp: int, tp: int, pp: int) -> Placement:
    return Placement(DeviceMesh(first, size, 4), Strategy(dp, tp, pp))


PAIRS = [
    ("gqa", _place(0, 4, 1, 4, 1), _place(0, 4, 4, 1, 1)),
    ("gqa", _place(0, 4, 4, 1, 1), _place(0, 4, 1, 4, 1)),
    ("tied", _place(0, 4, 2, 1, 2), _place(0, 4, 2, 2, 1)),
    ("tied", _place(0, 4, 1, 2, 2), _place(0, 4, 1, 1, 4)),
    ("gqa", _place(0, 2, 1, 2, 1), _place(2, 2, 2, 1, 1)),
    ("critic", _place(0, 2, 1, 1, 2), _place(2, 2, 1, 2, 1)),
    ("three kv heads", _place(0, 4, 2, 2, 1), _place(0, 4, 4, 1, 1)),
    ("three kv heads", _place(0, 3, 1, 1, 3), _place(0, 4, 1, 4, 1)),
    ("bias", _place(0, 4, 1, 1, 4), _place(0, 4, 1, 2, 2)),
    ("bias", _place(0, 4, 1, 4, 1), _place(1, 1, 1, 1, 1)),
    ("gqa", _place(3, 1, 1, 1, 1), _place(0, 4, 1, 2, 2)),
    ("gqa", _place(0, 4, 2, 2, 1), _place(0, 4, 2, 2, 1)),
]


def _dense(shape: ModelShape, step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(step)
    return {
        spec.name: torch.from_numpy(random.standard_normal(spec.shape, dtype=np.float32)).to(dtype)
        for spec in parameters(shape)
    }


def _hold(boxes: Mapping[str, Box], dtype: torch.dtype, shared: SharedMemory | None = None) -> Holding:
    total = sum(box.num_elements for box in boxes.values())
    flat = shared.empty(total, dtype, torch.device("cpu")) if shared else torch.empty(total, dtype=dtype)
    flat.fill_(torch.nan)
    return Holding(views_of(flat, boxes), boxes)


def _move(
    rank: int,
    world_size: int,
    shape: ModelShape,
    pairs: list[tuple[Placement, Placement]],
    dtypes: tuple[torch.dtype, torch.dtype],
    coalesce_bytes: int,
    staging_bytes: int,
    per_node: int,
    share: bool,
) -> list[int]:
    """Moves new weights three times over every pair; returns the bytes sent over each."""
    sent = []
    shared = SharedMemory() if share else None
    for before, after in pairs:
        a = layout(shape, before.mesh, before.strategy)
        b = layout(shape, after.mesh, after.strategy)
        plan = schedule(a, b, per_node)
        plan.check(a, b, per_node)
        # what is not in shared memory goes by messages
        src = (
            _hold(dict(a.boxes[rank]), dtypes[0], shared if rank != 1 else None) if rank in a.boxes else None
        )
        dst = _hold(dict(b.boxes[rank]), dtypes[1], shared) if rank in b.boxes else None
        mover = Reallocator(
            schedule(a, b, per_node, rank),
            rank,
            src,
            dst,
            src_dtype=dtypes[0],
            dst_dtype=dtypes[1],
            coalesce_bytes=coalesce_bytes,
            max_staging_bytes=staging_bytes,
            shared=shared,
        )
        if rank not in plan.ranks:
            assert mover.sent_bytes == 0
            sent.append(0)
            continue
        for step in range(3):
            dense = _dense(shape, step, dtypes[0])
            if src:
                for param, box in src.boxes.items():
                    src.tensors[param].copy_(dense[param][box.slices])
            count = mover.run()
            assert mover.staging_bytes <= max(staging_bytes, 4000)
            if src:  # a run is over only when nobody reads this rank's tensors any more
                for tensor in src.tensors.values():
                    tensor.fill_(torch.nan)
            if dst:
                for param, box in dst.boxes.items():
                    expected = dense[param][box.slices].to(dtypes[1])
                    assert torch.equal(dst.tensors[param], expected), (before, after, param, step)
        sent.append(count)
    dist.barrier()
    return sent


def _run(
    name: str,
    pairs: list[tuple[Placement, Placement]],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    width: int = 4,
    coalesce_bytes: int = 2000,
    staging_bytes: int = STAGING_BYTES,
    per_node: int = 4,
    share: bool = False,
) -> None:
    options = (dtypes, coalesce_bytes, staging_bytes, per_node, share)
    sent = run_ranks(_move, 4, SHAPES[name], pairs, *options, timeout_s=60)
    for i, (before, after) in enumerate(pairs):
        shape = SHAPES[name]
        a = layout(shape, before.mesh, before.strategy)
        b = layout(shape, after.mesh, after.strategy)
        plan = schedule(a, b, per_node)
        assert [of_rank[i] for of_rank in sent] == [width * plan.sent_elements(r) for r in range(4)]


@pytest.mark.parametrize("name", list(SHAPES))
def test_equals_a_dense_copy(name: str) -> None:
    _run(name, [(src, dst) for shape, src, dst in PAIRS if shape == name])


@pytest.mark.parametrize("share", [False, True])
def test_nodes_get_a_part_once_and_pass_it_on(share: bool) -> None:
    """Nodes of two ranks: relays, and copies through shared memory beside messages."""
    pairs = [(src, dst) for shape, src, dst in PAIRS if shape == "gqa"]
    pairs += [
        (_place(0, 2, 1, 2, 1), _place(2, 2, 1, 1, 2)),
        (_place(0, 4, 1, 2, 2), Placement(DeviceMesh(0, 4, 4), Strategy(4, zero=3))),
        (Placement(DeviceMesh(0, 4, 4), Strategy(2, 2, zero=3)), _place(0, 4, 4, 1, 1)),
    ]
    _run("gqa", pairs, per_node=2, share=share, dtypes=(torch.float32, torch.bfloat16), width=2)


@pytest.mark.parametrize(
    ("coalesce_bytes", "staging_bytes"), [(0, 1 << 20), (1 << 30, 1 << 20), (0, 2000), (400, 1000)]
)
def test_messages_and_rounds_do_not_change_the_result(coalesce_bytes: int, staging_bytes: int) -> None:
    pairs = [(src, dst) for name, src, dst in PAIRS if name == "gqa"]
    _run("gqa", pairs, coalesce_bytes=coalesce_bytes, staging_bytes=staging_bytes)


@pytest.mark.parametrize(
    ("dtypes", "width"),
    [
        ((torch.float32, torch.bfloat16), 2),
        ((torch.bfloat16, torch.float32), 2),
        ((torch.float16, torch.bfloat16), 2),
    ],
)
def test_a_change_of_dtype_travels_narrow(dtypes: tuple[torch.dtype, torch.dtype], width: int) -> None:
    pairs = [(src, dst) for name, src, dst in PAIRS if name == "tied"]
    _run("tied", pairs, dtypes, width)


def _parameters_with_gradients(rank: int, world_size: int) -> bool:
    before, after = _place(0, 2, 1, 2, 1), _place(0, 2, 2, 1, 1)
    a = layout(SHAPE, before.mesh, before.strategy)
    b = layout(SHAPE, after.mesh, after.strategy)
    dense = _dense(SHAPE, 0, torch.float32)
    src = Holding(
        {p: dense[p][x.slices].clone().requires_grad_() for p, x in a.boxes[rank].items()}, a.boxes[rank]
    )
    dst = _hold(dict(b.boxes[rank]), torch.float32)
    mover = Reallocator(schedule(a, b, 4), rank, src, dst, src_dtype=torch.float32, dst_dtype=torch.float32)
    mover.run()
    for tensor in src.tensors.values():
        tensor.data.mul_(2)  # as an optimizer would, in place
    mover.run()
    return all(torch.equal(dst.tensors[p], 2 * dense[p]) for p in dense)


def test_trained_parameters_are_read_in_place() -> None:
    assert run_ranks(_parameters_with_gradients, 2) == [True, True]


def _states(rank: int, world_size: int, pairs: list[tuple[Placement, Placement]]) -> None:
    """Moves two states of an optimizer over every pair, one of them into another dtype."""
    dtypes = {"exp_avg": (torch.float32, torch.bfloat16), "exp_avg_sq": (torch.float32, torch.float32)}
    dense = {state: _dense(SHAPE, seed, torch.float32) for seed, state in enumerate(dtypes)}
    for before, after in pairs:
        a = optimizer_layout(SHAPE, before.mesh, before.strategy)
        b = optimizer_layout(SHAPE, after.mesh, after.strategy)
        schedule(a, b, 2).check(a, b, 2)
        src = {s: _hold(a.boxes[rank], d) for s, (d, _) in dtypes.items() if rank in a.boxes}
        dst = {s: _hold(b.boxes[rank], d) for s, (_, d) in dtypes.items() if rank in b.boxes}
        for state, holding in src.items():
            for param, box in holding.boxes.items():
                holding.tensors[param].copy_(dense[state][param][box.slices])
        copies, staging = schedule(a, b, 2, rank), Staging(torch.device("cpu"))
        for state, (old, new) in dtypes.items():
            held = src.get(state), dst.get(state)
            Reallocator(copies, rank, *held, src_dtype=old, dst_dtype=new, staging=staging).run()
        for state, holding in dst.items():
            for param, box in holding.boxes.items():
                expected = dense[state][param][box.slices].to(dtypes[state][1])
                assert torch.equal(holding.tensors[param], expected), (before, after, state, param)


def test_optimizer_states_move_between_any_split() -> None:
    def place(text: str, first: int = 0) -> Placement:
        strategy = parse_strategy(text, "test")
        return Placement(DeviceMesh(first, strategy.size, 4), strategy)

    pairs = [
        (place("d2t1p2z1"), place("d4t1p1z3")),
        (place("d4t1p1z3"), place("d2t2p1z2")),
        (place("d2t2p1z2"), place("d1t1p1", 3)),
        (place("d1t1p4"), place("d4t1p1z1")),
        (place("d1t2p2+i2"), place("d2t1p2z1")),
        (place("d2t1p1z1"), place("d2t1p1z3", 2)),
    ]
    run_ranks(_states, 4, pairs)
