"""The runs of a loss table that a law may use, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.shapes import Aspect

MIN_SIZES = 3
MIN_SPAN = 4.0  # of N within an H: below it a power law and a line can't be told apart
NARROW_SPAN = 16.0


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs of one head configuration, by size."""

    params: np.ndarray  # N without embeddings
    loss: np.ndarray
    sem: np.ndarray  # standard error of loss; nan where it is not known
    d_model: np.ndarray  # nan where it is not known

    @property
    def n_sizes(self) -> int:
        return len(np.unique(self.params))

    @property
    def span(self) -> float:
        return float(self.params.max() / self.params.min())


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of ONE training context that are finished, finite and trained from scratch, by size; and what was left out.

    Raises:
      ValueError: columns that are missing, no finished run, several contexts, the same run twice, or losses that can't be.
    """
    needed = ["n_heads", "n_kv_heads", "params_non_embedding", "loss", "status", "context"]
    if missing := [name for name in needed if name not in table.columns]:
        raise ValueError(f"the table has no column {', '.join(missing)}: give the loss table of gqa_jax.load_results")
    said = []

    def leave_out(rows: pd.DataFrame, bad: pd.Series, what: str) -> pd.DataFrame:
        bad = bad.fillna(False).astype(bool)
        if bad.any():
            said.append(f"{int(bad.sum())} of {len(bad)} runs left out: {what}")
        return rows[~bad]

    rows = leave_out(table, table["status"] == "diverged", "their loss diverged")
    rows = leave_out(rows, rows["status"] != "done", "they are not finished")
    loss = pd.to_numeric(rows["loss"], errors="coerce").astype("Float64")
    rows = leave_out(rows, ~np.isfinite(loss.astype(np.float64)), "their loss is no number")
    if rows.empty:
        raise ValueError("no finished run to fit: every row is diverged or missing")
    if len(contexts := sorted(rows["context"].unique())) > 1:
        raise ValueError(f"one training context at a time: the table has {', '.join(str(c) for c in contexts)}")
    if "continue_from" in rows and not rows["continue_from"].notna().all():  # runs of another kind: one law can't hold for both
        rows = leave_out(rows, rows["continue_from"].notna(), "they continue other runs")
    if (low := rows["loss"].astype(np.float64)).le(0).any():
        raise ValueError(f"a loss of {low.min():g} nats per token can't be: losses are above 0")
    if rows["params_non_embedding"].isna().any() or (rows["params_non_embedding"].astype(np.float64) <= 0).any():
        raise ValueError("params_non_embedding must be above 0 in every row: the parameters without embeddings")
    if "cell" in rows and rows["cell"].notna().all() and rows["cell"].duplicated().any():
        name = rows["cell"][rows["cell"].duplicated()].iloc[0]
        raise ValueError(f"run {name} is in the table twice: drop one (DataFrame.drop_duplicates('cell'))")
    if "seed" in rows and rows["seed"].notna().all():
        key = [c for c in ("n_heads", "n_kv_heads", "params_non_embedding", "seed", "tokens", "learning_rate", "n_layers",
                           "data_fingerprint", "batch_tokens", "cell") if c in rows]  # fmt: skip
        if (twice := rows.duplicated(key)).any():
            row = rows[twice].iloc[0]
            raise ValueError(
                f"two runs of N = {row['params_non_embedding']}, heads ({row['n_heads']},{row['n_kv_heads']}) have seed "
                f"{row['seed']}: they are one run, drop one, or give them seeds of their own"
            )
    return rows.sort_values("params_non_embedding", kind="stable"), said


def by_heads(rows: pd.DataFrame) -> dict[Heads, Runs]:
    """Runs of every H of `usable` rows; an empty n_heads stands for d / d_h."""
    groups = {}
    for (n_heads, n_kv), chosen in rows.groupby(["n_heads", "n_kv_heads"], dropna=False):
        groups[Heads(None if pd.isna(n_heads) else int(n_heads), int(n_kv))] = _runs(chosen)
    return groups


def llama3(rows: pd.DataFrame) -> Runs | None:
    """The runs whose heads happen to be Llama 3's, n_h d_h = d and n_kv = 8, where there are enough sizes for a law."""
    if "d_model" not in rows or "head_dim" not in rows:
        return None
    follows = (rows["n_heads"] * rows["head_dim"] == rows["d_model"]) & (rows["n_kv_heads"] == LLAMA3.n_kv_heads)
    if not (follows := follows.fillna(False).astype(bool)).any():
        return None
    runs = _runs(rows[follows])
    return runs if runs.n_sizes >= MIN_SIZES and runs.span >= MIN_SPAN else None


def fittable(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of those H that have sizes enough, and sentences on the H that have not: for grids that still run."""
    problems: dict[str, list[Heads]] = {}
    kept = []
    for heads, runs in by_heads(rows).items():
        if problem := _problem(runs):
            problems.setdefault(problem, []).append(heads)
        else:
            kept.append(heads)
    said = [f"heads {', '.join(map(str, heads))}: {problem}; left out" for problem, heads in problems.items()]
    names = pd.MultiIndex.from_frame(rows[["n_heads", "n_kv_heads"]].astype("Int64").fillna(0))
    return rows[names.isin([(h.n_heads or 0, h.n_kv_heads) for h in kept])], said


def require(groups: Mapping[Heads, Runs]) -> None:
    """Raises ValueError naming the first H that has too few sizes for a law, or sizes too close to each other."""
    for heads, runs in groups.items():
        if problem := _problem(runs):
            raise ValueError(f"heads {heads}: {problem}")


def _problem(runs: Runs) -> str | None:
    if runs.n_sizes < MIN_SIZES:
        have = "1 size has" if runs.n_sizes == 1 else f"{runs.n_sizes} sizes have"
        return f"{have} finished, a law needs {MIN_SIZES} or more"
    if runs.span < MIN_SPAN:
        return f"sizes span a factor of {runs.span:.1f}, a law needs {MIN_SPAN:g} or more: train others"
    return None


def warnings(groups: Mapping[Heads, Runs], rows: pd.DataFrame) -> list[str]:
    """What makes a law of these runs doubtful, whatever the fit says."""
    found = []
    if any(runs.n_sizes == MIN_SIZES for runs in groups.values()):
        found.append(f"{MIN_SIZES} sizes of an H: its curvature rests on one point")
    span = min(runs.span for runs in groups.values())
    if span < NARROW_SPAN:
        found.append(f"sizes span a factor of {span:.1f} only: extrapolation beyond them is a guess")
    if "tokens" in rows and rows["tokens"].notna().all():
        ratio = rows["tokens"].astype(np.float64) / rows["params_non_embedding"].astype(np.float64)
        if ratio.max() > 3 * ratio.min():
            found.append(
                f"tokens per parameter range from {ratio.min():.3g} to {ratio.max():.3g}: L(N) mixes the effect of data with "
                "that of size"
            )
    if "d_model" in rows and "n_layers" in rows and rows["d_model"].notna().all():
        aspect = rows["d_model"].astype(np.float64) / rows["n_layers"].astype(np.float64)
        if aspect.max() > 2.5 * aspect.min():
            found.append(
                f"aspect ratios d / L range from {aspect.min():.3g} to {aspect.max():.3g}: N alone may not order these models"
            )
    return found


def only(rows: pd.DataFrame, name: str, default: float) -> float:
    """The one value of a column, or `default` where it is missing. Raises ValueError where runs differ in it."""
    values = rows[name].dropna().unique() if name in rows else []
    if len(values) > 1:
        raise ValueError(f"runs of several {name} ({', '.join(map(str, values))}) are not on one law: fit them apart")
    return float(values[0]) if len(values) else default


def aspect(rows: pd.DataFrame) -> Aspect | None:
    """d / L between the trained sizes (mean N over H), constant beyond them; None where the shapes are not known."""
    if "d_model" not in rows or "n_layers" not in rows or rows[["d_model", "n_layers"]].isna().any(axis=None):
        return None
    sizes = rows.astype({"params_non_embedding": np.float64}).groupby(["n_layers", "d_model"])["params_non_embedding"].mean()
    known = {n: (float(layers), float(d)) for (layers, d), n in sizes.items()}
    return Aspect.between((n, *shape) for n, shape in known.items())


def stack(groups: Sequence[Runs]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(params_GxM, loss_GxM, sem_GxM, there_GxM), padded at the end of each row; padding repeats the first point."""
    most = max(len(runs.loss) for runs in groups)

    def pad(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.full(most - len(values), values[0])])

    there = np.stack([np.arange(most) < len(runs.loss) for runs in groups])
    return (*(np.stack([pad(getattr(runs, name)) for runs in groups]) for name in ("params", "loss", "sem")), there)


def _runs(rows: pd.DataFrame) -> Runs:
    def column(name: str) -> np.ndarray:
        return rows[name].to_numpy(np.float64, na_value=np.nan) if name in rows else np.full(len(rows), np.nan)

    return Runs(column("params_non_embedding"), column("loss"), column("loss_sem"), column("d_model"))
