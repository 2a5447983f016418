"""The decoder and generation over tensor and pipeline shards, against one rank alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from realloc.augmented import Placement
from realloc.mesh import DeviceMesh
from realloc.model_shape import resolve_shape
from realloc.params import split_range
from realloc.sampling import Sampling
from realloc.strategy import Strategy
from runtime.attention import pack
from runtime.decoder import Decoder, reduce_partial_gradients
from runtime.generation import generate
from runtime.hf import load_boxes
from runtime.parallel import ParallelContext, make_groups, single_rank
from tests.hf_models import write_model
from tests.ranks.launch import run_ranks

LENGTHS = (7, 1, 12, 12, 5)
Arrays = dict[str, NDArray[Any]]


def make_context(rank: int, world_size: int, strategy: Strategy) -> ParallelContext:
    placement = Placement(DeviceMesh(0, world_size, world_size), strategy)
    groups = make_groups([placement], rank, timedelta(seconds=20))
    context = groups.context(placement, torch.device("cpu"))
    assert context is not None
    return context


def make_decoder(folder: Path, context: ParallelContext, head: str = "lm") -> Decoder:
    shape = replace(resolve_shape(str(folder), "test"), head=head)
    decoder = Decoder(shape, context, torch.float32)
    decoder.params.update(load_boxes(folder, shape, decoder.boxes, torch.float32, torch.device("cpu")))
    return decoder


def make_tokens(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.randint(3, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(1))


def train(decoder: Decoder, lengths: tuple[int, ...] = LENGTHS) -> tuple[Arrays, Arrays]:
    """Forward and backward of a weighted sum, over the stages; outputs (last stage) and gradients."""
    context = decoder.context
    tokens = make_tokens(decoder.shape.vocab, lengths)
    packed = pack(lengths)
    for param in decoder.params.values():
        param.requires_grad_()
    entry = tokens
    if not context.is_first:
        entry = torch.empty(decoder.num_rows(tokens.shape[0]), decoder.shape.hidden)
        dist.recv(entry, context.stage_rank(context.at.pp - 1))
        entry.requires_grad_()
    hidden = decoder.forward(entry, packed)
    outputs: Arrays = {}
    if context.is_last:
        weights = torch.linspace(-1.0, 2.0, tokens.shape[0])
        if decoder.shape.head == "scalar":
            out = decoder.scalar(hidden)
        else:
            out = decoder.logprobs(hidden, tokens.roll(-1), 0.8)
            outputs["logits"] = decoder.logits(hidden.detach()).detach().numpy()
        outputs["out"] = out.detach().numpy()
        (out * weights).sum().backward()
    else:
        dist.send(hidden.detach(), context.stage_rank(context.at.pp + 1))
        grad = torch.empty_like(hidden)
        dist.recv(grad, context.stage_rank(context.at.pp + 1))
        hidden.backward(grad)
    if not context.is_first:
        assert entry.grad is not None
        dist.send(entry.grad, context.stage_rank(context.at.pp - 1))
    grads = {name: param.grad for name, param in decoder.params.items() if param.grad is not None}
    reduce_partial_gradients(decoder, grads)
    return outputs, {name: grad.numpy() for name, grad in grads.items()}


def _train_rank(
    rank: int, world_size: int, folder: Path, strategy: Strategy, head: str, lengths: tuple[int, ...]
) -> Any:
    return train(make_decoder(folder, make_context(rank, world_size, strategy), head), lengths)


@pytest.mark.parametrize(
    ("name", "short", "head"),
    [
        ("llama", Strategy(tp=2), "lm"),
        ("llama", Strategy(tp=4), "lm"),  # 2 kv heads
        ("llama-tied", Strategy(tp=4), "lm"),  # 1 kv head, tied
        ("llama-biases", Strategy(tp=4), "lm"),
        ("qwen2", Strategy(tp=2, pp=2), "lm"),  # tied, kv biases
        ("qwen3", Strategy(tp=4), "lm"),  # q/k norms
        ("gpt_neox", Strategy(tp=2), "lm"),
        ("gpt_neox-serial", Strategy(tp=2), "lm"),
        ("llama", Strategy(pp=3), "lm"),
        ("qwen3", Strategy(tp=2), "scalar"),
    ],
    ids=str,
)
def test_training_equals_one_rank(name: str, short: Strategy, head: str, tmp_path: Path) -> None:
    check_training(name, short, head, tmp_path)


def check_training(
    name: str, short: Strategy, head: str, tmp_path: Path, lengths: tuple[int, ...] = LENGTHS
) -> None:
    """Outputs and gradients of all ranks are those of one rank alone."""
    folder = write_model(tmp_path, name, head=head)
    expected, expected_grads = train(make_decoder(folder, single_rank(), head), lengths)
    whole = make_decoder(folder, single_rank(), head)
    ranks = run_ranks(_train_rank, short.size, folder, short, head, lengths)
    total: dict[str, NDArray[Any]] = {}
    for rank, (outputs, grads) in enumerate(ranks):
        at = short.coordinates(rank)
        for key, value in outputs.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-4, err_msg=key)
        assert bool(outputs) == (at.pp == short.pp - 1)
        context = replace(single_rank(), strategy=short, at=at)
        boxes = Decoder(whole.shape, context, torch.float32).boxes
        assert grads.keys() == boxes.keys()
        for key, grad in grads.items():
            if key == "embed.weight" and short.pp > 1 and whole.shape.tied_embeddings:
                # held on both ends; the two parts make the whole
                part = total.setdefault(key, np.zeros(expected_grads[key].shape, np.float32))
                part[boxes[key].slices] += grad
                continue
            np.testing.assert_allclose(
                grad, expected_grads[key][boxes[key].slices], rtol=1e-3, atol=2e-4, err_msg=key
            )
    for key, grad in total.items():
        np.testing.assert_allclose(grad, expected_grads[key], rtol=1e-3, atol=2e-4, err_msg=key)


def sample(decoder: Decoder, temperature: float) -> Any:
    """This data replica's part of 7 sequences: (ids, lengths, tokens, logprobs)."""
    context = decoder.context
    lengths = (7, 3, 12, 5, 1, 12, 4)
    start, stop = split_range(len(lengths), context.strategy.dp, context.at.dp)
    prompts = make_tokens(decoder.shape.vocab, lengths).split(lengths)[start:stop]
    result = generate(
        decoder,
        prompts=torch.cat(prompts) if context.is_first else None,
        prompt_lengths=lengths[start:stop],
        sequence_ids=range(start, stop),
        max_new_tokens=24,
        eos_ids=(5, 9, 11),
        sampling=Sampling(temperature),
        seed=0,
        iteration=0,
        micro_batches=context.strategy.micro_batches,
    )
    tokens = None if result.tokens is None else result.tokens.tolist()
    logprobs = None if result.logprobs is None else result.logprobs.tolist()
    return list(result.response_lengths), tokens, logprobs


def _sample_rank(rank: int, world_size: int, folder: Path, strategy: Strategy, temperature: float) -> Any:
    return sample(make_decoder(folder, make_context(rank, world_size, strategy)), temperature)


@pytest.mark.parametrize(
    ("name", "strategy", "temperature"),
    [
        ("llama", Strategy(tp=2), 1.0),
        ("llama-tied", Strategy(tp=4), 0.7),
        ("llama", Strategy(dp=2, micro_batches=2), 1.0),
        ("llama", Strategy(pp=2), 1.0),
        ("qwen2", Strategy(pp=2, micro_batches=4), 1.0),
        ("qwen3", Strategy(pp=3, micro_batches=5), 1.0),
        ("gpt_neox", Strategy(tp=2, pp=2, micro_batches=2), 1.0),
        ("llama", Strategy(tp=2, pp=2), 0.0),
        ("llama", Strategy(dp=2, tp=2), 1.0),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_the_strategy(
    name: str, strategy: Strategy, temperature: float, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, name)
    lengths, tokens, logprobs = sample(make_decoder(folder, single_rank()), temperature)
    assert len(set(lengths)) > 2 or temperature == 0.0
    ranks = run_ranks(_sample_rank, strategy.size, folder, strategy, temperature)
    ends = {0, strategy.pp - 1}
    for stage in range(strategy.pp):
        for tp in range(strategy.tp):
            replicas = [
                ranks[rank]
                for rank in range(strategy.size)
                if strategy.coordinates(rank).pp == stage and strategy.coordinates(rank).tp == tp
            ]
            assert [n for replica in replicas for n in replica[0]] == lengths
            if stage in ends:
                assert [t for replica in replicas for t in replica[1]] == tokens
            if stage == strategy.pp - 1:
                got = [p for replica in replicas for p in replica[2]]
                np.testing.assert_allclose(got, logprobs, rtol=1e-4, atol=1e-4)
