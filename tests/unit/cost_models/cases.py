"""Small profiles with round numbers, experiments and placements for the tests of cost models."""

from __future__ import annotations

from dataclasses import replace

from cost_models.curve import Curve
from cost_models.link import CollectiveCost, Link
from cost_models.model import CostModel
from cost_models.profile import Attention, HardwareProfile, Provenance
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
from realloc.files import Reader
from realloc.lengths import Lengths
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.model_zoo import named_shapes
from realloc.strategy import parse_strategy

FREE = Link(0.0, 1e30)
"""A link that costs nothing."""


def profile(**changes: object) -> HardwareProfile:
    """1 Tflops/s, 100 GB/s of memory, no overheads, 10 GB/s links of 1 ms; change what matters."""
    base = HardwareProfile(
        name="round",
        provenance=Provenance("analytic", "a round device", "2026-01-01"),
        memory_bytes=10**11,
        matmul=(("bfloat16", Curve(((1.0, 1e12),))), ("float32", Curve(((1.0, 1e12),)))),
        memory=Curve(((1.0, 1e11),)),
        launch_s=0.0,
        attention=Attention(1.0, 0.0, False),
        optimizer_bytes_per_s=1e11,
        host_bytes_per_s=1e10,
        call_s=0.0,
        sequence_s=1e-3,
        intra_node=Link(1e-3, 1e10, (("all_reduce", (CollectiveCost(2, 1e-3, 1e10),)),)),
        inter_node=Link(2e-3, 1e9),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def experiment(
    shape: str | ModelShape = "llama-7b",
    sequences: int = 512,
    prompt: int = 128,
    response: int = 128,
    dtype: str = "bfloat16",
    mean_response: float | None = None,
) -> Experiment:
    """PPO with four models of one shape."""
    resolved = named_shapes()[shape] if isinstance(shape, str) else shape
    roles = ("actor", "critic", "ref", "reward")
    result = Experiment(
        "ppo",
        {role: ModelSpec(role, "shape", resolved, OptimizerSpec()) for role in roles},
        Workload(
            sequences,
            Lengths(float(prompt), prompt),
            Lengths(float(mean_response or response), response),
        ),
        dtype=dtype,
    )
    hyperparameters = result.resolve_algorithm().hyperparameters(
        Reader({"mini_batches": min(4, sequences)}, "test")
    )
    return replace(result, hyperparameters=hyperparameters)


def cost_model(made: Experiment, hardware: HardwareProfile, nodes: int = 1, per_node: int = 8) -> CostModel:
    return CostModel(made, made.graph(), Cluster(nodes, per_node, hardware.name), hardware)


def place(strategy: str, first: int = 0, per_node: int = 8) -> Placement:
    """The placement of a strategy such as `d2t4p1` on consecutive GPUs from `first`."""
    parsed = parse_strategy(strategy, "test")
    return Placement(DeviceMesh(first, parsed.size, per_node), parsed)
