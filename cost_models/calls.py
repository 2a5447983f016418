"""Seconds of one call under one placement, term by term: what the runtime does, and only that.

generate: prompts enter as slots fall free, then one decode step for each new token, in lanes that
circulate through the pipeline stages, as many as there are stages. inference and train_step: packed
micro-batches through the stages, in the order of the strategy's schedule; a train_step computes
dropped activations again, and ends every mini-batch by summing gradients over replicas and AdamW. What it
mixes in are further micro-batches of each mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cost_models.communication import Communication, group_shape
from cost_models.compute import GRADIENT_BYTES, ComputeCosts, Pack, Pass
from cost_models.decoding import decode_steps
from cost_models.packs import mean_pack, mixed_share, runs, share
from cost_models.pipeline import bubble_s, messages_on_path
from cost_models.profile import HardwareProfile
from cost_models.zero import gradients_s, resident_elements
from realloc.dataflow import Call, CallKind
from realloc.experiment import Workload
from realloc.mesh import DeviceMesh
from realloc.strategy import Recompute, Schedule, Strategy

TERMS = (
    "compute",
    "tp_communication",
    "pp_communication",
    "bubble",
    "dp_communication",
    "optimizer",
    "overhead",
)


@dataclass(frozen=True)
class Stage:
    """A kind of pipeline stage: `count` stages hold as much as stage `index`."""

    index: int
    count: int
    layers: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Seconds:
    """What a stage spends on one micro-batch or one decode step."""

    compute: float = 0.0
    tp: float = 0.0
    weight: float = 0.0
    """The part of `compute` that makes gradients of matrices, which the backward pass may put off."""

    @property
    def total(self) -> float:
        return self.compute + self.tp

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.tp + other.tp, self.weight + other.weight)

    def times(self, share: float) -> Seconds:
        return Seconds(self.compute * share, self.tp * share, self.weight * share)


@lru_cache(maxsize=1024)
def distinct_stages(num_layers_of: tuple[int, ...]) -> tuple[Stage, ...]:
    """The kinds of stages of a pipeline whose stages hold so many layers."""
    last = len(num_layers_of) - 1
    kinds: dict[tuple[int, bool, bool], Stage] = {}
    for index, layers in enumerate(num_layers_of):
        key = (layers, index == 0, index == last)
        count = kinds[key].count + 1 if key in kinds else 1
        first_index = kinds[key].index if key in kinds else index
        kinds[key] = Stage(first_index, count, *key)
    return tuple(kinds.values())


class CallPricer:
    """Prices the calls of one model shape under one strategy on meshes of one form."""

    def __init__(
        self,
        profile: HardwareProfile,
        costs: ComputeCosts,
        mesh: DeviceMesh,
        strategy: Strategy,
        workload: Workload,
        communication: Communication | None = None,
        mixed: Workload | None = None,
    ) -> None:
        """`communication`: that of the mesh, where it is kept. `mixed`: what train_steps mix in."""
        self._profile = profile
        self._costs = costs
        self._strategy = strategy
        self._workload, self._mixed = workload, mixed
        self._communication = communication or Communication(profile, mesh)
        self._tp_group = group_shape(mesh, 1, strategy.tp)
        self._dp_group = group_shape(mesh, strategy.tp, strategy.dp)
        self._mesh_group = group_shape(mesh, 1, mesh.size)
        self._ends_group = group_shape(
            mesh, (strategy.pp - 1) * strategy.dp * strategy.tp, min(2, strategy.pp)
        )
        self._slowdown = profile.slowdown(min(mesh.size, mesh.gpus_per_node))
        self._stages = distinct_stages(costs.num_layers_of(strategy.pp, strategy.virtual_stages))
        # attention and MLP are summed together where both add to the same residual
        self._layer_reductions = 1 if costs.shape.parallel_residual else 2

    def terms(self, call: Call) -> Mapping[str, float]:
        """Seconds by term (every one of TERMS); they sum to the call's seconds."""
        terms = dict.fromkeys(TERMS, 0.0)
        terms["overhead"] = self._beside_model_s(call)
        if call.kind is CallKind.GENERATE:
            self._generate(terms)
        elif call.kind is CallKind.INFERENCE:
            self._inference(terms, call)
        elif call.kind is CallKind.TRAIN_STEP:
            self._train(terms, call)
        else:
            # a compute call: Python on the sequences of each rank
            sequences = share(self._workload.sequences, self._strategy.dp)
            terms["compute"] = sequences * self._profile.sequence_s * self._slowdown
        return terms

    def _beside_model_s(self, call: Call) -> float:
        """Batches assembled, losses, metrics. A call without a model has no tables."""
        if call.kind in (CallKind.COMPUTE, CallKind.GENERATE):
            return self._profile.call_s
        sequences = share(call.num_sequences(self._workload.sequences), self._strategy.dp)
        micro_batches = min(self._strategy.micro_batches, sequences)
        mixed, mixed_batches = self._mixed_share(call)
        sequences += mixed * call.mini_batches * call.epochs
        micro_batches += mixed_batches
        computes = str(call.loss or call.output)
        return self._costs.call_s(call.name, computes, sequences, micro_batches) * self._slowdown

    def _generate(self, terms: dict[str, float]) -> None:
        """As many lanes as there are stages take a step in turn, each with one group's slots.

        With fewer lanes than stages, a round still takes a step of every stage. How many steps there
        are, and with how many sequences, is told by `cost_models.decoding`. A prompt is computed once
        for all its samples.
        """
        work, pp = self._workload, self._strategy.pp
        sequences = share(work.sequences, self._strategy.dp)
        groups = min(self._strategy.micro_batches, sequences)
        lanes = min(groups, pp)
        waves = groups / lanes
        size = sequences / groups
        prompts = max(size / work.samples_per_prompt, 1 / groups)
        squares = prompts * work.prompt.mean_square
        pack = Pack(prompts * work.prompt.mean, squares, runs(prompts, work.prompt), size)
        hidden_bytes = self._costs.shape.hidden * self._costs.element_bytes
        passes = [([self._forward(stage, pack, Pass.PREFILL) for stage in self._stages], waves, pack.tokens)]
        peers = min(work.sequences, lanes * size * self._strategy.dp)
        for steps in decode_steps(work.response, size, waves, peers):
            context = work.prompt.mean + steps.tokens
            stages = [self._decode(stage, steps.rows, context) for stage in self._stages]
            passes.append((stages, steps.count, steps.rows))
        for stages, count, rows in passes:
            slowest = max(stages, key=lambda seconds: seconds.total)
            terms["compute"] += count * lanes * slowest.compute
            terms["tp_communication"] += count * lanes * slowest.tp
            if pp > 1:
                terms["bubble"] += count * (pp - lanes) * slowest.total
                round_s = self._communication.decode_round_s(rows * hidden_bytes, pp, lanes)
                terms["pp_communication"] += count * round_s
        begun = max(self._costs.generate_s(stage.layers) for stage in self._stages)
        terms["overhead"] += begun * self._slowdown
        # every replica learns the response lengths of the others
        terms["dp_communication"] += self._communication.all_reduce_s(self._dp_group, 8 * work.sequences)

    def _inference(self, terms: dict[str, float], call: Call) -> None:
        sequences = share(call.num_sequences(self._workload.sequences), self._strategy.dp)
        pack, micro_batches = self._pack(call, sequences)
        forward = [self._forward(stage, pack, Pass.INFERENCE) for stage in self._stages]
        self._pipeline(terms, forward, micro_batches, self._message_bytes(pack))

    def _train(self, terms: dict[str, float], call: Call) -> None:
        """All mini-batches of all epochs."""
        mini = share(call.num_sequences(self._workload.sequences), call.mini_batches)
        packs = [self._pack(call, share(mini, self._strategy.dp)), *self._mixed_packs(call)]
        micro_batches = sum(count for _, count in packs)
        both = [self._trained(stage, packs) for stage in self._stages]
        messages_bytes = sum(count * self._message_bytes(pack) for pack, count in packs)
        one = dict.fromkeys(TERMS, 0.0)
        self._schedule(one, both, micro_batches, messages_bytes / micro_batches)
        units, params = max((self._held(stage) for stage in self._stages), key=lambda held: sum(held[0]))
        elements, strategy = sum(units), self._strategy
        if strategy.zero < 2:  # later stages add up what they have reduced
            one["compute"] += micro_batches * self._costs.accumulate_s(elements) * self._slowdown
        own = resident_elements(elements, strategy)
        one["optimizer"] = self._costs.optimizer_s(own.optimizer, params) * self._slowdown
        cleared = GRADIENT_BYTES * (own.gradients - own.optimizer)
        one["optimizer"] += self._communication.copy_s(cleared) if cleared else 0.0
        one["optimizer"] += self._communication.all_reduce_s(self._mesh_group, 4)
        one["dp_communication"] = gradients_s(
            self._costs, self._communication, self._dp_group, strategy, units, params, micro_batches
        )
        partial = max(stage.layers for stage in self._stages)
        partial *= self._costs.partial_elements(strategy.sequence_parallel)
        if partial and strategy.tp > 1:
            one["tp_communication"] += self._communication.all_reduce_s(
                self._tp_group, partial * GRADIENT_BYTES
            )
        if self._ties and self._strategy.pp > 1:
            table = self._costs.vocab * self._costs.shape.hidden * GRADIENT_BYTES
            one["dp_communication"] += self._communication.all_reduce_s(self._ends_group, table)
        for name, seconds in one.items():
            terms[name] += seconds * call.mini_batches * call.epochs

    def _trained(self, stage: Stage, packs: Sequence[tuple[Pack, int]]) -> Seconds:
        """Forward and backward of the mean micro-batch, where there are several kinds."""
        total, micro_batches = Seconds(), sum(count for _, count in packs)
        for pack, count in packs:
            one = self._forward(stage, pack, Pass.TRAIN) + self._again(stage, pack)
            total += (one + self._backward(stage, pack)).times(count / micro_batches)
        return total

    def _mixed_packs(self, call: Call) -> list[tuple[Pack, int]]:
        """As `_pack` of what an optimizer step mixes in; none where it mixes in nothing."""
        sequences, micro_batches = self._mixed_share(call)
        if self._mixed is None or sequences == 0:
            return []
        return [(mean_pack(self._mixed, call.output, sequences / micro_batches), micro_batches)]

    def _mixed_share(self, call: Call) -> tuple[int, int]:
        """Sequences that a rank mixes into an optimizer step, and in how many micro-batches."""
        return (0, 0) if self._mixed is None else mixed_share(call, self._mixed, self._strategy)

    def _pack(self, call: Call, sequences: int) -> tuple[Pack, int]:
        """The mean micro-batch of a rank's share, and how many there are."""
        micro_batches = min(self._strategy.micro_batches, max(1, sequences // call.together))
        return mean_pack(self._workload, call.output, sequences / micro_batches), micro_batches

    def _message_bytes(self, pack: Pack) -> float:
        """Hidden states that a rank passes to the next stage: with sequence parallelism, its rows."""
        tokens = pack.tokens / self._strategy.tp if self._strategy.sequence_parallel else pack.tokens
        return tokens * self._costs.shape.hidden * self._costs.element_bytes

    def _pipeline(
        self, terms: dict[str, float], stages: list[Seconds], micro_batches: int, message_bytes: float
    ) -> None:
        """Adds a forward pass of all micro-batches through the pipeline.

        The slowest stage works on every micro-batch; the first one must also go through all other
        stages, which is the bubble. Messages are not overlapped with compute: each micro-batch costs
        its stage one message, and filling the pipeline one for every boundary.
        """
        slowest = max(stages, key=lambda seconds: seconds.total)
        terms["compute"] += micro_batches * slowest.compute
        terms["tp_communication"] += micro_batches * slowest.tp
        pp = self._strategy.pp
        if pp > 1:
            through = sum(
                stage.count * seconds.total for stage, seconds in zip(self._stages, stages, strict=True)
            )
            terms["bubble"] += through - slowest.total
            messages = micro_batches + pp - 2
            terms["pp_communication"] += messages * self._communication.stage_message_s(message_bytes)

    def _schedule(
        self, terms: dict[str, float], stages: list[Seconds], micro_batches: int, message_bytes: float
    ) -> None:
        """Adds forward and backward passes of all micro-batches, in the strategy's schedule."""
        slowest = max(stages, key=lambda seconds: seconds.total)
        terms["compute"] += micro_batches * slowest.compute
        terms["tp_communication"] += micro_batches * slowest.tp
        if self._strategy.pp == 1:
            return
        others = [
            (stage.count - (seconds is slowest), seconds.total, seconds.weight)
            for stage, seconds in zip(self._stages, stages, strict=True)
        ]
        terms["bubble"] += bubble_s(self._strategy, micro_batches, others)
        messages = messages_on_path(self._strategy, micro_batches)
        terms["pp_communication"] += messages * self._communication.stage_message_s(message_bytes)

    @property
    def _ties(self) -> bool:
        """Whether the head is the embedding."""
        return self._costs.shape.tied_embeddings and self._costs.shape.head == "lm"

    def _held(self, stage: Stage) -> tuple[tuple[int, ...], int]:
        """Elements of the stage's units, and how many parameter tensors it has."""
        where = (self._strategy.pp, stage.index, self._strategy.virtual_stages)
        return self._costs.stage_units(*where), self._costs.stage_params(*where)

    def _enter_s(self, tokens: float) -> float:
        """Hidden states enter the part of a layer that is split over tp: nothing, or an all-gather."""
        return self._tp_s("all_gather", tokens) if self._strategy.sequence_parallel else 0.0

    def _leave_s(self, tokens: float) -> float:
        """They leave it as a sum over tp: an all-reduce, or a reduce-scatter."""
        return self._tp_s("reduce_scatter" if self._strategy.sequence_parallel else "all_reduce", tokens)

    def _layer_forward_tp_s(self, tokens: float) -> float:
        """Attention and MLP are entered by themselves, and left together where residuals are parallel."""
        return 2 * self._enter_s(tokens) + self._layer_reductions * self._leave_s(tokens)

    def _layer_backward_tp_s(self, tokens: float) -> float:
        """The gradients' way back: what entered leaves, what left enters."""
        return 2 * self._leave_s(tokens) + self._layer_reductions * self._enter_s(tokens)

    def _tp_s(self, collective: str, tokens: float) -> float:
        size_bytes = tokens * self._costs.shape.hidden * self._costs.element_bytes
        return self._communication.collective_s(collective, self._tp_group, size_bytes)

    def _forward(self, stage: Stage, pack: Pack, use: Pass) -> Seconds:
        costs = self._costs
        compute = stage.layers * costs.forward_layer_s(pack, self._strategy.sequence_parallel, use)
        tp = 0.0
        if self._strategy.tp > 1:
            tp += stage.layers * self._layer_forward_tp_s(pack.tokens)
        if stage.first:
            compute += costs.embedding_s(pack.tokens, use)
            tp += self._leave_s(pack.tokens)  # each rank holds a part of the vocabulary
        if stage.last:
            tp += self._enter_s(pack.tokens)
        if stage.last and use is Pass.PREFILL:
            compute += costs.sample_s(pack.head_tokens)
            tp += self._choose_s(pack.head_tokens)
        elif stage.last:
            compute += costs.head_s(pack.head_tokens, use)
            if costs.shape.head == "lm":
                # the largest logit; then the sum of exponentials and the target's logit
                tp += self._communication.all_reduce_s(self._tp_group, 4 * pack.head_tokens)
                tp += self._communication.all_reduce_s(self._tp_group, 8 * pack.head_tokens)
        return Seconds(compute * self._slowdown, tp)

    def _again(self, stage: Stage, pack: Pack) -> Seconds:
        """What the backward pass computes again. Whole layers repeat their messages but for the last."""
        recompute, split = self._strategy.recompute, self._strategy.sequence_parallel
        if recompute is Recompute.NONE:
            return Seconds()
        compute = stage.layers * self._costs.recompute_layer_s(pack, recompute, split)
        tp = 0.0
        if recompute is Recompute.FULL and self._strategy.tp > 1:
            tp = 2 * self._enter_s(pack.tokens)
            tp += (self._layer_reductions - 1) * self._leave_s(pack.tokens)
        return Seconds(compute * self._slowdown, stage.layers * tp)

    def _backward(self, stage: Stage, pack: Pack) -> Seconds:
        costs, split = self._costs, self._strategy.sequence_parallel
        compute = stage.layers * costs.backward_layer_s(pack, split)
        puts_off = self._strategy.schedule is Schedule.ZERO_BUBBLE
        weight = stage.layers * costs.weight_layer_s(pack) if puts_off else 0.0
        tp = 0.0
        if self._strategy.tp > 1:
            tp += stage.layers * self._layer_backward_tp_s(pack.tokens)
        if stage.first:
            compute += costs.embedding_backward_s(pack.tokens)
            if self._strategy.zero >= 2 and not (stage.last and self._ties):
                compute += costs.zero_table_s()
            tp += self._enter_s(pack.tokens)
        if stage.last:
            compute += costs.head_backward_s(pack.head_tokens)
            if costs.shape.head == "lm":
                tp += self._tp_s("all_reduce", pack.head_tokens)
        return Seconds(compute * self._slowdown, tp, weight * self._slowdown)

    def _decode(self, stage: Stage, batch: float, context: float) -> Seconds:
        costs = self._costs
        weights = costs.stage_elements(self._strategy.pp, stage.index) * costs.element_bytes
        compute = stage.layers * costs.decode_layer_s(
            batch, context, weights, not self._workload.response.is_fixed
        )
        reductions = self._layer_reductions * stage.layers
        tp = 0.0
        if stage.first:
            compute += costs.embedding_s(batch, Pass.PREFILL)
            reductions += 1
        if stage.last:
            compute += costs.sample_s(batch)
            tp += self._choose_s(batch)
        if self._strategy.tp > 1:
            tp += reductions * self._tp_s("all_reduce", batch)
        return Seconds(compute * self._slowdown, tp)

    def _choose_s(self, rows: float) -> float:
        """Sampling over a split vocabulary: the shards' maxima and sums, then the chosen token."""
        gathered = 16.0 * rows * self._strategy.tp
        seconds = self._communication.collective_s("all_gather", self._tp_group, gathered)
        return seconds + self._communication.all_reduce_s(self._tp_group, 16.0 * rows)
