"""What the laws of some head configurations say of another one: in every joint draw, a smooth function of its heads.

    ln(L - E) = alpha(u, v) - b(u, v) x - q(x),   x = ln(N / N0),   u = log2 n_h, v = log2 n_kv

E and the bend q are those of the draw. alpha and b are quadratic in (u, v) about the middle of the heads that have laws, as far
as there are enough of them, and every H deviates from that: by as much as the drawn laws do, whose scatter is drawn too (scaled
inverse chi-square). What is asked for deviates like the others, and one doubling outside their range as much again.

The quadratic coefficients have priors, Normal about 0 with QUADRATIC: where the laws say nothing of them, as beyond the largest
n_h, their doubt is in the draws. They are as large as those of the 21 curves that are calibrated on the paper's Table 4: .0044
for u^2 in alpha, .0013 and less for the others, .001 in b.

A rule, whose heads grow with the width (Llama 3's), is one more H, with the heads that its runs had: its law is the power law
closest to the smooth one along its sizes. So it tells what many query heads do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gqa_jax.laws.heads import Heads
from gqa_jax.laws.law import closest

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block
    from gqa_jax.laws.posterior import Draws

POOLED_FROM = 5  # head configurations with fixed heads
FARTHEST = 32.0  # times outside the heads that have laws: beyond it nothing is said
QUADRATIC = (0.004, 0.001)  # standard deviations of the quadratic coefficients of alpha and of b
_LEFT = 4  # laws more than coefficients without a prior: what the scatter is known from
_RATIO = 3.0  # of the scatters of alpha and of b, to weigh them by


class NoHeadLaw(ValueError):
    """The laws say nothing of these heads."""


@dataclasses.dataclass(frozen=True)
class HeadRange:
    """The heads that have laws, a rule's as its runs had them."""

    n_heads: tuple[float, float]
    n_kv_heads: tuple[float, float]

    def outside(self, n_heads: float, n_kv_heads: float) -> float:
        """Doublings by which (n_h, n_kv) lie outside, summed."""
        pairs = ((n_heads, self.n_heads), (n_kv_heads, self.n_kv_heads))
        return float(sum(max(0.0, np.log2(low / value), np.log2(value / high)) for value, (low, high) in pairs))


def paths(block: Block, head_dim: float) -> dict[Heads, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(x, n_h, n_kv) of every H of a block, at its sizes; a rule without known widths is left out."""
    found = {}
    for heads, runs in zip(block.heads, block.runs, strict=True):
        x = np.log(runs.params / block.center)
        if heads.n_heads is not None:
            found[heads] = x[:1] * 0.0, np.array([float(heads.n_heads)]), np.array([float(heads.n_kv_heads)])
        elif np.isfinite(runs.d_model).all() and len(np.unique(runs.params)) > 1:
            ones = np.ones(len(x))
            found[heads] = x, ones * heads.query_heads(runs.d_model, head_dim), ones * heads.kv_heads(runs.d_model, head_dim)
    return found


def heads_range(block: Block, head_dim: float) -> HeadRange:
    """The least and most heads of `paths`."""
    every = list(paths(block, head_dim).values())
    n_heads, n_kv = (np.concatenate([path[i] for path in every]) for i in (1, 2))
    return HeadRange((float(n_heads.min()), float(n_heads.max())), (float(n_kv.min()), float(n_kv.max())))


def draws_of(
    drawn: Draws, block: Block, head_dim: float, n_heads: float, n_kv_heads: float, generator: np.random.Generator
) -> Draws:
    """The draws of one more H, in each of which it is consistent with the others: they share E, the bend and the common error.

    n_heads and n_kv_heads may be any numbers above 0. Raises NoHeadLaw: too few H, or heads too far outside those with laws.
    """
    known = {heads: path for heads, path in paths(block, head_dim).items() if heads in drawn.heads}
    counted = sum(heads.n_heads is not None for heads in known)
    if counted < POOLED_FROM:
        raise NoHeadLaw(
            f"{counted} head configurations have laws, and a law of heads needs {POOLED_FROM} or more; "
            f"{_closest(block, n_heads)}"
        )
    ranges = heads_range(block, head_dim)
    outside = ranges.outside(n_heads, n_kv_heads)
    if outside > np.log2(FARTHEST):
        raise NoHeadLaw(
            f"heads ({n_heads:g},{n_kv_heads:g}) lie {2**outside:.0f} times outside those that have laws, n_h = "
            f"{ranges.n_heads[0]:g} to {ranges.n_heads[1]:g} and n_kv = {ranges.n_kv_heads[0]:g} to {ranges.n_kv_heads[1]:g}; "
            f"{_closest(block, n_heads)}"
        )
    columns = [drawn.heads.index(heads) for heads in known]
    b_SxG = drawn.b_SxH[:, columns]
    alpha_SxG = b_SxG * (drawn.log_a_SxH[:, columns] - np.log(block.center))
    middle = np.log2(np.array([[path[1].mean(), path[2].mean()] for path in known.values()])).mean(0)
    design, target = _design(list(known.values()), middle), np.concatenate([alpha_SxG, b_SxG], 1)
    asked = terms(np.array([n_heads]), np.array([n_kv_heads]), middle)[0]
    theta_Sx2 = _predict(design, target, asked, len(known), 1.0 + outside, generator)
    least = 1e-3 if drawn.bends is None else drawn.bends.least_b_S
    b_S = np.maximum(theta_Sx2[:, 1], least)
    log_a = np.log(block.center) + theta_Sx2[:, 0] / b_S
    heads = Heads(*(int(n) if float(n).is_integer() else float(n) for n in (n_heads, n_kv_heads)))
    said = f"{heads}: no run has these heads; from the law of heads of {len(known)} configurations"
    if outside > 0:
        said += f", {2**outside:.2g} times outside those that were trained"
    return dataclasses.replace(
        drawn, heads=[heads], entropy_SxH=drawn.entropy_SxH[:, columns[:1]], log_a_SxH=log_a[:, None], b_SxH=b_S[:, None],
        sigma_SxH=drawn.sigma_SxH[:, columns[:1]], notes=(said,),
    )  # fmt: skip


def terms(n_heads: np.ndarray, n_kv_heads: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """1, u, v, u^2, v^2, u v (J, 6), u = log2 n_h and v = log2 n_kv about `middle`."""
    u, v = np.log2(n_heads) - middle[0], np.log2(n_kv_heads) - middle[1]
    return np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], -1)


def _design(every: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], middle: np.ndarray) -> np.ndarray:
    """(2 G, 12): how alpha_1..G, then b_1..G, of the closest power laws follow from the coefficients of alpha and of b."""
    rows = np.zeros((2, len(every), 12))
    for g, (x, n_heads, n_kv_heads) in enumerate(every):
        own = terms(n_heads, n_kv_heads, middle)
        values = np.concatenate([own, -x[:, None] * own], 1)  # of ln(L - E) at the sizes
        if len(x) == 1:
            rows[0, g, :6], rows[1, g, 6:] = own[0], own[0]
            continue
        rows[:, g] = closest(values.T, x)
    return rows.reshape(-1, 12)


def _predict(
    design: np.ndarray, target_Sx2G: np.ndarray, asked: np.ndarray, n_laws: int, times: float, generator: np.random.Generator
) -> np.ndarray:
    """(alpha, b)_Sx2 of the heads with these terms; `times`: how many times the others' scatter theirs is."""
    # Columns 1, u, v of alpha and of b that the laws can tell apart, and that leave some laws to see the scatter by.
    flat = told_apart(design, range(3), max(1, n_laws - _LEFT))
    flat += told_apart(design, range(6, 9), max(1, n_laws - _LEFT), flat)
    used = [*flat, *(column + 6 * part for part in (0, 1) for column in (3, 4, 5))]
    weight = np.repeat([1.0, _RATIO], n_laws)
    X, y = design[:, used] * weight[:, None], target_Sx2G * weight
    precision = np.zeros(len(used))
    # The scatter is that of the draws about the plane; with priors on the curvature it is smaller, which is not counted on.
    scale2 = float(np.median(_scatter(design[:, flat] * weight[:, None], y)))
    for place in range(len(flat), len(used)):
        precision[place] = scale2 / QUADRATIC[used[place] >= 6] ** 2
    inverse = np.linalg.inv(X.T @ X + np.diag(precision))
    mean_SxK = y @ X @ inverse
    hat = np.trace(X @ inverse @ X.T)
    freedom = max(2 * n_laws - hat, 1.0)
    rest = y - mean_SxK @ X.T
    squares_S = np.sum(rest**2, 1) + mean_SxK**2 @ precision
    spread_S = np.sqrt(squares_S / generator.chisquare(freedom, len(y)))
    coefficients = mean_SxK + spread_S[:, None] * (generator.normal(size=mean_SxK.shape) @ np.linalg.cholesky(inverse).T)
    full = np.zeros((len(y), 12))
    full[:, used] = coefficients
    own = times * spread_S[:, None] * generator.normal(size=(len(y), 2)) / np.array([1.0, _RATIO])
    return np.stack([full[:, :6] @ asked, full[:, 6:] @ asked], 1) + own


def told_apart(columns: np.ndarray, asked: Iterable[int], most: int, beside: Sequence[int] = ()) -> list[int]:
    """Those of the columns that are asked for, `most` of them, that no columns before them and `beside` add up to."""
    found = list(beside)
    for column in asked:
        if len(found) - len(beside) < most and np.linalg.matrix_rank(columns[:, [*found, column]]) == len(found) + 1:
            found.append(column)
    return found[len(beside) :]


def _scatter(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squares_S about the fit of X to the rows of y."""
    rest = y - y @ X @ np.linalg.inv(X.T @ X) @ X.T
    return np.sum(rest**2, 1) / (X.shape[0] - X.shape[1])


def _closest(block: Block, n_heads: float) -> str:
    """The H with a law whose number of query heads is the closest, for an error."""
    counted = [heads for heads in block.heads if heads.n_heads is not None] or list(block.heads)
    nearest = min(counted, key=lambda heads: abs(np.log(n_heads / (heads.n_heads or n_heads))))
    return f"the closest that has a law is {nearest}"
