"""Accelerators: their rows (`chips`), found by name or as JAX calls them, and the slices and hosts that are rented."""

# ruff: noqa: F401 (the fields of a row are known by the name of the chapter)
from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping

from gqa_jax.errors import closest
from gqa_jax.hardware.chip import (
    ALLOCATOR_FRACTION,
    FRACTION_VARIABLES,
    GIB,
    SERVER_FRACTION,
    Calibration,
    Chip,
    Collectives,
    Efficiency,
    Gpu,
    Measured,
    Price,
    Tiles,
    Tpu,
    has_word,
)
from gqa_jax.hardware.chips import CALIBRATED, CHIPS, MATMUL, OTHER_GPUS, SAME_MATRIX_UNITS, SERVED, TRAINED

CHIPS_PER_HOST = 4  # of a TPU slice of several hosts


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None where no data sheet is recorded (CPUs)."""
    chip = next((chip for chip in CHIPS.values() if chip.is_called(device_kind)), None)
    board = re.search(r"\b(\d+)GB", device_kind)
    if chip is None or board is None:
        return chip
    memory = float(board[1]) * 1e9 * ALLOCATOR_FRACTION  # of a smaller board of the same chip: "NVIDIA A100-SXM4-40GB"
    return dataclasses.replace(chip, memory_bytes=min(memory, chip.memory_bytes))


def memory_fraction(environment: Mapping[str, str]) -> float:
    """Share of a GPU's memory that JAX takes in this environment. Raises ValueError for what is no share of it."""
    for name in FRACTION_VARIABLES:
        if text := environment.get(name):
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 < value <= 1:
                raise ValueError(f"{name}={text}: must be a number above 0 and at most 1, the share of a GPU's memory")
            return value
    return ALLOCATOR_FRACTION


def on_this_machine(chip: Chip, environment: Mapping[str, str]) -> Chip:
    """`chip` with the memory that JAX takes of it here: that of a GPU by `memory_fraction`."""
    if chip.gpu is None:
        return chip
    return dataclasses.replace(chip, memory_bytes=chip.memory_bytes / ALLOCATOR_FRACTION * memory_fraction(environment))


def calibration(chip: Chip) -> Calibration:
    """Of the chip itself where it has one, else of its class, GPU or TPU."""
    return CALIBRATED.get(chip.name, CALIBRATED[chip.kind])


def default_efficiency(chip: Chip, param_dtype: str = "bfloat16") -> Efficiency:
    """What is taken of a chip that nobody has calibrated: that of its class, GPU or TPU, for parameters of a dtype."""
    narrow = {"float8": 8, "int8": 8, "float4": 4, "int4": 4} if param_dtype in dict(chip.narrow_flops) else {}
    bits = narrow.get(param_dtype, 16)
    return SERVED[chip.kind]._replace(matmul=MATMUL[chip.kind].get(bits, SERVED[chip.kind].matmul))


def trained_mfu(chip: Chip) -> float:
    """Share of the peak in bfloat16 that training is taken to reach where it was not measured on the chip."""
    return TRAINED[chip.kind]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where no data sheet is recorded (CPUs): MFU is then left empty."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops


def compute_capability(device_kind: str) -> tuple[int, int] | None:
    """Major and minor number of an NVIDIA GPU by JAX's name of it, or None for what is not one or is not known."""
    chip = chip_of(device_kind)
    if chip is not None:
        return None if chip.gpu is None else chip.gpu.compute_capability
    return next((known for word, known in OTHER_GPUS.items() if has_word(device_kind, word)), None)


def tiles_of(device_kind: str, head_dim: int) -> tuple[Tiles, Tiles] | None:
    """Tiles of the forward and the backward attention kernel on a TPU by JAX's name of it; None where there are none."""
    chip = CHIPS[SAME_MATRIX_UNITS[device_kind]] if device_kind in SAME_MATRIX_UNITS else chip_of(device_kind)
    rows = () if chip is None or chip.tpu is None else chip.tpu.tiles
    return next(((forward, backward) for largest, forward, backward in rows if head_dim <= largest), None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together, by name ("v5e:4x4", "v5p:2x2x4", "h200:8"); JAX shows each as one device."""

    name: str
    chip: Chip
    n_chips: int

    @property
    def shape(self) -> str:
        """Of a TPU slice its topology, "4x4"; of a GPU host how many, "8"."""
        return self.name.partition(":")[2]

    @property
    def is_tpu(self) -> bool:
        return self.chip.tpu is not None

    @property
    def n_hosts(self) -> int:
        """Machines, so processes: 4 TPU chips each where there are several; GPUs of one machine."""
        return max(1, self.n_chips // CHIPS_PER_HOST) if self.is_tpu else 1

    def require_compiler(self) -> None:
        """Raises ValueError, with what to install, where programs can't be compiled for these chips."""
        module = "libtpu" if self.is_tpu else "jax_cuda13_plugin"
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ValueError(f"compiling for {self.name} takes the package {package}: pip install 'gqa-jax[aot]'")


SLICES = {
    f"{chip.name}:{shape}": Slice(f"{chip.name}:{shape}", chip, math.prod(map(int, shape.split("x"))))
    for chip in CHIPS.values()
    for shape in chip.shapes
}


def find(name: str) -> Slice:
    """The slice of that name. Raises ValueError naming the closest."""
    if name in SLICES:
        return SLICES[name]
    chip = CHIPS.get(name.partition(":")[0])
    if chip is not None:
        raise ValueError(
            f"unknown topology {name!r}: of {chip.name} there are {', '.join(f'{chip.name}:{s}' for s in chip.shapes)}"
        )
    raise ValueError(f"unknown topology {name!r}: {closest(name, SLICES, f'there are {listing()}')}")


def listing() -> str:
    """The names of all slices, chip by chip."""
    return "; ".join(f"{chip.name}:{', '.join(chip.shapes)}" for chip in CHIPS.values())


def larger(than: Slice) -> list[Slice]:
    """Slices of the same chip with more of them, smallest first."""
    return [s for s in SLICES.values() if s.chip.name == than.chip.name and s.n_chips > than.n_chips]
