"""Bytes that a pass needs beside what stays: activations, logits, gradients on their way.

A pass holds most at one of a few moments, its phases; this module counts what lies on the device in
each of them, by cause, as the runtime computes it. Which rank, call and plan that is for, and what
stays between calls, is not its affair.

Causes: `activations` (kept for the backward pass, and the vectors at work), `logits` (with what
their gradient is made of), `gradients_in_flight` (of a unit, as autograd makes them, before they are
added to what stays), `staging` (ZeRO: buffers of its collectives and parameters that are gathered)
and `communication` (copies that a backend makes of what it reduces).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.compute import GRADIENT_BYTES, ComputeCosts
from realloc.strategy import Recompute, Schedule, Strategy

# What the runtime computes and keeps at a time (runtime.tensor_parallel), in elements.
LOGITS_CHUNK = 1 << 23
LOGITS_KEPT = 1 << 25

IN_FLIGHT = "gradients_in_flight"
Phase = Mapping[str, float]
"""Bytes by cause at one moment."""


@dataclass(frozen=True)
class StagePass:
    """A micro-batch on one rank of a pipeline stage.

    `tokens` are those of the micro-batch, `head_rows` those that get log-probabilities. `units` are
    the elements of the embedding, each layer, and final norm with head that the stage holds;
    `kept` is how many micro-batches' activations it keeps at once, `micro_batches` how many there
    are in all; where others are larger or smaller, how many of this one are as much.
    """

    costs: ComputeCosts
    strategy: Strategy
    tokens: float
    head_rows: float
    layers: int
    is_first: bool
    is_last: bool
    units: tuple[int, ...] = ()
    kept: float = 1.0
    micro_batches: float = 1

    @property
    def hidden(self) -> float:
        """Hidden states of all tokens."""
        return self.tokens * self.costs.shape.hidden * self.costs.element_bytes

    @property
    def rows(self) -> float:
        """Hidden states as they lie between the split parts of layers: a part of them, or all."""
        return self.hidden / self.costs.tp if self.strategy.sequence_parallel else self.hidden

    @property
    def inner(self) -> float:
        """Vectors within the MLP."""
        return self.tokens * self.costs.ffn * self.costs.element_bytes

    @property
    def table(self) -> float:
        """Elements of this shard of the vocabulary's matrix."""
        return float(self.costs.vocab * self.costs.shape.hidden)

    @property
    def has_logits(self) -> bool:
        return self.is_last and self.costs.shape.head == "lm"

    @property
    def ties(self) -> bool:
        """Whether embedding and head are one matrix here, whose two gradients wait for each other."""
        return self.has_logits and self.is_first and self.costs.shape.tied_embeddings


def activation_bytes(
    costs: ComputeCosts,
    tokens: float,
    recompute: Recompute = Recompute.NONE,
    sequence_parallel: bool = False,
) -> float:
    """What one layer keeps of `tokens` tokens for its backward pass.

    Counted as in Korthikanti et al. (MLSys 2023, section 4.1) for fused attention and norms: the two
    residual inputs and the two norm outputs, q, k, v and the attention's output, its log-sum-exp in
    fp32, and the inputs of the MLP's activation, product and last projection (a gated silu is one
    operator, and keeps its two inputs alone). Selective recomputation
    keeps the residual inputs and the norm outputs (section 5 there), full recomputation the layer's
    input. Sequence parallelism splits what is kept outside the matrices over tp (section 4.2.2); the
    norm outputs are kept as gathered, all rows on each rank.
    """
    shape = costs.shape
    q, kv = costs.heads * shape.head_dim, costs.kv_heads * shape.head_dim
    rows = tokens / costs.tp if sequence_parallel else tokens
    residual = rows * shape.hidden * costs.element_bytes
    if recompute is Recompute.FULL:
        return residual
    outside = (2 + costs.norm_vectors) * residual + 2 * tokens * shape.hidden * costs.element_bytes
    if recompute is Recompute.SELECTIVE:
        return outside
    vectors = 2 * q + 2 * kv + _mlp_vectors(costs) * costs.ffn
    return outside + tokens * (vectors * costs.element_bytes + 4 * costs.heads)


def _mlp_vectors(costs: ComputeCosts) -> int:
    """Vectors of the MLP's width: inputs of the activation, the gated product and the last matrix."""
    if not costs.shape.gated_mlp:
        return 2
    return 3 if costs.shape.activation == "silu" else 4


def forward_phases(at: StagePass) -> list[Phase]:
    """A forward pass that keeps nothing: within a layer's MLP, and at the head.

    An MLP's vectors are those of its activation's inputs and outputs. Outside of it lie the layer's
    input, the two norms' outputs, the attention's output and the sum of it and the input.
    """
    mlp = _mlp_vectors(at.costs) * at.inner
    outside = 3 * at.hidden + 5 * at.rows if at.strategy.sequence_parallel else 5 * at.hidden
    phases: list[Phase] = [{"activations": mlp + outside, **_messages(at)}]
    if at.has_logits:
        phases.append({"activations": 2 * at.hidden, "logits": _chunk_bytes(at)})
    return phases


def training_phases(at: StagePass) -> list[Phase]:
    """Forward and backward passes of all micro-batches, and what the step itself needs."""
    strategy, width = at.strategy, at.costs.element_bytes
    largest = max(at.units)
    kept = at.layers * activation_bytes(at.costs, at.tokens, strategy.recompute, strategy.sequence_parallel)
    exchange = _exchange(at, largest)
    # from the second micro-batch on ZeRO's buffer is there all the time, as large as any unit needs
    waiting = exchange["staging"] if strategy.zero >= 2 and at.micro_batches > 1 else 0.0
    phases = [_layer_phase(at, kept, waiting)]
    if at.is_last:
        phases.append(_head_phase(at, kept, waiting))
    if at.is_first:
        # a dense gradient of the whole table, except where CPUs add rows to what stays, and under ZeRO 2
        # and 3 the head's with it, to which CPUs add rows; the activations of this micro-batch are gone,
        # but for those that weight gradients wait for
        added = at.costs.is_cpu and (at.ties or strategy.zero < 2)
        made = (int(not added) + int(at.ties and strategy.zero >= 2)) * width * at.table
        others = at.kept if strategy.schedule is Schedule.ZERO_BUBBLE else at.kept - 1
        phase = {"activations": others * kept + 2 * at.hidden, IN_FLIGHT: made}
        phases.append(phase | (exchange if strategy.zero >= 2 else {}))
    if strategy.zero >= 2 and at.has_logits and not at.ties:
        phases.append({"activations": at.kept * kept, IN_FLIGHT: width * at.table} | exchange)
    if strategy.zero:
        phases.append({"staging": exchange["staging"]})
    if strategy.zero == 1:
        phases.append(exchange)
    return phases


def _messages(at: StagePass) -> Phase:
    """Hidden states on their way between stages: some received, some under way to the next."""
    return {"communication": 2 * at.rows} if at.strategy.pp > 1 else {}


def _layer_phase(at: StagePass, kept: float, waiting: float) -> Phase:
    """In the backward pass of the last layer's MLP: the gradients of its vectors and its output's.

    What is computed again is there as well. Where gradients are not made in the fp32 buffer itself,
    the layer's wait to be added; else there is one matrix's at a time.
    """
    costs, strategy = at.costs, at.strategy
    width, gated = costs.element_bytes, costs.shape.gated_mlp
    again = 0.0
    if strategy.recompute is not Recompute.NONE:
        whole = activation_bytes(costs, at.tokens, Recompute.NONE, strategy.sequence_parallel)
        part = activation_bytes(costs, at.tokens, Recompute.SELECTIVE, strategy.sequence_parallel)
        again = whole if strategy.recompute is Recompute.FULL else whole - part
    at_work = (2 if gated else 1) * at.inner + at.hidden
    if strategy.sequence_parallel:  # hidden states enter as gathered, and leave in parts
        at_work = max(at_work, 3 * at.hidden + 4 * at.rows)
    layer = float(costs.layer_elements)
    matrix = float(costs.ffn * costs.shape.hidden)
    made = layer if strategy.zero >= 2 or width < GRADIENT_BYTES else matrix
    # under ZeRO 2 and 3 the head's gradient waits for the embedding's
    held = width * at.table if at.ties and strategy.zero >= 2 else 0.0
    phase = {"activations": at.kept * kept + again + at_work, IN_FLIGHT: width * made + held}
    if strategy.zero < 2:
        return phase
    exchange = _exchange(at, layer)
    gathered = width * layer if strategy.zero == 3 else 0.0
    staging = max(waiting, exchange["staging"]) + gathered
    return phase | {"staging": staging, "communication": exchange["communication"]}


def _head_phase(at: StagePass, kept: float, waiting: float) -> Phase:
    """The head's backward pass: everything is kept, and the head's gradient is made."""
    width, strategy = at.costs.element_bytes, at.strategy
    rows = at.head_rows * at.costs.shape.hidden * width
    phase = {"activations": at.kept * kept + 3 * at.hidden + 2 * rows}
    if strategy.sequence_parallel:
        phase["activations"] += 4 * at.rows
    if at.has_logits:
        logits = at.head_rows * at.costs.vocab
        chunk = _chunk(at)
        # all other schedules begin a backward pass as soon as its forward pass is done
        passes = at.micro_batches if strategy.schedule is Schedule.GPIPE else 1
        # products on CPUs copy what is transposed; narrow parameters want narrow gradients
        copied = width * chunk if at.costs.is_cpu or width < GRADIENT_BYTES else 0.0
        phase["logits"] = GRADIENT_BYTES * (passes * logits if logits <= LOGITS_KEPT else chunk) + copied
        # what one chunk adds to the gradient, which under ZeRO 2 and 3 is the first one's in fp32; CPUs
        # widen the others' before they add them
        adds = logits > chunk or strategy.zero < 2
        widened = int(at.costs.is_cpu and width < GRADIENT_BYTES and adds)
        made = int(strategy.zero >= 2 and (adds or width < GRADIENT_BYTES))
        phase[IN_FLIGHT] = (width + GRADIENT_BYTES * (made + widened)) * at.table
    if strategy.zero == 3:
        whole = at.units[-1] + (at.units[0] if at.ties else 0)
        received = width * (max(at.units) + -(-max(at.units) // strategy.dp))
        phase["staging"] = max(waiting, received) + width * whole
    elif strategy.zero == 2:
        phase["staging"] = waiting
    return phase


def _exchange(at: StagePass, elements: float) -> dict[str, float]:
    """ZeRO's reduction of a unit: a buffer with room for this rank's part.

    gloo has no reduce-scatter: it sums a copy.
    """
    own = -(-elements // at.strategy.dp)
    copied = GRADIENT_BYTES * elements if at.costs.is_cpu and at.strategy.dp > 1 else 0.0
    return {"staging": GRADIENT_BYTES * (elements + own), "communication": copied}


def _chunk(at: StagePass) -> float:
    """Logits that are computed at a time: whole rows."""
    rows = max(1, LOGITS_CHUNK // at.costs.vocab)
    return min(at.head_rows, rows) * at.costs.vocab


def _chunk_bytes(at: StagePass) -> float:
    """A chunk in fp32, and as the product gives it where that is narrower."""
    width = at.costs.element_bytes
    return (GRADIENT_BYTES + (width if width < GRADIENT_BYTES else 0)) * _chunk(at)
