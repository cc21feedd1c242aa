"""What to train next: the runs that would most reduce the expected regret of the answer, within a budget.

    questions = [Question(loss=2.6, context_served=131_072)]
    gains(laws, questions, candidates)                       # each run alone
    choose(laws, questions, candidates, budget=1e21)         # a set of runs

Preposterior analysis (Raiffa and Schlaifer 1961) by the joint draws s = 1 ... S of all laws. R_sH is the regret of heads H in
draw s; the expected regret of today's answer is r0 = min_H mean_s R_sH. A run of heads h at size N would give a loss y: were
draw t the truth, y ~ Normal(L_t(N; h), sigma_t^2). Seeing y gives every draw s the weight Normal(y; L_s(N; h), sigma_s^2), and
several runs the product of theirs. The answer would then be the H of least weighted mean regret, and the run is worth

    gain = E_y [weighted mean of R_s,(answer today) - weighted mean of R_s,(answer after y)]

The least of several noisy means is chosen with an eye for luck, by which every run would seem to help. So the draws are cut
into FOLDS parts: the truth and the weighted means are of one part, the answer after y is chosen by all the others. As the truth
is one of the draws that are weighed, the weighted mean of its part is the expected regret given y without bias, however few
draws carry the weight; and an answer that is chosen by few is a worse one. So the gain is not overstated for want of draws. Its
standard error is that of the mean over parts.

What is known of noise and of the form of the laws is in the draws (`gqa_jax.laws.posterior`): laws that bend, and what all
runs of a size share. Another seed of a trained run has what its size shares in that draw, L_s + s_size; a run of a new
size has a deviation of that size, Normal(0, kappa_s sigma_s^2), the same for all runs of it. So another seed at a size is worth
what it tells of a run's own noise and of what its size shares, another size what it tells of the law and its bend.

The loss of a single run is integrated over numerically. Sets are chosen greedily, by simulated truths and losses that are the
same for all candidates of a step, and what they are worth is then told from draws that they were not chosen by.

Not in it is what the laws don't know: that N alone may not order the models, that heads without a law might be better, that
losses may leave the power law in other ways than by the bends of `gqa_jax.laws.bends`, or by none where the laws are of exact
power laws (method "independent" or "bootstrap").
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws import Heads, LawsByHeads
from gqa_jax.search import objectives, optimum

FOLDS = 8
#: Draws that must carry the answer after the runs in nine of ten simulated outcomes; else more are drawn, up to MOST_DRAWS.
ENOUGH = 50.0
MOST_DRAWS = 32_768
RARE = 0.002  # heads that are cheapest in fewer draws are no answer after a run either: a gain leaves out what they would add
SURE = 2.0  # a run is chosen only if its gain is above 0 by so many standard errors
_FEWER = 4  # as many times fewer outcomes do for a candidate of a step, whose own loss is integrated over
_SCREENING = 512  # outcomes x answers by which finalists are found, which are looked at by 8 times as many
_FINALISTS = 6  # by gain per cost, and as many by gain
_PROMISING = 32  # likewise, by the step before, to be screened
_STEPS_PER_SIGMA, _TAIL, _MOST_STEPS = 1.5, 5.0, 2000  # of the integral over a loss
_AT_A_TIME = 2**19  # numbers in one array
_IN_A_BATCH = 2**22  # likelihoods
_MOST_WEIGHTS = 2**25  # kept: outcomes x draws

GAINS = (
    "name", "n_heads", "n_kv_heads", "n_params", "cost", "regret_after", "gain", "gain_error", "gain_per_cost",
    "probability_after",
)  # fmt: skip
STEPS = (
    "name", "n_heads", "n_kv_heads", "n_params", "cost", "total_cost", "regret_after", "total_gain", "total_gain_error",
    "probability_after",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """What the answer is for: a loss that must be reached at the least cost of serving a context."""

    loss: float
    context_served: int
    objective: objectives.Objective | None = None  # None: `objectives.Z()`
    memory_limit: Any = None  # as in `optimum.search`
    aspect: Any = None  # as there: the best shape of every draw, unless it is given
    weight: float = 1.0  # of its regret, relative to other questions


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that could be trained. Another seed of a run that is there is one too."""

    name: str
    heads: Heads
    n_params: float  # N, counted as the laws count it (`LawsByHeads.size_convention`)
    cost: float  # training FLOPs, or anything that the budget is in
    size: str | None = None  # name, like 12x768: which trained size it is of, or which runs are of one new size. None: by N


@dataclasses.dataclass(frozen=True)
class Choice:
    """Runs to train, and what is expected of them.

    Regrets are relative costs, means over the questions by their weights: 0.01 is 1% more than the least cost. They and their
    standard errors come from draws and simulated losses of their own, not from those by which the runs were chosen.
    """

    steps: pd.DataFrame  # STEPS: a row per run in the order of choice; totals with all runs before it
    regret_now: float  # expected, of today's answers (with `pending`: of the answers once those have ended)
    regret_after: float
    gain: float  # regret_now - regret_after
    gain_error: float
    probability_now: float  # that these answers are the cheapest, mean over questions
    probability_after: float
    cost: float
    budget: float
    stopped: str  # a sentence: why no further run was chosen
    warnings: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return list(self.steps["name"])


def gains(
    laws: LawsByHeads, questions: Sequence[Question], candidates: Sequence[Candidate], *, draws: int = 4096, seed: int = 0
) -> pd.DataFrame:
    """What each run would bring if it were the only one: columns `GAINS`, most gain per cost first, of those that surely gain.

    regret_after: expected regret of the answers after it. gain: by how much that is less than today's, gain_error its standard
    error. probability_after: expected, that the answers after it are the cheapest.

    Raises:
      ValueError: no question or candidate, heads without a law, laws that leave no degrees of freedom for noise, a loss that
        is not reached, or a cost, size or weight that is not above 0.
    """
    _check(questions, candidates, laws)
    simulation = _Simulation(laws, questions, draws, FOLDS, seed)
    rows = [
        {"name": one.name, **one.heads._asdict(), "n_params": float(one.n_params), "cost": float(one.cost),
         "regret_after": max(simulation.regret - value.gain, 0.0), "gain": value.gain, "gain_error": value.gain_error,
         "gain_per_cost": value.gain / one.cost, "probability_after": value.probability}
        for one, value in zip(candidates, simulation.values(candidates), strict=True)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(GAINS)).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
    order = frame.assign(sure=frame["gain"] > SURE * frame["gain_error"])
    return frame.loc[order.sort_values(["sure", "gain_per_cost"], ascending=False, kind="stable").index].reset_index(drop=True)


def choose(
    laws: LawsByHeads,
    questions: Sequence[Question],
    candidates: Sequence[Candidate],
    budget: float,
    *,
    pending: Sequence[Candidate] = (),
    draws: int = 4096,
    outcomes: int = 1024,
    seed: int = 0,
    progress: Callable[[Candidate], None] = lambda candidate: None,
) -> Choice:
    """The runs within `budget` that are worth most: greedily by gain per cost, or by gain where that set is worth more.

    Args:
      candidates: runs that may be chosen, each once.
      budget: in the unit of their costs.
      pending: runs that are under way. They cost nothing here, and what they will show is simulated too.
      draws: of the laws; more are drawn where too few carry the answer after the chosen runs.
      outcomes: simulated truths, each with the losses that it gives.
      progress: called with each run that is chosen for one of the two sets.

    Raises:
      ValueError: as `gains`, or a budget below the cheapest run.
    """
    _check(questions, [*candidates, *pending], laws)
    if not candidates:
        raise ValueError("no candidate: every run is there, or under way")
    cheapest = min(candidates, key=lambda one: one.cost)
    if not budget >= cheapest.cost:
        raise ValueError(f"budget = {budget:.4g}: the cheapest run, {cheapest.name}, costs {cheapest.cost:.4g}")
    sets: list[_Set] = []
    for by_cost in (True, False):
        found = _greedy(laws, questions, candidates, pending, budget, by_cost, (draws, outcomes, seed), progress)
        if all(set(found.runs) != set(other.runs) for other in sets):
            sets.append(found)
        if not found.is_limited:
            break  # it took all that is surely worth something
    simulation = _Simulation(laws, questions, max(found.draws for found in sets), outcomes, seed + 1)
    for one in pending:
        simulation.add(one)
    paths = [simulation.path(found.runs) for found in sets]
    chosen = 0
    if len(sets) == 2:  # the other one only if it is clearly worth more
        difference = paths[1][-1].gain_K - paths[0][-1].gain_K
        chosen = int(difference.mean() > _error(difference))
    return _choice(simulation.regret, sets[chosen], paths[chosen], budget)


@dataclasses.dataclass(frozen=True)
class _Value:
    """What runs are worth, against today's answers: means of each fold."""

    gain_K: np.ndarray
    probability_K: np.ndarray  # that the answers after them are the cheapest
    effective: float = np.nan  # draws of equal weight that would know as much, in nine of ten outcomes at least

    @property
    def gain(self) -> float:
        return float(self.gain_K.mean())

    @property
    def gain_error(self) -> float:
        return _error(self.gain_K)

    @property
    def probability(self) -> float:
        return float(self.probability_K.mean())


@dataclasses.dataclass(frozen=True)
class _Set:
    runs: list[Candidate]
    stopped: str
    is_limited: bool  # by the budget or the draws: in another order there may be more
    draws: int


class _Simulation:
    """Draws of the laws in K = FOLDS parts, and outcomes: draws that are taken for true, and the losses of runs in them.

    Arrays: S draws, those of a fold side by side; R outcomes with a truth of the same fold; C answers, questions x the heads
    that may answer them; J losses that a next run may have.
    """

    def __init__(self, laws: LawsByHeads, questions: Sequence[Question], draws: int, outcomes: int, seed: int):
        if draws < 64 * FOLDS or outcomes < FOLDS:
            raise ValueError(f"draws = {draws}, outcomes = {outcomes}: use {64 * FOLDS} and {FOLDS}, or more")
        size = draws // FOLDS
        self.folds = [slice(k * size, (k + 1) * size) for k in range(FOLDS)]
        self.count = FOLDS * size
        self.laws, self.seed, self.draws = laws, seed, laws.draws(self.count, seed)
        self.new_sizes: dict[str, np.ndarray] = {}  # deviates_S of each
        self.n_questions = len(questions)
        self.regret_CxS, self.cheapest_CxS = _regrets(laws, questions, self.count, seed)
        mean_C = self.regret_CxS.mean(1, dtype=np.float64)
        self.answers_Q = self._decide(mean_C)  # today's
        self.regret = float(self._of(mean_C, self.answers_Q))

        self.generator = np.random.default_rng([seed, 1])
        self.rounds = max(1, min(outcomes, _MOST_WEIGHTS // self.count) // FOLDS)
        places_KxR = np.stack([self.generator.permutation(size)[np.arange(self.rounds) % size] for _ in range(FOLDS)])
        self.truth_KxR = places_KxR + size * np.arange(FOLDS)[:, None]
        self.log_weight_KxRxS = np.zeros((FOLDS, self.rounds, self.count), np.float32)
        self.is_new = True  # nothing was added: all outcomes of a fold are alike

    def add(self, run: Candidate) -> None:
        """The run will be trained: from here on its loss is known in every outcome."""
        loss_S, sigma_S = self._losses(run)
        quantiles = (np.arange(FOLDS * self.rounds) + 0.5) / (FOLDS * self.rounds)
        noise_KxR = self.generator.permutation(stats.norm.ppf(quantiles)).reshape(FOLDS, self.rounds)
        y_KxR = loss_S[self.truth_KxR] + sigma_S[self.truth_KxR] * noise_KxR
        for k, rows in self._parts(self.rounds, self.count):
            self.log_weight_KxRxS[k, rows] += _log_likelihood(y_KxR[k, rows], loss_S, sigma_S)
            self.log_weight_KxRxS[k, rows] -= self.log_weight_KxRxS[k, rows].max(1, keepdims=True)
        self.is_new = False

    def value(self, rounds: int | None = None) -> _Value:
        """What the runs that were added are worth, by the first `rounds` outcomes of every fold (default: all)."""
        rounds = 1 if self.is_new else min(rounds or self.rounds, self.rounds)
        gain_K, probability_K, effective = np.zeros(FOLDS), np.zeros(FOLDS), []
        for k, rows in self._parts(rounds, self.count):
            own, weight_RxS = self.folds[k], self._weights(k, rows)
            sums_RxC, own_RxC = weight_RxS @ self.regret_CxS.T, weight_RxS[:, own] @ self.regret_CxS[:, own].T
            gain_R, probability_R = self._judge(sums_RxC, own_RxC, weight_RxS[:, own] @ self.cheapest_CxS[:, own].T)
            gain_K[k] += gain_R.sum() / rounds
            probability_K[k] += probability_R.sum() / rounds
            effective.append(weight_RxS.sum(1) ** 2 / np.square(weight_RxS).sum(1))
        return _Value(gain_K, probability_K, float(np.quantile(np.concatenate(effective), 0.1)))

    def values(self, runs: Sequence[Candidate], rounds: int | None = None) -> list[_Value]:
        """What each run is worth together with those that were added. Its own loss is integrated over, in every outcome."""
        rounds = 1 if self.is_new else min(rounds or self.rounds, self.rounds)
        return [value for some in self._batches(runs) for value in self._batch(some, rounds)]

    def _batch(self, likelihoods: Sequence[np.ndarray], rounds: int) -> list[_Value]:
        likelihood_SxJ = np.concatenate(likelihoods, 1)  # of the runs side by side
        starts = np.cumsum([0, *(one.shape[1] for one in likelihoods[:-1])])
        gain_BxK, probability_BxK = np.zeros((2, len(likelihoods), FOLDS))
        for k, rows in self._parts(rounds, self.regret_CxS.size):
            own, weight_RxS = self.folds[k], self._weights(k, rows)
            regret_RCxS = (weight_RxS[:, None] * self.regret_CxS).reshape(-1, self.count)
            cheapest_RCxS = (weight_RxS[:, None, own] * self.cheapest_CxS[:, own]).reshape(len(regret_RCxS), -1)
            sums_RxJxC, own_RxJxC, cheapest_RxJxC = (
                sums.reshape(len(weight_RxS), len(self.regret_CxS), -1).swapaxes(1, 2)
                for sums in (
                    regret_RCxS @ likelihood_SxJ,
                    regret_RCxS[:, own] @ likelihood_SxJ[own],
                    cheapest_RCxS @ likelihood_SxJ[own],
                )
            )
            gain_RxJ, probability_RxJ = self._judge(sums_RxJxC, own_RxJxC, cheapest_RxJxC)
            gain_BxK[:, k] += np.add.reduceat(gain_RxJ.sum(0), starts) / rounds
            probability_BxK[:, k] += np.add.reduceat(probability_RxJ.sum(0), starts) / rounds
        return [_Value(*both) for both in zip(gain_BxK, probability_BxK, strict=True)]

    def _batches(self, runs: Sequence[Candidate]) -> Iterator[list[np.ndarray]]:
        """Likelihoods_SxJ of the runs, some at a time."""
        batch: list[np.ndarray] = []
        for run in runs:
            batch.append(self._likelihood(run))
            if sum(one.size for one in batch) > _IN_A_BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def path(self, runs: Sequence[Candidate]) -> list[_Value]:
        """What has been added is worth, then with each of `runs` in turn. Leaves the simulation as it was."""
        kept = self.log_weight_KxRxS.copy(), self.is_new, self.generator.bit_generator.state
        found = [self.value()]
        for run in runs:
            self.add(run)
            found.append(self.value())
        self.log_weight_KxRxS, self.is_new, self.generator.bit_generator.state = kept
        return found

    def _parts(self, rounds: int, numbers: int) -> Iterator[tuple[int, slice]]:
        """Folds, and some of their outcomes at a time, of which each takes so many numbers."""
        step = max(1, _AT_A_TIME // numbers)
        for k in range(FOLDS):
            for start in range(0, rounds, step):
                yield k, slice(start, min(start + step, rounds))

    def _weights(self, k: int, rows: slice) -> np.ndarray:
        """weight_RxS of all draws in these outcomes; those of the truth's own fold sum to 1."""
        weight_RxS = np.exp(self.log_weight_KxRxS[k, rows])
        weight_RxS /= weight_RxS[:, self.folds[k]].sum(1, keepdims=True)
        return weight_RxS

    def _judge(self, sums_C: np.ndarray, own_C: np.ndarray, cheapest_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of weighted sums over all draws and over those of the truth's fold: gain, and probability of the answers after."""
        answers_Q = self._decide(sums_C - own_C)
        return self._of(own_C, self.answers_Q) - self._of(own_C, answers_Q), self._of(cheapest_C, answers_Q)

    def _likelihood(self, run: Candidate) -> np.ndarray:
        """Density_SxJ of the run's loss in every draw on a grid, times its step: for the trapezoidal rule.

        Of Gaussians it is exact at such steps, but for the points at which one answer gives way to another.
        """
        loss_S, sigma_S = self._losses(run)
        low, high = (loss_S - _TAIL * sigma_S).min(), (loss_S + _TAIL * sigma_S).max()
        steps = int(np.clip((high - low) / sigma_S.min() * _STEPS_PER_SIGMA, 16, _MOST_STEPS))
        grid_J, step = np.linspace(low, high, steps, retstep=True)
        return np.exp(_log_likelihood(grid_J, loss_S, sigma_S).T) * np.float32(step / np.sqrt(2 * np.pi))

    def _losses(self, run: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """L_s(N; h) of the run in every draw and what its size shares there, on the text of those that are there; its noise."""
        i = self.draws.heads.index(run.heads)
        loss_S, sigma_S = self.draws.loss(run.heads, run.n_params, on_this_text=True)[:, 0], self.draws.sigma_SxH[:, i]
        return (loss_S if self.draws.effects_SxJ is None else loss_S + self._shared(run, sigma_S)), sigma_S

    def _shared(self, run: Candidate, sigma_S: np.ndarray) -> np.ndarray:
        """What the runs of this run's size share in every draw; of a new size by random numbers of its name, or of its N."""
        known_S = self.draws.shared_at(self.laws.size_label(run.heads, run.n_params, run.size))
        if known_S is not None:
            return known_S
        key = run.size or f"N = {run.n_params:.6g}"
        if key not in self.new_sizes:
            self.new_sizes[key] = np.random.default_rng([self.seed, 2, zlib.crc32(key.encode())]).normal(size=self.count)
        return self.new_sizes[key] * np.sqrt(self.draws.kappa_S) * sigma_S

    def _decide(self, regret_C: np.ndarray) -> np.ndarray:
        """Which heads (...Q) have the least regret, of sums (...C) over draws."""
        return regret_C.reshape(*regret_C.shape[:-1], self.n_questions, -1).argmin(-1)

    def _of(self, values_C: np.ndarray, answers_Q: np.ndarray) -> np.ndarray:
        """Values (...C) of these answers (...Q), summed over the questions."""
        values = values_C.reshape(*values_C.shape[:-1], self.n_questions, -1)
        answers = np.broadcast_to(answers_Q, values.shape[:-1])
        return np.take_along_axis(values, answers[..., None], -1)[..., 0].sum(-1, dtype=np.float64)


def _log_likelihood(y_R: np.ndarray, loss_S: np.ndarray, sigma_S: np.ndarray) -> np.ndarray:
    """ln Normal(y; loss, sigma^2)_RxS, without the constant; in float32."""
    middle = loss_S.mean()  # float32 holds what is left without it
    z_RxS = (y_R - middle).astype(np.float32)[:, None] - (loss_S - middle).astype(np.float32)
    z_RxS *= (1 / sigma_S).astype(np.float32)
    z_RxS *= z_RxS
    z_RxS *= np.float32(-0.5)
    z_RxS -= np.log(sigma_S).astype(np.float32)
    return z_RxS


def _regrets(laws: LawsByHeads, questions: Sequence[Question], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(regret_CxS, whether H is the cheapest_CxS), times the question's weight over the share of draws that reach its loss.

    C are the questions x the heads that may answer; questions with fewer of them repeat one. Where no H reaches the loss it
    does not matter which is chosen: both are 0 there. In float32.
    """
    whole = sum(question.weight for question in questions)
    parts = []
    for one in questions:
        known = optimum.regrets(
            laws, one.loss, one.context_served, one.objective, aspect=one.aspect, memory_limit=one.memory_limit, draws=draws,
            seed=seed,
        )  # fmt: skip
        if not known.reached_S.any():
            raise ValueError(
                f"loss = {one.loss:g}: no heads reach it at a context of {one.context_served} in any draw of the laws: ask "
                "for a higher loss, or for more memory where that is limited"
            )
        regret_SxH = np.where(known.reached_S[:, None], known.regret_SxH, 0.0)
        best_SxH = np.arange(len(known.heads)) == regret_SxH.argmin(1)[:, None]
        best_SxH &= known.reached_S[:, None]
        kept = _contenders(regret_SxH, best_SxH)
        scale = one.weight / whole / known.reached_S.mean()
        parts.append([(values[:, kept] * scale).astype(np.float32) for values in (regret_SxH, best_SxH)])
    most = max(regret_SxH.shape[1] for regret_SxH, _ in parts)

    def stack(values: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.T for v in values for part in (v, np.repeat(v[:, :1], most - v.shape[1], 1))])

    regrets, cheapest = zip(*parts, strict=True)
    return stack(regrets), stack(cheapest)


def _contenders(regret_SxH: np.ndarray, best_SxH: np.ndarray) -> list[int]:
    """H that may answer: today's answer and the runner-up first, and those that are cheapest in more than RARE of the draws."""
    order = np.argsort(regret_SxH.mean(0), kind="stable")
    return [int(h) for place, h in enumerate(order) if place < 2 or best_SxH[:, h].mean() > RARE]


def _greedy(
    laws: LawsByHeads,
    questions: Sequence[Question],
    candidates: Sequence[Candidate],
    pending: Sequence[Candidate],
    budget: float,
    by_cost: bool,
    how: tuple[int, int, int],
    progress: Callable[[Candidate], None],
) -> _Set:
    """Takes the run of most gain (per cost) given those before it, until the budget or the evidence ends."""
    draws, outcomes, seed = how

    def begin(count: int, runs: Sequence[Candidate]) -> _Simulation:
        simulation = _Simulation(laws, questions, count, outcomes // _FEWER, seed)
        for run in runs:
            simulation.add(run)
        return simulation

    simulation, chosen, known = begin(draws, pending), [], {}
    while True:
        left = budget * (1 + 1e-9) - sum(run.cost for run in chosen)
        rest = [run for run in candidates if run not in chosen]
        affordable = [run for run in rest if run.cost <= left]
        is_limited = len(affordable) < len(rest)
        if not affordable:
            stopped = (
                "any other run costs more than is left of the budget" if rest else "these are all runs that could be trained"
            )
            return _Set(chosen, stopped, is_limited, simulation.count)
        if simulation.value().effective < ENOUGH:
            if simulation.count < MOST_DRAWS:
                simulation = begin(min(2 * simulation.count, MOST_DRAWS), [*pending, *chosen])
                continue
            stopped = "what further runs would add depends on what these will show: train these, then ask again"
            return _Set(chosen, stopped, True, simulation.count)
        run = _best(simulation, affordable, known, by_cost)
        if run is None:
            stopped = "no other run within the budget is sure to improve the answer"
            return _Set(chosen, stopped, is_limited, simulation.count)
        chosen.append(run)
        progress(run)
        simulation.add(run)


def _best(simulation: _Simulation, runs: Sequence[Candidate], known: dict[str, np.ndarray], by_cost: bool) -> Candidate | None:
    """The run of most gain (per cost) beyond what has been added; None when no gain is surely above 0.

    `known`: gains_K of the steps before by names of runs, brought up to date.
    """

    def look(some: Sequence[Candidate], rounds: int | None) -> None:
        base_K = simulation.value(rounds).gain_K
        for run, value in zip(some, simulation.values(some, rounds), strict=True):
            known[run.name] = value.gain_K - base_K

    def first(count: int) -> list[Candidate]:
        """So many by gain (per cost) less its error, and so many by gain."""
        scores = {
            run.name: (max(known[run.name].mean() - _error(known[run.name]), 0.0), known[run.name].mean()) for run in runs
        }
        by_score = sorted(runs, key=lambda run: -scores[run.name][0] / (run.cost if by_cost else 1.0))
        return list(dict.fromkeys(by_score[:count] + sorted(runs, key=lambda run: -scores[run.name][1])[:count]))

    rounds = max(1, min(4, _SCREENING // len(simulation.regret_CxS) // FOLDS))
    look(first(_PROMISING) if known else runs, rounds)
    finalists = first(_FINALISTS)
    look(finalists, 8 * rounds)
    sure = [run for run in finalists if known[run.name].mean() > SURE * _error(known[run.name])]
    return max(sure, key=lambda run: known[run.name].mean() / (run.cost if by_cost else 1.0), default=None)


def _choice(regret_today: float, found: _Set, path: Sequence[_Value], budget: float) -> Choice:
    first, rows, total = path[0], [], 0.0
    for run, value in zip(found.runs, path[1:], strict=True):
        total += run.cost
        more_K = value.gain_K - first.gain_K
        rows.append(
            {"name": run.name, **run.heads._asdict(), "n_params": float(run.n_params), "cost": float(run.cost),
             "total_cost": total, "regret_after": max(regret_today - value.gain, 0.0), "total_gain": float(more_K.mean()),
             "total_gain_error": _error(more_K), "probability_after": value.probability}
        )  # fmt: skip
    last_K = path[-1].gain_K - first.gain_K
    warnings = []
    if path[-1].effective < ENOUGH:
        warnings.append(
            f"in one of ten outcomes {path[-1].effective:.0f} draws or fewer of {found.draws} carry the answer after these "
            "runs: they gain this at least"
        )
    return Choice(
        steps=pd.DataFrame(rows, columns=list(STEPS)).astype({"n_heads": "Int64", "n_kv_heads": "Int64"}),
        regret_now=max(regret_today - first.gain, 0.0),
        regret_after=max(regret_today - path[-1].gain, 0.0),
        gain=float(last_K.mean()),
        gain_error=_error(last_K),
        probability_now=first.probability,
        probability_after=path[-1].probability,
        cost=total,
        budget=float(budget),
        stopped=found.stopped,
        warnings=tuple(warnings),
    )


def _error(values_K: np.ndarray) -> float:
    """Standard error of the mean over folds."""
    return float(values_K.std(ddof=1) / np.sqrt(len(values_K)))


def _check(questions: Sequence[Question], runs: Sequence[Candidate], laws: LawsByHeads) -> None:
    if not questions:
        raise ValueError("no question: give at least one loss and one context to be served")
    for question in questions:
        if not 0 < question.loss <= 100:
            raise ValueError(f"loss = {question.loss}: must be above 0 and at most 100, in nats per token")
        if not question.context_served >= 1:
            raise ValueError(f"context_served = {question.context_served}: must be at least 1 token")
        if not 0 < question.weight < np.inf:
            raise ValueError(f"weight = {question.weight} of a question: must be a number above 0")
    for run in runs:
        if run.heads not in laws:
            raise ValueError(f"{run.name}: no law for heads {run.heads}; there are {', '.join(map(str, laws))}")
        for name in ("n_params", "cost"):
            if not 0 < getattr(run, name) < np.inf:
                raise ValueError(f"{name} = {getattr(run, name)} of {run.name}: must be a number above 0")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two candidates are called {twice}: names must differ")
