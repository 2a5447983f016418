"""Choosing tokens: reproducible random numbers and inverse-CDF sampling over a split vocabulary.

A token is a function of its distribution and of one number that depends only on (seed, iteration,
sequence id, position), so that no plan changes what is sampled. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

Restrict = Callable[[torch.Tensor], torch.Tensor | None]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
BLOCK = 128
"""Tokens per block of the two-level cumulative sum."""


def uniforms(seed: int, iteration: int, sequence_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 numbers in [0, 1), one for each (sequence id, position), both int64 [n].

    Each of the four keys is added in turn and mixed by the finaliser of SplitMix64 (Steele, Lea,
    Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
    """
    state = _mix_int(_mix_int(seed) + iteration)
    hashed = _mix(sequence_ids + _signed(state + _GOLDEN))
    hashed = _mix(hashed + positions + _signed(_GOLDEN))
    return _shift_right(hashed, 11).to(torch.float64) * 2.0**-53


def _mix_int(value: int) -> int:
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """int64 multiplication wraps around like that of 64-bit words."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the sign's copies are masked off."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def choose(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    temperature: float,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    restrict: Restrict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability; the same on all ranks of the group.

    logits float32 [n, local vocabulary], the columns from token `vocab_start` on (overwritten);
    uniform float64 [n], unused at temperature 0, which takes the most likely token. `restrict`
    maps logits, scaled by the temperature, to a copy with -inf for what must not be chosen, or None.

    The log-probability is of the whole distribution at `temperature`, whatever `restrict` leaves
    out: the one that inference computes of the same tokens. Greedy decoding reports that at
    temperature 1. Returns int64 [n] and float32 [n]. Two small collectives besides those of `restrict`.
    """
    if temperature not in (0.0, 1.0):
        logits.mul_(1.0 / temperature)
    allowed = None if restrict is None else restrict(logits)
    best_logit, best = None, None
    if temperature == 0.0:
        best_logit, best = (logits if allowed is None else allowed).max(dim=1)
    largest = best_logit if best_logit is not None and allowed is None else logits.amax(dim=1)
    exps = (logits - largest[:, None]).exp_()
    mass = exps.sum(1)
    blocks = None
    if best is None:
        blocks = _Blocks(exps if allowed is None else (allowed - largest[:, None]).exp_())
    if group is None:
        # in the order of tensor_parallel.target_logprobs: bit for bit the same
        log_total = largest + mass.log()
        if blocks is not None:
            assert uniform is not None
            best = blocks.find(uniform * blocks.total)
        assert best is not None
        logprobs = logits.gather(1, best[:, None])[:, 0] - log_total
        return best if vocab_start == 0 else best + vocab_start, logprobs
    third = best_logit if blocks is None else blocks.total
    assert third is not None
    shards = _gather(torch.stack([part.to(torch.float64) for part in (largest, mass, third)]), group)
    top = shards[:, 0].amax(dim=0)
    scales = (shards[:, 0] - top).exp()
    log_total = top.to(torch.float32) + (scales * shards[:, 1]).to(torch.float32).sum(dim=0).log()
    rank = dist.get_rank(group)
    if best is not None:
        owner = shards[:, 2].argmax(dim=0)
        token = best
    else:
        assert uniform is not None
        assert blocks is not None
        weights = scales * shards[:, 2]
        owner, aim = _owner(weights, uniform * weights.sum(dim=0))
        # nothing may have weight on this shard, which then is not the owner
        token = blocks.find(aim[rank] / scales[rank]).clamp_(max=logits.shape[1] - 1)
    logprob = logits.gather(1, token[:, None])[:, 0] - log_total
    return _shared(token + vocab_start, logprob, owner != rank, group)


def _gather(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' tensors, stacked on a new first dim."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)


def _shared(
    token: torch.Tensor, logprob: torch.Tensor, elsewhere: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities on all ranks, each from the one that is not `elsewhere`."""
    chosen = torch.stack([token.to(torch.float64), logprob.to(torch.float64)])
    chosen.masked_fill_(elsewhere, 0.0)
    dist.all_reduce(chosen, group=group)
    return chosen[0].to(torch.int64), chosen[1].to(torch.float32)


def _owner(totals: torch.Tensor, aim: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which shard holds the cumulative weight `aim` [n], and the aim within each shard [ranks, n]."""
    ends = totals.cumsum(dim=0)
    owner = (ends <= aim).sum(dim=0).clamp_(max=totals.shape[0] - 1)
    return owner, aim - (ends - totals)


class _Blocks:
    """Weights [n, columns] with their cumulative sums: of blocks of BLOCK columns, then within one."""

    def __init__(self, weights: torch.Tensor) -> None:
        missing = -weights.shape[1] % BLOCK
        if missing:
            weights = F.pad(weights, (0, missing))
        self._blocks = weights.view(-1, BLOCK)
        # float64 [n, blocks]: the weight up to each block's end
        self._ends = weights.view(weights.shape[0], -1, BLOCK).sum(-1).cumsum(-1, dtype=torch.float64)

    @property
    def total(self) -> torch.Tensor:
        """float64 [n]."""
        return self._ends[:, -1]

    def find(self, aim: torch.Tensor) -> torch.Tensor:
        """First column whose cumulative weight exceeds `aim` float64 [n]: int64 [n].

        Never one without weight: rounding may leave an aim at the very end of what has weight, or,
        since sums within a block differ from the block's by rounding, outside of its block. Such
        aims go to the nearest place inside. Any column if none has weight.
        """
        ends = self._ends
        zero = torch.zeros_like(aim)[:, None]
        inside = torch.clamp(aim[:, None], zero, ends[:, -1:].nextafter(zero))
        block = torch.searchsorted(ends, inside, right=True).clamp_(max=ends.shape[1] - 1)
        first = torch.arange(0, self._blocks.shape[0], ends.shape[1], device=aim.device)
        weights = self._blocks.index_select(0, first + block[:, 0])
        inner = weights.cumsum(-1, dtype=torch.float64)
        last = inner[:, -1:]
        rest = torch.clamp(inside - (ends.gather(1, block) - last), zero, last.nextafter(zero))
        column = torch.searchsorted(inner, rest, right=True)
        return torch.add(column, block, alpha=BLOCK)[:, 0]
