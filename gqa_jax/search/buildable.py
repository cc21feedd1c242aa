"""Models that can be built near an answer: whole layers, rounded widths, whole heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from gqa_jax import costs
from gqa_jax.laws.shape import Price
from gqa_jax.search.answer import Answer
from gqa_jax.search.candidates import LARGEST_BUILT, CostAt, Table, about
from gqa_jax.search.shape_rule import RATIOS

COLUMNS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_params", "ratio", "loss", "cost")
_SPARE = 1.001  # sizes between the ratios that are looked at are interpolated: to a thousandth
_ROUNDED = 1.25  # models to build have at most so many times a ratio that is given


def near(table: Table, answer: Answer, cost: CostAt) -> pd.DataFrame:
    """The cheapest models of whole layers and rounded widths near the answer that reach the loss; none that miss it.

    Of models that can be served those from which, within the bounds of d / L, neither a layer nor a step of width can be taken.
    A model reaches the loss where its typical loss, the median of the draws, is not above it.
    """
    head_dim, vocab_size, convention, ffn_ratio = about(table.laws)
    heads, n_params, ratio = answer.heads, answer.n_params, answer.ratio
    if not n_params <= LARGEST_BUILT:
        return pd.DataFrame(columns=list(COLUMNS))
    i = table.heads.index(heads)
    rule = table.rule
    bounds = rule.penalty.bounds
    if not rule.is_free:  # the ratio is given: some about it
        about_it = (ratio / _ROUNDED, ratio * _ROUNDED)
        bounds = about_it if rule.ratios_R is None else (max(bounds[0], about_it[0]), min(bounds[1], about_it[1]))
        penalty = rule.penalty if rule.aspect is None else dataclasses.replace(rule.penalty, by_size=rule.aspect)
        rule = dataclasses.replace(rule, penalty=penalty, aspect=None, ratios_R=np.geomspace(*bounds, RATIOS))
        table, i = table.alone(heads, rule), 0
    found_shapes = costs.buildable_shapes(
        n_params, heads, ratio, bounds, lambda r: _SPARE * table.needed(i, r), int(head_dim), int(vocab_size), convention,
        ffn_ratio, multiple=64 if n_params > 1e7 else 16,
    )  # fmt: skip
    if not found_shapes:
        return pd.DataFrame(columns=list(COLUMNS))
    names = [field.name for field in dataclasses.fields(costs.Shape) if field.name != "untied"]
    frame = pd.DataFrame([{name: getattr(one, name) for name in names} for one in found_shapes])
    several = costs.Shape(**{name: frame[name].to_numpy() for name in names})
    frame["n_params"] = np.asarray(costs.count_params(several, convention).non_embedding, np.float64)
    frame["ratio"] = frame["d_model"] / frame["n_layers"]
    frame["cost"] = cost(several)
    frame["loss"] = _loss_of(table, i, frame["n_params"].to_numpy(), frame["ratio"].to_numpy())
    frame = frame[np.isfinite(frame["cost"]) & (frame["loss"] <= table.loss)]  # each has the fewest layers of its width
    width, layers = frame["d_model"].to_numpy(), frame["n_layers"].to_numpy()
    narrower = (width < width[:, None]) & (layers <= layers[:, None]) & (width >= bounds[0] * layers[:, None])
    frame = frame[~narrower.any(1)].sort_values("cost", kind="stable")
    return frame.head(3)[list(COLUMNS)].reset_index(drop=True)


def _loss_of(table: Table, i: int, n_params: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Typical loss of the i-th heads at N and d / L: as far from `table.loss` as from what the draws ask for."""
    rule, heads = table.rule, table.heads[i]
    drawn = table.known.draws
    if drawn is None:
        return table.laws[heads].predict(n_params) * rule.penalty.factor(rule.penalty.typical, ratio, n_params)
    price = rule.penalty.draw(len(drawn.b_SxH), table.seed)
    factor_SxN = rule.penalty.factor(Price(price.k[:, None], price.best[:, None]), ratio, n_params)
    loss_SxN = drawn.loss(heads, n_params) * factor_SxN
    asked_S = table.loss if table.loss_S is None else table.loss_S[:, None]
    return table.loss + np.median(loss_SxN - asked_S, 0)
