"""Times transfers of the runtime between two ranks, to learn what they take beside their messages.

Who gets what is worked out anew each time, values are put together and taken apart in Python: for small
models that is most of a transfer. Run is the runtime's own code, on made-up data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from realloc.augmented import Node, NodeKind, Placement
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Per
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from runtime.data_store import IterationData
from runtime.transfer import TransferExecutor

_FEW, _MANY = 8, 512
_KEYS = 4
_TURNS = 3
_LEAST_S = 1e-8
_LENGTH = 16


def transfer_costs(
    seconds: Callable[[Callable[[], object]], float], message_s: float, rank: int
) -> Mapping[str, float]:
    """What a transfer from rank 0 to rank 1 takes: `node_s` in any case, `sequence_s` for every sequence
    of the batch, `value_s` for every key of every sequence that moves. Every rank calls it.

    `seconds`: of one action that all take part in; `message_s`: of a message, which is not counted.
    """
    transfers = [_transfer(rank, *size) for size in ((_FEW, 1), (_MANY, 1), (_MANY, _KEYS))]
    turns = [[seconds(transfer) for transfer in transfers] for _ in range(_TURNS)]
    # the machine's slow moments last for seconds, and others' work only ever adds
    few_s, many_s, more_s = (min(found) for found in zip(*turns, strict=True))
    value_s = max(_LEAST_S, (more_s - many_s) / (_MANY * (_KEYS - 1)))
    sequence_s = max(_LEAST_S, (many_s - few_s) / (_MANY - _FEW) - value_s)
    # the values are a message, that they have arrived is another
    node_s = max(_LEAST_S, few_s - _FEW * (sequence_s + value_s) - 2 * message_s)
    return {"node_s": node_s, "sequence_s": sequence_s, "value_s": value_s}


def _transfer(rank: int, sequences: int, keys: int) -> Callable[[], object]:
    """The transfer as this rank takes part in it; those without a part wait for nobody."""
    names = tuple(f"key{i}" for i in range(keys))
    described = (DataKey("tokens", Per.TOKEN, "int64"), *(DataKey(n, Per.SEQUENCE) for n in names))
    calls = (
        Call("writer", CallKind.INFERENCE, ("tokens",), names, "model", "tokens"),
        Call("reader", CallKind.TRAIN_STEP, ("tokens", *names), (), "model", "tokens"),
    )
    graph = DataflowGraph(calls, described, ("tokens",))
    node = Node("transfer", NodeKind.TRANSFER, (0, 1), src="writer", dst="reader", keys=names)
    src, dst = (Placement(DeviceMesh(at, 1, 2), Strategy()) for at in (0, 1))
    executor = TransferExecutor(graph, node, src, dst, rank)
    data = IterationData(graph.key, [_LENGTH // 2] * sequences)
    data.lengths["tokens"] = [_LENGTH] * sequences
    if rank == 0:
        data.values = {name: {i: torch.zeros(1) for i in range(sequences)} for name in names}
    done = torch.zeros(1)

    def run() -> None:
        if rank > 1:
            return
        executor.run(data)
        # both ends of a transfer count: the reader ends last, and says so
        if rank == 0:
            dist.recv(done, 1)
        else:
            dist.send(done, 0)

    return run
