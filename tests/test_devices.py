import pytest

from gqa_jax import devices
from gqa_jax.devices import CHIPS, GIB


def test_peaks_are_found_by_the_names_that_jax_gives():
    kinds = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA L4": 121e12,
    }
    assert {kind: devices.peak_flops(kind) for kind in kinds} == kinds
    assert devices.peak_flops("cpu") is None


def test_a_name_that_contains_another_is_not_taken_for_it():
    assert devices.chip_of("NVIDIA L40S") is None
    assert devices.chip_of("NVIDIA H2000") is None
    assert devices.chip_of("TPU v5 lite").name == "v5e"


def test_a_smaller_board_of_a_chip_has_less_memory():
    assert devices.chip_of("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9 * devices.ALLOCATOR_FRACTION
    assert devices.chip_of("NVIDIA A100-SXM4-80GB") == CHIPS["a100"]


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
    assert CHIPS["h200"].attention_shares(64) == (1.0, 1.0)


def test_memory_is_what_a_program_may_use():
    assert CHIPS["v5e"].memory_bytes == 15.75 * GIB
    assert CHIPS["h200"].memory_bytes == pytest.approx(0.75 * 141e9)
