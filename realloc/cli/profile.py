"""`realloc profile`: measures this machine, or the cluster whose launcher started it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realloc.cli.nodes import add_nodes, check_nodes
from realloc.cli.values import Commands, check_output, positive


def add(commands: Commands) -> None:
    profile = commands.add_parser(
        "profile",
        help="measure this machine and write its hardware profile",
        description="Measures the device, its links and, for the models given, the runtime's own code. "
        "On several nodes, start the same command on each, with its --node-rank; node 0 writes. Under "
        "torchrun or srun every rank runs the same command and rank 0 writes. After an interruption the "
        "same command goes on.",
        allow_abbrev=False,
    )
    profile.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("profile.yaml"),
        help="the profile's file (default: profile.yaml)",
    )
    profile.add_argument(
        "--experiment",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="time the models of this experiment at its sizes (may be repeated)",
    )
    profile.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        default=[],
        help="time this model, a folder or a named shape, at common sizes (may be repeated)",
    )
    profile.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        action="append",
        default=[],
        help="with --model: in this type (default: float32 on CPUs, bfloat16 on GPUs)",
    )
    profile.add_argument(
        "--tp",
        type=positive,
        default=0,
        metavar="N",
        help="time tensor-parallel shards up to this degree (default: --ranks, 8 on GPUs)",
    )
    profile.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="processes that measure links, on each node (default: one for each GPU; on hosts as many as "
        "the experiment has on a node, at least 2, at most 8)",
    )
    profile.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    add_nodes(profile)
    profile.set_defaults(command=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    check_nodes(arguments)
    from runtime.host_memory import keep_freed_memory

    keep_freed_memory()  # before torch has threads: under a launcher this process measures
    from runtime.profiler import ProfileOptions, run_profile

    options = ProfileOptions(
        ranks=arguments.ranks,
        quick=arguments.quick,
        models=tuple(arguments.model),
        experiments=tuple(str(path) for path in arguments.experiment),
        dtypes=tuple(dict.fromkeys(arguments.dtype)),
        tp=arguments.tp,
        node=arguments.node_rank,
        nodes=arguments.nnodes,
        endpoint=arguments.rdzv_endpoint or ("", 0),
        links_of=_links_of,
    )
    if run_profile(arguments.output, options):
        print(
            f"Wrote {arguments.output}; plan with it: realloc search EXPERIMENT --device {arguments.output}"
        )
    elif arguments.nnodes > 1:
        print(f"Measured; node 0 writes {arguments.output}.")
    return 0


def _links_of(device: str) -> Mapping[str, Mapping[str, Any]] | None:
    """Links of the built-in profile of the device: what one GPU alone cannot measure."""
    from cost_models.link import link_content
    from cost_models.profile import built_in_profiles, load_profile

    for name in built_in_profiles():
        profile = load_profile(name)
        if profile.provenance.device == device:
            estimate = f"the built-in profile {name}"
            links = {"intra_node": profile.intra_node, "inter_node": profile.inter_node}
            return {key: {"estimate": estimate, **link_content(link)} for key, link in links.items()}
    return None
