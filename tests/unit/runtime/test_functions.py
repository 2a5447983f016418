"""An algorithm's functions are held to their contracts: what they return instead is said."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from realloc.dataflow import DataKey, Per
from realloc.errors import RunError
from runtime.data_store import IterationData
from runtime.functions import FunctionTable

ONE = torch.ones(())
TABLE = FunctionTable(__name__)


def returned(value: Any, batch: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """A loss that returns the model's output."""
    return value


def prepared(batch: Any, hyperparameters: Mapping[str, Any]) -> Any:
    return batch


def picked(batch: Any, hyperparameters: Mapping[str, Any]) -> Any:
    return batch.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType instead of a loss and a mapping of metrics"),
        (ONE, r"a tensor of shape \[\] instead of a loss"),
        ((torch.ones(3), {}), r"a tensor of shape \[3\] for the loss"),
        ((1.0, {}), "float for the loss"),
        ((ONE, {"margin": torch.ones(2)}), r"a tensor of shape \[2\] for margin"),
        ((ONE, {"margin": "big"}), "str for margin"),
    ],
)
def test_a_loss_is_a_scalar_with_metrics(value: Any, message: str) -> None:
    with pytest.raises(RunError, match=f"^{__name__}:returned returned {message}"):
        TABLE.loss("returned")(value, None, {})  # type: ignore[arg-type]


def test_a_loss_that_is_right_passes() -> None:
    right = (ONE, {"margin": ONE, "count": 3})
    assert TABLE.loss("returned")(right, None, {}) is right  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType instead of a mapping of returns"),
        ({"return": ONE}, "nothing for 'returns'"),
        ({"returns": [1.0]}, "list for 'returns', which has to be a tensor"),
    ],
)
def test_what_is_prepared_is_there(value: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        TABLE.prepare("prepared", ("returns",))(value, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [([True, False], "list for a batch of 2"), (torch.ones(3), r"a tensor of shape \[3\] for a batch of 2")],
)
def test_a_selection_has_an_element_for_each_sequence(value: Any, message: str) -> None:
    batch = SimpleNamespace(value=value, num_sequences=2)
    with pytest.raises(RunError, match=message):
        TABLE.select("picked")(cast(Any, batch), {})
    batch.value = torch.tensor([True, False])
    assert TABLE.select("picked")(cast(Any, batch), {}) is batch.value


def test_values_are_as_many_as_their_sequences_take() -> None:
    keys = {"scores": DataKey("scores", Per.SEQUENCE), "values": DataKey("values", Per.TOKEN)}
    data = IterationData(keys, [2, 2, 2], {"values": [3, 4, 5]})
    data.put("values", [0, 2], torch.arange(8.0))
    assert data.packed("values", [2]).tolist() == [3, 4, 5, 6, 7]
    message = r"'values' has values of shape \[7\]; 2 sequences take \[8\] \(per token\)"
    with pytest.raises(RunError, match=message):
        data.put("values", [0, 2], torch.arange(7.0))
    with pytest.raises(RunError, match=r"'scores' has values of shape \[2, 1\]"):
        data.put("scores", [0, 2], torch.ones(2, 1))
