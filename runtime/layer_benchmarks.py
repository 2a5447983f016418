"""Times the runtime's own code on one device: passes, decode steps, optimizer steps of one model shard.

A shard of a tensor-parallel model is run as the shard that it is, in a group whose collectives do
nothing but wait, so that everything but communication is what a run does. Decides how a size is run; which
sizes, and what becomes of the seconds, is decided elsewhere (`runtime.measuring_plan`,
`runtime.table_profiler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean
from time import perf_counter, process_time
from typing import TypeVar

import torch
import torch.distributed as dist

from realloc.experiment import OptimizerSpec
from realloc.layout import compute_boxes
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.sampling import Sampling
from realloc.strategy import Coordinates, Recompute, Schedule, Strategy
from runtime.attention import PackedSequences
from runtime.calm import CalmMoments, Paced
from runtime.decode_graph import DecodeGraphs
from runtime.decoder import DTYPES
from runtime.generation import generate
from runtime.kv_cache import DecodeStep
from runtime.parallel import ParallelContext
from runtime.parameters import allocate
from runtime.pipeline import MicroBatch, run_forward, run_training
from runtime.rollout_decoder import Prefill, RolloutDecoder
from runtime.stand_ins import StandIns
from runtime.training import Trainer
from runtime.unit_timer import PassSeconds, TimedDecoder, UnitTimer

_T = TypeVar("_T")

MANY_STEPS = 1 << 20
"""Of decoding: enough that whatever pays in the long run is done."""
_WARM = 2
"""Samples that do not count: on hosts the first of a size took 1.2 times as long, the second 1.05 times."""
_PATIENCE = 2.0
"""Times as long as samples take, a measurement may go on until there are enough of calm moments."""
_BEFORE_A_STEP = (16, 16)
"""Lengths of a pass before an optimizer step, which finds in caches what that has left there."""


@dataclass(frozen=True)
class Effort:
    """At least `samples` of each size after some that do not count, for `seconds` if they are short.

    Where there is `stopped`, so many as until it says so. `beside`: others are at it too.
    """

    samples: int
    seconds: float
    most: int = 50
    stopped: Callable[[], bool] | None = None
    beside: bool = False


@dataclass(frozen=True)
class GenerateSeconds:
    """A generate call: until the first token of each sequence, each step after it, and what follows.

    `beside`: what each of these steps takes beside the model.
    """

    first: float
    steps: tuple[float, ...]
    beside: tuple[float, ...]
    last: float

    @property
    def total(self) -> float:
        return self.first + sum(self.steps) + self.last


def pack_lengths(sequences: int, tokens_each: int, ragged: float) -> tuple[int, ...]:
    """Lengths of a pack with this mean, which differ from it by up to a share `ragged`, evenly spread."""
    if not ragged:
        return (tokens_each,) * sequences
    ends = [int(tokens_each * i * (1 - ragged + ragged * i / sequences) + 1e-6) for i in range(sequences + 1)]
    lengths = [max(1, stop - start) for start, stop in pairwise(ends)]
    # neighbours differ by half the range, as in a batch that nobody has sorted
    return (*lengths[::2], *lengths[1::2])


class ShardBenchmarks:
    """One shard of one model on one device, with random weights."""

    def __init__(
        self, shape: ModelShape, dtype: str, tp: int, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        """`group` has `tp` ranks, None for one."""
        self.shape, self.device = shape, device
        self._dtype, self._group = DTYPES[dtype], group
        self._strategy = Strategy(tp=tp)
        self._stand_ins = None if group is None or device.type == "cuda" else StandIns()
        self._now = process_time if self._stand_ins is None else self._stand_ins.now
        self.timer = UnitTimer(device, self._now)
        # the last shard: where shards are uneven, it has most
        self._at = Coordinates(0, 0, tp - 1)
        self._generator = torch.Generator().manual_seed(0)
        boxes = compute_boxes(shape, self._strategy, self._at)
        self._params = allocate(boxes, self._dtype, device)
        with torch.no_grad():
            for name, view in self._params.views.items():
                view.normal_(0.0, 0.02)
                if name.endswith("norm.weight"):
                    view.fill_(1.0)
        self._trainer: Trainer | None = None
        self._calm = CalmMoments() if device.type == "cpu" else None
        self._paces: dict[bool, list[float]] = {False: [], True: []}

    @property
    def num_elements(self) -> int:
        return self._params.flat.numel()

    def context(self, **changes: object) -> ParallelContext:
        """This rank's context under the shard's strategy with some fields changed."""
        strategy = replace(self._strategy, **changes)  # type: ignore[arg-type]
        tp = strategy.tp
        return ParallelContext(
            DeviceMesh(0, tp, tp), strategy, 0, self._at, self.device, self._group, None, self._group
        )

    def decoder(self, **changes: object) -> TimedDecoder:
        params = dict(self._params.views)
        return TimedDecoder(self.shape, self.context(**changes), self._dtype, params, self.timer)

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            spec = OptimizerSpec(learning_rate=1e-9)
            self._trainer = Trainer("model", self.decoder(), self._params, None, spec, 1 << 30)
        return self._trainer

    def batch(self, lengths: Sequence[int]) -> MicroBatch:
        tokens = self._tokens(sum(lengths))
        return MicroBatch(tuple(range(len(lengths))), PackedSequences(tuple(lengths), self.device), tokens)

    def _tokens(self, count: int) -> torch.Tensor:
        tokens = torch.randint(self.shape.vocab, (count,), generator=self._generator)
        return tokens.to(self.device)

    def _rows(self, total: int, rows: int) -> torch.Tensor:
        """Which tokens the head looks at: spread evenly, never the last."""
        places = torch.arange(rows, dtype=torch.int64) * max(1, total - 1) // max(1, rows)
        return places.to(self.device)

    def _output(
        self, decoder: TimedDecoder, hidden: torch.Tensor, batch: MicroBatch, rows: int
    ) -> torch.Tensor:
        chosen = self._rows(hidden.shape[0], rows)
        if self.shape.head == "scalar":
            return decoder.scalar(hidden[chosen])
        assert batch.tokens is not None
        return decoder.logprobs(hidden[chosen], batch.tokens[chosen])

    def inference(
        self, lengths: Sequence[int], rows: int, effort: Effort, *, split: bool = False
    ) -> list[PassSeconds]:
        """Forward passes without gradients, `rows` rows of the head."""
        return self.samples(self.inference_pass(lengths, rows, split=split), effort)

    def inference_pass(
        self, lengths: Sequence[int], rows: int, *, split: bool = False
    ) -> Callable[[], PassSeconds]:
        """One forward pass without gradients as a function."""
        decoder = self.decoder(sequence_parallel=split)

        def once() -> PassSeconds:
            self.timer.start()
            batch = self.batch(lengths)
            run_forward(
                decoder, decoder.context, [batch], lambda hidden, b: self._drop(decoder, hidden, b, rows)
            )
            return self.timer.passes()[0]

        return once

    def _drop(self, decoder: TimedDecoder, hidden: torch.Tensor, batch: MicroBatch, rows: int) -> None:
        self._output(decoder, hidden, batch, rows)

    def training(
        self,
        lengths: Sequence[int],
        rows: int,
        effort: Effort,
        *,
        split: bool = False,
        recompute: Recompute = Recompute.NONE,
    ) -> list[PassSeconds]:
        """Forward and backward passes that add to gradients which are there, as a run's do."""
        once = self.training_pass(lengths, rows, sequence_parallel=split, recompute=recompute)
        return self.samples(once, effort)

    def _training_decoder(self, **changes: object) -> TimedDecoder:
        """One whose backward passes add to the trainer's gradients, as a run's do."""
        decoder = self.decoder(**changes)
        self.trainer.serve(decoder)
        self.trainer.zero_gradients()
        return decoder

    def training_pass(
        self, lengths: Sequence[int], rows: int, **changes: object
    ) -> Callable[[], PassSeconds]:
        """One forward and backward pass as a function; `changes` to the strategy."""
        decoder = self._training_decoder(**changes)

        def loss(hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            return self._output(decoder, hidden, batch, rows).sum()

        def once() -> PassSeconds:
            self.timer.start()
            run_training(decoder, decoder.context, [self.batch(lengths)], loss)
            return self.timer.passes()[0]

        return once

    def weight_gradients(self, lengths: Sequence[int], rows: int, effort: Effort) -> list[float]:
        """Seconds, a layer, of the gradients that the zero-bubble schedule puts off."""
        decoder = self._training_decoder(schedule=Schedule.ZERO_BUBBLE)
        put_off = decoder.weight_gradients
        assert put_off is not None

        def once() -> float:
            batch = self.batch(lengths)
            assert batch.tokens is not None
            self._output(decoder, decoder.forward(batch.tokens, batch.packed), batch, rows).sum().backward()
            put_off.close()
            return self.timed(put_off.run) / len(decoder.layers)

        return self.samples(once, effort)

    def optimizer(self, effort: Effort) -> list[float]:
        """Seconds of one optimizer step with its clearing, norm and clipping, after a pass as in a run.

        A neighbour makes steps alone: ranks of a run make theirs at the same time.
        """
        train = self.training_pass(_BEFORE_A_STEP, sum(_BEFORE_A_STEP) // 2)

        def once() -> float:
            if effort.stopped is None:
                train()
            return self.timed(self.optimizer_step)

        return self.samples(once, effort)

    def optimizer_step(self) -> None:
        """One, with its clearing, norm and clipping."""
        self.trainer.zero_gradients()
        self.trainer.step()

    @torch.no_grad()
    def prefill(self, lengths: Sequence[int], effort: Effort) -> list[float]:
        """Seconds of prompts into the cache, all layers with what is around them."""
        rollout = RolloutDecoder(self.decoder(), MANY_STEPS, max(lengths))
        cache = rollout.new_cache(len(lengths))
        slots = torch.arange(len(lengths), device=self.device)
        tokens = self._tokens(sum(lengths))

        def run() -> None:
            rollout.step(tokens, Prefill(PackedSequences(tuple(lengths), self.device), slots), None, cache)

        return self.samples(lambda: self.timed(run), effort)

    @torch.no_grad()
    def decode(self, batch: int, context: int, ragged: float, effort: Effort) -> list[float]:
        """Seconds of a step of `batch` sequences, of which the longest then has `context` tokens."""
        rollout = RolloutDecoder(self.decoder(), MANY_STEPS, context)
        cache = rollout.new_cache(batch)
        graphs = DecodeGraphs(rollout, cache) if DecodeGraphs.suit(rollout) else None
        tokens = self._tokens(batch)
        positions = torch.full((batch,), context - 1, dtype=torch.int64, device=self.device)
        if ragged:
            positions -= torch.arange(batch, device=self.device) % min(context, 8)

        def step() -> None:
            decode = DecodeStep(cache, positions, context)
            if graphs is None:
                rollout.decode(tokens, decode)
            else:
                graphs.decode(tokens, decode)

        return self.samples(lambda: self.timed(step), effort)

    def generate(
        self, batch: int, prompt: int, new_tokens: int, sampling: Sampling, effort: Effort
    ) -> list[GenerateSeconds]:
        """Whole calls, in which all slots are full."""
        decoder = self.decoder()
        prompts = self._tokens(batch * prompt)

        def call() -> GenerateSeconds:
            self.timer.start()
            generate(
                decoder,
                prompts=prompts,
                prompt_lengths=[prompt] * batch,
                sequence_ids=list(range(batch)),
                max_new_tokens=new_tokens,
                eos_ids=(),
                sampling=replace(sampling, ignore_eos=True, stop=()),
                seed=0,
                iteration=0,
                watch=lambda: self.timer.stamp("step", ""),
            )
            *spans, last = self.timer.spans()
            first, *steps = (spans[i : i + 3] for i in range(0, len(spans), 3))
            return GenerateSeconds(
                sum(first), tuple(map(sum, steps)), tuple(begin + end for begin, _, end in steps), last
            )

        return self.samples(call, effort)

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds of one action, until the device is done with it; on CPUs, of this process alone."""
        if self.device.type != "cuda":
            start = self._now()
            action()
            return self._now() - start
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        action()
        torch.cuda.synchronize(self.device)
        return perf_counter() - start

    def samples(self, once: Callable[[], _T], effort: Effort) -> list[_T]:
        """What `once` gives, as often as the effort says, after some that do not count."""
        with nullcontext() if self._stand_ins is None else self._stand_ins.waiting():
            return self._samples(once, effort)

    def _samples(self, once: Callable[[], _T], effort: Effort) -> list[_T]:
        for _ in range(1 if effort.beside else _WARM):  # it has just run alone
            once()
        samples: list[_T] = []
        if effort.stopped is not None:
            samples.append(once())
            while not effort.stopped():
                samples[0] = once()
            return samples
        if self._calm is None:
            start = perf_counter()
            while _goes_on(len(samples), perf_counter() - start, effort):
                samples.append(once())
            return samples
        return self._calm_samples(self._calm, once, effort)

    def _calm_samples(self, calm: CalmMoments, once: Callable[[], _T], effort: Effort) -> list[_T]:
        """Samples of calm moments, for which it waits a while."""
        taken: list[Paced[_T]] = []
        start, until_s = perf_counter(), 0.0
        for each in calm.taken(once):
            taken.append(each)
            spent_s = perf_counter() - start
            if _goes_on(len(taken), spent_s, effort):
                continue
            until_s = until_s or _PATIENCE * spent_s
            if spent_s > until_s or calm.num_calm(taken) >= effort.samples:
                break
        chosen = calm.chosen(taken, effort.samples)
        self._paces[effort.beside] += [each.pace_s for each in chosen]
        return [each.value for each in chosen]

    def pace_s(self, *, beside: bool = False) -> float:
        """The pace of the samples since this was asked last, alone or beside others; 0 without any."""
        paces, self._paces[beside] = self._paces[beside], []
        return mean(paces) if paces else 0.0


def _goes_on(count: int, spent_s: float, effort: Effort) -> bool:
    return count < effort.samples or (spent_s < effort.seconds and count < effort.most)
