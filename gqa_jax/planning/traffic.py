"""Bytes that the kernels of a training step move on a GPU beside products and attention, as compiled programs have them.

XLA fuses norms, rotations, SwiGLU and their gradients into kernels of their own, and a scan over layers writes what the
backward pass needs into stacked arrays and reads it back. What each moves is linear in the counts of `counts`; the coefficients
are fitted to the optimized HLO of compiled steps, by policy and pass (`python -m benchmarks.static_cost --fit`;
benchmarks/results/static_cost.json has the programs, their versions, and which of them the fit has not seen).
"""

from __future__ import annotations

from typing import NamedTuple

from gqa_jax.planning.share import Share


class Traffic(NamedTuple):
    """Times that the kernels of one pass read or write a value of `counts`, in bytes."""

    ffn: float  # in the feed-forward network, of a token: values of F
    ffn_weights: float  # its matrices, for each micro-batch
    queries: float  # in attention, of a token: values of the query heads
    keys: float  # and of the key heads
    attention_weights: float
    stream: float  # elsewhere, of a token and layer: values of d
    ends: float  # of a token: values of d, before and behind the layers
    weights: float  # matrices of all layers, for each micro-batch
    embedding: float
    kept: float  # bytes that are kept for the backward pass
    kept_again: float  # the same, where there are several micro-batches
    stacked_weights: float


#: Where a kernel is, by the scope of its source, and what its bytes are linear in.
SCOPES = {
    "ffn": ("ffn", "ffn_weights"),
    "attention": ("queries", "keys", "attention_weights"),
    "layers": ("stream", "ends", "weights", "embedding"),
    "stacking": ("kept", "kept_again", "stacked_weights"),
}


def counts(s: Share) -> dict[str, float]:
    """What a `Traffic` multiplies, of a step: bytes of activations, values of weights, bytes kept."""
    steps, a = s.execution.accumulation_steps, s.activation
    tokens, micro_batches = steps * s.tokens * s.layers * a, steps * s.layers
    return {
        "ffn": tokens * s.f,
        "ffn_weights": micro_batches * 3 * s.d * s.f,
        "queries": tokens * s.n * s.h,
        "keys": tokens * s.k * s.h,
        "attention_weights": micro_batches * 2 * s.d * s.h * (s.n + s.k_held),
        "stream": tokens * s.d,
        "ends": steps * s.tokens * a * s.d,
        "weights": micro_batches * s.layer_weights,
        "embedding": steps * s.embedding,
        "kept": steps * s.kept,
        "kept_again": steps * s.kept if steps > 1 else 0.0,
        "stacked_weights": micro_batches * s.layer_weights,
    }


# fmt: off
#: By policy, (forward, backward), in the order of the fields of `Traffic`.
TRAFFIC: dict[str, tuple[Traffic, Traffic]] = {
    "none": (
        Traffic( 3.1,  1.38, 1.83, 4.95, 4.63, 9.31, 17.6, 3.83,    0,   2.84,  0.77, 7.85),
        Traffic(9.18, 0.262,  0.1, 18.8, 1.98,   16, 69.4,    0,  132,  0.441,     0, 2.19),
    ),
    "dots": (
        Traffic(   3,  3.07, 1.98, 2.81, 9.73, 9.23, 3.02, 3.15,    0,      3, 0.592, 6.78),
        Traffic( 6.2,   3.3, 5.67, 8.39,  5.7, 17.3, 28.9, 15.9,    0, 0.0373,     0,    0),
    ),
    "attention_only": (
        Traffic(2.98,  5.45, 2.05, 1.66, 14.7, 6.76, 19.5, 6.78,    0,   3.13,     0, 6.45),
        Traffic(10.2,  2.85, 2.48, 18.9,    0, 20.2, 45.7, 22.6,    0,  0.385, 0.889, 2.95),
    ),
    "full": (
        Traffic(3.01,  2.51, 1.97, 2.15, 15.8, 7.32,  1.6,    0, 18.8,    3.1,     0, 8.39),
        Traffic(10.2,  5.93, 5.72, 6.64, 24.1, 22.1, 25.6, 28.4,    0, 0.0724, 0.173,    0),
    ),
    "offload": (
        Traffic(3.01,  3.58, 2.07, 1.71, 12.7, 6.34,   16,    0,  120,   3.05,     0,  6.1),
        Traffic(10.2,  4.67, 2.02, 21.1, 15.2, 20.8, 43.2, 26.3,    0,   2.02, 0.182, 1.83),
    ),
}
# fmt: on
LOSS = 18.5  # bytes of a logit beside products: read four times in float32, its gradient written in bfloat16, and rows' sums
#: Of a value that is summed over micro-batches: read twice, written once, in float32.
ACCUMULATION = 12.0
OPTIMIZER = 32.0  # of a parameter: AdamW, its gradient twice, and the norm


def moved(s: Share) -> dict[str, float]:
    """Bytes of a step by phase: forward, backward, loss, accumulation, optimizer."""
    of = counts(s)
    forward, backward = TRAFFIC[s.execution.remat]
    steps = s.execution.accumulation_steps
    return {
        "forward": sum(of[name] * value for name, value in forward._asdict().items()),
        "backward": sum(of[name] * value for name, value in backward._asdict().items()),
        "loss": LOSS * steps * s.tokens / s.execution.mesh.tensor * s.config.model.vocab_size,
        "accumulation": ACCUMULATION * steps * (s.parameters - s.embedding_held) if steps > 1 else 0.0,
        "optimizer": OPTIMIZER * s.parameters,
    }
