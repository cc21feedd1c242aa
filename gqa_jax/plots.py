"""Pictures of laws and costs, in one style; readable in black and white. Imports no jax.

Every function draws on the axes it is given, or makes its own figure, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gqa_jax import costs, optimum
from gqa_jax.laws import Heads, PowerLaw

# Okabe and Ito's colours (safe for colour-blind readers); marker and line style tell the curves apart without colour.
_STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1, 1, 1))),
    ("#56B4E9", "P", (0, (3, 1))),
    ("#000000", "X", (0, (1, 1))),
]

_COST_LABELS = {
    "m_infer": "inference memory, {unit}",
    "c_infer": "inference compute, FLOPs",
    "z": "hardware-aware cost Z",
}


def loss_vs_params(laws: Mapping[Heads, PowerLaw], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Measured losses and fitted laws against the parameters without embeddings, one curve per head configuration."""
    ax = ax or _axes()
    for (heads, law), (color, marker, line) in zip(laws.items(), _styles(len(laws)), strict=True):
        grid = np.geomspace(law.params.min() / 1.15, law.params.max() * 1.15, 100)
        ax.plot(grid, law.predict(grid), color=color, linestyle=line, linewidth=1.4)
        label = f"{heads}  R² = {law.r_squared:.4f}"
        ax.plot(law.params, law.loss, color=color, marker=marker, linestyle="none", label=label)
    _decorate(ax, "parameters without embeddings, N", title)
    return ax


def loss_vs_cost(
    table: pd.DataFrame,
    laws: Mapping[Heads, PowerLaw],
    context_served: int,
    *,
    cost: str = "z",
    convention: str = "figures",
    aspect: Callable[[float], float] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Loss against a cost of serving at `context_served`, as the paper's Figure 2.

    Loss is fitted in N; each point and each point of the curve is then moved along x to its cost at that context.

    Args:
      table: loss table of one training context (`gqa_jax.load_results`).
      cost: "z", "flops" or "memory".
      aspect: aspect ratio of the shapes along the curve; default: between those in `table`.
    """
    ax = ax or _axes()
    column = optimum.COSTS[cost]
    aspect = aspect or table_aspect(table)
    for (heads, law), (color, marker, line) in zip(laws.items(), _styles(len(laws)), strict=True):
        rows = table[
            (table["n_heads"] == heads.n_heads) & (table["n_kv_heads"] == heads.n_kv_heads) & (table["status"] == "done")
        ]
        head_dim, vocab_size = float(rows["head_dim"].iloc[0]), float(rows["vocab_size"].iloc[0])
        x = [
            _cost(
                costs.Shape(
                    *map(float, row[["n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size"]])
                ),
                context_served,
                convention,
            )[column]
            for _, row in rows.iterrows()
        ]
        ax.plot(x, rows["loss"].astype(float), color=color, marker=marker, linestyle="none", label=str(heads))
        sizes = np.geomspace(law.params.min() / 1.15, law.params.max() * 1.15, 60)
        shapes = [
            optimum.shape_for(n, heads, aspect=aspect, head_dim=head_dim, vocab_size=vocab_size, convention=convention)
            for n in sizes
        ]
        curve = [_cost(shape, context_served, convention)[column] for shape in shapes]
        ax.plot(curve, law.predict(sizes), color=color, linestyle=line, linewidth=1.4)
    unit = costs.named_convention(convention).memory
    _decorate(
        ax, f"{_COST_LABELS[column].format(unit=unit)} at {context_label(context_served)} ({convention} convention)", title
    )
    return ax


def table_aspect(table: pd.DataFrame) -> Callable[[float], float]:
    """Aspect ratio d / L between the sizes of a loss table."""
    sizes = table.groupby("size")[["params_non_embedding", "n_layers", "d_model"]].mean()
    return optimum.aspect_of_sizes([tuple(map(float, row)) for row in sizes.to_numpy()])


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` as .png (150 dpi) and .svg, the same bytes for the same picture; returns both paths."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    figure.savefig(written[0], dpi=150, metadata={"Software": None})
    with mpl.rc_context({"svg.hashsalt": "gqa_jax"}):
        figure.savefig(written[1], metadata={"Date": None})
    return written


def context_label(context: int) -> str:
    """8192 as "8K"."""
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context}"


def _axes() -> Axes:
    return Figure(figsize=(6.4, 4.4), layout="constrained").add_subplot()


def _styles(count: int) -> list[tuple]:
    return [_STYLES[i % len(_STYLES)] for i in range(count)]


def _cost(shape: costs.Shape, context: int, convention: str) -> dict[str, float]:
    flops, memory = costs.infer_flops(shape, context, convention), costs.infer_memory(shape, context, convention)
    return {"c_infer": flops, "m_infer": memory, "z": costs.hardware_aware_cost(memory, flops)}


def _decorate(ax: Axes, xlabel: str, title: str) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    decades = np.log10(high / low)
    ax.xaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(xlabel)
    ax.set_ylabel("held-out loss, nats per token")
    ax.grid(True, which="major", linewidth=0.4, color="0.85")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="(query, key/value) heads", frameon=False, fontsize="small", title_fontsize="small")
    if title:
        ax.set_title(title, fontsize="medium", loc="left")


def _short(value: float) -> str:
    for unit, symbol in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{symbol}"
    return f"{value:g}"
