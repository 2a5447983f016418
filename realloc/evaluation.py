"""The `evaluation` section of an experiment, and the calls that it adds to any algorithm's graph.

Evaluation is a copy of the calls that judge responses, on rows that are not trained on, every so many
iterations. They are calls like others: the planner places them and counts a share of their seconds, the
runtime executes them in the iterations that are theirs. Decides which calls those are; the numbers are
computed by `experiments.evaluation_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError
from realloc.files import Reader
from realloc.rewards import check_function_name

PREFIX, RIVAL = "eval_", "rival_"
REPORT = "evaluation"
FUNCTIONS = "experiments.evaluation_functions"


@dataclass(frozen=True)
class EvaluationSpec:
    """Evaluation in every `every`-th iteration, the first one included, before the models are trained.

    And once more after the last one, of the trained models, which is no part of any iteration. It takes as
    many sequences as an iteration, the same rows each time. Responses are greedy unless they are `sampled`.
    `win_rate`: the reference model answers too. `gold`: a function (module:function) that knows better than
    a reward model: its scores are compared with those of a model that is trained, or judge the responses
    too.
    """

    every: int
    sampled: bool = False
    win_rate: bool = False
    gold: str | None = None


def parse_evaluation(reader: Reader) -> EvaluationSpec:
    """Reads the section. Raises InputError."""
    spec = EvaluationSpec(
        every=reader.integer("every", minimum=1, maximum=1_000_000_000),
        sampled=reader.get("sampled", bool, False),
        win_rate=reader.get("win_rate", bool, False),
        gold=reader.get("gold", str, None),
    )
    reader.done()
    if spec.gold is not None:
        check_function_name(spec.gold, reader.at("gold"))
    return spec


def evaluation_content(spec: EvaluationSpec) -> Mapping[str, Any]:
    """The section as the mapping that `parse_evaluation` reads back to an equal value."""
    default = EvaluationSpec(spec.every)
    rest = {name: value for name, value in vars(spec).items() if value != getattr(default, name)}
    return {"every": spec.every, **rest}


def with_evaluation(graph: DataflowGraph, spec: EvaluationSpec) -> DataflowGraph:
    """The graph with evaluation's calls after its own. Raises InputError where something is missing."""
    generators = [
        c
        for c in graph.calls
        if c.kind is CallKind.GENERATE and not c.greedy and c.sequence in graph.source_keys
    ]
    if generators:
        return _of_responses(graph, spec, generators[0])
    if spec.win_rate:
        raise InputError("experiment: evaluation.win_rate: the algorithm generates no responses to compare.")
    return _of_data(graph, spec)


class _Copier:
    """Copies calls of a graph under other names, with keys of their own."""

    def __init__(self, graph: DataflowGraph, spec: EvaluationSpec) -> None:
        self._graph, self._spec = graph, spec
        self._trained = {role for role in graph.roles if graph.trainer(role) is not None}
        self.calls: list[Call] = []
        self.keys: dict[str, DataKey] = {}

    def generate(self, call: Call, prefix: str, role: str) -> dict[str, str]:
        """Adds a copy with that role; returns original key -> key of the copy."""
        names = {key: f"{prefix}{key}" for key in call.writes} | {key: f"{PREFIX}{key}" for key in call.reads}
        name = f"{PREFIX}{role}_gen"
        self._add(replace(call, name=name, role=role, greedy=not self._spec.sampled), names)
        return names

    def judges(
        self, names: dict[str, str], prefix: str, outputs: Sequence[Output], also: tuple[str, ...] = ()
    ) -> None:
        """Adds copies of all frozen models and functions that work on these keys alone; extends `names`.

        They read `also`, by whose lengths those who read their results split their batch.
        """
        left = list(self._graph.calls)
        while found := next((call for call in left if self._judges(call, names, outputs)), None):
            left.remove(found)
            names |= {key: f"{prefix}{key}" for key in found.writes}
            self._add(replace(found, name=f"{prefix}{found.name}"), names, also)

    def gold(self, tokens: str) -> str:
        """Adds the call of the function that knows better; the key of its scores."""
        key = f"{PREFIX}gold"
        self.keys[key] = DataKey(key, Per.SEQUENCE)
        call = Call(key, CallKind.COMPUTE, (tokens,), (key,), sequence=tokens)
        self.calls.append(replace(call, function=self._spec.gold, every=self._spec.every))
        return key

    def _judges(self, call: Call, names: Mapping[str, str], outputs: Sequence[Output]) -> bool:
        kinds = (CallKind.INFERENCE, CallKind.COMPUTE)
        return (
            call.kind in kinds
            and call.role not in self._trained
            and (call.output is None or call.output in outputs)
            and all(key in names for key in call.reads)
        )

    def _add(self, call: Call, names: Mapping[str, str], also: tuple[str, ...] = ()) -> None:
        if call.select is not None:  # all samples are judged
            call = replace(call, select=None, selected=0, reads=(str(call.sequence),))
        for key in (*call.reads, *call.writes):
            self.keys[names[key]] = replace(self._graph.key[key], name=names[key])
        copy = replace(
            call,
            reads=(*(names[key] for key in call.reads), *also),
            writes=tuple(names[key] for key in call.writes),
            sequence=names[str(call.sequence)],
            weights=tuple((names[key], weight) for key, weight in call.weights),
            every=self._spec.every,
        )
        self.calls.append(copy)

    def graph(
        self, report: str, reads: tuple[str, ...], sources: Sequence[str], together: int = 1
    ) -> DataflowGraph:
        """The whole graph, with a call that reports what these keys say."""
        call = Call(
            REPORT,
            CallKind.COMPUTE,
            reads,
            (),
            sequence=reads[0],
            report=f"{FUNCTIONS}:{report}",
            every=self._spec.every,
            together=together,
        )
        return DataflowGraph(
            (*self._graph.calls, *self.calls, call),
            (*self._graph.keys, *self.keys.values()),
            (*self._graph.source_keys, *sources),
            self._graph.averages,
        )


def _of_responses(graph: DataflowGraph, spec: EvaluationSpec, generate: Call) -> DataflowGraph:
    """Held-out prompts: the model's responses, their scores, the reference model's view of them."""
    copier = _Copier(graph, spec)
    names = copier.generate(generate, PREFIX, str(generate.role))
    copier.judges(names, PREFIX, (Output.LOGPROBS, Output.SCORES))
    tokens, logprobs = (names[key] for key in generate.writes)
    reads = [tokens, logprobs, *_scores(graph, names)]
    compared = [call for call in copier.calls if call.output is Output.LOGPROBS]
    reads += [key for call in compared for key in call.writes]
    if spec.win_rate:
        if not compared:
            raise InputError(
                "experiment: evaluation.win_rate: needs a reference model; this algorithm has one where "
                "kl_coef is not 0."
            )
        rival = copier.generate(generate, RIVAL, str(compared[0].role))
        copier.judges(rival, RIVAL, (Output.SCORES,), (tokens,))
        reads += _scores(graph, rival)
    if spec.gold is not None:
        reads.append(copier.gold(tokens))
    report = "sampled_responses" if spec.sampled else "responses"
    return copier.graph(report, tuple(reads), [names[str(generate.sequence)]])


def _scores(graph: DataflowGraph, names: Mapping[str, str]) -> list[str]:
    """The copies of what training reads as scores: one number a sequence."""
    read = {key for call in graph.calls if call.kind is CallKind.TRAIN_STEP for key in call.reads}
    return [names[key] for key in names if key in read and graph.key[key].per is Per.SEQUENCE]


def _of_data(graph: DataflowGraph, spec: EvaluationSpec) -> DataflowGraph:
    """Held-out rows with their responses: what the trained model computes for them."""
    trainer = next(call for call in graph.calls if call.kind is CallKind.TRAIN_STEP)
    copier = _Copier(graph, spec)
    source, output = str(trainer.sequence), f"{trainer.output}"
    names = {source: f"{PREFIX}{source}", output: f"{PREFIX}{output}"}
    scores = trainer.output is Output.SCORES
    infer = Call(
        f"{PREFIX}{trainer.role}_inf",
        CallKind.INFERENCE,
        (names[source],),
        (names[output],),
        trainer.role,
        names[source],
        trainer.output,
        every=spec.every,
    )
    copier.calls.append(infer)
    copier.keys[names[source]] = replace(graph.key[source], name=names[source])
    copier.keys[names[output]] = DataKey(names[output], Per.SEQUENCE if scores else Per.RESPONSE_TOKEN)
    reads: tuple[str, ...] = (names[source], names[output])
    if not scores:
        if spec.gold is not None:
            raise InputError("experiment: evaluation.gold: is for reward modelling, and for what generates.")
        return copier.graph("likelihood", reads, [names[source]])
    if spec.gold is not None:
        reads = (*reads, copier.gold(names[source]))
    return copier.graph("pairs", reads, [names[source]], together=trainer.together)
