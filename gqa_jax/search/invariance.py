"""Does a difference between models depend on the context length? (arXiv 2503.09579v2, Section 5.7, Figures 5 and 6.)

(L(T) - L_base(T)) / L_base(T), of head configurations at one size or of sizes with one head configuration, against T. The paper
finds it flat beyond T = 8K, within 1 percent: laws fitted at a moderate T then hold for a long one. Here that is a test: a
slope per doubling of T with its interval, and a sentence. That no slope is seen is not that there is none: "flat" takes an
interval that leaves no room for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws import runs as run_table
from gqa_jax.laws.heads import Heads

FROM_CONTEXT = 8192
TOLERANCE = 0.01  # of the loss: the paper's "below 1%"
MIN_CONTEXTS = 3


@dataclass(frozen=True)
class Invariance:
    """Relative differences to a baseline against T, and whether they are flat. Made by `context_invariance`.

    Attributes:
      baseline: name of the heads or of the size that all are compared with.
      differences: a row per model and T, also below `from_context`: model, context, loss, baseline_loss, difference (relative),
        standard_error (of difference: `context_invariance` says from what; else the noise of the test).
      tests: a row per model: model, contexts (number of, from `from_context` on), mean (difference), slope (per doubling of T),
        slope_low, slope_high, p_value (of no slope), p_adjusted (Holm's, for all models), change (slope times the doublings
        that were trained), change_low, change_high, largest_deviation (from the mean), verdict ("flat", "not flat", "open").
      noise: standard deviation of a difference about its line; dof: degrees of freedom that it is known from.
      verdict: one sentence for all.
      warnings: what was left out.
    """

    baseline: str
    from_context: int
    tolerance: float
    level: float
    differences: pd.DataFrame
    tests: pd.DataFrame
    noise: float
    dof: float
    verdict: str
    warnings: tuple[str, ...]


def context_invariance(
    table: pd.DataFrame,
    baseline: tuple | str,
    *,
    differences: pd.DataFrame | None = None,
    from_context: int = FROM_CONTEXT,
    tolerance: float = TOLERANCE,
    level: float = 0.95,
) -> Invariance:
    """Tests whether differences to a baseline are flat in T from `from_context` on.

    A line in log2 T is fitted to the differences of each model by least squares. Its noise is the scatter about all lines, one
    number: m models of k contexts have m (k - 2) degrees of freedom, but share the noise of the baseline, so their residuals
    correlate by 1/2 and are worth 4 / (m + 3) of that (Satterthwaite's rule); intervals and p values are Student's t.

    "flat": the interval of the change over the contexts that were trained, and every deviation from the mean, lie within the
    tolerance. "not flat": not so, and the slope is not 0 (Holm's p below 1 - level). "open": the data do not say.

    Standard errors of differences: two runs of the same held-out text (column heldout) are off by what they have in common, so
    theirs is the error of the difference paired by documents, with the spread of seeds where there are. Where runs do not say
    on which text they were evaluated, it is that of both losses (`loss_sem`, or the spread of seeds) as if independent.

    Args:
      table: loss table (`gqa_jax.load_results`) of several contexts: n_heads, n_kv_heads, params_non_embedding, loss, status,
        context, and size (or n_layers and d_model). Seeds are averaged.
      differences: of the runs of `pairs`, paired by documents (`gqa_jax.differences.load_differences`): cell, other,
        standard_error.
      baseline: heads, such as (8, 8): other heads are compared with them at the same size, of which the table has one; or the
        name of a size: other sizes are compared with it at the same heads, of which the table has one.
      from_context: least T, tokens, that is tested.
      tolerance: relative change of the loss that is as good as none.

    Raises:
      ValueError: a baseline that is not there, several sizes (or heads), or no model with three contexts from `from_context` on
        that the baseline has, too.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: a share between 0 and 1, such as 0.95")
    if not tolerance > 0:
        raise ValueError(f"tolerance = {tolerance}: a relative difference above 0, such as 0.01")
    rows, name, compared, said = _chosen(table, baseline)
    shared = run_table.shared_sem(rows) is not None
    losses = _averaged(rows, compared, shared)
    base = losses[losses["model"] == name].set_index("context")
    others = losses[losses["model"] != name]
    if others.empty:
        raise ValueError(f"nothing to compare with {name}: no other model has a finished run")
    if (lonely := ~others["context"].isin(base.index)).any():
        missing = ", ".join(f"{c:,}" for c in sorted(others["context"][lonely].unique()))
        said.append(f"{int(lonely.sum())} losses left out: the baseline {name} has none at T = {missing}")
    found = _differences(others[~lonely], base)
    if shared:
        _pair(found, others[~lonely], base, differences, said)
    tests, noise, dof = _tests(found, name, from_context, tolerance, level, said)
    found["standard_error"] = found["standard_error"].fillna(noise)
    verdict = _verdict(tests, name, from_context, tolerance, level)
    return Invariance(name, from_context, tolerance, level, found, tests, noise, dof, verdict, tuple(said))


def pairs(table: pd.DataFrame, baseline: tuple | str) -> list[tuple[str, str]]:
    """Names (cell, other) of the runs whose differences `context_invariance` looks at, `other` of the baseline.

    Arguments and errors as there; none where the table has no column cell.
    """
    rows, name, compared, _ = _chosen(table, baseline)
    if "cell" not in rows:
        return []
    base = rows[rows[compared] == name]
    return [
        (cell, other)
        for cell, context in rows.loc[rows[compared] != name, ["cell", "context"]].itertuples(index=False)
        for other in base.loc[base["context"] == context, "cell"]
    ]


def _chosen(table: pd.DataFrame, baseline: tuple | str) -> tuple[pd.DataFrame, str, str, list[str]]:
    """The runs, the name of the baseline, the column that it is a value of, and what was left out."""
    rows, said = run_table.usable_by_context(table)
    of_heads = not isinstance(baseline, str)
    name = str(Heads(*baseline)) if of_heads else baseline
    rows = rows.assign(heads=rows["heads"].map(str))
    compared, same = ("heads", "size_name") if of_heads else ("size_name", "heads")
    if name not in set(rows[compared]):
        raise ValueError(f"baseline {name} has no finished run: there are {', '.join(_in_order(rows, compared))}")
    if len(several := _in_order(rows, same)) > 1:
        raise ValueError(f"one {'size' if of_heads else 'head configuration'} at a time: the table has {', '.join(several)}")
    return rows, name, compared, said


def _averaged(rows: pd.DataFrame, compared: str, shared: bool) -> pd.DataFrame:
    """One row per model and context: cells, mean loss over seeds, and its standard error; where that of the held-out text is
    `shared` by all, by the spread of seeds alone.
    """
    result = []
    sem = np.full(len(rows), np.nan) if shared else run_table.column(rows, "loss_sem")
    rows = rows.assign(sem=sem, loss=rows["loss"].astype(np.float64))
    for (model, context), seeds in rows.groupby([compared, "context"], sort=False):
        spread = seeds["loss"].std(ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else np.nan
        held_out = np.sqrt(np.mean(seeds["sem"].to_numpy() ** 2))  # of the same text for all seeds: it does not average out
        error = np.fmax(spread, held_out)
        cells = tuple(seeds["cell"]) if "cell" in seeds else ()
        row = {"model": model, "context": int(context), "cells": cells, "loss": seeds["loss"].mean(), "error": error}
        result.append(row)
    return pd.DataFrame(result)


def _pair(
    found: pd.DataFrame, others: pd.DataFrame, base: pd.DataFrame, differences: pd.DataFrame | None, said: list[str]
) -> None:
    """Gives differences between runs of one text their paired standard errors, in place; says where there are none."""
    known = {}
    if differences is not None:
        errors = run_table.column(differences, "standard_error")
        for cell, other, error in zip(differences["cell"], differences["other"], errors, strict=True):
            known[cell, other] = known[other, cell] = error
    missing = 0
    for i, (own, against) in enumerate(zip(others["cells"], base.loc[others["context"], "cells"], strict=True)):
        errors = np.array([known.get((a, b), np.nan) for a in own for b in against], np.float64)
        if not errors.size or np.isnan(errors).any():
            missing += 1
            continue
        text = np.sqrt(np.mean(errors**2)) / found["baseline_loss"].iloc[i]  # of one text for all seeds: no average
        seeds = np.nan_to_num(found["standard_error"].iloc[i])
        found.iloc[i, found.columns.get_loc("standard_error")] = np.hypot(text, seeds)
    if missing:
        said.append(
            f"{missing} of {len(found)} differences are without a paired error by documents: theirs is the spread of seeds, or "
            "the noise of the test, as the errors of both losses are those of the same text (give `differences`)"
        )


def _differences(others: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    against = base.loc[others["context"]]
    loss, base_loss = others["loss"].to_numpy(), against["loss"].to_numpy()
    own, of_base = others["error"].to_numpy() / loss, against["error"].to_numpy() / base_loss
    return pd.DataFrame(
        {
            "model": others["model"].to_numpy(),
            "context": others["context"].to_numpy(),
            "loss": loss,
            "baseline_loss": base_loss,
            "difference": loss / base_loss - 1,
            "standard_error": loss / base_loss * np.sqrt(own**2 + of_base**2),
        }
    )


def _tests(
    differences: pd.DataFrame, name: str, from_context: int, tolerance: float, level: float, said: list[str]
) -> tuple[pd.DataFrame, float, float]:
    """A row per model that has contexts enough, the noise of a difference, and its degrees of freedom."""
    long = differences[differences["context"] >= from_context]
    counts = long.groupby("model", sort=False)["context"].nunique()
    counts = counts.reindex(differences["model"].unique(), fill_value=0)
    few = counts[counts < MIN_CONTEXTS]
    if len(few) == len(counts):
        there = ", ".join(f"{n} of {model}" for model, n in few.items())
        raise ValueError(
            f"a test of flatness needs {MIN_CONTEXTS} contexts of {from_context:,} tokens or more that the baseline "
            f"{name} has, too: there are {there}; train more, or lower from_context"
        )
    said += [f"{model} is not tested: it has {n} contexts of {from_context:,} tokens or more" for model, n in few.items()]
    long = long[~long["model"].isin(few.index)]
    lines, squares, free = [], 0.0, 0
    for model, own in long.sort_values("context").groupby("model", sort=False):
        x, y = np.log2(own["context"].to_numpy(np.float64)), own["difference"].to_numpy()
        u = x - x.mean()
        slope = float(u @ y / (u @ u))
        squares += float(np.sum((y - y.mean() - slope * u) ** 2))
        free += len(y) - 2
        lines.append(
            {"model": model, "contexts": len(y), "mean": y.mean(), "slope": slope, "spread": float(np.sqrt(u @ u))}
            | {"doublings": float(np.ptp(x)), "largest_deviation": float(np.max(np.abs(y - y.mean())))}
        )
    tests = pd.DataFrame(lines)
    noise, dof = float(np.sqrt(squares / free)), free * 4 / (len(lines) + 3)
    error = noise / tests["spread"]
    reach = stats.t.ppf((1 + level) / 2, dof) * error
    tests["slope_low"], tests["slope_high"] = tests["slope"] - reach, tests["slope"] + reach
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(tests["slope"] == 0, 0.0, np.abs(tests["slope"]) / error)
    tests["p_value"] = 2 * stats.t.sf(ratio, dof)
    tests["p_adjusted"] = _holm(tests["p_value"].to_numpy())
    for end in ("", "_low", "_high"):
        tests[f"change{end}"] = tests[f"slope{end}"] * tests["doublings"]
    small = (np.abs(tests[["change_low", "change_high"]]).max(axis=1) <= tolerance) & (tests["largest_deviation"] <= tolerance)
    tests["verdict"] = np.where(small, "flat", np.where(tests["p_adjusted"] < 1 - level, "not flat", "open"))
    order = (
        "model", "contexts", "mean", "slope", "slope_low", "slope_high", "p_value", "p_adjusted", "change", "change_low",
        "change_high", "largest_deviation", "verdict",
    )  # fmt: skip
    return tests[list(order)], noise, dof


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjustment: valid however the tests depend on each other."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    result = np.empty_like(p_values)
    result[order] = np.minimum(stepped, 1.0)
    return result


def _verdict(tests: pd.DataFrame, name: str, from_context: int, tolerance: float, level: float) -> str:
    start = f"From {from_context:,} tokens on, differences to {name}"
    changes = "; ".join(
        f"{row.model} changes by {row.change:+.2%} ({row.change_low:+.2%} to {row.change_high:+.2%})"
        for row in tests.itertuples()
        if row.verdict != "flat"
    )
    if (tests["verdict"] == "flat").all():
        largest = np.abs(tests[["change_low", "change_high"]]).to_numpy().max()
        return f"{start} are flat within {tolerance:.2%}: they change by at most {largest:.2%} ({level:.0%} interval)."
    if (tests["verdict"] == "not flat").any():
        return f"{start} are not flat within {tolerance:.2%}: {changes}."
    return (
        f"{start} may be flat within {tolerance:.2%} or not, the data leave it open: {changes}; train more contexts or seeds."
    )


def _in_order(rows: pd.DataFrame, name: str) -> Sequence[str]:
    return list(rows[name].drop_duplicates())
