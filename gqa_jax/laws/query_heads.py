"""Loss against query heads: L(n_h) = a n_h^b + c, b < 0, for each size and context at one n_kv (arXiv 2503.09579v2, App. I).

c is what remains with ever more heads. It is shared by all curves by default, as in the paper's Figure 13 (c = 1.53): one curve
of six head counts hardly knows it. As a law it is `by_heads`' own, with n_h for N, a curve for H, c for E: the same fit and
the same likelihood profiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from gqa_jax.laws import confounding, fitting
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.block import Block, InBlocks, fit_blocks
from gqa_jax.laws.runs import Runs

MIN_HEAD_COUNTS = 3
_CONSTANTS = 61  # values of c that `band` goes through


class Curve(NamedTuple):
    """Which models a curve is of: one size, trained at one context."""

    size: str
    context: int

    def __str__(self) -> str:
        return f"{self.size} at T = {self.context:,}"


@dataclass(frozen=True)
class QueryHeadsLaw:
    """L(n_h) = a n_h^b + c of one size and context, with what it was fitted to."""

    a: float  # L - c with one query head, nats per token
    b: float  # below 0
    c: float  # nats per token
    r_squared: float
    n_heads: np.ndarray  # of the points
    loss: np.ndarray  # of the points

    def predict(self, n_heads: float | np.ndarray) -> float | np.ndarray:
        """Loss with n_h query heads."""
        return self.a * np.asarray(n_heads, np.float64)[()] ** self.b + self.c

    @property
    def residuals(self) -> np.ndarray:
        """Measured minus fitted loss of the points."""
        return self.loss - self.predict(self.n_heads)


class LawsByQueryHeads(InBlocks[Curve, QueryHeadsLaw]):
    """One law per size and context, and how sure they are. Made by `fit_query_heads`.

    Attributes:
      n_kv_heads: of all models.
      constant: "shared", "per_curve", or the number that was given.
      blocks: curves that share a c, fitted together; their coefficients are (c, then ln a at the mean ln n_h and -b per curve).
      sigma: standard deviation of a run's loss about its curve, pooled, nats per token; nan without degrees of freedom.
      dof: runs minus fitted coefficients.
      warnings: sentences that every answer from these laws must carry.
    """

    def __init__(self, blocks: Sequence[Block], n_kv_heads: int, constant: str | float, warnings: Sequence[str]):
        self.n_kv_heads, self.constant = n_kv_heads, constant
        self.dof = sum(block.fit.dof for block in blocks)
        self.sigma = fitting.pooled((block.fit.sigma, block.fit.dof) for block in blocks)
        # Curves of their own are alike in noise, if in nothing else: its size comes from the runs of all.
        fits = [dataclasses.replace(block.fit, sigma=self.sigma, dof=self.dof) for block in blocks]
        self.blocks = tuple(dataclasses.replace(block, fit=fit) for block, fit in zip(blocks, fits, strict=True))
        self._laws = {curve: law for block in self.blocks for curve, law in _laws(block).items()}
        self.warnings = (*warnings, *self._doubts())

    @property
    def residuals(self) -> pd.DataFrame:
        """One row per run: size, context, n_heads, loss, fitted, residual, and z, the residual in standard deviations."""
        frames = [
            pd.DataFrame(
                {**curve._asdict(), "n_heads": law.n_heads}
                | fitting.residual_columns(law.loss, law.predict(law.n_heads), self.sigma)
            )
            for curve, law in self.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def covariance(self, curve: Curve | tuple[str, int]) -> pd.DataFrame:
        """Covariance of (ln a, b, c) of one curve by the linearised fit, 3 x 3; nan where they are not determined."""
        block = self.block(curve := Curve(*curve))
        i = block.heads.index(curve)
        to_abc = np.zeros((3, len(block.fit.theta)))
        to_abc[0, 1 + 2 * i], to_abc[0, 2 + 2 * i], to_abc[1, 2 + 2 * i], to_abc[2, 0] = 1, np.log(block.center), -1, 1
        names = ["log_a", "b", "c"]
        return pd.DataFrame(to_abc @ block.fit.covariance @ to_abc.T, names, names)

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Profile-likelihood intervals, a row per curve: size, context, a, a_low, a_high, b, b_low, b_high, c, c_low, c_high.

        Ends of c at 0 or the lowest loss are its bounds, not the data's; an end of b of -inf is open. nan without degrees of
        freedom.
        """
        rows = []
        for block in self.blocks:
            c_low, c_high = block.entropy_interval(level)
            for curve in block.heads:
                law = self[curve]
                a_low, a_high = block.interval(curve, "amplitude", 1.0, level)
                b_low, b_high = block.interval(curve, "b", level=level)
                rows.append(
                    {**curve._asdict(), "a": law.a, "a_low": np.maximum(a_low, 0.0), "a_high": a_high, "b": law.b,
                     "b_low": -b_high, "b_high": np.minimum(-b_low, 0.0), "c": law.c, "c_low": c_low, "c_high": c_high}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def band(self, curve: Curve | tuple[str, int], n_heads: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Profile-likelihood interval of the curve's loss at each n_h, as two arrays; nan without degrees of freedom.

        Given c the curve is nearly linear in (ln a, b), so its interval is closed form there; the ends are the outermost over
        all c within their own interval, each with the room that its sum of squares leaves. On the held-out text of the runs:
        the error that all losses have in common is not in it.
        """
        block = self.block(curve := Curve(*curve))
        i = block.heads.index(curve)
        n_heads = np.atleast_1d(np.asarray(n_heads, np.float64))
        if not np.isfinite(self.sigma):
            return np.full(n_heads.shape, np.nan), np.full(n_heads.shape, np.nan)
        ends = block.entropy_interval(level, on_this_text=True)
        c_E = np.unique(np.append(np.linspace(*ends, _CONSTANTS), block.entropy))
        log_a_ExG, b_ExG, squares_ExG = block.conditional(np.minimum(c_E, block.lowest * (1 - 1e-4)))
        rise_E = squares_ExG.sum(-1) - block.fit.objective
        room_E = np.maximum(fitting.threshold(self.sigma, self.dof, level) - rise_E, 0.0)

        def law(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """The curve above c at x = ln n_h, and its derivatives, for every c."""
            value_ExX = np.exp(log_a_ExG[:, [i]] - b_ExG[:, [i]] * x)
            return value_ExX, np.stack([value_ExX, -x * value_ExX], axis=-1)

        _, slopes_ExMx2 = law(block.x_GxM[i])
        information_Ex2x2 = np.einsum("m,emi,emj->eij", block.weight_GxM[i], slopes_ExMx2, slopes_ExMx2)
        value_ExN, slopes_ExNx2 = law(np.log(n_heads / block.center))
        lever_ExN = np.einsum("eni,eij,enj->en", slopes_ExNx2, np.linalg.inv(information_Ex2x2), slopes_ExNx2)
        half_ExN = np.sqrt(room_E[:, None] * lever_ExN)
        loss_ExN = c_E[:, None] + value_ExN
        return (loss_ExN - half_ExN).min(0), (loss_ExN + half_ExN).max(0)

    def _doubts(self) -> list[str]:
        found = []
        for block in self.blocks:
            name = "all curves" if len(block.heads) > 1 else str(block.heads[0])
            said = [*fitting.doubts(block.fit), *block.poor("n_h")]
            if isinstance(self.constant, str):
                rests = "within the heads that were trained the curve holds, its coefficients say little"
                words = ("more head counts", "the heads that were trained", rests)
                said += fitting.floor(block.entropy, block.lowest, block.entropy_interval(), words, "c")
            found += [f"{name}: {sentence}" for sentence in said]
        if not self.dof > 0:
            found.append("as many coefficients as runs: the curves pass through every point, and R^2 = 1 says nothing")
        return found


def fit_query_heads(
    table: pd.DataFrame, constant: str | float = "shared", *, allow_confounded: bool = False
) -> LawsByQueryHeads:
    """L(n_h) = a n_h^b + c for every size and context of a loss table (`gqa_jax.load_results`) of ONE n_kv.

    Least squares on the loss, all runs of one spread (or weighted by `loss_sem`: see `fit_by_heads`).

    Args:
      table: columns n_heads, n_kv_heads, params_non_embedding, loss, status, context, and size, or n_layers and d_model. Rows
        that are not done, not finite, or that continue others are left out, and said in `warnings`; seeds are points of their
        own.
      constant: "shared": one c for all curves (default); "per_curve"; or c, nats per token.
      allow_confounded: as in `fit_by_heads`.

    Raises:
      ValueError: no finished run, several n_kv, heads of a size that saw more tokens than others, fewer than three head counts
        of a curve (two with c given), losses that don't fall with heads, a c that is not below every loss.
    """
    rows, said = run_table.usable_by_context(table)
    if (rule := rows["n_heads"].isna()).any():
        said.append(f"{int(rule.sum())} of {len(rows)} runs left out: their query heads follow the width, they have no number")
        rows = rows[~rule]
    if rows.empty:
        raise ValueError("no finished run to fit: no row has a number of query heads")
    if len(kinds := sorted(rows["n_kv_heads"].unique())) > 1:
        raise ValueError(
            f"one n_kv at a time: the table has {', '.join(map(str, kinds))}; take table[table['n_kv_heads'] == {kinds[0]}]"
        )
    design = confounding.require(rows, allow_confounded)
    constant = _checked(constant, float(rows["loss"].astype(np.float64).min()))
    rows = rows.assign(scale=rows.groupby("size_name")["params_non_embedding"].transform("max"))  # smaller sizes first
    shared, own = run_table.shared_error(rows), run_table.shared_sem(rows) is None
    groups = {
        Curve(size, int(context)): run_table.runs_of(chosen.sort_values("n_heads", kind="stable"), own, "n_heads")
        for (_, size, context), chosen in rows.groupby(["scale", "size_name", "context"])
    }
    needed = 2 if isinstance(constant, float) else MIN_HEAD_COUNTS
    for curve, runs in groups.items():
        if runs.n_sizes < needed:
            counts = ", ".join(f"{n:g}" for n in np.unique(runs.params))
            raise ValueError(f"{curve}: query heads {counts} have finished, a curve needs {needed} counts or more")
        if runs.n_sizes == needed:
            said.append(f"{curve}: {needed} head counts only: the curvature rests on one point")
        means = [runs.loss[runs.params == n].mean() for n in np.unique(runs.params)]
        if (np.diff(means) > 0).any():
            said.append(f"{curve}: the loss is not monotone in heads ({', '.join(f'{x:.4f}' for x in means)})")
    said += [*run_table.about_text(rows), *design.warnings]
    given = constant if isinstance(constant, float) else None
    return LawsByQueryHeads(fit_blocks(groups, constant == "shared", given, shared=shared), int(kinds[0]), constant, said)


def _laws(block: Block) -> dict[Curve, QueryHeadsLaw]:
    def law(log_a: float, b: float, runs: Runs) -> QueryHeadsLaw:
        a = float(np.exp(log_a) * block.center**b)
        return QueryHeadsLaw(a, -float(b), block.entropy, np.nan, runs.params, runs.loss)

    return block.each(law, "", "query heads")


def _checked(constant: str | float, lowest: float) -> str | float:
    if isinstance(constant, str):
        if constant not in ("shared", "per_curve"):
            raise ValueError(f'constant = {constant!r}: allowed are "shared", "per_curve", or a number of nats per token')
        return constant
    fitting.require(lowest, constant, symbol="constant")
    return float(constant)
