"""The activations that the cost model counts are those that autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cost_models.activations import activation_bytes
from cost_models.compute import ComputeCosts
from cost_models.profile import Attention
from realloc.model_shape import ModelShape
from realloc.strategy import Recompute, Strategy
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.parallel import single_rank
from tests.unit.cost_models.cases import profile

LENGTHS = (128, 128, 128)
GATED = ModelShape(
    family="llama", hidden=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=160,
    vocab=100, max_positions=512, rotary_dim=16,
)  # fmt: skip
PLAIN = replace(GATED, norm="layer", gated_mlp=False, activation="gelu")


def kept_bytes(shape: ModelShape, recompute: Recompute) -> int:
    """Bytes of all memory that a forward pass leaves to autograd, parameters aside."""
    context = replace(single_rank(), strategy=Strategy(recompute=recompute))
    decoder = Decoder(shape, context, torch.float32)
    for param in decoder.params.values():
        torch.nn.init.normal_(param, std=0.1).requires_grad_()
    own = {param.untyped_storage().data_ptr() for param in decoder.params.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.forward(torch.arange(sum(LENGTHS)) % shape.vocab, pack(LENGTHS))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("shape", [GATED, PLAIN], ids=["rms, gated", "layer, plain"])
def test_a_layer_keeps_what_is_counted(shape: ModelShape, recompute: Recompute) -> None:
    more, less = (kept_bytes(replace(shape, num_layers=n), recompute) for n in (4, 2))
    cpu = profile(attention=Attention(1.0, 0.0, True))
    counted = activation_bytes(ComputeCosts(cpu, shape, "float32", 1), sum(LENGTHS), recompute)
    assert (more - less) / 2 == pytest.approx(counted, rel=0.02)
