"""A study: runs of a grid, of a table or of the paper, the laws of each training context, and what is asked of them.

study = gqa_jax.load_study("runs/quickstart")       # a grid's folder, also gs://; a .csv or .parquet table; "paper"
study.answer(1.75, "128K"), study.map(), study.curves(), study.compare(gqa_jax.load_study("runs/other"))
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import errors, formatting, results, storage
from gqa_jax.costs import solve_shape
from gqa_jax.differences import load_differences_between
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted
from gqa_jax.laws import Heads, LawsByHeads, external, fit_by_heads
from gqa_jax.laws import runs as run_table
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.search.candidates import about

PAPER_LOSSES = (3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35)  # rows of its Table 4
PAPER_CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072)  # and its columns
COUNT = "params_non_embedding"


@dataclass(frozen=True)
class Source:
    """What laws are fitted to, and what is asked of them."""

    name: str
    loss: pd.DataFrame  # gqa_jax.results.LOSS_COLUMNS
    contexts_served: Sequence[int]
    losses: Sequence[float]  # empty: chosen from what was reached
    convention: str
    laws: LawsByHeads | None = None  # of a preset: not fitted here
    allow_confounded: bool = False  # laws also where heads of a size saw more tokens than others


@dataclass(frozen=True)
class Fitted:
    """The laws of one training context, and the questions that are put to them."""

    context: int
    rows: pd.DataFrame  # of the loss table: those that were fitted
    laws: LawsByHeads
    losses: Sequence[float]
    contexts_served: Sequence[int]
    convention: str

    @property
    def noise(self) -> float:
        """What runs scatter about the laws by, as a share of what the loss falls by from the smallest size to the largest.

        The median H's. Nats alone would prefer losses that do not fall at all; infinite where the noise is not known.
        """
        falls = [law.predict(law.params.min()) - law.predict(law.params.max()) for law in self.laws.values()]
        fall = float(np.median(falls))
        return self.laws.sigma / fall if fall > 0 and np.isfinite(self.laws.sigma) else np.inf


@dataclass(frozen=True)
class Fits:
    """Every training context of a source, the one of least noise first (`by_noise`); why others have no laws."""

    fitted: list[Fitted]
    unfitted: dict[int, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """Which laws answer where no training context is named, and why these; empty where there is no choice."""
        return f"laws of runs trained at {self.fitted[0].context:,} tokens: {self.reason}" if self.reason else ""

    @property
    def reason(self) -> str:
        """Why these laws answer where no training context is named; empty where there is no choice."""
        if len(self.fitted) < 2:
            return ""
        first, *others = self.fitted
        if not np.isfinite(first.noise):
            return "of no training context the noise is known, and this one has most runs, or the longest"
        noise = f"their noise, {first.laws.sigma:.4f} nats, is {first.noise:.1%} of what the loss falls by with size"
        if round(first.noise, 3) == round(others[0].noise, 3):
            return f"{noise}, as at {others[0].context:,}, and they are of more runs, or longer ones"
        shares = [f"{one.noise:.1%}" if np.isfinite(one.noise) else "not known" for one in others]
        named = ", ".join(f"{one.context:,}: {share}" for one, share in zip(others, shares, strict=True))
        return f"{noise}, the least of {len(self.fitted)} training contexts ({named})"

    def at(self, context: int | None) -> Fitted:
        """The one of that training context; the one of least noise where none is named. Raises ConfigError."""
        if context is None:
            if not self.fitted:
                why = "; ".join(f"trained at {c}: {reason}" for c, reason in self.unfitted.items())
                raise ConfigError(f"no law can be fitted: {why}")
            return self.fitted[0]
        for one in self.fitted:
            if one.context == context:
                return one
        if context in self.unfitted:
            raise ConfigError(f"training context {context}: no law can be fitted: {self.unfitted[context]}")
        known = sorted([one.context for one in self.fitted] + list(self.unfitted))
        raise ConfigError(f"training context {context}: no run was trained there; there are {', '.join(map(str, known))}")


def by_noise(fitted: Sequence[Fitted]) -> list[Fitted]:
    """The laws of least noise (`Fitted.noise`) first; where it is the same, those of most runs, then of the longest context."""
    return sorted(fitted, key=lambda one: (round(one.noise, 3), -len(one.rows), -one.context))


# Where runs come from


def from_preset(name: str) -> Source:
    """The paper's data (`gqa_jax.search.presets`). Raises ValueError for an unknown name."""
    laws = presets.load(name)
    table = results.typed(presets.paper_losses() if name == "paper" else pd.DataFrame(), results.LOSS_COLUMNS)
    return Source(name, table, PAPER_CONTEXTS, PAPER_LOSSES, "figures", laws=laws)


def from_table(
    path: os.PathLike | str, columns: Mapping[str, str] | None = None, *, allow_confounded: bool = False, **options: Any
) -> Source:
    """The runs of any trainer: a .csv or .parquet file. `columns`, `options` and errors are those of `external.load_table`."""
    loss = external.load_table(path, columns, **options)
    extra = [name for name in loss.columns if name not in {column.name for column in results.LOSS_COLUMNS}]
    typed = results.typed(loss.assign(**{COUNT: loss[COUNT].round()}), results.LOSS_COLUMNS)
    labels = run_table.size_labels(typed)
    names = pd.Series(run_table.size_names(typed, labels), dtype="string")[labels].to_numpy()
    typed["size"] = typed["size"].fillna(pd.Series(names, typed.index, dtype="string"))
    table = typed.assign(**{name: loss[name] for name in extra})
    return Source(Path(path).stem, table, _served(loss), (), "figures", allow_confounded=allow_confounded)


def from_folder(root: os.PathLike | str, loss: pd.DataFrame | None = None, *, allow_confounded: bool = False) -> Source:
    """The runs of a grid's folder, local or gs://, and what its grid.json asks.

    loss: its loss table, where that has been read already. Raises ConfigError where nothing is there, or nothing has finished.
    """
    root = storage.path(root)
    facts = results.find_grid(root) or {}
    name = facts.get("name", root.name)
    try:
        loss = results.load_results(root) if loss is None else loss
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: give the folder of a grid that was run, a table (.csv, .parquet) or a preset") from error
    if loss.empty:
        raise ConfigError(f"no cell of {name} has finished in {root}: run it first")
    served = facts.get("contexts_served") or _served(loss)
    convention = facts.get("convention", "figures")
    return Source(name, loss, served, facts.get("losses") or (), convention, allow_confounded=allow_confounded)


def _served(loss: pd.DataFrame) -> list[int]:
    """Those that were trained at, and the paper's."""
    return sorted({int(c) for c in loss["context"].dropna().unique()} | set(PAPER_CONTEXTS))


def fit(source: Source, **options: Any) -> Fits:
    """The laws of every training context; H that have too few sizes yet are left out, and said in their warnings.

    options: of `gqa_jax.laws.fit_by_heads`. Raises ConfigError where they are for the laws of a preset.
    """
    if source.laws is not None:
        if options:
            raise ConfigError(f"the laws of preset {source.name} are as they are; {', '.join(options)} is for runs of your own")
        laws, asked = source.laws, (list(source.losses), list(source.contexts_served), source.convention)
        return Fits([Fitted(laws.context, source.loss, laws, *asked)])
    fitted, unfitted = [], {}
    run_table.require_one_rule(source.loss)  # also between training contexts, whose laws are fitted apart
    for context, rows in source.loss.groupby("context"):
        said: list[str] = []
        try:
            usable, _ = run_table.by_rule(run_table.usable(rows)[0])
            chosen, said = run_table.fittable(usable)  # sizes that one H lacks are no reason to know nothing of the others
            if chosen.empty:
                raise ValueError("; ".join(said))
            left_out = usable.index.difference(chosen.index)
            laws = fit_by_heads(rows.drop(left_out), allow_confounded=source.allow_confounded, **options)
        except ValueError as error:
            unfitted[int(context)] = str(error)
            continue
        laws.warnings = (*laws.warnings, *said)
        losses = list(source.losses) or reachable(laws)
        fitted.append(Fitted(int(context), chosen, laws, losses, list(source.contexts_served), source.convention))
    return Fits(by_noise(fitted), unfitted)


def reachable(laws: LawsByHeads) -> list[float]:
    """Three losses that every H reaches inside the sizes it was trained at, where the ranges overlap; else their middle."""
    low = max(law.predict(law.params.max()) for law in laws.values())
    high = min(law.predict(law.params.min()) for law in laws.values())
    if low >= high:
        return [round(float((low + high) / 2), 3)]
    return [round(float(x), 3) for x in np.linspace(high, low, 5)[1:4]]


# What a notebook holds


def load_study(
    source: os.PathLike | str,
    columns: Mapping[str, str] | None = None,
    *,
    units: str | None = None,
    context: int | None = None,
    heads_rule: str | None = None,
    rules: str | None = None,
    allow_confounded: bool = False,
    **options: Any,
) -> Study:
    """The study of a grid's folder (local or gs://), of a table of runs of any trainer, or of a preset.

    Args:
      source: the folder; a .csv or .parquet file; or "paper", "paper-table4" (`gqa_jax.search.presets`).
      columns, units, context, heads_rule: of a table, as in `gqa_jax.load_table`.
      rules: of a folder with runs under several rules: those that are taken, as its column `rules` has them.
      allow_confounded, options: of `gqa_jax.laws.fit_by_heads`, as entropy=1.9; not for presets.

    Raises:
      ConfigError: nothing is there, nothing has finished, a file that is no table of runs, an option that is not for this
        source, or several sources.
      ValueError: without `rules`, runs under several.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"{source!r} is not one source: give a folder, a table or a preset. The runs of a preset and your own are of other "
            "data and recipes, so no law holds for both: load two studies, and study.compare(other)"
        )
    name = os.fspath(source)
    given = {"columns": columns, "units": units, "context": context, "heads_rule": heads_rule}
    given = {key: value for key, value in given.items() if value is not None}
    if name in presets.PRESETS:
        own = given | ({"rules": rules} if rules else {}) | ({"allow_confounded": True} if allow_confounded else {}) | options
        if own:
            raise ConfigError(
                f"the laws of preset {name} are as they are: {', '.join(own)} is for runs of your own, and these are not mixed "
                f"with the paper's. Load them apart, and study.compare(other); a folder of that name is ./{name}"
            )
        return Study(name, from_preset(name), fit(from_preset(name)))
    if name.endswith(".py"):
        raise ConfigError(f"{name} is a grid file: give the folder that it was run in, like runs/{Path(name).stem}")
    if external.is_table(name):
        if rules is not None:
            raise ConfigError(f"rules = {rules!r} is for the folder of a grid: {name} is a table, choose its rows")
        found = from_table(name, allow_confounded=allow_confounded, **given)
        return Study(found.name, found, fit(found, **options))
    if given:
        raise ConfigError(f"{', '.join(given)} is for a table of runs (.csv, .parquet), and {name} is none")
    found = from_folder(name, allow_confounded=allow_confounded)
    if rules is not None:
        rows = found.loss[found.loss["rules"].eq(rules).fillna(False).astype(bool)]
        if rows.empty:
            there = ", ".join(sorted(found.loss["rules"].dropna().unique()))
            raise ConfigError(f"rules = {rules!r}: no run in {name} is under these rules; there are {there}")
        found = dataclasses.replace(found, loss=rows)
    return Study(found.name, found, fit(found, **options), folder=name)


@dataclass(frozen=True, repr=False)
class Study:
    """Runs, their laws, and what is asked of them. Made by `load_study`.

    Where a method takes `train_context`, None is the training context whose laws have the least noise: `why` says which.
    """

    name: str
    source: Source
    fits: Fits
    folder: str | None = None  # of a grid: where its runs lie

    @property
    def runs(self) -> pd.DataFrame:
        """The loss table (`gqa_jax.results.LOSS_COLUMNS`); empty for presets that are no runs."""
        return self.source.loss

    @property
    def laws(self) -> LawsByHeads:
        """Those of `context`. Raises ConfigError where no training context has any."""
        return self.at().laws

    @property
    def context(self) -> int:
        """The training context whose laws answer where none is named."""
        return self.at().context

    def at(self, train_context: int | None = None) -> Fitted:
        """A training context: its laws, the `rows` that they were fitted to, and what is asked of them. Raises ConfigError."""
        return self.fits.at(train_context)

    @property
    def contexts(self) -> dict[int, LawsByHeads]:
        """The laws of every training context that has some, the one of least noise first."""
        return {one.context: one.laws for one in self.fits.fitted}

    @property
    def why(self) -> str:
        """Why the laws of `context` answer; empty where there is no choice."""
        return self.fits.why

    def answer(
        self,
        loss: float,
        context: int | str,
        cost: str | objectives.Objective = "z",
        device: str | None = None,
        *,
        train_context: int | None = None,
        **options: Any,
    ) -> optimum.Answer:
        """The cheapest heads that reach `loss` where `context` tokens are served (`gqa_jax.search.optimum.search`).

        Args:
          loss: nats per token, as in the runs. context: tokens, like 131072 or "128K".
          cost: z, flops, memory, latency, price, throughput, train or lifetime, or an objective made already.
          device: that costs in seconds or money are of (`gqa_jax.hardware.CHIPS`).
          options: settings of that cost (`objectives.make`: batch=8, decode_share=0.1), and arguments of `search`.
        """
        one = self.at(train_context)
        objective, rest = _asked(one, cost, device, options, optimum.search)
        return optimum.search(one.laws, loss, _tokens(context), objective, **rest)

    def map(
        self,
        losses: Sequence[float] | None = None,
        contexts: Sequence[int | str] | None = None,
        cost: str | objectives.Objective = "z",
        device: str | None = None,
        *,
        train_context: int | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Every H for every loss and served context, rank 1 the answer (`gqa_jax.search.optimum.optimum_map`).

        losses, contexts: None for those that the grid asks. The rest as in `answer`; `plots.optimum_map` draws it.
        """
        one = self.at(train_context)
        objective, rest = _asked(one, cost, device, options, optimum.optimum_map)
        served = one.contexts_served if contexts is None else [_tokens(context) for context in contexts]
        return optimum.optimum_map(one.laws, one.losses if losses is None else losses, served, objective, **rest)

    def curves(
        self,
        context: int | str | None = None,
        cost: str | objectives.Objective = "z",
        device: str | None = None,
        *,
        points: int = 60,
        until: float | None = None,
        train_context: int | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Loss against size and cost, to draw from: `points` sizes per H, of models shaped as those that were trained.

        Args:
          context: tokens served, of the cost (default: the longest that the grid asks for). cost, device: as in `answer`.
          until: largest N (default: four times the largest trained of an H); the smallest is the smallest trained.
          options: settings of the cost.

        Returns:
          columns n_heads (empty: d / d_h), n_kv_heads, n_params, loss, low and high (95% of the law at this N; nan where the
          noise is not known), trained (whether N lies between trained sizes), n_layers, d_model, context_served, cost (inf:
          can't be served).
        """
        one = self.at(train_context)
        laws, served = one.laws, max(one.contexts_served) if context is None else _tokens(context)
        objective, _ = _asked(one, cost, device, options, None)
        if points < 2:
            raise ValueError(f"points = {points}: a curve needs 2 or more")
        frames = []
        for heads, law in laws.items():
            least, most = law.params.min(), law.params.max()
            n_params = np.geomspace(least, 4 * most if until is None else until, points)
            low, high = laws.band(heads, n_params)
            shape = solve_shape(n_params, heads, laws.aspect, *about(laws))
            trained = (n_params >= least * (1 - 1e-9)) & (n_params <= most * (1 + 1e-9))
            columns = {"n_params": n_params, "loss": law.predict(n_params), "low": low, "high": high, "trained": trained}
            columns |= {"n_layers": shape.n_layers, "d_model": shape.d_model, "context_served": served}
            frames.append(pd.DataFrame(heads._asdict() | columns | {"cost": objective(shape, served)}, index=range(points)))
        return pd.concat(frames, ignore_index=True).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})

    def compare(
        self,
        other: Study,
        loss: float | None = None,
        context: int | str | None = None,
        cost: str | objectives.Objective = "z",
        device: str | None = None,
        *,
        train_context: int | None = None,
        **options: Any,
    ) -> Comparison:
        """Two studies: how far their runs of the same heads and size are from each other, and what each would answer.

        Args:
          loss: of the question that both are asked (default: the middle of the losses that this grid asks). The rest as in
            `answer`; context: the longest that this grid asks for.
        """
        one = self.at(train_context)
        loss = one.losses[len(one.losses) // 2] if loss is None else loss
        context = max(one.contexts_served) if context is None else _tokens(context)
        both = (self, other)
        at = [one, other.at(train_context if train_context in other.contexts else None)]
        found, notes = [], _not_alike(self, other)
        for study, fitted in zip(both, at, strict=True):
            try:
                found.append(study.answer(loss, context, cost, device, train_context=fitted.context, **options))
            except ValueError as error:
                found.append(None)
                notes.append(f"{study.name} has no answer: {error}")
        rows = []
        for i, (study, fitted, answer) in enumerate(zip(both, at, found, strict=True)):
            row = {"study": study.name, "train_context": fitted.context, "loss": loss, "context_served": context}
            rows.append(row if answer is None else row | _answered(answer, found[1 - i]))
        answers = pd.DataFrame(rows, columns=[*row, *ANSWERED]).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
        return Comparison(self.name, other.name, _compared(self, other), answers, tuple(dict.fromkeys(notes)))

    def __repr__(self) -> str:
        trained = ", ".join(f"{context:,}" for context in sorted([*self.contexts, *self.fits.unfitted]))
        runs = counted(len(self.runs), "run") if len(self.runs) else "no runs"
        return f"<Study {self.name}: {runs} trained at {trained} tokens>"

    def table(self) -> pd.DataFrame:
        """One row per training context: context, runs, heads, sizes, R^2 of the least explained H, sigma, E, default, note."""
        rows = []
        for one in self.fits.fitted:
            laws = one.laws
            sizes = {round(float(n)) for law in laws.values() for n in law.params}
            rows.append(
                {"context": one.context, "runs": sum(len(law.loss) for law in laws.values()), "heads": len(laws),
                 "sizes": max(len(np.unique(law.params)) for law in laws.values()), "models": len(sizes),
                 "least_r_squared": min(law.r_squared for law in laws.values()), "sigma": laws.sigma,
                 "entropy": laws.blocks[0].entropy if laws.shared_entropy else np.nan, "default": one is self.fits.fitted[0],
                 "note": ""}
            )  # fmt: skip
        for context, why in self.fits.unfitted.items():
            rows.append(
                {"context": context, "runs": int((self.runs["context"] == context).sum()), "default": False, "note": why}
            )
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """What is known, in a few lines of text."""
        lines = [f"{self.name}: {self._said()}"]
        for row in self.table().to_dict("records"):
            at = f"trained at {row['context']:,}: "
            lines.append(at + (row["note"] or _known(row)))
        return "\n".join([*lines, *([f"answers are of {self.why}"] if self.why else [])])

    def _said(self) -> str:
        return self.source.laws.source if self.source.laws is not None else counted(len(self.runs), "run")

    def _repr_html_(self) -> str:
        table = self.table()
        shown = pd.DataFrame(
            {
                "trained at": table["context"].map("{:,}".format),
                "laws": [row["note"] or _known(row) for row in table.to_dict("records")],
            }
        )
        said = f"<p>Answers are of {html.escape(self.why)}.</p>" if self.why else ""
        return (
            f"<p><b>{html.escape(self.name)}</b>: {html.escape(self._said())}</p>{shown.to_html(index=False, border=0)}{said}"
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `Study.compare` found of two studies.

    Attributes:
      runs: a row for every training context, H and size that both have: context, size, n_heads, n_kv_heads, n_params,
        loss, other_loss (means over seeds), difference (loss minus other_loss), standard_error (by the choice of documents:
        paired where both were evaluated on the same; nan where it is not known), noise (standard deviation of the difference
        between two runs of the same configuration, by what both studies' runs scatter about their laws), n_runs,
        other_n_runs, note.
      answers: a row for each study: study, train_context, loss, context_served and ANSWERED. `regret_of_other` is by this
        study's laws: what the heads of the other's answer are expected to cost more than the cheapest.
      notes: sentences on what the comparison can't tell.
    """

    name: str
    other: str
    runs: pd.DataFrame
    answers: pd.DataFrame
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Both tables in words."""
        lines = [f"{self.name} against {self.other}: {len(self.runs)} configurations are in both"]
        if len(known := self.runs["difference"].dropna()):
            spread = f"{known.mean():+.4f} nats on average, from {known.min():+.4f} to {known.max():+.4f}"
            lines.append(f"loss of {self.name} minus that of {self.other}: {spread}")
        for row in self.answers.to_dict("records"):
            asked = f"{row['study']} (trained at {row['train_context']:,}) at a loss of {row['loss']:g}, served at "
            asked += formatting.context(row["context_served"])
            if pd.isna(row["n_kv_heads"]):
                lines.append(f"{asked}: no answer")
                continue
            sure = (
                ""
                if np.isnan(row["probability"])
                else f", the cheapest with probability {formatting.probability(row['probability'])}"
            )
            heads = Heads.of(row["n_heads"], row["n_kv_heads"])
            lines.append(f"{asked}: {heads} at {formatting.short(row['n_params'])} parameters{sure}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        return f"<Comparison of {self.name} with {self.other}: {len(self.runs)} configurations in both>"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.summary().splitlines())
        return said + self.runs.to_html(index=False, border=0, na_rep="")


ANSWERED = (
    "n_heads", "n_kv_heads", "n_params", "n_params_low", "n_params_high", "cost", "cost_low", "cost_high", "probability",
    "expected_regret", "regret_of_other",
)  # fmt: skip
COMPARED = (
    "context", "size", "n_heads", "n_kv_heads", "n_params", "loss", "other_loss", "difference", "standard_error", "noise",
    "n_runs", "other_n_runs", "note",
)  # fmt: skip


def _tokens(context: int | str) -> int:
    return formatting.read_context(context) if isinstance(context, str) else int(context)


def _known(row: Mapping[str, Any]) -> str:
    """The laws of a row of `Study.table` in words."""
    nats = f"{row['sigma']:.4f} nats" if np.isfinite(row["sigma"]) else "not known"
    entropy = "an E per H" if np.isnan(row["entropy"]) else f"E = {row['entropy']:.3f}"
    return (
        f"{counted(int(row['runs']), 'run')}, {int(row['heads'])} head configurations at {int(row['sizes'])} sizes; R² from "
        f"{row['least_r_squared']:.4f}, noise {nats}, {entropy}"
    )


def _asked(
    one: Fitted, cost: str | objectives.Objective, device: str | None, options: Mapping[str, Any], search: Any
) -> tuple[objectives.Objective, dict[str, Any]]:
    """The objective of a question, and what is for `search`. Raises ValueError for an option that neither takes."""
    taken = [] if search is None else [
        name for name, one in inspect.signature(search).parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY
    ]  # fmt: skip
    rest = {name: value for name, value in options.items() if name in taken}
    settings = {name: value for name, value in options.items() if name not in taken}
    if search is not None:
        rest.setdefault("convention", one.convention)
    convention = options.get("convention", one.convention)
    if not isinstance(cost, str):
        if settings or device is not None:
            named = ", ".join([*settings, *(["device"] if device is not None else [])])
            raise ValueError(f"{named}: the objective {cost.name} has its settings already; give them where it is made")
        return cost, rest
    allowed = objectives.settings(cost)
    for name in settings:
        if name not in allowed:
            raise ValueError(f"{name} is no option here: {errors.closest(name, [*allowed, *taken])}")
    if "convention" in allowed:
        in_bytes = "convention" not in options and any(name in settings for name in ("param_dtype", "cache_dtype"))
        settings["convention"] = "exact" if in_bytes else convention
    return objectives.make(cost, device=device, **settings), rest


def _answered(answer: optimum.Answer, other: optimum.Answer | None) -> dict[str, Any]:
    """An answer as a row of ANSWERED."""
    best = answer.candidates.iloc[0]
    row = {name: best[name] for name in ANSWERED if name in best}
    regret = np.nan
    if other is not None:
        regret = float(answer.candidates.loc[run_table.have(answer.candidates, other.heads), "expected_regret"].max())
    return row | {"probability": answer.probability, "regret_of_other": regret}  # no probability of an answer that is `far`


def _not_alike(ours: Study, theirs: Study) -> list[str]:
    """What makes losses of two studies no comparison of their models."""
    found, differ = [], {"heldout": "evaluated on other held-out text", "vocab_size": "of another vocabulary"}
    for column, what in (differ | {"unembedding": "of another kind of unembedding"}).items():
        mine, other = ({str(value) for value in one.runs[column].dropna().unique()} for one in (ours, theirs))
        if mine and other and mine != other:
            values = "; ".join(", ".join(sorted(one)) for one in (mine, other))
            found.append(f"the runs are {what} ({values}): their losses differ by that too")
        elif column == "heldout" and not (mine and other):
            found.append("on which text the losses are is not known of both: they may differ by that too")
    return found


def _compared(ours: Study, theirs: Study) -> pd.DataFrame:
    """`Comparison.runs`."""
    keys = ["context", "n_heads", "n_kv_heads"]
    done = [
        one.runs[one.runs["status"].eq("done").fillna(False).astype(bool) & one.runs["loss"].notna()] for one in (ours, theirs)
    ]
    parts = [dict(list(rows.groupby(keys, dropna=False, sort=True))) if len(rows) else {} for rows in done]
    rows, cells = [], []
    for key in (key for key in parts[0] if key in parts[1]):
        mine, others = parts[0][key], parts[1][key]
        labels = run_table.labels_by_count(run_table.column(pd.concat([mine, others]), COUNT))
        mine_at, others_at = labels[: len(mine)], labels[len(mine) :]
        for label in sorted({*mine_at} & {*others_at}):
            a, b = mine[mine_at == label], others[others_at == label]
            sigmas = [one.contexts[key[0]].sigma if key[0] in one.contexts else np.nan for one in (ours, theirs)]
            loss, other_loss = float(a["loss"].mean()), float(b["loss"].mean())
            rows.append(
                dict(zip(keys, key, strict=True))
                | {"size": a["size"].iloc[0], "n_params": int(a[COUNT].iloc[0]), "loss": loss, "other_loss": other_loss,
                   "difference": loss - other_loss, "standard_error": _unpaired(a, b),
                   "noise": float(np.hypot(sigmas[0] / np.sqrt(len(a)), sigmas[1] / np.sqrt(len(b)))),
                   "n_runs": len(a), "other_n_runs": len(b), "note": ""}
            )  # fmt: skip
            cells.append((list(a["cell"]), list(b["cell"])))
    table = pd.DataFrame(rows, columns=list(COMPARED)).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
    if ours.folder is not None and theirs.folder is not None and cells:
        paired = load_differences_between(ours.folder, theirs.folder, cells)
        known = paired["difference"].notna().to_numpy()
        for name in ("difference", "standard_error"):
            table.loc[known, name] = paired.loc[known, name].astype(np.float64)
        table["note"] = paired["note"].fillna("").to_numpy()
    return table.sort_values(["context", "n_params", "n_heads", "n_kv_heads"], ignore_index=True)


def _unpaired(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Of losses on different texts, or of runs that each have their own; nan where the text is common: it cancels in part."""
    texts = {*a["heldout"].dropna()} & {*b["heldout"].dropna()}
    if texts:
        return np.nan
    sems = [run_table.column(one, "loss_sem").max() for one in (a, b)]
    return float(np.hypot(*sems))
