"""How long the laws of a 168-cell grid take, and the optimum map of 8 losses x 5 contexts with its probabilities.

    python -m benchmarks.laws [--turns N]

Losses of the paper's 8 sizes x 21 head configurations from known laws with 0.3% noise; nothing is trained. A turn fits anew,
with another seed. It also prints the bars that the tests hold: what comes out of the paper's own numbers.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
import scipy

from gqa_jax import laws, shapes
from gqa_jax.hardware import host
from gqa_jax.laws import Heads
from gqa_jax.search import optimum, presets
from tests import law_tables

LOSSES = (3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35)
CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    print(f"{host.described()}, load {os.getloadavg()[0]:.1f}, {versions}")
    seconds: dict[str, list[float]] = {}
    for turn in range(arguments.turns):
        table = law_tables.synthetic(noise=0.003, seed=turn, heads=shapes.head_configurations(), sizes=law_tables.SIZES)
        start = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal start
            now = time.perf_counter()
            seconds.setdefault(name, []).append(now - start)
            start = now

        fitted = laws.fit_by_heads(table)
        lap("fit of 168 runs, 21 H")
        fitted.intervals()
        lap("profile intervals of a, b of every H, and E")
        fitted.draws(1000, turn, "bootstrap")
        lap("1,000 bootstrap draws")
        fitted.draws(1000, turn)
        lap("1,000 posterior draws, pooled, shared noise and bends")
        if fitted.doubts.fires:
            print(f"turn {turn}: the doubts fire: {fitted.doubted}")
        lap("doubts")
        optimum.optimum_map(fitted, LOSSES, CONTEXTS, seed=turn)
        lap("optimum map, 8 losses x 5 contexts, 1,000 draws")
    for name, values in seconds.items():
        print(f"{name:<60} {statistics.median(values):7.2f} s (median of {len(values)})")
    total = sum(statistics.median(values) for values in list(seconds.values())[:5])
    print(f"{'all fits, draws and doubts':<60} {total:7.2f} s")
    paper = presets.load("paper")
    low, high = paper.blocks[0].entropy_interval()
    size = paper[Heads(8, 1)].solve(2.615)
    print(f"the paper's points: E = {paper.blocks[0].entropy:.3f} (95% {low:.2f} to {high:.2f}), N*(2.615; 8,1) = {size:.3g}")


if __name__ == "__main__":
    main()
