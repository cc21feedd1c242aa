"""Slices that can be rented, by name: "v5e:4x4", "v5p:2x2x4", "h200:8". Arithmetic; imports no jax.

TPUs: a generation and the shape of the slice, of those that Google lists (docs.cloud.google.com/tpu/docs/v5e and so on, read
November 2026). GPUs: a model and how many of one host.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math

from gqa_jax.devices import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_HOST = ("1", "2", "4", "8")
SHAPES = {"v4": _CUBE, "v5e": _FLAT, "v5p": _CUBE, "v6e": _FLAT} | dict.fromkeys(("h200", "h100", "a100", "b200", "l4"), _HOST)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together; JAX shows each as one device."""

    name: str
    chip: Chip
    n_chips: int

    @property
    def is_tpu(self) -> bool:
        return "x" in self.name

    @property
    def n_hosts(self) -> int:
        """Machines, so processes: 4 TPU chips each where there are several; GPUs of one machine."""
        return max(1, self.n_chips // 4) if self.is_tpu else 1

    def require_compiler(self) -> None:
        """Raises ValueError, with what to install, where programs can't be compiled for these chips."""
        module = "libtpu" if self.is_tpu else "jax_cuda13_plugin"
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ValueError(f"compiling for {self.name} takes the package {package}: pip install 'gqa-jax[aot]'")


SLICES = {
    f"{chip}:{shape}": Slice(f"{chip}:{shape}", CHIPS[chip], math.prod(map(int, shape.split("x"))))
    for chip, shapes in SHAPES.items()
    for shape in shapes
}


def find(name: str) -> Slice:
    """The slice of that name. Raises ValueError naming the closest."""
    if name in SLICES:
        return SLICES[name]
    chip = name.partition(":")[0]
    if chip in SHAPES:
        raise ValueError(f"unknown topology {name!r}: of {chip} there are {', '.join(f'{chip}:{s}' for s in SHAPES[chip])}")
    close = difflib.get_close_matches(name, SLICES, n=1)
    known = "; ".join(f"{chip}:{', '.join(shapes)}" for chip, shapes in SHAPES.items())
    raise ValueError(f"unknown topology {name!r}: " + (f"did you mean {close[0]!r}?" if close else f"there are {known}"))


def larger(than: Slice) -> list[Slice]:
    """Slices of the same chip with more of them, smallest first."""
    return [s for s in SLICES.values() if s.chip.name == than.chip.name and s.n_chips > than.n_chips]
