import dataclasses
import datetime
import subprocess
import sys

import pytest

from gqa_jax import hardware
from gqa_jax.hardware import CHIPS, GIB


def test_peaks_are_found_by_the_names_that_jax_gives():
    kinds = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA L4": 121e12,
    }
    assert {kind: hardware.peak_flops(kind) for kind in kinds} == kinds
    assert hardware.peak_flops("cpu") is None


@pytest.mark.parametrize("kind", ["NVIDIA L40S", "NVIDIA H2000", "TPU v4 lite", "TPU v5 litepod", "TPU7x", ""])
def test_a_name_that_contains_another_is_not_taken_for_it(kind):
    assert hardware.chip_of(kind) is None


def test_no_name_is_of_two_chips():
    for chip in CHIPS.values():
        names = (*chip.kinds, *([] if chip.gpu is None else [chip.gpu.device_kind]))
        for name in names:
            assert [other.name for other in CHIPS.values() if other.is_called(name)] == [chip.name]


def test_a_row_says_what_a_tpu_or_a_gpu_needs():
    for name, chip in CHIPS.items():
        assert name == chip.name
        assert (chip.tpu is None) != (chip.gpu is None)
        assert chip.shapes
        assert {shape.count("x") for shape in chip.shapes} in ({0}, {1}, {2})
        assert (chip.gpu is None) == ("x" in chip.shapes[0])


def test_a_smaller_board_of_a_chip_has_less_memory():
    assert hardware.chip_of("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9 * hardware.ALLOCATOR_FRACTION
    assert hardware.chip_of("NVIDIA A100-SXM4-80GB") == CHIPS["a100"]


def test_attention_reaches_the_share_of_the_peak_that_its_schedule_says():
    forward, backward = CHIPS["v5e"].attention_shares(128)  # README: 4,239 and 10,408 cycles of 131,333 FLOPs at most
    assert forward == pytest.approx(4 * 1024**2 * 128 / 4239 / (197e12 / 1.5e9))
    assert backward == pytest.approx(10 * 1024**2 * 128 / 10408 / (197e12 / 1.5e9))
    assert 0.9 < forward < 1
    for chip in CHIPS.values():
        for share in (*chip.attention_shares(64), *chip.attention_shares(128)):
            assert 0 < share <= 1


def test_heads_smaller_than_those_measured_take_the_time_of_the_next_size():
    v5e = CHIPS["v5e"]
    assert v5e.attention_shares(32) == pytest.approx([share / 2 for share in v5e.attention_shares(64)])
    assert v5e.attention_shares(256) == v5e.attention_shares(128)
    assert CHIPS["v4"].attention_shares(64) == (1.0, 1.0)  # nobody knows


def test_memory_is_what_a_program_may_use():
    assert CHIPS["v5e"].memory_bytes == 15.75 * GIB
    assert CHIPS["h200"].memory_bytes == pytest.approx(0.75 * 141e9)


def test_every_price_says_whose_where_and_when():
    for price in (price for chip in CHIPS.values() for price in chip.prices):
        assert 0.1 < price.usd_per_hour < 20
        assert all((price.vendor, price.product, price.region))
        assert price.source.startswith("https://")
        datetime.date.fromisoformat(price.date if price.date.count("-") == 2 else f"{price.date}-01")
    assert CHIPS["v5e"].price.usd_per_hour == 1.2
    assert CHIPS["b200"].price.origin == "Lambda, US, 2026-09-20"


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA H800", (9, 0)),
        ("NVIDIA H20", (9, 0)),
        ("NVIDIA A100-SXM4-40GB", (8, 0)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("NVIDIA Imaginary 1", None),
        ("TPU v5 lite", None),
        ("cpu", None),
    ],
)
def test_compute_capabilities(kind, capability):
    assert hardware.compute_capability(kind) == capability


def test_tiles_are_those_of_the_chip_and_of_its_head_size():
    v5e, v6e = hardware.tiles_of("TPU v5 lite", 64), hardware.tiles_of("TPU v6 lite", 128)
    assert (v5e[0].keys, v5e[1].keys, v5e[0].chunk, v6e[0].chunk) == (2048, 1024, 128, 256)
    assert hardware.tiles_of("TPU v5", 128) == hardware.tiles_of("TPU v4", 128) == v5e
    assert hardware.tiles_of("TPU7x", 128) == v6e  # its matrix units are those of a v6e
    for kind, head_dim in (("TPU v5 lite", 192), ("TPU v99", 64), ("NVIDIA H200", 64), ("cpu", 64)):
        assert hardware.tiles_of(kind, head_dim) is None


def test_chips_and_hosts_follow_from_the_name():
    found = {name: hardware.find(name) for name in ("v5e:4x4", "v5e:1x1", "v5p:2x2x4", "v4:2x2x2", "h200:8", "l4:1")}
    assert {name: s.n_chips for name, s in found.items()} == {
        "v5e:4x4": 16, "v5e:1x1": 1, "v5p:2x2x4": 16, "v4:2x2x2": 8, "h200:8": 8, "l4:1": 1,
    }  # fmt: skip
    assert [s.n_hosts for s in found.values()] == [4, 1, 4, 2, 1, 1]
    assert found["h200:8"].chip is CHIPS["h200"]
    assert [s.shape for s in found.values()] == ["4x4", "1x1", "2x2x4", "2x2x2", "8", "1"]


def test_an_unknown_name_says_the_closest():
    with pytest.raises(ValueError, match=r"did you mean 'v5e:4x4'\?"):
        hardware.find("v5:4x4")
    with pytest.raises(ValueError, match=r"unknown topology 'h200:16': of h200 there are h200:1, h200:2, h200:4, h200:8"):
        hardware.find("h200:16")
    with pytest.raises(ValueError, match=r"there are v4:2x2x1, .*; v5e:1x1, "):
        hardware.find("cpu")


def test_larger_slices_are_of_the_same_chip_smallest_first():
    assert [s.name for s in hardware.larger(hardware.find("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    assert hardware.larger(hardware.find("h200:8")) == []


def test_a_chip_of_your_own_needs_no_more_than_its_peaks():
    mine = hardware.Chip("mine", peak_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e9, interconnect=1e9)
    assert not mine.is_called("mine")
    assert mine.attention_shares(64) == (1.0, 1.0)
    assert dataclasses.replace(mine, kinds=("M1",)).is_called("NVIDIA M1 40GB")


def test_it_imports_no_jax():
    code = "import sys, gqa_jax.hardware, gqa_jax.prices; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
