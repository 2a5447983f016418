"""Which model shapes the runtime runs, of those that can be planned."""

from __future__ import annotations

from realloc.errors import InputError
from realloc.model_shape import ModelShape


def check_runs(shape: ModelShape, where: str) -> None:
    """Raises InputError for a shape that is good for planning only."""
    if shape.is_moe:
        raise InputError(
            f"{where}: the model has {shape.num_experts} experts in each layer; mixtures of experts can be "
            f"planned, but this version does not run them. Give a dense model."
        )
