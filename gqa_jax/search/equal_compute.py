"""Equal training cost instead of equal tokens (arXiv 2503.09579v2, Section 5.6, Figure 4).

At long contexts fewer heads make training cheaper, too: with C_train held equal they may see more tokens. A model of N
parameters and heads H gets D = C_train / (training FLOPs per token of its shape), and reaches L(N, D; H) by a law with a term
in D (`laws.fit_loss_nd_by_heads`). The least N that reaches the loss asked for is the cheapest to serve with that H; the H are
then compared as in `optimum.search`: by the fitted law, and by joint draws of its coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs
from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.laws.loss_nd import DrawsND, LossNDByHeads
from gqa_jax.search import objectives, ranking
from gqa_jax.search.candidates import beyond
from gqa_jax.search.ranking import TAILS

_BELOW, _ABOVE, _POINTS = 30.0, 1000.0, 400  # N* is looked for from least / 30 to largest trained N x 1000, first on a grid
_HALVINGS = 30  # of a step of that grid: N* to 4e-11
_PART = 100  # draws at a time: what fits a cache
_FAR = 1.1  # times the trained range, beyond which a row says so

CANDIDATES = (
    "n_heads", "n_kv_heads", "n_params", "n_params_low", "n_params_high", "tokens", "tokens_low", "tokens_high", "n_layers",
    "d_model", "c_infer", "m_infer", "cost", "cost_low", "cost_high", "probability", "expected_regret", "saving", "saving_low",
    "saving_high", "note",
)  # fmt: skip


@dataclass(frozen=True)
class SameAs:
    """A budget: what it costs to train a model of the same N with these heads on `tokens_per_param` N tokens (Figure 4)."""

    heads: Heads
    tokens_per_param: float = 20.0

    def __post_init__(self):
        if not self.tokens_per_param > 0:
            raise ValueError(f"tokens_per_param = {self.tokens_per_param}: must be above 0 (the paper's is 20)")
        object.__setattr__(self, "heads", Heads(*self.heads))


@dataclass(frozen=True)
class Aligned:
    """The heads that reach a loss with a training budget and are the cheapest to serve. Made by `equal_training_cost`.

    `candidates` has a row per H, least expected regret first: n_heads, n_kv_heads; n_params, the least N that reaches the loss;
    tokens, the D that the budget pays for; n_layers, d_model (real-valued); c_infer, m_infer; cost; probability, the share of
    draws in which it is the cheapest, of those in which some H reaches the loss; expected_regret, relative, of the same draws
    (`ranking.regret`); saving, 1 - cost / cost of the baseline; note. _low and _high are the ends of 95% of the draws.
    """

    loss: float
    context_served: int
    train_context: int
    heads: Heads
    baseline: Heads  # of the savings
    candidates: pd.DataFrame
    not_reached: float  # share of draws in which no H reaches the loss; nan without draws
    warnings: tuple[str, ...]


def equal_training_curves(
    laws: LossNDByHeads,
    budget: float | SameAs,
    params: Sequence[float],
    *,
    context_served: int | None = None,
    objective: objectives.Objective | None = None,
    train_context: int | None = None,
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every H at every N: the tokens that the budget pays for, and the loss that they reach.

    Args: as in `equal_training_cost`. params: the N to look at, without embeddings.

    Columns: n_heads, n_kv_heads, n_params, n_layers, d_model, tokens, tokens_per_param, loss, loss_low, loss_high (95% of the
    draws, on the held-out text of the runs; nan without), and with `context_served` also c_infer, m_infer and cost. Raises
    ValueError as there.
    """
    plan = _Plan.of(laws, budget, train_context, convention, aspect)
    params = np.asarray(params, np.float64).ravel()
    if not (params.size and (params > 0).all() and np.isfinite(params).all()):
        raise ValueError("params must be finite numbers above 0: the sizes N to look at")
    n_NxH = np.repeat(params[:, None], len(plan.heads), axis=1)
    tokens_NxH = plan.tokens(n_NxH)
    drawn, _ = _draws(laws, draws, seed)
    frames = []
    for i, heads in enumerate(plan.heads):
        shape, tokens = plan.shape(params, heads), tokens_NxH[:, i]
        frame = pd.DataFrame(
            {"n_params": params, "n_layers": shape.n_layers, "d_model": shape.d_model, "tokens": tokens}
            | {"tokens_per_param": tokens / params, "loss": laws[heads].predict(params, tokens)}
        )
        ends = [np.nan, np.nan]
        if drawn is not None:  # on the text of the runs: what all losses have in common would widen all bands alike
            ends = ranking.quantiles(drawn.predict(i, params, tokens) - np.reshape(drawn.shift, (-1, 1)), TAILS)
        frame["loss_low"], frame["loss_high"] = ends
        if context_served is not None:
            frame["c_infer"] = costs.infer_flops(shape, context_served, convention)
            frame["m_infer"] = costs.infer_memory(shape, context_served, convention)
            frame["cost"] = (objective or objectives.Z(convention))(shape, context_served)
        frame.insert(0, "n_heads", pd.array([heads.n_heads] * len(params), dtype="Int64"))
        frame.insert(1, "n_kv_heads", heads.n_kv_heads)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def equal_training_cost(
    laws: LossNDByHeads,
    budget: float | SameAs,
    loss: float,
    context_served: int,
    objective: objectives.Objective | None = None,
    *,
    train_context: int | None = None,
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    baseline: Heads | tuple | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Aligned:
    """The heads that reach `loss` with the training budget and serve `context_served` tokens at the least cost.

    Args:
      laws: of `gqa_jax.laws.fit_loss_nd_by_heads`.
      budget: training FLOPs of every model, or `SameAs(heads)`: at each N what training those heads would cost.
      objective: default `objectives.Z(convention)`.
      train_context: T of the training, tokens; default: that of the laws.
      convention: of the training FLOPs (6 D N + 12 D T_mean L d_h n_h, T_mean = T / 2: Table 8) and of c_infer and m_infer.
      aspect: d / L as a function of N; default: that of the laws.
      baseline: heads that savings are against; default those of `SameAs`, else Llama 3's.
      draws, seed: of the coefficients' joint draws; draws=0 leaves out what is uncertain, and ranks by the fitted law's cost.

    Raises:
      ValueError: a budget that is not above 0, or a loss that no H reaches with it.
    """
    if not (np.isfinite(loss) and loss > 0):
        raise ValueError(f"loss = {loss}: a loss is a number of nats per token above 0")
    if not context_served >= 1:
        raise ValueError(f"context_served = {context_served}: at least one token")
    objective = objective or objectives.Z(convention)
    plan = _Plan.of(laws, budget, train_context, convention, aspect)
    baseline = Heads(*(baseline or (budget.heads if isinstance(budget, SameAs) else LLAMA3)))
    n_H = plan.least_params(loss, _fitted(laws))[0]
    if not np.isfinite(n_H).any():
        least = plan.least_loss(_fitted(laws))
        raise ValueError(f"no heads reach a loss of {loss:g} with this training budget: the least is {least:.4f}; raise either")
    warnings = list(laws.warnings)
    against = plan.heads.index(baseline) if baseline in laws else None
    if against is None:
        warnings.append(f"no saving against {baseline}: no law has these heads")

    def models(n_xH: np.ndarray) -> tuple[costs.Shape, np.ndarray, np.ndarray]:
        """Shapes, tokens and costs of sizes; nan where the loss is not reached."""
        n_xH = np.where(np.isfinite(n_xH), n_xH, np.nan)
        shape = plan.shape(n_xH, plan.heads)
        return shape, plan.tokens(n_xH), objective(shape, context_served)

    (shape, tokens_H, cost_H), reached_H = models(n_H), np.isfinite(n_H)
    frame = pd.DataFrame([heads._asdict() for heads in plan.heads]).astype({"n_heads": "Int64"})
    frame = frame.assign(
        n_params=np.where(reached_H, n_H, np.nan), tokens=tokens_H, n_layers=shape.n_layers, d_model=shape.d_model, cost=cost_H,
        c_infer=costs.infer_flops(shape, context_served, convention), saving=np.nan,
        m_infer=costs.infer_memory(shape, context_served, convention),
        note=pd.array([_note(laws, h, n, d) for h, n, d in zip(plan.heads, n_H, tokens_H, strict=True)], dtype="string"),
    )  # fmt: skip
    if against is not None:
        frame["saving"] = 1 - cost_H / cost_H[against]
    drawn, why = _draws(laws, draws, seed)
    warnings += why
    share, order = np.nan, ["hopeless", "cost"]
    if drawn is not None:
        n_SxH = np.concatenate([plan.least_params(loss, part) for part in _parts(drawn)])
        _, tokens_SxH, cost_SxH = models(n_SxH)
        cost_SxH = np.where(np.isfinite(n_SxH), cost_SxH, np.inf)
        for name, values in {"n_params": n_SxH, "cost": cost_SxH}.items():
            frame[f"{name}_low"], frame[f"{name}_high"] = ranking.quantiles(values, TAILS)
        ends = [ranking.quantiles(column[~np.isnan(column)], TAILS) for column in tokens_SxH.T]
        frame["tokens_low"], frame["tokens_high"] = np.array(ends, np.float64).T
        if against is not None:
            frame["saving_low"], _, frame["saving_high"] = ranking.savings(cost_SxH, cost_SxH[:, against])
        found = ranking.rank(cost_SxH)
        frame["probability"], frame["expected_regret"] = found.probability_H, found.expected_regret_H
        share = found.not_reached
        order.insert(1, "expected_regret")
    if share > 0.005:
        warnings.append(
            f"in {share:.0%} of the draws no heads reach the loss with this budget: probabilities are of the others"
        )
    frame = frame.assign(hopeless=~reached_H).sort_values(order, kind="stable")
    heads = plan.heads[frame.index[0]]
    if pd.notna(note := frame["note"].iloc[0]):
        warnings.append(f"{heads}: {note}")
    frame = frame.reindex(columns=list(CANDIDATES)).reset_index(drop=True)
    return Aligned(float(loss), int(context_served), plan.train_context, heads, baseline, frame, share, tuple(warnings))


@dataclass(frozen=True)
class _Plan:
    """What a model may be trained on. Arrays of N have the heads along their last axis."""

    laws: LossNDByHeads
    budget: float | SameAs
    heads: tuple[Heads, ...]
    train_context: int
    convention: str | costs.Convention
    aspect: Callable[[Any], Any]

    @classmethod
    def of(cls, laws, budget, train_context, convention, aspect) -> _Plan:
        if not isinstance(budget, SameAs) and not (np.isfinite(budget) and budget > 0):
            raise ValueError(f"budget = {budget}: training FLOPs must be above 0, or SameAs(heads)")
        train_context = laws.context if train_context is None else train_context
        if not train_context >= 1:
            raise ValueError(f"train_context = {train_context}: at least one token")
        costs.named_convention(convention)
        return cls(laws, budget, tuple(laws), int(train_context), convention, aspect or laws.aspect)

    def shape(self, n_params: np.ndarray, heads: Heads | Sequence[Heads]) -> costs.Shape:
        laws = self.laws
        return costs.solve_shape(n_params, heads, self.aspect, laws.head_dim, laws.vocab_size, laws.size_convention)

    def tokens(self, n_params: np.ndarray) -> np.ndarray:
        """D that the budget pays for, of (..., H) sizes."""
        per_token = self._flops(self.shape(n_params, self.heads))
        if not isinstance(self.budget, SameAs):
            return self.budget / per_token
        of_baseline = self._flops(self.shape(n_params, self.budget.heads))
        return self.budget.tokens_per_param * n_params * of_baseline / per_token

    def _flops(self, shape: costs.Shape) -> np.ndarray:
        return costs.train_flops(shape, self.train_context, 1.0, self.convention)

    def least_params(self, loss: float, law: DrawsND) -> np.ndarray:
        """The least N_SxH that reaches `loss`; inf where none does. At fixed cost the loss falls with N, then rises again."""
        log_n_G, loss_SxHxG = self._on_grid(law)
        reached = loss_SxHxG <= loss
        first = np.argmax(reached, axis=-1)
        low, high = log_n_G[np.maximum(first - 1, 0)], log_n_G[first]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            n = np.exp(middle)
            above = _predict(law, middle, np.log(self.tokens(n))) > loss
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(reached.any(axis=-1), np.exp(high), np.inf)

    def least_loss(self, law: DrawsND) -> float:
        """The least loss of any H at any N."""
        return float(self._on_grid(law)[1].min())

    def _on_grid(self, law: DrawsND) -> tuple[np.ndarray, np.ndarray]:
        params = self.laws.problem.params
        log_n_G = np.linspace(np.log(params.min() / _BELOW), np.log(params.max() * _ABOVE), _POINTS)
        log_tokens_GxH = np.log(self.tokens(np.repeat(np.exp(log_n_G)[:, None], len(self.heads), axis=1)))
        return log_n_G, _predict(law, log_n_G, log_tokens_GxH.T, grid=True)


def _predict(law: DrawsND, log_n: np.ndarray, log_tokens: np.ndarray, grid: bool = False) -> np.ndarray:
    """Loss of (S, H) sizes and tokens; with `grid` loss_SxHxG of sizes (G,) and tokens (H, G)."""
    per_draw = (slice(None), None, None) if grid else (slice(None), None)
    per_heads = (..., None) if grid else ...
    by_size = np.exp(law.log_a_SxH[per_heads] - law.alpha_SxH[per_heads] * log_n)
    return law.entropy[per_draw] + by_size + np.exp(law.log_b[per_draw] - law.beta[per_draw] * log_tokens)


def _fitted(laws: LossNDByHeads) -> DrawsND:
    """The fitted law as the only draw."""
    one = next(iter(laws.values()))
    log_a = np.log([law.A for law in laws.values()])
    return DrawsND(
        np.array([one.E]), np.log([one.B]), np.array([one.beta]), log_a[None], np.array([[law.alpha for law in laws.values()]])
    )


def _draws(laws: LossNDByHeads, count: int, seed: int) -> tuple[DrawsND | None, list[str]]:
    """Joint draws, or why there are none."""
    if not count:
        return None, []
    try:
        return laws.draws(count, seed), []
    except ValueError as error:
        return None, [f"no probabilities: {error}"]


def _parts(law: DrawsND) -> list[DrawsND]:
    fields = (law.entropy, law.log_b, law.beta, law.log_a_SxH, law.alpha_SxH)
    return [DrawsND(*(x[i : i + _PART] for x in fields)) for i in range(0, len(law.beta), _PART)]


def _note(laws: LossNDByHeads, heads: Heads, n_params: float, tokens: float) -> str | None:
    if not np.isfinite(n_params):
        return "does not reach the loss with this training budget at any size"
    law, said = laws[heads], []
    for name, value, trained in (("N*", n_params, law.params), ("D", tokens, law.tokens)):
        if (factor := beyond(value, trained.min(), trained.max())) > _FAR:
            said.append(f"{name} is {factor:.2g}x {'above' if value > trained.max() else 'below'} the trained ones")
    return f"extrapolated: {', '.join(said)}" if said else None
