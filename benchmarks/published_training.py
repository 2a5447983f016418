"""Training throughput: Megatron-LM's and torchtitan's, priced by what each of them overlaps.

Our runtime overlaps none of its collectives with compute, and its prices say so; these two systems do, so
their rows take the cost model's terms and hide what the systems hide. Megatron-LM (its README): gradient
reduction and parameter gathers behind compute, tensor-parallel messages in `tp` pieces behind the products
they belong to, so that one piece shows. torchtitan: FSDP's gathers and scatters behind compute;
tensor-parallel messages in the open, unless its strategy is async.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.published_fit import Parameter, Target, Values
from benchmarks.published_rows import Row, Unsupported, experiment_of, rows_of, shape_of, with_share
from cost_models.model import CostModel
from cost_models.profile import load_profile
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.strategy import Recompute, Schedule, Strategy, forbidden

SHARE = Parameter(
    "share", "achieved share of the profile's rate of matrix products (and attention)", 1.0, 0.3, 1.04
)
MEGATRON_VOCAB, MEGATRON_LENGTH = 131_072, 4096
TITAN_LENGTH, TITAN_LOCAL_BATCH = 8192, 2


def step_s(
    shape: ModelShape, device: str, strategy: Strategy, sequences: int, length: int, values: Values
) -> Mapping[str, float]:
    """Seconds of one optimizer step by term, nothing overlapped. Raises Unsupported."""
    if why := forbidden(strategy, shape):
        raise Unsupported(f"{strategy}: {why}")
    per_node = min(8, strategy.size)
    if strategy.size % per_node or per_node % strategy.tp:
        raise Unsupported(f"{strategy}: {strategy.size} GPUs in nodes of {per_node}, tp inside a node alone")
    given = {"mini_batches": 1, "epochs": 1}
    experiment = experiment_of({"actor": shape}, sequences, 1, length - 1, "sft", given)
    cluster = Cluster(strategy.size // per_node, per_node, device)
    costs = CostModel(
        experiment, experiment.graph(), cluster, with_share(load_profile(device), values["share"])
    )
    (call,) = costs.graph.calls
    return costs.call_terms(call, Placement(DeviceMesh(0, strategy.size, per_node), strategy))


def hidden_s(seconds: float, behind_s: float) -> float:
    """What is left of messages of so many seconds behind so many seconds of compute."""
    return max(0.0, seconds - behind_s)


def model_flops(shape: ModelShape, sequences: int, length: int) -> float:
    """Of a step, as Megatron-LM counts them: attention in full, recomputation never.

    Narayanan et al., arXiv 2104.04473, appendix: 3 x (products, attention, logits), without recomputation.
    """
    h, tokens = shape.hidden, sequences * length
    layer = 2.0 * tokens * (4 * h * h + 2 * h * shape.ffn_dim) + 4.0 * tokens * length * h
    return 3.0 * (shape.num_layers * layer + 2.0 * tokens * h * shape.vocab)


class Megatron:
    """Rows of GPT shapes by hidden size and layers; Tflops/s of model flops for each GPU."""

    parameters: Sequence[Parameter] = (SHARE,)

    def __init__(self, section: str, content: Mapping[str, Any], device: str) -> None:
        self.rows, self._device = rows_of(section, content, "tflops_per_gpu"), device

    def targets(self, row: Row, index: int) -> list[Target]:
        assert row.measured is not None, "rows to fit on have a number"
        return [Target(index, row.measured, lambda values: self.predict(row, values))]

    def predict(self, row: Row, values: Values) -> float:
        """With a micro-batch of one sequence, interleaved stages where there is a pipeline.

        The table's batches are not given: a replica has 4 sequences, or 3 for each stage, which makes the
        1,152 that the README names for its 175B model on 8 stages.
        """
        tp, pp, gpus = row.count("tp", 1), row.count("pp", 1), row.count("gpus")
        if gpus % (tp * pp):
            raise Unsupported(f"tp {tp} x pp {pp} does not divide {gpus} GPUs")
        dp, shape = gpus // (tp * pp), self._shape(row)
        sequences = row.count("batch", dp * max(4, 3 * pp))
        if sequences % dp:
            raise Unsupported(f"{sequences} sequences do not divide over dp {dp}")
        length = row.count("sequence", MEGATRON_LENGTH)
        each = max(1, sequences // dp // row.count("micro_batch", 1))
        terms = step_s(shape, self._device, _megatron(shape, dp, tp, pp, each), sequences, length, values)
        seconds = sum(terms.values()) - terms["dp_communication"] - terms["tp_communication"]
        seconds += hidden_s(terms["dp_communication"], terms["compute"])
        seconds += max(terms["tp_communication"] / tp, terms["tp_communication"] - terms["compute"])
        return model_flops(shape, sequences, length) / seconds / gpus / 1e12

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        return {}

    def _shape(self, row: Row) -> ModelShape:
        """GPT: heads of 128, a plain MLP four times as wide, biases, layer norms."""
        hidden = row.count("hidden")
        heads = row.count("heads", max(1, hidden // 128))
        if hidden % heads:
            raise Unsupported(f"{heads} heads do not divide the hidden size {hidden}")
        return ModelShape(
            family="gpt_neox",
            hidden=hidden,
            num_layers=row.count("layers"),
            num_heads=heads,
            num_kv_heads=row.count("kv_heads", heads),
            head_dim=hidden // heads,
            ffn_dim=row.count("ffn", 4 * hidden),
            vocab=row.count("vocab", MEGATRON_VOCAB),
            max_positions=row.count("sequence", MEGATRON_LENGTH),
            norm="layer",
            gated_mlp=False,
            activation="gelu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rotary_dim=hidden // heads,
        )


def _megatron(shape: ModelShape, dp: int, tp: int, pp: int, micro_batches: int) -> Strategy:
    plain = Strategy(dp, tp, pp, micro_batches, zero=1 if dp > 1 else 0, sequence_parallel=tp > 1)
    if pp == 1 or micro_batches % pp:
        return plain
    virtual = max((v for v in (1, 2, 3, 4) if shape.num_layers % (pp * v) == 0), default=1)
    if virtual == 1:
        return plain
    return replace(plain, schedule=Schedule.INTERLEAVED, virtual_stages=virtual)


_DEGREE = re.compile(r"(fsdp|ddp|dp|tp|pp)[\s_-]*(\d*)")
_KNOWN = (
    "async",
    "tp",
    "sp",
    "full",
    "selective",
    "no",
    "none",
    "ac",
    "recompute",
    "recomputation",
    "eager",
    "bf16",
    "1f1b",
    "interleaved",
)
_NOT_MODELLED: Mapping[str, str] = {
    "compile": "operators that a compiler fuses are not modelled",
    "compiled": "operators that a compiler fuses are not modelled",
    "hs": "hybrid sharding (HSDP) is not modelled",
    "cp": "context parallelism is not modelled",
    "float8": "float8 has other rates than bf16, and the profile has none",
    "fp8": "float8 has other rates than bf16, and the profile has none",
}


class Titan:
    """Rows of tokens/s for each GPU under strategies such as `fsdp8 tp8`."""

    parameters: Sequence[Parameter] = (replace(SHARE, start=0.9, default=0.679),)

    def __init__(self, section: str, content: Mapping[str, Any], device: str) -> None:
        self.rows, self._device = rows_of(section, content, "tokens_per_s_per_gpu"), device

    def targets(self, row: Row, index: int) -> list[Target]:
        assert row.measured is not None, "rows to fit on have a number"
        return [Target(index, row.measured, lambda values: self.predict(row, values))]

    def predict(self, row: Row, values: Values) -> float:
        strategy, is_async = titan_strategy(row)
        shape = shape_of(row.fields.get("model"))
        length = row.count("sequence", TITAN_LENGTH)
        local = row.count("local_batch", 4 * strategy.pp if strategy.pp > 1 else TITAN_LOCAL_BATCH)
        if "local_batch" not in row.fields and "batch" in row.fields:
            local = max(1, row.count("batch") // strategy.dp)
        strategy = replace(strategy, micro_batches=local if strategy.pp > 1 else 1)
        terms = step_s(shape, self._device, strategy, local * strategy.dp, length, values)
        seconds = sum(terms.values()) - terms["dp_communication"] - terms["tp_communication"]
        seconds += hidden_s(terms["dp_communication"], terms["compute"])
        tp_s = terms["tp_communication"]
        seconds += max(tp_s / strategy.tp, tp_s - terms["compute"]) if is_async else tp_s
        return local * strategy.dp * length / seconds / strategy.size

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        return {}


def titan_strategy(row: Row) -> tuple[Strategy, bool]:
    """Degrees of a strategy's text, and whether its tensor parallelism is async. Raises Unsupported."""
    text = str(row.fields.get("strategy", "")).lower()
    rest = _DEGREE.sub(" ", text)
    words = [
        word for word in re.split(r"[^a-z0-9]+", f"{rest} {row.fields.get('precision', '')}".lower()) if word
    ]
    for word in words:
        if word not in _KNOWN and word != "torch":
            name = word if word in _NOT_MODELLED else word.rstrip("0123456789")
            reason = _NOT_MODELLED.get(name, f"'{word}' is unknown")
            raise Unsupported(f"strategy '{text}': {reason}")
    gpus = row.count("gpus")
    degrees: dict[str, int | None] = {}
    for name, number in _DEGREE.findall(text):
        if name in ("fsdp", "ddp", "dp", "pp") or number:
            degrees["dp" if name in ("fsdp", "ddp", "dp") else name] = int(number) if number else None
    given = 1
    for number in degrees.values():
        given *= number or 1
    open_ = [name for name, number in degrees.items() if number is None] or (
        [] if "dp" in degrees else ["dp"]
    )
    if gpus % given or len(open_) > 1 or (not open_ and given != gpus):
        raise Unsupported(f"strategy '{text}' does not say how {gpus} GPUs are used")
    for name in open_:
        degrees[name] = gpus // given
    dp, tp, pp = (degrees.get(name) or 1 for name in ("dp", "tp", "pp"))
    stage = 0 if dp == 1 or "ddp" in text else 3 if pp == 1 else 1
    asked = row.fields.get("recompute", "")
    kind = Recompute.FULL if "full" in words or asked in (True, "full") else Recompute.SELECTIVE
    if "no" in words or "none" in words or asked in (False, "none"):
        kind = Recompute.NONE
    elif not {"full", "selective"} & set(words) and {"recompute", "recomputation"} & set(words):
        kind = Recompute.FULL
    strategy = Strategy(dp, tp, pp, zero=stage, sequence_parallel=tp > 1, recompute=kind)
    if "interleaved" in words and pp > 1:
        strategy = replace(strategy, schedule=Schedule.INTERLEAVED, virtual_stages=2)
    return strategy, "async" in words
