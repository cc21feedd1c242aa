"""Everything that a report shows, from the laws of a grid or of a preset."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib.axes import Axes
from rich.console import Console

from gqa_jax import formatting, plots, results, shape_search, storage
from gqa_jax.errors import ConfigError
from gqa_jax.laws import LLAMA3, Heads, validation
from gqa_jax.search import invariance, optimum
from gqa_jax.search.answer import Answer
from gqa_jax.search.objectives import Objective, Z
from gqa_jax.shapes import Aspect
from launch import state, studies
from launch.grid_tables import without_checks
from launch.report import Findings, Picture, Question, Study, answer_map
from launch.studies import Fitted, Source


def of(
    source: Source,
    loss: float | None,
    context: int | None,
    objective: Objective,
    console: Console,
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
            made.append(_study(one, loss, context, objective, console, {"aspect": aspect, "heads": heads}, options))
        except ConfigError as error:
            if not made:
                raise
            unfitted[one.context] = str(error)  # the question is answered; by these laws it has no answer
    root = source.layout.root if source.layout else None
    made[0] = _with_contexts(made[0], source, console)
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
        error=studies.of_documents(runs),
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
    question, goal = study.questions[0], next(iter(study.answer_map.goals.values()))
    return "".join(f" {one}" for one in ("--context", question.context_served, "--loss", f"{question.loss:g}", *goal.flags))


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
    console: Console,
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
    grid = optimum.optimum_map(one.laws, losses, served, objective, **which, convention=rule)
    weights = objective if isinstance(objective, Z) else None
    study = {
        "laws": one.laws,
        "questions": [Question(loss, context, answer)],
        "objective": objective,
        "answer_map": answer_map.of(
            one.laws,
            objective,
            answer_map.losses_of(one.laws, [loss]),
            answer_map.contexts_of([context]),
            **which,
            convention=one.convention,
            options=options,
        ),
        "optimum_map": grid,
        "sensitivity": optimum.convention_sensitivity(one.laws, loss, context, weights=weights, **which),
        "checks": _checks(one),
    }
    pictures: dict[str, list[Picture]] = {}
    for part, title, caption, draw in _pictures(one, answer, grid, context):
        try:
            ax = draw()
        except ValueError as error:  # of data that this grid does not have
            console.print(f"no picture {title!r}: {error}", highlight=False)
            continue
        axes = ax if isinstance(ax, Axes) else np.ravel(ax)[0]
        pictures.setdefault(part, []).append(Picture(axes.figure, title, caption))
    return Study(**study, pictures=pictures)


def _pictures(
    one: Fitted, answer: Answer, grid: pd.DataFrame, context: int
) -> Iterator[tuple[str, str, str, Callable[[], Any]]]:
    """(part of the page, title, caption, what draws it), beside the map and the charts that the page has anyway."""
    laws, rows = one.laws, one.rows
    at = formatting.context(context)
    if np.isfinite(answer.saving):
        yield (
            "questions",
            "Saved against Llama 3's heads",
            "The answer of each loss against Llama 3's heads at the same loss, by context.",
            lambda: plots.savings_by_context(grid),
        )
    if not rows.empty:
        yield (
            "runs",
            "Loss against the cost of serving",
            f"The runs, and the laws with their 95% bands, at the costs of serving {at}.",
            lambda: plots.loss_vs_costs(rows, laws, context),
        )
    yield (
        "laws",
        "Loss against size",
        "Every run, its law, and the 95% band of the law.",
        lambda: plots.loss_vs_params(laws),
    )
    if np.isfinite(laws.sigma):
        block = laws.blocks[0]
        if block.given_entropy is None:
            yield (
                "laws",
                "How well E is known",
                "Likelihood profile of E: every other coefficient at its best for that E."
                + (f" The held-out text adds ± {laws.shared.sem:.4f}, to all losses alike." if laws.shared.sem > 0 else ""),
                lambda: plots.profile(*block.entropy_profile(), dof=block.dof),
            )
        if not rows.empty:
            yield "laws", "What the laws leave", "Measured minus fitted loss of every run.", lambda: plots.residuals(laws)
    if not rows.empty:
        several = rows.groupby("n_kv_heads")["n_heads"].nunique()
        if several.max() >= 3:
            kept = rows[rows["n_kv_heads"] == several.idxmax()]
            yield (
                "laws",
                "Loss against query heads",
                f"By size, at {several.idxmax()} key/value heads: a power of n_h and a constant that all sizes share.",
                lambda: plots.loss_vs_query_heads(kept),
            )
    shape = shape_search.solve_shape(
        answer.n_params, answer.heads, Aspect.constant(answer.ratio), laws.head_dim, laws.vocab_size, laws.size_convention
    )
    contexts = [2**k for k in range(10, 21)]
    yield (
        "costs",
        "What computes",
        f"Share of a token's forward FLOPs in the answer {answer.heads}, by the context served.",
        lambda: plots.flops_shares(shape, contexts),
    )
    yield (
        "costs",
        "What is held",
        f"Share of the memory of serving the answer {answer.heads}, by the context served.",
        lambda: plots.memory_shares(shape, contexts),
    )


def _costs(source: Source) -> pd.DataFrame:
    """The cost table of the cells that the source is about."""
    table = results.load_costs(source.layout.root)
    return table[table["cell"].isin({*source.planned, *source.loss["cell"]})]


def _differences(source: Source, pairs: list[tuple[str, str]] | None = None) -> pd.DataFrame | None:
    """Every run against the best of its size, or those of `pairs`; None where only exported tables are there."""
    try:
        found = results.load_differences(source.layout.root, pairs)
    except FileNotFoundError:
        return None
    return studies.to_best(source.loss, found) if pairs is None else found


def _with_contexts(study: Study, source: Source, console: Console) -> Study:
    """Adds whether differences between heads depend on the training context, where a grid was trained at several."""
    if source.loss.empty or source.loss["context"].nunique() < 2:
        return study
    baseline = tuple(study.questions[0].answer.heads)
    try:
        pairs = invariance.pairs(source.loss, baseline)
        paired = _differences(source, pairs) if source.layout is not None else None
        found = invariance.context_invariance(source.loss, baseline, differences=paired)
        ax = plots.loss_vs_context(found)
    except ValueError as error:
        console.print(f"no test of context invariance: {error}", highlight=False)
        return study
    checks = pd.concat(
        [study.checks, pd.DataFrame([{"check": "context invariance", "result": found.verdict}])], ignore_index=True
    )
    caption = f"Relative difference of the loss to that of {found.baseline}, by the context of the training. {found.verdict}"
    drawn = Picture(ax.figure, "Loss differences against the training context", caption)
    pictures = {**study.pictures, "laws": [*study.pictures.get("laws", ()), drawn]}
    return dataclasses.replace(study, checks=checks, pictures=pictures)


def _checks(one: Fitted) -> pd.DataFrame | None:
    """Columns check, result: the laws on runs that they have not seen."""
    if one.rows.empty:
        return None
    frame, missing = validation.hold_out_all(one.rows)
    lines = [
        {
            "check": f"{row.scheme.replace('_', ' ')}, {row.model.replace('_', ' ')}",
            "result": f"mean error {row.mean_error:+.4f}, rms {row.rms_error:.4f}, worst {row.worst_error:+.4f} nats per "
            f"token, {row.predicted} of {row.runs} runs predicted",
        }
        for row in validation.summary(frame).itertuples()
    ]
    said = [*without_checks(missing), *validation.not_falling(one.laws)]
    return pd.DataFrame(lines + [{"check": "doubt", "result": text} for text in said], columns=["check", "result"])


def _unfinished(source: Source) -> pd.DataFrame | None:
    """Cells of the grid that have no result, or diverged: columns cell, state, cause."""
    if source.layout is None:
        return None
    done = set(source.loss.loc[source.loss["status"] == "done", "cell"])
    rows = []
    for name in source.planned:
        if name in done:
            continue
        now = state.of(source.layout.cell(name), time.time())
        rows.append({"cell": name, "state": now.state, "cause": now.cause or ""})
    return pd.DataFrame(rows, columns=["cell", "state", "cause"])
