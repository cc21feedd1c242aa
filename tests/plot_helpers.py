"""What the tests of pictures share: loss tables from known laws, and what is drawn on axes."""

import numpy as np
import pandas as pd

from gqa_jax import results


def table(rows):
    """A loss table; what is not given is empty."""
    defaults = {"status": "done", "head_dim": 64, "vocab_size": 50_304, "n_layers": 12, "d_model": 768, "d_ff": 2048}
    return results.typed(pd.DataFrame([defaults | row for row in rows]), results.LOSS_COLUMNS)


def curves(ax):
    """Fitted curves, in the order in which they were drawn."""
    return [line for line in ax.lines if line.get_label() == "_curve"]


def points(ax):
    """Measured points by their label."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def texts(ax):
    """Every text on the axes but ticks and labels."""
    return [text.get_text() for text in (*ax.texts, *(a for a in ax.artists if hasattr(a, "get_text")))]


def texts_of_ticks(axis):
    axis.figure.draw_without_rendering()
    return [tick.get_text() for tick in axis.get_ticklabels()]


def luma(color):
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(color), [0.299, 0.587, 0.114]))
