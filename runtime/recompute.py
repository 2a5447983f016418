"""Recomputation: parts of the forward pass whose activations are dropped, and computed again.

A part keeps its input alone. When the backward pass reaches it, it runs once more, up to the last
activation that the backward pass needs: products and reductions after that are not repeated. On
several tensor-parallel ranks all of them repeat the same collectives in the same order, because
they run the same code. Which parts of a layer are worth it is the decoder's affair.

Chen et al., arXiv 1604.06174; Korthikanti et al., arXiv 2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

Part = Callable[[torch.Tensor, bool], torch.Tensor]
"""(input, whether this run is the repetition) -> output"""


def recomputed(part: Part, x: torch.Tensor) -> torch.Tensor:
    """`part(x, False)`, keeping only `x` for the backward pass, which calls `part(x, True)`.

    `part` must do the same both times, but may leave out the value of what is not used within it.
    Nothing in it may be random. Its parameters must be there when the output gets its gradient.
    """
    runs = 0

    def run(value: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return part(value, runs > 1)

    result: torch.Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return result
