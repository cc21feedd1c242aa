"""Findings of laws that are known: a grid of the paper's figures, without training."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, laws, shapes
from gqa_jax.laws import LLAMA3, Heads, bends
from gqa_jax.search import objectives, optimum
from launch.report import Findings, Study, answer_map

ENTROPY = 1.95
#: Loss above E at a billion parameters, and exponent.
LAWS = {
    Heads(8, 8): (0.7257, 0.1803),
    Heads(8, 4): (0.7319, 0.1770),
    Heads(8, 2): (0.7428, 0.1762),
    Heads(8, 1): (0.7517, 0.1748),
    Heads(4, 1): (0.7677, 0.1721),
    Heads(2, 1): (0.8052, 0.1656),
    Heads(1, 1): (0.8346, 0.1641),
    LLAMA3: (0.7050, 0.1790),
}
#: The 21 configurations of the paper's grid, between and beyond those of its figures.
GRID = {
    Heads(n_heads, n_kv): (
        0.8346 * n_heads**-0.0503 * n_kv**-0.0169,
        0.1641 + 0.00357 * np.log2(n_heads) + 0.00183 * np.log2(n_kv),
    )
    for n_heads, n_kv in shapes.head_configurations()
}
SIZES = ((4, 256), (6, 384), (8, 512), (12, 768), (16, 1024), (20, 1280), (24, 1536), (32, 2048))


def loss_table(
    known: dict[Heads, tuple[float, float]] = LAWS, noise: float = 0.002, seed: int = 0, context: int = 8192
) -> pd.DataFrame:
    """A run per size and H, as `gqa_jax.load_results` gives them."""
    generator = np.random.default_rng(seed)
    rows = []
    for (heads, (amplitude, b)), (layers, d) in itertools.product(known.items(), SIZES):
        shape = costs.Shape(layers, d, heads.query_heads(d, 64), heads.n_kv_heads)
        n = costs.count_params(shape, "figures").total
        loss = ENTROPY + amplitude * (n / 1e9) ** -b + noise * generator.normal()
        rows.append(
            {"cell": f"s{layers}-{heads}", "size": f"{layers}x{d}", "n_layers": layers, "d_model": d, "n_heads": heads.n_heads,
             "n_kv_heads": heads.n_kv_heads, "head_dim": 64, "vocab_size": 50_304, "context": context, "seed": 0,
             "status": "done", "params_non_embedding": round(n), "tokens": 20 * n, "loss": loss, "loss_sem": 0.002,
             "device": "TPU v5e", "jax": "0.11.2", "flax": "0.12.12", "commit": "0123456789abcdef", "attention": "pallas_tpu",
             "data_fingerprint": "fedcba", "seconds_train": 3600.0, "train_flops": 6.0 * 20 * n * n}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.astype({"n_heads": "Int64", "loss": "Float64", "loss_sem": "Float64"})


def bend(fitted: laws.LawsByHeads, seed: int = 0, count: int = 1000) -> None:
    """Gives the draws of these laws bends of both kinds, up and down and as large as laws that fall may have; a third none."""
    generator = np.random.default_rng(seed)
    drawn = fitted.draws(count)
    kind = np.resize([bends.NONE, bends.DRIFT, bends.BREAK], count)
    center, reach = float(np.exp(np.mean([np.log(law.params).mean() for law in fitted.values()]))), 2.5
    room = drawn.b_SxH.min(1) - 0.02  # what the exponents may lose
    amount = np.select(
        [kind == bends.DRIFT, kind == bends.BREAK],
        [generator.uniform(-1, 1, count) * room / (2 * reach), generator.uniform(-1, 2, count) * room],
    )
    bent = bends.Bends(center, reach, kind, amount, generator.uniform(-4, 4, count))
    assert bent.falls(drawn.b_SxH).all()
    fitted._draws[count, 0, fitted.method] = dataclasses.replace(drawn, bends=bent)


def study(
    table: pd.DataFrame,
    loss: float = 2.615,
    context: int = 131_072,
    objective: Any = None,
    more: bool = True,
    bent: bool = False,
    aspect: Any = None,
    options: dict[str, Any] | None = None,
    points: tuple[list[float], list[int]] | None = None,
    devices: tuple[str, ...] = ("h100", "v5e"),
) -> Study:
    """Laws of a loss table, and their answers: to one question, and where there is `more` to others and in all conventions too.

    bent: draws have the bends of `bend`, instead of those that the posterior gives them. points: losses and contexts of the map
    that the explorer reads; default: the question's and a few, with two `devices`, which takes a second.
    """
    fitted = laws.fit_by_heads(table)
    points = points or (sorted({2.5, 2.8, 3.0, loss}), sorted({8192, context}))
    if bent:
        bend(fitted)
    objective = objective or objectives.Z()
    answer = optimum.search(fitted, loss, context, objective, aspect=aspect)
    losses, contexts = [3.0, 2.8, 2.615, 2.5], [8192, 32_768, 131_072]
    return Study(
        fitted,
        answer,
        objective,
        answer_map.of(
            fitted,
            objective,
            points[0],
            points[1],
            aspect=aspect,
            options=options,
            devices=devices,
        ),
        optimum_map=optimum.optimum_map(fitted, losses, contexts, objective, aspect=aspect) if more else None,
        sensitivity=optimum.convention_sensitivity(fitted, loss, context, aspect=aspect) if more else None,
    )


def findings(*studies: Study, table: pd.DataFrame | None = None, **fields: Any) -> Findings:
    """A report of these studies, or of one of the known laws."""
    table = loss_table() if table is None else table
    given = {
        "name": "known laws",
        "about": "64 runs of 8 sizes and 8 head configurations",
        "made": "2026-11-21 18:00 UTC",
        "versions": {"gqa-jax": "0.1.0", "python": "3.12.1"},
    }
    return Findings(studies=studies or [study(table)], loss=table, **given | fields)
