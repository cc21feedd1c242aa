"""Draws from what `evidence` has explored, and the law of Llama 3's heads in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gqa_jax.laws import bends, evidence, head_law
from gqa_jax.laws.bends import Bends
from gqa_jax.laws.block import conditional
from gqa_jax.laws.evidence import Explored
from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.laws.law import closest
from gqa_jax.laws.posterior import Drawn

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block
    from gqa_jax.laws.by_heads import LawsByHeads

_ROUNDS = 40  # of draws, each a quarter more than are wanted, until enough fall with size
_LLAMA3_SIZES = 8


def posterior(block: Block, count: int, seed: int, *, wide: bool) -> Drawn:
    """Draws of the model of `evidence`; `wide`: as there. Raises ValueError where too few of them fall with size."""
    known = block.explored(wide, seed)
    generator = np.random.default_rng([seed, 9])
    parts, found = [], 0
    for _ in range(_ROUNDS):
        parts.append(_some(block, known, count + count // 4, generator))
        found += len(parts[-1].entropy_S)
        if found >= count:
            break
    else:
        raise ValueError(
            f"{found} of {count} draws of the posterior fall with size: the losses are too noisy for a law; train larger sizes"
        )
    return evidence.taken(evidence.joined(parts), slice(0, count))


def _some(block: Block, known: Explored, count: int, generator: np.random.Generator) -> Drawn:
    """Draws with everything that was integrated drawn anew; those whose law does not fall with size left out."""
    points = evidence.taken(known.points, evidence.systematic(known.weight_S, count, generator))
    node, linear, basis = points.node_S, known.linear, known.basis_Gx2xK
    gaussian = known.integrate(points)
    lower = np.linalg.cholesky(gaussian.information_SxDxD)
    whitened = np.linalg.solve(lower, gaussian.right_SxD[..., None])
    z = generator.normal(size=whitened.shape)
    shared_SxD = np.linalg.solve(np.swapaxes(lower, 1, 2), whitened + z)[..., 0]
    n_beta = 0 if basis is None else basis.shape[2]
    beta, columns = shared_SxD[:, :n_beta], shared_SxD[:, n_beta:]
    rest = linear.Ay_IxGx2[node] - np.einsum("sgic,sc->sgi", linear.AC_IxGx2xC[node], columns)
    right = rest / points.sigma_S[:, None, None] ** 2
    if basis is not None:
        right = right + np.einsum("gik,sk->sgi", basis, beta) / points.tau_Sx2[:, None] ** 2
    theta = (gaussian.own_SxGx2x2 @ right[..., None])[..., 0] + _normal(gaussian.own_SxGx2x2, generator)
    entropy, shift = _within(linear, node, generator)
    theta = theta + shift
    forms = [known.model.forms[k] for k in linear.form_I[node]]
    kind, place = np.array([f.kind for f in forms]), np.array([f.place for f in forms])
    bent = Bends(block.center, known.model.reach, kind, np.where(kind == bends.NONE, 0.0, columns[:, 0]), place)
    keep = bent.falls(theta[..., 1])
    drawn = Drawn(
        entropy, theta[..., 0], theta[..., 1], points.sigma_S, None if basis is None else beta, points.tau_Sx2, points.kappa_S,
        np.where(points.kappa_S[:, None] > 0, columns[:, 1:], 0.0), bent,
    )  # fmt: skip
    return evidence.taken(drawn, keep)


def _within(linear: evidence.Linear, node: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """E drawn evenly within its interval of the grid, and how far (alpha, b)_SxGx2 move with it."""
    width = linear.width_I[node]
    step = (generator.random(len(node)) - 0.5) * width
    n = int(np.sum(linear.form_I == linear.form_I[0]))
    if n == 1:
        return linear.entropy_I[node], np.zeros((len(node), *linear.theta_IxGx2.shape[1:]))
    place = node % n
    low, high = node - (place > 0), node + (place < n - 1)
    rise = linear.entropy_I[high] - linear.entropy_I[low]
    slope = (linear.theta_IxGx2[high] - linear.theta_IxGx2[low]) / rise[:, None, None]
    return linear.entropy_I[node] + step, slope * step[:, None, None]


def pooling(block: Block) -> np.ndarray | None:
    """Basis_Gx2xK of the head law: functions of heads, and a column for each rule, in alpha and in b; None for too few H."""
    if (told := _functions(block)) is None:
        return None
    columns = _features(block.heads)
    rules = np.array([[h == rule for rule in block.heads if rule.n_heads is None] for h in block.heads], float)
    parts = [np.concatenate([columns[:, kept], rules.reshape(len(block.heads), -1)], 1) for kept in told]
    return np.stack([np.pad(parts[0], ((0, 0), (0, parts[1].shape[1]))), np.pad(parts[1], ((0, 0), (parts[0].shape[1], 0)))], 1)


def _functions(block: Block) -> tuple[list[int], list[int]] | None:
    """Which of `_features` are in alpha and in b; None where H without a rule are too few."""
    counted = np.array([h.n_heads is not None for h in block.heads])
    if counted.sum() < head_law.POOLED_FROM:
        return None
    columns, most = _features(block.heads)[counted], max(1, int(counted.sum()) - 4)
    return head_law.told_apart(columns, range(6), most), head_law.told_apart(columns, range(3), most)


def _features(heads: Sequence[Heads]) -> np.ndarray:
    """`head_law.terms` (G, 6) of heads; zeros for a rule, which has a column of its own."""
    pairs = [(h.n_heads, h.n_kv_heads) if h.n_heads is not None else (1, 1) for h in heads]
    counted = np.array([h.n_heads is not None for h in heads])
    return head_law.terms(*np.array(pairs, np.float64).T, np.zeros(2)) * counted[:, None]


def _normal(covariance: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Normal vectors (..., 2) of these covariances (..., 2, 2)."""
    a, c, d = covariance[..., 0, 0], covariance[..., 1, 0], covariance[..., 1, 1]
    first = np.sqrt(np.maximum(a, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cross = np.where(first > 0, c / first, 0.0)
    second = np.sqrt(np.maximum(d - cross**2, 0.0))
    z = generator.normal(size=(*first.shape, 2))
    return np.stack([first * z[..., 0], cross * z[..., 0] + second * z[..., 1]], -1)


def llama3(laws: LawsByHeads, block: Block, drawn: Drawn, generator: np.random.Generator):
    """Columns (E, ln a, b) of Llama 3's heads: from runs that have them, else the head law; (None, "") without either."""
    if laws.llama3 is not None:
        runs = laws.llama3
        x, y = np.log(runs.params / block.center)[None], runs.loss[None]
        grid = np.unique(np.quantile(drawn.entropy_S, np.linspace(0, 1, 60)))
        alpha, b, _ = conditional(x, y, np.ones_like(x), grid)
        theta = np.stack([np.interp(drawn.entropy_S, grid, alpha[:, 0]), np.interp(drawn.entropy_S, grid, b[:, 0])], -1)
        value = np.exp(theta[:, :1] - theta[:, 1:] * x)
        J = np.stack([value, -x * value], -1)
        noise = drawn.sigma_S * np.sqrt(1 + np.asarray(drawn.kappa_S))
        unit = np.linalg.inv(np.swapaxes(J, -1, -2) @ J)
        if drawn.bends is not None:  # the power law closest to what is left without the bend
            q = drawn.bends.at(np.broadcast_to(np.log(runs.params), (len(drawn.entropy_S), len(runs.params))))[0]
            theta = theta + np.einsum("sij,smj,sm->si", unit, J, value * q)
        theta = theta + _normal(unit * noise[:, None, None] ** 2, generator)
        note = f"Llama 3's heads {LLAMA3}: a law of {len(runs.loss)} {laws.llama3_source}"
    elif drawn.beta_SxK is not None and np.isfinite(block.runs[0].d_model).all():
        note = f"Llama 3's heads {LLAMA3}: from the head law, for d / d_h query heads; no run has them at three sizes"
        sizes = np.concatenate([runs.params for runs in block.runs])
        widths = np.concatenate([runs.d_model for runs in block.runs])
        order = np.argsort(sizes)
        slope, offset = np.polyfit(np.log(sizes[order]), np.log(widths[order]), 1)
        grid = np.geomspace(sizes.min(), sizes.max(), _LLAMA3_SIZES)
        n_heads = np.exp(offset + slope * np.log(grid)) / laws.head_dim
        counts = [h.n_heads for h in block.heads if h.n_heads is not None]
        least, most = min(counts), max(counts)
        inside = (n_heads <= most) & (n_heads >= max(least, 1)) & (n_heads >= LLAMA3.n_kv_heads)
        if inside.sum() < 3 or max(h.n_kv_heads for h in block.heads) < LLAMA3.n_kv_heads:
            return None, ""
        x = np.log(grid[inside] / block.center)
        theta = _head_law(block, n_heads[inside], LLAMA3.n_kv_heads, x, drawn, generator)
    else:
        return None, ""
    b = np.maximum(theta[:, 1], 1e-3 if drawn.bends is None else drawn.bends.least_b_S)  # each falls with size everywhere
    return (drawn.entropy_S, np.log(block.center) + theta[:, 0] / b, b), note


def _head_law(block: Block, n_heads_J: np.ndarray, n_kv_heads: int, x_J: np.ndarray, drawn: Drawn, generator) -> np.ndarray:
    """(alpha, b)_Sx2 of the power law closest to ln(L - E) = alpha(H_j) - b(H_j) x_j, H_j the heads at size j."""
    columns = head_law.terms(n_heads_J, np.full(len(x_J), float(n_kv_heads)), np.zeros(2))
    n_rules, first, coefficients = sum(h.n_heads is None for h in block.heads), 0, []
    u_Sx2 = generator.normal(size=(len(drawn.entropy_S), 2)) * drawn.tau_Sx2
    for part, kept in enumerate(_functions(block)):
        coefficients.append(drawn.beta_SxK[:, first : first + len(kept)] @ columns[:, kept].T + u_Sx2[:, [part]])
        first += len(kept) + n_rules
    alpha_SxJ, b_SxJ = coefficients
    return closest(alpha_SxJ - b_SxJ * x_J, x_J).T
