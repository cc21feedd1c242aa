"""Published shapes of the models that public measurements are of: layers, widths, heads, vocabulary, and who says so.

Feed-forward networks are gated: three matrices of d x F. F of the Gemma models is that of one of the two gated halves.
"""

from __future__ import annotations

from typing import NamedTuple

from gqa_jax.costs import Shape


class Model(NamedTuple):
    shape: Shape
    untied: bool  # whether the unembedding is a matrix of its own
    source: str


def _model(
    layers: int, d: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, vocabulary: int, untied: bool, source: str
):
    return Model(Shape(layers, d, heads, kv_heads, head_dim, d_ff, vocabulary), untied, source)


MODELS = {
    "llama-7b": _model(32, 4096, 32, 32, 128, 11008, 32000, True, "arXiv 2302.13971, Table 2; F: config.json of llama-7b"),
    "llama-2-7b": _model(32, 4096, 32, 32, 128, 11008, 32000, True, "arXiv 2307.09288; config.json of Llama-2-7b-hf"),
    "llama-2-13b": _model(40, 5120, 40, 40, 128, 13824, 32000, True, "arXiv 2307.09288; config.json of Llama-2-13b-hf"),
    "llama-2-70b": _model(80, 8192, 64, 8, 128, 28672, 32000, True, "arXiv 2307.09288; config.json of Llama-2-70b-hf"),
    "llama-3.1-8b": _model(32, 4096, 32, 8, 128, 14336, 128256, True, "arXiv 2407.21783, Table 3; Llama 3 8B has the same"),
    "llama-3.1-70b": _model(80, 8192, 64, 8, 128, 28672, 128256, True, "arXiv 2407.21783, Table 3; 3.3 and R1's have the same"),
    "mistral-7b": _model(32, 4096, 32, 8, 128, 14336, 32000, True, "arXiv 2310.06825, Table 1"),
    "gemma-2b": _model(18, 2048, 8, 1, 256, 16384, 256128, False, "arXiv 2403.08295, Table 1"),
    "gemma-7b": _model(28, 3072, 16, 16, 256, 24576, 256128, False, "arXiv 2403.08295, Table 1"),
    "qwen3-8b": _model(36, 4096, 32, 8, 128, 12288, 151936, True, "arXiv 2505.09388, Table 1; config.json of Qwen3-8B"),
    "qwen3-32b": _model(64, 5120, 64, 8, 128, 25600, 151936, True, "arXiv 2505.09388, Table 1; config.json of Qwen3-32B"),
}
