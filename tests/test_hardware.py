import dataclasses
import datetime
import math
import subprocess
import sys

import pytest

from gqa_jax import costs, hardware
from gqa_jax.hardware import CHIPS, GIB, SERVED, TRAINED, Collectives, Efficiency


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


def _day(date):
    """Of a month its first."""
    return date if date.count("-") == 2 else f"{date}-01"


def test_a_server_fills_a_fraction_of_the_board_not_of_what_jax_takes():
    """Boards as nvidia-smi shows them; of a smaller board of the same chip its own size."""
    assert CHIPS["h200"].board_bytes == 143_771 * 2**20
    assert CHIPS["h100"].server_bytes == pytest.approx(0.9 * 81_559 * 2**20)
    assert hardware.chip_of("NVIDIA A100-SXM4-40GB").board_bytes == 40e9
    assert CHIPS["v5e"].server_bytes == pytest.approx(0.9 * 15.75 * GIB)


class TestNarrow:
    def test_peaks_are_at_least_twice_those_of_bfloat16(self):
        for chip in CHIPS.values():
            for dtype, flops in chip.narrow_flops:
                assert chip.peak(dtype) == flops
                assert flops >= 1.99 * chip.peak_flops
                assert costs.dtype_bytes(dtype) <= 1

    @pytest.mark.parametrize(("name", "dtype"), [("a100", "float8"), ("v4", "int8"), ("h100", "int4"), ("b200", "float32")])
    def test_what_a_chip_has_no_units_for_is_computed_in_bfloat16(self, name, dtype):
        assert CHIPS[name].peak(dtype) == CHIPS[name].peak_flops

    @pytest.mark.parametrize(
        ("name", "dtype", "flops"),
        [("v5e", "int8", 394e12), ("h100", "float8", 1979e12), ("a100", "int8", 624e12), ("b200", "float4", 9000e12)],
    )
    def test_peaks_of_data_sheets(self, name, dtype, flops):
        assert CHIPS[name].peak(dtype) == flops


class TestCollectives:
    def test_one_device_waits_for_nobody(self):
        for chip in CHIPS.values():
            assert chip.collective_seconds(1) == 0

    def test_more_devices_take_no_less_time_and_all_say_since_when(self):
        for chip in CHIPS.values():
            counts, seconds = zip(*chip.collectives.seconds, strict=True)
            assert list(counts) == sorted(set(counts))
            assert list(seconds) == sorted(seconds)
            assert all(1e-6 < one < 1e-4 for one in seconds)
            assert chip.collectives.source
            datetime.date.fromisoformat(_day(chip.collectives.date))

    def test_a_number_between_takes_the_next_ones_and_one_beyond_the_last(self):
        mine = hardware.Chip("mine", 1.0, 1.0, 1.0, 1.0, collectives=Collectives(((2, 1.0), (8, 3.0)), "", ""))
        assert [mine.collective_seconds(n) for n in (2, 3, 8, 9)] == [1.0, 3.0, 3.0, 3.0]

    @pytest.mark.parametrize("row", [(2, 0.0), (2, -1.0), (2, math.inf), (2, math.nan), (1, 1e-6)])
    def test_what_takes_no_time_is_refused(self, row):
        with pytest.raises(ValueError, match=f"mine: collectives of {row[0]} devices take .* s: must be above 0, of 2 devices"):
            hardware.Chip("mine", 1.0, 1.0, 1.0, 1.0, collectives=Collectives((row,), "", ""))

    def test_a_chip_of_which_nothing_is_known_says_what_it_needs(self):
        mine = hardware.Chip("mine", 1.0, 1.0, 1.0, 1.0)
        assert mine.collective_seconds(1) == 0
        with pytest.raises(ValueError, match=r"'mine' has no seconds per collective \(hardware.Collectives\), needed for 4"):
            mine.collective_seconds(4)


SHARES = ("matmul", "attention", "weights_bandwidth", "cache_bandwidth", "exchange")


class TestEfficiency:
    """What is fitted is tried where it is fitted; here: that each class has it, and what it may be."""

    def test_of_each_class_of_device_and_with_a_source(self):
        for chip in CHIPS.values():
            found = hardware.default_efficiency(chip)
            assert found.checked() is found
            assert not found.bound
            assert found._replace(matmul=1.0) == SERVED["gpu" if chip.gpu else "tpu"]._replace(matmul=1.0)
            assert "docs/" in found.source

    @pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float32", 16), ("float8", 8), ("int8", 8), ("float4", 4)])
    def test_products_reach_another_share_of_a_higher_peak(self, dtype, bits):
        assert hardware.default_efficiency(CHIPS["b200"], dtype).matmul == hardware.MATMUL["gpu"][bits]

    @pytest.mark.parametrize(("name", "dtype"), [("a100", "float8"), ("h100", "int4"), ("v4", "int8")])
    def test_of_what_is_computed_in_bfloat16_it_is_the_same(self, name, dtype):
        assert hardware.default_efficiency(CHIPS[name], dtype) == hardware.default_efficiency(CHIPS[name])

    def test_a_uniform_share_and_the_bound(self):
        assert Efficiency.uniform(0.4)[:6] == (0.4, 0.4, 0.4, 0.4, 0.0, 0.4)
        assert Efficiency.of_bound()[:6] == (1.0, 1.0, 1.0, 1.0, 0.0, 1.0)
        assert Efficiency.of_bound().bound

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            *((name, value, "a share above 0 and at most 1") for name in SHARES for value in (0.0, 1.01, math.nan)),
            *(("layer_seconds", value, "seconds of at least 0") for value in (-1e-6, math.inf, math.nan)),
        ],
    )
    def test_what_is_no_share_is_refused(self, name, value, message):
        with pytest.raises(ValueError, match=f"efficiency: {name} = {value}: {message}"):
            Efficiency.uniform(0.5)._replace(**{name: value}).checked()

    def test_training_reaches_a_share_of_its_own(self):
        assert hardware.trained_mfu(CHIPS["h100"]) == TRAINED["gpu"]
        assert hardware.trained_mfu(CHIPS["v6e"]) == TRAINED["tpu"]
        assert all(0 < share < 1 for share in TRAINED.values())


def test_every_price_says_whose_where_and_when():
    for chip in CHIPS.values():
        assert chip.price is chip.prices[0]
        assert not chip.price.spot
        for price in chip.prices:
            assert 0.1 < price.usd_per_hour < 20
            assert price.product.startswith(price.vendor)
            assert price.region
            assert price.source.startswith("https://")
            datetime.date.fromisoformat(price.date if price.date.count("-") == 2 else f"{price.date}-01")
        assert len({price.origin for price in chip.prices}) == len(chip.prices)  # it tells them apart


def test_prices_that_are_taken_where_none_is_asked_for():
    assert {name: round(chip.price.usd_per_hour, 4) for name, chip in CHIPS.items()} == {
        "v4": 3.22, "v5e": 1.2, "v5p": 4.2, "v6e": 2.7,
        "h200": 10.4365, "h100": 10.9791, "a100": 5.0688, "b200": 6.69, "l4": 0.7068,
    }  # fmt: skip


def test_spot_is_below_on_demand():
    for chip in CHIPS.values():
        for spot in (price for price in chip.prices if price.spot):
            (usual,) = (row for row in chip.prices if not row.spot and (row.product, row.region) == (spot.product, spot.region))
            assert spot.usd_per_hour < usual.usd_per_hour


def test_the_origin_of_a_price_has_the_product_where_it_is_needed():
    v5e, h100 = CHIPS["v5e"].prices, CHIPS["h100"].prices
    assert [price.origin for price in v5e[:2]] == [
        "Google Cloud, us-central1, 2026-11",
        "Google Cloud, us-central1, spot, 2026-11",
    ]
    assert h100[2].origin == "Lambda 8x H100 SXM, any region, 2026-09-20"
    assert hardware.Price(2.0, "Lambda", "Lambda 8x H100 SXM").origin == "Lambda"  # of no list here


@pytest.mark.parametrize("usd", [0, -1.0, float("nan"), float("inf")])
def test_what_is_no_price_of_a_chip_is_refused(usd):
    with pytest.raises(ValueError, match=r"v5e: usd_per_hour = .*: must be US dollars, a number above 0"):
        dataclasses.replace(CHIPS["v5e"], prices=(hardware.Price(usd, "A Vendor"),))


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
    code = "import sys, gqa_jax.hardware, gqa_jax.hardware.prices; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
