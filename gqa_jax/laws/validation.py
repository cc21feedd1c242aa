"""How far laws can be trusted: runs that were held out, and more heads that don't help.

R^2 says nothing of a law beyond its data: without any E it is above 0.99 on the paper's points. So runs are held out, and
predicted by three models from the others:

    law             the law by heads; the joint law for heads that are held out
    entropy_0       the same with E = 0
    log_quadratic   ln L quadratic in ln N, for every H; in the joint law's functions of the heads for heads that are held out

A law that these two beat is no law. The interval of a prediction is that of a new run: of the fit, linearised, and of the
noise of a run. By simulation (four H, six sizes, noise of 0.003, the largest or the smallest size held out, E shared or not)
such 95% intervals cover 95 to 96% of the runs, those by profile likelihood 93 to 97%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws import joint
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.block import Block, fit_block, fit_blocks
from gqa_jax.laws.by_heads import LawsByHeads
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.joint import JointLaw, fit_rows
from gqa_jax.laws.runs import Runs

SCHEMES = ("leave_largest_out", "leave_smallest_out", "rolling_origin", "leave_heads_out")
MODELS = ("law", "entropy_0", "log_quadratic")
COLUMNS = ("scheme", "model", "n_heads", "n_kv_heads", "params", "loss", "predicted", "error", "error_sigmas", "covered")

_Groups = Mapping[Heads, Runs]


@dataclass(frozen=True)
class _Prediction:
    """Of new runs: losses, their standard errors, and how many of these an interval has to each side."""

    loss: np.ndarray
    error: np.ndarray
    quantile: np.ndarray

    @classmethod
    def missing(cls, count: int) -> _Prediction:
        return cls(*(np.full(count, np.nan) for _ in range(3)))


def hold_out(table: pd.DataFrame, scheme: str, *, shared_entropy: bool = True, level: float = 0.95) -> pd.DataFrame:
    """Predictions of runs from the others, one row per held-out run and model.

    Args:
      table: as in `fit_by_heads`.
      scheme: "leave_largest_out" and "leave_smallest_out" (of every H at once), "rolling_origin" (fits to the k smallest sizes
        of every H and predicts the next, k = 3, 4, ...) or "leave_heads_out" (one H after the other, by the joint law).
      shared_entropy: of the law by heads.
      level: of the intervals.

    Returns:
      scheme, model, n_heads, n_kv_heads, params, loss, predicted, error (predicted minus measured, nats per token),
      error_sigmas (in standard errors of the prediction of a run), covered (by the interval). The last four are empty where
      the other runs are too few to predict, the last two where they leave no degrees of freedom.

    Raises:
      ValueError: an unknown scheme, runs that suffice for no prediction at all, or as in `fit_by_heads` and `fit_joint`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown: use {', '.join(SCHEMES)}")
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must be between 0 and 1")
    rows = run_table.by_rule(run_table.usable(table)[0])[0].reset_index(drop=True)
    if scheme == "leave_heads_out":
        splits = _leave_heads_out(rows, level)
    else:
        splits = _leave_sizes_out(rows, scheme, shared_entropy, level)
    frames = [_frame(scheme, model, heads, held, found) for heads, held, models in splits for model, found in models.items()]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
    if frame["predicted"].isna().all():
        needed = "four head configurations" if scheme == "leave_heads_out" else "four sizes, three of them over a factor of 4"
        raise ValueError(f"too few runs to hold any out: this needs {needed} or more")
    return frame


def hold_out_all(table: pd.DataFrame, *, shared_entropy: bool = True, level: float = 0.95) -> tuple[pd.DataFrame, list[str]]:
    """`hold_out` by every scheme, and a sentence for every scheme that the runs do not suffice for."""
    frames, said = [], []
    for scheme in SCHEMES:
        try:
            frames.append(hold_out(table, scheme, shared_entropy=shared_entropy, level=level))
        except ValueError as error:
            said.append(f"{scheme}: {error}")
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))), said


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per scheme and model of `hold_out`: runs, predicted (how many), mean_error, rms_error, worst_error, covered (a share)."""
    rows = []
    for (scheme, model), part in frame.groupby(["scheme", "model"], sort=False):
        error = part["error"].to_numpy(np.float64)
        known = error[np.isfinite(error)]
        covered = part["covered"].dropna()
        errors = (known.mean(), np.sqrt(np.mean(known**2)), known[np.argmax(np.abs(known))]) if len(known) else (np.nan,) * 3
        share = covered.astype(np.float64).mean() if len(covered) else np.nan
        rows.append((scheme, model, len(error), len(known), *errors, share))
    names = ["scheme", "model", "runs", "predicted", "mean_error", "rms_error", "worst_error", "covered"]
    return pd.DataFrame(rows, columns=names)


def not_falling(laws: LawsByHeads, level: float = 0.95, sizes: int = 21) -> list[str]:
    """A sentence on heads whose loss is above that of fewer heads at the same N, by more than chance, inside the sizes of both.

    Compared are neighbours: H with as many query and key/value heads or more, and none in between. Differences have the
    linearised covariance of the fit; without degrees of freedom every rise is said.
    """
    found = []
    pairs = list(_neighbours(laws))
    for few, many in pairs:
        low = max(laws[h].params.min() for h in (few, many))
        high = min(laws[h].params.max() for h in (few, many))
        if low > high:
            continue
        n = np.geomspace(low, high, sizes)
        rise, error = laws[many].predict(n) - laws[few].predict(n), _error_of_difference(laws, few, many, n)
        if np.isnan(error).any():
            sure, limit = rise, 0.0
        else:
            sure, limit = rise / np.maximum(error, 1e-300), stats.t.ppf(1 - (1 - level) / len(pairs) / 2, laws.dof)
        at = int(np.argmax(sure))
        if sure[at] > limit:
            found.append((sure[at], f"{many} above {few} at N = {n[at]:.3g}, by {rise[at]:.4f} nats per token"))
    if not found:
        return []
    return [f"loss does not fall with more heads: {_some([text for _, text in sorted(found, reverse=True)])}"]


def _neighbours(laws: LawsByHeads) -> Iterator[tuple[Heads, Heads]]:
    counted = [heads for heads in laws if heads.n_heads is not None]

    def below(one: Heads, other: Heads) -> bool:
        return one != other and one.n_heads <= other.n_heads and one.n_kv_heads <= other.n_kv_heads

    for few in counted:
        for many in counted:
            if below(few, many) and not any(below(few, between) and below(between, many) for between in counted):
                yield few, many


def _error_of_difference(laws: LawsByHeads, one: Heads, other: Heads, n: np.ndarray) -> np.ndarray:
    """Standard error of the difference of two curves, linearised; nan without degrees of freedom."""
    blocks = laws.block(one), laws.block(other)
    gradients = [_curve(block, heads, n)[1] for block, heads in zip(blocks, (one, other), strict=True)]
    parts = zip(blocks, gradients, strict=True)
    if blocks[0] is blocks[1]:
        parts = [(blocks[0], gradients[0] - gradients[1])]
    return np.sqrt(sum(block.sigma**2 * np.einsum("np,pq,nq->n", g, block.fit.inverse, g) for block, g in parts))


def _leave_sizes_out(
    rows: pd.DataFrame, scheme: str, shared_entropy: bool, level: float
) -> Iterator[tuple[Heads, Runs, dict[str, _Prediction]]]:
    by_heads = rows.groupby(["n_heads", "n_kv_heads"], dropna=False)["params_non_embedding"]
    rank, most = by_heads.rank(method="dense"), by_heads.transform("nunique")
    if scheme == "leave_largest_out":
        splits = [(rank < most, rank == most)]
    elif scheme == "leave_smallest_out":
        splits = [(rank > 1, rank == 1)]
    else:
        splits = [(rank <= k, rank == k + 1) for k in range(run_table.MIN_SIZES, int(most.max()))]
    for train, test in splits:
        groups = run_table.by_heads(run_table.fittable(rows[train])[0])
        models = _fit_by_heads(groups, shared_entropy, level) if groups else None
        for heads, held in run_table.by_heads(rows[test]).items():
            if heads in groups:
                yield heads, held, {name: models[name](heads, held.params) for name in MODELS}
            elif scheme != "rolling_origin":
                yield heads, held, {name: _Prediction.missing(len(held.loss)) for name in MODELS}


def _fit_by_heads(groups: _Groups, shared_entropy: bool, level: float) -> dict[str, Callable[[Heads, np.ndarray], _Prediction]]:
    """The three models of runs of some heads: (H, sizes) -> predictions."""
    blocks = {heads: block for block in fit_blocks(groups, shared_entropy) for heads in block.heads}
    without = fit_block(groups, entropy=0.0)
    return {
        "law": lambda heads, params: _of_block(blocks[heads], heads, params, level),
        "entropy_0": lambda heads, params: _of_block(without, heads, params, level),
        "log_quadratic": _log_quadratics(groups, level),
    }


def _of_block(block: Block, heads: Heads, params: np.ndarray, level: float) -> _Prediction:
    loss, gradient = _curve(block, heads, params)
    variance = np.einsum("np,pq,nq->n", gradient, block.fit.inverse, gradient)
    quantile = stats.t.ppf((1 + level) / 2, block.dof) if block.dof > 0 else np.nan
    return _Prediction(loss, block.sigma * np.sqrt(variance + 1), np.full(len(loss), quantile))


def _curve(block: Block, heads: Heads, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses_N of the curve of H, and their derivatives_NxP by the coefficients of the block."""
    i, x = block.heads.index(heads), np.log(params / block.center)
    value = np.exp(block.alpha[i] - block.b[i] * x)
    gradient = np.zeros((len(x), len(block.fit.theta)))
    gradient[:, 0], gradient[:, 1 + 2 * i], gradient[:, 2 + 2 * i] = block.given_entropy is None, value, -x * value
    return value + block.entropy, gradient


def _log_quadratics(groups: _Groups, level: float) -> Callable[[Heads, np.ndarray], _Prediction]:
    """ln L = c0 + c1 x + c2 x^2 of every H; the noise, relative to the loss, is that of all."""
    centers = {heads: np.mean(np.log(runs.params)) for heads, runs in groups.items()}

    def columns(heads: Heads, params: np.ndarray) -> np.ndarray:
        return np.vander(np.log(params) - centers[heads], 3)

    fits = {heads: _LogLinear.of(columns(heads, runs.params), runs.loss) for heads, runs in groups.items()}
    squares, dof = (sum(getattr(one, name) for one in fits.values()) for name in ("squares", "dof"))
    return lambda heads, params: fits[heads].predict(columns(heads, params), squares, dof, level)


@dataclass(frozen=True)
class _LogLinear:
    """ln L = columns @ coefficients, by least squares."""

    coefficients: np.ndarray
    inverse: np.ndarray  # the pseudo-inverse of the columns
    squares: float  # of the residuals
    dof: int

    @classmethod
    def of(cls, columns: np.ndarray, loss: np.ndarray) -> _LogLinear:
        inverse, log_loss = np.linalg.pinv(columns), np.log(loss)
        coefficients = inverse @ log_loss
        squares = float(np.sum((log_loss - columns @ coefficients) ** 2))
        return cls(coefficients, inverse, squares, len(loss) - columns.shape[1])

    def predict(self, columns: np.ndarray, squares: float, dof: int, level: float) -> _Prediction:
        """Of runs with these columns; the noise is that of `squares` with so many degrees of freedom."""
        loss = np.exp(columns @ self.coefficients)
        sigma, quantile = (np.sqrt(squares / dof), stats.t.ppf((1 + level) / 2, dof)) if dof > 0 else (np.nan, np.nan)
        error = loss * sigma * np.sqrt(1 + np.sum((columns @ self.inverse) ** 2, axis=1))
        return _Prediction(loss, error, np.full(len(loss), quantile))


def _leave_heads_out(rows: pd.DataFrame, level: float) -> Iterator[tuple[Heads, Runs, dict[str, _Prediction]]]:
    head_dim = run_table.only(rows, "head_dim", 64.0)
    fit_rows(rows)  # says what is wrong where there is no joint law at all
    for heads, held in run_table.by_heads(rows).items():
        others = rows[~run_table.have(rows, heads)]
        n_heads = np.broadcast_to(np.asarray(heads.query_heads(held.d_model, head_dim), np.float64), held.loss.shape)
        try:
            law, without = fit_rows(others), fit_rows(others, entropy=0.0)
            found = {
                name: _of_joint(fit, n_heads, heads.n_kv_heads, held.params, level)
                for name, fit in (("law", law), ("entropy_0", without))
            }
            found["log_quadratic"] = _joint_log_quadratic(law, n_heads, heads.n_kv_heads, held.params, level)
        except ValueError:  # too few heads are left, or they say nothing of these
            found = {name: _Prediction.missing(len(held.loss)) for name in MODELS}
        yield heads, held, found


def _of_joint(law: JointLaw, n_heads: np.ndarray, n_kv_heads: int, params: np.ndarray, level: float) -> _Prediction:
    """Degrees of freedom by Satterthwaite (1946): the heads' own offset is known from few heads, all else from many runs."""
    loss = law.predict(n_heads, n_kv_heads, params)
    own = (law.tau * (loss - law.entropy)) ** 2
    rest = law.standard_error(n_heads, n_kv_heads, params) ** 2 - own + law.sigma**2
    dof = (own + rest) ** 2 / (own**2 / law.heads_dof + rest**2 / law.dof)
    error = np.sqrt(own + rest)
    return _Prediction(loss, error, stats.t.ppf((1 + level) / 2, dof))


def _joint_log_quadratic(law: JointLaw, n_heads: np.ndarray, n_kv_heads: int, params: np.ndarray, level: float) -> _Prediction:
    """ln L by least squares in the functions of the heads that `law` has in ln A and in b, and x^2."""
    terms = joint.Terms(law.terms.form, law.terms.alpha, law.terms.b, entropy=0.0)

    def columns(where: joint.Where) -> np.ndarray:
        return np.column_stack([terms.log_above(np.zeros(len(terms.names)), where)[1], where[2] ** 2])

    fit = _LogLinear.of(columns(joint.at(law.runs)), law.runs["loss"].to_numpy())
    if fit.dof <= 0:
        return _Prediction.missing(len(params))
    where = (n_heads, np.full(len(params), float(n_kv_heads)), np.log(params / law.center))
    return fit.predict(columns(where), fit.squares, fit.dof, level)


def _frame(scheme: str, model: str, heads: Heads, held: Runs, found: _Prediction) -> pd.DataFrame:
    error = found.loss - held.loss
    sigmas = error / np.where(found.error > 0, found.error, np.nan)
    covered = pd.array(np.abs(sigmas) <= found.quantile, dtype="boolean")
    covered[np.isnan(sigmas)] = pd.NA
    return pd.DataFrame(
        {"scheme": scheme, "model": model, "n_heads": pd.array([heads.n_heads] * len(error), dtype="Int64")}
        | {"n_kv_heads": heads.n_kv_heads, "params": held.params, "loss": held.loss, "predicted": found.loss}
        | {"error": error, "error_sigmas": sigmas, "covered": covered}
    )


def _some(texts: list[str]) -> str:
    """The first three."""
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
