"""Where FLOPs and memory go as the context and the model grow (Figures 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gqa_jax import costs, formatting
from gqa_jax.plots import cost_axes, labels, style

# In the order of the components of costs.ForwardFlops and costs.InferMemory, and as they are stacked from the bottom up.
_FLOPS = {
    "ffn": ("feed-forward", 0), "projections": ("attention projections", 1), "output": ("output embedding", 2),
    "attention": ("attention over the context", 3),
}  # fmt: skip
_MEMORY = {
    "ffn": ("feed-forward", 0), "attention": ("attention weights", 1), "embedding": ("embedding", 2), "norms": ("norms", 5),
    "cache": ("key/value cache", 3),
}  # fmt: skip
_VISIBLE = 0.5  # percent: of an area that is named


def flops_shares(
    shape: costs.HasShape | Sequence[costs.HasShape],
    context: int | Sequence[int],
    *,
    convention: str | costs.Convention = "exact",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Share of each component in the forward FLOPs of a token, against the context, or against the size.

    Args:
      shape: one shape for a picture against contexts, several for one against N.
      context: several contexts in tokens, or one.
    Raises:
      ValueError: an unknown convention, or not exactly one of the two has several values.
    """
    return _shares(costs.flops_shares, _FLOPS, "share of forward FLOPs (%)", shape, context, convention, title, ax)


def memory_shares(
    shape: costs.HasShape | Sequence[costs.HasShape],
    context: int | Sequence[int],
    *,
    convention: str | costs.Convention = "exact",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Share of each component in the memory that serving one sequence holds; arguments and errors as of `flops_shares`."""
    return _shares(costs.memory_shares, _MEMORY, "share of inference memory (%)", shape, context, convention, title, ax)


def _shares(
    shares: Any, parts: dict, ylabel: str, shape: Any, context: Any, convention: Any, title: str, ax: Axes | None
) -> Axes:
    shapes = list(shape) if isinstance(shape, Sequence) else [shape]
    contexts = sorted(context) if isinstance(context, Sequence | np.ndarray) else [context]
    if (len(shapes) > 1) == (len(contexts) > 1):
        raise ValueError(
            f"{len(shapes)} shapes and {len(contexts)} contexts: give one shape and several contexts, or several shapes and one"
        )
    ax = ax or style.new_axes()
    if len(contexts) > 1:
        x = np.geomspace(contexts[0], contexts[-1], 200)
        found = shares(shapes[0], x, convention)
        style.power_of_two_axis(ax.xaxis, contexts, formatting.context)
        xlabel = "context, $T$ (tokens)"
    else:
        sizes = [costs.count_params(shape, convention).non_embedding for shape in shapes]
        order = np.argsort(sizes)
        x = np.array(sizes, np.float64)[order]
        each = [shares(shapes[i], contexts[0], convention) for i in order]
        found = type(each[0])(*(np.array([getattr(one, name) for one in each], np.float64) for name in each[0]._fields))
        ax.set_xlim(x[0], x[-1])
        style.log_axis(ax.xaxis, text=formatting.short)
        xlabel = f"parameters without embeddings, $N$, at {formatting.context(contexts[0])}"
    below, areas = np.zeros(len(x)), []
    for name, (label, area) in parts.items():
        share = 100 * np.broadcast_to(getattr(found, name), x.shape)
        if not share.any():  # the convention does not count it
            continue
        color, hatch = style.AREAS[area]
        filled = ax.fill_between(
            x, below, below + share, facecolor=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, label=label
        )  # fmt: skip
        if share.max() > _VISIBLE:
            areas.append(filled)
        below = below + share
    ax.set(xlim=(x[0], x[-1]), ylim=(0, 100))
    labels.areas_legend(ax, areas[::-1])
    return style.finish(ax, xlabel, ylabel, title, cost_axes.counted(convention, "flops"))
