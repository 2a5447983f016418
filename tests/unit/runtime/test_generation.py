"""Generation on one rank: `transformers` for greedy decoding, our own forward for log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.sampling import Sampling
from runtime import packed_weights
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.generation import Generated, generate
from runtime.parameters import allocate
from runtime.rollout_decoder import RolloutDecoder
from tests.hf_models import CONFIGS, load_oracle, write_model
from tests.unit.runtime.test_decoder import decoder_of, random_tokens

torch.set_num_threads(1)
LENGTHS = (7, 3, 12, 5, 1, 12)


def run(decoder: Decoder, prompts: torch.Tensor, lengths: tuple[int, ...], **changes: Any) -> Generated:
    settings: dict[str, Any] = {
        "sequence_ids": list(range(100, 100 + len(lengths))),
        "max_new_tokens": 20,
        "eos_ids": (),
        "sampling": Sampling(),
        "seed": 3,
        "iteration": 1,
    }
    return generate(decoder, prompts=prompts, prompt_lengths=lengths, **(settings | changes))


def responses(result: Generated, prompt_lengths: tuple[int, ...]) -> list[list[int]]:
    assert result.tokens is not None
    totals = [p + r for p, r in zip(prompt_lengths, result.response_lengths, strict=True)]
    parts = result.tokens.split(totals)
    return [part[p:].tolist() for part, p in zip(parts, prompt_lengths, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    decoder, oracle = decoder_of(folder), load_oracle(folder)
    prompts = random_tokens(decoder.shape, LENGTHS)
    expected = []
    for prompt in prompts.split(LENGTHS):
        with torch.no_grad():
            out = oracle.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        expected.append(out[0, len(prompt) :].tolist())
    # a token that appears midway in some responses serves as the end
    eos = expected[0][9]
    cut = [r[: r.index(eos) + 1] if eos in r else r for r in expected]
    result = run(decoder, prompts, LENGTHS, eos_ids={eos}, sampling=Sampling(temperature=0.0))
    assert responses(result, LENGTHS) == cut
    assert result.response_lengths == tuple(map(len, cut))
    free = run(decoder, prompts, LENGTHS, eos_ids={eos}, sampling=Sampling(temperature=0.0, ignore_eos=True))
    assert responses(free, LENGTHS) == expected


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_equal_teacher_forced(
    temperature: float, packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the inference call computes them; kernels differ, so equal to rounding."""
    if packs:
        monkeypatch.setattr(packed_weights, "SMALL", 0)
    decoder = decoder_of(write_model(tmp_path, "qwen2"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    result = run(decoder, prompts, LENGTHS, eos_ids={5, 9}, sampling=Sampling(temperature))
    assert len(set(result.response_lengths)) > 1 or temperature == 0.0
    assert result.tokens is not None
    totals = [p + r for p, r in zip(LENGTHS, result.response_lengths, strict=True)]
    with torch.no_grad():
        hidden = decoder.forward(result.tokens, pack(totals))
        every = decoder.logprobs(hidden, result.tokens.roll(-1), temperature or 1.0)
    expected = [part[p - 1 : -1] for part, p in zip(every.split(totals), LENGTHS, strict=True)]
    torch.testing.assert_close(result.logprobs, torch.cat(expected), rtol=0, atol=1e-5)


def test_first_logprobs_equal_inference_bit_for_bit(tmp_path: Path) -> None:
    """The first token's hidden state comes from the same kernels: the packed prompts.

    Parameters lie as they do in a run, so that products are joined alike on both sides.
    """
    decoder = decoder_of(write_model(tmp_path, "llama"))
    flat = allocate(decoder.boxes, torch.float32, torch.device("cpu"))
    for name, view in flat.views.items():
        view.copy_(decoder.params[name])
    decoder.params.update(flat.views)
    prompts = random_tokens(decoder.shape, LENGTHS)
    result = run(decoder, prompts, LENGTHS, max_new_tokens=1)
    assert result.tokens is not None
    assert result.logprobs is not None
    tokens = torch.tensor([response[0] for response in responses(result, LENGTHS)])
    packed = pack(LENGTHS)
    with torch.no_grad():
        hidden = decoder.forward(prompts, packed)[packed.last_index]
        assert torch.equal(decoder.logprobs(hidden, tokens), result.logprobs)


def test_samples_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Not on micro-batches, order or company; but on seed, iteration and id."""
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    whole = responses(run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}), LENGTHS)
    assert len({len(r) for r in whole}) > 2
    grouped = run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}, micro_batches=4)
    assert responses(grouped, LENGTHS) == whole
    parts = prompts.split(LENGTHS)
    order = [4, 0, 2]
    some = run(
        decoder,
        torch.cat([parts[i] for i in order]),
        tuple(LENGTHS[i] for i in order),
        eos_ids={5, 9, 11},
        sequence_ids=[100 + i for i in order],
    )
    assert responses(some, tuple(LENGTHS[i] for i in order)) == [whole[i] for i in order]
    for change in ({"seed": 4}, {"iteration": 2}, {"sequence_ids": list(range(6))}):
        other = run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}, **change)
        assert all(a != b for a, b in zip(responses(other, LENGTHS), whole, strict=True))


def test_updated_weights_are_used_at_once(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path / "a", "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    before = responses(run(decoder, prompts, LENGTHS), LENGTHS)
    other = decoder_of(write_model(tmp_path / "b", "llama", seed=1))
    for name, param in decoder.params.items():
        param.copy_(other.params[name])
    after = responses(run(decoder, prompts, LENGTHS), LENGTHS)
    assert after != before
    assert after == responses(run(other, prompts, LENGTHS), LENGTHS)


def test_edges(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    nothing = run(decoder, torch.empty(0, dtype=torch.int64), ())
    assert nothing.response_lengths == ()
    assert nothing.tokens is not None
    assert nothing.tokens.numel() == 0
    one = run(decoder, random_tokens(decoder.shape, (4,)), (4,), max_new_tokens=1)
    assert one.response_lengths == (1,)
    assert one.logprobs is not None
    assert one.logprobs.shape == (1,)


@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_continuous_batching_equals_one_by_one(micro_batches: int, tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    limits = [3, 20, 1, 9, 14, 2]
    alone = []
    for i, prompt in enumerate(prompts.split(LENGTHS)):
        one = run(decoder, prompt, (LENGTHS[i],), sequence_ids=[100 + i], limits=[limits[i]], eos_ids={5, 9})
        alone.append((responses(one, (LENGTHS[i],))[0], one.logprobs))
    together = run(decoder, prompts, LENGTHS, limits=limits, eos_ids={5, 9}, micro_batches=micro_batches)
    assert responses(together, LENGTHS) == [tokens for tokens, _ in alone]
    expected = torch.cat([logprobs for _, logprobs in alone if logprobs is not None])
    torch.testing.assert_close(together.logprobs, expected, rtol=0, atol=1e-5)


def test_slots_are_bounded_and_never_idle_while_sequences_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[int] = []
    step = RolloutDecoder.step

    def counted(self: RolloutDecoder, x: torch.Tensor, prefill: Any, decode: Any, cache: Any) -> torch.Tensor:
        live.append(
            (0 if prefill is None else len(prefill.packed.lengths))
            + (0 if decode is None else decode.positions.shape[0])
        )
        assert cache.keys.shape[1] == 2
        return step(self, x, prefill, decode, cache)

    monkeypatch.setattr(RolloutDecoder, "step", counted)
    decoder = decoder_of(write_model(tmp_path, "llama"))
    limits = [3, 9, 1, 5, 4, 2]
    prompts = random_tokens(decoder.shape, LENGTHS)
    result = run(decoder, prompts, LENGTHS, limits=limits, micro_batches=3)
    assert result.response_lengths == tuple(limits)
    # one slot takes 3, 1 and 5 tokens, the other 9; then 4 and 2 remain
    assert live == [2] * 11 + [1] * 2


def test_several_sequences_enter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    step = RolloutDecoder.step

    def counted(self: RolloutDecoder, x: torch.Tensor, prefill: Any, decode: Any, cache: Any) -> torch.Tensor:
        entered.extend(() if prefill is None else [len(prefill.packed.lengths)])
        return step(self, x, prefill, decode, cache)

    monkeypatch.setattr(RolloutDecoder, "step", counted)
    decoder = decoder_of(write_model(tmp_path, "llama"))
    lengths, limits = (3,) * 21, [1 + 5 * i % 13 for i in range(21)]
    result = run(decoder, random_tokens(decoder.shape, lengths), lengths, limits=limits, micro_batches=3)
    assert result.response_lengths == tuple(limits)
    # 7 slots: the first fill them; then one at a time, since a quarter of 7 is less than two
    assert entered[0] == 7
    assert min(entered) == 1
    entered.clear()
    wide = run(decoder, random_tokens(decoder.shape, lengths), lengths, limits=limits, micro_batches=2)
    assert torch.equal(wide.tokens, result.tokens)  # type: ignore[arg-type]
    # 11 slots: two at a time, as long as two wait
    assert entered[0] == 11
    assert min(entered[1:-1]) >= 2


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_samples_of_a_prompt_share_its_computation(
    micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    step = RolloutDecoder.step

    def counted(self: RolloutDecoder, x: torch.Tensor, prefill: Any, decode: Any, cache: Any) -> torch.Tensor:
        computed.extend(() if prefill is None else prefill.packed.lengths)
        return step(self, x, prefill, decode, cache)

    decoder = decoder_of(write_model(tmp_path, "llama"))
    lengths = tuple(n for n in (7, 3, 12) for _ in range(4))
    parts = random_tokens(decoder.shape, (7, 3, 12)).split((7, 3, 12))
    prompts = torch.cat([part for part in parts for _ in range(4)])
    expected = run(decoder, prompts, lengths, eos_ids={5, 9})
    monkeypatch.setattr(RolloutDecoder, "step", counted)
    keys = [i // 4 for i in range(12)]
    shared = run(decoder, prompts, lengths, eos_ids={5, 9}, prompt_keys=keys, micro_batches=micro_batches)
    assert computed == [7, 3, 12]
    got = responses(shared, lengths)
    assert got == responses(expected, lengths)
    assert len({tuple(response) for response in got[:4]}) > 1
    torch.testing.assert_close(shared.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_greedy_samples_of_one_prompt_are_alike(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompt = random_tokens(decoder.shape, (5,))
    result = run(
        decoder, prompt.repeat(3), (5,) * 3, prompt_keys=(0,) * 3, sampling=Sampling(0.0), micro_batches=2
    )
    first, *others = responses(result, (5,) * 3)
    assert others == [first, first]


def test_no_end_before_min_new_tokens(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    ends = {5, 9, 11, 20, 30, 31, 32, 33}
    free = run(decoder, prompts, LENGTHS, eos_ids=ends)
    assert min(free.response_lengths) < 6
    late = run(decoder, prompts, LENGTHS, eos_ids=ends, sampling=Sampling(min_new_tokens=6))
    assert min(late.response_lengths) > 6
    for response in responses(late, LENGTHS):
        assert not ends & set(response[:6])
    greedy = run(decoder, prompts, LENGTHS, eos_ids=ends, sampling=Sampling(0.0, min_new_tokens=6))
    assert all(not ends & set(response[:6]) for response in responses(greedy, LENGTHS))


def test_logprobs_are_of_the_distribution_before_filtering(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    sampling = Sampling(0.8, top_k=5, top_p=0.7, min_new_tokens=3)
    result = run(decoder, prompts, LENGTHS, sampling=sampling, eos_ids={5, 9})
    assert result.tokens is not None
    totals = [p + r for p, r in zip(LENGTHS, result.response_lengths, strict=True)]
    with torch.no_grad():
        hidden = decoder.forward(result.tokens, pack(totals))
        every = decoder.logprobs(hidden, result.tokens.roll(-1), 0.8)
        ranks = (decoder.logits(hidden) > _target_logits(decoder, hidden, result.tokens)).sum(1)
    expected = [part[p - 1 : -1] for part, p in zip(every.split(totals), LENGTHS, strict=True)]
    torch.testing.assert_close(result.logprobs, torch.cat(expected), rtol=0, atol=1e-5)
    for part, p in zip(ranks.split(totals), LENGTHS, strict=True):
        # three banned tokens aside, each token is among the five most likely
        assert part[p - 1 : -1].max() < 5 + 2


def _target_logits(decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return decoder.logits(hidden).gather(1, tokens.roll(-1)[:, None])


def test_weights_are_packed_only_for_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "SMALL", 0)
    packed: list[int] = []
    pack_weight = packed_weights._pack

    def counted(weight: torch.Tensor) -> list[Any]:
        packed.append(weight.numel())
        return pack_weight(weight)

    monkeypatch.setattr(packed_weights, "_pack", counted)
    decoder = decoder_of(write_model(tmp_path, "llama"))
    run(decoder, random_tokens(decoder.shape, (4,)), (4,), max_new_tokens=2)
    assert not packed
    run(decoder, random_tokens(decoder.shape, (4,)), (4,), max_new_tokens=20)
    # every matrix once: qkv and gate-up as one each
    shape = decoder.shape
    matrices = sum(p.numel() for n, p in decoder.params.items() if p.dim() == 2) - shape.vocab * shape.hidden
    assert sum(packed) == matrices
    assert len(packed) == 4 * shape.num_layers + 1


def test_a_watcher_hears_three_times_of_every_step(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    heard: list[None] = []
    run(decoder, random_tokens(decoder.shape, LENGTHS), LENGTHS, watch=lambda: heard.append(None))
    assert len(heard) == 3 * 20  # all sequences enter with the first step and take 20 tokens
