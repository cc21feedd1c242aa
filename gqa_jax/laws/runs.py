"""The runs of a loss table that a law may use, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax.laws import checks
from gqa_jax.laws.checks import column
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.shapes import Aspect, paper_aspect

MIN_SIZES = 3
MIN_SPAN = 4.0  # of N within an H: below it a power law and a line can't be told apart
NARROW_SPAN = 16.0
SAME_SIZE = 1.01  # counts within this factor are of one size, where nothing else says what a size is


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs of one head configuration, by size."""

    params: np.ndarray  # N without embeddings
    loss: np.ndarray
    sem: np.ndarray  # standard error of loss; nan where it is not known, or common to all runs (`shared_sem`)
    d_model: np.ndarray  # nan where it is not known
    size: np.ndarray  # int labels: runs of any heads with the same one are of one size (`size_labels`)

    @property
    def n_sizes(self) -> int:
        return len(np.unique(self.params))

    @property
    def span(self) -> float:
        return float(self.params.max() / self.params.min())


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of ONE training context that are finished, finite and trained from scratch, by size; and what was left out.

    Raises:
      ValueError: columns that are missing, no finished run, several contexts, several rules (`require_one_rule`), several data,
        vocabularies or unembeddings, the same run twice, or heads, losses and N that can't be (`checks`).
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
    rows = leave_out(rows, pd.Series(~np.isfinite(_losses(rows)), rows.index), "their loss is no number")
    if rows.empty:
        raise ValueError("no finished run to fit: every row is diverged or missing")
    if len(contexts := sorted(rows["context"].unique())) > 1:
        raise ValueError(f"one training context at a time: the table has {', '.join(str(c) for c in contexts)}")
    if "continue_from" in rows and not rows["continue_from"].notna().all():  # runs of another kind: one law can't hold for both
        rows = leave_out(rows, rows["continue_from"].notna(), "they continue other runs")
    require_one_rule(rows)
    for name in ("data_fingerprint", "vocab_size", "unembedding"):
        require_one(rows, name)
    checks.require(rows)
    if "cell" in rows and rows["cell"].notna().all() and rows["cell"].duplicated().any():
        name = rows["cell"][rows["cell"].duplicated()].iloc[0]
        raise ValueError(f"run {name} is in the table twice: drop one (DataFrame.drop_duplicates('cell'))")
    _require_distinct(rows)
    return rows.sort_values("params_non_embedding", kind="stable"), said


def usable_by_context(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """`usable` rows of every training context, with columns `size_name` and `heads`; and what was left out, said.

    A size is named by the column size, else by its layers and width ("24x1280").

    Raises:
      ValueError: as `usable`, for all contexts together, or a table that does not say what size a run has.
    """
    if missing := [name for name in ("context", "status", "loss") if name not in table.columns]:
        raise ValueError(f"the table has no column {', '.join(missing)}: give the loss table of gqa_jax.load_results")
    kept, said = [], []
    there = table["status"].eq("done").fillna(False).to_numpy(bool) & np.isfinite(_losses(table))
    for context, rows in table.assign(_there=there).groupby("context"):
        if not rows.pop("_there").any():
            said.append(f"T = {context}: all {len(rows)} runs left out: they diverged or are not finished")
            continue
        rows, words = usable(rows)
        kept.append(rows)
        said += [f"T = {context}: {word}" for word in words]
    if not kept:
        raise ValueError("no finished run to fit: every row is diverged or missing")
    rows = pd.concat(kept)
    require_one_rule(rows)
    heads = [Heads.of(h, k) for h, k in zip(rows["n_heads"], rows["n_kv_heads"], strict=True)]
    for names in names_of_sizes(rows):
        if names.notna().all():
            return rows.assign(size_name=names.astype(str), heads=pd.Series(heads, rows.index, dtype=object)), said
    raise ValueError("the table says of no run what size it has: it needs the column size, or n_layers and d_model")


def _losses(table: pd.DataFrame) -> np.ndarray:
    """Losses as float64; nan for what is no number."""
    return pd.to_numeric(table["loss"], errors="coerce").astype("Float64").to_numpy(np.float64, na_value=np.nan)


def _require_distinct(rows: pd.DataFrame) -> None:
    """Raises ValueError where two runs can't be told apart: they are one run, or seeds that nobody named."""
    key = [c for c in ("n_heads", "n_kv_heads", "params_non_embedding", "seed", "tokens", "learning_rate", "n_layers",
                       "data_fingerprint", "batch_tokens", "size", "d_model", "cell") if c in rows]  # fmt: skip
    if not (twice := rows.duplicated(key)).any():
        return
    row = rows[twice].iloc[0]
    two = f"two runs of N = {row['params_non_embedding']}, heads ({row['n_heads']},{row['n_kv_heads']})"
    if "seed" in rows and pd.notna(row["seed"]):
        raise ValueError(f"{two} have seed {row['seed']}: they are one run, drop one, or give them seeds of their own")
    raise ValueError(f"{two} have no seed: add a column seed where they repeat each other, or drop one")


def by_rule(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """`usable` rows, those of a ladder whose heads grow with the width as runs of its rules (`Heads`); and what was so, said.

    Such a ladder has every (n_h, n_kv) at a size or two. Where none has sizes enough for a law and all query heads fill the
    width, n_h d_h = d, runs with the same group n_h / n_kv are one rule (multi-head attention is a group of 1), or else runs
    with the same n_kv. Other rows stay as they are.
    """
    if {"d_model", "head_dim"} - {*rows.columns} or rows["n_heads"].isna().any():
        return rows, []
    n_heads, n_kv, d_model, head_dim = (column(rows, name) for name in ("n_heads", "n_kv_heads", "d_model", "head_dim"))
    if not np.allclose(n_heads * head_dim, d_model) or any(_problem(runs) is None for runs in by_heads(rows).values()):
        return rows, []
    for numbers in (-n_heads / n_kv, n_kv):
        found = as_rule(rows, numbers)
        groups = by_heads(found)
        if all(_problem(runs) is None for runs in groups.values()):
            return found, [
                f"heads grow with the width: the {len(rows)} runs are taken as those of {', '.join(map(str, groups))}"
            ]
    return rows, []


def as_rule(rows: pd.DataFrame, n_kv_heads: int | np.ndarray) -> pd.DataFrame:
    """The rows with n_heads empty, as a rule has it, and these n_kv_heads (below 0: a group)."""
    values = np.broadcast_to(np.round(n_kv_heads).astype(np.int64), len(rows))
    return rows.assign(n_heads=pd.array([pd.NA] * len(rows), dtype="Int64"), n_kv_heads=pd.array(values, dtype="Int64"))


def follow(rows: pd.DataFrame, rule: Heads) -> pd.DataFrame:
    """The rows as runs of a rule. Raises ValueError where the heads of one are not those of the rule at its width."""
    if missing := [name for name in ("d_model", "head_dim") if name not in rows or rows[name].isna().any()]:
        raise ValueError(f"heads {rule}: the heads of a rule need {' and '.join(missing)} of every run")
    d_model, head_dim = column(rows, "d_model"), column(rows, "head_dim")
    for name, expected in (("n_heads", rule.query_heads(d_model, head_dim)), ("n_kv_heads", rule.kv_heads(d_model, head_dim))):
        given = column(rows, name)
        wrong = np.isfinite(given) & (given > 0) & ~np.isclose(given, expected)
        if wrong.any():
            row = rows[wrong].iloc[0]
            raise ValueError(
                f"{name} = {row[name]} at d_model {row['d_model']}, head_dim {row['head_dim']} is not that of the rule {rule} "
                f"({int(wrong.sum())} of {len(rows)} runs): leave them out, or name their own (column heads_rule)"
            )
    return as_rule(rows, rule.n_kv_heads)


def require_one_rule(rows: pd.DataFrame) -> None:
    """Raises ValueError where finished runs are under several rules (column `rules`): their losses can't be compared."""
    if (mixture := several_rules(rows)) is not None:
        raise ValueError(mixture)


def several_rules(rows: pd.DataFrame) -> str | None:
    """A sentence where finished runs are under several rules, and how to choose; None where they are not."""
    if (counts := _several(rows[rows["status"] == "done"], "rules")) is None:
        return None
    return (
        f"runs under {len(counts)} rules ({_said(counts)}) are not on one law: their losses are of other held-out text, or of "
        "another warm-up. Choose with --rules old or --rules new (load_study: rules=...), or take "
        "table[table['rules'] == ...]"
    )


def require_one(rows: pd.DataFrame, name: str) -> None:
    """Raises ValueError where runs have several values in a column: one law can't hold for all of them."""
    if (counts := _several(rows, name)) is not None:
        raise ValueError(
            f"runs of several {name} ({_said(counts)}) are not on one law: fit them apart, like those of {counts.idxmax()} "
            "alone"
        )


def _several(rows: pd.DataFrame, name: str) -> pd.Series | None:
    """How many runs have each of several values of a column; None where they are not several."""
    counts = rows[name].value_counts(sort=False).sort_index() if name in rows else ()
    return counts if len(counts) > 1 else None


def _said(counts: pd.Series) -> str:
    return ", ".join(f"{value}: {count} run{'s' * int(count > 1)}" for value, count in counts.items())


def shared_sem(rows: pd.DataFrame) -> float | None:
    """The standard error that all losses have in common, nats per token: of the held-out text, over documents.

    Runs that were evaluated on the same text (column `heldout`) are off by one common amount against the text at large: by as
    much as their `loss_sem`, of which this is the root mean square. It says nothing of how far runs may differ from each other,
    so it is no weight. None where a row does not say on which text: then each `loss_sem` is that of its own run. nan where no
    run has one.
    """
    if "heldout" not in rows or rows.empty or rows["heldout"].isna().any():
        return None
    known = column(rows, "loss_sem")
    known = known[np.isfinite(known)]
    return float(np.sqrt(np.mean(known**2))) if known.size else np.nan


def shared_error(rows: pd.DataFrame) -> SharedError:
    """`shared_sem` with the degrees of freedom of the fewest documents of a run; 0 where each run's own is its weight."""
    sem = shared_sem(rows)
    documents = column(rows, "eval_documents")
    known = documents[np.isfinite(documents)]
    return SharedError(sem or 0.0, known.min() - 1 if known.size and known.min() > 1 else np.inf)


def about_text(rows: pd.DataFrame) -> list[str]:
    """What the held-out text does to every answer, in sentences; none where the rows do not say on which text they are."""
    if (sem := shared_sem(rows)) is None:
        return []
    documents = [int(n) for n in rows["eval_documents"].dropna().unique()] if "eval_documents" in rows else []
    count = f" by {documents[0]} document{'' if documents == [1] else 's'}" if len(documents) == 1 else ""
    if np.isnan(sem):
        found = [
            f"how far the held-out text is from others is not known{count}: the intervals of E and N* are of this text alone"
        ]
    else:
        found = [
            f"E and all losses have the standard error of the held-out text in common, ± {sem:.4f} nats per token{count}: "
            "intervals of E and N* have it; between heads it cancels"
        ]
    if len(texts := rows["heldout"].unique()) > 1:
        found.append(
            f"runs were evaluated on {len(texts)} held-out texts ({', '.join(sorted(texts))}): heads may differ by their text; "
            "evaluate them alike"
        )
    return found


def by_heads(rows: pd.DataFrame) -> dict[Heads, Runs]:
    """Runs of every H of `usable` rows; an empty n_heads stands for d / d_h."""
    groups, own = {}, shared_sem(rows) is None
    rows = rows.assign(size_label=size_labels(rows))  # of all heads, before they are parted
    for (n_heads, n_kv), chosen in rows.groupby(["n_heads", "n_kv_heads"], dropna=False):
        groups[Heads.of(n_heads, n_kv)] = runs_of(chosen, own)
    return groups


def llama3(rows: pd.DataFrame) -> Runs | None:
    """The runs whose heads happen to be Llama 3's, n_h d_h = d and n_kv = 8, where there are enough sizes for a law."""
    if "d_model" not in rows or "head_dim" not in rows:
        return None
    follows = (rows["n_heads"] * rows["head_dim"] == rows["d_model"]) & (rows["n_kv_heads"] == LLAMA3.n_kv_heads)
    if not (follows := follows.fillna(False).astype(bool)).any():
        return None
    runs = runs_of(rows.assign(size_label=size_labels(rows))[follows], shared_sem(rows) is None)
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
    return rows[np.any([np.zeros(len(rows), bool), *(have(rows, heads) for heads in kept)], axis=0)], said


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
    found = about_text(rows)
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
    if (known := ratios(rows)) is not None and known.max() > 2.5 * known.min():
        found.append(
            f"aspect ratios d / L range from {known.min():.3g} to {known.max():.3g}: N alone may not order these models"
        )
    return found


def ratios(rows: pd.DataFrame) -> np.ndarray | None:
    """d / L of every row; None where the shapes are not known."""
    if not {"d_model", "n_layers"} <= {*rows.columns} or rows[["d_model", "n_layers"]].isna().any(axis=None):
        return None
    return column(rows, "d_model") / column(rows, "n_layers")


def have(rows: pd.DataFrame, heads: Heads) -> np.ndarray:
    """Which rows (bool) have these heads; an empty n_heads is a rule's."""
    same = rows["n_heads"].isna() if heads.n_heads is None else rows["n_heads"] == heads.n_heads
    return (same & (rows["n_kv_heads"] == heads.n_kv_heads)).fillna(False).to_numpy(bool)


def only(rows: pd.DataFrame, name: str, default: float) -> float:
    """The one value of a column, or `default` where it is missing. Raises ValueError where runs differ in it."""
    require_one(rows, name)
    values = rows[name].dropna() if name in rows else ()
    return float(values.iloc[0]) if len(values) else default


def common(rows: pd.DataFrame) -> dict[str, Any]:
    """What all runs of one context have in common, whatever law is fitted to them.

    context, tokens; head_dim and vocab_size, the paper's where the table has none; size_convention, what N counts
    (`gqa_jax.costs.CONVENTIONS`): "exact" with norms, as our runs say with `params_total`, else "figures"; aspect, d / L as a
    function of N. Raises ValueError where runs differ in one of them.
    """
    return {
        "context": int(rows["context"].iloc[0]),
        "head_dim": only(rows, "head_dim", 64.0),
        "vocab_size": only(rows, "vocab_size", 50_304.0),
        "size_convention": "exact" if "params_total" in rows and rows["params_total"].notna().all() else "figures",
        "aspect": aspect(rows),
    }


def aspect(rows: pd.DataFrame) -> Aspect:
    """d / L between the trained sizes (mean N over H), constant beyond them; the paper's where the shapes are not known."""
    if ratios(rows) is None:
        return paper_aspect()
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


def runs_of(rows: pd.DataFrame, own_sem: bool, count: str = "params_non_embedding") -> Runs:
    """The runs of some rows by the column `count`; without standard errors where they are not each run's own.

    Their sizes are those of the column `size_label`, of `size_labels` of all rows of a table; else those of these rows alone.
    """
    sem = column(rows, "loss_sem") if own_sem else np.full(len(rows), np.nan)
    labels = rows["size_label"].to_numpy(np.int64) if "size_label" in rows else size_labels(rows)
    return Runs(column(rows, count), column(rows, "loss"), sem, column(rows, "d_model"), labels)


def size_labels(rows: pd.DataFrame) -> np.ndarray:
    """Which size every run has, common to all heads: int64 labels (rows,), 0 for the smallest.

    A size is the same number of layers and hidden size; where a row lacks one, the same column `size`; where one lacks that
    too, the same N within 1%. N alone is a last resort: at one size it differs by heads.
    """
    params = column(rows, "params_non_embedding")
    for names in (["n_layers", "d_model"], ["size"]):
        if set(names) <= {*rows.columns} and rows[names].notna().all(axis=None):
            codes = rows.groupby(names, sort=False).ngroup().to_numpy()
            least = np.array([params[codes == code].min() for code in range(codes.max(initial=-1) + 1)])
            return np.argsort(np.argsort(least, kind="stable"), kind="stable")[codes]
    return labels_by_count(params)


def names_of_sizes(rows: pd.DataFrame) -> list[pd.Series]:
    """What the size of each row goes by: its column `size`, and its layers and hidden size (12x768), where there are."""
    found = [rows["size"].astype("string").replace("", pd.NA)] if "size" in rows else []
    if {"n_layers", "d_model"} <= {*rows.columns}:
        layers, width = (rows[name].astype("Int64").astype("string") for name in ("n_layers", "d_model"))
        found.append(layers + "x" + width)
    return found


def size_names(rows: pd.DataFrame, labels: np.ndarray) -> list[str]:
    """A name for every label of `size_labels`: the first of `names_of_sizes` that all its rows with any have, else N."""
    found = []
    for label in range(labels.max(initial=-1) + 1):
        own = rows[labels == label]
        names = [one[0] for one in (names.dropna().unique() for names in names_of_sizes(own)) if len(one) == 1]
        found.append(names[0] if names else f"N = {column(own, 'params_non_embedding').min():.3g}")
    return found


def labels_by_name(rows: pd.DataFrame, labels: np.ndarray) -> dict[str, int]:
    """The label of every name of `names_of_sizes`. A name that two sizes go by is none."""
    found: dict[str, set[int]] = {}
    for names in names_of_sizes(rows):
        for name, label in zip(names, labels, strict=True):
            if pd.notna(name):
                found.setdefault(name, set()).add(int(label))
    return {name: next(iter(those)) for name, those in found.items() if len(those) == 1}


def labels_by_count(params: np.ndarray) -> np.ndarray:
    """int64 labels of equal counts, within 1% of the smallest of their label; 0 for the smallest."""
    labels, start, label = np.empty(len(params), np.int64), -np.inf, -1
    for i in np.argsort(params, kind="stable"):
        if params[i] > SAME_SIZE * start:
            start, label = params[i], label + 1
        labels[i] = label
    return labels
