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
            ffn=3.18,
            ffn_weights=0.0,
            queries=1.66,
            keys=6.33,
            attention_weights=2.83,
            stream=7.21,
            ends=28.8,
            weights=6.78,
            embedding=0.0,
            kept=2.84,
            kept_again=0.821,
            stacked_weights=0.707,
        ),
        Traffic(
            ffn=9.0,
            ffn_weights=0.000636,
            queries=0.439,
            keys=16.3,
            attention_weights=1.89,
            stream=24.8,
            ends=35.9,
            weights=5.51,
            embedding=0.0,
            kept=0.479,
            kept_again=0.0,
            stacked_weights=0.0,
        ),
    ),
    "dots": (
        Traffic(
            ffn=3.03,
            ffn_weights=1.65,
            queries=2.01,
            keys=2.54,
            attention_weights=8.31,
            stream=9.19,
            ends=3.31,
            weights=2.57,
            embedding=0.0,
            kept=3.0,
            kept_again=0.432,
            stacked_weights=11.8,
        ),
        Traffic(
            ffn=6.03,
            ffn_weights=1.79,
            queries=6.23,
            keys=3.89,
            attention_weights=3.48,
            stream=21.1,
            ends=9.81,
            weights=2.49,
            embedding=0.0,
            kept=0.035,
            kept_again=0.0,
            stacked_weights=0.0,
        ),
    ),
    "attention_only": (
        Traffic(
            ffn=2.98,
            ffn_weights=5.11,
            queries=2.04,
            keys=1.48,
            attention_weights=15.6,
            stream=5.98,
            ends=24.3,
            weights=12.0,
            embedding=0.0,
            kept=1.94,
            kept_again=0.0,
            stacked_weights=10.4,
        ),
        Traffic(
            ffn=9.98,
            ffn_weights=5.28,
            queries=2.77,
            keys=16.0,
            attention_weights=0.0,
            stream=22.7,
            ends=32.3,
            weights=11.5,
            embedding=0.0,
            kept=0.551,
            kept_again=0.339,
            stacked_weights=0.0,
        ),
    ),
    "full": (
        Traffic(
            ffn=3.03,
            ffn_weights=0.223,
            queries=2.06,
            keys=1.66,
            attention_weights=11.0,
            stream=6.93,
            ends=1.7,
            weights=0.0,
            embedding=60.5,
            kept=2.78,
            kept_again=0.0,
            stacked_weights=21.3,
        ),
        Traffic(
            ffn=10.0,
            ffn_weights=0.245,
            queries=6.31,
            keys=3.09,
            attention_weights=10.4,
            stream=24.9,
            ends=7.6,
            weights=0.0,
            embedding=80.5,
            kept=0.11,
            kept_again=0.135,
            stacked_weights=0.0,
        ),
    ),
    "offload": (
        Traffic(
            ffn=3.0,
            ffn_weights=6.0,
            queries=2.05,
            keys=1.73,
            attention_weights=8.63,
            stream=6.12,
            ends=24.4,
            weights=3.3,
            embedding=0.0,
            kept=1.53,
            kept_again=0.0302,
            stacked_weights=5.19,
        ),
        Traffic(
            ffn=10.0,
            ffn_weights=6.0,
            queries=2.27,
            keys=19.2,
            attention_weights=11.2,
            stream=23.2,
            ends=30.4,
            weights=1.95,
            embedding=0.0,
            kept=1.03,
            kept_again=0.0,
            stacked_weights=5.86,
        ),
    ),
}
LOSS = 18.5  # bytes of a logit: five passes of float32 and one of bfloat16 less what products write and read
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
