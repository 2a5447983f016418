"""Plans drawn at random, every strategy field among them, compute what one process computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.dataflow import CallKind
from realloc.mesh import all_meshes
from realloc.model_shape import ModelShape
from realloc.strategy import Recompute, Schedule, Strategy, forbidden, inconsistent
from tests.ranks.engine import Outcome, assert_same, make_plan, ppo_content, run, write_models

SHAPE = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "tied": True}
CLUSTER = Cluster(1, 4, "cpu")
CALLS: Mapping[str, CallKind] = {
    "actor_gen": CallKind.GENERATE,
    "rew_inf": CallKind.INFERENCE,
    "ref_inf": CallKind.INFERENCE,
    "critic_inf": CallKind.INFERENCE,
    "actor_train": CallKind.TRAIN_STEP,
    "critic_train": CallKind.TRAIN_STEP,
}


@st.composite
def placements(draw: st.DrawFn, kind: CallKind) -> Placement:
    """Any placement of a call of this kind that the plan's check allows."""
    mesh = draw(st.sampled_from(all_meshes(CLUSTER)))
    degrees = [
        (mesh.size // (tp * pp), tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4) if mesh.size % (tp * pp) == 0
    ]
    dp, tp, pp = draw(st.sampled_from(degrees))
    fields: dict[str, Any] = {"micro_batches": draw(st.integers(1, 4)), "offload": draw(st.booleans())}
    if kind is not CallKind.GENERATE:
        fields["sequence_parallel"] = tp > 1 and draw(st.booleans())
    if kind is CallKind.TRAIN_STEP:
        fields["recompute"] = draw(st.sampled_from(list(Recompute)))
        fields["zero"] = draw(st.sampled_from([0, 1, 2, 3]))
        fields["schedule"] = draw(st.sampled_from(list(Schedule)))
        fields["virtual_stages"] = 2 if fields["schedule"] is Schedule.INTERLEAVED else 1
        # what does not go together falls back to its default
        for name in ("zero", "schedule"):
            trial = Strategy(dp, tp, pp, **fields)
            if inconsistent(trial) or forbidden(trial, _shape()):
                fields[name] = getattr(Strategy(), name)
                fields["virtual_stages"] = 1 if name == "schedule" else fields["virtual_stages"]
    strategy = Strategy(dp, tp, pp, **fields)
    assert not inconsistent(strategy)
    assert not forbidden(strategy, _shape())
    return Placement(mesh, strategy)


def _shape() -> ModelShape:
    return ModelShape("llama", 32, 4, 4, 2, 8, 48, 190, 128)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], Outcome]:
    folder = tmp_path_factory.mktemp("random")
    content = ppo_content(folder, write_models(folder, **SHAPE), iterations=2)
    plan = make_plan(folder, content, 1, {"*": ("node0", "d1t1p1")})
    return folder, content, run(plan, folder / "alone")


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(chosen=st.fixed_dictionaries({name: placements(kind) for name, kind in CALLS.items()}))
@pytest.mark.timeout(600)
def test_random_plan_computes_what_one_process_does(
    oracle: tuple[Path, dict[str, object], Outcome], chosen: Mapping[str, Placement]
) -> None:
    folder, content, expected = oracle
    written = {name: (str(p.mesh), str(p.strategy)) for name, p in chosen.items()}
    plan = make_plan(folder, content, 4, written)
    assert {name: plan.placements[name] for name in chosen} == chosen
    assert_same(run(plan, folder / "drawn"), expected)
