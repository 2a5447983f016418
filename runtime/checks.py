"""What a plan's ranks would stumble over on this machine, found before they start."""

from __future__ import annotations

import importlib.util

import torch

from realloc.backend import DEEPSPEED
from realloc.errors import InputError
from realloc.plan import ExecutionPlan
from realloc.trust import check_functions
from runtime.dataset import open_dataset
from runtime.engine import source_sequences
from runtime.functions import FunctionTable
from runtime.machine import check_pinnable
from runtime.nvml import find_gpus
from runtime.supported import check_cluster, check_memory, check_runs


def check_runnable(plan: ExecutionPlan, *, pin: bool, trust: bool) -> str:
    """What there is to say of the data. Raises InputError for what this machine cannot run.

    `pin`: whether each of its ranks is to have a core. `trust`: the plan's own code may be imported.
    """
    check_functions(plan.graph, "plan", trust=trust)
    experiment, ranks = plan.experiment, plan.cluster.gpus_per_node
    gpus = find_gpus() if torch.cuda.is_available() else None
    check_cluster(plan.cluster, gpus)
    check_memory(sum(plan.predictions.peak_bytes.values()) if plan.predictions else 0, ranks, gpus)
    for role, spec in experiment.models.items():
        check_runs(spec.shape, f"experiment: models.{role}")
        if not spec.has_weights:
            raise InputError(
                f"experiment: models.{role}: '{spec.model}' is a shape without weights, good for "
                f"planning; give the folder of a Hugging Face checkpoint to run it."
            )
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise InputError(
            f"plan: cluster: needs {ranks} GPUs on each node, this machine has {torch.cuda.device_count()}."
        )
    if experiment.training_backend == DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "experiment: training_backend: deepspeed is not installed; pip install deepspeed, or use "
            "training_backend: own."
        )
    FunctionTable(experiment.resolve_algorithm().functions).check(plan.graph)
    dataset = open_dataset(experiment)
    for key in plan.graph.source_keys:
        source_sequences(dataset.batch(0), plan.graph.key[key])
    if pin:
        check_pinnable(ranks)
    return dataset.summary()
