"""The shape of a given number of parameters: real-valued for the search, and the closest that can be built.

Source: arXiv 2503.09579v2, Appendix B.1. `heads` is anything with `n_heads` and `n_kv_heads` (`gqa_jax.laws.Heads`); n_heads
None is the width's own number d / d_h (Llama-3's rule), real-valued where the width is; an n_kv_heads of -g is then n_h / g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gqa_jax import costs
from gqa_jax.shapes import FFN_RATIO, HEAD_DIM, VOCAB_SIZE, ffn_width

#: Of Newton's method. From where it starts 5 reach the last digits of float64, whatever the size, heads and aspect ratio.
NEWTON_STEPS = 6


class HasHeads(Protocol):
    n_heads: int | None
    n_kv_heads: int


def solve_shape(
    n_params: Any,
    heads: HasHeads | Sequence[HasHeads],
    aspect: Callable[[Any], Any],
    head_dim: float = HEAD_DIM,
    vocab_size: float = VOCAB_SIZE,
    convention: str | costs.Convention = "figures",
    ffn_ratio: float = FFN_RATIO,
) -> costs.Shape:
    """The real-valued shape with `n_params` parameters without embeddings and the aspect ratio r = d / L = aspect(N).

    With d = r L and d_ff = f d the count is a cubic in L,

        N = c3 L^3 + c2 L^2 + c1 L,   c3 = r^2 (f m + 2 u),   c2 = 2 r (d_h (n_h + n_kv) + s),   c1 = r s

    with f the `ffn_ratio`, m FFN matrices and s = 1 or 0 norms of the convention; where n_heads is None, u = 1 and n_h in c2 is
    0, else u = 0; where n_kv is n_h / g too, u = 1 + 1 / g, and n_kv in c2 is 0.
    It rises and is convex for L > 0, so Newton's method from a bound above falls to its only positive root and never beyond.

    Args:
      n_params: N, of any shape. Infinite where no size reaches a loss: so are then L and d. NaN gives NaN.
      heads: one configuration, or a sequence of them along the last axis of `n_params`.
      aspect: a `gqa_jax.shapes.Aspect`, or any function of arrays.

    Returns the shapes, whose fields broadcast to the shape of `n_params` (and `heads`). Raises ValueError for N <= 0.
    """
    n_params = np.asarray(n_params, np.float64)[()]
    if np.any(n_params <= 0):
        raise ValueError(f"n_params = {np.nanmin(n_params)}: a model has more than 0 parameters")
    rule = costs.named_convention(convention)
    if hasattr(heads, "n_heads"):
        own_heads, n_heads, n_kv_heads = heads.n_heads is None, heads.n_heads or 0, np.asarray(heads.n_kv_heads)[()]
    else:
        own_heads = np.array([one.n_heads is None for one in heads])
        n_heads = np.array([one.n_heads or 0 for one in heads])
        n_kv_heads = np.array([one.n_kv_heads for one in heads])
    grouped = n_kv_heads < 0
    share = np.where(grouped, 1.0 / np.where(grouped, -n_kv_heads, 1), 0.0)[()]  # n_kv / n_h of rules that fix it
    n_kv_heads = np.where(grouped, 0, n_kv_heads)[()]

    ratio = aspect(n_params)
    cubic = ratio**2 * (ffn_ratio * rule.ffn_matrices + 2 * own_heads * (1 + share))
    square = 2 * ratio * (head_dim * (n_heads + n_kv_heads) + rule.norms)
    linear = ratio * rule.norms
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # infinite and NaN sizes; no square term
        layers = np.minimum((n_params / cubic) ** (1 / 3), (n_params / square) ** (1 / 2))  # by one term: not below the root
        for _ in range(NEWTON_STEPS):
            slope = linear + 2 * square * layers + 3 * cubic * layers**2
            newton = (n_params + square * layers**2 + 2 * cubic * layers**3) / slope
            layers = np.fmin(layers, newton)  # rounding does not rise again; an infinite size, whose step is NaN, stays so
        d_model = ratio * layers
        if np.any(own_heads):
            n_heads = np.where(own_heads, d_model / head_dim, n_heads)[()]
        if np.any(grouped):
            n_kv_heads = np.where(grouped, n_heads * share, n_kv_heads)[()]
    d_ff = None if ffn_ratio == FFN_RATIO else ffn_ratio * d_model
    return costs.Shape(layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size)


def reaching(
    n_params: float,
    heads: HasHeads,
    ratio: float,
    bounds: tuple[float, float],
    needed: Callable[[Any], Any],
    head_dim: int = HEAD_DIM,
    vocab_size: int = VOCAB_SIZE,
    convention: str | costs.Convention = "figures",
    ffn_ratio: float = FFN_RATIO,
    *,
    multiple: int = 64,
) -> list[costs.Shape]:
    """Integer shapes that have as many parameters as their aspect ratio needs: for every width the fewest layers.

    Args:
      n_params, ratio: of the real-valued model that they are to be close to; widths from 2/3 to 3/2 of its are tried.
      bounds: least and largest d / L.
      needed: N without embeddings as a function of d / L that a model must have, or more.
      multiple: of hidden sizes, and where n_heads is None of n_kv d_h (of a rule with groups g d_h) too.

    Feed-forward widths are those that are trained (`gqa_jax.shapes.ffn_width`). No shape within the bounds: an empty list.

    Raises ValueError: an N that is not a positive number, or n_kv that does not divide n_h.
    """
    if not 0 < n_params < math.inf:
        raise ValueError(f"n_params = {n_params}: only a finite number of parameters above 0 can be built")
    if heads.n_heads is not None and heads.n_heads % heads.n_kv_heads:
        raise ValueError(f"n_kv_heads = {heads.n_kv_heads} must divide n_heads = {heads.n_heads}")
    real = solve_shape(n_params, heads, lambda _: ratio, head_dim, vocab_size, convention, ffn_ratio)
    unit = multiple if heads.n_heads is not None else math.lcm(multiple, head_dim * abs(heads.n_kv_heads))
    found = []
    for width in range(max(1, int(real.d_model / 1.5 / unit)), int(1.5 * real.d_model / unit) + 2):
        d_model = unit * width
        fewest, most = max(1, math.ceil(d_model / bounds[1])), math.floor(d_model / bounds[0])
        if most < fewest:
            continue
        layers = np.arange(fewest, most + 1)
        sizes = costs.count_params(_integer_shape(layers, d_model, heads, head_dim, vocab_size, ffn_ratio), convention)
        enough = layers[sizes.non_embedding >= needed(d_model / layers)]
        if len(enough):
            found.append(_integer_shape(int(enough[0]), d_model, heads, head_dim, vocab_size, ffn_ratio))
    return found


def _integer_shape(
    layers: Any, d_model: int, heads: HasHeads, head_dim: int, vocab_size: int, ffn_ratio: float = FFN_RATIO
) -> costs.Shape:
    n_heads = d_model // head_dim if heads.n_heads is None else heads.n_heads
    n_kv_heads = heads.n_kv_heads if heads.n_kv_heads > 0 else n_heads // -heads.n_kv_heads
    return costs.Shape(layers, d_model, n_heads, n_kv_heads, head_dim, ffn_width(d_model, ffn_ratio), vocab_size)
