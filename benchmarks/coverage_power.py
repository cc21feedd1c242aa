"""How often the doubts of a fit fire: false alarms, power, what bounds it, and what they say that they could not have seen.

    python -m benchmarks.coverage_power [--truths 1000] [--regimes clean,break_3x] [--workers 2]
    python -m benchmarks.coverage_power --bound      # instead: what tests see that look for one thing only

Power on bends stands beside that of the F test that knows the form of the bend and its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import linalg, stats

from benchmarks import coverage
from benchmarks.coverage_grids import REGIMES, Bend, Grid, drift, grid, smooth_break
from gqa_jax.laws import Heads, LawsByHeads, fit_by_heads

SHARED = ("half of the variance by size", "90% of it by size")


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Whether one grid was doubted."""

    regime: str
    index: int
    refused: str | None
    fired: bool
    knows: bool | None  # whether the F test that knows the form of the bend rejects at 5%; None without a bend
    drift: float = np.nan  # of the exponent over the sizes, the least that is said to be seen in 80% of grids
    shared: float = np.nan  # the same of deviations that sizes share, nats per token


def doubts_fire(laws: LawsByHeads) -> bool:
    """Whether the whole suite of doubts rejects these laws at 5%."""
    return laws.doubts.p_value < 0.05


def alarm(name: str, index: int, *, seed: int = 0, fires: Callable[[LawsByHeads], bool] = doubts_fire) -> Alarm:
    """Fits one grid and asks whether its law is doubted, and whether it could be by whoever knows how it bends."""
    one = grid(name, index, seed)
    try:
        laws = fit_by_heads(one.table())
    except ValueError as error:  # losses that do not fall
        return Alarm(name, index, str(error), False, None)
    doubts = laws.doubts
    drift = float(doubts.amounts["seen"].iloc[0])
    return Alarm(name, index, None, bool(fires(laws)), knows_the_form(laws, one), drift, doubts.size_effect)


def knows_the_form(laws: LawsByHeads, one: Grid, level: float = 0.05) -> bool | None:
    """F test of the true bend's amount against 0, its form and place given: 1 degree of freedom, at the linearised fit."""
    if one.truth.bend.kind == "none":
        return None
    J, value = _linearised(laws, one)
    residual = (one.loss_HxM - np.stack([laws[h].predict(n) for h, n in _rows(one)])).ravel()
    Q = linalg.null_space(J.T)
    return bool(_p_of_direction((residual @ Q)[None], (value * one.truth.bend.at(one.params_HxM).ravel()) @ Q)[0] < level)


def _rows(one: Grid) -> Iterator[tuple[Heads, np.ndarray]]:
    return zip(one.truth.heads, one.params_HxM, strict=True)


def _linearised(laws: LawsByHeads, one: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the fitted losses by (E, ln A and b of every H), runs x coefficients; and the losses above E."""
    H, M = one.params_HxM.shape
    x = np.log(one.params_HxM / one.middle)
    value = np.stack([laws[h].predict(n) - laws[h].entropy for h, n in _rows(one)])
    own = np.eye(H)[:, None, :] * np.ones((H, M, 1))
    J = np.concatenate([np.ones((H, M, 1)), value[..., None] * own, (x * value)[..., None] * own], -1)
    return J.reshape(H * M, -1), value.ravel()


def _p_of_direction(w_SxF: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """p of the F test of one shift, known but for its amount; `direction`: (F,), or (S, F)."""
    freedom = w_SxF.shape[1]
    along = np.sum(w_SxF * direction, 1) ** 2 / np.sum(direction**2, -1)
    return stats.f.sf(along / ((np.sum(w_SxF**2, 1) - along) / (freedom - 1)), 1, freedom - 1)


def power(alarms: Sequence[Alarm]) -> dict[str, Any]:
    """How often one regime's grids are doubted, with 99% intervals; of bends also how often by the test that knows the form."""
    heard = [a for a in alarms if a.refused is None]
    result: dict[str, Any] = {"truths": len(alarms), "refused": len(alarms) - len(heard)}
    if not heard:
        return result
    fired = coverage.column(heard, "fired")
    result["fired"] = coverage.mean(fired)
    quiet = [a for a in heard if not a.fired]  # where answers say it
    result["seen"] = [float(np.median([getattr(a, name) for a in quiet])) for name in ("drift", "shared")] if quiet else []
    bent = np.array([a.knows is not None for a in heard])
    if bent.any():
        knows = np.array([bool(a.knows) for a in heard], float)[bent]
        fired = fired[bent]
        result["knows"] = coverage.mean(knows)

        def relative(rows: np.ndarray) -> np.ndarray:
            return fired[rows].mean(-1) / np.maximum(knows[rows].mean(-1), 1 / len(knows))

        result["relative"] = coverage.resampled(relative, len(knows))
    return result


def power_markdown(summaries: dict[str, dict[str, Any]]) -> str:
    """A table for a page of documentation."""
    rows = [
        "| regime | doubted | F test that knows the form | power against that | 80% see: drift | shared, nats | no law |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in summaries.items():
        cells = [f"{name}: {REGIMES[name].about}", coverage.percent(one["fired"], spread=True) if "fired" in one else ""]
        cells += [coverage.percent(one["knows"]), f"{one['relative']['value']:.2f}"] if "knows" in one else ["", ""]
        cells += [f"{amount:.2g}" for amount in one["seen"]] if one.get("seen") else ["", ""]
        rows.append(f"| {' | '.join(cells)} | {one['refused']} of {one['truths']} |")
    return "\n".join(rows)


def bound(draws: int = 20_000, seed: int = 0, level: float = 0.05) -> dict[str, dict[str, float]]:
    """Power of tests that look for one thing, and of two that share 5% evenly, on what the regimes do to a clean grid's runs.

    Linearised at the fit of one clean grid, where residuals live in the directions that the coefficients leave open. "sizes":
    F of the means by size; "drift", "break": F of that bend, its place known; "sizes or drift": the lesser p of two at half
    the level each.
    """
    generator = np.random.default_rng([seed, 15])
    one, regime = grid("clean", 0, seed), REGIMES["clean"]
    J, value = _linearised(fit_by_heads(one.table()), one)
    Q = linalg.null_space(J.T)
    H, M = one.params_HxM.shape
    by_size = Q.T @ np.tile(np.eye(M), (H, 1))
    u, s, _ = np.linalg.svd(by_size, full_matrices=False)
    basis = u[:, s > 0.2 * s.max()]

    def shift(bend: Bend) -> np.ndarray:
        """Of the losses in the open directions, by one unit of noise."""
        return -bend.amount * (value * bend.at(one.params_HxM).ravel()) @ Q / regime.noise.own

    def noise(share: float) -> np.ndarray:
        own, shared = generator.normal(size=(draws, Q.shape[1])), generator.normal(size=(draws, M)) @ by_size.T
        return np.sqrt(1 - share) * own + np.sqrt(share) * shared

    drifts, breaks = (
        np.stack([shift(kind(generator, regime.heads, regime.widths)) for _ in range(draws)]) for kind in (drift, smooth_break)
    )
    alternatives = {
        "nothing": noise(0.0), SHARED[0]: noise(0.5), SHARED[1]: noise(0.9), "drift": noise(0.0) + drifts,
        "break": noise(0.0) + breaks,
    }  # fmt: skip

    def of_sizes(w: np.ndarray) -> np.ndarray:
        along, k = np.sum((w @ basis) ** 2, 1), basis.shape[1]
        return stats.f.sf(along / k / ((np.sum(w**2, 1) - along) / (w.shape[1] - k)), k, w.shape[1] - k)

    tests = {
        "sizes": of_sizes,
        "drift": lambda w: _p_of_direction(w, drifts[0]),
        "break": lambda w: _p_of_direction(w, breaks),
        "sizes or drift": lambda w: 2 * np.minimum(of_sizes(w), _p_of_direction(w, drifts[0])),
    }
    return {name: {to: float(np.mean(test(w) < level)) for to, w in alternatives.items()} for name, test in tests.items()}


def bound_markdown(found: dict[str, dict[str, float]]) -> str:
    """A table for a page of documentation."""
    names = list(next(iter(found.values())))
    rows = [f"| test at 5% | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    rows += [f"| {test} | {' | '.join(f'{power:.0%}' for power in powers.values())} |" for test, powers in found.items()]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bound", action="store_true", help="what tests see that look for one thing only, instead")
    options, regimes = coverage.read(parser, arguments)
    if options.bound:
        print(bound_markdown(bound(seed=options.seed)))
        return
    alarms = coverage.run(functools.partial(alarm, seed=options.seed), regimes, options.truths, options.workers, coverage.tell)
    print(power_markdown({name: power(found) for name, found in alarms.items()}))
    print(f"\n{options.truths} truths per regime")


if __name__ == "__main__":
    main()
