"""CUDA graphs of decode steps: one launch for what would be hundreds of small kernels.

Decides which sizes are captured: steps are padded to the next power of two of rows (within the
slots) and the next multiple of 128 cached tokens, so that few graphs serve a whole call. Rows beyond
the live ones write into free slots, which the next prompt overwrites. The tests of this module
need a GPU (tests/gpu); it has not run on one yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kv_cache import DecodeStep, KVCache
from runtime.rollout_decoder import RolloutDecoder

CONTEXT_STEP = 128
"""Cached tokens are rounded up to a multiple of this."""


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


class DecodeGraphs:
    """The captured decode steps of one cache."""

    def __init__(self, decoder: RolloutDecoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        slots, device = cache.keys.shape[1], decoder.context.device
        self._positions = torch.zeros(slots, dtype=torch.int64, device=device)
        if decoder.context.is_first:
            self._inputs = torch.zeros(slots, dtype=torch.int64, device=device)
        else:
            self._inputs = torch.zeros(slots, decoder.shape.hidden, dtype=decoder.dtype, device=device)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @staticmethod
    def suit(decoder: RolloutDecoder) -> bool:
        """Graphs need a GPU, and no collectives inside the step."""
        return decoder.context.device.type == "cuda" and decoder.context.tp_group is None

    def decode(self, inputs: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """As `RolloutDecoder.decode`."""
        num, (rows, context) = inputs.shape[0], self._size(inputs.shape[0], step.context)
        self._inputs[:num].copy_(inputs)
        self._positions[:num].copy_(step.positions)
        self._positions[num:rows].zero_()
        made = self._graphs.get((rows, context))
        if made is None:
            made = self._graphs[rows, context] = self._capture(rows, context)
        made.graph.replay()
        return made.output[:num].clone()

    def _size(self, num: int, context: int) -> tuple[int, int]:
        slots, longest = self._cache.keys.shape[1], self._cache.keys.shape[-1]
        rows = min(slots, 1 << (num - 1).bit_length())
        return rows, min(longest, -(-context // CONTEXT_STEP) * CONTEXT_STEP)

    def _capture(self, rows: int, context: int) -> _Graph:
        def run() -> torch.Tensor:
            step = DecodeStep(self._cache, self._positions[:rows], context)
            return self._decoder.decode(self._inputs[:rows], step)

        # libraries set themselves up in a first run, which must not be on the capturing stream
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return _Graph(graph, output)
