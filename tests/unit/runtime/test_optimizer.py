"""AdamW by parameter name: torch's numbers, whatever lies where; resuming; the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from realloc.experiment import OptimizerSpec
from realloc.layout import Box
from runtime.batching import num_passes
from runtime.optimizer import AdamW
from runtime.parameters import allocate

CPU = torch.device("cpu")
WHOLE = {"a": Box((0, 0), (6, 4)), "b": Box((0,), (5,)), "c": Box((0, 0), (3, 2))}
ROWS = {"a": Box((2, 0), (4, 4)), "b": Box((2,), (5,)), "c": Box((0, 0), (3, 2))}
SPEC = OptimizerSpec(learning_rate=0.1, eps=1e-6)


def _tensors(seed: int) -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = allocate(WHOLE, torch.float32, CPU)
    tensors.flat.normal_(generator=generator)
    return tensors.views


def _rows(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {name: tensors[name][box.within(WHOLE[name])] for name, box in ROWS.items()}


def _steps(optimizer: AdamW, gradients: Mapping[str, torch.Tensor], seeds: range) -> None:
    for seed in seeds:
        for name, new in _tensors(seed).items():
            gradients[name].copy_(new)
        optimizer.step()


def test_rows_of_parameters_step_as_the_whole_does_in_torch() -> None:
    weights, gradients, reference = _tensors(0), _tensors(1), _tensors(0)
    optimizer = AdamW(ROWS, _rows(weights), _rows(gradients), SPEC, 9, CPU)
    theirs = torch.optim.AdamW(
        list(reference.values()),
        lr=0.1,
        betas=(SPEC.beta1, SPEC.beta2),
        eps=1e-6,
        weight_decay=SPEC.weight_decay,
    )
    for seed in range(3):
        _steps(optimizer, gradients, range(seed, seed + 1))
        for name, weight in reference.items():
            weight.grad = _tensors(seed)[name]
        theirs.step()
    torch.testing.assert_close(_rows(weights), _rows(reference))
    moments = {name: theirs.state[weight]["exp_avg_sq"] for name, weight in reference.items()}
    torch.testing.assert_close(optimizer.states["exp_avg_sq"], _rows(moments))
    # other rows are not this rank's to touch
    assert torch.equal(weights["a"][:2], _tensors(0)["a"][:2])
    assert len(optimizer.gradients) == 2  # `b` and `c` are neighbours: one tensor


def test_neighbours_become_one_tensor() -> None:
    assert len(AdamW(WHOLE, _tensors(0), _tensors(1), SPEC, 9, CPU).gradients) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_states_and_resume_continue_to_the_bit(dtype: torch.dtype) -> None:
    def make() -> tuple[AdamW, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        weights = allocate(WHOLE, dtype, CPU)
        weights.flat.copy_(torch.cat([t.reshape(-1) for t in _tensors(0).values()]))
        gradients = _tensors(0)
        return AdamW(WHOLE, weights.views, gradients, SPEC, 9, CPU), weights.views, gradients

    straight, wanted, gradients = make()
    _steps(straight, gradients, range(5))
    first, stopped, gradients = make()
    _steps(first, gradients, range(3))
    second, weights, gradients = make()
    assert set(second.states) == {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype != torch.float32 else set())
    for name in WHOLE:
        weights[name].copy_(stopped[name])
        for state, tensors in second.states.items():
            tensors[name].copy_(first.states[state][name])
    second.resume(3)
    _steps(second, gradients, range(3, 5))
    assert second.num_steps == straight.num_steps == 5
    for name in WHOLE:
        assert torch.equal(weights[name], wanted[name])


def test_small_steps_add_up_in_masters() -> None:
    weights = allocate({"w": Box((0,), (4,))}, torch.bfloat16, CPU)
    weights.flat.fill_(1.0)
    gradients = {"w": torch.ones(4)}
    spec = OptimizerSpec(learning_rate=1e-3, weight_decay=0.0)
    optimizer = AdamW(weights.boxes, weights.views, gradients, spec, 20, CPU)
    for _ in range(10):
        optimizer.step()  # each a quarter of what bf16 can tell from 1
    torch.testing.assert_close(optimizer.states["master"]["w"], torch.full((4,), 0.99))
    assert torch.equal(weights.flat.float(), torch.full((4,), 0.98828125))


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_warms_up_and_decays(decay: str, rates: list[float]) -> None:
    spec = OptimizerSpec(learning_rate=1.0, warmup_steps=2, decay=decay)
    optimizer = AdamW(WHOLE, _tensors(0), _tensors(1), spec, 6, CPU)
    assert [optimizer.step() for _ in rates] == pytest.approx(rates, abs=1e-5)


def test_a_rank_without_rows_steps_nothing() -> None:
    optimizer = AdamW({}, {}, {}, SPEC, 3, CPU)
    assert optimizer.step() == SPEC.learning_rate
    assert optimizer.num_steps == 1


def test_passes_are_those_of_the_replica_with_most() -> None:
    assert num_passes([(0, 1), (2,), ()], 3) == 2
    assert num_passes([(0, 1, 2), (3,)], 2) == 2
    assert num_passes([(), ()], 2) == 0
