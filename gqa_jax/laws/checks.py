"""Runs that can't be what their columns say: losses in other units, counts in millions, heads that no model has."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gqa_jax import costs

CLOSE = 1.05  # factor within which N is the count of the shape, in some convention
FEWEST = 1e4  # parameters: no language model of use is smaller, so an N below it is in thousands, millions or billions
#: nats per token. Finished models of several sizes are below it: even 6.5 is a perplexity of 665.
HIGHEST = 6.5
CONVENTIONS = ("paper", "exact", "figures")  # of `shape_counts`
EXACT = CONVENTIONS.index("exact")
UNITS = {1e3: "thousands", 1e6: "millions", 1e9: "billions"}


def require(rows: pd.DataFrame, strict: bool = False) -> None:
    """Raises ValueError for losses or N in other units; each error names the run, what is allowed and the fix.

    strict: of somebody else's table, where a column may hold anything: also for heads that no model has, and an N that is not
    that of the shape.
    """
    if strict:
        heads(rows)
    losses(rows)
    counts(rows, strict)


def heads(rows: pd.DataFrame) -> None:
    """n_heads (empty where they follow the width) must be a multiple of n_kv_heads, both above 0."""
    n_heads, n_kv = column(rows, "n_heads"), column(rows, "n_kv_heads")
    for name, values in (("n_heads", n_heads), ("n_kv_heads", n_kv)):
        known = np.isfinite(values) & (np.isfinite(n_heads) | (name == "n_heads"))  # rules may say n_kv in other words
        _refuse(rows, known & ((values < 1) | (values != np.round(values))), name, "must be a whole number of 1 or more")
    with np.errstate(invalid="ignore"):
        _refuse(rows, n_kv > n_heads, "n_kv_heads", "more than n_heads: query heads share key/value heads, not the reverse")
        _refuse(rows, np.isfinite(n_heads) & (n_kv >= 1) & (n_heads % n_kv != 0), "n_kv_heads", "must divide n_heads")


def losses(rows: pd.DataFrame) -> None:
    """Losses in nats per token lie above 0, and below ln V, which a model has that knows nothing."""
    loss = column(rows, "loss")
    if (loss <= 0).any():
        raise ValueError(f"a loss of {loss.min():g} nats per token can't be: losses are above 0")
    vocab = column(rows, "vocab_size")
    if len(known := loss[np.isfinite(loss) & (loss > np.log(vocab))]):
        most = np.log(vocab[np.isfinite(vocab)].max())
        raise ValueError(
            f"{len(known)} of {len(loss)} losses are above ln(vocab_size) = {most:.3f}, which a model has that knows nothing, "
            f"like {known.max():g}. {in_other_units(float(np.median(known)))}; a run that did "
            "not learn is no point of a law: set its status to diverged"
        )


def in_other_units(loss: float) -> str:
    """The question to somebody whose losses are too high for nats per token."""
    return (
        f'Are they perplexities, exp(loss)? Then take ln: ln({loss:.4g}) = {np.log(loss):.3f} (units="perplexity", --units '
        f'perplexity). Or bits per token? Then times ln 2: {loss * np.log(2):.3f} (units="bits", --units bits)'
    )


def counts(rows: pd.DataFrame, strict: bool = False) -> None:
    """N must be a number of parameters, not of millions; strict: of its shape, without embeddings, within 5%."""
    params = column(rows, "params_non_embedding")
    if not (params > 0).all():
        raise ValueError("params_non_embedding must be above 0 in every row: the parameters without embeddings")
    expected = shape_counts(rows)
    known = np.isfinite(expected).all(0)
    if not known.any():
        if params.max() < FEWEST:
            raise ValueError(
                f"params_non_embedding is at most {params.max():g}: is it in millions, or billions? Give the number of "
                "parameters"
            )
        return
    ratio = np.where(known, params / expected, 1.0)
    nearest = ratio[np.argmin(np.abs(np.log(ratio)), axis=0), np.arange(len(params))]
    wrong = np.abs(np.log(nearest)) > np.log(CLOSE)
    if not wrong.any():
        return
    i = int(np.argmax(np.abs(np.log(nearest))))
    factor = nearest[i]
    unit = next((unit for unit in UNITS if np.abs(np.log(ratio[:, i] * unit)).min() <= np.log(CLOSE)), None)
    said = f"params_non_embedding = {params[i]:g} where the shape of {_name(rows, i)} has {expected[-1, i]:.4g}"
    if unit is not None:
        raise ValueError(f"{said}: it is in {UNITS[unit]}; multiply it by {unit:g}")
    if not strict:
        return
    with_embeddings = expected[-1, i] + column(rows, "d_model")[i] * np.array([1, 2]) * column(rows, "vocab_size")[i]
    if np.any(np.abs(np.log(params[i] / with_embeddings)) <= np.log(CLOSE)):
        raise ValueError(f"{said}: it counts embeddings; N of the laws is without them, subtract d_model x vocab_size")
    raise ValueError(
        f"{said}, {factor:.3g} times: give the parameters without embeddings, d_ff where it is not 8 d / 3, or leave n_layers "
        f"and d_model out ({int(wrong.sum())} of {len(rows)} rows differ by more than 5%)"
    )


def shape_counts(rows: pd.DataFrame) -> np.ndarray:
    """Parameters without embeddings by the shapes of rows, (conventions, rows), the plainest last; nan where one is not known.

    Feed-forward layers with two matrices and with three, with and without norms; d_ff is 8 d / 3 where it is not known.
    """
    layers, d, n_heads, n_kv = (column(rows, name) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads"))
    head_dim, d_ff = column(rows, "head_dim"), column(rows, "d_ff")
    follows = np.isnan(n_heads)
    n_heads = np.where(follows, d / head_dim, n_heads)
    n_kv = np.where(follows & (n_kv < 0), n_heads / -n_kv, n_kv)
    values = (layers, d, n_heads, n_kv, head_dim, np.where(np.isnan(d_ff), 8 * d / 3, d_ff))
    known = np.all([np.isfinite(value) & (value > 0) for value in values], axis=0)
    shape = costs.Shape(*(np.where(known, value, 1.0) for value in values))
    rules = [costs.CONVENTIONS[name] for name in CONVENTIONS]
    return np.where(known, [costs.count_params(shape, rule).non_embedding for rule in rules], np.nan)


def column(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64; nan where it is empty or not there."""
    return rows[name].to_numpy(np.float64, na_value=np.nan) if name in rows else np.full(len(rows), np.nan)


def _refuse(rows: pd.DataFrame, bad: np.ndarray, name: str, why: str) -> None:
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"{name} = {rows[name].iloc[i]} of {_name(rows, i)}: {why} ({int(bad.sum())} of {len(rows)} rows)")


def _name(rows: pd.DataFrame, i: int) -> str:
    """A run, by what a person finds it by."""
    row = rows.iloc[i]
    if "cell" in rows and pd.notna(row["cell"]):
        return f"run {row['cell']}"
    shape = f", {row['n_layers']} layers of {row['d_model']}" if {"n_layers", "d_model"} <= {*rows.columns} else ""
    return f"heads ({'d/d_h' if pd.isna(row['n_heads']) else row['n_heads']},{row['n_kv_heads']}), N = " + (
        f"{row['params_non_embedding']:g}{shape}"
    )
