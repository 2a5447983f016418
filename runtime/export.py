"""Writing a role's weights as a Hugging Face folder, from whatever layout holds them."""

from __future__ import annotations

from pathlib import Path

import torch

from realloc.layout import layout
from realloc.mesh import DeviceMesh
from realloc.model_shape import read_config
from realloc.reallocation import schedule
from realloc.strategy import Strategy
from runtime.hf import save_hf
from runtime.parameters import allocate
from runtime.reallocation import Holding, Reallocator
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
    Reallocator(
        schedule(src, dst, gpus_per_node),
        rank,
        Holding(model.params.views, model.params.boxes),
        None if whole is None else Holding(whole.views, whole.boxes),
        src_dtype=dtype,
        dst_dtype=dtype,
    ).run()
    if whole is not None:
        save_hf(folder, role.shape, read_config(source), whole.views, tokenizer_from=source)
