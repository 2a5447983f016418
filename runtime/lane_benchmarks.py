"""Times decoding through two pipeline stages, to learn what a step takes on a stage beside its model.

Every stage keeps the books of every sequence, and its messages wait for the other's: for small batches of
small models that is as much as the model. Run is the runtime's own code, on a model that is next to nothing
and a core that is kept busy: messages go slower beside a computation than without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch

from realloc.layout import compute_boxes
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.sampling import Sampling
from realloc.strategy import Coordinates, Strategy
from runtime.decoder import Decoder
from runtime.generation import generate
from runtime.parallel import ParallelContext, single_rank
from runtime.parameters import allocate

_FEW, _MANY = 4, 20
_SEQUENCES, _PROMPT = 4, 2
_MODEL_S = 1e-3
_SHAPE = ModelShape(
    "llama", hidden=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=32, vocab=64,
    max_positions=64, rotary_dim=8,
)  # fmt: skip
Seconds = Callable[[Callable[[], object]], float]


def lane_s(seconds: Seconds, rank: int) -> float:
    """Seconds that a step of one lane takes on a stage beyond the stage's own pass and sampling.

    Of two lanes on ranks 0 and 1, their messages included. Every rank calls it. `seconds`: of one action
    that all take part in.
    """
    stages = Strategy(pp=2, micro_batches=2)
    staged_s = _step_s(seconds, rank, _SHAPE, stages) / stages.pp  # which has a step of each lane
    # a stage of it by itself, the last one
    alone_s = _step_s(seconds, rank, replace(_SHAPE, num_layers=1), Strategy())
    return max(0.0, staged_s - alone_s)


def _step_s(seconds: Seconds, rank: int, shape: ModelShape, strategy: Strategy) -> float:
    """Seconds in which all lanes take a step."""
    decoder = _decoder(shape, strategy, rank) if rank < 2 else None
    few_s, many_s = (seconds(_generate(decoder, count)) for count in (_FEW, _MANY))
    return max(0.0, (many_s - few_s) / (_MANY - _FEW))


def _decoder(shape: ModelShape, strategy: Strategy, rank: int) -> Decoder:
    device = torch.device("cpu")
    context = single_rank(device, rank)
    if strategy.pp > 1:
        context = ParallelContext(DeviceMesh(0, 2, 2), strategy, rank, Coordinates(rank, 0, 0), device)
    params = allocate(compute_boxes(shape, strategy, context.at), torch.float32, device)
    params.flat.zero_()
    return Decoder(shape, context, torch.float32, dict(params.views))


def _generate(decoder: Decoder | None, new_tokens: int) -> Callable[[], object]:
    """Generation as this rank takes part in it; those without a stage wait for nobody."""
    if decoder is None:
        return lambda: None
    lanes = decoder.context.strategy.pp
    sequences = lanes * _SEQUENCES
    prompts = torch.zeros(sequences * _PROMPT, dtype=torch.int64) if decoder.context.is_first else None

    def run() -> None:
        generate(
            decoder,
            prompts=prompts,
            prompt_lengths=[_PROMPT] * sequences,
            sequence_ids=list(range(sequences)),
            max_new_tokens=new_tokens,
            eos_ids=(),
            sampling=Sampling(ignore_eos=True),
            seed=0,
            iteration=0,
            micro_batches=lanes,
            watch=_busy_in_each_step(),
        )

    return run


def _busy_in_each_step() -> Callable[[], None]:
    """Keeps the core busy when a step has begun, of the three times a step that it is called."""
    calls = count()

    def watch() -> None:
        if next(calls) % 3 == 0:
            until = time.perf_counter() + _MODEL_S
            while time.perf_counter() < until:
                pass

    return watch
