"""Tables, laws, the cheapest heads and pictures of a finished grid, and what is printed of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gqa_jax import formatting, plots, results, storage
from gqa_jax.formatting import probability, regret, short, si
from gqa_jax.laws import Heads, planning, posterior, validation
from gqa_jax.laws import runs as run_table
from gqa_jax.search import optimum
from gqa_jax.search.answer import Answer
from launch import rules, serving_screens, studies
from launch.grid import Layout
from launch.studies import Fits, Fitted, Source

ASTRONOMICAL = 1e18  # a bound that is none


@contextlib.contextmanager
def outputs(layout: Layout) -> Iterator[Layout]:
    """Where tables and pictures are written: the grid's folder, or a local one that is copied to gs:// at the end."""
    if not storage.is_remote(layout.root):
        yield layout
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Layout(epath.Path(folder))
        storage.upload(Path(folder), layout.root)


def write(layout: Layout, console: Console, asked: str | None = None, allow_confounded: bool = False) -> None:
    """Tables, laws, cheapest heads and pictures of a grid folder, each file whole or not at all; prints the answer.

    asked: the rules (`launch.rules`) that the laws are of. Tables have all runs, whatever rules they are under; without `asked`
    there are no laws of runs under several. allow_confounded: of `gqa_jax.laws.fit_by_heads`.
    """
    with outputs(layout) as out:
        loss, differences = write_tables(layout, out)
        if asked is None and (mixture := run_table.several_rules(loss)) is not None:
            for _, rows in loss.groupby("rules"):
                _print_losses(rows, differences, console)
            console.print(f"[yellow]no laws:[/] {escape(mixture)}", highlight=False, soft_wrap=True)
            there = set(storage.names(layout.tables)) & {"fits.csv", "optimum.csv"}
            earlier = f"; {' and '.join(sorted(there))} are of an earlier export" if there else ""
            console.print(f"tables in {layout.tables}{earlier}", highlight=False, soft_wrap=True)
            return
        source = studies.of_grid(os.fspath(layout.root), rules=asked, loss=loss, allow_confounded=allow_confounded)
        fits = studies.fit(source)
        tables = write_fits(fits, out)
        for one in fits.fitted:
            _draw(out, source.name, one)
    _print(source, fits, tables, differences, console)
    if left := len(loss) - len(source.loss):
        console.print(f"{left} runs under other rules are in the tables, and in no law", highlight=False)
    console.print(f"tables in {layout.tables}, pictures in {layout.figures}")


def write_of_table(source: Source, console: Console) -> None:
    """Tables, laws, cheapest heads and pictures of a table of runs, beside it; prints the answer. ConfigError: no laws."""
    fits = studies.fit(source)
    fits.at(None)
    layout = studies.beside(source.table)
    with outputs(layout) as out:
        write_table(out.tables / "loss.csv", lambda path: source.loss.to_csv(path, index=False))
        tables = write_fits(fits, out)
        for one in fits.fitted:
            _draw(out, source.name, one)
    for context, why in fits.unfitted.items():
        console.print(f"context {context}: no fit: {why}")
    for one in fits.fitted:
        print_laws(one, tables[0][tables[0]["context"] == one.context], console)
    console.print(map_screen(tables[1], source.convention))
    console.print(f"tables in {layout.tables}, pictures in {layout.figures}", highlight=False, soft_wrap=True)


def write_tables(layout: Layout, out: Layout) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes tables/loss, cost, evaluations and differences as CSV and Parquet; returns the first and the last."""
    root = layout.root
    loss, differences = results.load_results(root), results.load_differences(root)
    written = {"loss": loss, "cost": results.load_costs(root), "evaluations": results.load_evaluations(root)}
    for name, table in (written | {"differences": differences}).items():
        write_table(out.tables / f"{name}.csv", lambda path, table=table: table.to_csv(path, index=False))
        write_table(out.tables / f"{name}.parquet", lambda path, table=table: table.to_parquet(path, index=False))
    return loss, differences


def write_table(path: epath.PathLike, write: Callable[[Path], None]) -> None:
    """`write` to a temporary file beside `path`, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_fits(fits: Fits, out: Layout) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Writes tables/fits.csv and tables/optimum.csv, of every training context that has laws; returns both, or None."""
    if not fits.fitted:
        return None
    laws = pd.concat([fit_table(one) for one in fits.fitted], ignore_index=True)
    optima = pd.concat([map_table(one) for one in fits.fitted], ignore_index=True)
    write_table(out.tables / "fits.csv", lambda path: laws.to_csv(path, index=False))
    write_table(out.tables / "optimum.csv", lambda path: optima.to_csv(path, index=False))
    return laws, optima


def fit_table(one: Fitted) -> pd.DataFrame:
    """One row per H: context, rules of the runs, n_heads, n_kv_heads, a, b, entropy with the ends of their 95% intervals,
    r_squared, points, sigma, status, warnings.
    """
    laws = one.laws
    frame = laws.intervals()
    frame.insert(0, "context", one.context)
    frame.insert(1, "rules", _rules_of(one))
    frame["n_heads"] = frame["n_heads"].astype("Int64")
    frame["r_squared"] = [law.r_squared for law in laws.values()]
    frame["points"] = [len(law.loss) for law in laws.values()]
    frame["sigma"], frame["status"] = laws.sigma, laws.status
    common = list(dict.fromkeys([*laws.warnings, *(w for law in laws.values() for w in law.warnings)]))
    frame["warnings"] = "; ".join(common)
    return frame


def _rules_of(one: Fitted) -> str | None:
    """The rules of the runs, which are those of all; None: of other people's runs."""
    known = one.rows["rules"].dropna() if "rules" in one.rows else ()
    return str(known.iloc[0]) if len(known) else None


def map_table(one: Fitted) -> pd.DataFrame:
    """Every H for every loss and served context: `gqa_jax.search.optimum.optimum_map`; context and rules of the training."""
    frame = optimum.optimum_map(one.laws, one.losses, one.contexts_served, convention=one.convention)
    frame.insert(0, "context", one.context)
    frame.insert(1, "rules", _rules_of(one))
    return frame.sort_values(
        ["context", "loss", "context_served", "rank"], ascending=[True, False, True, True], ignore_index=True
    )


def _print(
    source: Source,
    fits: Fits,
    tables: tuple[pd.DataFrame, pd.DataFrame] | None,
    differences: pd.DataFrame,
    console: Console,
) -> None:
    if source.rules == rules.OLD and not source.asked:
        console.print(rules.SAID, highlight=False, soft_wrap=True)
    if len(commits := source.loss["commit"].dropna().unique()) > 1:
        names = ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in commits)
        console.print(f"[yellow]warning:[/] cells were trained by {len(commits)} commits: {names}")
    for context, why in fits.unfitted.items():
        console.print(f"context {context}: no fit: {why}")
    if tables is None:
        return
    _print_losses(source.loss, differences, console)
    for one in sorted(fits.fitted, key=lambda one: one.context):
        print_laws(one, tables[0][tables[0]["context"] == one.context], console)
    console.print(map_screen(tables[1], source.convention))


def _print_losses(loss: pd.DataFrame, differences: pd.DataFrame, console: Console) -> None:
    console.print(loss_screen(loss))
    if len(compared := studies.to_best(loss, differences)):
        console.print(differences_screen(compared))


def print_laws(one: Fitted, table: pd.DataFrame, console: Console) -> None:
    """The laws of one training context, and what is doubtful about them."""
    laws = one.laws
    noise = "no degrees of freedom for noise" if not np.isfinite(laws.sigma) else f"a run's noise {laws.sigma:.4f} nats"
    shared = "one E for all" if laws.shared_entropy else "an E per H"
    console.print(
        f"[bold]Trained at T = {one.context:,}[/]: L(N; H) = (a / N)^b + E, {shared}; {laws.status}, {noise}; intervals: "
        f"{posterior.PROFILES}",
        highlight=False,
    )
    console.print(fit_screen(table))
    if (said := further_size(one)) is not None:
        console.print(said, highlight=False)
    if laws.design is not None:
        console.print(str(laws.design), highlight=False)
    for warning in dict.fromkeys([*laws.warnings, *laws.doubted, *(w for law in one.laws.values() for w in law.warnings)]):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def further_size(one: Fitted) -> str | None:
    """By how much one more size would narrow the intervals of N* at the middle one of the losses that are asked for.

    None where the noise of a run is not known from runs.
    """
    laws, there = one.laws, one.rows
    if not np.isfinite(laws.sigma) or any(block.known_sigma is not None for block in laws.blocks) or not one.losses:
        return None
    trained = None
    if "tokens" in there and there["tokens"].notna().all() and len(there):
        trained = (run_table.column(there, studies.COUNT), run_table.column(there, "tokens"))
    loss = sorted(one.losses)[len(one.losses) // 2]
    try:
        return planning.sentence(planning.one_more_size(laws, loss, trained=trained), loss)
    except ValueError as error:  # no draw of the laws falls with size
        return f"what one more size would tell is not known: {error}"


def print_checks(one: Fitted, console: Console) -> None:
    """How the laws do on runs that they have not seen."""
    if one.rows.empty:
        return
    frame, missing = validation.hold_out_all(one.rows)
    said = [*without_checks(missing), *validation.lack_of_fit(one.laws, one.rows).warnings]
    if not frame.empty:
        view = Table(
            title="Held-out runs: predicted minus measured loss, nats per token", title_justify="left", box=box.SIMPLE_HEAD
        )
        for name in ("held out", "model", "runs", "mean", "rms", "worst", "inside 95%"):
            view.add_column(name, justify="left" if name in ("held out", "model") else "right")
        for row in validation.summary(frame).itertuples():
            errors = [f"{x:+.4f}" for x in (row.mean_error, row.rms_error, row.worst_error)]
            errors[1] = errors[1].lstrip("+")
            inside = "" if pd.isna(row.covered) else f"{row.covered:.0%}"
            view.add_row(
                row.scheme.replace("_", " "), row.model.replace("_", " "), f"{row.predicted} of {row.runs}", *errors, inside
            )
        console.print(view)
    for sentence in said:
        console.print(f"[yellow]warning:[/] {sentence}", highlight=False)


def without_checks(missing: Sequence[str]) -> list[str]:
    """Why schemes of held-out runs could not be carried out, each reason once."""
    return [f"no held-out check: {why}" for why in dict.fromkeys(text.partition(": ")[2] or text for text in missing)]


def loss_screen(loss: pd.DataFrame) -> Table:
    """Losses by context, heads and size; what ± is, and which rules they are under where a row says."""
    ruled = loss["rules"].dropna().unique() if "rules" in loss else ()
    under = f" under {ruled[0]}" if len(ruled) == 1 else ""

    def text(row) -> str:
        if pd.isna(row.loss):
            return row.status
        return f"{row.loss:.4f}" + ("" if pd.isna(row.loss_sem) else f" ± {row.loss_sem:.4f}")

    error = studies.of_documents(loss) or "over documents"
    return _by_size(loss, text, f"Held-out loss{under}, nats per token (± standard error {error})")


def differences_screen(compared: pd.DataFrame) -> Table:
    """`studies.to_best` by context, heads and size."""

    def text(row) -> str:
        error = "" if pd.isna(row.standard_error) else f" ± {row.standard_error:.4f}"
        return "best" if row.cell == row.best else f"{row.difference:+.4f}{error}"

    return _by_size(compared, text, "Above the best heads of the size, nats per token (± standard error, paired by documents)")


def _by_size(rows: pd.DataFrame, text: Callable[[Any], str], title: str) -> Table:
    """A row per context and heads, a column per size; several runs of both in a cell."""
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    pivot: dict[tuple, dict[str, list[str]]] = {}
    for row in rows.itertuples():
        by_size = pivot.setdefault((row.context, row.n_heads, row.n_kv_heads), {})
        by_size.setdefault(row.size, []).append(text(row))
    sizes = list(dict.fromkeys(rows.sort_values("params_non_embedding")["size"]))
    for name in ("context", "heads", *sizes):
        view.add_column(name, justify="right")
    for (context, n_heads, n_kv), by_size in sorted(pivot.items()):
        view.add_row(f"{context:,}", f"({n_heads},{n_kv})", *(", ".join(by_size.get(size, ())) for size in sizes))
    return view


def fit_screen(table: pd.DataFrame) -> Table:
    """Coefficients with their intervals."""
    view = Table(box=box.SIMPLE_HEAD)
    for name in ("heads", "a", "b", "E", "R²", "runs"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in table.itertuples():
        view.add_row(
            heads_text(row.n_heads, row.n_kv_heads),
            f"{short(row.a)}{_range(row.a_low, row.a_high, short)}",
            f"{row.b:.4f}{_range(row.b_low, row.b_high, '{:.4f}'.format)}",
            f"{row.entropy:.4f}{_range(row.entropy_low, row.entropy_high, '{:.3f}'.format)}",
            f"{row.r_squared:.5f}",
            str(row.points),
        )
    return view


def map_screen(table: pd.DataFrame, convention: str) -> Table:
    """The answer for every loss and served context."""
    view = Table(
        title=f"Cheapest heads (n_h, n_kv) by Z, {convention} convention, and the probability that no other H is cheaper; "
        "* N* outside the trained sizes",
        title_justify="left",
    )
    served = sorted(table["context_served"].unique())
    for name in ("trained at", "loss", *(f"served {formatting.context(int(c))}" for c in served)):
        view.add_column(name, justify="right")
    for (context, loss), rows in table.groupby(["context", "loss"], sort=False):
        cells = {row.context_served: _winner(row) for row in rows[rows["rank"] == 1].itertuples()}
        view.add_row(f"{context:,}", f"{loss:.3f}", *(cells.get(c, "not reached") for c in served))
    return view


def print_answer(found: Answer, one: Fitted, console: Console) -> None:
    """One question's answer: a sentence, the candidates, models to build, warnings."""
    unit = f" {found.objective['unit']}" if found.objective["unit"] else ""
    if one.laws.source:
        console.print(one.laws.source, highlight=False)
    n = f"{short(found.n_params)} parameters{_range(*found.n_params_interval, short)}"
    sure = found.probability
    said = "" if np.isnan(sure) else f"; no other is cheaper with a probability of {probability(sure)}"
    console.print(
        f"\n[bold]{heads_text(*found.heads)}[/] query and key/value heads, {n}{said}",
        f"loss {found.loss:g} served at {found.context_served:,} tokens: {found.objective['label']} {si(found.cost)}{unit}"
        f"{_range(*found.cost_interval, si)}",
        sep="\n", highlight=False,
    )  # fmt: skip
    if not np.isnan(found.saving):
        saves = "saves" if found.saving >= 0 else "costs more by"
        console.print(
            f"{saves} {abs(found.saving):.1%}{_range(*found.saving_interval, '{:.1%}'.format)} against Llama 3's "
            "heads at the same loss",
            highlight=False,
        )
    if found.runner_up is not None and not np.isnan(found.regret_of_runner_up):
        console.print(
            f"next best {heads_text(*found.runner_up)}: expected to cost {regret(found.regret_of_runner_up)} more than the "
            f"cheapest (this answer {regret(found.expected_regret)})",
            highlight=False,
        )
    for sentence in serving_screens.said(found):
        console.print(sentence, highlight=False)
    if found.noise_model:
        price = "" if np.isnan(found.price_of_doubt) else f"; {found.price_of_doubt:.1f} times as wide as for a power law alone"
        console.print(f"intervals: {found.noise_model}{price}", highlight=False)
    console.print(_candidates_screen(found))
    built = ", ".join(
        f"{row.n_layers} x {row.d_model} (loss {row.loss:.3f}, {si(row.cost)}{unit})" for row in found.buildable.itertuples()
    )
    console.print(f"closest models, layers x hidden size: {built}", highlight=False)
    for warning in found.warnings:
        if warning != one.laws.source:
            console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def _candidates_screen(found: Answer) -> Table:
    unit = found.objective["unit"]
    view = Table(box=box.SIMPLE_HEAD)
    for name in (
        "heads",
        "N*, 95%",
        "L x d",
        f"cost{f', {unit}' if unit else ''}, 95%",
        "P(cheapest)",
        "expected regret",
        "vs Llama 3",
        "N* against trained sizes",
    ):
        view.add_column(name, justify="left" if name.startswith("N* a") else "right", no_wrap=not name.startswith("N* a"))
    for row in found.candidates.itertuples():
        if not np.isfinite(row.cost):
            view.add_row(heads_text(row.n_heads, row.n_kv_heads), "", "", "", "", "", "", row.note)
            continue
        view.add_row(
            heads_text(row.n_heads, row.n_kv_heads),
            f"{short(row.n_params)}{_range(row.n_params_low, row.n_params_high, short)}",
            f"{row.n_layers:.1f} x {row.d_model:.0f}",
            f"{si(row.cost)}{_range(row.cost_low, row.cost_high, si)}",
            "" if np.isnan(row.probability) else probability(row.probability),
            regret(row.expected_regret),
            "" if np.isnan(row.saving) else f"{-row.saving:+.1%}",
            "" if pd.isna(row.note) else row.note.removeprefix("extrapolated: ").removesuffix(" the trained sizes"),
        )
    return view


def conventions_screen(frame: pd.DataFrame) -> Table:
    """`gqa_jax.search.optimum.convention_sensitivity`."""
    view = Table(
        title="The answer by Z in other conventions, and what the first one would cost there",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("FLOPs of", "memory in", "heads", "P(cheapest)", "vs Llama 3", "regret of the first"):
        view.add_column(name, justify="right")
    for row in frame.itertuples():
        known = ["" if np.isnan(x) else f"{x:.1%}" for x in (row.probability, -row.saving)]
        view.add_row(row.flops, row.memory, heads_text(row.n_heads, row.n_kv_heads), *known, regret(row.regret))
    return view


def heads_text(n_heads: int | None, n_kv_heads: int) -> str:
    """(8,1), (d/d_h,8) where query heads fill the width, (d/d_h,n_h/4) where key/value heads do in groups of 4."""
    return str(Heads(None if n_heads is None or pd.isna(n_heads) else int(n_heads), int(n_kv_heads)))


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    if np.isnan(low) or np.isnan(high):
        return ""
    return f" ({text(low)} to {'more' if high > ASTRONOMICAL else text(high)})"


def _winner(row) -> str:
    sure = "" if np.isnan(row.probability) else f" {formatting.percent(row.probability)}"
    return f"{heads_text(row.n_heads, row.n_kv_heads)}{sure} N={short(row.n_params)}" + ("" if pd.isna(row.note) else "*")


def _draw(layout: Layout, name: str, one: Fitted) -> None:
    trained = f"trained at T = {formatting.context(one.context)}"
    ax = plots.loss_vs_params(one.laws, title=f"{name}: loss against size, {trained}")
    plots.save(ax.figure, layout.figures / f"loss-params-t{one.context}")
    if one.rows["d_model"].isna().any():
        return  # without shapes there are no costs of the runs
    for served in _few(one.contexts_served):
        ax = plots.loss_vs_cost(
            one.rows,
            one.laws,
            served,
            convention=one.convention,
            title=f"{name}: loss against cost at {formatting.context(served)}, {trained}",
        )
        plots.save(ax.figure, layout.figures / f"loss-cost-t{one.context}-served{served}")


def _few(contexts: Sequence[int]) -> list[int]:
    return sorted({contexts[0], contexts[-1]})
