"""The decoder: one tensor shard of one pipeline stage of a transformer, driven by a ModelShape.

The same code trains, infers and decodes, so that log-probabilities agree between rollout and
training. It decides the mathematics and what crosses the tensor-parallel group. It does not know
where parameters come from, how stages exchange hidden states, or what optimizes the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from realloc.layout import Box, compute_boxes, shard_boxes
from realloc.model_shape import ModelShape
from realloc.params import EMBED, FINAL_NORM, HEAD, chunk_layers, stage_layers
from realloc.strategy import Recompute, Schedule
from runtime import tensor_parallel as tp
from runtime.attention import PackedSequences, packed_attention
from runtime.elementwise import gated_silu, rms_norm
from runtime.linear import Backward, WeightGradients, linear, linears
from runtime.parallel import ParallelContext
from runtime.recompute import Part, recomputed
from runtime.rope import Rotary, inverse_frequencies

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer within the stage, q [T, heads, dim], k and v [T, kv heads, dim]) -> [T, heads, dim]"""


class ParameterSource(Protocol):
    """Where parameters come from that are not there all the time.

    The decoder calls it around each unit: EMBEDDING, `layers.N`, HEAD (final norm and head). What
    computes a unit again in the backward pass does so inside of the two calls, so that only the
    gradient of `output` needs the parameters again.
    """

    def before(self, unit: str) -> None:
        """The decoder is about to compute with the unit's parameters."""

    def after(self, unit: str, output: torch.Tensor) -> None:
        """The unit has computed `output`; its backward pass begins when that gets its gradient."""


EMBEDDING_UNIT, HEAD_UNIT = "embedding", "head"


def empty_params(
    boxes: Mapping[str, Box], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of the boxes' shapes."""
    return {name: torch.empty(box.shape, dtype=dtype, device=device) for name, box in boxes.items()}


class Decoder:
    """A shard of the model, over parameters that it does not own.

    `params` maps names of `realloc.params` to local tensors of the shapes that `compute_boxes`
    gives for this rank; decoders of one role with one layout share the dict. The decoder reads
    the dict at each use, so entries may be filled, updated or replaced at any time between calls.

    With several virtual stages a pass goes through one chunk of the layers. Under the zero-bubble
    schedule, `weight_gradients` takes what backward passes put off.
    """

    def __init__(
        self,
        shape: ModelShape,
        context: ParallelContext,
        dtype: torch.dtype,
        params: MutableMapping[str, torch.Tensor] | None = None,
        source: ParameterSource | None = None,
    ) -> None:
        self.shape = shape
        self.context = context
        self.dtype = dtype
        at, strategy = context.at, context.strategy
        self.boxes = compute_boxes(shape, strategy, at)
        self.params = empty_params(self.boxes, dtype, context.device) if params is None else params
        for name, box in self.boxes.items():
            assert self.params[name].shape == box.shape, (name, self.params[name].shape, box.shape)
        virtual = strategy.virtual_stages
        self.layers = stage_layers(shape, strategy.pp, at.pp, virtual)
        self._chunks = [chunk_layers(shape, strategy.pp, at.pp, chunk, virtual) for chunk in range(virtual)]
        self._recompute = strategy.recompute
        splits_backward = strategy.schedule is Schedule.ZERO_BUBBLE
        self.weight_gradients = WeightGradients() if splits_backward else None
        special = splits_backward or self._recompute is not Recompute.NONE
        self._how = Backward(self.weight_gradients) if special else None
        self.num_heads = shape.num_heads // strategy.tp
        self.num_kv_heads = max(1, shape.num_kv_heads // strategy.tp)
        self.gradients: Mapping[str, torch.Tensor] = {}
        """fp32 memory of parameters' gradients, to which backward passes may add past autograd."""
        self.embedding_rows: tp.AddRows | None = None
        """Takes the embedding's gradient in place of autograd."""
        self._tp = context.tp_group
        self._source = source
        self._freqs = inverse_frequencies(shape).to(context.device)
        self._activation = activation(shape.activation)

    @property
    def vocab_start(self) -> int:
        """First vocabulary row of this shard's embedding or head."""
        return self.boxes[self._head_name if self.context.is_last else EMBED].start[0]

    def _gradient(self, name: str) -> torch.Tensor | None:
        return self.gradients.get(name)

    @property
    def _head_name(self) -> str:
        return HEAD if HEAD in self.boxes else EMBED

    def forward(self, x: torch.Tensor, packed: PackedSequences, chunk: int = 0) -> torch.Tensor:
        """Packed sequences through one chunk of this stage.

        x: token ids [T] int64 where the chunk `embeds`, hidden states [num_rows(T), hidden] elsewhere.
        Returns hidden states [num_rows(T), hidden]; where it `ends` [T, hidden], normed for the head.
        """

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return packed_attention(q, k, v, packed)

        return self._run(x, packed.positions, attend, chunk)

    def embeds(self, chunk: int) -> bool:
        """Whether the chunk is the model's first."""
        return self.context.is_first and chunk == 0

    def ends(self, chunk: int) -> bool:
        """Whether the chunk is the model's last."""
        return self.context.is_last and chunk == len(self._chunks) - 1

    def num_rows(self, num_tokens: int) -> int:
        """Rows of the hidden states that this rank passes to the next stage: all, or its part of them."""
        strategy = self.context.strategy
        return tp.rows_per_shard(num_tokens, strategy.tp) if strategy.sequence_parallel else num_tokens

    def head_weight(self) -> torch.Tensor:
        """[local vocabulary, hidden] of the lm head (a tied embedding serves), [1, hidden] if scalar."""
        return self.params[self._head_name]

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of `targets` [T'] under the distribution at `temperature`, float32 [T'].

        `hidden` [T', hidden] are rows of the last stage's output. Temperature divides the
        logits: these are the log-probabilities that sampling at that temperature reports.
        """
        return tp.target_logprobs(
            hidden,
            self.head_weight(),
            targets,
            self.vocab_start,
            self._tp,
            temperature,
            self._gradient(self._head_name),
        )

    def scalar(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scalar head: rows of the last stage's output [T', hidden] -> float32 [T']."""
        return linear(hidden, self.head_weight()).squeeze(-1).float()

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits of this shard's part of the vocabulary, [T', local vocabulary]."""
        return linear(hidden, self.head_weight()).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits over the whole vocabulary, gathered; differentiable only with tp 1."""
        widths = [
            stop - start
            for start, stop in (self._vocab_range(rank) for rank in range(self.context.strategy.tp))
        ]
        return tp.gather_columns(self.local_logits(hidden), widths, self._tp)

    def _vocab_range(self, tp_rank: int) -> tuple[int, int]:
        strategy = self.context.strategy
        box = shard_boxes(self.shape, strategy.tp, strategy.pp, tp_rank, self.context.at.pp)[self._head_name]
        return box.start[0], box.stop[0]

    def _run(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend, chunk: int = 0) -> torch.Tensor:
        split = self.context.strategy.sequence_parallel
        region = tp.Region(self._tp, positions.shape[0] if split else None)
        if self.embeds(chunk):
            self._before(EMBEDDING_UNIT)
            start = self.boxes[EMBED].start[0]
            x = tp.embedding(x, self.params[EMBED], start, region, self.embedding_rows)
            self._after(EMBEDDING_UNIT, x)
        rotary = Rotary(self._freqs, positions, x.dtype)
        first = sum(map(len, self._chunks[:chunk]))
        for index, layer in enumerate(self._chunks[chunk], start=first):
            self._before(f"layers.{layer}")
            x = self._layer(x, f"layers.{layer}", index, rotary, attend, region)
            self._after(f"layers.{layer}", x)
        if not self.ends(chunk):
            return x
        self._before(HEAD_UNIT)
        x = region.join(self._norm(x, FINAL_NORM))
        self._after(HEAD_UNIT, x)
        return x

    def _before(self, unit: str) -> None:
        if self._source is not None:
            self._source.before(unit)

    def _after(self, unit: str, output: torch.Tensor) -> None:
        if self._source is not None:
            self._source.after(unit, output)

    def _layer(
        self, x: torch.Tensor, name: str, index: int, rotary: Rotary, attend: Attend, region: tp.Region
    ) -> torch.Tensor:
        def attention(value: torch.Tensor, again: bool) -> torch.Tensor:
            # entered here, so that under sequence parallelism a part keeps its own rows alone
            return self._attention(region.enter(value), f"{name}.attn", index, rotary, attend, again)

        def mlp(value: torch.Tensor, again: bool) -> torch.Tensor:
            return self._mlp(region.enter(value), f"{name}.mlp", again)

        def layer(x: torch.Tensor, again: bool) -> torch.Tensor:
            parallel = self.shape.parallel_residual
            attn_in = self._norm(x, f"{name}.attn_norm")
            attn = self._part(Recompute.SELECTIVE, attention, attn_in, again and parallel)
            if not parallel:
                x = self._add_bias(x + region.leave(attn), f"{name}.attn.o")
            mlp_in = self._norm(x, f"{name}.mlp_norm")
            out = self._part(Recompute.SELECTIVE, mlp, mlp_in, again)
            if parallel:
                x = self._add_bias(x + region.leave(attn + out), f"{name}.attn.o")
            else:
                x = x + region.leave(out)
            return self._add_bias(x, f"{name}.mlp.down")

        return self._part(Recompute.FULL, layer, x, False)

    def _part(self, kind: Recompute, part: Part, x: torch.Tensor, again: bool) -> torch.Tensor:
        """The part's output; what it keeps is computed again where recomputation is of this kind."""
        if self._recompute is kind and torch.is_grad_enabled():
            return recomputed(part, x)
        return part(x, again)

    def _attention(
        self, x: torch.Tensor, name: str, index: int, rotary: Rotary, attend: Attend, again: bool
    ) -> torch.Tensor:
        """This shard's part of the attention output, to be summed over shards, without o's bias."""
        dim = self.shape.head_dim
        q, k, v = self._products(x, (f"{name}.q", f"{name}.k", f"{name}.v"))
        q = q.view(-1, self.num_heads, dim)
        k, v = (part.view(-1, self.num_kv_heads, dim) for part in (k, v))
        if self.shape.qk_norm:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        q, k = rotary(q, k)
        out = attend(index, q, k, v)
        return self._last_product(out.flatten(-2), f"{name}.o", again)

    def _mlp(self, x: torch.Tensor, name: str, again: bool) -> torch.Tensor:
        """This shard's part of the MLP output, to be summed over shards, without down's bias."""
        if self.shape.gated_mlp:
            gate, up = self._products(x, (f"{name}.gate", f"{name}.up"))
            silu = self.shape.activation == "silu"
            inner = gated_silu(gate, up) if silu else self._activation(gate) * up
        else:
            inner = self._activation(self._products(x, (f"{name}.up",))[0])
        return self._last_product(inner, f"{name}.down", again)

    def _products(self, x: torch.Tensor, names: Sequence[str]) -> Sequence[torch.Tensor]:
        """`x` times several column-split matrices, biases added."""
        weights = [f"{name}.weight" for name in names]
        return linears(
            x,
            [self.params[name] for name in weights],
            [self.params.get(f"{name}.bias") for name in names],
            self._how,
            [self._gradient(name) for name in weights],
        )

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`x` times a row-split matrix, without its bias."""
        weight = f"{name}.weight"
        return linear(x, self.params[weight], None, self._how, self._gradient(weight))

    def _last_product(self, x: torch.Tensor, name: str, again: bool) -> torch.Tensor:
        """The product that ends a part: when the part runs again, nobody needs the result."""
        if again:
            weight = f"{name}.weight"
            return linear(x, self.params[weight], None, Backward(only_keep=True), self._gradient(weight))
        return self._product(x, name)

    def _add_bias(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Biases of row-split matrices are added once, after the sum over shards."""
        bias = self.params.get(f"{name}.bias")
        return x if bias is None else x + bias

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.params[f"{name}.weight"]
        eps = self.shape.norm_eps
        if self.shape.norm == "layer" and f"{name}.bias" in self.params:
            return F.layer_norm(x, weight.shape, weight, self.params[f"{name}.bias"], eps)
        return rms_norm(x, weight, eps)


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The MLP's activation by its Hugging Face name."""
    if name == "silu":
        return F.silu
    if name == "gelu":
        return F.gelu
    assert name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), name
    return lambda x: F.gelu(x, approximate="tanh")


_KV = (".attn.k.weight", ".attn.v.weight", ".attn.k.bias", ".attn.v.bias")
_QK_NORMS = (".attn.q_norm.weight", ".attn.k_norm.weight")
_OUTSIDE = ("_norm.weight", "_norm.bias", ".attn.o.bias", ".mlp.down.bias")


def partial_gradients(
    shape: ModelShape, tp_degree: int, boxes: Iterable[str], sequence_parallel: bool = False
) -> frozenset[str]:
    """Parameters whose local gradient is only one tensor-parallel rank's part of the whole.

    These are what several ranks hold and each uses on its own heads alone: q/k norms, and kv
    heads that are replicated because there are fewer of them than ranks. With sequence parallelism
    also what each rank uses on its own rows alone: norms, and biases of row-split matrices. All
    other gradients are complete: of split parameters as they are, of the rest because every rank
    computes them alike.
    """
    if tp_degree == 1:
        return frozenset()
    endings: tuple[str, ...] = _OUTSIDE if sequence_parallel else ()
    if shape.qk_norm:
        endings += _QK_NORMS
    if shape.num_kv_heads < tp_degree:
        endings += _KV
    return frozenset(name for name in boxes if endings and name.endswith(endings))


@torch.no_grad()
def reduce_partial_gradients(decoder: Decoder, grads: Mapping[str, torch.Tensor]) -> None:
    """Completes, in place, the gradients that `partial_gradients` names.

    Call once per optimizer step, after the last backward and before clipping, on all ranks of the
    tensor-parallel group. `grads` maps parameter names to local gradients, or to the same rows of
    them on every rank of the group. One all-reduce.
    """
    group, shape, strategy = decoder.context.tp_group, decoder.shape, decoder.context.strategy
    names = sorted(partial_gradients(shape, strategy.tp, grads, strategy.sequence_parallel))
    if group is None or not names:
        return
    # a replicated kv head has its own place in the buffer, and each rank adds to its head's
    flat, places = [], []
    for name in names:
        grad = grads[name]
        heads = shape.num_kv_heads if name.endswith(_KV) else 1
        mine = 0 if heads == 1 else decoder.boxes[name].start[0] // shape.head_dim
        buffer = grad.new_zeros(heads, grad.numel())
        buffer[mine] = grad.reshape(-1)
        flat.append(buffer.view(-1))
        places.append((name, buffer.shape, mine))
    joined = torch.cat(flat)
    dist.all_reduce(joined, group=group)
    parts = torch.split(joined, [part.numel() for part in flat])
    for (name, size, mine), part in zip(places, parts, strict=True):
        grads[name].copy_(part.view(size)[mine].view(grads[name].shape))
