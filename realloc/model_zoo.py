"""Model shapes known by name, for planning without the weights at hand.

Sources: the `config.json` that each model's authors publish with it (Llama: Meta; Qwen: Alibaba;
Mixtral: Mistral AI; Pythia: EleutherAI).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from realloc.model_shape import ModelShape, RopeScaling

# name: hidden, layers, heads, kv heads, MLP width, vocabulary, context, rope theta
_LLAMA: Mapping[str, tuple[int, int, int, int, int, int, int, float]] = {
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, 4096, 1e4),
    "llama-13b": (5120, 40, 40, 40, 13824, 32000, 4096, 1e4),
    "llama-34b": (8192, 48, 64, 8, 22016, 32000, 16384, 1e6),
    "llama-70b": (8192, 80, 64, 8, 28672, 32000, 4096, 1e4),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, 8192, 5e5),
    "llama-3-70b": (8192, 80, 64, 8, 28672, 128256, 8192, 5e5),
    "llama-3-405b": (16384, 126, 128, 8, 53248, 128256, 131072, 5e5),
}
# name: hidden, layers, heads, kv heads, MLP width, vocabulary, tied embeddings
_QWEN25: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, False),
}
_QWEN3: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, True),
    "qwen3-1.7b": (2048, 28, 16, 8, 6144, 151936, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, False),
    "qwen3-14b": (5120, 40, 40, 8, 17408, 151936, False),
    "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, False),
}
# name: hidden, layers, heads, kv heads, head width, expert width, experts, of them for a token,
# vocabulary, context
_MOE: Mapping[str, tuple[int, int, int, int, int, int, int, int, int, int]] = {
    "mixtral-8x7b": (4096, 32, 32, 8, 128, 14336, 8, 2, 32000, 32768),
    "mixtral-8x22b": (6144, 56, 48, 8, 128, 16384, 8, 2, 32768, 65536),
    "qwen3-30b-a3b": (2048, 48, 32, 4, 128, 768, 128, 8, 151936, 40960),
    "qwen3-235b-a22b": (4096, 94, 64, 4, 128, 1536, 128, 8, 151936, 40960),
}
# name: hidden, layers, heads, vocabulary
_PYTHIA: Mapping[str, tuple[int, int, int, int]] = {
    "pythia-14m": (128, 6, 4, 50304),
    "pythia-31m": (256, 6, 8, 50304),
    "pythia-70m": (512, 6, 8, 50304),
    "pythia-160m": (768, 12, 12, 50304),
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1b": (2048, 16, 8, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-2.8b": (2560, 32, 32, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
    "pythia-12b": (5120, 36, 40, 50688),
}


@lru_cache(maxsize=1)
def named_shapes() -> Mapping[str, ModelShape]:
    """Name -> shape of every model known by name."""
    return {**_llama(), **_qwen(), **_mixtures(), **_pythia()}


def _llama() -> Mapping[str, ModelShape]:
    shapes: dict[str, ModelShape] = {}
    for name, (hidden, layers, heads, kv, ffn, vocab, context, theta) in _LLAMA.items():
        long = RopeScaling(8.0, 1.0, 4.0, 8192) if name == "llama-3-405b" else None
        shapes[name] = ModelShape(
            family="llama",
            hidden=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=hidden // heads,
            ffn_dim=ffn,
            vocab=vocab,
            max_positions=context,
            rotary_dim=hidden // heads,
            rope_theta=theta,
            rope_scaling=long,
        )
    return shapes


def _qwen() -> Mapping[str, ModelShape]:
    shapes: dict[str, ModelShape] = {}
    for family, table in (("qwen2", _QWEN25), ("qwen3", _QWEN3)):
        for name, (hidden, layers, heads, kv, ffn, vocab, tied) in table.items():
            head_dim = 128 if family == "qwen3" else hidden // heads
            shapes[name] = ModelShape(
                family=family,
                hidden=hidden,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=kv,
                head_dim=head_dim,
                ffn_dim=ffn,
                vocab=vocab,
                max_positions=32768 if family == "qwen2" else 40960,
                norm_eps=1e-6,
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                rotary_dim=head_dim,
                rope_theta=1e6,
                tied_embeddings=tied,
            )
    return shapes


def _mixtures() -> Mapping[str, ModelShape]:
    shapes: dict[str, ModelShape] = {}
    for name, (hidden, layers, heads, kv, head_dim, ffn, experts, each, vocab, context) in _MOE.items():
        shapes[name] = ModelShape(
            family="mixtral" if name.startswith("mixtral") else "qwen3_moe",
            hidden=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=head_dim,
            ffn_dim=ffn,
            vocab=vocab,
            max_positions=context,
            norm_eps=1e-5 if name.startswith("mixtral") else 1e-6,
            qk_norm=name.startswith("qwen3"),
            rotary_dim=head_dim,
            rope_theta=1e6,
            num_experts=experts,
            experts_per_token=each,
        )
    return shapes


def _pythia() -> Mapping[str, ModelShape]:
    shapes: dict[str, ModelShape] = {}
    for name, (hidden, layers, heads, vocab) in _PYTHIA.items():
        shapes[name] = ModelShape(
            family="gpt_neox",
            hidden=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            ffn_dim=4 * hidden,
            vocab=vocab,
            max_positions=2048,
            norm="layer",
            gated_mlp=False,
            activation="gelu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rotary_dim=hidden // heads // 4,
            parallel_residual=True,
        )
    return shapes
