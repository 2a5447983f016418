"""Dataflow graphs: the calls of one iteration and the data they exchange.

Edges are never written down: they follow from the keys that calls read and write, and from which
calls train a role that others use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import networkx as nx

from realloc.errors import InputError
from realloc.files import nearest
from realloc.rewards import RewardSource, function_source

_NAME = re.compile(r"\w[\w.-]{0,99}")


class CallKind(StrEnum):
    GENERATE = "generate"
    INFERENCE = "inference"
    TRAIN_STEP = "train_step"
    COMPUTE = "compute"


class Per(StrEnum):
    """How many elements of a data key one sequence has."""

    SEQUENCE = "sequence"
    PROMPT_TOKEN = "prompt_token"
    RESPONSE_TOKEN = "response_token"
    TOKEN = "token"


class Output(StrEnum):
    """What a model computes for each sequence in `inference` and `train_step`.

    `logprobs`: the log-probability of each response token given what precedes it.
    `values`: the scalar head at the position that precedes each response token.
    `scores`: the scalar head at the last token, one number per sequence.
    """

    LOGPROBS = "logprobs"
    VALUES = "values"
    SCORES = "scores"


@dataclass(frozen=True)
class DataKey:
    """A named piece of data of every sequence: its elements and their type.

    `dtype` is `int64` or `float32`.
    """

    name: str
    per: Per
    dtype: str = "float32"

    @property
    def bytes_per_element(self) -> int:
        return 8 if self.dtype == "int64" else 4


@dataclass(frozen=True)
class Mixture:
    """What a train_step learns beside its batch: sequences of a data set of their own, a part in each step.

    `sequence` is the key of their tokens, which no call reads or writes. `loss` is a function as that of the
    call, of the same output; both losses' gradients add up. Each optimizer step of the iteration, in each
    pass, has a part of the sequences, so that they are learned once.
    """

    sequence: str
    loss: str


@dataclass(frozen=True)
class Call:
    """One use of one role in an iteration.

    `sequence` names the key that holds the token ids the call works on: the prompts for
    `generate`, prompt + response for the other kinds. `output` is what the model computes.
    `select`, `prepare` (train_step), `loss` (train_step) and `function` (compute) name functions in the
    algorithm's functions module, or `module:function`; `runtime` loads them, nothing else does
    (contracts: `realloc.functions`). `prepared` are the keys that `prepare` adds for the loss.
    `mini_batches` is the number of optimizer steps per pass, `epochs` the number of passes. A
    `greedy` generate call takes the most likely token, whatever the experiment's sampling. The loss
    compares each `together` neighbours (a pair, the samples of a prompt): they share a micro-batch.

    An inference or train_step call with a `select` function works only on the sequences that it picks:
    `selected` of them, or fewer where too few can be; a train_step's neighbours are those among them. What
    an inference writes of the others is 0.

    A compute call has one `function`, or several with weights in `rewards`, or adds up other calls'
    scores: `weights` are of keys that it reads, or makes a `report` of all that it reads.

    A train_step may learn a `mixture` besides.

    `every`: a call of evaluation, which runs in each so many-th iteration, on held-out data; 0: of training.
    """

    name: str
    kind: CallKind
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    role: str | None = None
    sequence: str | None = None
    output: Output | None = None
    prepare: str | None = None
    prepared: tuple[str, ...] = ()
    loss: str | None = None
    function: str | None = None
    mini_batches: int = 1
    epochs: int = 1
    greedy: bool = False
    together: int = 1
    select: str | None = None
    selected: int = 0
    rewards: tuple[RewardSource, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    report: str | None = None
    every: int = 0
    mixture: Mixture | None = None

    def num_sequences(self, batch: int) -> int:
        """Sequences that the call works on, of a batch of so many."""
        return min(batch, self.selected) if self.selected else batch

    def share_of(self, seconds: float) -> float:
        """What something that takes so long when the call runs takes an iteration, on average."""
        return seconds / max(1, self.every)

    @property
    def functions(self) -> tuple[RewardSource, ...]:
        """The Python functions that a compute call runs."""
        return self.rewards if self.function is None else (function_source(self.function),)


@dataclass(frozen=True)
class Average:
    """The parameters of `role`, which no call trains, follow those of the trained role `of`.

    Once an iteration, after `of` is trained, they become `decay` of themselves and the rest of those.
    """

    role: str
    of: str
    decay: float


@dataclass(frozen=True)
class DataflowGraph:
    """The calls of one iteration, in the order in which the algorithm states them.

    `keys` describes all data; `source_keys` come from the data set, the others are written by
    calls.
    """

    calls: tuple[Call, ...]
    keys: tuple[DataKey, ...]
    source_keys: tuple[str, ...]
    averages: tuple[Average, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, Call]:
        return {call.name: call for call in self.calls}

    @cached_property
    def key(self) -> Mapping[str, DataKey]:
        return {key.name: key for key in self.keys}

    @cached_property
    def producer(self) -> Mapping[str, str]:
        """Key -> name of the call that writes it."""
        return {key: call.name for call in self.calls for key in call.writes}

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.role for call in self.calls if call.role is not None))

    def trainer(self, role: str) -> Call | None:
        """The train_step of the role, None when the role is frozen."""
        for call in self.calls:
            if call.role == role and call.kind is CallKind.TRAIN_STEP:
                return call
        return None

    def average(self, role: str) -> Average | None:
        """What the role is the moving average of, if it is one."""
        return next((average for average in self.averages if average.role == role), None)

    def maker(self, role: str) -> Call | None:
        """The train_step after which the role's parameters are others; None when the role is frozen."""
        average = self.average(role)
        return self.trainer(role if average is None else average.of)

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """What train_steps mix in."""
        return tuple(call.mixture for call in self.calls if call.mixture is not None)

    def calls_of(self, role: str) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.role == role)

    def data_edges(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """(producer, consumer) -> the keys that pass between them."""
        edges: dict[tuple[str, str], tuple[str, ...]] = {}
        for call in self.calls:
            for key in call.reads:
                if key in self.producer:
                    edge = (self.producer[key], call.name)
                    edges[edge] = (*edges.get(edge, ()), key)
        return edges

    def values_read(self, call: str, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `keys` of which a call needs the values; of the others it knows the lengths.

        A call without loss works on its `sequence` alone, or on the scores that it adds up, unless it
        selects. What else it reads says by which lengths those who read its results split their batch.
        """
        reader = self.by_name[call]
        if reader.kind is CallKind.TRAIN_STEP or reader.report is not None or reader.select is not None:
            return keys
        used = {reader.sequence, *(key for key, _ in reader.weights)}
        return tuple(key for key in keys if key in used)

    def as_networkx(self) -> nx.DiGraph[str]:
        """Calls as nodes; data edges have `keys`, parameter-version edges have `lag` 1."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(call.name for call in self.calls)
        for (src, dst), keys in self.data_edges().items():
            graph.add_edge(src, dst, keys=keys, lag=0)
        for role in self.roles:
            trainer = self.maker(role)
            for call in self.calls_of(role) if trainer else ():
                if trainer and call.name != trainer.name and not graph.has_edge(trainer.name, call.name):
                    graph.add_edge(trainer.name, call.name, keys=(), lag=1)
        return graph

    def check(self) -> None:
        """Proves that the graph can run.

        Raises InputError: a cycle within an iteration, two producers of a key, a key that nobody
        writes, a call that lacks what its kind needs, two train_steps of one role.
        """
        _check_names([call.name for call in self.calls], self.roles)
        writers: dict[str, str] = dict.fromkeys(self.source_keys, "the data set")
        for call in self.calls:
            for key in call.writes:
                if key in writers:
                    raise InputError(
                        f"dataflow graph: '{key}' is written by {writers[key]} and by {call.name}."
                    )
                writers[key] = call.name
        for call in self.calls:
            for key in (*call.reads, *call.writes, *call.prepared):
                if key not in self.key:
                    raise InputError(
                        f"dataflow graph: {call.name} uses '{key}', which is not declared."
                        f"{nearest(key, self.key)}"
                    )
            for key in call.reads:
                if key not in writers:
                    raise InputError(f"dataflow graph: {call.name} reads '{key}', which nobody writes.")
            _check_call(call)
        for mixture in self.mixtures:
            self._check_mixture(mixture, writers)
        for role in self.roles:
            trainers = [c.name for c in self.calls_of(role) if c.kind is CallKind.TRAIN_STEP]
            if len(trainers) > 1:
                raise InputError(f"dataflow graph: role {role} is trained by {', '.join(trainers)}.")
        for average in self.averages:
            if self.trainer(average.role) is not None or self.trainer(average.of) is None:
                raise InputError(
                    f"dataflow graph: role {average.role} is the moving average of {average.of}, so that one "
                    f"must be trained and {average.role} must not."
                )
        self._check_acyclic()

    def _check_mixture(self, mixture: Mixture, writers: Mapping[str, str]) -> None:
        key = self.key.get(mixture.sequence)
        if key is None or key.per is not Per.TOKEN or key.name in writers:
            raise InputError(
                f"dataflow graph: '{mixture.sequence}' is mixed in: it must be declared, with elements per "
                f"token, and neither written by a call nor a source key."
            )

    def _check_acyclic(self) -> None:
        within: nx.DiGraph[str] = nx.DiGraph()
        within.add_nodes_from(call.name for call in self.calls)
        within.add_edges_from(self.data_edges())
        try:
            cycle = nx.find_cycle(within)
        except nx.NetworkXNoCycle:
            return
        path = " -> ".join([cycle[0][0], *(edge[1] for edge in cycle)])
        raise InputError(f"dataflow graph: a cycle within one iteration: {path}.")


def _check_names(calls: Sequence[str], roles: Sequence[str]) -> None:
    for name in calls:
        if calls.count(name) > 1:
            raise InputError(f"dataflow graph: two calls are named '{name}'.")
    for name in (*calls, *roles):
        if not _NAME.fullmatch(name):  # they become names of nodes, which have colons, and of folders
            raise InputError(
                f"dataflow graph: '{name:.60}' is no name of a call or role: letters, digits, _, . and -."
            )


def _check_call(call: Call) -> None:
    needs: dict[CallKind, tuple[str, ...]] = {
        CallKind.GENERATE: ("role", "sequence"),
        CallKind.INFERENCE: ("role", "sequence", "output"),
        CallKind.TRAIN_STEP: ("role", "sequence", "output", "loss"),
        CallKind.COMPUTE: ("sequence",),
    }
    for field in needs[call.kind]:
        if getattr(call, field) is None:
            raise InputError(f"dataflow graph: {call.name} is a {call.kind} and needs '{field}'.")
    if call.kind is CallKind.COMPUTE and not (call.functions or call.weights or call.report):
        raise InputError(f"dataflow graph: {call.name} is a compute and needs 'function'.")
    for key, _ in call.weights:
        if key not in call.reads:
            raise InputError(f"dataflow graph: {call.name} adds up '{key}' without reading it.")
    if call.sequence is not None and call.sequence not in call.reads:
        raise InputError(f"dataflow graph: {call.name} works on '{call.sequence}' without reading it.")
    if call.mini_batches < 1 or call.epochs < 1 or call.together < 1:
        raise InputError(f"dataflow graph: {call.name} needs at least one mini-batch, epoch and neighbour.")
    may_select = call.select is not None and call.kind in (CallKind.INFERENCE, CallKind.TRAIN_STEP)
    number = call.selected if may_select else 0
    if (call.select is not None or call.selected) and (number < 1 or number % call.together):
        raise InputError(
            f"dataflow graph: {call.name} selects {call.selected} sequences: only inference and train_step "
            f"select, by a function 'select', at least one, and whole groups of {call.together} neighbours."
        )
    if call.mixture is not None and call.kind is not CallKind.TRAIN_STEP:
        raise InputError(f"dataflow graph: {call.name} is no train_step and mixes in nothing.")
    if call.kind is not CallKind.TRAIN_STEP and not (call.writes or call.report):
        raise InputError(f"dataflow graph: {call.name} writes nothing.")
