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
from typing import TYPE_CHECKING

import numpy as np

from gqa_jax.laws import fitting
from gqa_jax.laws.block import curves
from gqa_jax.laws.heads import LLAMA3, Heads

if TYPE_CHECKING:
    from gqa_jax.laws.bends import Bends
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
    from gqa_jax.laws import sampling

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
            drawn = sampling.posterior(block, count, seed, wide=method == "posterior")
        parts.append((block, drawn))
    heads = [h for block, _ in parts for h in block.heads]
    entropy = np.concatenate([np.repeat(one.entropy_S[:, None], len(block.heads), 1) for block, one in parts], 1)
    log_a = np.concatenate([np.log(block.center) + one.alpha_SxG / one.b_SxG for block, one in parts], 1)
    b = np.concatenate([one.b_SxG for _, one in parts], 1)
    sigma = np.concatenate([np.repeat(one.sigma_S[:, None], len(block.heads), 1) for block, one in parts], 1)
    if LLAMA3 not in heads and len(parts) == 1:
        extra, note = sampling.llama3(laws, *parts[0], generator)
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
class Drawn:
    """S draws of a block of G heads, before what all blocks share; what a method does not draw is None or 0."""

    entropy_S: np.ndarray
    alpha_SxG: np.ndarray
    b_SxG: np.ndarray
    sigma_S: np.ndarray
    beta_SxK: np.ndarray | None = None
    tau_Sx2: np.ndarray | None = None
    kappa_S: np.ndarray | float = 0.0
    effects_SxJ: np.ndarray | None = None
    bends: Bends | None = None


def _bootstrap(block: Block, count: int, generator: np.random.Generator) -> Drawn:
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
    theta = fitting.in_parts(
        lambda y, upper: fitting.refit(model, y, block.fit.theta, lower=lower, upper=upper, weights=weights)[0], y, upper
    )
    return Drawn(theta[:, 0], theta[:, 1::2], theta[:, 2::2], np.full(count, block.sigma))
