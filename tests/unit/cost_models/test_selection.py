"""A call that selects costs what one on so many sequences costs, and what telling and dealing them takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.model import CostModel
from cost_models.profile import HardwareProfile, load_profile
from realloc.dataflow import Call
from realloc.experiment import parse_experiment
from realloc.files import Reader
from tests.unit.cost_models.cases import cost_model, place, profile

BATCH, EACH = 64, 4
CALLS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "raft": ("actor_train", {"keep": 1, "mini_batches": 2}, 16),
    "iterative_dpo": ("ref_inf", {}, 32),
    "grpo": ("actor_train", {"dynamic_sampling": 12}, 48),
}


def model_of(algorithm: str, sequences: int, hardware: HardwareProfile) -> tuple[CostModel, Call]:
    """Prompts of 96 tokens and responses of 32."""
    name, hyperparameters, _ = CALLS[algorithm]
    work = {"sequences": sequences, "samples_per_prompt": EACH, "prompt_tokens": 96, "response_tokens": 32}
    roles = ("actor", "ref", "reward") if algorithm != "raft" else ("actor", "reward")
    content = {"algorithm": algorithm, "models": dict.fromkeys(roles, "llama-7b"), "workload": work}
    reader = Reader({**content, "hyperparameters": dict(hyperparameters)}, "test")
    model = cost_model(parse_experiment(reader, Path()), hardware)
    return model, model.graph.by_name[name]


@pytest.mark.parametrize("strategy", ["d1t1p1", "d8t1p1m2", "d2t2p2m4", "d4t1p2m4"])
@pytest.mark.parametrize("algorithm", CALLS)
def test_what_is_selected_is_priced_as_a_smaller_batch(algorithm: str, strategy: str) -> None:
    """In every term but that of the selection itself, and in memory."""
    hardware, placement = load_profile("a100-80gb"), place(strategy)
    model, call = model_of(algorithm, BATCH, hardware)
    small, plain = model_of(algorithm, BATCH, hardware)
    work = replace(small.experiment.workload, sequences=CALLS[algorithm][2])
    small = CostModel(replace(small.experiment, workload=work), small.graph, small.cluster, hardware)
    plain = replace(plain, select=None, selected=0)
    terms, expected = dict(model.call_terms(call, placement)), dict(small.call_terms(plain, placement))
    dealt = terms.pop("dp_communication") - expected.pop("dp_communication")
    assert terms == pytest.approx(expected)
    assert (dealt > 0) == (placement.mesh.size > 1)
    assert model.call_memory(call, placement) == small.call_memory(plain, placement)
    assert terms["compute"] < model.call_terms(replace(plain, name="all"), placement)["compute"]


def test_telling_and_dealing_by_hand() -> None:
    """Links of 1 ms and 10 GB/s; every rank tells 64 bytes, and exchanges half of its 8 sequences."""
    model, call = model_of("raft", BATCH, profile())
    plain = replace(call, name="plain", select=None, selected=0)
    told = 1e-3 + BATCH / 1e10
    # tokens of 8 bytes and a score, sent and received in a message each
    dealt = 2 * (1e-3 + 16 / 2 / 2 * (128 * 8 + 4) / 1e10)
    for strategy, expected in (("d2t1p1", told + dealt), ("d1t2p1", told), ("d1t1p1", 0.0)):
        found = [model.call_terms(one, place(strategy))["dp_communication"] for one in (call, plain)]
        assert found[0] - found[1] == pytest.approx(expected, rel=1e-4, abs=1e-12)
