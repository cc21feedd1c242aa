"""Laws that need no training: the paper's own data.

`paper`: fitted to the 45 losses that can be read off Figures 1 and 2 of arXiv 2503.09579v2: 7 head configurations, and
Llama 3's rule. `paper-table4`: 21 head configurations, calibrated on those and on the paper's Table 4. `data/presets/README.md`
has where the numbers come from.
"""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np
import pandas as pd

from gqa_jax.errors import closest
from gqa_jax.laws import LLAMA3, Heads, LawsByHeads, fit_by_heads
from gqa_jax.laws.block import fit_block
from gqa_jax.laws.runs import Runs
from gqa_jax.shapes import Aspect

CONTEXT = 8192  # tokens that the paper's models of step 2 were trained at (Section 4.1)
#: Standard deviation of a loss that is read off a figure; what `paper`'s own residuals are (0.0045, 28 degrees of freedom).
READING_ERROR = 0.0045

_FOLDER = resources.files("gqa_jax") / "data" / "presets"


def paper_losses() -> pd.DataFrame:
    """The losses of Figures 1 and 2 as a loss table, one row per model; n_heads is empty for Llama 3's rule, d / 64."""
    with (_FOLDER / "paper_losses.csv").open() as file:
        table = pd.read_csv(file, dtype={"n_heads": "Int64"})
    size = table["n_layers"].astype(str) + "x" + table["d_model"].astype(str)
    return table.assign(size=size, status="done", context=CONTEXT, head_dim=64, vocab_size=50_304)


def overtraining() -> pd.DataFrame:
    """The 104 runs of arXiv 2403.08540 (Gadre et al.), 11M to 6.9B parameters: losses on C4's validation text, other people's.

    Columns: run, data (c4, redpajama, refinedweb), params_total, params_non_embedding, tokens, chinchilla_multiplier (tokens
    over 20 per parameter, embeddings included), loss (nats per token).
    """
    with (_FOLDER / "overtraining.csv").open() as file:
        return pd.read_csv(file)


def paper() -> LawsByHeads:
    """L(N; H) of `paper_losses`, one E for all; d / L = 64, that of the models whose losses are known."""
    laws = fit_by_heads(paper_losses())
    laws.source = (
        "preset paper: fitted to 45 losses read off Figures 1 and 2 of arXiv 2503.09579 (error about 0.003), models of 0.07B "
        "to 1.4B parameters; no run of yours"
    )
    return laws


def paper_table4() -> LawsByHeads:
    """The 21 calibrated laws; d / L = 64, with which they give 33 of the 40 cells of Table 4, the others within 0.7% of Z.

    Their draws say what reading errors of the six sizes of Figure 2 would do (bootstrap: curves calibrated together are not
    pooled again); errors of the calibration are not in them.
    """
    with (_FOLDER / "paper_table4.csv").open() as file:
        table = pd.read_csv(file)
    widths = np.array([768, 1024, 1280, 1536, 1792, 2048])  # of Figure 2, d / L = 64
    groups = {}
    for row in table.itertuples():
        params = widths / 64 * (8 * widths**2 + 128 * widths * (row.n_heads + row.n_kv_heads))
        loss = row.entropy + row.above_at_1e9 * (params / 1e9) ** -row.b
        groups[Heads(row.n_heads, row.n_kv_heads)] = Runs(
            params, loss, np.full(6, np.nan), widths.astype(np.float64), np.arange(6)
        )
    curves = table.set_index(["n_heads", "n_kv_heads"])
    return LawsByHeads(
        [fit_block(groups, known_sigma=READING_ERROR)],
        context=CONTEXT,
        head_dim=64,
        vocab_size=50_304,
        aspect=Aspect.constant(64),
        method="bootstrap",
        llama3=_between_heads(curves.xs(LLAMA3.n_kv_heads, level="n_kv_heads"), widths),
        llama3_source="losses between the curves of (8,8), (16,8) and (32,8)",
        source=(
            "preset paper-table4: calibrated on the paper's Table 4 and Figures 1 and 2; it repeats that table (33 of 40 "
            "cells) and is no evidence for it; no run of yours"
        ),
    )


def _between_heads(curves: pd.DataFrame, widths: np.ndarray) -> Runs:
    """Losses of models with d / 64 query heads: ln(L - E) linear in ln n_h between curves of one n_kv."""
    n_heads = widths / 64
    params = widths / 64 * (8 * widths**2 + 128 * widths * (n_heads + LLAMA3.n_kv_heads))
    log_above = np.log(curves["above_at_1e9"].to_numpy()[:, None]) - np.outer(curves["b"], np.log(params / 1e9))
    at = [np.interp(np.log(n), np.log(curves.index), column) for n, column in zip(n_heads, log_above.T, strict=True)]
    loss = curves["entropy"].iloc[0] + np.exp(at)
    return Runs(params, loss, np.full(len(widths), np.nan), widths.astype(np.float64), np.arange(len(widths)))


PRESETS = {"paper": paper, "paper-table4": paper_table4}


@functools.cache
def load(name: str) -> LawsByHeads:
    """The laws of a preset. Raises ValueError for an unknown name, with those there are."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: {closest(name, PRESETS)} (there are {', '.join(PRESETS)})")
    return PRESETS[name]()
