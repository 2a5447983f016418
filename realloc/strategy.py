"""Parallel strategies: how one call is split over the GPUs of its mesh."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from realloc.errors import PlanError
from realloc.files import Reader
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape


@dataclass(frozen=True, order=True)
class Coordinates:
    """Where a rank stands in its mesh: which pipeline stage, data replica, tensor shard."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True, order=True)
class Strategy:
    """Degrees of parallelism and micro-batching of one call.

    `dp * tp * pp` is the number of GPUs. Ranks of a mesh are laid out with tp varying fastest,
    then dp, then pp, so that tensor-parallel neighbours are neighbours on the node.
    `micro_batches` is how many packed micro-batches each data-parallel rank makes of its share
    of a mini-batch (of the batch, for `generate` and `inference`).
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1

    @property
    def size(self) -> int:
        return self.dp * self.tp * self.pp

    def coordinates(self, index: int) -> Coordinates:
        """Coordinates of the `index`-th rank of the mesh."""
        rest, tp = divmod(index, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(pp=pp, dp=dp, tp=tp)

    def index(self, at: Coordinates) -> int:
        return (at.pp * self.dp + at.dp) * self.tp + at.tp

    def __str__(self) -> str:
        suffix = f"m{self.micro_batches}" if self.micro_batches > 1 else ""
        return f"d{self.dp}t{self.tp}p{self.pp}{suffix}"

    def check(self, mesh: DeviceMesh, shape: ModelShape | None, where: str) -> None:
        """Raises PlanError when the strategy does not fit the mesh or the model's shape."""
        if min(self.dp, self.tp, self.pp, self.micro_batches) < 1:
            raise PlanError(f"{where}: every degree of {self} must be at least 1.")
        if self.size != mesh.size:
            raise PlanError(
                f"{where}: dp {self.dp} x tp {self.tp} x pp {self.pp} = {self.size}, but mesh "
                f"{mesh} has {mesh.size} GPU(s); change a degree or the mesh."
            )
        if shape is not None:
            reason = forbidden(self, shape)
            if reason:
                raise PlanError(f"{where}: strategy {self} is not possible: {reason}.")


def forbidden(strategy: Strategy, shape: ModelShape) -> str | None:
    """Why a model of this shape cannot be split so; None when it can."""
    tp, pp = strategy.tp, strategy.pp
    if shape.num_heads % tp:
        return f"tp {tp} does not divide the {shape.num_heads} attention heads"
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        return f"tp {tp} neither divides nor is a multiple of the {shape.num_kv_heads} kv heads"
    if shape.ffn_dim % tp:
        return f"tp {tp} does not divide the MLP width {shape.ffn_dim}"
    if pp > shape.num_layers:
        return f"pp {pp} exceeds the {shape.num_layers} layers"
    return None


_SHORT = re.compile(r"d(\d{1,6})t(\d{1,6})p(\d{1,6})(?:m(\d{1,6}))?")


def parse_strategy(value: Any, where: str) -> Strategy:
    """Reads `d4t2p1`, `d4t2p1m8` or a mapping of degrees. Raises PlanError or InputError."""
    if isinstance(value, str):
        match = _SHORT.fullmatch(value)
        if not match:
            raise PlanError(f"{where}: cannot read the strategy '{value}'; write it as d4t2p1m8.")
        return Strategy(int(match[1]), int(match[2]), int(match[3]), int(match[4] or 1))
    reader = Reader(value, where)
    strategy = Strategy(
        dp=reader.integer("dp", 1, minimum=1, maximum=1_000_000),
        tp=reader.integer("tp", 1, minimum=1, maximum=1_000_000),
        pp=reader.integer("pp", 1, minimum=1, maximum=1_000_000),
        micro_batches=reader.integer("micro_batches", 1, minimum=1, maximum=1_000_000),
    )
    reader.done()
    return strategy


def strategy_content(strategy: Strategy) -> Mapping[str, Any]:
    return {
        "dp": strategy.dp,
        "tp": strategy.tp,
        "pp": strategy.pp,
        "micro_batches": strategy.micro_batches,
    }
