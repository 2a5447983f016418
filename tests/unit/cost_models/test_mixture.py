"""What a train_step mixes in costs what as much of a batch would: tokens, passes, memory, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.calls import TERMS
from cost_models.curve import Curve
from cost_models.model import CostModel
from cost_models.profile import load_profile
from realloc.data_spec import DataSpec
from realloc.experiment import Experiment
from realloc.lengths import Lengths
from realloc.pretrain import PretrainData
from tests.unit.cost_models.cases import cost_model, experiment, place, profile

FREE_MEMORY = {"memory": Curve(((1.0, 1e30),)), "optimizer_bytes_per_s": 1e30}


def with_texts(plain: Experiment, sequences: int, tokens: int) -> Experiment:
    """The PPO experiment with so many texts of so many tokens in each iteration."""
    texts = PretrainData(DataSpec(("texts.jsonl",)), sequences, Lengths(float(tokens), tokens))
    given = {**(plain.hyperparameters or {}), "ptx_coef": 0.5}
    return replace(plain, pretrain=texts, hyperparameters=given)


def train_terms(model: CostModel, strategy: str) -> dict[str, float]:
    return dict(model.call_terms(model.graph.by_name["actor_train"], place(strategy)))


@pytest.mark.parametrize("strategy", ["d1t1p1", "d2t1p1m4", "d1t1p1m2+full", "d2t1p1z3"])
def test_as_many_texts_of_the_same_length_double_the_computing(strategy: str) -> None:
    plain = experiment(sequences=64, prompt=1, response=255)
    hardware = profile(**FREE_MEMORY)
    before = train_terms(cost_model(plain, hardware), strategy)
    half, same = (train_terms(cost_model(with_texts(plain, n, 256), hardware), strategy) for n in (32, 64))
    assert same["compute"] == pytest.approx(2 * before["compute"], rel=1e-9)
    assert half["compute"] == pytest.approx(1.5 * before["compute"], rel=1e-9)
    for call in ("actor_gen", "ref_inf", "critic_train"):
        costs = [cost_model(e, hardware) for e in (plain, with_texts(plain, 64, 256))]
        assert len({c.call_s(c.graph.by_name[call], place("d2t1p1m2")) for c in costs}) == 1


def test_they_are_further_micro_batches_and_no_further_steps() -> None:
    """What is done for each optimizer step stays; what is done for each pass is done twice as often."""
    plain = experiment(sequences=64, prompt=1, response=255)
    hardware = load_profile("a100-80gb")
    for strategy, once in (("d8t1p1m4", "dp_communication"), ("d1t1p2m8", "bubble"), ("d1t8p1m2", "")):
        before, after = (
            train_terms(cost_model(e, hardware), strategy) for e in (plain, with_texts(plain, 64, 256))
        )
        assert tuple(after) == TERMS
        assert after["optimizer"] == pytest.approx(before["optimizer"])
        if once:
            assert after[once] == pytest.approx(before[once])
        assert after["tp_communication"] >= 1.9 * before["tp_communication"]
        assert after["pp_communication"] >= before["pp_communication"]
        assert after["compute"] == pytest.approx(2 * before["compute"], rel=0.02)
    gathered = [
        train_terms(cost_model(e, hardware), "d8t1p1m2z3")["dp_communication"]
        for e in (plain, with_texts(plain, 64, 256))
    ]
    assert gathered[1] > 1.5 * gathered[0]  # parameters are gathered for each pass


@pytest.mark.parametrize("strategy", ["d1t1p1m8", "d1t1p4m8", "d1t1p4m8+gpipe", "d1t1p4m8+zb", "d1t1p2m8+i2"])
def test_memory_is_that_of_the_larger_micro_batches(strategy: str) -> None:
    """Texts as long as the batch's sequences add none, unless all passes are kept; longer ones do."""
    plain = experiment(sequences=256, prompt=1, response=255)
    placed = place(strategy)

    def activations(made: Experiment) -> int:
        model = cost_model(made, profile())
        return model.call_memory(model.graph.by_name["actor_train"], placed, 0).working["activations"]

    before = activations(plain)
    keeps_all = "gpipe" in strategy
    assert activations(with_texts(plain, 256, 256)) == pytest.approx(
        (2 if keeps_all else 1) * before, rel=0.01
    )
    assert activations(with_texts(plain, 256, 64)) == pytest.approx(
        (1.25 if keeps_all else 1) * before, rel=0.01
    )
    longer = activations(experiment(sequences=256, prompt=1, response=1023))
    expected = (1.25 if keeps_all else 1) * longer
    assert activations(with_texts(plain, 256, 1024)) == pytest.approx(expected, rel=0.02)


def test_a_few_long_texts_lie_beside_what_a_stage_holds_of_the_batch() -> None:
    """Four in flight: the one micro-batch of texts, which is four times as large, and three others."""
    plain = experiment(sequences=64, prompt=1, response=255)
    model = cost_model(with_texts(plain, 4, 4096), profile())  # one a step

    def held(made: CostModel) -> int:
        return made.call_memory(made.graph.by_name["actor_train"], place("d1t1p4m4"), 0).working[
            "activations"
        ]

    before = held(cost_model(plain, profile()))
    assert held(model) == pytest.approx((4 + 3) / 4 * before, rel=0.1)
