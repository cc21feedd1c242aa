"""What the choice of `python -m launch next` is worth: regret of the answer after its runs, random ones, or the largest ones.

    python -m benchmarks.next_runs [--truths N]

Laws of 8 head configurations scatter about those of the paper's Table 4. The four smaller of 7 sizes are trained (a run's
noise: 0.005 nats), half the cost of a 1.2B run may be spent on the others, on seeds of those that are there, or both; then laws
are fitted again and the answer's regret is taken from the truth. Nothing is trained: losses come from the laws.

    python -m benchmarks.next_runs --one_more_size [--truths N]

Whether one more size narrows the intervals of N* as `python -m launch fit` foretells: grids of 7 heads x 6 sizes with noise and
bends of the posterior's prior, and then a seventh size of 3.4 or 11 times the largest, or half the smallest; a loss that is
reached at twice the largest is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from benchmarks import coverage_grids as grids
from gqa_jax import costs
from gqa_jax.hardware import host
from gqa_jax.laws import Heads, fit_by_heads, planning
from gqa_jax.search import next_runs, objectives, optimum, presets, ranking
from gqa_jax.shapes import SIZES, Aspect
from tests import law_tables

HEADS = [Heads(*h) for h in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (16, 4))]
NAMES = ["19M", "85M", "150M", "200M", "470M", "680M", "1.2B"]
NOISE, LOSS, CONTEXT = 0.005, 2.55, 131_072
ASPECT = Aspect.constant(64)
FURTHER = (640, 3072, 4608)  # hidden sizes beyond those of `coverage_grids.W6`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", type=int, default=30)
    parser.add_argument("--one_more_size", action="store_true", help="the intervals after it, foretold and found")
    arguments = parser.parse_args()
    print(f"{host.described()}, load {os.getloadavg()[0]:.1f}, {arguments.truths} truths")
    if arguments.one_more_size:
        print(foretold(range(arguments.truths)).to_string(index=False))
        return
    frame = pd.DataFrame([one(seed) for seed in range(arguments.truths)])
    print(pd.DataFrame({"mean": frame.mean(), "standard error": frame.std() / np.sqrt(len(frame))}).to_string())


def one(seed: int) -> dict[str, float]:
    """Regrets of the answer for one truth: today's, and after each way to spend the budget."""
    generator = np.random.default_rng([seed, 7])
    preset = presets.load("paper-table4")
    shift = generator.normal(0, 0.03)
    truth = {}
    for h in HEADS:
        law = preset[h]
        amplitude = (law.a / 1e9) ** law.b * np.exp(generator.normal(0, 0.008))
        truth[h] = (amplitude, law.b + generator.normal(0, 0.004), law.entropy + shift)
    runs = pd.DataFrame([_run(truth, name, h, again, generator) for again in (0, 1) for name in NAMES for h in HEADS])
    runs = runs.set_index("cell", drop=False)
    done = runs[(runs["seed"] == 0) & runs["size"].isin(NAMES[:4])]
    rest = runs.drop(done.index)
    rest = rest[(rest["seed"] == 0) | rest["size"].isin(NAMES[:4])]
    candidates = [
        next_runs.Candidate(r.cell, Heads(r.n_heads, r.n_kv_heads), r.params_non_embedding, r.train_flops, r.size)
        for r in rest.itertuples()
    ]
    budget = 0.5 * 120 * law_tables.params((8, 1), [_shape("1.2B")])[0] ** 2
    laws, today = _answer(done)
    start = time.process_time()
    choice = next_runs.choose(laws, [next_runs.Question(LOSS, CONTEXT, aspect="trained")], candidates, budget, seed=seed)
    seconds = time.process_time() - start
    new = [c for c in candidates if c.name.endswith("-0")]
    shuffled = [new[i] for i in generator.permutation(len(new))]
    regret = _true_regret(truth)
    result = {
        "today": regret[today],
        "expected today": choice.regret_now,
        "expected after": choice.regret_after,
        "CPU s": seconds,
    }
    ways = {
        "chosen": choice.names,
        "random": _spend(shuffled, budget),
        "largest": _spend(sorted(shuffled, key=lambda c: -c.cost), budget),
    }
    for name, cells in ways.items():
        result[name] = regret[_answer(pd.concat([done, runs.loc[cells]]))[1]] if cells else regret[today]
    return result


def foretold(seeds: Iterable[int]) -> pd.DataFrame:
    """The intervals of N* after one more size over those before, median of grids: as foretold, and as found by a fit with it.

    Columns: d_model, times (its N over the largest that was trained; of the middle H), grids (that have laws, and whose
    intervals were bounded before), foretold, found, and correlation of their logarithms over grids.
    """
    rows = []
    for width in FURTHER:
        pairs = []
        for seed in seeds:
            whole = _grid(seed, (*grids.W6, width))
            table = whole.table()
            fewer = table[table["d_model"] != width]
            try:
                before, after = (planning.Intervals(fit_by_heads(some), whole.asked) for some in (fewer, table))
            except ValueError:  # hardly a draw falls with size
                continue
            new = [(h, n) for h, n in zip(whole.truth.heads, whole.params_HxM[:, -1], strict=True)]
            known = np.isfinite(before.now_H)
            if known.any():
                pairs.append([before.ratio(new), np.median(after.now_H[known] / before.now_H[known])])
        ratio = np.array(pairs)
        bounded = np.isfinite(ratio).all(1)
        times = whole.params_HxM[len(whole.truth.heads) // 2]
        rows.append(
            {"d_model": width, "times": times[-1] / times[:-1].max(), "grids": len(ratio), "foretold": np.median(ratio[:, 0]),
             "found": np.median(ratio[:, 1]), "correlation": np.corrcoef(np.log(ratio[bounded]).T)[0, 1]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _grid(seed: int, widths: Sequence[int]) -> grids.Grid:
    """Heads `grids.H7`, noise and bend of the prior; the loss that is asked for is reached at twice the largest of W6."""
    generator = np.random.default_rng([seed, 11])
    n = grids.params(grids.H7, widths)
    while True:
        bend, noise = grids.prior(generator, grids.H7, grids.W6)
        truth = dataclasses.replace(grids.Truth.draw(grids.H7, generator), bend=bend)
        if truth.falls(n):
            break
    loss = truth.loss(n) + noise.draw(n.shape, generator)
    middle, largest = len(grids.H7) // 2, len(grids.W6) - 1
    asked = float(truth.loss(np.full(len(n), 2 * n[middle, largest]))[middle])
    return grids.Grid(truth, tuple(widths), n, loss, asked, truth.log_size(asked), CONTEXT)


def _run(truth: dict, name: str, heads: Heads, seed: int, generator: np.random.Generator) -> dict:
    (layers, d) = _shape(name)
    n = law_tables.params(heads, [(layers, d)])[0]
    amplitude, b, entropy = truth[heads]
    loss = amplitude * (n / 1e9) ** -b + entropy + NOISE * generator.normal()
    return {"cell": f"{name}-{heads.n_heads}-{heads.n_kv_heads}-{seed}", "size": name, **heads._asdict(), "seed": seed,
            "n_layers": layers, "d_model": d, "params_non_embedding": n, "train_flops": 120 * n * n, "loss": loss,
            "context": 8192, "status": "done"}  # fmt: skip


def _shape(name: str) -> tuple[int, int]:
    return SIZES[name].n_layers, SIZES[name].d_model


def _answer(table: pd.DataFrame):
    laws = fit_by_heads(table)
    laws.aspect = ASPECT
    return laws, optimum.search(laws, LOSS, CONTEXT, aspect="trained", draws=2000).heads


def _true_regret(truth: dict) -> dict[Heads, float]:
    sizes = np.array([1e9 * ((LOSS - entropy) / amplitude) ** (-1 / b) for amplitude, b, entropy in truth.values()])
    cost = objectives.Z()(costs.solve_shape(sizes, list(truth), ASPECT), CONTEXT)
    return dict(zip(truth, ranking.regret(cost), strict=True))


def _spend(order: list[next_runs.Candidate], budget: float) -> list[str]:
    taken = []
    for candidate in order:
        if candidate.cost <= budget:
            taken.append(candidate.name)
            budget -= candidate.cost
    return taken


if __name__ == "__main__":
    main()
