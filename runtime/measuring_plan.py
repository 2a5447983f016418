"""Which sizes `realloc profile` runs: points, from the models and workloads that are to be planned.

Pure functions of shapes and numbers. How a point is run and timed is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from realloc.dataflow import Call, CallKind
from realloc.experiment import Experiment, Workload
from realloc.lengths import MOST_RAGGED
from realloc.model_shape import ModelShape
from realloc.sampling import Sampling
from realloc.signature import ends_signature, layer_signature
from realloc.strategy import Strategy, forbidden

_PLAIN = Sampling()
_STEP = 0.05
"""Of raggedness."""
_NEAR = 1.5
"""The longest of these many times the usual length is left out when time is short."""


class Work(StrEnum):
    """What a point runs."""

    INFERENCE = "inference"
    INFERENCE_SP = "inference_sp"
    TRAINING = "training"
    TRAINING_SP = "training_sp"
    SELECTIVE = "selective"
    FULL = "full"
    WEIGHT = "weight"
    PREFILL = "prefill"
    DECODE = "decode"
    GENERATE = "generate"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Point:
    """One size of one kind of work. `count` sequences (slots) of `length` tokens (of context).

    `rows` are those of the head; `ragged`: how ragged lengths are (`realloc.lengths`). Points of one `line`
    differ in `count` alone and come in its order: once one takes too long, so do the rest.
    """

    work: Work
    count: int = 1
    length: int = 1
    rows: int = 1
    ragged: float = 0.0
    sampling: Sampling = _PLAIN

    @property
    def line(self) -> tuple[object, ...]:
        return (self.work, self.length, self.ragged)


@dataclass(frozen=True)
class Subject:
    """A shard of a model, and what is measured of it."""

    shape: ModelShape
    dtype: str
    tp: int
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return f"{layer_signature(self.shape, self.tp)}, {ends_signature(self.shape, self.tp)}, {self.dtype}"


@dataclass(frozen=True)
class Sizes:
    """What a workload asks of a model: sequences at once, tokens of prompts and of responses.

    `ragged`, `ragged_prompts`: how ragged sequences and prompts are (`realloc.lengths`).
    """

    sequences: int
    prompt: int
    response: int
    ragged: float
    trains: bool = True
    generates: bool = True
    prompts: int = 0
    sampling: Sampling = _PLAIN
    mini_batch: int = 0
    """Sequences of one optimizer step; 0: all."""
    longest: int = 0
    """Tokens of the longest sequence; 0: those of the mean."""
    longest_prompt: int = 0
    ragged_prompts: float = 0.0


def default_sizes(shape: ModelShape, *, gpu: bool) -> Sequence[Sizes]:
    """Sizes for a model whose workload is not known: short and long sequences, equal and ragged."""
    lengths = [n for n in ((256, 1024, 4096) if gpu else (64, 256, 1024)) if n <= shape.max_positions]
    lengths = lengths or [shape.max_positions]
    most = 64 if gpu else 32
    return [
        Sizes(most, max(1, n // 2), max(1, n - n // 2), ragged, prompts=most, ragged_prompts=ragged)
        for n in lengths
        for ragged in (0.0, MOST_RAGGED)
    ]


def experiment_sizes(experiment: Experiment) -> Sequence[tuple[ModelShape, Sizes]]:
    """The shape of every role with the sizes that its calls meet on one rank or several."""
    graph, work = experiment.graph(), experiment.workload
    ragged, ragged_prompts = _ragged(work.sequence_raggedness), _ragged(work.prompt.raggedness)
    result = []
    for role in graph.roles:
        calls = graph.calls_of(role)
        kinds = {call.kind for call in calls}
        sizes = Sizes(
            work.sequences,
            max(1, round(work.prompt.mean)),
            max(1, round(work.response.mean)),
            ragged,
            CallKind.TRAIN_STEP in kinds,
            CallKind.GENERATE in kinds,
            work.prompts,
            experiment.sampling,
            max(
                (
                    -(-c.num_sequences(work.sequences) // c.mini_batches)
                    for c in calls
                    if c.kind is CallKind.TRAIN_STEP
                ),
                default=0,
            ),
            work.prompt.maximum + work.response.maximum,
            work.prompt.maximum,
            ragged_prompts,
        )
        result.append((experiment.role_shape(graph, role), sizes))
        result += [
            (experiment.role_shape(graph, role), _mixed_sizes(experiment.mixed, call))
            for call in calls
            if call.mixture is not None and experiment.mixed is not None
        ]
    return result


def _ragged(raggedness: float) -> float:
    """In steps, so that models of much the same workload share their points; 0 for equal lengths alone."""
    return round(max(1, round(raggedness / _STEP)) * _STEP, 2) if raggedness else 0.0


def _mixed_sizes(mixed: Workload, call: Call) -> Sizes:
    """What a train_step's mixture asks of its model."""
    response = mixed.response
    step = -(-mixed.sequences // (call.mini_batches * call.epochs))
    return Sizes(
        step,
        mixed.prompt.maximum,
        max(1, round(response.mean)),
        _ragged(mixed.sequence_raggedness),
        generates=False,
        longest=mixed.prompt.maximum + response.maximum,
    )


def tp_degrees(shape: ModelShape, most: int) -> Iterator[int]:
    """Degrees that the shape allows: 1 and powers of two up to `most`, and `most`."""
    degrees = sorted({*(1 << i for i in range(16) if 1 << i <= most), most})
    return (tp for tp in degrees if forbidden(Strategy(tp=tp), shape) is None)


def subjects(
    wanted: Iterable[tuple[ModelShape, str, Sizes]], most_tp: int, *, quick: bool
) -> Sequence[Subject]:
    """What to measure, each thing once: models with the same layers share all but their heads."""
    made: list[Subject] = []
    seen: set[tuple[object, ...]] = set()
    for shape, dtype, sizes in wanted:
        for tp in tp_degrees(shape, most_tp):
            layer, ends = layer_signature(shape, tp), ends_signature(shape, tp)
            points = []
            for point in _points(sizes, tp, quick):
                # a point serves the layer's tables and those of the ends
                key = (layer, ends, dtype, point)
                layer_only = (layer, dtype, point.work, point.count, point.length, point.ragged)
                needed = point.rows > 0 and point.work in (Work.INFERENCE, Work.TRAINING, Work.GENERATE)
                if key in seen or (layer_only in seen and not (needed and _serves_head(point, sizes))):
                    continue
                seen |= {key, layer_only}
                points.append(point)
            if points:
                made.append(Subject(shape, dtype, tp, tuple(points)))
    return made


def _serves_head(point: Point, sizes: Sizes) -> bool:
    """Whether the point is worth running again for a model that differs in its head alone."""
    return point.length == sizes.prompt + sizes.response or point.work is Work.GENERATE


def _points(sizes: Sizes, tp: int, quick: bool) -> Iterator[Point]:
    whole = sizes.prompt + sizes.response
    # longer sequences weigh more in attention, so that a ragged pack counts as one of longer ones
    longest = max(whole, sizes.longest)
    lengths = _near(whole, longest) if quick else sorted({max(1, whole // 2), whole, 2 * whole, longest})
    for ragged in _variants(sizes.ragged, quick=quick):
        for length in lengths:
            yield from _pass_points(sizes, length, ragged, tp, quick)
        if sizes.trains:
            mini = _counts(sizes.mini_batch or sizes.sequences)
            for work in (Work.WEIGHT, Work.SELECTIVE, Work.FULL):
                for count in mini[len(mini) // 2 :][:1] if quick else mini:
                    yield Point(work, count, whole, 1, ragged)
    if sizes.generates:
        longest_prompt = max(sizes.prompt, sizes.longest_prompt)
        prompts = sorted({sizes.prompt, longest_prompt})
        for ragged in _variants(sizes.ragged_prompts, quick=quick):
            for count in _counts(sizes.prompts or sizes.sequences):
                for length in _near(sizes.prompt, longest_prompt) if quick else prompts:
                    yield Point(Work.PREFILL, count, length, 0, ragged)
        middle = sizes.prompt + max(1, sizes.response // 2)
        for count in _counts(sizes.sequences):
            contexts = {sizes.prompt + 1, longest} if quick else {sizes.prompt + 1, middle, whole, longest}
            for context in sorted(contexts):
                yield Point(Work.DECODE, count, context, 0, MOST_RAGGED if sizes.ragged else 0.0)
        counts = _counts(sizes.sequences)
        for count in sorted({*counts[::2], counts[-1]}) if quick else counts:
            yield Point(Work.GENERATE, count, sizes.prompt, count, 0.0, sizes.sampling)
    if sizes.trains:
        yield Point(Work.OPTIMIZER, rows=0)


def _variants(ragged: float, *, quick: bool) -> Sequence[float]:
    """Ragged packs, and where there is time, even ones too."""
    return (ragged,) if quick else sorted({0.0, ragged})


def _pass_points(sizes: Sizes, length: int, ragged: float, tp: int, quick: bool) -> Iterator[Point]:
    """Forward passes, and with backward passes where the model is trained."""
    splits = tp > 1 and not quick
    wholes = [(Work.INFERENCE, sizes.sequences)] + ([(Work.INFERENCE_SP, sizes.sequences)] if splits else [])
    if sizes.trains:
        mini = sizes.mini_batch or sizes.sequences
        wholes += [(Work.TRAINING, mini)] + ([(Work.TRAINING_SP, mini)] if splits else [])
    share = sizes.response / (sizes.prompt + sizes.response)
    for work, most in wholes:
        for count in _counts(most):
            yield Point(work, count, length, max(1, round(count * length * share)), ragged)


def _near(usual: int, longest: int) -> Sequence[int]:
    """Both lengths, or the usual alone: packs count as hardly longer where none is much longer than most."""
    return [usual] if longest <= _NEAR * usual else [usual, longest]


def _counts(most: int) -> Sequence[int]:
    """1, powers of two and `most`: what a sequence more takes is least even where there are few."""
    return sorted({1 << i for i in range(32) if 1 << i < most} | {most})
