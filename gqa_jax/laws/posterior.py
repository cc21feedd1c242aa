"""Joint draws of the coefficients of all head configurations: what is uncertain about an answer is computed from them.

`posterior` (the default). Noise that is a run's own and noise that runs of a size share, power laws and laws that bend, head
configurations that support each other: the model and its priors are in `evidence`. Where the data can't tell, intervals widen.

`independent`. The same with independent noise and exact power laws. Its intervals are the narrower ones of textbooks, and too
narrow where their assumptions fail; `LawsByHeads.price_of_doubt` compares both.

`bootstrap`: every run's loss is drawn anew from its fitted law with the pooled noise, whose size varies as its degrees of
freedom allow, and all coefficients are fitted again: independent noise and exact power laws too.

Losses of runs that were evaluated on the same text are all off by one common amount against the text at large: so every draw
has a shift (`SharedError.draws`) that is the same for all H, whatever loss is asked for. N* of all H move with it; which H is
the cheapest hardly does.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa_jax.laws import bends, evidence, fitting
from gqa_jax.laws.bends import Bends
from gqa_jax.laws.block import conditional, curves
from gqa_jax.laws.evidence import Explored
from gqa_jax.laws.heads import LLAMA3, Heads

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block
    from gqa_jax.laws.by_heads import LawsByHeads

METHODS = ("posterior", "independent", "bootstrap")
#: What intervals from the draws rest on, in words that follow "intervals: ".
NOISE_MODELS = {
    "posterior": "95% of draws with noise of a run's own, noise that runs of a size share, and laws that may bend",
    "independent": "95% of draws with independent noise and exact power laws",
    "bootstrap": "95% of refits with independent noise and exact power laws",
}
#: The same after "95%", where there is little room: in pictures.
IN_BRIEF = {
    "posterior": "with shared noise and bends",
    "independent": "with independent noise",
    "bootstrap": "with independent noise",
}
PROFILES = "95% by profile likelihood with independent noise and exact power laws"
POOLED_FROM = 5  # head configurations
_ROUNDS = 40  # of draws, each a quarter more than are wanted, until enough fall with size
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
    kappa_S: np.ndarray | float = 0.0  # variance of what runs of a size share over sigma^2
    effects_SxJ: np.ndarray | None = None  # what the runs of each trained size share, nats per token; None: nothing
    sizes_J: np.ndarray | None = None  # labels of these sizes (`Runs.size`), ascending

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

    def shared_at(self, label: int | None) -> np.ndarray | None:
        """What the runs of the size of that label share (S,), nats per token; None: no run that was fitted is of this size."""
        if label is None or self.effects_SxJ is None or label not in self.sizes_J:
            return None
        return self.effects_SxJ[:, int(np.searchsorted(self.sizes_J, label))]

    def take(self, heads: list[Heads]) -> Draws:
        """The same draws of these H."""
        columns = [self.heads.index(h) for h in heads]
        parts = {name: getattr(self, name)[:, columns] for name in ("entropy_SxH", "log_a_SxH", "b_SxH", "sigma_SxH")}
        return dataclasses.replace(self, heads=list(heads), **parts)


def draw(laws: LawsByHeads, count: int, seed: int, method: str) -> Draws:
    """`count` joint draws. Llama 3's heads are added where their law follows from these runs (`Draws.notes` says how).

    Raises ValueError for an unknown method, or where there are no more runs than coefficients: then nothing is known of noise.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
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
        if method == "bootstrap":
            drawn = _bootstrap(block, count, generator)
        else:
            drawn = _posterior(block, count, seed, method == "posterior")
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
    about = {}
    if len(parts) == 1:
        block, one = parts[0]
        about = {"bends": one.bends, "kappa_S": one.kappa_S, "effects_SxJ": one.effects_SxJ, "sizes_J": block.sizes_J}
    return Draws(heads, entropy + shift[:, None], log_a, b, sigma, method, tuple(notes), shift, **about)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    entropy_S: np.ndarray
    alpha_SxG: np.ndarray
    b_SxG: np.ndarray
    sigma_S: np.ndarray
    beta_SxK: np.ndarray | None = None
    tau_Sx2: np.ndarray | None = None
    kappa_S: np.ndarray | float = 0.0
    effects_SxJ: np.ndarray | None = None
    bends: Bends | None = None

    def take(self, rows: np.ndarray | slice) -> _Drawn:
        def one(value: Any) -> Any:
            return (
                value
                if value is None or isinstance(value, float)
                else value.take(rows)
                if isinstance(value, Bends)
                else value[rows]
            )

        return _Drawn(*(one(getattr(self, f.name)) for f in dataclasses.fields(self)))


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


def _posterior(block: Block, count: int, seed: int, wide: bool) -> _Drawn:
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
    drawn = _Drawn(*(_joined([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(_Drawn)))
    return drawn.take(slice(0, count))


def _some(block: Block, known: Explored, count: int, generator: np.random.Generator) -> _Drawn:
    """Draws with everything that was integrated drawn anew; those whose law does not fall with size left out."""
    points = known.points.take(evidence.systematic(known.weight_S, count, generator))
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
    drawn = _Drawn(
        entropy, theta[..., 0], theta[..., 1], points.sigma_S, None if basis is None else beta, points.tau_Sx2, points.kappa_S,
        np.where(points.kappa_S[:, None] > 0, columns[:, 1:], 0.0), bent,
    )  # fmt: skip
    return drawn.take(keep)


def _within(linear: evidence.Linear, node: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """E drawn evenly within its interval of the grid, and how far (alpha, b)_SxGx2 move with it."""
    width = linear.width_I[node]
    step = (generator.random(len(node)) - 0.5) * width
    n = int(np.sum(linear.form_I == linear.form_I[0]))
    if n == 1:
        return linear.entropy_I[node], np.zeros((len(node), *linear.theta_IxGx2.shape[1:]))
    place = node % n
    low, high = node - (place > 0), node + (place < n - 1)
    slope = (linear.theta_IxGx2[high] - linear.theta_IxGx2[low]) / (linear.entropy_I[high] - linear.entropy_I[low])[
        :, None, None
    ]
    return linear.entropy_I[node] + step, slope * step[:, None, None]


def _joined(values: list) -> Any:
    if values[0] is None:
        return None
    return Bends.joined(values) if isinstance(values[0], Bends) else np.concatenate(values)


def pooling(block: Block) -> np.ndarray | None:
    """Basis_Gx2xK of the head law; None where H are too few. Llama 3's rule is not pooled."""
    counted = [h for h in block.heads if h.n_heads is not None]
    if len(counted) < POOLED_FROM:
        return None
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
    return basis


def _features(heads: list[Heads] | tuple[Heads, ...]) -> np.ndarray:
    """1, u, v, u^2, v^2, u v with u = log2 n_h, v = log2 n_kv; zeros for a rule, which has a column of its own."""
    rows = []
    for h in heads:
        u, v = (0.0, 0.0) if h.n_heads is None else (np.log2(h.n_heads), np.log2(h.n_kv_heads))
        rows.append(np.array([1.0, u, v, u * u, v * v, u * v]) * (h.n_heads is not None))
    return np.array(rows)


def _normal(covariance: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Normal vectors (..., 2) of these covariances (..., 2, 2)."""
    a, c, d = covariance[..., 0, 0], covariance[..., 1, 0], covariance[..., 1, 1]
    first = np.sqrt(np.maximum(a, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cross = np.where(first > 0, c / first, 0.0)
    second = np.sqrt(np.maximum(d - cross**2, 0.0))
    z = generator.normal(size=(*first.shape, 2))
    return np.stack([first * z[..., 0], cross * z[..., 0] + second * z[..., 1]], -1)


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
        most = max(h.n_heads for h in block.heads if h.n_heads is not None)
        least = min(h.n_heads for h in block.heads if h.n_heads is not None)
        inside = (n_heads <= most) & (n_heads >= max(least, 1)) & (n_heads >= LLAMA3.n_kv_heads)
        if inside.sum() < 3 or max(h.n_kv_heads for h in block.heads) < LLAMA3.n_kv_heads:
            return None, ""
        x = np.log(grid[inside] / block.center)
        basis = pooling(block)
        pseudo = [Heads(n, LLAMA3.n_kv_heads) for n in n_heads[inside]]
        theta_Sx2 = _head_law(block, basis, pseudo, x, drawn, generator)
        theta = theta_Sx2
    else:
        return None, ""
    b = np.maximum(theta[:, 1], 1e-3 if drawn.bends is None else drawn.bends.least_b_S)  # each falls with size everywhere
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
