"""Everything that a report shows, from the laws of a grid or of a preset."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib.axes import Axes

from gqa_jax import costs, formatting, plots, results, storage
from gqa_jax.differences import load_differences
from gqa_jax.errors import ConfigError
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.search import invariance, optimum
from gqa_jax.search.answer import Answer
from gqa_jax.search.objectives import Objective, Z
from gqa_jax.shapes import Aspect
from launch import grid_tables, state, studies
from launch.report import Findings, Picture, Study, answer_map
from launch.studies import Fitted, Source
from launch.training_cells import TrainingCell

log = logging.getLogger(__name__)


def of(
    source: Source,
    objective: Objective,
    *,
    loss: float | None = None,
    context: int | None = None,
    aspect: Any = None,
    heads: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Findings:
    """The findings of every training context; the one of least noise answers the first question.

    `loss` and `context`: of that question; by default the grid's middle loss at the longest context served. `aspect`, `heads`:
    of `optimum.search`. `options`: those of the command line that `objective` was made of, by name, which its map keeps.

    Raises ConfigError where no context has laws, or a loss that can't be reached.
    """
    fits = studies.fit(source)
    if not fits.fitted:
        fits.at(None)
    made, unfitted = [], dict(fits.unfitted)
    for one in fits.fitted:
        try:
            made.append(_study(one, loss, context, objective, {"aspect": aspect, "heads": heads}, options))
        except ConfigError as error:
            if not made:
                raise
            unfitted[one.context] = str(error)  # the question is answered; by these laws it has no answer
    root = source.layout.root if source.layout else None
    made[0] = _with_contexts(made[0], source)
    runs, commits = source.loss, sorted(source.loss["commit"].dropna().unique()) if "commit" in source.loss else []
    about = source.laws.source if source.laws is not None else f"{len(runs)} runs of {runs['size'].nunique()} sizes"
    if fits.why:
        about += f"; first come {fits.why}"
    return Findings(
        name=source.name,
        about=about,
        studies=made,
        loss=runs,
        cost=None if root is None else _costs(source),
        differences=None if root is None else _differences(source),
        cells=_unfinished(source),
        unfitted=unfitted,
        ask=f"python -m launch optimum {source.argument}{_models(aspect, heads)}",
        command=f"python -m launch report {source.argument}{_models(aspect, heads)}{_asked(made[0])}",
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        versions={name: importlib.metadata.version(name) for name in ("gqa-jax", "numpy", "scipy", "pandas", "matplotlib")}
        | {"python": platform.python_version()}
        | ({"commits of the runs": ", ".join(commits)} if commits else {}),
    )


def _asked(study: Study) -> str:
    """The options of the question that a report opens with."""
    answer, goal = study.answer, next(iter(study.answer_map.goals.values()))
    return "".join(f" {one}" for one in ("--context", answer.context_served, "--loss", f"{answer.loss:g}", *goal.flags))


def _models(aspect: Any, heads: Any) -> str:
    """What a command line needs for the same shapes and candidates."""
    return (f" --aspect {aspect}" if aspect else "") + (f" --heads {' '.join(map(_argument, heads))}" if heads else "")


def _argument(one: Heads) -> str:
    """Heads as a command line takes them."""
    if one == LLAMA3:
        return "llama3"
    if one.n_heads is not None:
        return f"{one.n_heads},{one.n_kv_heads}"
    return f"kv:{one.n_kv_heads}" if one.group is None else "mha" if one.group == 1 else f"group:{one.group}"


def folder(source: Source, out: str | None = None) -> epath.Path:
    """Where the report goes: `out`; or report/ in the grid's folder, in TABLE-report of a table of runs, in runs/PRESET."""
    if out is not None:
        return storage.path(out)
    if source.table is not None:
        return studies.beside(source.table).root / "report"
    return (source.layout.root if source.layout else epath.Path("runs") / source.name) / "report"


def _study(
    one: Fitted,
    loss: float | None,
    context: int | None,
    objective: Objective,
    which: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> Study:
    served = sorted(one.contexts_served)
    context = context or served[-1]
    losses = sorted(one.losses, reverse=True)
    if loss is None:
        middle = [x for x in losses if x > max(law.entropy for law in one.laws.values())]
        if not middle:
            raise ConfigError(f"none of the losses asked for ({', '.join(f'{x:g}' for x in losses)}) is above E: give --loss")
        loss = middle[len(middle) // 2]
    rule = getattr(objective, "convention", None) or one.convention
    try:
        answer = optimum.search(one.laws, loss, context, objective, **which, convention=rule)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    summary, doubts = grid_tables.checks(one)
    study = Study(
        one.laws,
        answer,
        objective,
        answer_map.of(
            one.laws, objective, answer_map.losses_of(one.laws, [loss]), answer_map.contexts_of([context]), **which,
            convention=one.convention, options=options,
        ),
        optimum_map=optimum.optimum_map(one.laws, losses, served, objective, **which, convention=rule),
        sensitivity=optimum.convention_sensitivity(
            one.laws, loss, context, weights=objective if isinstance(objective, Z) else None, **which
        ),
        checks=summary,
        doubts=doubts,
    )  # fmt: skip
    return dataclasses.replace(study, pictures=_pictures(one, answer, study.optimum_map))


def _pictures(one: Fitted, answer: Answer, grid: pd.DataFrame) -> dict[str, list[Picture]]:
    """By part of the page, beside the map and the charts that it has anyway."""
    laws, rows, context = one.laws, one.rows, answer.context_served
    found: dict[str, list[Picture]] = {}

    def add(part: str, title: str, caption: str, draw: Callable[[], Any]) -> None:
        try:
            ax = draw()
        except ValueError as error:  # of data that this grid does not have
            log.warning(f"no picture {title!r}: {error}")
            return
        axes = ax if isinstance(ax, Axes) else np.ravel(ax)[0]
        found.setdefault(part, []).append(Picture(axes.figure, title, caption))

    if np.isfinite(answer.saving):
        said = "The answer of each loss against Llama 3's heads at the same loss, by context."
        add("questions", "Saved against Llama 3's heads", said, lambda: plots.savings_by_context(grid))
    if not rows.empty:
        said = f"The runs, and the laws with their 95% bands, at the costs of serving {formatting.context(context)}."
        add("runs", "Loss against the cost of serving", said, lambda: plots.loss_vs_costs(rows, laws, context))
    said = "Every run, its law, and the 95% band of the law."
    add("laws", "Loss against size", said, lambda: plots.loss_vs_params(laws))
    block = laws.blocks[0]
    if np.isfinite(laws.sigma) and block.given_entropy is None:
        said = "Likelihood profile of E: every other coefficient at its best for that E."
        if laws.shared.sem > 0:
            said += f" The held-out text adds ± {laws.shared.sem:.4f}, to all losses alike."
        add("laws", "How well E is known", said, lambda: plots.profile(*block.entropy_profile(), dof=block.dof))
    if np.isfinite(laws.sigma) and not rows.empty:
        add("laws", "What the laws leave", "Measured minus fitted loss of every run.", lambda: plots.residuals(laws))
    several = rows.groupby("n_kv_heads")["n_heads"].nunique() if not rows.empty else pd.Series([0])
    if several.max() >= 3:
        kept = rows[rows["n_kv_heads"] == several.idxmax()]
        said = f"By size, at {several.idxmax()} key/value heads: a power of n_h and a constant that all sizes share."
        add("laws", "Loss against query heads", said, lambda: plots.loss_vs_query_heads(kept))
    shape = costs.solve_shape(
        answer.n_params, answer.heads, Aspect.constant(answer.ratio), laws.head_dim, laws.vocab_size, laws.size_convention
    )
    contexts = [2**k for k in range(10, 21)]
    said = f"Share of a token's forward FLOPs in the answer {answer.heads}, by the context served."
    add("costs", "What computes", said, lambda: plots.flops_shares(shape, contexts))
    said = f"Share of the memory of serving the answer {answer.heads}, by the context served."
    add("costs", "What is held", said, lambda: plots.memory_shares(shape, contexts))
    return found


def _costs(source: Source) -> pd.DataFrame:
    """The cost table of the cells that the source is about."""
    table = results.load_costs(source.layout.root)
    return table[table["cell"].isin({*source.planned, *source.loss["cell"]})]


def _differences(source: Source, pairs: list[tuple[str, str]] | None = None) -> pd.DataFrame | None:
    """Every run against the best of its size, or those of `pairs`; None where only exported tables are there."""
    try:
        found = load_differences(source.layout.root, pairs)
    except FileNotFoundError:
        return None
    return studies.to_best(source.loss, found) if pairs is None else found


def _with_contexts(study: Study, source: Source) -> Study:
    """Adds whether differences between heads depend on the training context, where a grid was trained at several."""
    if source.loss.empty or source.loss["context"].nunique() < 2:
        return study
    baseline = tuple(study.answer.heads)
    try:
        pairs = invariance.pairs(source.loss, baseline)
        paired = _differences(source, pairs) if source.layout is not None else None
        found = invariance.context_invariance(source.loss, baseline, differences=paired)
        ax = plots.loss_vs_context(found)
    except ValueError as error:
        log.warning(f"no test of context invariance: {error}")
        return study
    caption = f"Relative difference of the loss to that of {found.baseline}, by the context of the training. {found.verdict}"
    drawn = Picture(ax.figure, "Loss differences against the training context", caption)
    pictures = {**study.pictures, "laws": [*study.pictures.get("laws", ()), drawn]}
    return dataclasses.replace(study, doubts=[*study.doubts, f"context invariance: {found.verdict}"], pictures=pictures)


def _unfinished(source: Source) -> pd.DataFrame | None:
    """Cells of the grid that have no result, or diverged: columns cell, state, cause."""
    if source.layout is None:
        return None
    done = set(source.loss.loc[source.loss["status"] == "done", "cell"])
    rows = []
    for name in source.planned:
        if name in done:
            continue
        now = state.of(TrainingCell, source.layout.cell(name), time.time())
        rows.append({"cell": name, "state": now.state, "cause": now.cause or ""})
    return pd.DataFrame(rows, columns=["cell", "state", "cause"])
