from gqa_jax import devices


def test_peaks_are_found_by_the_names_that_jax_gives():
    kinds = {
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
    }
    assert {kind: devices.peak_flops(kind) for kind in kinds} == kinds
    assert devices.peak_flops("cpu") is None
