"""Recomputation and weight gradients that are put off: gradients as without, memory as promised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realloc.model_shape import resolve_shape
from realloc.strategy import Recompute, Schedule, Strategy
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.hf import load_boxes
from runtime.linear import Backward, WeightGradients, linear
from runtime.padded_attention import buckets
from runtime.parallel import single_rank
from tests.hf_models import write_model
from tests.tiny import write_tiny_llama

LENGTHS = (7, 1, 12, 12, 5)
PLAIN = Strategy()
MODES = {
    "selective": Strategy(recompute=Recompute.SELECTIVE),
    "full": Strategy(recompute=Recompute.FULL),
    "put off": Strategy(schedule=Schedule.ZERO_BUBBLE),
    "put off and full": Strategy(schedule=Schedule.ZERO_BUBBLE, recompute=Recompute.FULL),
    "put off and selective": Strategy(schedule=Schedule.ZERO_BUBBLE, recompute=Recompute.SELECTIVE),
}


def decoder_of(folder: Path, strategy: Strategy) -> Decoder:
    shape = resolve_shape(str(folder), "test")
    decoder = Decoder(shape, replace(single_rank(), strategy=strategy), torch.float32)
    decoder.params.update(load_boxes(folder, shape, decoder.boxes, torch.float32, torch.device("cpu")))
    for param in decoder.params.values():
        param.requires_grad_()
    return decoder


def loss_of(decoder: Decoder, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    tokens = torch.randint(
        3, decoder.shape.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(1)
    )
    logprobs = decoder.logprobs(decoder.forward(tokens, pack(lengths)), tokens.roll(-1))
    return (logprobs * torch.linspace(-1.0, 2.0, tokens.shape[0])).sum()


def gradients(decoder: Decoder) -> dict[str, torch.Tensor | None]:
    """Of two passes, whose backward passes come one after the other."""
    losses = [loss_of(decoder), loss_of(decoder, LENGTHS[2:])]
    later = decoder.weight_gradients
    for loss in losses:
        loss.backward()
        if later is not None:
            later.close()
    if later is not None:
        late = decoder.params["layers.0.attn.q.weight"]
        assert late.grad is None, "the gradient was not put off"
        later.run()
        assert not later.is_empty
        later.run()
        assert later.is_empty
    return {name: param.grad for name, param in decoder.params.items()}


@pytest.mark.parametrize("model", ["llama-biases", "qwen3", "gpt_neox"])
def test_gradients_are_the_same(model: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, model)
    expected = gradients(decoder_of(folder, PLAIN))
    for mode, strategy in MODES.items():
        got = gradients(decoder_of(folder, strategy))
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-4, msg=f"{mode}: {name}")


def saved_bytes(decoder: Decoder) -> int:
    """Bytes of activations that a forward pass keeps for its backward pass, each memory once."""
    saved: dict[int, int] = {}
    params = {param.untyped_storage().data_ptr() for param in decoder.params.values()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = decoder.forward(torch.arange(sum(LENGTHS)) + 3, pack(LENGTHS))
    assert hidden.requires_grad
    return sum(saved.values())


def test_activations_kept(tmp_path: Path) -> None:
    hidden, ffn, layers, tokens = 64, 176, 4, sum(LENGTHS)
    folder = write_tiny_llama(tmp_path, hidden=hidden, ffn=ffn, layers=layers, kv_heads=4)
    none, selective, full = (
        saved_bytes(decoder_of(folder, Strategy(recompute=mode)))
        for mode in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    )
    row = tokens * hidden * 4
    outside = 3 * row  # the final norm, and what is small
    assert layers * row <= full <= layers * row + outside
    # a layer keeps both residual inputs and both norm outputs
    assert 4 * layers * row <= selective <= 4 * layers * row + outside
    # and without recomputation q, k, v as padded, attention's output, three tensors of the MLP's width
    padded = sum(len(bucket.members) * bucket.length for bucket in buckets(LENGTHS, 4))
    extra = layers * 4 * (padded * 3 * hidden + tokens * (hidden + 3 * ffn))
    assert none - selective == pytest.approx(extra, rel=0.02)


def test_repetition_stops_at_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's last product is not computed again; under `selective` neither is attention's."""
    folder = write_tiny_llama(tmp_path, layers=1)
    rows: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(weight.shape[0])
        return torch.nn.functional.linear(x, weight, bias)

    numbers = {}
    for mode in Recompute:
        decoder = decoder_of(folder, Strategy(recompute=mode))
        tokens = torch.arange(sum(LENGTHS)) + 3
        monkeypatch.setattr("runtime.linear._choose", lambda x, weight: counted)
        hidden = decoder.forward(tokens, pack(LENGTHS))
        forward = len(rows)
        hidden.sum().backward()
        numbers[mode] = len(rows) - forward - 2 * forward
        rows.clear()
    # of the products q, k, v, o, gate, up, down
    assert numbers == {Recompute.NONE: 0, Recompute.SELECTIVE: 5, Recompute.FULL: 6}


def test_put_off_gradients_run_the_hooks_of_the_leaf() -> None:
    later = WeightGradients()
    x, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    arrived: list[Iterable[float]] = []

    def hook(param: torch.Tensor) -> None:
        if param.grad is not None:  # autograd calls it in the backward pass too, without a gradient
            arrived.append(param.grad.flatten().tolist())
            param.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    for scale in (1.0, 2.0):
        (linear(x, weight, None, Backward(later)) * scale).sum().backward()
        later.close()
    assert not arrived
    later.run()
    later.run()
    expected = x.sum(0).expand(4, 3).flatten()
    torch.testing.assert_close(torch.tensor(arrived), torch.stack([expected, 2 * expected]))
