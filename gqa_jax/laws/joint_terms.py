"""What a joint law's ln A and b are made of: compact functions of the heads, with their derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_P, MOST_P = -1.0, 4.0
#: (n_h, n_kv, x) of points, x = ln(N / N0): three arrays (N,).
Where = tuple[np.ndarray, np.ndarray, np.ndarray]
_NAMES = {"quadratic": ("1", "log2 n_h", "log2 n_kv", "log2^2 n_h", "log2^2 n_kv"), "power": ("1", "f_p(n_h)", "f_p(n_kv)")}
#: In which order they are taken up, as far as the trained heads tell them apart: (of ln A?, which function).
_ORDER = {
    "quadratic": ((True, 0), (False, 0), (True, 1), (True, 2), (False, 1), (False, 2), (True, 3), (True, 4)),
    "power": ((True, 0), (False, 0), (True, 1), (True, 2), (False, 1), (False, 2)),
}


@dataclass(frozen=True)
class Terms:
    """The coefficients of a joint law and what they multiply: theta = (E, p, those of ln A, those of b).

    E is missing where it is given (`entropy`), p in the quadratic form. alpha, b: which functions of the heads are used.
    """

    form: str
    alpha: tuple[int, ...]
    b: tuple[int, ...]
    entropy: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the coefficients."""
        functions = _NAMES[self.form]
        return [
            *(["E"] if self.entropy is None else []),
            *(["p"] if self.form == "power" else []),
            *(f"ln A: {functions[k]}" for k in self.alpha),
            *(f"b: {functions[k]}" for k in self.b),
        ]

    def entropy_of(self, theta: np.ndarray) -> np.ndarray:
        """E (...,) of coefficients (..., P)."""
        return theta[..., 0] if self.entropy is None else np.full(theta.shape[:-1], self.entropy)

    def bounds(self, lowest_loss: float) -> tuple[np.ndarray, np.ndarray]:
        """Of the coefficients: E between 0 and the lowest loss, p where it can be told."""
        ends = {"E": (0.0, lowest_loss * (1 - 1e-4)), "p": (LEAST_P, MOST_P)}
        return tuple(np.array([ends.get(name, (-np.inf, np.inf))[i] for name in self.names]) for i in (0, 1))

    def log_above(self, theta: np.ndarray, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """ln(L - E) (..., N) of coefficients (..., P), and its derivatives (..., N, P); E has no part in it."""
        n_heads, n_kv_heads, x = where
        first = len(self.names) - len(self.alpha) - len(self.b)
        of_alpha, of_b = theta[..., first : first + len(self.alpha)], theta[..., first + len(self.alpha) :]
        p = theta[..., first - 1] if self.form == "power" else np.zeros(theta.shape[:-1])
        functions, by_p = heads_functions(self.form, n_heads, n_kv_heads, p)
        in_alpha, in_b = functions[..., list(self.alpha)], -x[:, None] * functions[..., list(self.b)]
        value = _times(in_alpha, of_alpha) + _times(in_b, of_b)
        gradient = np.concatenate([np.zeros((*value.shape, first)), in_alpha, in_b], axis=-1)
        if self.form == "power":
            gradient[..., first - 1] = _times(by_p[..., list(self.alpha)], of_alpha) - x * _times(by_p[..., list(self.b)], of_b)
        return value, gradient

    def loss(self, theta: np.ndarray, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """The losses (..., N), and their derivatives (..., N, P)."""
        above, gradient = self.log_above(theta, where)
        value = np.exp(np.clip(above, -50, 50))  # far steps of a search
        gradient *= value[..., None]
        if self.entropy is None:
            gradient[..., 0] = 1.0
        return value + self.entropy_of(theta)[..., None], gradient


def choose(form: str, where: Where, trained: int, several_sizes: int, entropy: float | None = None) -> Terms:
    """Those functions of the heads that runs with these heads and sizes tell apart, with a head configuration to spare.

    trained: head configurations; several_sizes: those with two sizes or more, which tell the functions in b apart.
    """
    n_heads, n_kv_heads, x = where
    functions, _ = heads_functions(form, n_heads, n_kv_heads, np.array(0.5))
    most = {True: trained - 1, False: max(1, several_sizes - 1)}
    kept, columns = {True: [], False: []}, []
    for of_alpha, k in _ORDER[form]:
        column = functions[:, k] * (1.0 if of_alpha else x)
        trial = np.stack([*columns, column / max(np.linalg.norm(column), 1e-300)], axis=1)
        if len(kept[of_alpha]) < most[of_alpha] and np.linalg.matrix_rank(trial, tol=1e-6) == trial.shape[1]:
            kept[of_alpha].append(k)
            columns = list(trial.T)
    return Terms(form, tuple(kept[True]), tuple(kept[False]), entropy)


def heads_functions(form: str, n_heads: np.ndarray, n_kv_heads: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The functions (..., N, K) of heads (N,) for exponents p (...,), and their derivatives by p."""
    shape = (*np.shape(p), len(n_heads))
    if form == "quadratic":
        u, v = np.log2(n_heads), np.log2(n_kv_heads)
        functions = np.stack([np.ones_like(u), u, v, u * u, v * v], axis=-1)
        return np.broadcast_to(functions, (*shape, 5)), np.zeros((*shape, 5))
    (f, f_p), (g, g_p) = (_bend(np.log(n), np.asarray(p)[..., None]) for n in (n_heads, n_kv_heads))
    return np.stack([np.ones(shape), f, g], axis=-1), np.stack([np.zeros(shape), f_p, g_p], axis=-1)


def _bend(log_n: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f_p(n) = (1 - n^-p) / p, ln n for p = 0, and its derivative by p."""
    z = p * log_n
    near = np.abs(z) < 1e-3  # where the quotients lose digits: their series
    safe = np.where(near, 1.0, z)
    value = np.where(near, 1 - z / 2 + z**2 / 6 - z**3 / 24, -np.expm1(-safe) / safe)
    slope = np.where(near, -0.5 + z / 3 - z**2 / 8 + z**3 / 30, (np.exp(-safe) * (1 + safe) - 1) / safe**2)
    return log_n * value, log_n**2 * slope


def _times(columns: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return (columns @ coefficients[..., None])[..., 0]
