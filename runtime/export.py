"""Writing a role's weights as a Hugging Face folder: from the ranks of any layout, or a checkpoint.

A folder appears whole: it is written beside its place and renamed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from realloc.errors import InputError, RunError
from realloc.layout import layout
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape, read_config
from realloc.reallocation import schedule
from realloc.strategy import Strategy
from runtime.checkpoint_files import choose
from runtime.hf import save_hf
from runtime.parameters import allocate
from runtime.reallocation import Holding, Reallocator
from runtime.restore import CheckpointReader, read_model
from runtime.roles import RankRole


def export_role(role: RankRole, source: str, folder: Path, rank: int, gpus_per_node: int) -> None:
    """Gathers the role on the first rank of its home mesh, which writes the folder.

    Every rank of the home mesh must call it; the others return at once. `source` is the folder
    that the role was loaded from: its config and tokenizer go with the weights.
    """
    if rank not in role.home.mesh:
        return
    writer = role.home.mesh.first
    target = DeviceMesh(writer, 1, gpus_per_node)
    src = layout(role.shape, role.home.mesh, role.home.strategy)
    dst = layout(role.shape, target, Strategy())
    model = role.home_model
    if model is None:
        raise AssertionError("a rank of the home mesh holds no parameters")
    boxes = dst.boxes.get(rank)
    whole = None if boxes is None else allocate(boxes, model.params.flat.dtype, torch.device("cpu"))
    dtype = model.params.flat.dtype
    with role.memory.on_device():
        Reallocator(
            schedule(src, dst, gpus_per_node),
            rank,
            Holding(model.params.views, model.params.boxes),
            None if whole is None else Holding(whole.views, whole.boxes),
            src_dtype=dtype,
            dst_dtype=dtype,
        ).run()
    if whole is not None:
        write_model(folder, role.shape, read_config(source), whole.views, tokenizer_from=source)


def export_checkpoint(out: Path, folder: Path, *, iteration: int | None, role: str | None) -> str:
    """Writes a role of a run's checkpoint as a Hugging Face folder; returns what it was, in words.

    No ranks are started. `iteration` None takes the newest checkpoint, `role` None the only trained
    role. Raises InputError for a checkpoint or role that is not there, a damaged checkpoint, or a
    folder in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; give a new folder for the model.")
    checkpoint, manifest = choose(out, None if iteration is None else f"iteration-{iteration}")
    roles = sorted(manifest.roles)
    name = roles[0] if role is None and len(roles) == 1 else role
    if name not in roles:
        known = f"it holds {', '.join(roles)}"
        missing = f"has no role '{role}'; {known}" if role is not None else f"{known}; choose with --role"
        raise InputError(f"{checkpoint}: {missing}.")
    with CheckpointReader(checkpoint) as reader:
        shape, tensors = read_model(reader, name)
    source = Path(manifest.experiment["models"][name]["path"])
    write_model(
        folder,
        shape,
        manifest.roles[name].config,
        tensors,
        tokenizer_from=source if source.is_dir() else None,
    )
    missing_tokenizer = "" if source.is_dir() else f" (without its tokenizer: {source} is gone)"
    return f"{name} after {manifest.iteration} iterations{missing_tokenizer}"


def write_model(
    folder: Path,
    shape: ModelShape,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer_from: str | Path | None,
) -> None:
    """`save_hf`, all or nothing: a folder that is there is replaced once the new one is whole.

    Raises RunError when the disk refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new = Path(scratch) / "new"
            save_hf(new, shape, config, tensors, tokenizer_from=tokenizer_from)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    except OSError as error:
        raise RunError(f"{folder}: the model cannot be written: {error.strerror}.") from None
