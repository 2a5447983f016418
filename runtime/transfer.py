"""Transfers: data of one iteration from the ranks that wrote it to the ranks that read it.

Each rank receives only the keys and sequences that its part of the consumer needs, once, from
one holder; what it holds already moves nothing. Who sends what to whom is a pure function of
lengths that both ends know: a sender first tells the lengths to ranks that were not there when
they came to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realloc.augmented import Node, Placement
from realloc.dataflow import Call, CallKind, DataflowGraph, Per
from realloc.strategy import Coordinates
from runtime.batching import Assignment, assign
from runtime.data_store import DTYPES, IterationData


@dataclass(frozen=True)
class Message:
    """Rows `positions` of `keys` that `src` sends to `dst`."""

    src: int
    dst: int
    keys: tuple[str, ...]
    positions: tuple[int, ...]


def sequence_key(call: Call) -> str:
    """The key by whose lengths a call splits its batch."""
    if call.sequence is None:
        raise AssertionError(f"{call.name} has no sequence key")
    return call.sequence


def assignment_of(call: Call, placement: Placement, data: IterationData) -> Assignment:
    """How the call splits the batch over its data-parallel ranks."""
    lengths, dp = data.key_lengths(sequence_key(call)), placement.strategy.dp
    if call.kind is CallKind.GENERATE or call.select is not None:
        # generation gains from having the samples of a prompt on one rank: it computes the prompt once;
        # of what is selected from each prompt all ranks then have about as much
        return assign(lengths, 1, dp, data.samples_per_prompt)
    return assign(lengths, call.mini_batches, dp, call.together, always=True)


def stages_reading(call: Call, key: str, pp: int) -> tuple[int, ...]:
    """The pipeline stages of a call that need the values of a key.

    The first stage embeds the tokens, the last one computes what needs anything else.
    """
    if pp == 1 or call.kind is CallKind.COMPUTE:
        return tuple(range(pp))
    if call.kind is CallKind.GENERATE:
        return (0,)
    return (0, pp - 1) if key == call.sequence else (pp - 1,)


def writer_ranks(placement: Placement, dp: int) -> tuple[int, ...]:
    """The ranks that hold what data-parallel rank `dp` of a call wrote: its last stage."""
    strategy, first = placement.strategy, placement.mesh.first
    last = strategy.pp - 1
    return tuple(first + strategy.index(Coordinates(last, dp, t)) for t in range(strategy.tp))


def messages(
    graph: DataflowGraph,
    node: Node,
    src: Placement,
    dst: Placement,
    sources: Assignment,
    sinks: Assignment,
    rank: int | None = None,
) -> list[Message]:
    """Every message of a transfer, in an order that all ranks share; with `rank`, only its own."""
    if node.dst is None:
        raise AssertionError(f"{node.name} has no destination")
    consumer = graph.by_name[node.dst]
    wanted = graph.values_read(consumer.name, node.keys)
    stages = range(dst.strategy.pp)
    keys_of = [tuple(k for k in wanted if at in stages_reading(consumer, k, len(stages))) for at in stages]
    owners = sources.owners()
    writers = [writer_ranks(src, dp) for dp in range(src.strategy.dp)]
    own = next((dp for dp, ranks in enumerate(writers) if rank in ranks), None)
    turn = None if rank is None or own is None else writers[own].index(rank)
    result = []
    for index, receiver in enumerate(dst.mesh.ranks):
        mine = rank is None or receiver == rank
        if not mine and turn != index % src.strategy.tp:
            continue  # somebody else serves it
        at = dst.strategy.coordinates(index)
        if not (keys := keys_of[at.pp]):
            continue
        by_sender: dict[int, list[int]] = {}
        for position in sinks.of(at.dp):
            owner = owners[position]
            if (mine or owner == own) and receiver not in writers[owner]:
                by_sender.setdefault(writers[owner][index % src.strategy.tp], []).append(position)
        result += [Message(s, receiver, keys, tuple(p)) for s, p in sorted(by_sender.items())]
    return result


def move(plan: Iterable[Message], rank: int, data: IterationData) -> int:
    """Sends and receives the messages of one rank; returns the bytes that it sent."""
    sent = 0
    operations: list[dist.P2POp] = []
    inbox: list[tuple[Message, torch.Tensor]] = []
    for message in plan:
        if message.src == rank:
            buffer = _pack(message, data)
            sent += buffer.numel()
            operations.append(dist.P2POp(dist.isend, buffer, message.dst))
        elif message.dst == rank:
            buffer = torch.empty(_num_bytes(message, data), dtype=torch.uint8)
            inbox.append((message, buffer))
            operations.append(dist.P2POp(dist.irecv, buffer, message.src))
    _run(operations)
    for message, buffer in inbox:
        _unpack(message, buffer, data)
    return sent


def _num_bytes(message: Message, data: IterationData) -> int:
    return sum(
        data.keys[key].bytes_per_element * sum(_at(data.key_lengths(key), message.positions))
        for key in message.keys
    )


def _pack(message: Message, data: IterationData) -> torch.Tensor:
    parts = [data.packed(key, message.positions).cpu().view(torch.uint8) for key in message.keys]
    return torch.cat(parts)


def _unpack(message: Message, buffer: torch.Tensor, data: IterationData) -> None:
    start = 0
    for key in message.keys:
        spec = data.keys[key]
        count = sum(_at(data.key_lengths(key), message.positions))
        stop = start + count * spec.bytes_per_element
        # a copy of the slice, since a view as another type must start aligned
        values = buffer[start:stop].clone().view(DTYPES[spec.dtype])
        data.put(key, message.positions, values)
        start = stop


class TransferExecutor:
    """Runs one transfer node on this rank."""

    def __init__(self, graph: DataflowGraph, node: Node, src: Placement, dst: Placement, rank: int) -> None:
        if node.src is None or node.dst is None:
            raise AssertionError(f"{node.name} lacks an end")
        self._graph, self._node, self._rank = graph, node, rank
        self._producer, self._consumer = graph.by_name[node.src], graph.by_name[node.dst]
        self._src, self._dst = src, dst
        self._header = header_keys(graph, node)

    def run(self, data: IterationData) -> int:
        """Moves the data; returns the bytes that this rank sent."""
        sent = self._tell_lengths(data)
        if not self._graph.values_read(self._consumer.name, self._node.keys):
            return sent
        sources = assignment_of(self._producer, self._src, data)
        sinks = assignment_of(self._consumer, self._dst, data)
        plan = messages(self._graph, self._node, self._src, self._dst, sources, sinks, self._rank)
        return sent + move(plan, self._rank, data)

    def _tell_lengths(self, data: IterationData) -> int:
        """Lengths go to every destination rank outside the producer's mesh."""
        if not self._header:
            return 0
        src, dst = self._src.mesh, self._dst.mesh
        size = len(self._header) * data.num_sequences
        operations, inbox = [], None
        for index, rank in enumerate(dst.ranks):
            if rank in src:
                continue
            teller = src.first + index % src.size
            if teller == self._rank:
                lengths = [n for key in self._header for n in data.key_lengths(key)]
                buffer = torch.tensor(lengths, dtype=torch.int64)
                operations.append(dist.P2POp(dist.isend, buffer, rank))
            elif rank == self._rank:
                inbox = torch.empty(size, dtype=torch.int64)
                operations.append(dist.P2POp(dist.irecv, inbox, teller))
        _run(operations)
        if inbox is None:
            return 8 * size * len(operations)
        for key, part in zip(self._header, inbox.split(data.num_sequences), strict=True):
            data.lengths[key] = part.tolist()
        return 0


def header_keys(graph: DataflowGraph, node: Node) -> tuple[str, ...]:
    """Keys whose lengths both ends of a transfer need and the data set does not tell.

    Where values move, also those by which both ends split their batch.
    """
    if node.src is None or node.dst is None:
        raise AssertionError(f"{node.name} lacks an end")
    moved = graph.values_read(node.dst, node.keys)
    ends = (graph.by_name[node.src], graph.by_name[node.dst]) if moved else ()
    wanted = dict.fromkeys([*(sequence_key(call) for call in ends), *node.keys])
    return tuple(
        key
        for key in wanted
        if key not in graph.source_keys and graph.key[key].per not in (Per.SEQUENCE, Per.PROMPT_TOKEN)
    )


def _at(values: Sequence[int], positions: Iterable[int]) -> list[int]:
    return [values[p] for p in positions]


def _run(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
