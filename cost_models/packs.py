"""How a call's sequences are split into micro-batches, and what the mean one of them holds.

As `runtime.passes` splits them, but of mean lengths. Knows no seconds and no bytes.
"""

from __future__ import annotations

from cost_models.compute import Pack
from realloc.dataflow import Call, Output
from realloc.experiment import Workload
from realloc.lengths import Lengths
from realloc.strategy import Strategy


def share(sequences: int, parts: int) -> int:
    """Sequences of the part that has most."""
    return -(-sequences // parts)


def runs(sequences: float, lengths: Lengths) -> float:
    """Attention kernels for a packed micro-batch: sequences of equal length share one."""
    return 1.0 if lengths.is_fixed else max(1.0, sequences)


def mixed_share(call: Call, mixed: Workload, strategy: Strategy) -> tuple[int, int]:
    """Sequences that a rank mixes into an optimizer step of the call, and in how many micro-batches."""
    if call.mixture is None:
        return 0, 0
    sequences = share(share(mixed.sequences, call.mini_batches * call.epochs), strategy.dp)
    return sequences, min(strategy.micro_batches, sequences)


def mean_pack(workload: Workload, output: Output | None, size: float) -> Pack:
    """A micro-batch of so many sequences, for a model that computes `output`."""
    prompt, response = workload.prompt, workload.response
    length = prompt.mean + response.mean
    rows = 1.0 if output is Output.SCORES else response.mean
    kernels = max(runs(size, prompt), runs(size, response))
    return Pack(size * length, size * workload.sequence_square, kernels, size * rows)
