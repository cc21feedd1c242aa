"""Tuned tile sizes: a row for each chip, head size and pass. `python -m benchmarks.attention --tune` prints new ones.

The TPU rows minimise cycles of the compiler's static schedule (`benchmarks/tpu_cycles.py`); they are not times on a chip.
"""

from __future__ import annotations

from gqa_jax.attention.tpu import Tiles

# (JAX's device kind, largest head size, pass). A "TPU v4" has the matrix units of a "TPU v5" (v5p), a "TPU7x" those of a
# "TPU v6 lite" (v6e).
TPU: dict[tuple[str, int, str], Tiles] = {
    ("TPU v5 lite", 128, "forward"): Tiles(rows=1024, keys=2048, strip=256, chunk=128, ahead=6, together=2),
    ("TPU v5 lite", 128, "backward"): Tiles(rows=1024, keys=1024, strip=256, chunk=128, ahead=3, together=2),
    ("TPU v5", 128, "forward"): Tiles(rows=1024, keys=2048, strip=256, chunk=128, ahead=6, together=2),
    ("TPU v5", 128, "backward"): Tiles(rows=1024, keys=1024, strip=256, chunk=128, ahead=3, together=2),
    ("TPU v6 lite", 128, "forward"): Tiles(rows=1024, keys=2048, strip=256, chunk=256, ahead=5, together=4),
    ("TPU v6 lite", 128, "backward"): Tiles(rows=1024, keys=1024, strip=256, chunk=256, ahead=3, together=2),
}
SAME_AS = {"TPU v4": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU7x": "TPU v6 lite"}


def tpu(chip: str, head_dim: int, which: str) -> Tiles | None:
    """The row for a pass ("forward", "backward") on a chip, None for a chip that has none."""
    chip = SAME_AS.get(chip, chip)
    rows = [(limit, tiles) for (kind, limit, name), tiles in TPU.items() if kind == chip and name == which]
    return next((tiles for limit, tiles in sorted(rows) if head_dim <= limit), None)
