"""Laws exp(alpha - b x) + E that share an E: their fit and their likelihood profiles, x = ln(N / N0) with N0 amid the data.

Losses of runs that were evaluated on the same text are all off by one common amount against the text at large (`SharedError`).
So E, and with it every loss and N*, is uncertain by it whatever loss is asked for, while differences between runs are not: it
widens the intervals of E, of N* and of a loss, in quadrature, and is in no weight and no residual.

For a given E the curves are independent, and for given E and b the amplitude is linear: so the global minimum is found by a
grid, without a start value (variable projection), and profiles need no search over the coefficients of other curves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import interpolate

from gqa_jax.laws import fitting
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.law import Laws, PowerLaw
from gqa_jax.laws.runs import Runs

if TYPE_CHECKING:
    from gqa_jax.laws.evidence import Explored

SMALLEST_B, LARGEST_B = 0.005, 2.0
_GRID_E, _GRID_B = 100, 60
_LOWER, _UPPER = np.array([-np.inf, SMALLEST_B / 2]), np.array([np.inf, 2 * LARGEST_B])  # of (alpha, b)
_REWEIGHTED = 15  # times: what brings a start near the minimum of Huber's loss
_ROUNDING = 1e-9  # nats per token


@dataclass(frozen=True)
class Block:
    """Head configurations that share an E. Arrays are padded; padding has weight 0."""

    heads: tuple[Heads, ...]
    runs: tuple[Runs, ...]
    center: float  # N0
    x_GxM: np.ndarray  # ln(N / N0)
    loss_GxM: np.ndarray
    weight_GxM: np.ndarray
    fit: fitting.Fit  # of (E, alpha_1, b_1, ...)
    given_entropy: float | None
    known_sigma: float | None = None  # instead of the residuals'
    shared: SharedError = SharedError()  # noqa: RUF009 (frozen): the error that all losses have in common

    @property
    def entropy(self) -> float:
        return float(self.fit.theta[0])

    @property
    def alpha(self) -> np.ndarray:
        return self.fit.theta[1::2]

    @property
    def b(self) -> np.ndarray:
        return self.fit.theta[2::2]

    @property
    def sigma(self) -> float:
        """Noise of a run, nats per token; an exact fit has that of rounding, nan is none that is known."""
        return float(np.maximum(self.fit.sigma, _ROUNDING)) if self.known_sigma is None else self.known_sigma

    @property
    def dof(self) -> float:
        return float(self.fit.dof) if self.known_sigma is None else np.inf

    @property
    def lowest(self) -> float:
        """The least loss of the points: E is below it."""
        return float(self.loss_GxM.min())

    @property
    def status(self) -> str:
        if self.given_entropy is None and 0 in self.fit.bound:
            return "EDGE"
        return self.fit.status if self.given_entropy is None or self.fit.bound != (0,) else "CONVERGED"

    def laws(self, common: Sequence[str]) -> dict[Heads, PowerLaw]:
        """One PowerLaw per H. Raises ValueError for losses that do not fall with size."""
        warnings = (*common, *self._warnings())

        def law(alpha: float, b: float, runs: Runs) -> PowerLaw:
            a = float(self.center * np.exp(alpha / b))
            return PowerLaw(a, float(b), self.entropy, np.nan, runs.params, runs.loss, warnings)

        return self.each(law, "heads ", "size")

    def each[L](self, make: Callable[[float, float, Runs], L], name: str, what: str) -> dict[Any, L]:
        """`make(alpha, b, runs)` of each curve, with its R^2. Raises ValueError for losses that do not fall with `what`."""
        result = {}
        for of, runs, alpha, b in zip(self.heads, self.runs, self.alpha, self.b, strict=True):
            if b < SMALLEST_B:
                losses = ", ".join(f"{x:.4f}" for x in runs.loss)
                raise ValueError(f"{name}{of}: the losses do not fall with {what} ({losses}): no power law")
            law = make(alpha, b, runs)
            result[of] = dataclasses.replace(law, r_squared=fitting.r_squared(runs.loss, law.predict(runs.params)))
        return result

    def poor(self, symbol: str) -> list[str]:
        """`fitting.poor` of all runs; symbol: of what x is the logarithm."""
        there = self.weight_GxM > 0
        fitted = self.loss_GxM + _residual(self.fit.theta, self.x_GxM, self.loss_GxM)
        columns = {"loss": self.loss_GxM[there], "fitted": fitted[there], "largest": {symbol: self.x_GxM[there]}}
        return fitting.poor(**columns, dof=self.fit.dof, group=np.nonzero(there)[0], weights=self.weight_GxM[there])

    def conditional(self, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best (alpha_ExG, b_ExG) for every E of an array, and the sums of squares_ExG."""
        return conditional(self.x_GxM, self.loss_GxM, self.weight_GxM, entropy)

    @functools.cached_property
    def entropy_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """E from where the data exclude it to where they exclude it again (or to its bounds), and the sums of squares_ExG."""
        if self.given_entropy is not None:
            grid = np.array([self.given_entropy])
            return grid, self.conditional(grid)[2]
        limit = 3 * fitting.threshold(self.sigma, self.dof, 0.999) if np.isfinite(self.sigma) else 0.0

        error = max(self.entropy_error, 1e-4)
        low, high = fitting.interval(self._rise, self.entropy, error, max(limit, 1e-12), 0.0, self._highest_entropy)
        half = max(min(self.entropy - low, high - self.entropy), 1e-6)
        grid = np.unique(np.concatenate([np.linspace(low, high, 61), self.entropy + half * np.linspace(-0.5, 0.5, 21)]))
        grid = grid[(grid >= low) & (grid <= high)]
        return grid, self.conditional(grid)[2]

    @functools.cached_property
    def size_GxM(self) -> np.ndarray:
        """Labels of the sizes, common to all heads; padding has that of the first run."""
        most = self.x_GxM.shape[1]
        return np.stack([np.concatenate([one.size, np.full(most - len(one.size), one.size[0])]) for one in self.runs])

    @functools.cached_property
    def sizes_J(self) -> np.ndarray:
        """The labels that runs of any weight have, ascending."""
        return np.unique(self.size_GxM[self.weight_GxM > 0])

    @functools.cached_property
    def _explored(self) -> dict[tuple[bool, int], Explored]:
        return {}

    def explored(self, wide: bool, seed: int) -> Explored:
        """What draws of the posterior are drawn from (`evidence.explore`); kept."""
        from gqa_jax.laws import evidence, sampling

        if (wide, seed) not in self._explored:
            self._explored[wide, seed] = evidence.explore(self, sampling.pooling(self), wide=wide, seed=seed)
        return self._explored[wide, seed]

    def entropy_profile(self) -> tuple[np.ndarray, np.ndarray]:
        """E, and the rise of the sum of squares over sigma^2 at the best coefficients for that E: F(1, dof) where E is true."""
        grid, squares_ExG = self.entropy_grid
        return grid, np.maximum(squares_ExG.sum(-1) - self.fit.objective, 0.0) / self.sigma**2

    def entropy_interval(self, level: float = 0.95, *, on_this_text: bool = False) -> tuple[float, float]:
        """Profile-likelihood interval of E; a bound of 0 or the lowest loss is itself; nan without degrees of freedom.

        `on_this_text`: without the error that all losses have in common.
        """
        if self.given_entropy is not None:
            return self.given_entropy, self.given_entropy
        if not np.isfinite(self.sigma):
            return np.nan, np.nan

        limit = fitting.threshold(self.sigma, self.dof, level)
        ends = fitting.interval(self._rise, self.entropy, max(self.entropy_error, 1e-5), limit, 0.0, self.lowest)
        return ends if on_this_text else self.shared.widened(self.entropy, ends, level, 0.0)

    def _rise(self, entropy: np.ndarray) -> np.ndarray:
        """How far the sum of squares rises where E is given."""
        return np.where(entropy <= self._highest_entropy, self.conditional(entropy)[2].sum(-1) - self.fit.objective, np.inf)

    def interval(self, heads: Heads, kind: str, at: float = np.nan, level: float = 0.95) -> tuple[float, float]:
        """Profile-likelihood interval of one quantity of H; (nan, nan) without degrees of freedom.

        kind: "a" (ln a), "b", "size" (ln N* for the loss `at`), "loss" (L at N = `at`), "amplitude" (L - E there). All other
        coefficients, E and those of other H included, take their best values along the profile. Those of "size" and "loss" have
        the error that all losses have in common.
        """
        if not np.isfinite(self.sigma):
            return np.nan, np.nan
        i = self.heads.index(heads)
        grid, squares_ExG = self.entropy_grid
        rest = squares_ExG.sum(-1) - squares_ExG[:, i]
        x, y, w = self.x_GxM[i], self.loss_GxM[i], self.weight_GxM[i]
        log_at = np.log(at / self.center) if kind in ("loss", "amplitude") else np.nan
        center, error = self._quantity(i, kind, at, log_at)

        def squares(values: np.ndarray, entropy_CxE: np.ndarray) -> np.ndarray:
            if kind == "b":
                return _sum_of_squares_given_b(x, y, w, entropy_CxE, values)
            turn = np.broadcast_to(log_at if kind in ("loss", "amplitude") else values[:, None], entropy_CxE.shape)
            if kind in ("size", "loss"):
                scale = np.maximum((at if kind == "size" else values[:, None]) - entropy_CxE, 0.0)
            else:
                scale = np.broadcast_to(np.maximum(values[:, None], 0.0) if kind == "amplitude" else 1.0, entropy_CxE.shape)
            return _sum_of_squares_through(x, y, w, entropy_CxE, scale, turn, self.b[i])

        def rise(values: np.ndarray) -> np.ndarray:
            return _least_over_entropy(lambda entropy: squares(values, entropy), grid, rest, len(values)) - self.fit.objective

        limit = fitting.threshold(self.sigma, self.dof, level)
        low, high = fitting.crossings(rise, center, error, limit)
        if kind == "loss":
            low, high = self.shared.widened(center, (low, high), level)
        elif kind == "size" and self.shared.sem > 0:
            common = self.shared.reach(level)
            least, most = (_size(self.alpha[i], self.b[i], at - self.entropy + x) for x in (common, -common))
            low, high = fitting.widened(center, (low, high), center - least, most - center)
        shift = np.log(self.center) if kind in ("a", "size") else 0.0
        return low + shift, high + shift

    @property
    def _highest_entropy(self) -> float:
        return self.lowest * (1 - 1e-4)

    @property
    def entropy_error(self) -> float:
        return fitting.error_of(self.sigma**2 * self.fit.inverse[0, 0], 0.05)

    def _quantity(self, i: int, kind: str, at: float, log_at: float) -> tuple[float, float]:
        """A quantity of `interval` by the fit, and its linearised standard error: the scale of the search on its profile."""
        alpha, b = self.alpha[i], self.b[i]
        if kind == "b":
            center, by_entropy, by_alpha, by_b = b, 0.0, 0.0, 1.0
        elif kind in ("a", "size"):
            if not (gap := 1.0 if kind == "a" else at - self.entropy) > 0:
                raise ValueError(f"a loss of {at} can't be reached: the fitted entropy E is {self.entropy:.4f}")
            center = _size(alpha, b, gap)
            by_entropy, by_alpha, by_b = (kind == "size") / (gap * b), 1 / b, -center / b
        else:
            value = np.exp(alpha - b * log_at)
            center = value + (self.entropy if kind == "loss" else 0.0)
            by_entropy, by_alpha, by_b = float(kind == "loss"), value, -log_at * value
        gradient = np.zeros(len(self.fit.theta))
        gradient[0], gradient[1 + 2 * i], gradient[2 + 2 * i] = by_entropy, by_alpha, by_b
        return float(center), fitting.error_of(self.sigma**2 * gradient @ self.fit.inverse @ gradient, 0.01)

    def _warnings(self) -> list[str]:
        count, free = int((self.weight_GxM > 0).sum()), len(self.fit.theta) - (self.given_entropy is not None)
        of = f"heads {self.heads[0]}: " if len(self.heads) == 1 else ""
        found = [*fitting.doubts(self.fit, count, free), *(of + sentence for sentence in self.poor("N"))]
        if self.given_entropy is not None:
            return found
        low, high = self.entropy_interval() if count > free else (np.nan, np.nan)
        rests = f"answers near or below {min(high + 0.1, self.lowest):.2f} rest on it; train smaller and larger sizes"
        words = ("losses of larger models", "the sizes that were trained", rests)
        return found + fitting.floor(self.entropy, self.lowest, (low, high), words)


class InBlocks[K, L](Laws[K, L]):
    """Laws that are fitted in blocks: those of one share a constant, E or c."""

    blocks: Sequence[Block]

    @property
    def status(self) -> str:
        """CONVERGED, or the worst of: EDGE (the constant at 0 or at the lowest loss), BOUND_HIT, DISAGREE, SINGULAR."""
        return fitting.worst(block.status for block in self.blocks)

    @property
    def shared(self) -> SharedError:
        """The error that all losses, and so the constant, have in common, of the held-out text; `sem` is nan: not known.

        0 where the runs do not say on which text they were evaluated: then their own standard errors are weights.
        """
        return self.blocks[0].shared

    def block(self, of: K) -> Block:
        """The block that the law of `of` belongs to. Raises KeyError where there is no such law."""
        for block in self.blocks:
            if of in block.heads:
                return block
        raise KeyError(f"no law of {of}: there are {'; '.join(map(str, self))}")


def fit_block(
    groups: Mapping[Heads, Runs],
    *,
    entropy: float | None = None,
    log: bool = False,
    huber_delta: float | None = None,
    known_sigma: float | None = None,
    shared: SharedError = SharedError(),  # noqa: B008 (frozen)
) -> Block:
    """The laws of some H with one E.

    Args:
      huber_delta: both routes then minimise Huber's summed loss. What is uncertain (sigma, profiles, draws) is of least squares
        with the weights that it ends with, min(1, delta / |residual|), as if they had been given: a run that is far off by r
        counts delta r in sigma^2 instead of r^2.
      known_sigma: noise of a run that is known, instead of the residuals'.
      shared: `run_table.shared_error` of the runs.
    """
    params, loss, sem, there = run_table.stack(list(groups.values()))
    center = float(np.exp(np.mean(np.log(params[there]))))
    x = np.log(params / center)
    base = np.where(there, 1.0 / loss**2 if log else 1.0, 0.0)
    base = base / base[there].mean()
    weight = base
    weighted = (
        there.sum() > 1 + 2 * len(groups) and np.isfinite(sem[there]).all() and np.ptp(sem[there]) > 1e-3 * sem[there].mean()
    )
    for _ in range(4 if weighted else 1):
        fit = _fit(x, loss, weight, entropy, huber_delta)
        if weighted:
            tau2 = fitting.between_runs(_residual(fit.theta, x, loss)[there] ** 2, sem[there] ** 2, fit.dof)
            weight = np.where(there, 1 / (tau2 + sem**2), 0.0) * base
            weight = weight / weight[there].mean()
    if huber_delta is not None:
        weight = np.zeros_like(weight)
        weight[there] = fit.weights
        fit = dataclasses.replace(fit, objective=float(np.sum(weight * _residual(fit.theta, x, loss) ** 2)))
    return Block(tuple(groups), tuple(groups.values()), center, x, loss, weight, fit, entropy, known_sigma, shared)


def fit_blocks(groups: Mapping[Heads, Runs], together: bool, entropy: float | None = None, **options: Any) -> list[Block]:
    """`fit_block` of all together, with one E, or of each alone; where E is given there is no difference."""
    parts = [groups] if together or entropy is not None else [{heads: runs} for heads, runs in groups.items()]
    return [fit_block(part, entropy=entropy, **options) for part in parts]


def conditional(
    x_GxM: np.ndarray,
    loss_GxM: np.ndarray,
    weight_GxM: np.ndarray,
    entropy: np.ndarray,
    huber_delta: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best (alpha_ExG, b_ExG) of exp(alpha - b x) + E for every E of an array, and the weighted sums of squares_ExG.

    No start value: a grid over b, where the amplitude is linear, then Levenberg-Marquardt. `huber_delta`: as in
    `fitting.fit`; the sums are Huber's then.
    """
    above = loss_GxM - np.asarray(entropy, np.float64)[:, None, None]
    slopes = np.geomspace(SMALLEST_B, LARGEST_B, _GRID_B)
    basis_GxMxb = np.exp(-slopes * x_GxM[..., None])
    if huber_delta is not None:
        start = _robust_start(weight_GxM, above, slopes, basis_GxMxb, huber_delta)
        model = fitting.huberised(_curve(x_GxM), above, huber_delta, weight_GxM)
        theta, sums = fitting.refit(model, above, start, weights=weight_GxM, lower=_LOWER, upper=_UPPER, iterations=1000)
        return theta[..., 0], theta[..., 1], sums
    norm_Gxb = np.einsum("gm,gmb->gb", weight_GxM, basis_GxMxb**2)
    product_ExGxb = np.einsum("egm,gmb->egb", weight_GxM * above, basis_GxMxb)
    best = np.argmax(np.maximum(product_ExGxb, 0.0) ** 2 / norm_Gxb, axis=-1)
    amplitude = np.take_along_axis(product_ExGxb, best[..., None], -1)[..., 0] / norm_Gxb[np.arange(len(x_GxM)), best]
    start = np.stack([np.log(np.maximum(amplitude, 1e-9)), slopes[best]], axis=-1)
    theta, squares = fitting.refit(_curve(x_GxM), above, start, weights=weight_GxM, lower=_LOWER, upper=_UPPER)
    return theta[..., 0], theta[..., 1], squares


def _robust_start(
    weight_GxM: np.ndarray, above_ExGxM: np.ndarray, slopes: np.ndarray, basis_GxMxb: np.ndarray, delta: float
) -> np.ndarray:
    """(alpha, b)_ExGx2 of the least Huber loss on the grid of b: its amplitude by squares that are weighted again and again."""
    factor = np.ones((*above_ExGxM.shape, len(slopes)))
    for _ in range(_REWEIGHTED):
        weighted = weight_GxM[..., None] * factor * basis_GxMxb
        product, norm = np.einsum("egmb,egm->egb", weighted, above_ExGxM), np.sum(weighted * basis_GxMxb, 2)
        amplitude = np.maximum(product / norm, 1e-9)
        residual = np.sqrt(weight_GxM)[..., None] * (above_ExGxM[..., None] - amplitude[:, :, None] * basis_GxMxb)
        factor = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    best = np.argmin(fitting.rho(residual, delta).sum(2), axis=-1)
    return np.stack([np.log(np.take_along_axis(amplitude, best[..., None], -1)[..., 0]), slopes[best]], axis=-1)


def _fit(
    x_GxM: np.ndarray, loss_GxM: np.ndarray, weight_GxM: np.ndarray, entropy: float | None, huber_delta: float | None
) -> fitting.Fit:
    """Two routes to one minimum: over E alone, of the best law of every H for that E; then all coefficients at once.

    Both are of squares, or both of Huber's loss.
    """
    there = weight_GxM > 0
    lowest = float(loss_GxM[there].min())
    if entropy is None:
        grid = lowest * (1 - np.geomspace(1e-4, 1.0, _GRID_E))  # from just below the lowest loss down to 0
        for _ in range(6):
            best = int(np.argmin(conditional(x_GxM, loss_GxM, weight_GxM, grid, huber_delta)[2].sum(-1)))
            value = float(grid[best])
            grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 17)
    else:
        value = entropy
    alpha, b, _ = conditional(x_GxM, loss_GxM, weight_GxM, np.array([value]), huber_delta)
    start = np.concatenate([[value], np.stack([alpha[0], b[0]], -1).ravel()])
    weights, whole, y = weight_GxM[there], curves(x_GxM, there), loss_GxM[there]
    lower = np.array([0.0] + [-np.inf, 0.0] * len(x_GxM))
    if entropy is None:
        upper = np.array([lowest * (1 - 1e-4)] + [np.inf, np.inf] * len(x_GxM))
        return fitting.fit(whole, y, start, lower=lower, upper=upper, weights=weights, huber_delta=huber_delta)

    def given(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E is no coefficient then, and has no variance."""
        value, jacobian = whole(np.concatenate([[entropy], theta]))
        return value, jacobian[:, 1:]

    fit = fitting.fit(given, y, start[1:], lower=lower[1:], weights=weights, huber_delta=huber_delta)
    inverse, bound = np.pad(fit.inverse, ((1, 0), (1, 0))), tuple(i + 1 for i in fit.bound)
    return dataclasses.replace(fit, theta=np.concatenate([[entropy], fit.theta]), inverse=inverse, bound=bound)


def _curve(x: np.ndarray) -> fitting.Model:
    """exp(alpha - b x) of coefficients (..., G, 2) at x (G, M)."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = np.exp(theta[..., :1] - theta[..., 1:] * x)
        return value, np.stack([value, -x * value], axis=-1)

    return model


def curves(x_GxM: np.ndarray, there_GxM: np.ndarray) -> fitting.Model:
    """All laws of a block: coefficients (..., 1 + 2 G) -> the losses of the points that are there."""
    rows, columns = np.nonzero(there_GxM)
    x, where = x_GxM[rows, columns], np.arange(len(rows))

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = np.exp(theta[..., 1 + 2 * rows] - theta[..., 2 + 2 * rows] * x)
        jacobian = np.zeros((*value.shape, theta.shape[-1]))
        jacobian[..., 0] = 1.0
        jacobian[..., where, 1 + 2 * rows] = value
        jacobian[..., where, 2 + 2 * rows] = -x * value
        return value + theta[..., :1], jacobian

    return model


def _residual(theta: np.ndarray, x_GxM: np.ndarray, loss_GxM: np.ndarray) -> np.ndarray:
    return np.exp(theta[1::2, None] - theta[2::2, None] * x_GxM) + theta[0] - loss_GxM


def _size(alpha: float, b: float, above: float) -> float:
    """ln(N* / N0) of a law that must reach `above` over E; inf where that is not above 0."""
    return float((alpha - np.log(above)) / b) if above > 0 else np.inf


def _sum_of_squares_given_b(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, entropy_CxE: np.ndarray, b_C: np.ndarray
) -> np.ndarray:
    """Least sums of squares_CxE of one H for given b and E: the amplitude is linear, and not negative.

    A steeper law than any real one counts as 2 LARGEST_B, so that data that do not bound b leave its interval open.
    """
    basis = np.exp(-np.clip(b_C, 0, 2 * LARGEST_B)[:, None, None] * x)
    above = y - entropy_CxE[..., None]
    norm = np.sum(w * basis**2, -1)
    amplitude = np.maximum(np.sum(w * above * basis, -1), 0.0) / norm
    return np.where(b_C[:, None] > 0, np.sum(w * above**2, -1) - amplitude**2 * norm, np.inf)


def _sum_of_squares_through(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, entropy: np.ndarray, scale: np.ndarray, turn: np.ndarray, near: float
) -> np.ndarray:
    """Least sums of squares_CxE of laws scale exp(b (turn - x)) + E over b: of those that pass through a given point."""
    gap = turn[..., None] - x

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = scale[..., None] * np.exp(np.clip(theta * gap, -300, 300))
        return value, (gap * value)[..., None]

    above = y - entropy[..., None]
    starts = np.clip(near * np.array([0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0]), SMALLEST_B, LARGEST_B)
    tried = np.stack([np.sum(w * (model(np.array([s]))[0] - above) ** 2, -1) for s in starts], -1)
    start = starts[np.argmin(tried, -1)][..., None]
    _, squares = fitting.refit(model, above, start, weights=w, lower=SMALLEST_B / 2, upper=2 * LARGEST_B, iterations=30)
    return np.where(scale > 0, squares, np.inf)


def _least_over_entropy(
    squares: Callable[[np.ndarray], np.ndarray], grid: np.ndarray, rest: np.ndarray, count: int
) -> np.ndarray:
    """Minimum over E of squares(entropy_CxE) of one H plus `rest` of the others on `grid`: there, then between its points.

    A quantity that is nearly a function of E, like a, has a minimum far narrower than the steps of the grid.
    """
    others = interpolate.CubicSpline(grid, rest) if len(grid) > 3 else lambda entropy: np.full(entropy.shape, rest[0])
    entropy = np.broadcast_to(grid, (count, len(grid)))
    least = np.full(count, np.inf)
    rows = np.arange(count)
    for _ in range(4 if len(grid) > 3 else 1):
        total = squares(entropy) + others(entropy)
        best = np.argmin(total, -1)
        least = np.minimum(least, total[rows, best])
        low = entropy[rows, np.maximum(best - 1, 0)]
        high = entropy[rows, np.minimum(best + 1, entropy.shape[1] - 1)]
        entropy = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 9)
    return least
