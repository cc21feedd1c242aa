"""L(N; H) = (a / N)^b + E, for every head configuration H (arXiv 2503.09579v2, Eq. 7), with its uncertainty.

E, the entropy of the language, is shared by all H of a context by default: it belongs to the text. A power law with its own E
per H needs more sizes than small grids have, and its E is poorly determined (R^2 says nothing of it: without any E it is
above 0.99 on the paper's own points).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gqa_jax.laws import fitting, shape
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.block import Block, InBlocks, fit_blocks
from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.laws.law import PowerLaw
from gqa_jax.laws.runs import Runs
from gqa_jax.laws.shape import Penalty
from gqa_jax.shapes import FFN_RATIO, Aspect, paper_aspect

if TYPE_CHECKING:
    from gqa_jax.laws.confounding import Design
    from gqa_jax.laws.doubt import Doubts
    from gqa_jax.laws.posterior import Draws

_UNBOUNDED = 70.0  # ln a: no size is 1e30, the end of such an interval is b's lower bound


@dataclasses.dataclass(eq=False, repr=False)
class LawsByHeads(InBlocks[Heads, PowerLaw]):
    """The laws of one training context, one per H, and how sure they are. Made by `fit_by_heads`."""

    blocks: Sequence[Block]  # H that share an E, fitted together: one block, or one per H
    _: dataclasses.KW_ONLY
    context: int  # of training, tokens
    head_dim: float  # as `vocab_size` of the runs, or the paper's where the table has none
    vocab_size: float
    size_convention: str = "figures"  # what N counts (`gqa_jax.costs.CONVENTIONS`): "exact" with norms; "figures" without
    aspect: Aspect = dataclasses.field(default_factory=paper_aspect)  # d / L by N: as trained, else the paper's
    penalty: Penalty = Penalty()  # noqa: RUF009 (frozen): what another d / L costs in loss
    rows: pd.DataFrame | None = None  # of the loss table: the runs that were fitted
    warnings: Sequence[str] = ()  # sentences that every answer from these laws must carry
    llama3: Runs | None = None  # runs of Llama 3's heads where they are no H of their own
    llama3_source: str = ""  # what these are
    source: str = ""  # whose laws these are, where not of your runs
    method: str = "posterior"  # of the draws unless another is asked for
    design: Design | None = None  # what the heads of a size have in common beside it; None where no runs of yours were fitted
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # name of a trained size -> its label
    refit: Callable[[Sequence[tuple[Heads, float, float]]], LawsByHeads] | None = None  # without these runs
    ffn_ratio: float = FFN_RATIO  # hidden size of the feed-forward network over d of the models that are searched

    def __post_init__(self) -> None:
        self.blocks, self.warnings = tuple(self.blocks), tuple(self.warnings)
        self._laws = {heads: law for block in self.blocks for heads, law in block.laws(self.warnings).items()}
        self._draws: dict[tuple, Draws] = {}

    @property
    def shared_entropy(self) -> bool:
        return len(self.blocks) == 1

    @property
    def sigma(self) -> float:
        """Standard deviation of a run's loss about its law, nats per token, pooled; nan without degrees of freedom."""
        return fitting.pooled((block.sigma, block.fit.dof) for block in self.blocks)

    @property
    def dof(self) -> int:
        """Runs minus fitted coefficients."""
        return sum(block.fit.dof for block in self.blocks)

    @property
    def residuals(self) -> pd.DataFrame:
        """One row per run: n_heads, n_kv_heads, params, loss, fitted, residual, and z, the residual in standard deviations."""
        frames = []
        for heads, law in self.items():
            columns = fitting.residual_columns(law.loss, law.predict(law.params), self.sigma)
            n_heads = np.nan if heads.n_heads is None else heads.n_heads
            frames.append(pd.DataFrame({"n_heads": n_heads, "n_kv_heads": heads.n_kv_heads, "params": law.params} | columns))
        return pd.concat(frames, ignore_index=True)

    @functools.cached_property
    def doubts(self) -> Doubts:
        """What one calibrated suite of tests finds against the laws (`gqa_jax.laws.doubt`); it fires on 5% of good ones."""
        from gqa_jax.laws import doubt

        return doubt.of_laws(self)

    @property
    def doubted(self) -> list[str]:
        """`doubts` in sentences, and what could not have been seen: every answer from these laws carries them."""
        from gqa_jax.laws import doubt

        return doubt.in_words(self)

    @functools.cached_property
    def without_outliers(self) -> LawsByHeads | None:
        """The laws without the runs that lie off (`Doubts.outliers`); None without any, or where too few are left."""
        if self.refit is None or not self.doubts.outliers:
            return None
        try:
            return self.refit([self.runs[one.run] for one in self.doubts.outliers])
        except ValueError:  # an H has too few sizes then
            return None

    @property
    def runs(self) -> list[tuple[Heads, float, float]]:
        """(heads, N, loss) of every run, in the order of `doubts`."""
        return [
            (heads, float(n), float(loss))
            for block in self.blocks
            for heads, runs in zip(block.heads, block.runs, strict=True)
            for n, loss in zip(runs.params, runs.loss, strict=True)
        ]

    def size_label(self, heads: Heads, params: float, name: str | None = None) -> int | None:
        """Which trained size a run of H with N parameters is of, as `Runs.size` has it; None: of one that no run has.

        By the name of its size; where it has none, or the trained sizes have none, by an N within 1% of a run of H.
        """
        if name is not None and self.sizes:
            return self.sizes.get(name)
        block = self.block(heads)
        runs = block.runs[block.heads.index(heads)]
        far = np.abs(np.log(runs.params / params))
        nearest = int(np.argmin(far))
        return int(runs.size[nearest]) if far[nearest] <= np.log(run_table.SAME_SIZE) else None

    def price_of_doubt(self, loss: float, count: int = 1000, seed: int = 0) -> float:
        """How many times wider 95% of the draws of ln N* are for shared noise and bends than for method "independent".

        The median over H; nan where either is not known. See `gqa_jax.laws.posterior`.
        """
        if not np.isfinite(self.sigma):
            return np.nan
        widths = []
        for method in ("posterior", "independent"):
            log_n = self.draws(count, seed, method).log_size(loss)[:, : len(self)]
            low, high = np.quantile(log_n, [0.025, 0.975], axis=0, method="nearest")  # some may be infinite
            widths.append(np.where(np.isfinite(high), high, np.inf) - np.where(np.isfinite(low), low, 0.0))
        known = np.isfinite(widths[0]) & np.isfinite(widths[1]) & (widths[1] > 0)
        return float(np.median(widths[0][known] / widths[1][known])) if known.any() else np.nan

    def draws(self, count: int = 1000, seed: int = 0, method: str | None = None) -> Draws:
        """Joint draws of all coefficients: see `gqa_jax.laws.posterior`. Kept, so that asking again costs nothing."""
        from gqa_jax.laws import posterior

        key = (count, seed, method or self.method)
        if key not in self._draws:
            self._draws[key] = posterior.draw(self, *key)
        return self._draws[key]

    def draws_of(self, n_heads: float, n_kv_heads: float, count: int = 1000, seed: int = 0, method: str | None = None) -> Draws:
        """Joint draws of one H, which may have no law of its own and any numbers of heads: then what the law of heads says.

        They are consistent with `draws` of the same count, seed and method; `Draws.notes` says where they are from. Raises
        `head_law.NoHeadLaw` where these laws say nothing of such heads.
        """
        from gqa_jax.laws import head_law

        drawn = self.draws(count, seed, method)
        if (n_heads, n_kv_heads) in drawn.heads:
            return dataclasses.replace(drawn.take([drawn.heads[drawn.heads.index((n_heads, n_kv_heads))]]), notes=())
        if n_heads is None or not (0 < n_heads < np.inf and 0 < n_kv_heads < np.inf):
            raise ValueError(f"n_heads = {n_heads}, n_kv_heads = {n_kv_heads}: heads without a law are numbers above 0")
        if not self.shared_entropy:
            raise head_law.NoHeadLaw("every H has its own E here: a law of heads needs laws that share E")
        generator = np.random.default_rng([seed, 10, *(round(64 * max(n, 0)) for n in (n_heads, n_kv_heads))])
        return head_law.draws_of(drawn, self.blocks[0], self.head_dim, n_heads, n_kv_heads, generator)

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Profile-likelihood intervals, one row per H: a, a_low, a_high, b, b_low, b_high, entropy, entropy_low, entropy_high.

        An end is inf (or 0 for a, E; -inf never) where the data do not bound it, nan without degrees of freedom.
        """
        rows = []
        for block in self.blocks:
            e_low, e_high = block.entropy_interval(level)
            for heads in block.heads:
                law = self[heads]
                log_low, log_high = block.interval(heads, "a", level=level)
                a_low = np.exp(log_low) if log_low > 0 or np.isnan(log_low) else 0.0
                a_high = np.exp(log_high) if log_high < _UNBOUNDED or np.isnan(log_high) else np.inf
                b_low, b_high = block.interval(heads, "b", level=level)
                rows.append(
                    {**heads._asdict(), "a": law.a, "a_low": a_low, "a_high": a_high, "b": law.b,
                     "b_low": max(b_low, 0.0), "b_high": b_high, "entropy": law.entropy, "entropy_low": e_low,
                     "entropy_high": e_high}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """`intervals`, and of each H r_squared and points (runs); sigma, nats per token, is that of all: one row per H."""
        frame = self.intervals(level).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
        frame["r_squared"] = [law.r_squared for law in self.values()]
        frame["points"] = [len(law.loss) for law in self.values()]
        frame["sigma"] = self.sigma
        return frame

    def summary(self) -> str:
        """The laws in words: a heading, a row per H with its 95% intervals, and what is doubtful about them."""
        from gqa_jax.laws import summary

        return summary.text(self)

    def _repr_html_(self) -> str:
        from gqa_jax.laws import summary

        return summary.html(self)

    def __repr__(self) -> str:
        runs = sum(len(law.loss) for law in self.values())
        worst = min((law.r_squared for law in self.values()), default=np.nan)
        return (
            f"<LawsByHeads: {', '.join(map(str, self))}; {runs} runs trained at {self.context:,} tokens, {self.noise}, "
            f"R² from {worst:.4f}>"
        )

    @property
    def noise(self) -> str:
        """`sigma` in words."""
        return f"noise {self.sigma:.4f} nats" if np.isfinite(self.sigma) else "noise not known"

    def size_interval(self, heads: Heads, loss: float, level: float = 0.95) -> tuple[float, float]:
        """Profile-likelihood interval of N*, the size that reaches `loss` with H; inf above where the data do not bound it."""
        low, high = self.block(heads).interval(heads, "size", loss, level)
        return float(np.exp(low)), float(np.exp(high))

    def band(self, heads: Heads, params: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the curve of H at each N, from the draws. nan without degrees of freedom.

        Of the loss on the held-out text of the runs: the error that all losses have in common would move all curves alike.
        """
        params = np.atleast_1d(np.asarray(params, np.float64))
        if not np.isfinite(self.sigma):
            return np.full(params.shape, np.nan), np.full(params.shape, np.nan)
        loss_SxN = self.draws().loss(heads, params, on_this_text=True)
        return tuple(fitting.percentiles(loss_SxN, level))


def fit_by_heads(
    table: pd.DataFrame,
    shared_entropy: bool = True,
    *,
    entropy: float | None = None,
    log: bool = False,
    huber_delta: float | None = None,
    allow_confounded: bool = False,
) -> LawsByHeads:
    """One law per head configuration of a loss table (`gqa_jax.load_results`) of ONE training context.

    Args:
      table: columns n_heads (empty: d / d_h), n_kv_heads, params_non_embedding, loss, status, context; and where there are
        loss_sem, heldout, rules, seed, d_model, head_dim, vocab_size, tokens, continue_from, cell. Rows that are not done, not
        finite or that continue others are left out, and said in `warnings`. Several seeds of a size are points of their own.
      shared_entropy: one E for all H (default), or one per H.
      entropy: E, given instead of fitted.
      log: residuals of ln L instead of L, by weights 1 / L^2: to first order the same.
      huber_delta: residuals beyond it, nats per token, count linearly (Huber, summed).
      allow_confounded: also where heads of a size saw neither equal tokens nor equal tokens per parameter, within 5%
        (`gqa_jax.laws.confounding`); then every answer says so.

    Where runs of a size differ in d / L, those away from the usual one are in no law: with as many tokens as the law's they
    tell what the shape costs (`LawsByHeads.penalty`).

    Weights: equal where runs say on which text they were evaluated (heldout): their standard errors are that text's, which they
    have in common (`LawsByHeads.shared`), so that it goes into E. Elsewhere, where every run has its standard error
    (loss_sem) and they differ, 1 / (tau^2 + sem^2), tau the spread of runs (seeds) that makes the residuals as large as they
    are (Paule and Mandel); otherwise equal.

    Raises:
      ValueError: no finished run, more than one context, runs under several rules, of several data or vocabularies, the same
        run twice, fewer than three sizes of an H or sizes within a factor of 4, heads that saw more tokens than others, losses
        that don't fall with size, or an E at or above a loss.
    """
    from gqa_jax.laws import confounding

    usable, said = run_table.usable(table)
    every, taken = run_table.by_rule(usable)
    rows, others = shape.split(every)
    groups = run_table.by_heads(rows)
    run_table.require(groups)
    fitting.require(run_table.column(rows, "loss").min(), entropy, huber_delta)
    design = confounding.require(rows, allow_confounded)
    options = {"shared_entropy": shared_entropy, "entropy": entropy, "log": log, "huber_delta": huber_delta}

    def refit(left_out: Sequence[tuple[Heads, float, float]]) -> LawsByHeads:
        drop = np.zeros(len(every), bool)
        for heads, n, loss in left_out:
            same = (every["params_non_embedding"] == n) & (every["loss"] == loss)
            drop |= run_table.have(every, heads) & same.to_numpy(bool)
        again = fit_by_heads(every[~drop], **options, allow_confounded=True)
        again.aspect, again.source, again.method = found.aspect, found.source, found.method
        again.penalty = dataclasses.replace(again.penalty, by_size=found.penalty.by_size)
        return again

    shared = run_table.shared_error(rows)
    blocks = fit_blocks(groups, shared_entropy, entropy, log=log, huber_delta=huber_delta, shared=shared)
    said += [*taken, *run_table.warnings(groups, rows), *design.warnings]
    found = LawsByHeads(
        blocks,
        **run_table.common(rows),
        rows=rows,
        warnings=said,
        llama3=None if LLAMA3 in groups else run_table.llama3(rows),
        llama3_source="runs that have them",
        design=design,
        sizes=run_table.labels_by_name(rows, run_table.size_labels(rows)),
        refit=refit,
    )
    found.penalty = shape.penalty(rows, others, found)
    if len(others):
        have = "run has another d/L than the one of its size that the law is of: it is in no law"
        if len(others) > 1:
            have = "runs have another d/L than those of their size that the law is of: they are in no law"
        count = len(found.penalty.others)
        telling = f"{count or 'none'} of them {'tells' if count <= 1 else 'tell'}"
        found.warnings += (f"{len(others)} {have}; {telling} what the shape costs",)
    return found
