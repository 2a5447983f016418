"""What the training backends of an experiment can execute.

`own` executes every strategy. `deepspeed` trains data-parallel models over all ranks of the run: its process
groups span them, and it splits no layer.
"""

from __future__ import annotations

from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy

OWN, DEEPSPEED = "own", "deepspeed"
TRAINING_BACKENDS = (OWN, DEEPSPEED)


def untrainable(backend: str, num_gpus: int, mesh: DeviceMesh, strategy: Strategy) -> str | None:
    """Why a backend cannot run a train_step so, on a cluster of `num_gpus`; None when it can."""
    if backend == OWN:
        return None
    if strategy.tp > 1 or strategy.pp > 1:
        return (
            f"training_backend deepspeed trains with tp 1 and pp 1, not tp {strategy.tp} and pp "
            f"{strategy.pp}; use dp {mesh.size}, or training_backend: own"
        )
    if mesh.size != num_gpus:
        return (
            f"training_backend deepspeed trains on all {num_gpus} GPUs, not on {mesh.size}; "
            f"use the whole cluster, or training_backend: own"
        )
    return None
