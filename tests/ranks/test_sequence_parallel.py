"""Sequence parallelism computes what one rank does, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from realloc.strategy import Strategy, parse_strategy
from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models
from tests.ranks.test_decoder_ranks import LENGTHS, check_training


def sp(short: str) -> Strategy:
    return parse_strategy(f"{short}+sp", "test")


@pytest.mark.parametrize(
    ("name", "strategy", "head", "lengths"),
    [
        ("llama", sp("d1t2p1"), "lm", LENGTHS),  # 37 tokens: the last rank has a row of padding
        ("llama-tied", sp("d1t4p1"), "lm", LENGTHS),  # 1 kv head on four ranks, tied
        ("llama-biases", sp("d1t4p1"), "lm", LENGTHS),  # biases after the reduce-scatter
        ("qwen2", sp("d1t2p2"), "lm", LENGTHS),  # rows cross stages, tied on both ends
        ("qwen3", sp("d1t4p1"), "scalar", (2, 3)),  # q/k norms; the fourth rank has padding alone
        ("gpt_neox", sp("d1t2p1"), "lm", LENGTHS),  # parallel residual, layer norms with biases
    ],
    ids=str,
)
def test_training_equals_one_rank(
    name: str, strategy: Strategy, head: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    check_training(name, strategy, head, tmp_path, lengths)


PLANS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "everywhere": {"*": ("node0", "d1t4p1m2+sp"), "actor_gen": ("node0", "d1t4p1")},
    "with pipelines, ZeRO and recomputation, and beside calls of the same layout without it": {
        "*": ("node0", "d1t2p2m3+sp"),
        "actor_gen": ("node0", "d1t2p2"),
        "critic_inf": ("node0", "d2t2p1m2"),
        "rew_inf": ("node0", "d2t2p1m2+sp"),
        "ref_inf": ("node0:gpu[0-1]", "d1t2p1+sp"),
        "actor_train": ("node0", "d1t2p2m4+i2+sp+full"),
        "critic_train": ("node0", "d2t2p1m2z2+sp+selective"),
    },
}


def test_plans_compute_what_one_process_does(tmp_path: Path) -> None:
    models = write_models(tmp_path, hidden=32, layers=4, heads=4, kv_heads=2, ffn=48)
    content = ppo_content(tmp_path, models, iterations=2)
    alone = run(make_plan(tmp_path, content, 1, {"*": ("node0", "d1t1p1")}), tmp_path / "alone")
    for number, placements in enumerate(PLANS.values()):
        plan = make_plan(tmp_path, content, 4, placements)
        assert_same(run(plan, tmp_path / str(number)), alone)
