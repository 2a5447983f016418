"""The decoder on one rank against `transformers`: outputs and gradients of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.model_shape import ModelShape, resolve_shape
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.hf import load_boxes
from runtime.parallel import single_rank
from tests.hf_models import CONFIGS, load_oracle, write_model

torch.set_num_threads(1)
LENGTHS = (7, 1, 12, 12, 5)


def decoder_of(folder: Path, *, head: str = "lm", dtype: torch.dtype = torch.float32) -> Decoder:
    shape = replace(resolve_shape(str(folder), "test"), head=head)
    decoder = Decoder(shape, single_rank(), dtype)
    decoder.params.update(load_boxes(folder, shape, decoder.boxes, dtype, torch.device("cpu")))
    return decoder


def random_tokens(shape: ModelShape, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, shape.vocab, (sum(lengths),), generator=generator)


def oracle_logits(oracle: Any, tokens: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Each sequence alone, so that the oracle packs and pads nothing."""
    return torch.cat([oracle(part[None], use_cache=False).logits[0] for part in tokens.split(lengths)])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    decoder = decoder_of(folder)
    lengths = (100, 7, 1, 40) if "rope" in name else LENGTHS
    tokens = random_tokens(decoder.shape, lengths)
    with torch.no_grad():
        logits = decoder.logits(decoder.forward(tokens, pack(lengths)))
        expected = oracle_logits(load_oracle(folder), tokens, lengths)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprob_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    decoder, oracle = decoder_of(folder), load_oracle(folder)
    tokens = random_tokens(decoder.shape)
    targets = tokens.roll(-1)
    weights = torch.linspace(-1.0, 2.0, tokens.shape[0])
    for param in decoder.params.values():
        param.requires_grad_()
    logprobs = decoder.logprobs(decoder.forward(tokens, pack(LENGTHS)), targets, temperature=0.7)
    (logprobs * weights).sum().backward()
    expected = (oracle_logits(oracle, tokens) / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    # the oracle's gradients, written where its weights are, come back under our names
    with torch.no_grad():
        for param in oracle.parameters():
            param.copy_(param.grad)
    oracle.save_pretrained(tmp_path / "grads")
    grads = load_boxes(tmp_path / "grads", decoder.shape, decoder.boxes, torch.float32, torch.device("cpu"))
    for key, param in decoder.params.items():
        torch.testing.assert_close(param.grad, grads[key], rtol=1e-3, atol=2e-4, msg=f"gradient of {key}")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_scalar_head_equals_the_classifier(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name, head="scalar")
    decoder = decoder_of(folder, head="scalar")
    tokens = random_tokens(decoder.shape)
    packed = pack(LENGTHS)
    with torch.no_grad():
        hidden = decoder.forward(tokens, packed)
        scores = decoder.scalar(hidden[packed.last_index])
        expected = oracle_logits(load_oracle(folder, head="scalar"), tokens)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3")
    tokens = random_tokens(resolve_shape(str(folder), "test"))
    with torch.no_grad():
        outputs = []
        for dtype in (torch.float32, torch.bfloat16):
            decoder = decoder_of(folder, dtype=dtype)
            hidden = decoder.forward(tokens, pack(LENGTHS))
            assert hidden.dtype == dtype
            outputs.append(decoder.logprobs(hidden, tokens.roll(-1)))
    assert outputs[1].dtype == torch.float32
    assert (outputs[0] - outputs[1]).abs().mean() < 0.05


@pytest.mark.parametrize("limit", ["CHUNK_ELEMENTS", "KEEP_ELEMENTS"])
def test_logprobs_do_not_depend_on_chunks(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import tensor_parallel as tp

    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(23, 8, generator=generator).requires_grad_()
        weight = (2 * torch.randn(50, 8, generator=generator)).requires_grad_()
        targets = torch.arange(23)
        logprobs = tp.target_logprobs(hidden, weight, targets, 0, None)
        (logprobs * torch.linspace(-1, 1, 23)).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return [logprobs.detach(), hidden.grad, weight.grad]

    whole = run()
    monkeypatch.setattr(tp, limit, 100)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logprobs_of_huge_logits_are_finite() -> None:
    from runtime.tensor_parallel import target_logprobs

    hidden = torch.tensor([[1000.0], [-1000.0]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logprobs = target_logprobs(hidden, weight, torch.tensor([0, 0]), 0, None)
    assert logprobs.tolist() == [0.0, -2000.0]


def test_packed_sequences_indices() -> None:
    packed = pack(torch.tensor([2, 2, 1, 3]))
    assert packed.positions.tolist() == [0, 1, 0, 1, 0, 0, 1, 2]
    assert packed.sequence_index.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert packed.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert packed.last_index.tolist() == [1, 3, 4, 7]
    assert packed.runs == [(0, 2, 2), (4, 1, 1), (5, 1, 3)]
