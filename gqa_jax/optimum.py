"""Cost-optimal heads: the three-step search of arXiv 2503.09579v2, Section 4.1. Imports no jax.

1. Fit L(N; H) for every head configuration H (`laws.py`). 2. Solve N*(H) for the loss that must be reached (Eq. 8).
3. Turn N* into a shape, evaluate the cost at the served context, take the cheapest H (Eq. 9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from gqa_jax import costs
from gqa_jax.laws import Heads, PowerLaw
from gqa_jax.shapes import LARGE_SHAPES, SIZES

COSTS = {"z": "z", "flops": "c_infer", "memory": "m_infer"}


def aspect_of_sizes(sizes: Sequence[tuple[float, float, float]]) -> Callable[[float], float]:
    """Aspect ratio d / L as a function of N: linear between known (N, L, d), constant outside them (Appendix B.1)."""
    known = sorted((n, d / layers) for n, layers, d in sizes)
    params, ratios = (np.array(column) for column in zip(*known, strict=True))
    return lambda n: float(np.interp(n, params, ratios))


def paper_aspect() -> Callable[[float], float]:
    """The paper's: Table 9 below 1.2B, Table 7 from there on, N counted as in its figures with MHA."""
    shapes = [(size.n_layers, size.d_model) for name, size in SIZES.items() if name != "1.2B"] + list(LARGE_SHAPES.values())
    return aspect_of_sizes([(12 * layers * d**2, layers, d) for layers, d in shapes])


def shape_for(
    n_params: float, heads: Heads, *, aspect: Callable[[float], float], head_dim: float, vocab_size: float, convention: str
) -> costs.Shape:
    """The real-valued shape with `n_params` parameters without embeddings: L by bisection, d = aspect * L (Appendix B.1)."""
    ratio = aspect(n_params)

    def shape(layers: float) -> costs.Shape:
        return costs.Shape(layers, ratio * layers, heads.n_heads, heads.n_kv_heads, head_dim, vocab_size=vocab_size)

    low, high = 1e-6, 1.0
    while costs.count_params(shape(high), convention).non_embedding < n_params:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if costs.count_params(shape(middle), convention).non_embedding < n_params:
            low = middle
        else:
            high = middle
    return shape((low + high) / 2)


def best_heads(
    laws: Mapping[Heads, PowerLaw],
    losses: Sequence[float],
    contexts_served: Sequence[int],
    *,
    convention: str = "figures",
    cost: str = "z",
    aspect: Callable[[float], float] | None = None,
    head_dim: float = 64,
    vocab_size: float = 50_304,
) -> pd.DataFrame:
    """Every H for every loss and served context, cheapest first.

    Columns: loss, context_served, n_heads, n_kv_heads, n_params (N*), n_layers, d_model (real-valued), c_infer, m_infer, z,
    rank (1: cheapest), and `note`: why a row has no numbers, or that N* lies outside the sizes that were trained.

    Raises ValueError for an unknown cost or convention.
    """
    if cost not in COSTS:
        raise ValueError(f"cost {cost!r} is unknown: use {', '.join(COSTS)}")
    costs.named_convention(convention)
    aspect = aspect or paper_aspect()
    rows = []
    for loss in losses:
        for heads, law in laws.items():
            row = {"loss": loss, **heads._asdict()}
            if loss <= law.entropy:
                rows += [
                    row | {"context_served": context, "note": f"not reached at any size: E = {law.entropy:.4f}"}
                    for context in contexts_served
                ]
                continue
            n_params = law.solve(loss)
            smallest, largest = law.params.min(), law.params.max()
            if not smallest <= n_params <= largest:
                factor = n_params / largest if n_params > largest else smallest / n_params
                row["note"] = (
                    f"extrapolated: N* is {factor:.2g}x {'above' if n_params > largest else 'below'} the trained sizes"
                )
            shape = shape_for(n_params, heads, aspect=aspect, head_dim=head_dim, vocab_size=vocab_size, convention=convention)
            row |= {"n_params": n_params, "n_layers": shape.n_layers, "d_model": shape.d_model}
            for context in contexts_served:
                flops, memory = costs.infer_flops(shape, context, convention), costs.infer_memory(shape, context, convention)
                rows.append(
                    row
                    | {"context_served": context, "c_infer": flops, "m_infer": memory}
                    | {"z": costs.hardware_aware_cost(memory, flops)}
                )
    columns = [
        "loss",
        "context_served",
        "n_heads",
        "n_kv_heads",
        "n_params",
        "n_layers",
        "d_model",
        "c_infer",
        "m_infer",
        "z",
        "note",
    ]
    table = pd.DataFrame(rows).reindex(columns=columns).astype({"note": "string"})
    table["rank"] = table.groupby(["loss", "context_served"])[COSTS[cost]].rank(method="first").astype("Int64")
    return table.sort_values(["loss", "context_served", "rank"], ascending=[False, True, True], ignore_index=True)
