"""What only a GPU has: CUDA graphs of decode steps, attention kernels for ragged sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.model_shape import resolve_shape
from realloc.sampling import Sampling
from runtime import attention
from runtime.attention import pack, packed_attention
from runtime.decode_graph import DecodeGraphs
from runtime.decoder import Decoder
from runtime.generation import generate
from runtime.hf import load_boxes
from runtime.parallel import single_rank
from runtime.varlen import varlen_kernel
from tests.hf_models import write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = (7, 3, 12, 5, 1, 12)


def _decoder(folder: Path, device: torch.device) -> Decoder:
    shape = resolve_shape(str(folder), "test")
    decoder = Decoder(shape, single_rank(device), torch.float32)
    decoder.params.update(load_boxes(folder, shape, decoder.boxes, torch.float32, device))
    return decoder


def _generate(decoder: Decoder) -> Any:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, decoder.shape.vocab, (sum(LENGTHS),), generator=generator)
    return generate(
        decoder,
        prompts=prompts,
        prompt_lengths=LENGTHS,
        sequence_ids=range(len(LENGTHS)),
        max_new_tokens=20,
        eos_ids=(5, 9),
        sampling=Sampling(),
        seed=3,
        iteration=1,
        micro_batches=2,
    )


def test_graphs_decode_what_single_kernels_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _decoder(write_model(tmp_path, "llama"), torch.device("cuda"))
    with_graphs = _generate(decoder)
    monkeypatch.setattr(DecodeGraphs, "suit", staticmethod(lambda decoder: False))
    plain = _generate(decoder)
    assert with_graphs.response_lengths == plain.response_lengths
    assert torch.equal(with_graphs.tokens, plain.tokens)
    torch.testing.assert_close(with_graphs.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def test_gpu_samples_what_the_cpu_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen2")
    results = [_generate(_decoder(folder, torch.device(kind))) for kind in ("cpu", "cuda")]
    assert results[0].tokens.tolist() == results[1].tokens.tolist()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_ragged_attention_equals_one_sequence_at_a_time(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = replace(pack(LENGTHS), device=torch.device("cuda"))
    q, k, v = (
        torch.randn(sum(LENGTHS), heads, 32, device="cuda", dtype=torch.bfloat16)
        for heads in (4, kv_heads, kv_heads)
    )
    assert varlen_kernel(q) is not None
    together = packed_attention(q, k, v, packed)
    monkeypatch.setattr(attention, "varlen_kernel", lambda q: None)
    torch.testing.assert_close(together, packed_attention(q, k, v, packed), rtol=2e-2, atol=2e-2)
