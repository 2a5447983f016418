"""Schedules of reallocations against a dense copy, an independent lower bound, and the summary."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realloc import routes, traffic
from realloc.augmented import Placement
from realloc.layout import Box, Layout, layout
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.model_zoo import named_shapes
from realloc.params import parameters
from realloc.reallocation import (
    Copy,
    Schedule,
    lower_bound,
    node_lower_bound,
    schedule,
    schedule_bytes,
    staging_bytes,
)
from realloc.routes import ScheduleError
from realloc.strategy import Strategy

GPUS_PER_NODE = 4


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    family = draw(st.sampled_from(["llama", "qwen2", "gpt_neox"]))
    return ModelShape(
        family=family,
        hidden=draw(st.integers(1, 6)),
        num_layers=draw(st.integers(1, 5)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2,
        ffn_dim=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 11)),
        max_positions=8,
        norm="layer" if family == "gpt_neox" else "rms",
        gated_mlp=family != "gpt_neox",
        qkv_bias=family != "llama",
        tied_embeddings=draw(st.booleans()),
        head=draw(st.sampled_from(["lm", "lm", "scalar"])),
    )


@st.composite
def placements(draw: st.DrawFn, shape: ModelShape) -> Placement:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    starts = range(0, 12 - size + 1, size if size < GPUS_PER_NODE else GPUS_PER_NODE)
    mesh = DeviceMesh(draw(st.sampled_from(starts)), size, GPUS_PER_NODE)
    degrees = [
        (dp, tp, size // dp // tp)
        for dp in range(1, size + 1)
        for tp in range(1, size + 1)
        if size % (dp * tp) == 0 and size // dp // tp <= shape.num_layers
    ]
    dp, tp, pp = draw(st.sampled_from(degrees))
    # any combination: layouts of optimizer states are cut by rows on pipelines, too
    zero = draw(st.sampled_from([0, 0, 3])) if dp > 1 else 0
    virtual = draw(st.integers(1, shape.num_layers // pp))
    return Placement(mesh, Strategy(dp, tp, pp, zero=zero, virtual_stages=virtual))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelShape, Placement, Placement]:
    shape = draw(shapes())
    return shape, draw(placements(shape)), draw(placements(shape))


def _layouts(case: tuple[ModelShape, Placement, Placement]) -> tuple[Layout, Layout]:
    shape, src, dst = case
    return layout(shape, src.mesh, src.strategy), layout(shape, dst.mesh, dst.strategy)


def _dense(shape: ModelShape) -> dict[str, np.ndarray]:
    """Every element of every parameter with a value of its own."""
    dense, first = {}, 0
    for spec in parameters(shape):
        dense[spec.name] = np.arange(first, first + spec.num_elements).reshape(spec.shape)
        first += spec.num_elements
    return dense


@settings(max_examples=300, deadline=None)
@given(cases())
def test_copies_give_what_a_dense_copy_gives(case: tuple[ModelShape, Placement, Placement]) -> None:
    src, dst = _layouts(case)
    dense = _dense(case[0])
    plan = schedule(src, dst, GPUS_PER_NODE)
    before = {r: {p: dense[p][b.slices] for p, b in bs.items()} for r, bs in src.boxes.items()}
    after = {r: {p: np.full(b.shape, -1) for p, b in bs.items()} for r, bs in dst.boxes.items()}
    writes = {r: {p: np.zeros(b.shape, int) for p, b in bs.items()} for r, bs in dst.boxes.items()}
    for copy in plan.copies:
        into = copy.box.within(dst.boxes[copy.dst][copy.param])
        holding, tensors = (dst, after) if copy.relay else (src, before)
        given_part = tensors[copy.src][copy.param][copy.box.within(holding.boxes[copy.src][copy.param])]
        assert given_part.shape == copy.box.shape
        after[copy.dst][copy.param][into] = given_part
        writes[copy.dst][copy.param][into] += 1
    for rank, boxes in dst.boxes.items():
        for param, box in boxes.items():
            np.testing.assert_array_equal(after[rank][param], dense[param][box.slices])
            assert (writes[rank][param] == 1).all()
    plan.check(src, dst, GPUS_PER_NODE)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_only_what_a_rank_lacks_crosses(case: tuple[ModelShape, Placement, Placement]) -> None:
    src, dst = _layouts(case)
    dense = _dense(case[0])
    plan = schedule(src, dst, GPUS_PER_NODE)

    def elements(which: Layout, rank: int) -> set[int]:
        boxes = which.boxes.get(rank, {})
        return {int(i) for p, b in boxes.items() for i in dense[p][b.slices].flat}

    def on_nodes(which: Layout) -> set[tuple[int, int]]:
        return {(r // GPUS_PER_NODE, i) for r in which.ranks for i in elements(which, r)}

    far = [c for c in plan.cross if c.src // GPUS_PER_NODE != c.dst // GPUS_PER_NODE]
    entering = len(on_nodes(dst) - on_nodes(src))
    assert sum(c.box.num_elements for c in far) == entering == node_lower_bound(src, dst, GPUS_PER_NODE)
    lacking = {r: len(elements(dst, r) - elements(src, r)) for r in dst.ranks}
    assert {r: plan.received_elements(r) for r in dst.ranks} == lacking
    assert plan.cross_elements == sum(lacking.values()) == lower_bound(src, dst)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_summary_is_the_schedule(case: tuple[ModelShape, Placement, Placement]) -> None:
    plan = schedule(*_layouts(case), GPUS_PER_NODE)
    sums = schedule_bytes(*case)
    ranks = range(len(sums.sent))
    assert sums.sent.tolist() == [plan.sent_elements(r) for r in ranks]
    assert sums.received.tolist() == [plan.received_elements(r) for r in ranks]
    sent_far, received_far = np.zeros(len(ranks), int), np.zeros(len(ranks), int)
    for copy in plan.cross:
        if copy.src // GPUS_PER_NODE != copy.dst // GPUS_PER_NODE:
            sent_far[copy.src] += copy.box.num_elements
            received_far[copy.dst] += copy.box.num_elements
    np.testing.assert_array_equal(sums.sent_between_nodes, sent_far)
    np.testing.assert_array_equal(sums.received_between_nodes, received_far)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_all_ranks_derive_the_same(case: tuple[ModelShape, Placement, Placement], seed: int) -> None:
    """Neither the order of the ranks in a layout nor shared mappings matter."""
    src, dst = _layouts(case)

    def shuffled(which: Layout) -> Layout:
        ranks = list(which.ranks)
        random.Random(seed).shuffle(ranks)
        return Layout({rank: dict(which.boxes[rank]) for rank in ranks})

    plan, again = schedule(src, dst, GPUS_PER_NODE), schedule(shuffled(src), shuffled(dst), GPUS_PER_NODE)
    assert set(plan.copies) == set(again.copies)
    assert plan == schedule(src, dst, GPUS_PER_NODE)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_rank_lists_its_own_copies_alone(case: tuple[ModelShape, Placement, Placement]) -> None:
    src, dst = _layouts(case)
    plan = schedule(src, dst, GPUS_PER_NODE)
    for rank in {*src.ranks, *dst.ranks}:
        own = schedule(src, dst, GPUS_PER_NODE, rank)
        assert own == plan.of(rank)
        assert all(own.copies), "no copy of others"


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_holder_on_the_node_is_preferred(case: tuple[ModelShape, Placement, Placement]) -> None:
    src, dst = _layouts(case)
    for copy in schedule(src, dst, GPUS_PER_NODE).cross:
        if copy.relay:
            assert copy.src // GPUS_PER_NODE == copy.dst // GPUS_PER_NODE
        node = copy.dst // GPUS_PER_NODE
        near = [
            rank
            for rank, boxes in src.boxes.items()
            if rank // GPUS_PER_NODE == node
            and copy.param in boxes
            and boxes[copy.param].intersect(copy.box) == copy.box
        ]
        assert not near or copy.src // GPUS_PER_NODE == node


@settings(max_examples=20, deadline=None)
@given(cases())
def test_equal_layouts_move_nothing(case: tuple[ModelShape, Placement, Placement]) -> None:
    shape, src, _ = case
    there = layout(shape, src.mesh, src.strategy)
    assert schedule(there, there, GPUS_PER_NODE).cross == ()
    assert schedule_bytes(shape, src, src).sent.sum() == 0


def _place(first: int, size: int, strategy: Strategy, per_node: int = 8) -> Placement:
    return Placement(DeviceMesh(first, size, per_node), strategy)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (_place(0, 8, Strategy(8)), _place(8, 8, Strategy(8))),
        (_place(0, 8, Strategy(4, 2)), _place(8, 4, Strategy(1, 4))),
        (_place(0, 16, Strategy(8, 2)), _place(16, 16, Strategy(1, 2, 8))),
        (_place(0, 8, Strategy(2, 2, 2)), _place(8, 8, Strategy(8))),
    ],
)
def test_senders_share_the_work(src: Placement, dst: Placement) -> None:
    """With replicated sources on another node, no sender does 10% more than the average one."""
    shape = named_shapes()["llama-7b"]
    sent = schedule_bytes(shape, src, dst).sent[src.mesh.first : src.mesh.first + src.mesh.size]
    assert sent.max() <= 1.1 * sent.mean()


def test_a_single_receiver_draws_on_all_holders() -> None:
    shape = named_shapes()["llama-7b"]
    sent = schedule_bytes(shape, _place(0, 4, Strategy(4)), _place(4, 1, Strategy())).sent
    assert sent[:4].min() > 0.9 * sent.sum() / 4


def test_micro_batches_do_not_matter() -> None:
    shape = named_shapes()["llama-7b"]
    src, dst = _place(0, 8, Strategy(8)), _place(0, 8, Strategy(1, 8))
    other = replace(dst, strategy=replace(dst.strategy, micro_batches=4))
    assert schedule_bytes(shape, src, dst) is schedule_bytes(shape, src, other)


def test_a_large_model_is_scheduled_quickly() -> None:
    shape = named_shapes()["llama-70b"]
    src, dst = _place(0, 64, Strategy(1, 8, 8)), _place(0, 64, Strategy(8, 8, 1))
    case = (layout(shape, src.mesh, src.strategy), layout(shape, dst.mesh, dst.strategy))
    start = time.process_time()
    plan = schedule(*case, 8)
    assert time.process_time() - start < 2.0
    start = time.process_time()
    sums = schedule_bytes(shape, src, dst)
    assert time.process_time() - start < 0.1
    assert int(sums.received.sum()) == plan.cross_elements == lower_bound(*case)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of a few elements may be cut into pieces."""
    _forget()
    monkeypatch.setattr(routes, "MIN_PIECE_ELEMENTS", 1)
    yield
    _forget()


def _forget() -> None:
    routes.num_pieces.cache_clear()
    traffic._traffic.cache_clear()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("src", "dst", "per_node"),
    [
        (_place(0, 4, Strategy(4)), _place(4, 1, Strategy()), 4),
        (_place(0, 3, Strategy(3)), _place(4, 4, Strategy(4)), 4),
        (_place(0, 4, Strategy(4)), _place(2, 8, Strategy(4, 2)), 2),
        (_place(0, 4, Strategy(2, 2)), _place(4, 8, Strategy(8)), 4),
        (_place(0, 8, Strategy(4, 2, zero=3)), _place(4, 8, Strategy(2, 1, 4)), 4),
    ],
)
def test_pieces_cover_once_and_even_out(src: Placement, dst: Placement, per_node: int) -> None:
    shape = ModelShape("llama", 24, 4, 4, 2, 6, 48, 96, max_positions=8)
    a, b = (Placement(replace(p.mesh, gpus_per_node=per_node), p.strategy) for p in (src, dst))
    case = layout(shape, a.mesh, a.strategy), layout(shape, b.mesh, b.strategy)
    plan = schedule(*case, per_node)
    plan.check(*case, per_node)
    sums = schedule_bytes(shape, a, b)
    ranks = range(len(sums.sent))
    assert sums.sent.tolist() == [plan.sent_elements(r) for r in ranks]
    assert sums.received.tolist() == [plan.received_elements(r) for r in ranks]
    if a.strategy.dp == a.strategy.size and not set(a.mesh.ranks) & set(b.mesh.ranks):
        direct = [
            sum(c.box.num_elements for c in plan.cross if c.src == r and not c.relay) for r in a.mesh.ranks
        ]
        assert max(direct) <= 1.02 * sum(direct) / len(direct)


def test_one_rank_among_a_thousand() -> None:
    shape = named_shapes()["llama-70b"]
    src, dst = _place(0, 1024, Strategy(16, 8, 8)), _place(0, 1024, Strategy(128, 8, 1))
    case = layout(shape, src.mesh, src.strategy), layout(shape, dst.mesh, dst.strategy)
    start = time.process_time()
    own = schedule(*case, 8, 777)
    assert time.process_time() - start < 2.0
    _forget()
    start = time.process_time()
    sums = schedule_bytes(shape, src, dst)
    assert time.process_time() - start < 0.1
    assert own.received_elements(777) == sums.received[777]
    assert own.sent_elements(777) == sums.sent[777]
    assert 0 < own.sent_elements(777) * 2 <= staging_bytes(sums, 2, 1 << 50)
    assert staging_bytes(sums, 2) == 256 << 20


# ---------------------------------------------------------------------- what check() refuses

_A, _B = Box((0, 0), (2, 4)), Box((2, 0), (4, 4))
_ALL = Box((0, 0), (4, 4))
_SRC = Layout({0: {"w": _A}, 1: {"w": _B}})
_DST = Layout({0: {"w": _ALL}})


def test_check_accepts_what_is_right() -> None:
    plan = schedule(_SRC, _DST, 8)
    assert set(plan.copies) == {Copy("w", _A, 0, 0), Copy("w", _B, 1, 0)}
    plan.check(_SRC, _DST)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([Copy("w", _A, 0, 0)], "8 of 16"),
        ([Copy("w", _A, 0, 0), Copy("w", _B, 0, 0)], "does not hold"),
        ([Copy("w", _A, 0, 0), Copy("w", _B, 1, 0), Copy("w", Box((3, 0), (4, 4)), 1, 0)], "twice"),
        ([Copy("w", _A, 0, 0), Copy("w", _B, 1, 0), Copy("w", _B, 1, 1)], "does not hold"),
        ([Copy("w", _A, 0, 0), Copy("v", _B, 1, 0)], "does not hold"),
    ],
)
def test_check_refuses_what_is_wrong(copies: list[Copy], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(tuple(copies)).check(_SRC, _DST)


def test_check_refuses_a_second_crossing_and_early_relays() -> None:
    dst = Layout({2: {"w": _ALL}, 3: {"w": _ALL}})
    src = Layout({0: {"w": _ALL}})
    there, on = Copy("w", _ALL, 0, 2), Copy("w", _ALL, 2, 3, relay=True)
    Schedule((there, on)).check(src, dst, 2)
    with pytest.raises(ScheduleError, match="before it has it"):
        Schedule((on, there)).check(src, dst, 2)
    with pytest.raises(ScheduleError, match="32 elements cross between nodes; 16 must"):
        Schedule((there, Copy("w", _ALL, 0, 3))).check(src, dst, 2)


def test_check_refuses_needless_messages() -> None:
    src = Layout({0: {"w": _ALL}, 1: {"w": _ALL}})
    with pytest.raises(ScheduleError, match="16 elements cross"):
        Schedule((Copy("w", _ALL, 1, 0),)).check(src, _DST)


def test_a_part_that_nobody_holds_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="nobody holds"):
        schedule(Layout({0: {"w": _A}}), _DST, 8)
    with pytest.raises(ScheduleError, match="nobody holds v"):
        schedule(_SRC, Layout({0: {"v": _A}}), 8)


def test_overlapping_sources_cut_in_two_dims() -> None:
    """Boxes that overlap and are cut along both dims, as no model layout does."""
    src = Layout(
        {0: {"w": Box((0, 0), (3, 4))}, 1: {"w": Box((1, 0), (4, 3))}, 2: {"w": Box((2, 2), (4, 4))}}
    )
    dst = Layout({1: {"w": _ALL}, 3: {"w": Box((1, 1), (4, 4))}})
    plan = schedule(src, dst, 2)
    plan.check(src, dst)
    assert plan.received_elements(1) == 16 - 9
    assert plan.received_elements(3) == 9
