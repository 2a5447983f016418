"""Measured tables: exact where measured, rising, continuous, and honest about where they end."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.compute import ComputeCosts, Pack, Pass
from cost_models.curve import Curve
from cost_models.measured import MeasuredCosts, compute_costs
from cost_models.profile import read_profile, write_profile
from cost_models.sources import Source, describe
from cost_models.tables import Row, Table, read_tables, tables_content
from realloc.errors import InputError
from realloc.model_shape import ModelShape
from realloc.signature import call_signature, ends_signature, layer_signature
from realloc.strategy import Recompute
from tests.unit.cost_models.cases import profile

SHAPE = ModelShape(
    family="llama", hidden=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=128,
    vocab=1000, max_positions=512, rotary_dim=16,
)  # fmt: skip


def table(quantity: str, rows: dict[tuple[float, float], float], of: str = "layer", **more: float) -> Table:
    made = tuple(Row(x, y, seconds) for (x, y), seconds in sorted(rows.items()))
    return Table(of, "float32", quantity, more.get("ragged", 0.0), made)


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[float], list[float], dict[tuple[float, float], float]]:
    """Seconds on a full grid that rise in both directions."""
    sizes = st.lists(st.integers(1, 4096).map(float), min_size=1, max_size=4, unique=True).map(sorted)
    xs, ys = draw(sizes), draw(sizes)
    rows: dict[tuple[float, float], float] = {}
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            before = max(
                rows.get((xs[i - 1], y), 0.0) if i else 0.0, rows.get((x, ys[j - 1]), 0.0) if j else 0.0
            )
            rows[x, y] = before + draw(st.floats(1e-6, 1.0))
    return xs, ys, rows


def slope(x: float, y: float) -> float:
    return 1e-3 + 1e-5 * x * y


QUANTITIES = st.sampled_from(["forward", "decode"])


@given(grids(), QUANTITIES)
def test_exact_where_measured(grid, quantity: str):
    made = table(quantity, grid[2])
    for (x, y), seconds in grid[2].items():
        reading = made.at(x, y, slope)
        assert (reading.seconds, reading.extrapolated) == (seconds, False)


@given(grids(), QUANTITIES, st.lists(st.floats(0.5, 8192), min_size=2, max_size=6), st.floats(0.5, 8192))
def test_never_falls(grid, quantity: str, asked: list[float], other: float):
    made = table(quantity, grid[2])
    for low, high in pairwise(sorted(asked)):
        for a, b in (((low, other), (high, other)), ((other, low), (other, high))):
            inside = all(grid[k][0] <= v <= grid[k][-1] for p in (a, b) for k, v in enumerate(p))
            if inside:
                assert made.at(*a, slope).seconds <= made.at(*b, slope).seconds * (1 + 1e-9)


@given(grids(), QUANTITIES, st.floats(0.5, 8192), st.floats(0.5, 8192))
def test_continuous(grid, quantity: str, x: float, y: float):
    """A millionth more of either changes little, at the edges of what was measured too."""
    made, near = table(quantity, grid[2]), 1 + 1e-6
    places = [(x, y)] + [(a, b) for a in grid[0] for b in grid[1]]
    for a, b in places:
        here = made.at(a, b, slope).seconds
        for there in (made.at(a * near, b, slope), made.at(a / near, b, slope), made.at(a, b * near, slope)):
            # the steepest of these grids rises a millionfold from one size to the next
            assert there.seconds == pytest.approx(here, rel=0.05, abs=1e-2)


def test_beyond_the_last_point_the_roofline_goes_on_and_it_is_said():
    made = table("forward", {(1, 100): 1.0, (4, 100): 3.0})
    assert made.at(2, 100, slope).seconds == pytest.approx(1 + 2 / 3)  # a line: fixed costs and a slope
    far = made.at(8, 100, slope)
    assert far.extrapolated
    assert far.seconds == pytest.approx(3.0 * slope(8, 100) / slope(4, 100))
    assert not made.at(4.2, 100, slope).extrapolated  # within a tenth
    longer = made.at(4, 200, slope)
    assert longer.extrapolated
    assert longer.seconds == pytest.approx(3.0 * slope(4, 200) / slope(4, 100))


def measured(
    quantity: str, rows: dict[tuple[float, float], float], of: str = "", **more: float
) -> MeasuredCosts:
    made = replace(profile(), tables=(table(quantity, rows, of or layer_signature(SHAPE, 1), **more),))
    costs = compute_costs(made, SHAPE, "float32", 1)
    assert isinstance(costs, MeasuredCosts)
    return costs


def test_a_pack_is_found_by_its_tokens_and_squares():
    costs = measured("inference", {(1, 64): 1.0, (4, 64): 2.0, (1, 128): 3.0, (4, 128): 4.0})
    assert costs.forward_layer_s(Pack(256, 4 * 64**2, 1, 0), use=Pass.INFERENCE) == pytest.approx(2.0)
    assert costs.forward_layer_s(Pack(512, 4 * 128**2, 1, 0), use=Pass.INFERENCE) == pytest.approx(4.0)
    assert costs.sources == {"inference": (Source.MEASURED, "")}


def test_a_ragged_pack_is_read_as_its_table_was_measured():
    costs = measured("inference", {(4, 64): 2.0, (4, 128): 4.0}, ragged=0.5)
    # four lengths around 64 whose squares are those of a range from 32 to 96
    assert costs.forward_layer_s(Pack(256, 4 * 64**2 * 13 / 12, 4, 0), use=Pass.INFERENCE) == pytest.approx(
        2.0
    )


def test_of_several_tables_the_most_nearly_as_ragged_is_read():
    made = [
        table("inference", {(4, 64): seconds, (8, 64): 2 * seconds}, layer_signature(SHAPE, 1), ragged=ragged)
        for ragged, seconds in ((0.0, 1.0), (0.15, 2.0), (0.5, 3.0))
    ]
    costs = compute_costs(replace(profile(), tables=tuple(made)), SHAPE, "float32", 1)
    for ragged, seconds in ((0.05, 1.0), (0.1, 2.0), (0.2, 2.0), (0.4, 3.0)):
        pack = Pack(256, 4 * 64**2 * (1 + ragged**2 / 3), 4, 0)
        assert costs.forward_layer_s(pack, use=Pass.INFERENCE) == pytest.approx(seconds, rel=0.06)
    assert costs.forward_layer_s(Pack(256, 4 * 64**2, 1, 0), use=Pass.INFERENCE) == pytest.approx(1.0)


def test_what_was_not_measured_is_scaled_from_what_was():
    costs, pack = measured("inference", {(1, 64): 1.0}), Pack(64, 64**2, 1, 0)
    plain = ComputeCosts(profile(), SHAPE, "float32", 1)
    ratio = plain.backward_layer_s(pack) / plain.forward_layer_s(pack)
    assert costs.forward_layer_s(pack) == pytest.approx(1.0)  # by the roofline as much as inference
    assert costs.sources["forward"][0] is Source.SCALED
    assert ratio > 1
    assert costs.recompute_layer_s(pack, Recompute.FULL) < 1.0
    assert "scaled: forward (from inference)" in describe(costs.found)


def test_what_feels_others_more_than_the_rest_is_told_so():
    """Seconds times the usual slowdown are those that were measured beside others."""
    rows = (Row(1, 64, 1.0, 0.0, beside=2.0), Row(4, 64, 2.0, 0.0, beside=3.0))
    made = replace(
        profile(),
        tables=(Table(layer_signature(SHAPE, 1), "float32", "inference", 0.0, rows),),
        concurrency=Curve(((1, 1.0), (2, 1.1), (4, 1.5))),
    )

    def seconds(busy: int, sequences: int) -> float:
        costs = compute_costs(made, SHAPE, "float32", 1, busy)
        pack = Pack(64.0 * sequences, sequences * 64.0**2, 1, 0)
        return made.slowdown(busy) * costs.forward_layer_s(pack, use=Pass.INFERENCE)

    assert [seconds(1, n) for n in (1, 4)] == pytest.approx([1.0, 2.0])
    assert [seconds(4, n) for n in (1, 4)] == pytest.approx([2.0, 6.0])
    assert seconds(2, 4) == pytest.approx(2.0 + 0.2 * 4.0)  # a fifth of what four ranks are to each other
    assert seconds(8, 4) == pytest.approx(2 * seconds(4, 4))  # cores are shared out already
    old = replace(made, tables=(replace(made.tables[0], rows=tuple(replace(r, beside=None) for r in rows)),))
    plain = compute_costs(old, SHAPE, "float32", 1, 4)
    assert plain.forward_layer_s(Pack(64, 64**2, 1, 0), use=Pass.INFERENCE) == pytest.approx(1.0)
    assert tables_content(read_tables(tables_content(made.tables), "")) == tables_content(made.tables)


def test_another_model_gets_the_roofline():
    made = replace(profile(), tables=(table("inference", {(1, 64): 1.0}, layer_signature(SHAPE, 1)),))
    other = replace(SHAPE, ffn_dim=256)
    assert type(compute_costs(made, other, "float32", 1)) is ComputeCosts
    assert type(compute_costs(made, SHAPE, "bfloat16", 1)) is ComputeCosts
    deeper = replace(SHAPE, num_layers=8, head="scalar")  # the same layers
    assert isinstance(compute_costs(made, deeper, "float32", 1), MeasuredCosts)


def test_gradients_were_added_to_where_backward_was_measured():
    assert measured("backward", {(1, 64): 1.0}).accumulate_s(1000) == 0.0
    assert measured("forward", {(1, 64): 1.0}).accumulate_s(1000) > 0.0


def test_a_call_is_priced_around_its_own_model_or_else_around_another():
    other = replace(SHAPE, ffn_dim=256)
    layers = table("inference", {(1, 64): 1.0}, layer_signature(SHAPE, 1))

    def around(shape: ModelShape, seconds: float) -> Table:
        return table("call", {(8, 1): seconds}, call_signature("train", "loss", shape))

    for tables, expected, source in (
        ((around(other, 2.0),), 2.0, (Source.SCALED, "around another model")),
        ((around(other, 2.0), around(SHAPE, 3.0)), 3.0, (Source.MEASURED, "")),
    ):
        costs = compute_costs(replace(profile(), tables=(layers, *tables)), SHAPE, "float32", 1)
        assert isinstance(costs, MeasuredCosts)
        assert costs.call_s("train", "loss", 8, 1) == pytest.approx(expected)
        assert costs.sources["call"] == source
        analytic = ComputeCosts(profile(), SHAPE, "float32", 1)
        assert costs.call_s("trained", "loss", 8, 1) == analytic.call_s("trained", "loss", 8, 1)


def test_a_table_of_zeros_is_priced_where_hosts_were_measured_without():
    rows = table("enter_backward", {(1, 1): 1.0}, ends_signature(SHAPE, 1))
    gpu = replace(profile(), tables=(rows,))
    host = replace(gpu, attention=replace(gpu.attention, per_sequence=True))
    # 100 GB/s
    assert compute_costs(host, SHAPE, "float32", 1).zero_table_s() == pytest.approx(4 * 1000 * 64 / 1e11)
    assert compute_costs(gpu, SHAPE, "float32", 1).zero_table_s() == 0.0
    assert compute_costs(replace(host, tables=()), SHAPE, "float32", 1).zero_table_s() == 0.0


def test_ends_are_read_from_their_own_tables():
    costs = measured("sample", {(1, 1): 1.0, (8, 1): 8.0}, of=ends_signature(SHAPE, 1))
    assert costs.sample_s(4) == pytest.approx(4.0)
    costs.sample_s(100)
    assert costs.sources["sample"] == (Source.EXTRAPOLATED, "100, measured batch 1 to 8")


def test_a_file_gives_the_tables_back(tmp_path: Path):
    path = tmp_path / "p.yaml"
    made = replace(
        profile(), tables=(table("forward", {(1, 64): 1.0, (2, 64): 1.5}), table("head", {(5, 1): 2.0}))
    )
    write_profile(made, path)
    assert read_profile(path).tables == made.tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": "foward"}, "no such quantity: 'foward'. Did you mean 'forward'"),
        ({"rows": []}, "needs at least one row"),
        ({"rows": [[1, 64, 0.5]]}, "row 1: expected [sequences, tokens_each, seconds, spread]"),
        ({"rows": [[1, 64, -0.5, 0]]}, "row 1: expected a number above 0, found -0.5"),
        ({"rows": [[1, 64, 0.5, 0], [1, 64, 0.6, 0]]}, "two rows are for the same sequences and tokens_each"),
        ({"dtype": "float8"}, "'float8' is not known"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, change: dict[str, object], message: str):
    import yaml

    path = tmp_path / "p.yaml"
    write_profile(replace(profile(), tables=(table("forward", {(1, 64): 1.0}),)), path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["tables"][0] |= change
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert message in str(caught.value)
