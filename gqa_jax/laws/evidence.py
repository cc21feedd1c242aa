"""What runs say of a law when its noise and its form are in doubt: the model behind the draws of `posterior`.

    L = E + exp(alpha_H - b_H x - amount q_k(x)) + s_size + e,   x = ln(N / N0)

e is a run's own noise, Normal(0, sigma^2 / weight). s is a deviation that all runs of a size share (a learning rate or a seed
that was chosen per size), Normal(0, kappa sigma^2): kappa is 0 in half of the prior, else its share of the variance,
kappa / (1 + kappa), is even. q_k is no bend, a drift or a break (`bends`), with probabilities BENDS; the amount is Normal, and
a break may lie anywhere from the smallest size to BEYOND times the largest. With five H or more they support each other:
(alpha, b)_H = X_H beta + u_H, u_H ~ Normal(0, diag(tau_alpha^2, tau_b^2)), X_H polynomials in log2 n_h and log2 n_kv, beta
flat, tau log-uniform. E is flat between 0 and the lowest loss, ln sigma is flat.

For E on a grid and each q_k the law is linearised at its own least squares; (alpha, b), beta, the amount and s are then
Gaussian and are integrated exactly. What is left, (E, q_k, sigma, tau, kappa), is drawn by adaptive importance sampling, and so
is the weight of every model.

A flat prior favours a high E, where the volume of what fits is larger. So the prior makes up for that volume: fully where H are
not pooled (E then has its profile likelihood), by its root where they are (docs/laws.md, "The prior of E").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from gqa_jax.laws import bends

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block

SIZE_EFFECT = 0.5  # probability that runs of a size deviate together
SHARE = (0.02, 0.98)  # of the variance that is then theirs, kappa / (1 + kappa): even between these
BENDS = {bends.NONE: 0.35, bends.DRIFT: 0.25, bends.BREAK: 0.4}  # probabilities
DRIFT_SD = 0.01  # of the amount: half of the change of the exponent per e-fold of N
BREAK_SD = 0.05  # of the change of the exponent
BEYOND = 2.0  # times the largest size: how far outside a break may lie
DRIFTS_ON = 10.0  # times the sizes at both ends: how far a drift goes on

_VOLUME = 0.5  # of pooled H: power of the volume that the prior makes up for
_TAU_ALPHA = (0.001, 0.1)  # of ln(L - E) amid the data
_TAU_B = (0.0005, 0.04)
_PLACES = 6  # of a break
_COARSE, _WIDE, _FINE = 48, 48, 32  # values of E: looked at first, then where they are open, and about the least squares
_DEEP = 14.0  # of ln evidence below the highest: not looked at
_FIRST, _ROUNDS, _LAST = 600, 2, 5000  # points: of every model in each of some rounds, then of all models
_AT_A_TIME = 2**21  # numbers in one array
_T_FREEDOM = 6.0
_LEAST_SHARE = 0.02  # of the last points, for every model


@dataclasses.dataclass(frozen=True)
class Form:
    """One q_k: its kind, where it breaks, and how large its amount may be."""

    kind: int
    place: float
    sd: float
    prior: float


@dataclasses.dataclass(frozen=True)
class Model:
    """What is in doubt beside the coefficients."""

    forms: tuple[Form, ...]
    shared: bool  # whether an effect that runs of a size share is one of the possibilities
    reach: float  # of a drift, in x


def model_of(block: Block, *, wide: bool) -> Model:
    """The wide model of a block's runs, or that of independent noise and exact power laws."""
    there = block.weight_GxM > 0
    x = block.x_GxM[there]
    low, high = float(x.min()), float(x.max())
    reach = max(-low, high) + np.log(DRIFTS_ON)
    power_law = Form(bends.NONE, 0.0, 1.0, 1.0)
    if not wide:
        return Model((power_law,), False, reach)
    places = np.linspace(low, high + np.log(BEYOND), 2 * _PLACES + 1)[1::2]
    forms = [
        Form(bends.NONE, 0.0, 1.0, BENDS[bends.NONE]),
        Form(bends.DRIFT, 0.0, DRIFT_SD, BENDS[bends.DRIFT]),
        *(Form(bends.BREAK, float(place), BREAK_SD, BENDS[bends.BREAK] / _PLACES) for place in places),
    ]
    return Model(tuple(forms), len(block.heads) > 1 and len(block.sizes_J) > 1, reach)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The laws at their least squares for E on a grid and every form: what the Gaussian integrals are made of.

    I nodes: E x form. G heads, C columns beside (alpha, b): the amount, then an effect of each of J sizes.
    """

    entropy_I: np.ndarray
    width_I: np.ndarray  # of the grid of E
    form_I: np.ndarray
    theta_IxGx2: np.ndarray  # (alpha, b) of the least squares
    AA_IxGx2x2: np.ndarray  # of weighted derivatives by (alpha, b)
    AC_IxGx2xC: np.ndarray  # of these with the columns
    Ay_IxGx2: np.ndarray  # with pseudo-losses: what a linear law would have to fit
    CC_IxCxC: np.ndarray  # the columns, summed over heads
    Cy_IxC: np.ndarray
    yy_I: np.ndarray
    log_volume_I: np.ndarray  # half of ln det of the information on beta, or where H are not pooled on (alpha, b) of all H


def linearise(block: Block, model: Model, basis_Gx2xK: np.ndarray | None, entropy: np.ndarray, width: np.ndarray) -> Linear:
    """`Linear` for every E of an array and every form of the model."""
    x, w, loss = block.x_GxM, block.weight_GxM, block.loss_GxM
    there = w > 0
    effects_GxMxJ = ((block.size_GxM[..., None] == block.sizes_J) & there[..., None]) * np.sqrt(w)[..., None]
    alpha_ExG, b_ExG, _ = block.conditional(entropy)
    parts = []
    for k, form in enumerate(model.forms):
        q = bends.shape(x, form.kind, form.place, model.reach)[0]
        theta, amount = np.stack([alpha_ExG, b_ExG], -1), np.zeros(len(entropy))
        for _ in range(4 if form.kind != bends.NONE else 1):  # Gauss and Newton, from the least squares without a bend
            value = np.exp(theta[..., :1] - theta[..., 1:] * x - amount[:, None, None] * q)
            rest = np.sqrt(w) * (loss - entropy[:, None, None] - value)
            A = np.stack([np.sqrt(w) * value, -x * np.sqrt(w) * value], -1)
            a = -np.sqrt(w) * value * q
            AA = np.einsum("egmi,egmj->egij", A, A)
            y = rest + np.einsum("egmi,egi->egm", A, theta) + a * amount[:, None, None]
            if form.kind == bends.NONE:
                break
            Aa, Ay = np.einsum("egmi,egm->egi", A, a), np.einsum("egmi,egm->egi", A, y)
            solved = np.linalg.solve(AA, np.stack([Aa, Ay], -1))
            ridge = block.sigma**2 / form.sd**2
            information = ridge + np.sum(a**2, (1, 2)) - np.einsum("egi,egi->e", Aa, solved[..., 0])
            amount = (np.einsum("egm,egm->e", a, y) - np.einsum("egi,egi->e", Aa, solved[..., 1])) / information
            theta = solved[..., 1] - amount[:, None, None] * solved[..., 0]
        C = np.concatenate([a[..., None], np.broadcast_to(effects_GxMxJ, (len(entropy), *effects_GxMxJ.shape))], -1)
        parts.append(
            Linear(
                entropy, width, np.full(len(entropy), k), theta, AA,
                np.einsum("egmi,egmc->egic", A, C), np.einsum("egmi,egm->egi", A, y),
                np.einsum("egmc,egmd->ecd", C, C), np.einsum("egmc,egm->ec", C, y), np.sum(y**2, (1, 2)),
                _log_volume(AA, basis_Gx2xK),
            )
        )  # fmt: skip
    return joined(parts)


def _log_volume(AA_IxGx2x2: np.ndarray, basis_Gx2xK: np.ndarray | None) -> np.ndarray:
    if basis_Gx2xK is None:
        return 0.5 * np.linalg.slogdet(AA_IxGx2x2)[1].sum(-1)
    return 0.5 * np.linalg.slogdet(np.einsum("gik,ngij,gjl->nkl", basis_Gx2xK, AA_IxGx2x2, basis_Gx2xK))[1]


@dataclasses.dataclass(frozen=True)
class Points:
    """S values of what is not integrated: the node (E and form), the noise, the spread of the H, the share of the sizes."""

    node_S: np.ndarray
    sigma_S: np.ndarray
    tau_Sx2: np.ndarray
    kappa_S: np.ndarray


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The integrals at S points: the evidence, and the Gaussian of the shared unknowns (beta, amount, effects)."""

    log_evidence_S: np.ndarray
    information_SxDxD: np.ndarray
    right_SxD: np.ndarray
    own_SxGx2x2: np.ndarray  # covariance of (alpha, b)_H given these


def integrate(linear: Linear, model: Model, basis_Gx2xK: np.ndarray | None, n_runs: int, points: Points) -> Gaussian:
    """The Gaussian integrals at some points. A kappa of 0, and the amount of no bend, are held at 0 by a huge precision."""
    i, sigma2 = points.node_S, points.sigma_S**2
    AA, AC = linear.AA_IxGx2x2[i], linear.AC_IxGx2xC[i]
    pooled = basis_Gx2xK is not None
    n_beta = basis_Gx2xK.shape[2] if pooled else 0
    spread = 1 / points.tau_Sx2[:, None, :, None] ** 2 * np.eye(2) if pooled else 0.0
    precision = AA / sigma2[:, None, None, None] + spread
    own = _inverse(precision)
    if pooled:
        AC = np.concatenate([np.einsum("sgij,gjk->sgik", AA, basis_Gx2xK), AC], -1)
    S, G, _, D = AC.shape
    flat = AC.reshape(S, 2 * G, D)
    seen = (own @ AC).reshape(S, 2 * G, D) / sigma2[:, None, None]
    full = np.zeros((S, D, D))
    full[:, n_beta:, n_beta:] = linear.CC_IxCxC[i]
    right = np.zeros((S, D))
    right[:, n_beta:] = linear.Cy_IxC[i]
    Ay = linear.Ay_IxGx2[i].reshape(S, 2 * G)
    if pooled:
        X = basis_Gx2xK.reshape(2 * G, n_beta)
        full[:, :n_beta] = X.T @ flat
        full[:, n_beta:, :n_beta] = np.swapaxes(full[:, :n_beta, n_beta:], 1, 2)
        right[:, :n_beta] = Ay @ X
    information = (full - np.swapaxes(flat, 1, 2) @ seen) / sigma2[:, None, None]
    right = (right - np.einsum("skd,sk->sd", seen, Ay)) / sigma2[:, None]
    solved_y = (own @ linear.Ay_IxGx2[i][..., None])[..., 0].reshape(S, 2 * G) / sigma2[:, None]
    squares = (linear.yy_I[i] - np.sum(solved_y * Ay, 1)) / sigma2
    kinds = np.array([form.kind for form in model.forms])[linear.form_I[i]]
    sds = np.array([form.sd for form in model.forms])[linear.form_I[i]]
    prior = np.zeros((S, D))
    prior[:, n_beta] = np.where(kinds == bends.NONE, 1e14, 1 / sds**2)
    prior[:, n_beta + 1 :] = np.where(points.kappa_S > 0, 1 / np.maximum(points.kappa_S * sigma2, 1e-300), 1e14)[:, None]
    information = information + prior[:, :, None] * np.eye(D)
    lower = np.linalg.cholesky(information)
    whitened = np.linalg.solve(lower, right[..., None])[..., 0]
    log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(-1) - np.log(prior[:, n_beta:]).sum(-1)
    log_evidence = -0.5 * (n_runs * np.log(sigma2) + squares - np.sum(whitened**2, 1) + log_det)
    log_evidence += 0.5 * np.linalg.slogdet(own)[1].sum(-1)
    if pooled:
        log_evidence += _VOLUME * linear.log_volume_I[i] - G * np.log(points.tau_Sx2).sum(-1)
    else:
        log_evidence += linear.log_volume_I[i]
    return Gaussian(log_evidence, information, right, own)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Of symmetric (..., 2, 2)."""
    a, b, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
    determinant = a * d - b * b
    return np.stack([np.stack([d, -b], -1), np.stack([-b, a], -1)], -2) / determinant[..., None, None]


@dataclasses.dataclass(frozen=True)
class Explored:
    """Weighted points of the posterior, and what they are points of."""

    model: Model
    linear: Linear
    basis_Gx2xK: np.ndarray | None
    points: Points
    weight_S: np.ndarray  # sums to 1
    n_runs: int

    def integrate(self, points: Points) -> Gaussian:
        return _in_parts(self.linear, self.model, self.basis_Gx2xK, self.n_runs, points)


def _in_parts(linear: Linear, model: Model, basis: np.ndarray | None, n_runs: int, points: Points) -> Gaussian:
    G, C = linear.AC_IxGx2xC.shape[1], linear.AC_IxGx2xC.shape[3]
    D = C + (0 if basis is None else basis.shape[2])
    step = max(64, _AT_A_TIME // (2 * G * D + D * D))
    parts = [slice(at, at + step) for at in range(0, len(points.node_S), step)]
    return joined([integrate(linear, model, basis, n_runs, taken(points, part)) for part in parts])


def explore(block: Block, basis_Gx2xK: np.ndarray | None, *, wide: bool, seed: int = 0) -> Explored:
    """Weighted points of the posterior of a block's runs.

    Args:
      basis_Gx2xK: of the head law; None where H are not pooled.
      wide: with effects of sizes and bends; False: independent noise and exact power laws.
      seed: of the points.
    """
    generator = np.random.default_rng([seed, 8])
    model = model_of(block, wide=wide)
    n_runs = int((block.weight_GxM > 0).sum())
    middle = np.sqrt(np.array([np.prod(_TAU_ALPHA), np.prod(_TAU_B)]))
    plug = [(1.0, 0.0), (1.6, 0.0), (0.8, 1.0), (1.2, 4.0)] if model.shared else [(0.9, 0.0), (1.2, 0.0)]

    def height(linear: Linear) -> np.ndarray:
        """ln evidence_PxI at plugged-in noise; where the data see it at all, the shape of the posterior of E."""
        nodes = np.arange(len(linear.entropy_I))
        found = []
        for scale, kappa in plug:
            full = np.ones(len(nodes))
            at = Points(nodes, scale * block.sigma * full, np.tile(middle, (len(nodes), 1)), kappa * full)
            found.append(_in_parts(linear, model, basis_Gx2xK, n_runs, at).log_evidence_S)
        return np.array(found)

    linear = linearise(block, model, basis_Gx2xK, *_entropies(block, model, basis_Gx2xK, height))
    forms = np.array([form.prior for form in model.forms])[linear.form_I]
    log_prior_I = np.log(forms) + np.log(linear.width_I)
    plugged_PxI = height(linear) + log_prior_I
    families = [
        (np.isin(linear.form_I, [k for k, form in enumerate(model.forms) if form.kind == kind]), shared)
        for kind in dict.fromkeys(form.kind for form in model.forms)
        for shared in ((False, True) if model.shared else (False,))
    ]
    proposals = [_Proposal.first(block, model, mask, shared, plugged_PxI, plug, basis_Gx2xK) for mask, shared in families]

    def weigh(points: Points, log_q: np.ndarray) -> np.ndarray:
        evidence = _in_parts(linear, model, basis_Gx2xK, n_runs, points).log_evidence_S
        share = np.where(points.kappa_S > 0, SIZE_EFFECT, 1 - SIZE_EFFECT) if model.shared else 1.0
        return evidence + log_prior_I[points.node_S] + np.log(share) - log_q

    def looked(proposals: list[_Proposal], counts: np.ndarray) -> tuple[list[Points], list[np.ndarray]]:
        drawn = [one.draw(int(count), generator) for one, count in zip(proposals, counts, strict=True)]
        return [sample for sample, _ in drawn], [weigh(*one) for one in drawn]

    counts = np.full(len(proposals), _FIRST)
    for _ in range(_ROUNDS):
        samples, logs = looked(proposals, counts)
        proposals = [p.adapted(x, np.exp(w - w.max())) for p, x, w in zip(proposals, samples, logs, strict=True)]
    mass = np.array([np.exp(log_w - max(w.max() for w in logs)).mean() for log_w in logs])
    # Few points may have missed a model's peak: every model gets some, and the share of the others is by the root.
    share = np.sqrt(mass / mass.sum())
    counts = np.maximum(share / share.sum(), _LEAST_SHARE) * _LAST
    samples, logs = looked(proposals, counts)
    log_w = np.concatenate([log_w - np.log(len(log_w)) for log_w in logs])
    weight = np.exp(log_w - log_w.max())
    return Explored(model, linear, basis_Gx2xK, joined(samples), weight / weight.sum(), n_runs)


def _entropies(
    block: Block, model: Model, basis_Gx2xK: np.ndarray | None, height: Callable[[Linear], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Values of E that the data leave open under any form, and their widths; the one that was given."""
    if block.given_entropy is not None:
        return np.array([block.given_entropy]), np.ones(1)
    highest = block.lowest * (1 - 1e-4)
    low, high = 0.0, highest
    near = np.clip(block.entropy + block.entropy_error * np.linspace(-3, 3, 13), 0.0, highest)
    coarse = np.unique(np.concatenate([highest * (1 - np.geomspace(1e-3, 1.0, _COARSE)), near]))
    seen = height(linearise(block, model, basis_Gx2xK, coarse, np.ones(len(coarse)))).reshape(-1, len(model.forms), len(coarse))
    best = seen.max((0, 1))
    open_ = np.flatnonzero(best > best.max() - _DEEP)
    low, high = coarse[max(open_[0] - 1, 0)], coarse[min(open_[-1] + 1, len(coarse) - 1)]
    # The E of a power law is known better than that of a law that bends.
    inside = block.entropy + block.entropy_error * np.linspace(-4, 4, _FINE + 1)
    edges = np.unique(np.concatenate([np.linspace(low, high, _WIDE + 1), inside[(inside > low) & (inside < high)]]))
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


@dataclasses.dataclass(frozen=True)
class _Proposal:
    """Where points of one model (a kind of bend, with or without effects of sizes) are looked for."""

    nodes: np.ndarray
    p_nodes: np.ndarray
    names: tuple[str, ...]  # of what is drawn, as logarithms: sigma if it is not known, tau_alpha and tau_b if pooled, kappa
    center: np.ndarray
    scale: np.ndarray  # (P, P): a root of its covariance
    low: np.ndarray
    high: np.ndarray
    known_sigma: float | None

    @classmethod
    def first(cls, block, model, mask, shared, plugged_PxI, plug, basis) -> _Proposal:
        nodes = np.flatnonzero(mask)
        used = [i for i, (_, kappa) in enumerate(plug) if (kappa > 0) == shared]
        flat = np.exp(0.7 * (plugged_PxI[used][:, nodes] - plugged_PxI[used][:, nodes].max())).sum(0)
        freedom = max(block.dof, 1) if np.isfinite(block.dof) else 50
        places = {}  # name -> center, spread, low, high
        if block.known_sigma is None:
            middle, log_sigma = np.log(block.sigma * (0.8 if shared else 1.0)), np.log(block.sigma)
            places["sigma"] = middle, min(1.5 / np.sqrt(2 * freedom) + 0.05, 1.0), log_sigma - 4.0, log_sigma + 4.0
        if basis is not None:
            for name, (a, z) in (("tau_alpha", np.log(_TAU_ALPHA)), ("tau_b", np.log(_TAU_B))):
                places[name] = (a + z) / 2, (z - a) / 4, a, z
        if shared:
            places["kappa"] = 0.5, 1.5, *(np.log(share / (1 - share)) for share in SHARE)
        center, spread, low, high = np.array([*places.values()]).reshape(-1, 4).T
        return cls(nodes, _mixed(flat), tuple(places), center, np.diag(spread), low, high, block.known_sigma)

    def adapted(self, points: Points, weight: np.ndarray) -> _Proposal:
        """The same around what the weighted points have found."""
        for power in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05):  # flattened where few points carry all
            flat = weight**power / np.sum(weight**power)
            if 1 / np.sum(flat**2) > 10 * (1 + len(self.center)):
                break
        weight = flat
        place = np.searchsorted(self.nodes, points.node_S)
        found = np.bincount(place, weight, len(self.nodes))
        # Neighbours in E of a node that was found are as good.
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
        smooth = np.convolve(found, kernel / kernel.sum())[4:-4]
        again = dataclasses.replace(self, p_nodes=_mixed(0.5 * smooth / smooth.sum() + 0.5 * self.p_nodes))
        if not len(self.center):
            return again
        values = self._coordinates(points)
        center = weight @ values
        covariance = (values - center).T @ (weight[:, None] * (values - center)) + 1e-4 * np.eye(len(center))
        return dataclasses.replace(again, center=center, scale=1.15 * np.linalg.cholesky(covariance))

    def _coordinates(self, points: Points) -> np.ndarray:
        tau_Sx2 = points.tau_Sx2
        columns = {"sigma": points.sigma_S, "tau_alpha": tau_Sx2[:, 0], "tau_b": tau_Sx2[:, 1], "kappa": points.kappa_S}
        return np.log(np.stack([columns[name] for name in self.names], 1))

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Points, np.ndarray]:
        """Points, and ln of their density against the prior of all but the node (whose prior is a sum)."""
        picked = generator.choice(len(self.nodes), count, p=self.p_nodes)
        P = len(self.center)
        values, log_q = np.zeros((count, 0)), np.zeros(count)
        if P:
            z = generator.normal(size=(count, P)) / np.sqrt(generator.chisquare(_T_FREEDOM, count) / _T_FREEDOM)[:, None]
            values = self.center + z @ self.scale.T
            log_q = stats.multivariate_t(np.zeros(P), np.eye(P), _T_FREEDOM).logpdf(z).reshape(count)
            log_q = log_q - np.log(np.diag(self.scale)).sum()
        log_prior = np.where(((values >= self.low) & (values <= self.high)).all(1), 0.0, -np.inf)  # flat in ln sigma
        columns = dict(zip(self.names, np.exp(np.clip(values, self.low, self.high)).T, strict=True))
        sigma = columns.get("sigma", np.full(count, self.known_sigma, np.float64))
        tau, kappa = np.full((count, 2), np.inf), columns.get("kappa", np.zeros(count))
        if "tau_b" in columns:
            tau = np.stack([columns["tau_alpha"], columns["tau_b"]], 1)
            log_prior = log_prior - sum(np.log(ends[1] / ends[0]) for ends in (_TAU_ALPHA, _TAU_B))
        if "kappa" in columns:
            log_prior = log_prior + np.log(kappa / (1 + kappa) ** 2 / (SHARE[1] - SHARE[0]))
        return Points(self.nodes[picked], sigma, tau, kappa), log_q + np.log(self.p_nodes[picked]) - log_prior


def joined[T](parts: Sequence[T]) -> T:
    """One dataclass with the rows of all; what is no array is that of the first."""

    def column(values: list) -> Any:
        if dataclasses.is_dataclass(values[0]):
            return joined(values)
        return np.concatenate(values) if isinstance(values[0], np.ndarray) else values[0]

    names = [field.name for field in dataclasses.fields(parts[0])]
    return dataclasses.replace(parts[0], **{name: column([getattr(part, name) for part in parts]) for name in names})


def taken[T](one: T, rows: np.ndarray | slice) -> T:
    """The dataclass with these rows of all its arrays."""
    values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    arrays = {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}
    parts = {name: taken(value, rows) for name, value in values.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(one, **arrays, **parts)


def _mixed(weights: np.ndarray) -> np.ndarray:
    """Probabilities, a tenth of them even."""
    return 0.9 * weights / weights.sum() + 0.1 / len(weights)


def systematic(weight: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of `count` draws with these weights, one in each of `count` equal shares of them, in random order."""
    places = (np.arange(count) + generator.random()) / count
    picked = np.minimum(np.searchsorted(np.cumsum(weight), places), len(weight) - 1)
    return generator.permutation(picked)
