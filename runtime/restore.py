"""Reading checkpoints: into the ranks of any plan, or as whole models, box by box.

Decides which files overlap a box and puts the box together; a reader opens only those. Checks that
a plan and a checkpoint are of the same models. That the files are whole is checked before
(`checkpoint_files.verify`), once, not by every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from realloc.errors import InputError
from realloc.experiment import experiment_content
from realloc.layout import Box
from realloc.model_shape import ModelShape, shape_from_config
from realloc.params import parameters
from realloc.plan import ExecutionPlan
from runtime.checkpoint import held_states
from runtime.checkpoint_files import Manifest, RoleRecord, read_index, read_manifest
from runtime.checkpoint_shares import WEIGHT, trained_roles
from runtime.roles import DTYPES, RankRole


class CheckpointReader:
    """The tensors of one checkpoint. Use as a context manager."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises InputError when the manifest or an index cannot be read."""
        self.checkpoint = checkpoint
        self.manifest = read_manifest(checkpoint)
        self._pieces: dict[tuple[str, str, str], list[tuple[Box, str, str]]] = {}
        for name in self.manifest.files:
            if name.endswith(".json"):
                file, pieces = read_index(checkpoint / name)
                for piece in pieces:
                    key = (piece.role, piece.state, piece.param)
                    self._pieces.setdefault(key, []).append((piece.box, file, piece.key))
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, role: str, state: str, param: str, box: Box, out: torch.Tensor) -> None:
        """Fills `out` with the box of the tensor; reads only what overlaps. Raises InputError."""
        filled = 0
        for stored, file, key in self._pieces.get((role, state, param), ()):
            part = stored.intersect(box)
            if part is None:
                continue
            try:
                values = self._open(file).get_slice(key)[part.within(stored)]
            except SafetensorError as error:
                raise InputError(f"{self.checkpoint / file}: cannot be read: {error}.") from None
            out[part.within(box)].copy_(values)
            filled += part.num_elements
        if filled != box.num_elements:
            raise InputError(
                f"{self.checkpoint}: holds {filled} of the {box.num_elements} elements needed of {role}'s "
                f"{param} ({state})."
            )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.checkpoint / file
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: cannot be read: {error}.") from None
        return self._files[file]


def restore(checkpoint: Path, roles: Mapping[str, RankRole], names: Iterable[str]) -> None:
    """Puts this rank's part of a checkpoint into the trained roles `names`, in all their layouts.

    A layout away from home gets the same parameters as home, as after a reallocation. Raises
    InputError when the checkpoint lacks something.
    """
    with CheckpointReader(checkpoint) as reader, torch.no_grad():
        for name in names:
            role = roles[name]
            with role.memory.on_device():
                _restore_role(reader, name, role)


def _restore_role(reader: CheckpointReader, name: str, role: RankRole) -> None:
    done: set[int] = set()
    for model in role.by_call.values():
        if id(model.params) in done:
            continue
        done.add(id(model.params))
        for param, box in model.params.boxes.items():
            reader.read(name, WEIGHT, param, box, model.params.views[param])
    for state, held in held_states(role).items():
        if state == WEIGHT:
            continue
        for param, box in held.boxes.items():
            reader.read(name, state, param, box, held.tensors[param])
    if role.trainer is not None:
        role.trainer.resume(reader.manifest.roles[name].optimizer_steps)


def read_model(reader: CheckpointReader, role: str) -> tuple[ModelShape, dict[str, torch.Tensor]]:
    """The whole parameters of a role, in the run's dtype."""
    record = reader.manifest.roles[role]
    shape = shape_of(record, f"{reader.checkpoint}: {role}")
    dtype = DTYPES[reader.manifest.experiment["dtype"]]
    tensors = {}
    for spec in parameters(shape):
        tensors[spec.name] = torch.empty(spec.shape, dtype=dtype)
        box = Box((0,) * len(spec.shape), spec.shape)
        reader.read(role, WEIGHT, spec.name, box, tensors[spec.name])
    return shape, tensors


def shape_of(record: RoleRecord, where: str) -> ModelShape:
    return replace(shape_from_config(record.config, where), head=record.head)


def check_resumable(checkpoint: Path, manifest: Manifest, plan: ExecutionPlan) -> None:
    """Raises InputError unless the plan goes on with the checkpoint's algorithm and models."""
    experiment = plan.experiment
    theirs = manifest.experiment["algorithm"]
    if theirs != experiment.algorithm:
        raise InputError(
            f"{checkpoint}: is of the algorithm {theirs}, the plan's is {experiment.algorithm}; "
            f"a run continues with the algorithm it began with."
        )
    mine = trained_roles(plan)
    if sorted(mine) != sorted(manifest.roles):
        raise InputError(
            f"{checkpoint}: is of the trained roles {', '.join(sorted(manifest.roles))}, the plan's are "
            f"{', '.join(sorted(mine))}."
        )
    for role in mine:
        stored = asdict(shape_of(manifest.roles[role], f"{checkpoint}: {role}"))
        wanted = asdict(experiment.role_shape(plan.graph, role))
        differing = [name for name, value in wanted.items() if stored[name] != value]
        if differing:
            numbers = ", ".join(f"{n} {stored[n]} there and {wanted[n]} here" for n in differing[:4])
            raise InputError(
                f"{checkpoint}: is of another {role} model than {experiment.models[role].model}: {numbers}."
            )
    if manifest.experiment["dtype"] != experiment.dtype:
        raise InputError(
            f"{checkpoint}: has parameters in {manifest.experiment['dtype']}, the plan's dtype is "
            f"{experiment.dtype}; continue with the dtype the run began with."
        )
    # a run may have been ended after its last iteration: its models and trace are then still to be written
    is_complete = (checkpoint.parents[1] / "trace.jsonl").exists()
    left = experiment.iterations - manifest.iteration
    if left < 0 or (left == 0 and is_complete):
        raise InputError(
            f"{checkpoint}: {manifest.iteration} of {experiment.iterations} iterations are done, so there is "
            f"nothing left; give --iterations with more than {manifest.iteration}."
        )


def changes(manifest: Manifest, plan: ExecutionPlan) -> list[str]:
    """What of the experiment differs from the checkpoint's, as dotted keys: allowed, but worth saying."""
    ignored = ("iterations", "cluster")
    now = experiment_content(plan.experiment)
    return [key for key in _differing(manifest.experiment, now, "") if key not in ignored]


def _differing(before: Any, after: Any, key: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [*before, *(name for name in after if name not in before)]
        return [
            found
            for name in names
            for found in _differing(before.get(name), after.get(name), f"{key}.{name}" if key else name)
        ]
    if isinstance(after, tuple):
        after = list(after)
    return [] if before == after else [key]
