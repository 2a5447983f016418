"""No reallocation takes less than its bound, wherever its meshes lie; and the bound says something."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cost_models.move_bounds import least_reallocate_s
from cost_models.moves import reallocate_s
from cost_models.profile import load_profile
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.mesh import all_meshes
from realloc.model_zoo import named_shapes
from realloc.strategy import Schedule, Strategy, forbidden

CLUSTERS = [Cluster(*form, "h100-sxm") for form in ((1, 8), (4, 8), (16, 8), (5, 4), (3, 6), (6, 2), (4, 1))]


def drawn(generator: random.Random, cluster: Cluster, shape) -> Placement:
    while True:
        mesh = generator.choice(all_meshes(cluster))
        tp = generator.choice([d for d in range(1, cluster.gpus_per_node + 1) if mesh.size % d == 0])
        pp = generator.choice([d for d in range(1, mesh.size // tp + 1) if mesh.size // tp % d == 0])
        strategy = Strategy(mesh.size // (tp * pp), tp, pp, micro_batches=2 * pp)
        if pp > 1 and generator.random() < 0.2:
            strategy = replace(strategy, schedule=Schedule.INTERLEAVED, virtual_stages=2)
        elif strategy.dp > 1 and pp == 1 and generator.random() < 0.2:
            strategy = replace(strategy, zero=3)
        if cluster.gpus_per_node % tp == 0 and forbidden(strategy, shape) is None:
            return Placement(mesh, strategy)


@pytest.mark.parametrize("seed", range(len(CLUSTERS) * 2))
def test_no_reallocation_takes_less(seed):
    generator = random.Random(seed)
    cluster = CLUSTERS[seed % len(CLUSTERS)]
    profile = load_profile(cluster.device)
    shape = named_shapes()[generator.choice(["llama-7b", "llama-70b"])]
    shape = replace(shape, num_layers=generator.choice([7, 16, 24]))
    shares = []
    for _ in range(60):
        src, dst = drawn(generator, cluster, shape), drawn(generator, cluster, shape)
        exact = reallocate_s(profile, shape, 2, src, dst)
        here = least_reallocate_s(profile, shape, 2, src, dst)
        anywhere = least_reallocate_s(profile, shape, 2, src, dst, anywhere=True)
        assert here <= exact * (1 + 1e-9), f"{src} -> {dst}"
        assert anywhere <= here * (1 + 1e-9), f"{src} -> {dst}"
        if exact > 0 and 3 not in (src.strategy.zero, dst.strategy.zero):
            shares.append(here / exact)
    assert sum(shares) / len(shares) > 0.5


def test_what_is_there_needs_not_move():
    cluster = Cluster(2, 8, "h100-sxm")
    profile, shape = load_profile(cluster.device), named_shapes()["llama-7b"]
    whole = all_meshes(cluster)[-1]
    a, b = Placement(whole, Strategy(4, 2, 2)), Placement(whole, Strategy(2, 4, 2))
    assert least_reallocate_s(profile, shape, 2, a, a) == 0.0
    assert least_reallocate_s(profile, shape, 2, b, b, anywhere=True) == 0.0
    # every rank has a quarter of each of its layers and needs a half of them
    half = sum(spec for spec in [16 * 4 * 4096 * 4096 + 16 * 3 * 4096 * 11008]) / 4
    assert least_reallocate_s(profile, shape, 2, b, a) > 0.9 * 2 * half / profile.intra_node.bytes_per_s
