"""Rows of files with published measurements, and what every kind of row can say about itself.

Decides how a row is read and reported; `published_real`, `published_training` and `published_others` know
what the systems did. Anything a row asks for that is not modelled raises Unsupported with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Protocol

from benchmarks.published_fit import Parameter, Target, Values
from cost_models.curve import Curve
from cost_models.profile import HardwareProfile
from realloc.errors import ReallocError
from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
from realloc.files import Reader
from realloc.lengths import Lengths
from realloc.model_shape import ModelShape
from realloc.model_zoo import named_shapes

FIT, PREDICT, SOURCE = "fit", "predict", "source"


class Unsupported(ReallocError):
    """Why a row or a section is not predicted."""


@dataclass(frozen=True)
class Row:
    """One published number. `use`: fit, predict, or source (the profile was made from it)."""

    section: str
    fields: Mapping[str, Any]
    use: str
    measured: float | None
    explained: bool = True
    """Whether the model claims to explain it; otherwise `note` says why not."""
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def number(self, key: str, default: float | None = None) -> float:
        """Raises Unsupported where it is missing or no number above 0."""
        value = self.fields.get(key, default)
        found = number(value)
        if found is None:
            raise Unsupported(f"{self.section}: {key}: expected a number above 0, found {value!r}")
        return found

    def count(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))


class System(Protocol):
    """One section's system: its free parameters, its rows, and their predictions."""

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    @property
    def rows(self) -> Sequence[Row]: ...

    def targets(self, row: Row, index: int) -> list[Target]:
        """What the row offers to a fit."""

    def predict(self, row: Row, values: Values) -> float: ...

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        """Further fields of the row's report; may take seconds."""


def number(value: Any) -> float | None:
    """A number above 0, which YAML gives as text where it is written as 1e9; None for anything else."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except ValueError:
        return None
    return found if isfinite(found) and found > 0 else None


def use_of(given: Mapping[str, Any]) -> str:
    return FIT if given.get("use") == FIT else PREDICT


def rows_of(section: str, content: Mapping[str, Any], measured: str) -> list[Row]:
    """The section's rows; those without that number are predicted all the same, and never fitted."""
    found = []
    for given in content["rows"]:
        row = given if isinstance(given, dict) else {"row": given}
        value = number(row.get(measured))
        found.append(Row(section, row, PREDICT if value is None else use_of(row), value))
    return found


def shape_of(name: Any) -> ModelShape:
    """A shape by name: of the zoo, or a Llama's size alone such as 7b. Raises Unsupported."""
    shapes = named_shapes()
    text = str(name).lower().replace("_", "-")
    for known in (
        text,
        f"llama-{text}",
        text.replace("llama-3.1-", "llama-3-"),
        text.replace("llama-2-", "llama-"),
    ):
        if known in shapes:
            return shapes[known]
    if text.replace("codellama-", "llama-") in shapes:
        return shapes[text.replace("codellama-", "llama-")]
    raise Unsupported(f"model {name!r} is not among the shapes known by name")


def experiment_of(
    shapes: Mapping[str, ModelShape],
    sequences: int,
    prompt: int,
    response: int,
    algorithm: str = "ppo",
    hyperparameters: Mapping[str, Any] | None = None,
) -> Experiment:
    """All lengths equal, hyperparameters not given the algorithm's own.

    Contexts are stretched where a setting is longer than the model's own.
    """
    longest = prompt + response
    models = {
        role: ModelSpec(
            role, role, replace(shape, max_positions=max(shape.max_positions, longest)), OptimizerSpec()
        )
        for role, shape in shapes.items()
    }
    workload = Workload(sequences, Lengths(float(prompt), prompt), Lengths(float(response), response))
    made = Experiment(algorithm, models, workload, dtype="bfloat16")
    if hyperparameters is None:
        return made
    given = made.resolve_algorithm().hyperparameters(Reader(dict(hyperparameters), "hyperparameters"))
    return replace(made, hyperparameters=given)


def with_share(profile: HardwareProfile, share: float) -> HardwareProfile:
    """Products, and attention with them, at a share of the profile's rates."""
    curves = tuple((name, Curve(tuple((x, y * share) for x, y in c.points))) for name, c in profile.matmul)
    return replace(profile, matmul=curves)
