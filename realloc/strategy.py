"""Parallel strategies: how one call is split over the GPUs of its mesh."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from realloc.dataflow import CallKind
from realloc.errors import PlanError
from realloc.files import Reader, nearest
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape


@dataclass(frozen=True, order=True)
class Coordinates:
    """Where a rank stands in its mesh: which pipeline stage, data replica, tensor shard."""

    pp: int
    dp: int
    tp: int


class Schedule(StrEnum):
    """The order in which a pipeline stage runs its micro-batches.

    `gpipe`: all forwards, then all backwards (Huang et al., arXiv 1811.06965). `1f1b`: one forward,
    one backward in turn (Narayanan et al., arXiv 2104.04473). `interleaved`: 1F1B with several
    stages on each rank (same source, section 2.2). `zero_bubble`: 1F1B with the weight gradients
    put off into what would be the bubble (Qi et al., arXiv 2401.10241, ZB-H1).
    """

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero_bubble"


class Recompute(StrEnum):
    """Which activations the forward pass drops and the backward pass computes again.

    `selective` drops what attention and the MLP's inner width keep inside a layer, `full`
    everything but each layer's input.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True, order=True)
class Strategy:
    """How one call is split over the GPUs of its mesh, and how it saves memory.

    `dp * tp * pp` is the number of GPUs. Ranks of a mesh are laid out with tp varying fastest,
    then dp, then pp, so that tensor-parallel neighbours are neighbours on the node.
    `micro_batches` is how many packed micro-batches each data-parallel rank makes of its share
    of a mini-batch (of the batch, for `inference`); `generate` has room in its cache for one m-th of
    the share in each lane, and as many lanes as stages (at most m).

    `zero` (train_step): 1 splits optimizer states over dp, 2 gradients too, 3 parameters too
    (Rajbhandari et al., arXiv 1910.02054). `sequence_parallel`: norms and residuals are split over
    tp by tokens (Korthikanti et al., arXiv 2205.05198). `virtual_stages`: stages on each rank, for
    the interleaved schedule. `offload`: what a call does not need between its uses leaves the
    device. A frozen role's parameters wait in host memory. Of a train_step, gradients are dropped
    and optimizer states wait in host memory; so do its parameters, once they are reallocated, when no
    other call uses this copy of them. Another copy of a trained role, which a reallocation fills, is
    dropped after its calls and allocated when it is filled again. Calls that share a copy must all
    say so for it to leave.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    schedule: Schedule = Schedule.ONE_F_ONE_B
    virtual_stages: int = 1
    recompute: Recompute = Recompute.NONE
    offload: bool = False

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
        """The short form, such as `d4t2p1m8z1+sp+full`; `parse_strategy` reads it back."""
        text = f"d{self.dp}t{self.tp}p{self.pp}"
        text += f"m{self.micro_batches}" if self.micro_batches > 1 else ""
        text += f"z{self.zero}" if self.zero else ""
        if self.schedule is Schedule.INTERLEAVED:
            text += f"+i{self.virtual_stages}"
        flags = {
            "sp": self.sequence_parallel,
            "gpipe": self.schedule is Schedule.GPIPE,
            "zb": self.schedule is Schedule.ZERO_BUBBLE,
            "selective": self.recompute is Recompute.SELECTIVE,
            "full": self.recompute is Recompute.FULL,
            "offload": self.offload,
        }
        return text + "".join(f"+{flag}" for flag, is_on in flags.items() if is_on)

    def check(self, mesh: DeviceMesh, shape: ModelShape | None, where: str) -> None:
        """Raises PlanError when the strategy does not fit the mesh or the model's shape."""
        if min(self.dp, self.tp, self.pp, self.micro_batches, self.virtual_stages) < 1:
            raise PlanError(f"{where}: every degree of {self} must be at least 1.")
        if self.size != mesh.size:
            raise PlanError(
                f"{where}: dp {self.dp} x tp {self.tp} x pp {self.pp} = {self.size}, but mesh "
                f"{mesh} has {mesh.size} GPU(s); change a degree or the mesh."
            )
        reason = inconsistent(self) or (forbidden(self, shape) if shape is not None else None)
        if reason:
            raise PlanError(f"{where}: strategy {self} is not possible: {reason}.")

    def check_kind(self, kind: CallKind, where: str) -> None:
        """Raises PlanError when a call of this kind has no use for one of the fields."""
        for field, kinds in _FIELD_KINDS.items():
            if getattr(self, field) != getattr(_DEFAULT, field) and kind not in kinds:
                raise PlanError(
                    f"{where}: {field} is {getattr(self, field)}, but a {kind} call has no use for it; "
                    f"leave it out."
                )


_DEFAULT = Strategy()
_TRAIN = (CallKind.TRAIN_STEP,)
_MODEL = (CallKind.GENERATE, CallKind.INFERENCE, CallKind.TRAIN_STEP)
_FIELD_KINDS: Mapping[str, tuple[CallKind, ...]] = {
    "zero": _TRAIN,
    "schedule": _TRAIN,
    "virtual_stages": _TRAIN,
    "recompute": _TRAIN,
    "sequence_parallel": (CallKind.INFERENCE, CallKind.TRAIN_STEP),
    "offload": _MODEL,
}


def uses(kind: CallKind, field: str) -> bool:
    """Whether a field of a strategy can make a difference to a call of this kind."""
    if kind is CallKind.COMPUTE:
        return field == "dp"
    return kind in _FIELD_KINDS.get(field, _MODEL)


def inconsistent(strategy: Strategy) -> str | None:
    """Why the fields contradict each other, whatever the model; None when they do not."""
    pp, virtual = strategy.pp, strategy.virtual_stages
    if not 0 <= strategy.zero <= 3:
        return f"zero {strategy.zero} is not a stage from 0 to 3"
    if strategy.zero and strategy.dp == 1:
        return f"zero {strategy.zero} splits over dp, which is 1"
    if strategy.zero >= 2 and pp > 1:
        return f"zero {strategy.zero} would reduce gradients at every micro-batch of a pipeline; use zero 1"
    if strategy.sequence_parallel and strategy.tp == 1:
        return "sequence_parallel splits over tp, which is 1"
    if strategy.schedule is not Schedule.ONE_F_ONE_B and pp == 1:
        return f"the schedule {strategy.schedule} needs a pipeline, but pp is 1"
    if (virtual > 1) != (strategy.schedule is Schedule.INTERLEAVED):
        return "virtual_stages above 1 and the interleaved schedule go together"
    return None


def forbidden(strategy: Strategy, shape: ModelShape) -> str | None:
    """Why a model of this shape cannot be split so; None when it can."""
    tp, pp = strategy.tp, strategy.pp
    if shape.num_heads % tp:
        return f"tp {tp} does not divide the {shape.num_heads} attention heads"
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        return f"tp {tp} neither divides nor is a multiple of the {shape.num_kv_heads} kv heads"
    if shape.ffn_dim % tp:
        return f"tp {tp} does not divide the MLP width {shape.ffn_dim}"
    virtual = strategy.virtual_stages
    if pp * virtual > shape.num_layers:
        stages = f"pp {pp}" + (f" x {virtual} virtual stages" if virtual > 1 else "")
        return f"{stages} exceeds the {shape.num_layers} layers"
    return None


_SHORT = re.compile(r"d(\d{1,6})t(\d{1,6})p(\d{1,6})(?:m(\d{1,6}))?(?:z(\d))?((?:\+[a-z0-9]+)*)")
_FLAGS: Mapping[str, Mapping[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "gpipe": {"schedule": Schedule.GPIPE},
    "zb": {"schedule": Schedule.ZERO_BUBBLE},
    "selective": {"recompute": Recompute.SELECTIVE},
    "full": {"recompute": Recompute.FULL},
    "offload": {"offload": True},
}
_INTERLEAVED = re.compile(r"i(\d{1,4})")


def parse_strategy(value: Any, where: str) -> Strategy:
    """Reads `d4t2p1`, `d4t2p1m8z1+sp+full` or a mapping of fields. Raises PlanError or InputError."""
    if isinstance(value, str):
        return _parse_short(value, where)
    reader = Reader(value, where)
    strategy = Strategy(
        dp=reader.integer("dp", 1, minimum=1, maximum=1_000_000),
        tp=reader.integer("tp", 1, minimum=1, maximum=1_000_000),
        pp=reader.integer("pp", 1, minimum=1, maximum=1_000_000),
        micro_batches=reader.integer("micro_batches", 1, minimum=1, maximum=1_000_000),
        zero=reader.integer("zero", 0, maximum=3),
        sequence_parallel=reader.get("sequence_parallel", bool, False),
        schedule=Schedule(reader.choice("schedule", list(Schedule), "1f1b")),
        virtual_stages=reader.integer("virtual_stages", 1, minimum=1, maximum=1000),
        recompute=Recompute(reader.choice("recompute", list(Recompute), "none")),
        offload=reader.get("offload", bool, False),
    )
    reader.done()
    return strategy


def _parse_short(text: str, where: str) -> Strategy:
    match = _SHORT.fullmatch(text)
    fields: dict[str, Any] = {}
    for word in match[6].split("+")[1:] if match else ():
        if interleaved := _INTERLEAVED.fullmatch(word):
            fields |= {"schedule": Schedule.INTERLEAVED, "virtual_stages": int(interleaved[1])}
        elif word in _FLAGS:
            fields |= _FLAGS[word]
        else:
            raise PlanError(f"{where}: unknown '+{word}' in '{text}'.{nearest(word, [*_FLAGS, 'i2'])}")
    if match is None:
        raise PlanError(f"{where}: cannot read the strategy '{text}'; write it as d4t2p1m8.")
    dp, tp, pp = (int(match[i]) for i in (1, 2, 3))
    return Strategy(dp, tp, pp, int(match[4] or 1), int(match[5] or 0), **fields)


def strategy_content(strategy: Strategy) -> Mapping[str, Any]:
    """The strategy as a mapping: the degrees, and whatever else is not its default."""
    content: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if name in ("dp", "tp", "pp", "micro_batches") or value != getattr(_DEFAULT, name):
            content[name] = str(value) if isinstance(value, StrEnum) else value
    return content
