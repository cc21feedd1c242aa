"""What every head configuration needs to reach a loss: sizes and shapes by the laws and by their draws, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.laws import LLAMA3, Draws, Heads, LawsByHeads, PowerLaw
from gqa_jax.laws.shape import Penalty, Price
from gqa_jax.search import ranking, shape_rule
from gqa_jax.search.objectives import Objective
from gqa_jax.search.ranking import TAILS, quantiles
from gqa_jax.search.shape_rule import ShapeRule
from gqa_jax.shapes import FFN_RATIO, Aspect, paper_aspect

FAR = 10.0  # times the largest trained size, or below the smallest: an answer beyond it is a guess, without a probability
_OUTSIDE = "extrapolated: N* is "
LEAST_BUILT, LARGEST_BUILT = 1e3, 1e13  # parameters: no model is proposed outside

CANDIDATES = (
    "n_heads", "n_kv_heads", "n_params", "n_params_low", "n_params_high", "n_layers", "d_model", "ratio", "c_infer", "m_infer",
    "cost", "cost_low", "cost_high", "rank", "probability", "expected_regret", "saving", "saving_low", "saving_high", "pareto",
    "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CostAt:
    """What is kept low: a cost at a served context, of models that keep a limit of memory.

    limit: bytes that parameters and cache (bfloat16, one sequence) may take; or a `RooflineServing` whose devices must hold
    them; None: no limit.
    """

    objective: Objective
    context: int
    limit: Any = None

    def __call__(self, shape: costs.Shape) -> np.ndarray:
        """The cost; infinite where a model does not keep the limit, or where no size reaches the loss; nan without a size."""
        with np.errstate(over="ignore", invalid="ignore"):  # draws whose sizes are astronomical
            cost = np.asarray(self.objective(shape, self.context), np.float64)
        cost = np.where(np.isfinite(shape.n_layers), cost, np.where(np.isnan(shape.n_layers), np.nan, np.inf))
        if self.limit is None:
            return cost
        if hasattr(self.limit, "fits"):
            kept = self.limit.fits(shape, self.context)
        else:
            kept = costs.infer_memory(shape, self.context, "exact") <= self.limit
        return np.where(kept | np.isnan(cost), cost, np.inf)

    def settled(self, shape: costs.Shape) -> CostAt:
        """With what the objective leaves open fixed as is best for `shape`."""
        objective = self.objective.settled(shape, self.context)
        return self if objective is self.objective else dataclasses.replace(self, objective=objective)

    def drawn(self, count: int, seed: int) -> CostAt:
        """With what was measured of its device drawn, as arrays (count, 1); itself where nothing was."""
        objective = self.objective.drawn(count, seed)
        return self if objective is self.objective else dataclasses.replace(self, objective=objective)

    @property
    def limit_text(self) -> str:
        """The limit in words."""
        return self.limit.room if hasattr(self.limit, "room") else f"the {formatting.gb(self.limit or 0)} of the limit"


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What a search starts from: candidates, then the heads that savings are against where they are no candidate."""

    heads: list[Heads]
    n_candidates: int  # the first of `heads`; the rest is only compared with
    fitted_Hx3: np.ndarray  # E, ln a and b of the fitted laws; nan for heads that only the draws have
    trained_Hx2: np.ndarray  # least and largest N that the law was fitted to
    draws: Draws | None  # of `heads`, in their order
    no_draws: str | None  # why there are none

    def far(self, i: int, n_params: float) -> float:
        """How many times N of the i-th heads is beyond the sizes that were trained, where that is more than FAR; else nan."""
        factor = beyond(n_params, *self.trained_Hx2[i])
        return factor if factor > FAR else np.nan

    def alone(self, i: int) -> Coefficients:
        """Those of the i-th heads, in the same draws."""
        drawn = None if self.draws is None else self.draws.take([self.heads[i]])
        return Coefficients([self.heads[i]], 1, self.fitted_Hx3[i : i + 1], self.trained_Hx2[i : i + 1], drawn, self.no_draws)


def beyond(n_params: float, smallest: float, largest: float) -> float:
    """How many times N is above the largest size or below the smallest; below 1 between them."""
    return float(max(n_params / largest, smallest / n_params))


def coefficients(
    laws: Mapping[Heads, PowerLaw],
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
    *,
    heads: Sequence[Heads] | None = None,
    compared: Heads | None = LLAMA3,
) -> Coefficients:
    """Coefficients of the fitted laws and their joint draws (none with draws=0, or where no noise is known).

    heads: candidates; default: all that have a law. compared: what savings are against, where it has a law or draws. Raises
    ValueError for candidates without a law.
    """
    if draws < 0 or draws == 1:
        raise ValueError(f"draws = {draws}: draw 2 or more, or 0 for an answer without probabilities")
    candidates = list(laws) if heads is None else list(dict.fromkeys(Heads(*one) for one in heads))
    if missing := [one for one in candidates if one not in laws]:
        raise ValueError(f"heads {', '.join(map(str, missing))} have no law here: there are {', '.join(map(str, laws))}")
    if not candidates:
        raise ValueError(f"heads: none was given; there are {', '.join(map(str, laws))}")
    drawn, why = None, None
    if draws and isinstance(laws, LawsByHeads):
        try:
            drawn = laws.draws(draws, seed, method)
        except ValueError as error:
            why = str(error)
    every = list(candidates)
    if compared is not None and compared not in every and (compared in laws or (drawn is not None and compared in drawn.heads)):
        every.append(compared)

    def each(value: Callable[[PowerLaw], tuple], count: int) -> np.ndarray:
        return np.array([value(laws[h]) if h in laws else (np.nan,) * count for h in every], np.float64)

    return Coefficients(
        every,
        len(candidates),
        each(lambda law: (law.entropy, np.log(law.a), law.b), 3),
        each(lambda law: (law.params.min(), law.params.max()) if len(law.params) else (np.nan, np.nan), 2),
        None if drawn is None else drawn.take(every),
        why,
    )


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Every H for one question: `frame` has a row per candidate, the answer first; arrays are in the order of `heads`."""

    frame: pd.DataFrame  # columns CANDIDATES, and `serving.SERVED` of costs of devices; savings are empty yet
    heads: list[Heads]
    drawn: shape_rule.Least | None  # cost_SxH at the best ratio of every draw; None without draws
    ranking: ranking.Ranking | None
    seed: int = 0  # of the draws


@dataclasses.dataclass(frozen=True)
class Table:
    """Sizes and shapes of every H for one loss, at every ratio d / L of a rule: typical ones, and those of every draw.

    Typical is the median of the draws; where there are none, what the fitted laws say.
    """

    laws: Mapping[Heads, PowerLaw]
    loss: float
    rule: ShapeRule
    known: Coefficients
    n_params_RxH: np.ndarray  # typical; inf where the loss is not reached, nan without a law
    n_params_RxSxH: np.ndarray | None
    seed: int = 0  # of the draws of what the shape costs
    loss_S: np.ndarray | None = None  # where draws must reach losses of their own

    @classmethod
    def of(
        cls,
        laws: Mapping[Heads, PowerLaw],
        loss: float,
        rule: ShapeRule,
        known: Coefficients,
        seed: int = 0,
        loss_S: np.ndarray | None = None,
    ) -> Table:
        """`loss_S`: the loss that each draw must reach, where it is not the same for all; `loss` is then its middle."""
        if (drawn := known.draws) is None:
            sizes = rule.sizes(rule.penalty.typical, loss, lambda asked: _sizes(asked, *known.fitted_Hx3.T))
            return cls(laws, loss, rule, known, sizes, None, seed, loss_S)
        price_Sx1 = Price(*(values[:, None] for values in rule.penalty.draw(len(drawn.b_SxH), seed)))
        with np.errstate(over="ignore"):  # draws whose sizes are astronomical
            asked = loss if loss_S is None else loss_S[:, None]
            n_RxSxH = rule.sizes(price_Sx1, asked, lambda loss: np.exp(drawn.log_size(loss)))
        n_RxSxH = np.maximum(n_RxSxH, LEAST_BUILT)
        typical = np.stack([quantiles(n_SxH, [0.5])[0] for n_SxH in n_RxSxH])
        return cls(laws, loss, rule, known, typical, n_RxSxH, seed, loss_S)

    def alone(self, heads: Heads, rule: ShapeRule) -> Table:
        """The table of one of its H, by another rule of shapes, in the same draws."""
        own = self.known.alone(self.heads.index(heads))
        return Table.of(self.laws, self.loss, rule, own, self.seed, self.loss_S)

    @property
    def heads(self) -> list[Heads]:
        return self.known.heads

    @functools.cached_property
    def shape_RxH(self) -> costs.Shape:
        return self._shapes(self.n_params_RxH)

    @functools.cached_property
    def shape_RxSxH(self) -> costs.Shape | None:
        return None if self.n_params_RxSxH is None else self._shapes(self.n_params_RxSxH)

    def _shapes(self, n_params: np.ndarray) -> costs.Shape:
        return costs.solve_shape(n_params, self.heads, self.rule, *about(self.laws))

    @property
    def log_ratios_R(self) -> np.ndarray:
        """ln of the ratios; of a table of models, where there is one for each size, a single 0."""
        return np.zeros(1) if self.rule.ratios_R is None else np.log(self.rule.ratios_R)

    def settled(self, cost: CostAt) -> CostAt:
        """With the layout that suits each H at its best typical shape."""
        first = cost.settled(one_of(self.shape_RxH, self.rule.usual))
        if first is cost or self.rule.n_ratios == 1:
            return first
        return cost.settled(self.typical(dataclasses.replace(first, limit=None))[2])

    def typical(self, cost: CostAt) -> tuple[np.ndarray, np.ndarray, costs.Shape]:
        """(cost_H, N*_H, shape_H), typical, at the ratio of least cost. `cost` is settled."""
        cost_RxH = cost(self.shape_RxH)
        if self.rule.n_ratios == 1:
            return cost_RxH[0], self.n_params_RxH[0], one_of(self.shape_RxH, 0)
        found = shape_rule.least(cost_RxH, self.log_ratios_R)
        n_H = np.maximum(np.exp(found.of(np.log(self.n_params_RxH))), LEAST_BUILT)
        ratio_H = found.ratio
        shape_H = costs.solve_shape(n_H, self.heads, lambda _: ratio_H, *about(self.laws))
        return cost(shape_H), n_H, shape_H

    def ranked(self, cost: CostAt, convention: str | costs.Convention = "figures", guesses: bool = False) -> Ranked:
        """The candidates, the answer first. guesses: whether an answer beyond FAR has a probability."""
        k = self.known.n_candidates
        cost = self.settled(cost)
        cost_H, n_H, shape_H = self.typical(cost)
        finite = np.isfinite(n_H[:k])

        def known(values: np.ndarray) -> np.ndarray:
            return np.where(finite, np.broadcast_to(values, (len(self.heads),))[:k], np.nan)

        # Columns, and a frame of them at the end: a map has thousands of these.
        column: dict[str, Any] = {name: np.full(k, np.nan) for name in CANDIDATES}
        for name in ("n_heads", "n_kv_heads"):  # those of a model of one's own need not be whole (`OwnModel.heads_of`)
            values = [getattr(one, name) for one in self.heads[:k]]
            column[name] = pd.array(values, dtype="Int64" if all((value or 0) % 1 == 0 for value in values) else "Float64")
        column["n_params"] = known(n_H)
        column["n_layers"], column["d_model"] = known(shape_H.n_layers), known(shape_H.d_model)
        column["ratio"] = column["d_model"] / column["n_layers"]
        column["c_infer"] = known(costs.infer_flops(shape_H, cost.context, convention))
        column["m_infer"] = known(costs.infer_memory(shape_H, cost.context, convention))
        column["cost"] = known(cost_H)
        column["pareto"] = ranking.pareto(column["c_infer"], column["m_infer"])
        notes = [self._note(i, n_H[i], cost_H[i], cost) for i in range(k)]
        excess = np.zeros(k)
        if (how := cost.objective.served(shape_H, cost.context)) is not None:
            column |= {name: values[:k] for name, values in how.columns().items()}
            notes = [
                note if np.isfinite(cost_H[i]) or not np.isfinite(n_H[i]) else how.unsupported_reason(i) or note
                for i, note in enumerate(notes)
            ]
            excess = how.excess()[:k]
        column["note"] = pd.array(notes, dtype="string")
        drawn, found = self._drawn(cost, column)
        hopeless = ~np.isfinite(column["cost"])
        first = column["cost" if found is None else "expected_regret"]
        order = np.lexsort((excess, column["cost"], first, hopeless))  # the last counts most
        frame = pd.DataFrame({name: values[order] for name, values in column.items()})
        guess = np.isfinite(self.known.far(int(order[0]), float(n_H[order[0]])))
        if hopeless[order[0]] or (guess and not guesses):
            frame["probability"] = np.nan
        frame["rank"] = pd.arrays.IntegerArray(np.arange(1, k + 1), hopeless[order])
        return Ranked(frame, self.heads, drawn, found, self.seed)

    def drawn_costs(self, cost: CostAt) -> shape_rule.Least:
        """cost_SxH at the best ratio of every draw, and where that is. `cost` is settled."""
        drawn = cost.drawn(self.n_params_RxSxH.shape[1], self.seed)
        return shape_rule.least(drawn(self.shape_RxSxH), self.log_ratios_R)

    def _drawn(self, cost: CostAt, column: dict[str, Any]) -> tuple[shape_rule.Least | None, ranking.Ranking | None]:
        """Adds what the draws say to the candidates; returns the least costs, and how the H compare; nothing without draws."""
        if self.n_params_RxSxH is None:
            return None, None
        k = self.known.n_candidates
        found = self.drawn_costs(cost)
        with np.errstate(divide="ignore"):
            n_SxH = np.exp(found.of(np.log(self.n_params_RxSxH)))
        column["n_params_low"], column["n_params_high"] = quantiles(n_SxH[:, :k], TAILS)
        column["cost_low"], column["cost_high"] = quantiles(found.cost[:, :k], TAILS)
        ranked = ranking.rank(found.cost[:, :k])
        column["probability"], column["expected_regret"] = ranked.probability_H, ranked.expected_regret_H
        return found, ranked

    def _note(self, i: int, n_params: float, own: float, cost: CostAt) -> str | None:
        law = self.laws.get(self.heads[i])
        if law is None:
            return None
        if not np.isfinite(n_params):
            if self.loss <= law.entropy or self.n_params_RxSxH is None:
                return f"not reached at any size: E = {law.entropy:.4f}"
            share = np.isfinite(self.n_params_RxSxH[self.rule.usual, :, i]).mean()
            return f"not reached at any size in {1 - share:.0%} of the draws"
        if cost.limit is not None and not np.isfinite(own):
            return f"takes more than {cost.limit_text}"
        if n_params <= LEAST_BUILT * (1 + 1e-9):
            return "smaller than any model: every size reaches this loss"
        if not len(law.params):
            return "never trained"
        smallest, largest = law.params.min(), law.params.max()
        if smallest <= n_params <= largest:
            return None
        side = "above" if n_params > largest else "below"
        return f"{_OUTSIDE}{formatting.times(beyond(n_params, smallest, largest))} {side} the trained sizes"

    def follows_its_curve(self, heads: Heads) -> bool:
        """Whether N* of the fitted law of H is within 95% of the draws, in models shaped as the runs; True without draws."""
        law = self.laws[heads]
        if self.n_params_RxSxH is None or self.loss_S is not None:
            return True

        def size_of(loss: float) -> np.ndarray:
            return np.asarray(law.solve(loss) if loss > law.entropy else np.inf)

        own = float(self.rule.sizes(self.rule.penalty.typical, self.loss, size_of)[self.rule.usual])
        low, high = quantiles(self.n_params_RxSxH[self.rule.usual, :, self.heads.index(heads)], TAILS)
        return bool(low <= own <= high)

    def needed(self, i: int, ratio: Any) -> np.ndarray:
        """The typical N of the i-th heads that reaches the loss at these d / L."""
        if self.rule.n_ratios == 1:
            return np.broadcast_to(self.n_params_RxH[0, i], np.shape(ratio))
        return np.exp(np.interp(np.log(ratio), self.log_ratios_R, np.log(self.n_params_RxH[:, i])))


def _sizes(loss: np.ndarray, entropy: np.ndarray, log_a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """N* = a / (L - E)^(1/b); inf where E is not below the loss, nan where there is no law."""
    gap = loss - entropy
    with np.errstate(over="ignore"):
        n = np.exp(log_a - np.log(np.where(gap > 0, gap, 1.0)) / b)
    return np.where(np.isnan(gap), np.nan, np.where(gap <= 0, np.inf, np.maximum(n, LEAST_BUILT)))


def about(laws: Mapping[Heads, PowerLaw]) -> tuple[float, float, str, float]:
    """Head size, vocabulary, convention of sizes, and the feed-forward network's width over d."""
    if isinstance(laws, LawsByHeads):
        return laws.head_dim, laws.vocab_size, laws.size_convention, laws.ffn_ratio
    return 64.0, 50_304.0, "figures", FFN_RATIO


def rule_of(laws: Mapping[Heads, PowerLaw], asked: str | float | Aspect | None) -> ShapeRule:
    """The `ShapeRule` that is asked of these laws."""
    if isinstance(laws, LawsByHeads):
        return ShapeRule.of(asked, laws.penalty, laws.aspect)
    return ShapeRule.of(asked, Penalty(), paper_aspect())


def one_of(shape: costs.Shape, index: int) -> costs.Shape:
    """The shape, or the shapes, of that index along the first axis."""
    count = np.shape(shape.n_layers)
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    return costs.Shape(
        **{name: np.broadcast_to(v, count)[index] if np.ndim(v) == len(count) else v for name, v in fields.items()}
    )


def outside(note: Any) -> str:
    """How far N* is outside the trained sizes, of a candidate's note: 1.8x above; empty where it is within them."""
    if pd.isna(note) or not note.startswith(_OUTSIDE):
        return ""
    return note.removeprefix(_OUTSIDE).removesuffix(" the trained sizes")
