"""Operators with backward passes of their own, against torch's composed ones in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from runtime import tensor_parallel
from runtime.attention import pack, packed_attention
from runtime.elementwise import gated_silu, rms_norm
from runtime.linear import linears
from runtime.padded_attention import FREE, MAX_WEIGHTS, PADDING, buckets
from runtime.rope import Rotary

Operator = Callable[..., torch.Tensor | Sequence[torch.Tensor]]


def check(operator: Operator, reference: Operator, inputs: Sequence[torch.Tensor]) -> None:
    """Values and gradients of `operator` in fp32 against `reference` in fp64."""
    results = []
    for function, dtype in ((operator, torch.float32), (reference, torch.float64)):
        args = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*args)
        parts = [out] if isinstance(out, torch.Tensor) else list(out)
        weights = [torch.linspace(-1, 2, part.numel(), dtype=dtype).view(part.shape) for part in parts]
        torch.autograd.backward([(p * w).sum() for p, w in zip(parts, weights, strict=True)])
        results.append([*(p.detach() for p in parts), *(arg.grad for arg in args)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def normal(*sizes: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator) for size in sizes]


@pytest.mark.parametrize("size", [(7, 24), (7, 3, 8)])
def test_rms_norm(size: tuple[int, ...]) -> None:
    def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    check(lambda x, w: rms_norm(x, w, 1e-5), reference, normal(size, size[-1:]))


def test_gated_silu() -> None:
    check(gated_silu, lambda gate, up: F.silu(gate) * up, normal((5, 12), (5, 12)))


@pytest.mark.parametrize("joint", [True, False], ids=["beside each other", "apart"])
def test_rotary(joint: bool) -> None:
    freqs, positions = torch.rand(4), torch.tensor([0, 1, 2, 0, 1])

    def rotate(x: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        if joint:
            x, y = torch.cat([x, y], dim=1).split([3, 2], dim=1)
        return Rotary(freqs, positions, x.dtype)(x, y)

    def reference(*parts: torch.Tensor) -> Sequence[torch.Tensor]:
        turn = torch.exp(1j * positions[:, None, None] * freqs.double())
        turned = [torch.complex(x[..., :4], x[..., 4:]) * turn for x in parts]
        return [torch.cat([x.real, x.imag], -1) for x in turned]

    check(rotate, reference, normal((5, 3, 8), (5, 2, 8)))


@pytest.mark.parametrize("direct", [True, False], ids=["into its memory", "by autograd"])
def test_linears_as_one_product(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setattr("runtime.linear.SMALL", 0)
    x, flat, outside = normal((5, 6), (8 + 4 + 4, 6), (5, 16))
    x.requires_grad_()
    weights = [part.requires_grad_() for part in flat.detach().clone().split([8, 4, 4])]
    memory = torch.zeros_like(flat)
    into = list(memory.split([8, 4, 4])) if direct else None
    out = linears(x, weights, [None] * 3, None, into)
    assert out[1].data_ptr() == out[0].data_ptr() + 8 * 4, "the products were not one"
    torch.autograd.backward(list(out), list(outside.split([8, 4, 4], dim=1)))
    torch.testing.assert_close(torch.cat(list(out), dim=1), x @ flat.t())
    torch.testing.assert_close(x.grad, outside @ flat)
    grads = [weight.grad for weight in weights if weight.grad is not None]
    assert len(grads) == (0 if direct else 3)
    torch.testing.assert_close(memory if direct else torch.cat(grads), outside.t() @ x)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(5,), (3, 1, 9, 9, 2), (70, 3, 64, 1)])
def test_padded_attention(lengths: tuple[int, ...], kv_heads: int) -> None:
    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            heads = [x.transpose(0, 1) for x in part]
            query, key, value = heads
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    tokens = sum(lengths)
    inputs = normal((tokens, 4, 8), (tokens, kv_heads, 8), (tokens, kv_heads, 8))
    check(lambda q, k, v: packed_attention(q, k, v, pack(lengths)), reference, inputs)


def test_buckets_hold_each_sequence_once_and_waste_little() -> None:
    lengths = [1 + (37 * i) % 300 for i in range(200)]
    found = buckets(lengths, 8)
    assert sorted(i for bucket in found for i in bucket.members) == list(range(200))
    for bucket in found:
        own = sum(lengths[i] ** 2 for i in bucket.members)
        padded = len(bucket.members) * bucket.length**2
        assert bucket.length == max(lengths[i] for i in bucket.members)
        assert padded - own <= PADDING * own + FREE / 8
        assert padded * 8 <= MAX_WEIGHTS or len(bucket.members) == 1
    assert len(found) < 3 * 8 * sum(n**2 for n in lengths) / MAX_WEIGHTS
    assert len(buckets([64] * 16, 4)) == 1


@pytest.mark.parametrize("rows", [3, 40])
def test_table_gradients_add_to_the_memory_given(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of an embedding that is the head too, in chunks, kept or computed twice."""
    monkeypatch.setattr(tensor_parallel, "CHUNK_ELEMENTS", 3 * 17)
    monkeypatch.setattr(tensor_parallel, "KEEP_ELEMENTS", 10 * 17)
    (data,) = normal((17, 8))
    tokens = torch.arange(rows) * 5 % 17

    def pass_over(table: torch.Tensor, into: torch.Tensor | None) -> None:
        region = tensor_parallel.Region(None)
        add = None if into is None else partial(tensor_parallel.add_rows, into)
        hidden = tensor_parallel.embedding(tokens, table, 0, region, add)
        tensor_parallel.target_logprobs(hidden, table, tokens.roll(1), 0, None, 0.7, into).sum().backward()

    whole, table = data.clone().requires_grad_(), data.clone().requires_grad_()
    memory = torch.ones_like(data)
    pass_over(whole, None)
    pass_over(table, memory)
    assert table.grad is None
    assert whole.grad is not None
    torch.testing.assert_close(memory - 1.0, whole.grad, rtol=1e-4, atol=1e-4)
