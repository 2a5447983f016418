"""What recomputation repeats over the tensor-parallel group: what the cost model charges for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from realloc.strategy import Recompute, Strategy
from runtime import tensor_parallel
from runtime.attention import pack
from runtime.decoder import Decoder
from tests.hf_models import write_model
from tests.ranks.launch import run_ranks
from tests.ranks.test_decoder_ranks import LENGTHS, make_context, make_decoder, make_tokens

LAYERS = 3


def collectives(rank: int, world_size: int, folder: str) -> Mapping[str, Mapping[str, int]]:
    """`mode` or `mode+sp` -> collectives of a backward pass by name."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    dist.all_reduce = partial(counted, "all_reduce", dist.all_reduce)
    for name in ("all_gather", "reduce_scatter"):
        setattr(tensor_parallel, name, partial(counted, name, getattr(tensor_parallel, name)))
    result = {}
    plain = make_context(rank, world_size, Strategy(tp=world_size))
    whole = make_decoder(Path(folder), plain)
    for param in whole.params.values():
        param.requires_grad_()
    for mode in Recompute:
        for split in (False, True):
            strategy = Strategy(tp=world_size, recompute=mode, sequence_parallel=split)
            decoder = Decoder(whole.shape, replace(plain, strategy=strategy), torch.float32, whole.params)
            hidden = decoder.forward(make_tokens(whole.shape.vocab), pack(LENGTHS))
            counts.clear()
            hidden.sum().backward()
            result[f"{mode}{'+sp' if split else ''}"] = dict(counts)
    return result


@pytest.mark.parametrize(("model", "leaves"), [("llama", 2), ("gpt_neox", 1)])
def test_collectives_of_a_backward_pass(model: str, leaves: int, tmp_path: Path) -> None:
    """Attention and MLP are entered twice a layer and left `leaves` times."""
    write_model(tmp_path, model)
    counts, _ = run_ranks(collectives, 2, str(tmp_path))
    reduced = {mode: counts[mode].get("all_reduce", 0) for mode in ("none", "selective", "full")}
    assert reduced["none"] == 2 * LAYERS
    assert reduced["selective"] == reduced["none"]
    assert reduced["full"] == reduced["none"] + (leaves - 1) * LAYERS
    gathered = {mode: counts[f"{mode}+sp"]["all_gather"] for mode in ("none", "selective", "full")}
    assert gathered["selective"] == gathered["full"] == gathered["none"] + 2 * LAYERS
    scattered = {mode: counts[f"{mode}+sp"]["reduce_scatter"] for mode in ("none", "selective", "full")}
    assert scattered["selective"] == scattered["none"]
    assert scattered["full"] == scattered["none"] + (leaves - 1) * LAYERS
