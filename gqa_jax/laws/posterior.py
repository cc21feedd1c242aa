"""Joint draws of the coefficients of all head configurations: what is uncertain about an answer is computed from them.

`posterior` (the default). Given E, the laws of different H are independent and nearly Gaussian in theta = (alpha, b)
(`block.conditional`), so their joint posterior is drawn without a Markov chain: E, the noise sigma and the spread tau of the
H on a grid, by their marginal likelihood, then theta of every H. With five H or more they are pooled (a hierarchical head
law): theta_H = X_H beta + u_H, u_H ~ Normal(0, diag(tau_alpha^2, tau_b^2)), X_H polynomials in log2 n_h and log2 n_kv, beta
flat, tau log-uniform. Runs of neighbouring H then support each other as far as the data say that H vary smoothly. Without
pooling E has its profile likelihood, and beta, tau don't exist. Priors: flat in E between 0 and the lowest loss, 1/sigma.

`bootstrap`: every run's loss is drawn anew from its fitted law with the pooled noise, whose size varies as its degrees of
freedom allow, and all coefficients are fitted again.

Losses of runs that were evaluated on the same text are all off by one common amount against the text at large: so every draw
has a shift (`SharedError.draws`) that is the same for all H, whatever loss is asked for. N* of all H move with it; which H is
the cheapest hardly does.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from gqa_jax.laws import fitting
from gqa_jax.laws.bends import Bends
from gqa_jax.laws.block import SMALLEST_B, conditional, curves
from gqa_jax.laws.heads import LLAMA3, Heads

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block
    from gqa_jax.laws.by_heads import LawsByHeads

POOLED_FROM = 5  # head configurations
_TAU_ALPHA = (0.001, 0.003, 0.006, 0.012, 0.025, 0.05, 0.1)  # of ln(L - E) amid the data
_TAU_B = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.04)
_N_ENTROPY, _N_SIGMA = 80, 15
_LLAMA3_SIZES = 8


@dataclasses.dataclass(frozen=True)
class Draws:
    """S joint draws of the laws exp(b (ln a - ln N) - q(ln N)) + E of H head configurations, q a bend that they share."""

    heads: list[Heads]
    entropy_SxH: np.ndarray
    log_a_SxH: np.ndarray  # ln a
    b_SxH: np.ndarray
    sigma_SxH: np.ndarray  # noise of a run, nats per token
    method: str
    notes: tuple[str, ...] = ()  # how an H came in that has no law of its own
    shift_S: np.ndarray | float = 0.0  # of every E: the error that all losses have in common, which is in entropy_SxH
    bends: Bends | None = None  # None: power laws

    @property
    def entropy_on_text_SxH(self) -> np.ndarray:
        """E of the held-out text that the runs were evaluated on, and another run would be: without the common error."""
        return self.entropy_SxH - np.reshape(self.shift_S, (-1, 1))

    def log_size(self, loss: float) -> np.ndarray:
        """ln N*_SxH that reaches `loss`; inf in draws whose E is not below it."""
        gap = loss - self.entropy_SxH
        log_n = np.where(gap > 0, self.log_a_SxH - np.log(np.where(gap > 0, gap, 1.0)) / self.b_SxH, np.inf)
        return log_n if self.bends is None else self.bends.log_size(log_n, self.b_SxH)

    def loss(self, heads: Heads, params: np.ndarray, *, on_this_text: bool = False) -> np.ndarray:
        """Loss_SxN of H at N parameters (N,); `on_this_text`: without the error that all losses have in common."""
        i, log_n = self.heads.index(heads), np.log(np.atleast_1d(np.asarray(params, np.float64)))
        log_above = self.b_SxH[:, i, None] * (self.log_a_SxH[:, i, None] - log_n)
        if self.bends is not None:
            log_above = log_above - self.bends.at(log_n[None])[0]
        entropy_SxH = self.entropy_on_text_SxH if on_this_text else self.entropy_SxH
        return np.exp(log_above) + entropy_SxH[:, i, None]

    def take(self, heads: list[Heads]) -> Draws:
        """The same draws of these H."""
        columns = [self.heads.index(h) for h in heads]
        parts = {name: getattr(self, name)[:, columns] for name in ("entropy_SxH", "log_a_SxH", "b_SxH", "sigma_SxH")}
        return dataclasses.replace(self, heads=list(heads), **parts)


def draw(laws: LawsByHeads, count: int, seed: int, method: str) -> Draws:
    """`count` joint draws. Llama 3's heads are added where their law follows from these runs (`Draws.notes` says how).

    Raises ValueError for an unknown method, or where there are no more runs than coefficients: then nothing is known of noise.
    """
    if method not in ("posterior", "bootstrap"):
        raise ValueError(f"method {method!r} is unknown: use posterior or bootstrap")
    if count < 2:
        raise ValueError(f"count = {count}: draw 2 or more")
    generator = np.random.default_rng(seed)
    parts, notes = [], []
    for block in laws.blocks:
        if not np.isfinite(block.sigma):
            raise ValueError(
                "as many coefficients as runs: the noise of a run, and so every uncertainty, is unknown. Train more sizes or "
                "seeds"
            )
        drawn = _posterior(block, count, generator) if method == "posterior" else _bootstrap(block, count, generator)
        parts.append((block, drawn))
    heads = [h for block, _ in parts for h in block.heads]
    entropy = np.concatenate([np.repeat(one.entropy_S[:, None], len(block.heads), 1) for block, one in parts], 1)
    log_a = np.concatenate([np.log(block.center) + one.alpha_SxG / one.b_SxG for block, one in parts], 1)
    b = np.concatenate([one.b_SxG for _, one in parts], 1)
    sigma = np.concatenate([np.repeat(one.sigma_S[:, None], len(block.heads), 1) for block, one in parts], 1)
    if LLAMA3 not in heads and len(parts) == 1:
        extra, note = _llama3(laws, *parts[0], generator)
        if extra is not None:
            heads.append(LLAMA3)
            entropy, log_a, b = (np.column_stack([m, c]) for m, c in zip((entropy, log_a, b), extra, strict=True))
            sigma = np.column_stack([sigma, sigma[:, 0]])
            notes.append(note)
    shift = laws.blocks[0].shared.draws(count, seed)
    return Draws(heads, entropy + shift[:, None], log_a, b, sigma, method, tuple(notes), shift)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    entropy_S: np.ndarray
    alpha_SxG: np.ndarray
    b_SxG: np.ndarray
    sigma_S: np.ndarray
    beta_SxK: np.ndarray | None = None
    tau_Sx2: np.ndarray | None = None


def _bootstrap(block: Block, count: int, generator: np.random.Generator) -> _Drawn:
    there = block.weight_GxM > 0
    model = curves(block.x_GxM, there)
    weights = block.weight_GxM[there]
    fitted = model(block.fit.theta)[0]
    noise = fitting.noise(block.sigma, block.dof, (count, fitted.size), generator) / np.sqrt(weights)
    y = fitted + noise
    given = block.given_entropy
    lower = np.array([0.0 if given is None else given] + [-np.inf, 1e-4] * len(block.heads))
    highest = y.min(-1, keepdims=True) * (1 - 1e-4) if given is None else np.full((count, 1), given)
    upper = np.concatenate([highest, np.full((count, 2 * len(block.heads)), np.inf)], -1)
    theta = np.concatenate(
        [
            fitting.refit(model, y[i : i + 100], block.fit.theta, lower=lower, upper=upper[i : i + 100], weights=weights)[0]
            for i in range(0, count, 100)
        ]
    )
    return _Drawn(theta[:, 0], theta[:, 1::2], theta[:, 2::2], np.full(count, block.sigma))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a block's runs say of E, sigma and tau, on a grid, and of theta for every E."""

    entropies: np.ndarray
    sigmas: np.ndarray
    taus: list[tuple[float, float]]
    share_TxSxE: np.ndarray  # of the posterior
    theta_ExGx2: np.ndarray  # (alpha, b)
    unit_V: np.ndarray  # covariance_ExGx2x2 of theta for sigma = 1
    basis_Gx2xK: np.ndarray | None  # of the head law; None where H are not pooled


def evidence(block: Block) -> Evidence:
    """The marginal likelihood of E, sigma and tau; `Block.evidence` keeps it, as it depends on no seed."""
    grid = _entropies(block)
    alpha_ExG, b_ExG, squares_ExG = block.conditional(grid)
    squares = squares_ExG.sum(-1)
    theta = np.stack([alpha_ExG, b_ExG], -1)
    unit_V, log_volume = _covariance_given_entropy(block, theta)
    sigmas = _sigmas(block)  # even in ln sigma: the prior is 1 / sigma
    n, groups = int((block.weight_GxM > 0).sum()), len(block.heads)
    basis, taus = _pooling(block)
    log_weights = np.empty((len(taus), len(sigmas), len(grid)))
    for i, sigma in enumerate(sigmas):
        likelihood = -n * np.log(sigma) - squares / (2 * sigma**2) + 2 * groups * np.log(sigma)
        if basis is None:
            log_weights[0, i] = likelihood
            continue
        for t, tau in enumerate(taus):
            log_weights[t, i] = likelihood + log_volume + _pool(basis, theta, unit_V * sigma**2, tau).log_evidence
    weights = np.exp(log_weights - log_weights.max())
    weights = weights * _widths(grid)
    return Evidence(grid, sigmas, taus, weights / weights.sum(), theta, unit_V, basis)


def _posterior(block: Block, count: int, generator: np.random.Generator) -> _Drawn:
    known = block.evidence
    grid, theta, unit_V, basis = known.entropies, known.theta_ExGx2, known.unit_V, known.basis_Gx2xK
    weights = known.share_TxSxE
    picked = generator.choice(weights.size, count, p=weights.ravel())
    t, s, e = np.unravel_index(picked, weights.shape)
    entropy, low, share = _between(grid, e, generator)
    center = theta[low] * (1 - share[:, None, None]) + theta[np.minimum(low + 1, len(grid) - 1)] * share[:, None, None]
    sigmas = known.sigmas
    V = unit_V[e] * (sigmas[s] ** 2)[:, None, None, None]
    if basis is None:
        drawn = center + _normal(V, generator)
        return _clean(_Drawn(entropy, drawn[..., 0], drawn[..., 1], sigmas[s]))
    tau = np.array(known.taus)[t]
    pooled = _pool(basis, center, V, tau)
    beta = (
        pooled.beta
        + np.linalg.solve(
            np.swapaxes(np.linalg.cholesky(pooled.information), -1, -2), generator.normal(size=pooled.beta.shape)[..., None]
        )[..., 0]
    )
    mean = np.einsum("gik,sk->sgi", basis, beta)
    prior = (tau**2)[:, None, :, None] * np.eye(2)
    gain = prior @ pooled.inverse
    spread = prior - gain @ prior
    drawn = (
        mean + np.einsum("sgij,sgj->sgi", gain, center - mean) + _normal((spread + np.swapaxes(spread, -1, -2)) / 2, generator)
    )
    return _clean(_Drawn(entropy, drawn[..., 0], drawn[..., 1], sigmas[s], beta, tau))


@dataclasses.dataclass(frozen=True)
class _Pooled:
    inverse: np.ndarray  # (..., G, 2, 2) of V + diag(tau^2)
    information: np.ndarray  # (..., K, K) of beta
    beta: np.ndarray  # (..., K)
    log_evidence: np.ndarray  # (...,)


def _pool(basis_Gx2xK: np.ndarray, theta: np.ndarray, V: np.ndarray, tau: np.ndarray) -> _Pooled:
    """theta_G ~ Normal(basis beta, V_G + diag(tau^2)) with beta flat: beta's posterior, and the evidence without constants."""
    W = np.linalg.inv(V + np.asarray(tau)[..., None, :, None] ** 2 * np.eye(2))
    weighted = np.einsum("gik,...gij->...gkj", basis_Gx2xK, W)
    information = np.einsum("...gkj,gjl->...kl", weighted, basis_Gx2xK)
    right = np.einsum("...gkj,...gj->...k", weighted, theta)
    beta = np.linalg.solve(information, right[..., None])[..., 0]
    rest = np.einsum("...gi,...gij,...gj->...", theta, W, theta) - np.sum(right * beta, -1)
    evidence = 0.5 * (np.linalg.slogdet(W)[1].sum(-1) - rest - np.linalg.slogdet(information)[1])
    return _Pooled(W, information, beta, evidence)


def _pooling(block: Block) -> tuple[np.ndarray | None, list[tuple[float, float]]]:
    """Basis_Gx2xK of the head law, and the grid of tau; (None, [one]) where H are too few. Llama 3's rule is not pooled."""
    counted = [h for h in block.heads if h.n_heads is not None]
    if len(counted) < POOLED_FROM:
        return None, [(np.inf, np.inf)]
    columns = _features(block.heads)
    most = max(1, len(counted) - 4)
    rules = np.array(
        [[h.n_heads is None and h == rule for rule in block.heads if rule.n_heads is None] for h in block.heads], float
    )

    def chosen(limit: int) -> np.ndarray:
        kept = [columns[:, 0]]
        for column in columns.T[1:limit]:
            trial = np.stack([*kept, column], 1)
            if (
                len(kept) < most
                and np.linalg.matrix_rank(trial[[h.n_heads is not None for h in block.heads]]) == trial.shape[1]
            ):
                kept.append(column)
        return np.concatenate([np.stack(kept, 1), rules.reshape(len(block.heads), -1)], 1)

    for_alpha, for_b = chosen(6), chosen(3)
    basis = np.zeros((len(block.heads), 2, for_alpha.shape[1] + for_b.shape[1]))
    basis[:, 0, : for_alpha.shape[1]] = for_alpha
    basis[:, 1, for_alpha.shape[1] :] = for_b
    return basis, [(a, b) for a in _TAU_ALPHA for b in _TAU_B]


def _features(heads: list[Heads] | tuple[Heads, ...]) -> np.ndarray:
    """1, u, v, u^2, v^2, u v with u = log2 n_h, v = log2 n_kv; zeros for a rule, which has a column of its own."""
    rows = []
    for h in heads:
        u, v = (0.0, 0.0) if h.n_heads is None else (np.log2(h.n_heads), np.log2(h.n_kv_heads))
        rows.append(np.array([1.0, u, v, u * u, v * v, u * v]) * (h.n_heads is not None))
    return np.array(rows)


def _entropies(block: Block) -> np.ndarray:
    if block.given_entropy is not None:
        return np.array([block.given_entropy])
    grid, _ = block.entropy_grid
    low, high = grid[0], grid[-1]
    return np.linspace(low, high, _N_ENTROPY)


def _sigmas(block: Block) -> np.ndarray:
    """Even in ln sigma, over what the degrees of freedom leave open."""
    if block.known_sigma is not None:
        return np.array([block.known_sigma])
    quantiles = stats.chi2.ppf([0.9995, 0.0005], block.dof)
    low, high = block.sigma * np.sqrt(block.dof / quantiles)
    return np.geomspace(low, min(high, 30 * block.sigma), _N_SIGMA)


def _covariance_given_entropy(block: Block, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(V_ExGx2x2 of theta for sigma = 1, the log volume_E of all of them)."""
    x, w = block.x_GxM, block.weight_GxM
    value = np.exp(theta[..., :1] - theta[..., 1:] * x)
    squares = w * value**2
    information = np.empty((*theta.shape, 2))
    information[..., 0, 0] = squares.sum(-1)
    information[..., 0, 1] = information[..., 1, 0] = (-x * squares).sum(-1)
    information[..., 1, 1] = (x**2 * squares).sum(-1)
    return np.linalg.inv(information), -0.5 * np.linalg.slogdet(information)[1].sum(-1)


def _widths(grid: np.ndarray) -> np.ndarray:
    return np.gradient(grid) if len(grid) > 1 else np.ones(1)


def _between(grid: np.ndarray, index: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E drawn evenly within half a step of its grid point; the grid point below it, and how far it is to the next."""
    if len(grid) == 1:
        return grid[index], index, np.zeros(len(index))
    step = grid[1] - grid[0]
    value = np.clip(grid[index] + step * (generator.random(len(index)) - 0.5), grid[0], grid[-1])
    low = np.clip(np.searchsorted(grid, value, "right") - 1, 0, len(grid) - 2)
    return value, low, (value - grid[low]) / step


def _normal(covariance: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Normal vectors (..., 2) of these covariances (..., 2, 2)."""
    a, c, d = covariance[..., 0, 0], covariance[..., 1, 0], covariance[..., 1, 1]
    first = np.sqrt(np.maximum(a, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cross = np.where(first > 0, c / first, 0.0)
    second = np.sqrt(np.maximum(d - cross**2, 0.0))
    z = generator.normal(size=(*first.shape, 2))
    return np.stack([first * z[..., 0], cross * z[..., 0] + second * z[..., 1]], -1)


def _clean(drawn: _Drawn) -> _Drawn:
    """Slopes of 0 or below, possible in the tails of a Gaussian, are the least there are."""
    return dataclasses.replace(drawn, b_SxG=np.maximum(drawn.b_SxG, SMALLEST_B))


def _llama3(laws: LawsByHeads, block: Block, drawn: _Drawn, generator: np.random.Generator):
    """Columns (E, ln a, b) of Llama 3's heads: from runs that have them, else the head law; (None, "") without either."""
    if laws.llama3 is not None:
        runs = laws.llama3
        x, y = np.log(runs.params / block.center)[None], runs.loss[None]
        grid = np.unique(np.quantile(drawn.entropy_S, np.linspace(0, 1, 60)))
        alpha, b, _ = conditional(x, y, np.ones_like(x), grid)
        theta = np.stack([np.interp(drawn.entropy_S, grid, alpha[:, 0]), np.interp(drawn.entropy_S, grid, b[:, 0])], -1)
        value = np.exp(theta[:, :1] - theta[:, 1:] * x)
        J = np.stack([value, -x * value], -1)
        V = np.linalg.inv(np.swapaxes(J, -1, -2) @ J) * drawn.sigma_S[:, None, None] ** 2
        theta = theta + _normal(V, generator)
        note = f"Llama 3's heads {LLAMA3}: a law of {len(runs.loss)} {laws.llama3_source}"
    elif drawn.beta_SxK is not None and np.isfinite(block.runs[0].d_model).all():
        note = f"Llama 3's heads {LLAMA3}: from the head law, for d / d_h query heads; no run has them at three sizes"
        sizes = np.concatenate([runs.params for runs in block.runs])
        widths = np.concatenate([runs.d_model for runs in block.runs])
        order = np.argsort(sizes)
        slope, offset = np.polyfit(np.log(sizes[order]), np.log(widths[order]), 1)
        grid = np.geomspace(sizes.min(), sizes.max(), _LLAMA3_SIZES)
        n_heads = np.exp(offset + slope * np.log(grid)) / laws.head_dim
        most = max(h.n_heads for h in block.heads if h.n_heads is not None)
        least = min(h.n_heads for h in block.heads if h.n_heads is not None)
        inside = (n_heads <= most) & (n_heads >= max(least, 1)) & (n_heads >= LLAMA3.n_kv_heads)
        if inside.sum() < 3 or max(h.n_kv_heads for h in block.heads) < LLAMA3.n_kv_heads:
            return None, ""
        x = np.log(grid[inside] / block.center)
        basis, _ = _pooling(block)
        pseudo = [Heads(n, LLAMA3.n_kv_heads) for n in n_heads[inside]]
        theta_Sx2 = _head_law(block, basis, pseudo, x, drawn, generator)
        theta = theta_Sx2
    else:
        return None, ""
    b = np.maximum(theta[:, 1], 1e-3)
    return (drawn.entropy_S, np.log(block.center) + theta[:, 0] / b, b), note


def _head_law(block: Block, basis: np.ndarray, pseudo: list[Heads], x: np.ndarray, drawn: _Drawn, generator) -> np.ndarray:
    """(alpha, b)_Sx2 of the power law closest to ln(L - E) = alpha(H_j) - b(H_j) x_j, H_j the heads at size j."""
    columns = _features(pseudo)
    names = _features(block.heads)
    used = [
        [int(np.flatnonzero((names == basis[:, row, k][:, None]).all(0))[0]) for k in _own(basis, row, names)] for row in (0, 1)
    ]
    keep = [_own(basis, row, names) for row in (0, 1)]
    u_Sx2 = generator.normal(size=(len(drawn.entropy_S), 2)) * drawn.tau_Sx2
    alpha_SxJ = drawn.beta_SxK[:, keep[0]] @ columns[:, used[0]].T + u_Sx2[:, :1]
    b_SxJ = drawn.beta_SxK[:, keep[1]] @ columns[:, used[1]].T + u_Sx2[:, 1:]
    log_above_SxJ = alpha_SxJ - b_SxJ * x
    slope = ((log_above_SxJ - log_above_SxJ.mean(1, keepdims=True)) @ (x - x.mean())) / np.sum((x - x.mean()) ** 2)
    return np.stack([log_above_SxJ.mean(1) - slope * x.mean(), -slope], -1)


def _own(basis: np.ndarray, row: int, names: np.ndarray) -> list[int]:
    """Columns of the basis that are features of heads (not those of a rule) and belong to alpha (0) or b (1)."""
    return [k for k in range(basis.shape[2]) if basis[:, row, k].any() and (names == basis[:, row, k][:, None]).all(0).any()]
