"""Seconds that one rank computes: layers, heads, sampling, optimizer. No communication, no plans.

Every operator costs the larger of its arithmetic (flops over achieved flops/s at its size) and its
memory traffic (bytes over bandwidth): the roofline (Williams, Waterman, Patterson, CACM 52, 2009),
plus the launch of one kernel. Counts of flops and bytes follow from the model's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cost_models.profile import HardwareProfile
from cost_models.sources import Found, Source
from realloc.model_shape import DTYPE_BYTES, ModelShape
from realloc.params import EMBED, ParamSpec, parameters, stage_layers, tp_range
from realloc.signature import layer_signature
from realloc.strategy import Recompute

# Kernels of a decoder layer besides products and attention: two norms, two residual additions, the
# activation and its product, rotary embedding of q and k (seven each).
_LAYER_OPS = 20
# In addition when decoding: writing k and v into the cache.
_CACHE_OPS = 2
# Passes over [rows, local vocabulary] in fp32: maximum, subtraction, exponential, sum, with those that
# write counted twice; the same again, scaled, for the gradient.
_LOGPROB_PASSES = 7
_LOGPROB_BACKWARD_PASSES = 4
_SAMPLE_PASSES = 6
# Small kernels around one sampled token: hashing its uniform number, the inverse CDF over blocks and
# shards, the bookkeeping of slots; around one micro-batch's loss.
_SAMPLE_OPS = 110
_HEAD_OPS = 60
# Decoding a micro-batch: cosines and sines of its positions, embedding, final norm.
_PASS_OPS = 16
# A parameter in an exchange of ZeRO's: copies into the buffer and out of it, and nine views of both, three of
# which take about as long as an operator (measured, CPU: 13 microseconds where an operator takes 2.5).
_EXCHANGE_OPS = 5
# FlashAttention-2 (Dao 2023, section 4.1): the backward pass has 2.5 times the flops.
_ATTENTION_BACKWARD = 2.5
# What the runtime packs for decoding (runtime.packed_weights): more steps, larger matrices than this.
PACK_STEPS = 8
PACK_ELEMENTS = 1 << 14
PACK_BLOCK = 64
GRADIENT_BYTES = 4
"""Of one element's gradient: a flat fp32 buffer, whatever the parameters' dtype."""


@dataclass(frozen=True)
class Pack:
    """A packed micro-batch.

    Tokens, sum of squared sequence lengths, runs of neighbours of equal length (which share an
    attention kernel), rows of the head.
    """

    tokens: float
    sum_squares: float
    runs: float
    head_tokens: float


class Pass(StrEnum):
    """What a forward pass is for: it keeps what a backward pass needs, or fills a cache, or neither."""

    TRAIN = "train"
    INFERENCE = "inference"
    PREFILL = "prefill"


def local_elements(spec: ParamSpec, tp: int) -> int:
    """Elements of the largest tensor-parallel shard (the last rank's) of a parameter."""
    cut = tp_range(spec, tp, tp - 1)
    if cut is None or spec.tp_dim is None:
        return spec.num_elements
    return spec.num_elements // spec.shape[spec.tp_dim] * (cut[1] - cut[0])


class ComputeCosts:
    """Compute seconds of one model shape in one dtype under tensor parallelism of degree `tp`."""

    def __init__(self, profile: HardwareProfile, shape: ModelShape, dtype: str, tp: int) -> None:
        self.shape = shape
        self.tp = tp
        self.element_bytes = DTYPE_BYTES[dtype]
        self._profile = profile
        self._rates = profile.matmul_curve(dtype)
        self._attention_rate = self._rates.highest * profile.attention.efficiency
        self.heads = shape.num_heads // tp
        self.kv_heads = max(1, shape.num_kv_heads // tp)
        width = shape.ffn_dim // tp
        self.ffn = width * max(1, shape.experts_per_token)
        """What the MLP computes of one token, on this shard."""
        self.vocab = -(-shape.vocab // tp)
        q, kv = self.heads * shape.head_dim, self.kv_heads * shape.head_dim
        hidden = shape.hidden
        self._products = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
        mlp_in = [(width, hidden)] * (2 if shape.gated_mlp else 1)
        # matrices that read the same input are one while decoding, unless biases lie between them
        fused = [(q + 2 * kv, hidden), (hidden, q)]
        fused_in = [(len(mlp_in) * width, hidden)]
        self._mlp_out = (hidden, width)
        self._expert_products: list[tuple[int, int]] = []
        if shape.is_moe:
            self._expert_products = [*mlp_in, self._mlp_out]
            mlp_in = fused_in = [(shape.num_experts, hidden)]  # the router
        else:
            mlp_in, fused_in = [*mlp_in, self._mlp_out], [*fused_in, self._mlp_out]
        self._products += mlp_in
        self._decode_products = self._products if shape.qkv_bias else fused + fused_in
        specs = parameters(shape)
        layer = [spec for spec in specs if spec.layer == 0]
        self.layer_elements = sum(local_elements(spec, tp) for spec in layer)
        self.layer_params = len(layer)
        # replicated kv heads and q/k norms: each rank has a part of their gradient
        kv_rows = shape.num_kv_heads * shape.head_dim if shape.num_kv_heads < tp else 0
        norms = 2 * shape.head_dim if shape.qk_norm else 0
        self._partial = (2 * kv_rows * hidden + norms) if tp > 1 else 0
        outside = (4 if shape.norm == "layer" else 2) + int(shape.out_bias) + int(shape.mlp_bias)
        self._partial_outside = outside * hidden
        self._first = [spec for spec in specs if spec.on_first]
        self._last = [spec for spec in specs if spec.on_last]
        # in 16 bits on CPUs torch composes this norm of kernels, and keeps the input over its size too
        self.is_cpu = profile.attention.per_sequence
        """Whether the device is a CPU: profiles of CPUs are those with an attention kernel per sequence."""
        composed = shape.norm == "rms" and self.is_cpu and self.element_bytes != 4
        self.norm_vectors = 2 if composed else 0
        """Vectors of a token that a layer's two norms keep beside their inputs."""
        # norms read and write twice, residual additions touch three vectors, rotation about three
        # per head in each direction, the gated activation five
        mlp = (5 if shape.gated_mlp else 2) * self.ffn
        self._outside = 14 * hidden * self.element_bytes
        self._inside = (6 * (q + kv) + mlp) * self.element_bytes
        self._elementwise = self._outside + self._inside
        self._layers: dict[tuple[str, Pack, bool], float] = {}
        self._units: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._layers_of: dict[tuple[int, int], tuple[int, ...]] = {}

    @property
    def found(self) -> Sequence[Found]:
        """What stands behind the numbers that these costs were asked for."""
        name = layer_signature(self.shape, self.tp)
        return [(Source.ANALYTIC, f"no tables of '{name}' in the profile")]

    def partial_elements(self, sequence_parallel: bool) -> int:
        """Elements of a layer whose gradients are summed over the tensor-parallel group."""
        return self._partial + (self._partial_outside if sequence_parallel else 0)

    def stage_elements(self, pp: int, stage: int, virtual: int = 1) -> int:
        """Parameters that a rank of the stage computes with."""
        return sum(self.stage_units(pp, stage, virtual))

    def num_layers_of(self, pp: int, virtual: int = 1) -> tuple[int, ...]:
        """How many layers each stage holds."""
        key = (pp, virtual)
        if key not in self._layers_of:
            stages = (stage_layers(self.shape, pp, stage, virtual) for stage in range(pp))
            self._layers_of[key] = tuple(map(len, stages))
        return self._layers_of[key]

    def stage_units(self, pp: int, stage: int, virtual: int = 1) -> tuple[int, ...]:
        """Elements of each unit that ZeRO moves at a time: embedding, layers, final norm with head."""
        key = (pp, stage, virtual)
        if key not in self._units:
            layers = self.num_layers_of(pp, virtual)[stage]
            ends = self._ends(pp, stage)
            embed = sum(local_elements(spec, self.tp) for spec in ends if spec.name == EMBED)
            head = sum(local_elements(spec, self.tp) for spec in ends if spec.name != EMBED)
            sizes = (embed, *[self.layer_elements] * layers, head)
            self._units[key] = tuple(size for size in sizes if size)
        return self._units[key]

    def stage_params(self, pp: int, stage: int, virtual: int = 1) -> int:
        """How many parameter tensors a rank of the stage holds."""
        return self.num_layers_of(pp, virtual)[stage] * self.layer_params + len(self._ends(pp, stage))

    def _ends(self, pp: int, stage: int) -> list[ParamSpec]:
        first = self._first if stage == 0 else []
        last = self._last if stage == pp - 1 else []
        return first + [spec for spec in last if spec not in first]

    def memory_s(self, size_bytes: float, working_set: float | None = None) -> float:
        """Seconds to move bytes, at the bandwidth that holds for a working set of that many bytes."""
        return size_bytes / self._profile.memory.at(max(1.0, working_set or size_bytes))

    def matmul_s(self, m: float, n: float, k: float, working_set: float | None = None) -> float:
        """Seconds of [m, k] x [k, n], launch included."""
        flops = 2.0 * m * n * k
        moved = (m * k + k * n + m * n) * self.element_bytes
        arithmetic = flops / self._rates.at(flops)
        return max(arithmetic, self.memory_s(moved, working_set)) + self._profile.launch_s

    def _products_s(self, tokens: float) -> float:
        """All matrices of a layer."""
        dense = sum(self.matmul_s(tokens, n, k) for n, k in self._products)
        return dense + sum(self._mlp_product_s(tokens, n, k) for n, k in self._expert_products)

    def _mlp_product_s(self, tokens: float, n: float, k: float, working_set: float | None = None) -> float:
        """Seconds of one matrix of the MLP, or of all experts' in one grouped kernel.

        Each token takes a few of the experts, by chance: E (1 - (1 - k / E)^tokens) of them are read,
        all once there are tokens enough.
        """
        shape = self.shape
        if not shape.is_moe:
            return self.matmul_s(tokens, n, k, working_set)
        share = shape.experts_per_token / shape.num_experts
        taken: float = shape.num_experts * (1 - (1 - share) ** tokens)
        rows = tokens * shape.experts_per_token / max(taken, 1e-9)
        flops = 2.0 * rows * n * k
        moved = (rows * (n + k) + n * k) * self.element_bytes
        one = max(flops / self._rates.at(flops), self.memory_s(moved, working_set))
        return taken * one + self._profile.launch_s

    def forward_layer_s(self, pack: Pack, sequence_parallel: bool = False, use: Pass = Pass.TRAIN) -> float:
        """Seconds of one layer's forward pass over packed tokens, the same by this model for any use."""
        key = ("forward", pack, sequence_parallel)
        if key not in self._layers:
            products = self._products_s(pack.tokens)
            rest = self._elementwise_s(pack.tokens, 1, sequence_parallel)
            self._layers[key] = products + self._attention_s(pack, 1.0) + rest
        return self._layers[key]

    def backward_layer_s(self, pack: Pack, sequence_parallel: bool = False) -> float:
        """Seconds of one layer's backward pass: two products for each of the forward's."""
        key = ("backward", pack, sequence_parallel)
        if key not in self._layers:
            self._layers[key] = self._backward_layer_s(pack, sequence_parallel)
        return self._layers[key]

    def _backward_layer_s(self, pack: Pack, sequence_parallel: bool) -> float:
        seconds = 2 * self._products_s(pack.tokens)
        seconds += self._attention_s(pack, _ATTENTION_BACKWARD)
        seconds += self._elementwise_s(pack.tokens, 2, sequence_parallel)
        if self._kernels(pack) > 1:
            # each run was a slice of q, k and v, whose gradients are as long as the whole pack: filled, added
            vectors = (self.heads + 2 * self.kv_heads) * self.shape.head_dim * self.element_bytes
            seconds += self.memory_s(2 * self._kernels(pack) * pack.tokens * vectors, pack.tokens * vectors)
        return seconds

    def weight_layer_s(self, pack: Pack) -> float:
        """The part of a layer's backward pass that makes the gradients of its matrices."""
        key = ("weight", pack, False)
        if key not in self._layers:
            self._layers[key] = self._products_s(pack.tokens)
        return self._layers[key]

    def recompute_layer_s(self, pack: Pack, recompute: Recompute, sequence_parallel: bool = False) -> float:
        """Seconds of what the backward pass computes again before it starts on a layer.

        `full`: the layer but for its last product, whose result nothing reads. `selective`: attention
        and the MLP from their inputs on, but for the last product of each.
        """
        if recompute is Recompute.NONE:
            return 0.0
        key = (recompute.value, pack, sequence_parallel)
        if key not in self._layers:
            seconds = self.forward_layer_s(pack, sequence_parallel)
            seconds -= self._mlp_product_s(pack.tokens, *self._mlp_out)
            if recompute is Recompute.SELECTIVE:
                o_width = self.heads * self.shape.head_dim
                seconds -= self.matmul_s(pack.tokens, self.shape.hidden, o_width)
                tokens = pack.tokens / self.tp if sequence_parallel else pack.tokens
                seconds -= self.memory_s(tokens * self._outside)
            self._layers[key] = max(0.0, seconds)
        return self._layers[key]

    def _kernels(self, pack: Pack) -> float:
        return max(1.0, pack.runs) if self._profile.attention.per_sequence else 1.0

    def _attention_s(self, pack: Pack, factor: float) -> float:
        # causal: half of the 4 * length^2 * width flops of the two products
        flops = 2.0 * pack.sum_squares * self.heads * self.shape.head_dim * factor
        launches = self._kernels(pack) * max(1.0, factor) * self._profile.attention.launch_s
        return flops / self._attention_rate + launches

    def _elementwise_s(self, tokens: float, factor: int, sequence_parallel: bool) -> float:
        outside = tokens / self.tp if sequence_parallel else tokens
        moved = outside * self._outside + tokens * self._inside
        return factor * (self.memory_s(moved) + _LAYER_OPS * self._profile.launch_s)

    def decode_layer_s(self, batch: float, context: float, working_set: float, ragged: bool = False) -> float:
        """Seconds of one layer for one new token of each of `batch` sequences of `context` tokens.

        `ragged`: they differ in length. By this model that makes no difference.
        """
        seconds = sum(self.matmul_s(batch, n, k, working_set) for n, k in self._decode_products)
        seconds += sum(self._mlp_product_s(batch, n, k, working_set) for n, k in self._expert_products)
        kv_bytes = 2.0 * batch * context * self.kv_heads * self.shape.head_dim * self.element_bytes
        seconds += self.memory_s(kv_bytes, kv_bytes * self.shape.num_layers)
        seconds += self._profile.attention.launch_s
        elementwise = self.memory_s(batch * self._elementwise)
        return seconds + elementwise + (_LAYER_OPS + _CACHE_OPS) * self._profile.launch_s

    def packed_bytes(self, pp: int, stage: int, steps: float) -> int:
        """Bytes of the second copy of its matrices that a rank holds while it generates on a CPU.

        It is made in float32, of all but the smallest, when there are many steps to save time in
        (runtime.packed_weights). oneDNN rounds outputs up to blocks of 64.
        """
        if not self.is_cpu or self.element_bytes != 4 or steps <= PACK_STEPS:
            return 0
        products = len(stage_layers(self.shape, pp, stage)) * self._decode_products
        if stage == pp - 1:
            products = [*products, (self.vocab, self.shape.hidden)]
        return 4 * sum(-(-n // PACK_BLOCK) * PACK_BLOCK * k for n, k in products if n * k > PACK_ELEMENTS)

    def call_s(self, name: str, computes: str, sequences: float, micro_batches: float) -> float:
        """Seconds of a call beside its model: one number by this model, whatever the call."""
        return self._profile.call_s

    def generate_s(self, layers: int) -> float:
        """Seconds of a generate call beside its steps: what is packed is read once and written once."""
        packed = self.packed_bytes(1, 0, PACK_STEPS + 1)
        return self.memory_s(2.0 * packed * layers / self.shape.num_layers) if packed else 0.0

    def embedding_s(self, tokens: float, use: Pass = Pass.TRAIN) -> float:
        """Seconds of a forward pass outside of layers and head."""
        moved = 2.0 * tokens * self.shape.hidden * self.element_bytes
        return self.memory_s(moved) + _PASS_OPS * self._profile.launch_s

    def embedding_backward_s(self, tokens: float = 0.0) -> float:
        """A dense gradient of the whole table is filled and added to, from that of `tokens` rows."""
        moved = 3.0 * (self.vocab + tokens) * self.shape.hidden * self.element_bytes
        return self.memory_s(moved) + 2 * self._profile.launch_s

    def zero_table_s(self) -> float:
        """Seconds that a table of zeros for the embedding's gradient adds to `embedding_backward_s`."""
        return 0.0

    def head_s(self, tokens: float, use: Pass = Pass.TRAIN) -> float:
        """Seconds of the head and, for a language model, of the log-probabilities of `tokens` rows."""
        launches = _HEAD_OPS * self._profile.launch_s
        if self.shape.head == "scalar":
            return self.matmul_s(tokens, 1, self.shape.hidden) + launches
        passes = _LOGPROB_PASSES * 4.0 * tokens * self.vocab
        return self.matmul_s(tokens, self.vocab, self.shape.hidden) + self.memory_s(passes) + launches

    def head_backward_s(self, tokens: float) -> float:
        launches = _HEAD_OPS * self._profile.launch_s
        if self.shape.head == "scalar":
            return 2 * self.matmul_s(tokens, 1, self.shape.hidden) + launches
        passes = _LOGPROB_BACKWARD_PASSES * 4.0 * tokens * self.vocab
        return 2 * self.matmul_s(tokens, self.vocab, self.shape.hidden) + self.memory_s(passes) + launches

    def sample_s(self, batch: float) -> float:
        """Seconds of the head and of drawing one token for each of `batch` sequences."""
        passes = _SAMPLE_PASSES * 4.0 * batch * self.vocab
        head = self.matmul_s(batch, self.vocab, self.shape.hidden)
        return head + self.memory_s(passes) + _SAMPLE_OPS * self._profile.launch_s

    def optimizer_s(self, elements: int, params: int) -> float:
        """Seconds of clearing, clipping and applying fp32 gradients of local parameters.

        Bytes per element: 4 to clear them, 4 to read for the norm, 8 to scale. AdamW reads
        gradient, weight and both moments and writes weight and moments: 28; narrower weights are
        written from their fp32 master copy besides.
        """
        passes = (4 + 4 + 8) * elements
        step = (28 if self.element_bytes == 4 else 32 + self.element_bytes) * elements
        seconds = step / self._profile.optimizer_bytes_per_s
        seconds += self.memory_s(passes, GRADIENT_BYTES * elements)
        return seconds + 3 * params * self._profile.launch_s

    def exchange_s(self, params: int) -> float:
        """Seconds of the operators that put rows of parameters into a buffer of ZeRO's and take them out."""
        return _EXCHANGE_OPS * params * self._profile.launch_s

    def accumulate_s(self, elements: int) -> float:
        """Seconds to add a micro-batch's gradients to the fp32 buffer: two reads and a write."""
        moved = (8.0 + self.element_bytes) * elements
        return self.memory_s(moved, moved)
