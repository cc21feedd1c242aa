"""The five numbers of a device (`hardware.Efficiency`), fitted to times that were measured on it.

A time is explained by what the run had to do (`gqa_jax.search.roofline`): FLOPs of products with parameters and of attention,
bytes of parameters and of caches that are read, and layers that are started. With the work w_i and the seconds x_i of a unit of
each the expectation is sum w_i x_i, or with an overlap o > 1

    ((w_1 x_1)^o + (w_3 x_3)^o)^(1/o) + ((w_2 x_2)^o + (w_4 x_4)^o)^(1/o) + w_5 x_5

(1 matrices, 2 attention, 3 parameters, 4 caches, 5 layers). x are fitted by least squares of the logarithms of seconds, soft
beyond a tenth, within 0 (or the data sheet's peak) and infinity; o is the one of OVERLAPS that foretells best the runs that are
left out, one shape and context after the other, where it is better than a sum by more than a twentieth.

Standard errors are the larger ones of two: of the fit's Jacobian, and of the jackknife over the same groups. Where one is above
half of its number, the data do not fix that number: it has a bound instead, the most seconds of a unit with which the others
still explain the times, at 95%, and half of the bound is what is taken of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import costs
from gqa_jax.costs import HasShape
from gqa_jax.hardware import Chip, Efficiency
from gqa_jax.search.device_file import NUMBERS, Device
from gqa_jax.search.roofline import Phase, RooflineServing

OVERLAPS = (1.0, 1.5, 2.0, 3.0, 5.0)
BETTER = 0.95  # of the error of a sum: an overlap must come below
SOFT = 0.1  # residuals of logarithms beyond this count less
MOST = 0.5  # relative standard error of a number; beyond it, a bound
LEAST_RUNS = 12
_CHI = 3.84  # of 95%, one number
_RATES = ("FLOP/s in products with parameters", "FLOP/s in attention of prompts", "bytes/s of parameters", "bytes/s of caches")


class Timing(NamedTuple):
    """One time that was measured, and what it is of.

    kind: "prefill": prompts of `tokens` tokens each, read in `passes` chunks, and the logits of their last tokens;
      "decode": one token of each sequence, which sees `tokens` keys.
    """

    kind: str
    shape: HasShape
    tokens: float
    batch: int
    passes: int
    seconds: float


class Number(NamedTuple):
    """One of the five as it is said: a rate, or the seconds of a layer."""

    name: str
    value: float  # where it is a bound: the least rate, or the most seconds
    error: float  # relative standard error of its seconds; of a bound above MOST
    bound: bool


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A device as it was measured, and how well that tells what was measured."""

    device: Device
    numbers: list[Number]
    left_out_T: np.ndarray  # expected / measured seconds of each time, by a fit without its shape and context
    n_runs: int


def phase(serving: RooflineServing, timing: Timing) -> Phase:
    """What a run is expected to take, part by part.

    Prompts of a batch are read together: chunks of all of them, `passes` one after another, each of which reads the parameters.
    """
    if timing.kind == "decode":
        return serving.decode_step(timing.shape, timing.tokens, batch=timing.batch)
    one = serving.prefill(timing.shape, timing.tokens)
    embedding = costs.count_params(timing.shape, "exact").embedding / serving.n_devices
    reached, chip = serving.efficiency, serving.chip
    logits = 2 * timing.batch * embedding / (reached.matmul * chip.peak(serving.param_dtype))
    read = costs.dtype_bytes(serving.param_dtype) * embedding / (reached.weights_bandwidth * chip.memory_bandwidth)
    return one._replace(
        matmul=timing.batch * one.matmul + logits,
        attention=timing.batch * one.attention,
        weights=timing.passes * one.weights + read,
        cache=timing.batch * one.cache,
        exchange=timing.batch * one.exchange,
        layers=timing.passes * one.layers,
    )


def of_units(param_dtype: str, cache_dtype: str, attention_share: tuple = ()) -> RooflineServing:
    """A device whose seconds are the FLOPs, bytes and layers themselves; attention by these shares of a peak."""
    one = Chip(
        "unit", peak_flops=1.0, memory_bytes=1.0, memory_bandwidth=1.0, interconnect=0.0, attention_share=attention_share
    )
    rates = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0)
    return RooflineServing(one, param_dtype=param_dtype, cache_dtype=cache_dtype, efficiency=rates)


def fit(
    timings: Sequence[Timing], chip: Chip | None, *, name: str, device_kind: str, memory_bytes: float, param_dtype: str,
    cache_dtype: str, source: str,
) -> Fitted:  # fmt: skip
    """The device that explains these times best.

    Args:
      chip: its data sheet, whose peaks bound what is found; None: none is known (CPUs).
      name, device_kind, memory_bytes, param_dtype, cache_dtype, source: of the device's file.

    Raises:
      ValueError: too few times, or times that are no positive numbers.
    """
    if len(timings) < LEAST_RUNS:
        raise ValueError(f"{len(timings)} times: a fit takes {LEAST_RUNS} at least; measure more contexts or batches")
    if not all(0 < timing.seconds < np.inf for timing in timings):
        raise ValueError("times must be seconds above 0")
    work = _work(timings, chip, param_dtype, cache_dtype)
    seconds = np.array([timing.seconds for timing in timings])
    groups = _groups(timings)
    least = np.zeros(5)
    if chip is not None:
        least[:4] = 1 / chip.peak(param_dtype), 1 / chip.peak_flops, 1 / chip.memory_bandwidth, 1 / chip.memory_bandwidth
    tried = {overlap: _left_out(work, seconds, groups, least, overlap) for overlap in OVERLAPS}
    errors = {overlap: float(np.sqrt(np.mean(np.log(ratio) ** 2))) for overlap, ratio in tried.items()}
    best = min(OVERLAPS, key=errors.__getitem__)
    overlap = best if errors[best] < BETTER * errors[1.0] else 1.0
    x = _solve(work, seconds, least, overlap)
    deviation, correlation = _errors(work, seconds, groups, least, overlap, x)
    relative = np.where(x > least, deviation / np.maximum(x, 1e-300), np.inf)
    loose = ~(relative <= MOST)
    bounds = {int(i): _bound(work, seconds, least, overlap, x, int(i)) for i in np.flatnonzero(loose)}
    fixed = {i: (least[i] + bound) / 2 for i, bound in bounds.items()}
    x = _solve(work, seconds, least, overlap, fixed)
    for i, bound in bounds.items():
        relative[i] = (bound - least[i]) / np.sqrt(12) / x[i]  # as if every value within the bound were as likely
    numbers = [
        Number(part, 1 / value if i < 4 else value, float(relative[i]), i in bounds)
        for i, part in enumerate(NUMBERS)
        for value in (bounds.get(i, x[i]),)
    ]
    efficiency, device_chip = _shares(x, chip, name, memory_bytes, param_dtype)
    efficiency = efficiency._replace(
        overlap=overlap, source=source, errors=tuple(map(float, relative)), correlation=_alone(correlation, loose)
    )
    sheet = None if chip is None else chip.name
    found = Device(device_chip, device_kind, efficiency.checked(), param_dtype, cache_dtype, sheet)
    return Fitted(found, numbers, tried[overlap], len(timings))


def unit(number: Number) -> tuple[str, float]:
    """What a number is of, in words, and its value in the unit of these words."""
    i = NUMBERS.index(number.name)
    if i == 4:
        return "us for each layer of a phase", 1e6 * number.value
    return f"G{_RATES[i]}", number.value / 1e9


def _work(timings: Sequence[Timing], chip: Chip | None, param_dtype: str, cache_dtype: str) -> np.ndarray:
    """(runs, 5): FLOPs, bytes and layers, as a device of one FLOP/s and one byte/s has seconds of them."""
    serving = of_units(param_dtype, cache_dtype, () if chip is None else chip.attention_share)
    found = [phase(serving, timing) for timing in timings]
    return np.array([[p.matmul, p.attention, p.weights, p.cache, p.layers] for p in found], np.float64)


def _groups(timings: Sequence[Timing]) -> np.ndarray:
    """Of each time its shape and, about, its context: times of one are left out together."""
    keys = [(str(timing.shape), round(np.log2(max(timing.tokens, 1.0)))) for timing in timings]
    return np.unique([f"{shape} {size}" for shape, size in keys], return_inverse=True)[1]


def _expected(work: np.ndarray, x: np.ndarray, overlap: float) -> np.ndarray:
    part = work * x
    zero = np.zeros(len(part))
    return np.asarray(Phase(part[:, 0], part[:, 1], part[:, 2], part[:, 3], zero, part[:, 4], overlap=overlap).seconds)


def _residuals(work: np.ndarray, seconds: np.ndarray, overlap: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.log(np.maximum(_expected(work, x, overlap), 1e-300) / seconds)


def _solve(
    work: np.ndarray, seconds: np.ndarray, least: np.ndarray, overlap: float, fixed: dict[int, float] | None = None
) -> np.ndarray:
    """Seconds of a unit of each part; those of `fixed` are given."""
    from scipy import optimize

    fixed = fixed or {}
    free = [i for i in range(5) if i not in fixed]
    given = np.array([fixed.get(i, 0.0) for i in range(5)])
    scale = _scale(work, seconds)
    rest = np.maximum(1 - work @ given / seconds, 0.0)
    start, _ = optimize.nnls(work[:, free] * scale[free] / seconds[:, None], rest)
    low = np.minimum(least[free] / scale[free], 1e6)

    def whole(z: np.ndarray) -> np.ndarray:
        x = given.copy()
        x[free] = z * scale[free]
        return x

    residuals = _residuals(work, seconds, overlap)
    found = optimize.least_squares(
        lambda z: residuals(whole(z)), np.maximum(start, low) + 1e-3, bounds=(low, np.inf), loss="soft_l1", f_scale=SOFT,
        x_scale=np.maximum(start, 0.1), xtol=1e-12, ftol=1e-12, gtol=1e-12,
    )  # fmt: skip
    x = whole(found.x)
    x[free] = np.where(found.x - low < 1e-6, least[free], x[free])
    return x


def _cost(work: np.ndarray, seconds: np.ndarray, overlap: float, x: np.ndarray) -> float:
    """Sum of soft squares of the residuals, in units of SOFT squared."""
    z = _residuals(work, seconds, overlap)(x) / SOFT
    return float(np.sum(2 * (np.sqrt(1 + z**2) - 1)))


def _left_out(
    work: np.ndarray, seconds: np.ndarray, groups: np.ndarray, least: np.ndarray, overlap: float
) -> np.ndarray:  # fmt: skip
    """Expected over measured seconds of each time, by the fit to the other groups."""
    ratio = np.empty(len(seconds))
    for group in np.unique(groups):
        own = groups == group
        x = _solve(work[~own], seconds[~own], least, overlap)
        ratio[own] = _expected(work[own], x, overlap) / seconds[own]
    return ratio


def _errors(
    work: np.ndarray, seconds: np.ndarray, groups: np.ndarray, least: np.ndarray, overlap: float, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of x, the larger of the Jacobian's and of the jackknife's over groups, and the former's correlations."""
    residuals, count = _residuals(work, seconds, overlap), len(seconds)
    step = np.maximum(1e-6 * x, 1e-9 * _scale(work, seconds))
    jacobian = np.stack([residuals(x + h) - residuals(x) for h in np.diag(step)], axis=1)  # by steps: alike in size
    variance = max(_cost(work, seconds, overlap, x) * SOFT**2 / max(count - 5, 1), 1e-24)
    size = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    covariance = variance * np.linalg.pinv((jacobian / size).T @ (jacobian / size), rcond=1e-12) / np.outer(size, size)
    own = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    correlation = np.clip(covariance / np.outer(own, own), -1, 1)
    kinds = np.unique(groups)
    left_out = np.stack([_solve(work[groups != g], seconds[groups != g], least, overlap) for g in kinds])
    jackknife = np.sqrt((len(kinds) - 1) * np.mean((left_out - left_out.mean(axis=0)) ** 2, axis=0))
    return np.maximum(own * step, jackknife), correlation


def _bound(work: np.ndarray, seconds: np.ndarray, least: np.ndarray, overlap: float, x: np.ndarray, i: int) -> float:
    """The most seconds of a unit of part i with which the others still explain the times, at 95%."""
    best = _cost(work, seconds, overlap, x)
    limit = best * (1 + _CHI / max(len(seconds) - 5, 1)) + 1e-12
    value = max(x[i], least[i], 1e-3 * float(_scale(work, seconds)[i]))
    for _ in range(400):
        larger = 1.05 * value
        if _cost(work, seconds, overlap, _solve(work, seconds, least, overlap, {i: larger})) > limit:
            break
        value = larger
    return value


def _alone(correlation: np.ndarray, loose: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Of the five; those that have a bound alone go with no other."""
    found = correlation.copy()
    found[loose, :] = found[:, loose] = 0.0
    np.fill_diagonal(found, 1.0)
    return tuple(tuple(map(float, row)) for row in found)


def _scale(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Of each part: what a unit would take if it alone took all of the time that is shortest for it."""
    return np.array([np.min(seconds / np.maximum(work[:, i], 1e-300)) for i in range(5)])


def _shares(
    x: np.ndarray, chip: Chip | None, name: str, memory_bytes: float, param_dtype: str
) -> tuple[Efficiency, Chip]:  # fmt: skip
    """The rates as shares of the peaks; without a data sheet the larger one of each kind is the peak."""
    matmul, attention, weights, cache = (float(1 / value) for value in x[:4])
    if chip is None:
        chip = Chip(name, max(matmul, attention), memory_bytes, max(weights, cache), interconnect=0.0, data_sheet=False)
    else:
        chip = dataclasses.replace(chip, name=name)
    peaks = chip.peak(param_dtype), chip.peak_flops, chip.memory_bandwidth, chip.memory_bandwidth
    shares: list[Any] = [min(1.0, rate / peak) for rate, peak in zip((matmul, attention, weights, cache), peaks, strict=True)]
    return Efficiency(*shares, float(x[4])), chip
