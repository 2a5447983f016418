"""Any plan computes what one process computes: sampled tokens, metrics and trained weights.

The oracle is the same experiment on one rank. Three iterations of PPO, so that what a plan does
wrong after an optimizer step or a reallocation shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.ranks.engine import Outcome, assert_same, make_plan, ppo_content, run, write_models

ALONE: Mapping[str, tuple[str, str]] = {"*": ("node0", "d1t1p1")}
GROUPED = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48}
SIX_HEADS = {"hidden": 48, "layers": 3, "heads": 6, "kv_heads": 6, "ffn": 48, "tied": True}
SINGLE_KV = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 1, "ffn": 48, "tied": True}

# name -> GPUs, call -> (mesh, strategy)
PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "data parallel": (4, {"*": ("node0", "d4t1p1")}),
    "tensor parallel, kv heads replicated": (4, {"*": ("node0", "d1t4p1")}),
    "pipeline parallel": (4, {"*": ("node0", "d1t1p4m3")}),
    "all three, overlapping meshes": (
        8,
        {
            "*": ("node0", "d2t2p2m2"),
            "critic_inf": ("node0:gpu[4-7]", "d2t2p1"),
            "ref_inf": ("node0:gpu[0-3]", "d1t2p2m2"),
        },
    ),
    "generation and training apart": (
        4,
        {
            "actor_gen": ("node0:gpu[0-1]", "d2t1p1"),
            "actor_train": ("node0:gpu[2-3]", "d1t2p1m2"),
            "critic_inf": ("node0:gpu[2-3]", "d1t1p2"),
            "critic_train": ("node0:gpu[0-1]", "d1t1p2m2"),
            "ref_inf": ("node0:gpu[2]", "d1t1p1"),
            "rew_inf": ("node0:gpu[3]", "d1t1p1m3"),
        },
    ),
    "generation everywhere, training on half each": (
        4,
        {
            "actor_gen": ("node0", "d4t1p1m2"),
            "rew_inf": ("node0:gpu[0-1]", "d2t1p1"),
            "ref_inf": ("node0:gpu[2-3]", "d1t2p1"),
            "critic_inf": ("node0", "d2t1p2m2"),
            "actor_train": ("node0:gpu[0-1]", "d1t1p2m2"),
            "critic_train": ("node0:gpu[2-3]", "d2t1p1m2"),
        },
    ),
    "same mesh, other strategies": (
        4,
        {
            "actor_gen": ("node0", "d1t2p2m2"),
            "rew_inf": ("node0", "d1t4p1"),
            "ref_inf": ("node0", "d4t1p1"),
            "critic_inf": ("node0", "d1t1p4m4"),
            "actor_train": ("node0", "d2t1p2m2"),
            "critic_train": ("node0", "d2t2p1m2"),
        },
    ),
    "one rank trains, three idle at times": (
        4,
        {
            "*": ("node0:gpu[3]", "d1t1p1"),
            "actor_gen": ("node0:gpu[0-1]", "d1t2p1"),
            "critic_inf": ("node0:gpu[2]", "d1t1p1m2"),
        },
    ),
}
TIED_PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "tp 2 to tp 3": (
        6,
        {
            "*": ("node0:gpu[0-2]", "d1t3p1"),
            "actor_gen": ("node0:gpu[4-5]", "d1t2p1"),
            "critic_inf": ("node0", "d2t1p3"),
            "ref_inf": ("node0", "d1t6p1"),
        },
    ),
    "tied embedding on both ends, uneven stages": (
        4,
        {
            "*": ("node0", "d2t1p2m2"),
            "actor_gen": ("node0:gpu[0-1]", "d1t1p2m3"),
            "critic_train": ("node0:gpu[2-3]", "d1t1p2m2"),
        },
    ),
}
ONE_KV_PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "one kv head on four ranks": (
        4,
        {"*": ("node0", "d1t4p1"), "actor_gen": ("node0", "d2t2p1"), "critic_train": ("node0", "d1t2p2m2")},
    ),
}


class Oracle:
    """The single-process run of one model shape, made once."""

    def __init__(self, folder: Path, shape: Mapping[str, object]) -> None:
        self.folder = folder
        self.models = write_models(folder, **shape)
        self.content = ppo_content(folder, self.models)
        plan = make_plan(folder, self.content, 1, ALONE)
        self.outcome: Outcome = run(plan, folder / "alone")

    def compare(self, name: str, gpus: int, placements: Mapping[str, tuple[str, str]]) -> Outcome:
        plan = make_plan(self.folder, self.content, gpus, placements)
        outcome = run(plan, self.folder / name.replace(" ", "-"))
        assert_same(outcome, self.outcome)
        return outcome


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("grouped"), GROUPED)


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("six"), SIX_HEADS)


@pytest.fixture(scope="module")
def single_kv(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("single"), SINGLE_KV)


@pytest.mark.parametrize("name", PLANS)
def test_plan_computes_what_one_process_does(grouped: Oracle, name: str) -> None:
    gpus, placements = PLANS[name]
    grouped.compare(name, gpus, placements)


@pytest.mark.parametrize("name", TIED_PLANS)
def test_tied_model_with_six_heads(six_heads: Oracle, name: str) -> None:
    six_heads.compare(name, *TIED_PLANS[name])


@pytest.mark.parametrize("name", ONE_KV_PLANS)
def test_model_with_one_kv_head(single_kv: Oracle, name: str) -> None:
    single_kv.compare(name, *ONE_KV_PLANS[name])


def test_training_changes_the_weights(grouped: Oracle) -> None:
    """Or else equal weights would prove nothing."""
    import numpy as np
    from safetensors.numpy import load_file

    before = load_file(Path(grouped.models["actor"]) / "model.safetensors")
    after = grouped.outcome.weights["actor"]
    changes = [np.linalg.norm(after[k] - before[k]) / np.linalg.norm(before[k]) for k in before]
    assert min(changes) > 1e-3
    assert len({sequence for one in grouped.outcome.tokens for sequence in one.values()}) > 30
