"""Compute seconds from a profile's tables: what the runtime's own code took, where it was measured.

Where a size lies outside of what was measured, the table is continued by the roofline's slope; where
a quantity has no table, a related one is scaled by the roofline; where the model has none at all, the
roofline answers alone. Which of these it was is kept, so that a plan can say what stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cost_models.compute import ComputeCosts, Pack, Pass
from cost_models.profile import HardwareProfile
from cost_models.sources import Found, Source
from cost_models.tables import Table
from realloc.lengths import MOST_RAGGED, raggedness
from realloc.model_shape import ModelShape
from realloc.signature import call_signature, ends_signature, layer_signature
from realloc.strategy import Recompute

_PER_MICRO_BATCH = 8.0

# What stands in for a quantity that was not measured, scaled by the roofline's ratio of the two.
_RELATED: Mapping[str, tuple[str, ...]] = {
    "prefill": ("inference", "forward"),
    "inference": ("forward", "prefill"),
    "forward": ("inference",),
    "backward": ("forward", "inference"),
    "weight": ("backward", "forward", "inference"),
    "selective": ("full", "forward", "inference"),
    "full": ("selective", "forward", "inference"),
}
_FORWARD: Mapping[Pass, str] = {
    Pass.TRAIN: "forward",
    Pass.INFERENCE: "inference",
    Pass.PREFILL: "prefill",
}


class MeasuredCosts(ComputeCosts):
    """Compute seconds of a model of which the profile has tables.

    `sources`: quantity -> the worst that a number of it came from, and what was asked of which range
    where that was exceeded. `busy`: ranks of a host that compute at once. They slow down what streams
    through memory more than what stays in a cache, and tables may tell of each quantity how much. Seconds are
    those that, times the profile's `slowdown(busy)`, are what it takes then.
    """

    def __init__(
        self, profile: HardwareProfile, shape: ModelShape, dtype: str, tp: int, busy: int = 1
    ) -> None:
        super().__init__(profile, shape, dtype, tp)
        self._crowding = profile.crowding(busy)
        self._usual = profile.slowdown(busy) / profile.beyond(busy)
        self._dtype = dtype
        self._layer_name, self._ends_name = layer_signature(shape, tp), ends_signature(shape, tp)
        self._tables = profile.tables_of(dtype)
        self._nearest: dict[tuple[str, str, float], Table | None] = {}
        self._decoded: dict[tuple[float, float, float, bool], float] = {}
        self._whole_bytes = sum(self.stage_units(1, 0)) * self.element_bytes
        self.sources: dict[str, tuple[Source, str]] = {}

    @property
    def found(self) -> Sequence[Found]:
        return [
            (source, f"{quantity} ({detail})" if detail else quantity)
            for quantity, (source, detail) in self.sources.items()
        ]

    @staticmethod
    def suits(profile: HardwareProfile, shape: ModelShape, dtype: str, tp: int) -> bool:
        """Whether the profile has tables of the layers or of the ends of such a model's shard."""
        names = {layer_signature(shape, tp), ends_signature(shape, tp)}
        return any(of in names for of, _, _ in profile.tables_of(dtype))

    def forward_layer_s(self, pack: Pack, sequence_parallel: bool = False, use: Pass = Pass.TRAIN) -> float:
        return self._of_pack(_FORWARD[use], pack, sequence_parallel)

    def backward_layer_s(self, pack: Pack, sequence_parallel: bool = False) -> float:
        return self._of_pack("backward", pack, sequence_parallel)

    def weight_layer_s(self, pack: Pack) -> float:
        return self._of_pack("weight", pack, False)

    def recompute_layer_s(self, pack: Pack, recompute: Recompute, sequence_parallel: bool = False) -> float:
        if recompute is Recompute.NONE:
            return 0.0
        return self._of_pack(str(recompute), pack, sequence_parallel)

    def decode_layer_s(self, batch: float, context: float, working_set: float, ragged: bool = False) -> float:
        key = (batch, context, working_set, ragged)
        if key not in self._decoded:
            self._decoded[key] = self._decode_layer_s(*key)
        return self._decoded[key]

    def _decode_layer_s(self, batch: float, context: float, working_set: float, ragged: bool) -> float:
        def analytic(size: float, tokens: float) -> float:
            return super(MeasuredCosts, self).decode_layer_s(size, tokens, self._whole_bytes, ragged)

        here = super().decode_layer_s(batch, context, working_set, ragged)
        table = self._table(self._layer_name, "decode", MOST_RAGGED if ragged else 0.0)
        if table is None:
            return self._analytic("decode", here)
        # measured with all layers; a stage that holds fewer may keep them in a nearer cache
        nearer = here / analytic(batch, context)
        return self._at(table, "decode", batch, context, analytic) * nearer

    def embedding_s(self, tokens: float, use: Pass = Pass.TRAIN) -> float:
        if use is Pass.PREFILL and self._table(self._layer_name, "prefill") is not None:
            return 0.0  # generation's passes were measured whole
        quantity = "enter_train" if use is Pass.TRAIN else "enter"
        return self._of_ends(quantity, tokens, lambda x: super(MeasuredCosts, self).embedding_s(x))

    def embedding_backward_s(self, tokens: float = 0.0) -> float:
        return self._of_ends(
            "enter_backward", tokens, lambda x: super(MeasuredCosts, self).embedding_backward_s(x)
        )

    def zero_table_s(self) -> float:
        """Measured passes of hosts added rows to a table that was there."""
        if not self.is_cpu or self._table(self._ends_name, "enter_backward") is None:
            return super().zero_table_s()
        return self.memory_s(self.vocab * self.shape.hidden * self.element_bytes)

    def head_s(self, tokens: float, use: Pass = Pass.TRAIN) -> float:
        quantity = "head_train" if use is Pass.TRAIN else "head"
        return self._of_ends(quantity, tokens, lambda x: super(MeasuredCosts, self).head_s(x))

    def head_backward_s(self, tokens: float) -> float:
        return self._of_ends("head_backward", tokens, lambda x: super(MeasuredCosts, self).head_backward_s(x))

    def sample_s(self, batch: float) -> float:
        return self._of_ends("sample", batch, lambda x: super(MeasuredCosts, self).sample_s(x))

    def call_s(self, name: str, computes: str, sequences: float, micro_batches: float) -> float:
        table = self._tables.get((call_signature(name, computes, self.shape), "call", 0.0))
        if table is None:
            table = self._of_another_model(call_signature(name, computes))
            if table is None:
                return self._analytic("call", super().call_s(name, computes, sequences, micro_batches))
            self._note("call", Source.SCALED, "around another model")
        # a micro-batch costs about as much as a few sequences; nothing here has a model of its own
        return self._at(table, "call", sequences, micro_batches, lambda x, y: x + _PER_MICRO_BATCH * y)

    def generate_s(self, layers: int) -> float:
        """Seconds of a generate call beside its steps, on a stage of so many layers."""
        table = self._table(self._layer_name, "pack_weights")
        if table is None:
            return self._analytic("pack_weights", super().generate_s(layers))
        # all of it grows with the layers, the head aside
        return self._at(table, "pack_weights", float(max(1, layers)), 1.0, lambda x, _: x)

    def optimizer_s(self, elements: int, params: int) -> float:
        analytic = super().optimizer_s
        table = self._table("optimizer", "optimizer")
        if table is None or not elements:
            return self._analytic("optimizer", analytic(elements, params))
        return self._at(table, "optimizer", float(elements), 1.0, lambda x, _: analytic(int(x), params))

    def accumulate_s(self, elements: int) -> float:
        """Nothing, where backward passes were measured: they added to gradients that were there."""
        if self._table(self._layer_name, "backward") is not None:
            return 0.0
        return super().accumulate_s(elements)

    def _of_another_model(self, call: str) -> Table | None:
        """What the same call takes around another model: the same Python on as many sequences."""
        found = (table for (of, _, _), table in self._tables.items() if of.startswith(f"{call} of "))
        return next(found, None)

    def _table(self, of: str, quantity: str, ragged: float = 0.0) -> Table | None:
        """The table, of packs that are most nearly as ragged."""
        key = (of, quantity, ragged)
        if key not in self._nearest:
            found = [table for table in self._tables.values() if (table.of, table.quantity) == (of, quantity)]
            self._nearest[key] = min(found, key=lambda table: abs(table.ragged - ragged), default=None)
        return self._nearest[key]

    def _of_ends(self, quantity: str, rows: float, analytic: Callable[[float], float]) -> float:
        table = self._table(self._ends_name, quantity)
        if table is None:
            return self._analytic(quantity, analytic(rows))
        return self._at(table, quantity, rows, 1.0, lambda x, _: analytic(x))

    def _of_pack(self, quantity: str, pack: Pack, split: bool) -> float:
        key = (quantity, pack, split)
        if key not in self._layers:
            self._layers[key] = self._pack_s(quantity, pack, split)
        return self._layers[key]

    def _pack_s(self, quantity: str, pack: Pack, split: bool) -> float:
        """From the quantity's own table; else from a related one, scaled."""
        ragged = raggedness(pack.tokens / pack.runs, pack.sum_squares / pack.runs) if pack.runs > 1 else 0.0
        for name, rows_split in ((quantity, split), *((other, split) for other in _RELATED[quantity])):
            for suffix in ("_sp", "") if rows_split else ("",):
                table = self._table(self._layer_name, name + suffix, ragged)
                if table is None:
                    continue
                seconds = self._read_pack(table, name, pack, suffix == "_sp")
                if (name, suffix == "_sp") == (quantity, split):
                    return seconds
                self._note(quantity, Source.SCALED, f"from {name}")
                base = self._roofline(name, pack, suffix == "_sp")
                return seconds * self._roofline(quantity, pack, split) / base
        return self._analytic(quantity, self._roofline(quantity, pack, split))

    def _read_pack(self, table: Table, quantity: str, pack: Pack, split: bool) -> float:
        def slope(sequences: float, length: float) -> float:
            tokens = sequences * length
            made = Pack(tokens, tokens * length * table.squares, sequences if table.ragged else 1.0, 0.0)
            return self._roofline(quantity, made, split)

        length = pack.sum_squares / pack.tokens / table.squares
        return self._at(table, quantity, pack.tokens / length, length, slope)

    def _roofline(self, quantity: str, pack: Pack, split: bool) -> float:
        """The quantity by the roofline, not kept: packs asked for slopes never come again."""
        analytic = self.roofline
        if quantity == "backward":
            return analytic.backward_layer_s(pack, split)
        if quantity == "weight":
            return analytic.weight_layer_s(pack)
        if quantity in ("selective", "full"):
            return max(1e-12, analytic.recompute_layer_s(pack, Recompute(quantity), split))
        return analytic.forward_layer_s(pack, split)

    @property
    def roofline(self) -> ComputeCosts:
        """The same shard by the roofline alone."""
        if self._plain is None:
            self._plain = ComputeCosts(self._profile, self.shape, self._dtype, self.tp)
        return self._plain

    _plain: ComputeCosts | None = None

    def _at(
        self, table: Table, quantity: str, x: float, y: float, slope: Callable[[float, float], float]
    ) -> float:
        reading = table.at(x, y, slope)
        if reading.extrapolated:
            asked = f"{x:.4g}" if y == 1.0 else f"{x:.4g} x {y:.4g}"
            self._note(quantity, Source.EXTRAPOLATED, f"{asked}, measured {table.range_text}")
        else:
            self._note(quantity, Source.MEASURED, "")
        if not self._crowding or table.together is None:
            return reading.seconds
        more = self._crowding * (table.together.at(x, y, slope).seconds - reading.seconds)
        return (reading.seconds + more) / self._usual

    def _analytic(self, quantity: str, seconds: float) -> float:
        self._note(quantity, Source.ANALYTIC, "")
        return seconds

    def _note(self, quantity: str, source: Source, detail: str) -> None:
        known = self.sources.get(quantity)
        if known is None or source > known[0]:
            self.sources[quantity] = (source, detail)


def compute_costs(
    profile: HardwareProfile, shape: ModelShape, dtype: str, tp: int, busy: int = 1
) -> ComputeCosts:
    """The best that the profile can say of a shard beside others: its tables, else the roofline."""
    if MeasuredCosts.suits(profile, shape, dtype, tp):
        return MeasuredCosts(profile, shape, dtype, tp, busy)
    return ComputeCosts(profile, shape, dtype, tp)
