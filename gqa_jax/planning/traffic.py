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


#: By policy, (forward, backward).
TRAFFIC: dict[str, tuple[Traffic, Traffic]] = {
    "none": (
        Traffic(
            ffn=3.1,
            ffn_weights=1.38,
            queries=1.83,
            keys=4.95,
            attention_weights=4.63,
            stream=9.31,
            ends=17.6,
            weights=3.83,
            embedding=0.0,
            kept=2.84,
            kept_again=0.77,
            stacked_weights=7.85,
        ),
        Traffic(
            ffn=9.18,
            ffn_weights=0.262,
            queries=0.1,
            keys=18.8,
            attention_weights=1.98,
            stream=16.0,
            ends=69.4,
            weights=0.0,
            embedding=132.0,
            kept=0.441,
            kept_again=0.0,
            stacked_weights=2.19,
        ),
    ),
    "dots": (
        Traffic(
            ffn=3.0,
            ffn_weights=3.07,
            queries=1.98,
            keys=2.81,
            attention_weights=9.73,
            stream=9.23,
            ends=3.02,
            weights=3.15,
            embedding=0.0,
            kept=3.0,
            kept_again=0.592,
            stacked_weights=6.78,
        ),
        Traffic(
            ffn=6.2,
            ffn_weights=3.3,
            queries=5.67,
            keys=8.39,
            attention_weights=5.7,
            stream=17.3,
            ends=28.9,
            weights=15.9,
            embedding=0.0,
            kept=0.0373,
            kept_again=0.0,
            stacked_weights=0.0,
        ),
    ),
    "attention_only": (
        Traffic(
            ffn=2.98,
            ffn_weights=5.45,
            queries=2.05,
            keys=1.66,
            attention_weights=14.7,
            stream=6.76,
            ends=19.5,
            weights=6.78,
            embedding=0.0,
            kept=3.13,
            kept_again=0.0,
            stacked_weights=6.45,
        ),
        Traffic(
            ffn=10.2,
            ffn_weights=2.85,
            queries=2.48,
            keys=18.9,
            attention_weights=0.0,
            stream=20.2,
            ends=45.7,
            weights=22.6,
            embedding=0.0,
            kept=0.385,
            kept_again=0.889,
            stacked_weights=2.95,
        ),
    ),
    "full": (
        Traffic(
            ffn=3.01,
            ffn_weights=2.51,
            queries=1.97,
            keys=2.15,
            attention_weights=15.8,
            stream=7.32,
            ends=1.6,
            weights=0.0,
            embedding=18.8,
            kept=3.1,
            kept_again=0.0,
            stacked_weights=8.39,
        ),
        Traffic(
            ffn=10.2,
            ffn_weights=5.93,
            queries=5.72,
            keys=6.64,
            attention_weights=24.1,
            stream=22.1,
            ends=25.6,
            weights=28.4,
            embedding=0.0,
            kept=0.0724,
            kept_again=0.173,
            stacked_weights=0.0,
        ),
    ),
    "offload": (
        Traffic(
            ffn=3.01,
            ffn_weights=3.58,
            queries=2.07,
            keys=1.71,
            attention_weights=12.7,
            stream=6.34,
            ends=16.0,
            weights=0.0,
            embedding=120.0,
            kept=3.05,
            kept_again=0.0,
            stacked_weights=6.1,
        ),
        Traffic(
            ffn=10.2,
            ffn_weights=4.67,
            queries=2.02,
            keys=21.1,
            attention_weights=15.2,
            stream=20.8,
            ends=43.2,
            weights=26.3,
            embedding=0.0,
            kept=2.02,
            kept_again=0.182,
            stacked_weights=1.83,
        ),
    ),
}
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
