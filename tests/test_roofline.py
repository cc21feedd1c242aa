import dataclasses
import json

import numpy as np
import pytest

from gqa_jax import costs
from gqa_jax.hardware import CHIPS, Chip
from gqa_jax.search.roofline import Serving

OWN = Chip("mine", peak_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e9, interconnect=1e9)
T = 131_072
LLAMA = costs.Shape(36, 1536, 32, 8, d_ff=4096)  # 1.2B of the paper's Table 5
FEW = costs.Shape(36, 2048, 8, 1, d_ff=5472)  # its 1.8B with (8,1)


def of_size(shape, n_params):
    """`shape` with a feed-forward width that makes it exactly as large as its name says."""
    count = costs.count_params(shape)
    return dataclasses.replace(shape, d_ff=shape.d_ff * (n_params - count.total + count.ffn) / count.ffn)


@pytest.mark.parametrize(("shape", "n_params", "rate"), [(LLAMA, 1.2e9, 398), (FEW, 1.8e9, 998)])
def test_decode_bounds_of_the_models_of_table_5(shape, n_params, rate):
    """At 128K, one sequence, bfloat16, an H200 gives at most 398 and 998 tokens a second: it reads parameters and cache."""
    step = Serving("h200").decode_step(of_size(shape, n_params), T)
    assert 1 / step.seconds == pytest.approx(rate, abs=0.5)
    assert step.limit == "memory"


def test_a_decode_step_reads_parameters_once_and_every_cache():
    serving = Serving("v5e", batch=16, param_dtype="int8", cache_dtype="int4", efficiency=0.5)
    step = serving.decode_step(FEW, T)
    cache = 2 * 36 * 64 * T
    assert step.memory == pytest.approx((costs.count_params(FEW).total + 16 * 0.5 * cache) / (0.5 * 819e9))
    assert step.compute == pytest.approx(16 * costs.forward_flops(FEW, T).total / (0.5 * 197e12))
    assert step.exchange == 0


def test_prefill_is_compute_with_half_the_scores_and_no_logits():
    prefill = Serving("h100").prefill(LLAMA, T)
    matrices = 2 * 36 * (2 * 1536 * 64 * 40 + 3 * 1536 * 4096)
    assert prefill.compute == pytest.approx(T * (matrices + 4 * 36 * 32 * 64 * T / 2) / 989e12)
    assert prefill.limit == "compute"
    assert prefill.seconds == prefill.compute > 500 * prefill.memory


def test_large_batches_are_limited_by_compute_at_short_contexts():
    steps = [Serving("h200", batch=batch).decode_step(FEW, 128) for batch in (1, 4096)]
    assert [str(step.limit) for step in steps] == ["memory", "compute"]


def test_several_devices_share_work_and_exchange_the_residual_stream():
    one, four = Serving("v5e", batch=8), Serving("v5e", batch=8, n_devices=4)
    for phase in ("prefill", "decode_step"):
        alone, shared = (getattr(serving, phase)(FEW, T) for serving in (one, four))
        assert shared.compute == pytest.approx(alone.compute / 4)
        assert shared.memory == pytest.approx(alone.memory / 4)
    # two all-reduces a layer, around a ring: each device sends 2 x 3/4 of 8 x 2048 values of two bytes
    assert four.decode_step(FEW, T).exchange == pytest.approx(36 * 2 * 2 * 0.75 * 8 * 2048 * 2 / 200e9)
    assert four.prefill(FEW, 1000).exchange == pytest.approx(1000 * four.decode_step(FEW, T).exchange)


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_request_is_its_prefill_and_the_sum_of_its_steps(batch, share):
    """One step at the mean number of keys stands for all: exact while one limit holds, else a little below the sum."""
    serving, context = Serving("h200", batch=batch, decode_share=share), 4000
    prompt = round((1 - share) * context)
    steps = serving.decode_step(FEW, np.arange(prompt, context) + 0.5)
    total = steps.seconds.sum() + (serving.prefill(FEW, prompt).seconds if prompt else 0)
    seconds = serving.request_seconds(FEW, context)
    if len(set(steps.limit)) == 1:
        assert seconds == pytest.approx(total, rel=1e-12)
    else:
        assert 0.95 * total < seconds < total


def test_the_sum_of_steps_above_does_change_its_limit_somewhere():
    limits = Serving("h200", batch=512).decode_step(FEW, np.arange(4000)).limit
    assert set(limits) == {"compute", "memory"}


def test_prefill_only_and_generation_only():
    context = 8192
    only = Serving("h200", decode_share=0)
    assert only.request_seconds(FEW, context) == only.prefill(FEW, context).seconds
    none = Serving("h200", decode_share=1)
    assert none.request_seconds(FEW, context) == pytest.approx(context * none.decode_step(FEW, context / 2).seconds)


def test_throughput_and_price_are_one_number():
    serving = Serving("v6e", n_devices=2, batch=8)
    seconds, rate = serving.request_seconds(FEW, T), serving.throughput(FEW, T)
    assert rate == pytest.approx(8 * T / seconds / 2)
    assert serving.usd_per_million_tokens(FEW, T) == pytest.approx(1e6 / rate * CHIPS["v6e"].price.usd_per_hour / 3600)
    assert dataclasses.replace(serving, usd_per_hour=1.0).usd_per_million_tokens(FEW, T) == pytest.approx(1e6 / rate / 3600)


def test_memory_says_what_fits():
    serving = Serving("v5e", batch=4)
    parameters, cache = 2 * costs.count_params(LLAMA).total, 2 * 2 * 36 * 64 * 8 * T
    assert serving.memory_bytes(LLAMA, T) == parameters + 4 * cache
    assert not serving.fits(LLAMA, T)
    assert serving.fits(FEW, T)
    np.testing.assert_array_equal(serving.fits(LLAMA, np.array([8192, T])), [True, False])
    for n_devices, batch in ((1, 1), (4, 6)):
        several = Serving("v5e", n_devices=n_devices)
        assert several.largest_batch(LLAMA, T) == batch
        assert dataclasses.replace(several, batch=batch).fits(LLAMA, T)
        assert not dataclasses.replace(several, batch=batch + 1).fits(LLAMA, T)
    assert Serving("v5e").largest_batch(dataclasses.replace(LLAMA, n_layers=600), T) == 0


@pytest.mark.parametrize("n_devices", [1, 4])
def test_arrays_of_shapes_and_contexts_broadcast_and_sizes_that_no_model_has_pass(n_devices):
    shape = costs.Shape(np.array([36, np.inf, np.nan]), np.array([2048, np.inf, np.nan]), 8, 1)
    contexts = np.array([[8192], [T]])
    serving = Serving("h200", n_devices=n_devices, batch=8)
    one = dataclasses.replace(FEW, d_ff=8 * 2048 / 3)
    for cost in (serving.request_seconds, serving.seconds_per_token, serving.usd_per_million_tokens, serving.memory_bytes):
        many = cost(shape, contexts)
        assert many.shape == (2, 3)
        assert many[1, 0] == pytest.approx(cost(one, T), rel=1e-14)
        assert (many[:, 1] == np.inf).all()
        assert np.isnan(many[:, 2]).all()
    np.testing.assert_array_equal(serving.fits(shape, contexts)[0], [True, False, False])
    np.testing.assert_array_equal(serving.largest_batch(shape, T)[1:], [0, 0])
    np.testing.assert_array_equal(serving.decode_step(shape, T).limit, ["memory", "", ""])
    assert serving.throughput(shape, T)[1] == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device", "H200", "device 'H200' is unknown: did you mean 'h200'"),
        ("device", "gpu", "device 'gpu' is unknown: allowed: v4, v5e"),
        ("n_devices", 0, "n_devices = 0: must be an integer of at least 1"),
        ("n_devices", 1.5, "n_devices = 1.5"),
        ("batch", 0, "batch = 0: must be a number of sequences, at least 1"),
        ("batch", float("nan"), "batch = nan"),
        ("decode_share", 1.1, "decode_share = 1.1: from 0"),
        ("param_dtype", "int3", "dtype 'int3' is unknown here: use float32"),
        ("cache_dtype", "fp8", "dtype 'fp8' is unknown here"),
        ("efficiency", 0, "efficiency = 0: the share of the peaks"),
        ("efficiency", 1.5, "efficiency = 1.5"),
        ("usd_per_hour", -1, "usd_per_hour = -1: must be US dollars"),
        ("device", OWN, "'mine' has no list price: give usd_per_hour"),
    ],
)
def test_what_can_not_serve_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Serving(**({"device": "h200"} | {field: value}))


def test_every_device_has_a_price_and_describes_itself_in_json():
    for name, chip in CHIPS.items():
        found = json.loads(json.dumps(Serving(name).describe()))
        assert found["usd_per_hour"] == chip.price.usd_per_hour
        assert chip.price.date in found["price"]
        assert (found["peak_flops"], found["memory_bandwidth"]) == (chip.peak_flops, chip.memory_bandwidth)
    assert Serving("h200", usd_per_hour=2.0).describe()["price"] == "as given"


def test_a_device_of_your_own():
    mine = dataclasses.replace(CHIPS["h200"], name="mine", memory_bandwidth=4e12, prices=())
    ratio = Serving(mine, usd_per_hour=2).decode_step(FEW, T).seconds / Serving("h200").decode_step(FEW, T).seconds
    assert ratio == pytest.approx(4.8 / 4)
