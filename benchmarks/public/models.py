"""Published shapes of the models that public measurements are of: layers, widths, heads, vocabulary, and who says so.

Those of the Llama class are in `gqa_jax.search.own_model`; the others here.

Feed-forward networks are gated: three matrices of d x F. F of the Gemma models is that of one of the two gated halves.
"""

from __future__ import annotations

from typing import NamedTuple

from gqa_jax.costs import Shape
from gqa_jax.search.own_model import PUBLIC


class Model(NamedTuple):
    shape: Shape
    untied: bool  # whether the unembedding is a matrix of its own
    source: str


def _model(
    layers: int, d: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, vocabulary: int, untied: bool, source: str
):
    return Model(Shape(layers, d, heads, kv_heads, head_dim, d_ff, vocabulary), untied, source)


_OF_THE_TABLE = ("llama-7b", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b")

MODELS = {name: Model(PUBLIC[name].shape, PUBLIC[name].untied, PUBLIC[name].source) for name in _OF_THE_TABLE} | {
    "mistral-7b": _model(32, 4096, 32, 8, 128, 14336, 32000, True, "arXiv 2310.06825, Table 1"),
    "gemma-2b": _model(18, 2048, 8, 1, 256, 16384, 256128, False, "arXiv 2403.08295, Table 1"),
    "gemma-7b": _model(28, 3072, 16, 16, 256, 24576, 256128, False, "arXiv 2403.08295, Table 1"),
    "qwen3-8b": _model(36, 4096, 32, 8, 128, 12288, 151936, True, "arXiv 2505.09388, Table 1; config.json of Qwen3-8B"),
    "qwen3-32b": _model(64, 5120, 64, 8, 128, 25600, 151936, True, "arXiv 2505.09388, Table 1; config.json of Qwen3-32B"),
}
