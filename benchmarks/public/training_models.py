"""Models and devices of the public measurements of training: what is multiplied and stored for a token, and by what.

Layers of one model may differ: Gemma 3 and 4 attend to all keys in every sixth or fifth layer, to a window in the others.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.public.devices import DEVICES as SERVING
from benchmarks.public.models import MODELS as SERVED
from gqa_jax.hardware import CHIPS

#: Products with parameters in a layer, by name; `attention` stands for those of queries, keys and values with one another.
PRODUCTS = ("q", "k", "v", "out", "gate", "up", "down")


class Layers(NamedTuple):
    """`count` layers of the same shape."""

    count: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    window: int | None = None  # keys that a query sees at most; None: all before it
    products: tuple[str, ...] = PRODUCTS  # those that it has
    extra: int = 0  # parameters of further products

    def params(self, d_model: int) -> dict[str, int]:
        """Parameters of a layer, by product."""
        query, key = d_model * self.n_heads * self.head_dim, d_model * self.n_kv_heads * self.head_dim
        ffn = d_model * self.d_ff
        sizes = {"q": query, "k": key, "v": key, "out": query, "gate": ffn, "up": ffn, "down": ffn}
        return {name: sizes[name] for name in self.products} | ({"extra": self.extra} if self.extra else {})

    def keys(self, context: float) -> float:
        """Mean number of keys that a query of a causal sequence sees."""
        if self.window is None or self.window >= context:
            return context / 2
        return self.window - self.window**2 / (2 * context)

    def values(self, d_model: int) -> dict[str, int]:
        """Values of a token that a layer's forward pass reads and writes at least, by what they are for."""
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        keys = len({"k", "v"} & set(self.products)) * key
        active = 3 if "gate" in self.products else 2  # values of F that the activation reads and writes
        return {
            "qkv": 3 * d_model + query + keys,  # the norm reads the stream, writes what the products read once
            "attention": 2 * query + 2 * key,
            "out": query + 4 * d_model,  # the product, and its sum with the stream
            "gate_up": 3 * d_model + (active - 1) * self.d_ff + active * self.d_ff,
            "down": self.d_ff + 4 * d_model,
        }


class Model(NamedTuple):
    """A model as it is trained."""

    d_model: int
    vocab_size: int
    layers: tuple[Layers, ...]
    untied: bool  # whether the unembedding is a matrix of its own
    source: str
    learned_positions: bool = False
    extra: int = 0  # parameters of products outside of layers
    looked_up: int = 0  # further parameters that no product is with

    @property
    def n_layers(self) -> int:
        return sum(group.count for group in self.layers)

    @property
    def layer_params(self) -> int:
        """Parameters of all products in layers."""
        return sum(group.count * sum(group.params(self.d_model).values()) for group in self.layers) + self.extra

    @property
    def head_params(self) -> int:
        """Parameters of the unembedding."""
        return self.d_model * self.vocab_size

    def params(self, context: int) -> int:
        """All that are trained, without norms."""
        embedding = self.head_params * (2 if self.untied else 1) + self.looked_up
        return self.layer_params + embedding + self.learned_positions * context * self.d_model


def _served(name: str) -> Model:
    shape, untied, source = SERVED[name]
    group = Layers(shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.d_ff)
    return Model(shape.d_model, shape.vocab_size, (group,), untied, source)


def _mpt(layers: int, d: int) -> Model:
    """Feed-forward networks of two matrices of 4 d, as many key/value heads as query heads, a tied unembedding."""
    products = ("q", "k", "v", "out", "up", "down")
    group = Layers(layers, d // 128, d // 128, 128, 4 * d, products=products)
    return Model(
        d, 50368, (group,), False, "github.com/mosaicml/llm-foundry scripts/train/benchmarking, commit 8c8dd48",
        learned_positions=True,
    )  # fmt: skip


_MAXTEXT = "github.com/AI-Hypercomputer/maxtext src/maxtext/configs/{}"

MODELS = {
    "mpt-1b": _mpt(24, 2048),
    "mpt-3b": _mpt(32, 2560),
    "mpt-7b": _mpt(32, 4096),
    "mpt-13b": _mpt(40, 5120),
    "mpt-70b": _mpt(80, 8192),
    "llama-2-7b": _served("llama-2-7b"),
    "llama-2-70b": _served("llama-2-70b"),
    "llama-3.1-8b": _served("llama-3.1-8b"),
    "llama-3.1-70b": _served("llama-3.1-70b"),
    "llama-3.1-405b": Model(
        16384, 128256, (Layers(126, 128, 8, 128, 53248),), True, "arXiv 2407.21783, Table 3"
    ),
    "maxtext-16b": Model(
        4096, 32000, (Layers(32, 64, 64, 128, 28672),), False,
        _MAXTEXT.format("base.yml, scaled by tpu/v5e/16b.sh, commit e591f30"),
    ),
    "maxtext-32b": Model(
        8192, 32000, (Layers(32, 64, 64, 128, 28672),), False,
        _MAXTEXT.format("base.yml, scaled by tpu/v5e/32b.sh, commit e591f30"),
    ),
    "gemma-3-12b": Model(
        3840, 262144, (Layers(40, 16, 8, 256, 15360, 1024), Layers(8, 16, 8, 256, 15360)), False,
        _MAXTEXT.format("models/gemma3-12b.yml; arXiv 2503.19786: 5 of 6 layers see a window"),
    ),
    # Keys serve as values too in the layers that see everything.
    "gemma-4-31b": Model(
        5376, 262144,
        (
            Layers(50, 32, 16, 256, 21504, 1024),
            Layers(10, 32, 4, 512, 21504, products=("q", "k", "out", "gate", "up", "down")),
        ),
        False, _MAXTEXT.format("models/gemma4-31b.yml"),
    ),
    # 4 of 5 layers see a window. The last 20 take keys and values of earlier ones and have twice the width. Every layer has a
    # gate and a projection of 256 values of a token of its own; all of those are looked up, and projected from the stream once.
    "gemma-4-e2b": Model(
        1536, 262144,
        (
            Layers(12, 8, 1, 256, 6144, 512, extra=2 * 256 * 1536),
            Layers(3, 8, 1, 512, 6144, extra=2 * 256 * 1536),
            Layers(16, 8, 1, 256, 12288, 512, ("q", "out", "gate", "up", "down"), extra=2 * 256 * 1536),
            Layers(4, 8, 1, 512, 12288, products=("q", "out", "gate", "up", "down"), extra=2 * 256 * 1536),
        ),
        False, _MAXTEXT.format("models/gemma4-e2b.yml"), extra=35 * 256 * 1536, looked_up=35 * 256 * 262144,
    ),
}  # fmt: skip

DEVICES = {name: SERVING[name] for name in ("h100", "h200", "b200", "a100", "a100-40gb", "v5e", "v6e", "v7x")} | {
    "v5p": CHIPS["v5p"],
    # The source: 96 GB of HBM2e at 2.4 TB/s and 500 W; NVIDIA gives no peak for it, so that of the SXM board.
    "h100-96gb": dataclasses.replace(CHIPS["h100"], name="h100-96gb", memory_bandwidth=2.4e12),
    # docs.cloud.google.com/compute/docs/gpus/gpu-network-bandwidth: 1,000 Gbps of an a3-highgpu-8g, 8 GPUs.
    "h100-a3": dataclasses.replace(CHIPS["h100"], name="h100-a3", network=1000e9 / 8 / 8),
    # NVIDIA's data sheet of the GB200 NVL72, half of what it gives with sparsity: 360 PFLOP/s of bfloat16 and 720 of float8
    # over 72 GPUs; glennklockwood.com/garden/processors/B200 lists 2,500 and 5,000 TFLOP/s without sparsity at 1,200 W.
    "gb200": dataclasses.replace(
        CHIPS["b200"],
        name="gb200",
        peak_flops=2500e12,
        narrow_flops=(("float8", 5000e12), ("int8", 5000e12), ("float4", 10000e12)),
    ),
}

#: Devices that one fabric joins: GPUs of a host, of a GB200 rack; chips of a TPU slice in these rows.
JOINED = {"gb200": 72, "v5e": 256, "v6e": 256, "v5p": 4096, "v7x": 4096}

#: Shares of the peak that published kernels reach at head size 128, forward and backward, by major compute capability.
#: FlashAttention on an A100: 30 to 50% and 25 to 35% (arXiv 2307.08691, Section 1); its successor is about twice as fast there.
#: FlashAttention-2 on an H100: 35% (arXiv 2407.08608, abstract); FlashAttention is taken to be half as fast there too.
KERNELS = {
    "flash-1": {8: (0.40, 0.30), 9: (0.175, 0.175)},
    "flash-2": {9: (0.35, 0.35)},
}
