"""How fast questions about serving are answered: `python -m benchmarks.serving`, on the CPU at hand."""

from __future__ import annotations

import time

import numpy as np

from gqa_jax import costs
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.search.roofline import RooflineServing

SHAPES, REPEATS = 20_000, 5
DEVICES = ("h200", "h100", "v6e")
LOSSES = (3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35)  # of the paper's Table 4
CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072)


def questions_a_second(n_devices: int, parallelism: str) -> float:
    """Loads of shapes that differ, in one call; the best of REPEATS."""
    generator = np.random.default_rng(0)
    shape = costs.Shape(generator.uniform(12, 60, SHAPES), generator.uniform(768, 4096, SHAPES), 8, 1)
    serving, times = RooflineServing("h100", n_devices, parallelism), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        serving.load(shape, 131_072)
        times.append(time.perf_counter() - start)
    return SHAPES / min(times)


def seconds_of_a_map() -> float:
    """Of a map of price by loss and context for three devices, 21 H, 1,000 draws of the laws."""
    laws = presets.load("paper-table4")
    start = time.perf_counter()
    for device in DEVICES:
        optimum.optimum_map(laws, LOSSES, CONTEXTS, objectives.make("price", device=device))
    return time.perf_counter() - start


def main() -> None:
    """Prints both."""
    for n_devices, parallelism in ((1, "best"), (8, "tensor"), (8, "best")):
        print(f"{n_devices} x h100, {parallelism}: {questions_a_second(n_devices, parallelism):,.0f} questions a second")
    cells = len(LOSSES) * len(CONTEXTS)
    print(f"a map of {cells} cells x {len(DEVICES)} devices, 21 H, 1,000 draws: {seconds_of_a_map():.1f} s")


if __name__ == "__main__":
    main()
