"""Formulas of `gqa_jax.search.roofline` by hand and by simulation; what is chosen, refused and said of what can't be served."""

import dataclasses
import json
import math
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gqa_jax import costs
from gqa_jax.hardware import CHIPS, Chip, Collectives, Efficiency
from gqa_jax.search.device_file import read_efficiency
from gqa_jax.search.roofline import (
    UNSUPPORTED,
    Layout,
    RooflineServing,
    cache_value_bytes,
    kv_heads_held,
    layouts,
    replication_cost,
    unsupported_reason,
)

T = 131_072
LLAMA = costs.Shape(36, 1536, 32, 8, d_ff=4096)  # 1.2B of the paper's Table 5
FEW = costs.Shape(36, 2048, 8, 1, d_ff=5472)  # its 1.8B with (8,1)

# A FLOP, a byte of memory and a byte of links take one second each: seconds of a phase are what the formulas count.
WAITS = {2: 1.0, 4: 10.0, 8: 100.0}
UNIT = Chip(
    "unit", peak_flops=1.0, memory_bytes=1e12, memory_bandwidth=1.0, interconnect=1.0,
    collectives=Collectives(tuple(WAITS.items()), "", ""),
)  # fmt: skip
# L = 2, d = 8, n_h = 8, n_kv = 2, d_h = 4, F = 16, V = 32: 3 L d F = 768, V d = 256, 2 L d d_h n_h = 1024, 128 of a key/value
# head, (2 L + 1) d = 40 parameters. Served 12 at once, 100 keys seen, prompts of 40 tokens.
SMALL = costs.Shape(2, 8, 8, 2, head_dim=4, d_ff=16, vocab_size=32)
BATCH, KEYS, PROMPT = 12, 100, 40
LAYOUTS = {"heads": Layout(8), "sequences": Layout(1, 8, 1), "context": Layout(1, 1, 8), "mixed": Layout(2, 2, 2)}


def unit(n_devices=8, **settings):
    return RooflineServing(UNIT, n_devices, **({"batch": BATCH, "efficiency": 1.0, "usd_per_hour": 3.6} | settings))


#: Of comparisons that turn on them: the defaults of `hardware` follow what is measured.
TYPICAL = Efficiency(0.6, 0.9, 0.8, 0.7, 2e-5, 0.5)


def server(*args, **settings):
    return RooflineServing(*args, **({"efficiency": TYPICAL} | settings))


def each_layout(**expected):
    """A test with an expected number for each kind of layout of 8 devices."""
    assert list(expected) == list(LAYOUTS)
    return pytest.mark.parametrize(
        ("layout", "expected"), [(LAYOUTS[name], value) for name, value in expected.items()], ids=list(expected)
    )


def of_size(shape, n_params):
    """`shape` with a feed-forward width that makes it exactly as large as its name says."""
    count = costs.count_params(shape)
    return dataclasses.replace(shape, d_ff=shape.d_ff * (n_params - count.total + count.ffn) / count.ffn)


class TestDecodeStep:
    """Sequences of a group: 12, ceil(12/8) = 2, 12 and 12/2 = 6; key/value heads held: 1 (8 devices hold 2), 2, 2, 1."""

    @each_layout(
        heads=2 * ((768 + 256) / 8 + 1024 / 8 + 128 * 1 + 40),
        sequences=2 * ((768 + 256) / 8 + 1024 + 128 * 2 + 40),
        context=2 * ((768 + 256) / 8 + 1024 / 8 + 128 * 2 + 40),
        mixed=2 * ((768 + 256) / 8 + 1024 / 4 + 128 * 1 + 40),
    )
    def test_parameters_read(self, layout, expected):
        assert unit().decode_step(SMALL, KEYS, layout).weights == expected

    @each_layout(
        heads=12 * (2 * 2 * 4 * 1 * 2 * 100),
        sequences=2 * (2 * 2 * 4 * 2 * 2 * 100),
        context=12 * (2 * 2 * 4 * 2 * 2 * 100 / 8),
        mixed=6 * (2 * 2 * 4 * 1 * 2 * 100 / 2),
    )
    def test_cache_read(self, layout, expected):
        assert unit().decode_step(SMALL, KEYS, layout).cache == expected

    @each_layout(
        heads=12 * 2 * (768 + 256) / 8 + 12 * 2 * (1024 / 8 + 128 * 1),
        sequences=12 * 2 * (768 + 256) / 8 + 2 * 2 * (1024 + 128 * 2),
        context=12 * 2 * (768 + 256) / 8 + 12 * 2 * (1024 / 8 + 128 * 2),
        mixed=12 * 2 * (768 + 256) / 8 + 6 * 2 * (1024 / 4 + 128 * 1),
    )
    def test_flops_of_matrices(self, layout, expected):
        assert unit().decode_step(SMALL, KEYS, layout).matmul == expected

    @each_layout(
        heads=12 * 4 * 2 * 4 * (8 / 8) * 100,
        sequences=2 * 4 * 2 * 4 * 8 * 100,
        context=12 * 4 * 2 * 4 * 8 * 100 / 8,
        mixed=6 * 4 * 2 * 4 * (8 / 2) * 100 / 2,
    )
    def test_flops_of_attention(self, layout, expected):
        assert unit().decode_step(SMALL, KEYS, layout).attention == expected

    @each_layout(
        heads=2 * 2 * 2 * 8 * (7 / 8 * 12 + 7 / 8 * 12) + 2 * (100 + 100) + 100,
        sequences=2 * 2 * 2 * 8 * (7 / 8 * 12) + 2 * 100 + 100,
        context=2 * 2 * 2 * 8 * (7 / 8 * 12 + 7 / 8 * 12) + 7 / 8 * 2 * 12 * 8 * (2 * 2 * 4 + 4) + 2 * (100 + 100 + 100) + 100,
        mixed=2 * 2 * 2 * 8 * (7 / 8 * 12 + 3 / 4 * 6) + 1 / 2 * 2 * 6 * (8 / 2) * (2 * 2 * 4 + 4) + 2 * (10 + 100 + 1) + 100,
    )
    def test_exchanges(self, layout, expected):
        assert unit().decode_step(SMALL, KEYS, layout).exchange == expected

    def test_one_device_exchanges_nothing(self):
        assert unit(1).decode_step(SMALL, KEYS).exchange == 0

    @pytest.mark.parametrize("n_devices", [2, 4, 8])
    def test_tensor_parallelism_waits_for_two_all_reduces_a_layer_and_one_for_the_logits(self, n_devices):
        """Also in the bound: no overlap shortens what a request of one token has to wait for one after another."""
        step = unit(n_devices, efficiency="bound").decode_step(SMALL, KEYS, batch=0)
        assert step.exchange == 2 * 2 * WAITS[n_devices] + WAITS[n_devices]

    def test_only_what_a_group_has_grows_with_a_sequence_of_its_own(self):
        """9 requests in 8 groups are as much to attend to as 16: one group has 2."""
        nine, sixteen = (unit().decode_step(SMALL, KEYS, LAYOUTS["sequences"], batch) for batch in (9, 16))
        assert (nine.cache, nine.attention) == (sixteen.cache, sixteen.attention)
        assert nine.matmul < sixteen.matmul


class TestPrefill:
    """Prompts at once: 1, 8, 1, 2, of 40 tokens."""

    @each_layout(
        heads=2 * (768 / 8 + 1024 / 8 + 128 * 1 + 40),
        sequences=2 * (768 / 8 + 1024 + 128 * 2 + 40),
        context=2 * (768 / 8 + 1024 + 128 * 2 + 40),  # those of queries and output are gathered over the context, and read
        mixed=2 * (768 / 8 + 1024 / 2 + 128 * 1 + 40),
    )
    def test_parameters_read_without_those_of_logits(self, layout, expected):
        assert unit().prefill(SMALL, PROMPT, layout).weights == expected

    @each_layout(
        heads=2 * 2 * 4 * 1 * 2 * 40, sequences=2 * 2 * 4 * 2 * 2 * 40, context=2 * 2 * 4 * 2 * 2 * 40 / 8,
        mixed=2 * 2 * 4 * 1 * 2 * 40 / 2,
    )  # fmt: skip
    def test_cache_written(self, layout, expected):
        assert unit().prefill(SMALL, PROMPT, layout).cache == expected

    @each_layout(
        heads=40 * 2 * (768 / 8 + 1024 / 8 + 128 * 1),
        sequences=40 * 2 * (8 * 768 / 8 + 1024 + 128 * 2),
        context=40 * 2 * (768 / 8 + 1024 / 8 + 128 * 2 / 8),
        mixed=40 * 2 * (2 * 768 / 8 + 1024 / 4 + 128 * 1 / 2),
    )
    def test_flops_of_matrices(self, layout, expected):
        assert unit().prefill(SMALL, PROMPT, layout).matmul == expected

    @each_layout(
        heads=4 * 2 * 4 * (8 / 8) * 40 * 20, sequences=4 * 2 * 4 * 8 * 40 * 20, context=4 * 2 * 4 * 8 * 40 * 20 / 8,
        mixed=4 * 2 * 4 * (8 / 2) * 40 * 20 / 2,
    )  # fmt: skip
    def test_flops_of_causal_attention(self, layout, expected):
        assert unit().prefill(SMALL, PROMPT, layout).attention == expected

    @each_layout(
        heads=2 * 2 * 2 * 8 * (7 / 8 * 40 + 7 / 8 * 40) + 2 * (100 + 100),
        sequences=2 * 2 * 2 * 8 * (7 / 8 * 8 * 40) + 2 * 100,
        context=2 * 2 * 2 * 8 * (7 / 8 * 40) + 2 * 7 / 8 * (2 * 2 * 4 * 2 * 40 + 2 * 512) + 2 * (100 + 100),
        mixed=2 * 2 * 2 * 8 * (7 / 8 * 2 * 40 + 1 / 2 * 40 / 2)
        + 2 * 1 / 2 * (2 * 2 * 4 * 1 * 40 + 2 * 256)
        + 2 * (1 + 100 + 1),
    )
    def test_exchanges(self, layout, expected):
        assert unit().prefill(SMALL, PROMPT, layout).exchange == expected


class TestSeconds:
    REACHED = Efficiency(0.5, 0.25, 0.2, 0.1, 7.0, 0.8)

    def test_each_part_has_its_own_efficiency(self):
        peak, reached = (unit(efficiency=one).decode_step(SMALL, KEYS) for one in (1.0, self.REACHED))
        shares = [0.5, 0.25, 0.2, 0.1, 0.8]
        assert list(reached[:5]) == pytest.approx([part / share for part, share in zip(peak, shares, strict=False)])
        assert (peak.layers, reached.layers) == (0, 2 * 7.0)

    def test_parts_of_the_expectation_add(self):
        step = unit(efficiency=self.REACHED).decode_step(SMALL, KEYS)
        assert step.seconds == pytest.approx(sum(step[:-1]))

    def test_parts_of_the_bound_overlap(self):
        step = unit(efficiency="bound").decode_step(SMALL, KEYS)
        assert step.seconds == max(step.matmul + step.attention, step.weights + step.cache, step.exchange)

    def test_a_share_is_that_of_every_peak(self):
        half, whole = (unit(efficiency=share).decode_step(SMALL, KEYS).seconds for share in (0.5, 1.0))
        assert half == pytest.approx(2 * whole)

    def test_attention_reaches_what_kernels_reach_at_the_head_size_but_not_in_the_bound(self):
        chip = dataclasses.replace(UNIT, attention_share=((8, 0.5, 0.4),))  # heads of 4 fill half of it
        found = [RooflineServing(chip, efficiency=one).prefill(SMALL, PROMPT).attention for one in (1.0, "bound")]
        assert found[0] == 4 * found[1]

    @pytest.mark.parametrize(("dtype", "faster"), [("float8", 1979 / 989), ("int8", 1979 / 989), ("int4", 1)])
    def test_narrow_parameters_are_multiplied_at_their_own_peak(self, dtype, faster):
        """And keys and values at that of bfloat16."""
        wide, narrow = (
            RooflineServing("h100", param_dtype=one, efficiency=0.5).prefill(LLAMA, 1000) for one in ("bfloat16", dtype)
        )
        assert narrow.matmul == pytest.approx(wide.matmul / faster)
        assert narrow.attention == wide.attention

    def test_the_limit_is_what_most_of_a_phase_goes_to(self):
        bound = RooflineServing("h200", efficiency="bound")
        phases = [bound.prefill(LLAMA, T), bound.decode_step(LLAMA, 1, batch=4096), bound.decode_step(LLAMA, T, batch=1)]
        phases += [bound.decode_step(LLAMA, 1), server("v5e", 256).decode_step(dataclasses.replace(LLAMA, n_heads=256), 1)]
        phases += [server("h200", efficiency=TYPICAL._replace(layer_seconds=1.0)).decode_step(LLAMA, 1)]
        assert [str(phase.limit) for phase in phases] == ["attention", "matmul", "cache", "weights", "exchange", "layers"]

    @pytest.mark.parametrize("efficiency", [None, 0.3, 1.0, REACHED])
    @pytest.mark.parametrize("n_devices", [1, 4])
    @pytest.mark.parametrize("by", ["price", "latency"])
    def test_no_expectation_is_below_the_bound(self, efficiency, n_devices, by):
        shape = costs.Shape(np.array([4, 36, 80]), np.array([256, 2048, 8192]), np.array([4, 32, 64]), np.array([1, 8, 8]))
        for device in ("h100", "v5e"):
            for share in (0.0, 0.1, 1.0):
                loads = [
                    RooflineServing(device, n_devices, efficiency=one, decode_share=share).load(
                        shape, np.array([[1024], [T]]), by
                    )
                    for one in ("bound", efficiency)
                ]
                bound, expected = (load.request if by == "latency" else load.token_seconds for load in loads)
                possible = loads[0].possible & loads[1].possible
                assert possible.any()
                assert (bound <= expected)[possible].all()


class TestKnownModels:
    @pytest.mark.parametrize(("shape", "n_params", "rate"), [(LLAMA, 1.2e9, 398), (FEW, 1.8e9, 998)])
    def test_decode_bounds_of_the_models_of_table_5(self, shape, n_params, rate):
        """At 128K, one sequence, bfloat16, an H200 gives at most 398 and 998 tokens a second: it reads parameters and cache."""
        step = RooflineServing("h200", batch=1, efficiency="bound").decode_step(of_size(shape, n_params), T)
        assert 1 / step.seconds == pytest.approx(rate, abs=0.5)

    def test_llama_3_8b(self):
        """128 KiB of cache a token; of 8.03e9 parameters a step reads all but the embedding: 15 GB at 3.35 TB/s."""
        shape = costs.Shape(32, 4096, 32, 8, head_dim=128, d_ff=14_336, vocab_size=128_256)
        serving = RooflineServing("h100", batch=1, untied=True, efficiency="bound")
        step = serving.decode_step(shape, 0)
        assert step.seconds == step.weights == pytest.approx(2 * (8_030_261_248 - 128_256 * 4096) / 3.35e12)
        assert serving.memory_bytes(shape, 8192) == 2 * 8_030_261_248 + 8192 * 131_072

    @pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
    def test_a_request_is_its_prefill_and_the_sum_of_its_steps(self, share):
        """One step at the mean number of keys stands for all: parts grow along straight lines."""
        serving, context = RooflineServing("h200", batch=1, decode_share=share), 4000
        prompt = round((1 - share) * context)
        steps = serving.decode_step(FEW, np.arange(prompt, context) + 0.5).seconds.sum()
        first = serving.prefill(FEW, prompt).seconds if prompt else 0
        assert serving.request_seconds(FEW, context) == pytest.approx(first + steps)


class TestKeyValueHeads:
    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @hypothesis.given(st.integers(1, 24), st.integers(1, 24), st.data())
    def test_are_those_of_the_query_heads_of_the_device_that_needs_most(self, n_kv_heads, group, data):
        n_heads = n_kv_heads * group
        over = data.draw(st.sampled_from([t for t in range(1, n_heads + 1) if n_heads % t == 0]))
        own = n_heads // over
        listed = max(len({head // group for head in range(i * own, (i + 1) * own)}) for i in range(over))
        assert kv_heads_held(n_heads, n_kv_heads, over) == listed

    def test_of_heads_that_are_no_whole_numbers(self):
        assert kv_heads_held(37.5, 8, 4) == 2
        assert kv_heads_held(37.5, 8, 16) == 1
        assert kv_heads_held(np.array([np.inf, np.nan]), 8, 4).tolist() == [2, 2]

    def test_arrays_of_heads_and_devices_broadcast(self):
        np.testing.assert_array_equal(kv_heads_held(32, np.array([8, 1]), np.array([[2], [16]])), [[4, 1], [1, 1]])


class TestMemory:
    @each_layout(
        heads=2 * ((768 + 256) / 8 + 1024 / 8 + 128 * 1 + 40) + 12 * 2 * 2 * 4 * 1 * 2 * 50,
        sequences=2 * ((768 + 256) / 8 + 1024 + 128 * 2 + 40) + 2 * 2 * 2 * 4 * 2 * 2 * 50,
        context=2 * ((768 + 256) / 8 + 1024 / 8 + 128 * 2 + 40) + 12 * 2 * 2 * 4 * 2 * 2 * 50 / 8,
        mixed=2 * ((768 + 256) / 8 + 1024 / 4 + 128 * 1 + 40) + 6 * 2 * 2 * 4 * 1 * 2 * 50 / 2,
    )
    def test_parameters_and_caches_of_the_fullest_device(self, layout, expected):
        assert unit(parallelism=layout).memory_bytes(SMALL, 50) == unit()._load(SMALL, 50, layout, "price").memory == expected

    def test_an_untied_head_is_held_and_the_embedding_is_not_read(self):
        tied, untied = unit(), unit(untied=True)
        assert untied.memory_bytes(SMALL, 50) - tied.memory_bytes(SMALL, 50) == 2 * 256 / 8
        assert untied.decode_step(SMALL, KEYS) == tied.decode_step(SMALL, KEYS)

    def test_a_head_that_the_shape_has_is_held_once_whoever_says_it(self):
        own, said = dataclasses.replace(SMALL, untied=True), unit(untied=True)
        for serving in (unit(), said):
            assert serving.memory_bytes(own, 50) == said.memory_bytes(SMALL, 50)
            assert serving.decode_step(own, KEYS) == unit().decode_step(SMALL, KEYS)

    @pytest.mark.parametrize(
        ("dtype", "bits"),
        [("bfloat16", 16), ("float8", 8), ("int8", 8 + 16 / 64), ("int4", 4 + 16 / 32), ("float4", 4 + 8 / 16)],
    )
    def test_a_cached_value_has_its_share_of_a_scale(self, dtype, bits):
        assert cache_value_bytes(dtype, 64) == bits / 8
        caches = [
            RooflineServing("h200", cache_dtype=one, efficiency=1.0).decode_step(LLAMA, T).cache for one in ("bfloat16", dtype)
        ]
        assert caches[1] / caches[0] == pytest.approx(bits / 16)

    def test_of_several_layouts_it_is_the_least(self):
        found = unit(parallelism="best")
        assert found.memory_bytes(SMALL, 50) == min(found.memory_bytes(SMALL, 50, layout=one) for one in layouts(8))

    @pytest.mark.parametrize("parallelism", ["best", Layout(1, 4, 1)])
    def test_an_open_batch_is_one_request_for_each_group(self, parallelism):
        serving = RooflineServing("h200", 4, parallelism, batch="best")
        assert serving.memory_bytes(FEW, T) == serving.memory_bytes(FEW, T, batch=4 if parallelism != "best" else 1)
        assert serving.fits(FEW, T)

    def test_it_fits_what_a_server_fills_of_a_device(self):
        needed = RooflineServing(UNIT, batch=4).memory_bytes(SMALL, 50)
        for memory, fits in ((needed / 0.9 * 1.0001, True), (needed / 0.9 * 0.9999, False)):
            assert RooflineServing(dataclasses.replace(UNIT, memory_bytes=memory), batch=4).fits(SMALL, 50) == fits

    @each_layout(heads=None, sequences=None, context=None, mixed=None)
    def test_the_largest_batch_fits_and_one_more_does_not(self, layout, expected):
        serving = RooflineServing("v5e", 8, layout, batch="fits")
        most = serving.largest_batch(LLAMA, T)
        assert most == serving.load(LLAMA, T).batch > 0
        room = serving.chip.server_bytes
        assert serving.memory_bytes(LLAMA, T, batch=most) <= room < serving.memory_bytes(LLAMA, T, batch=most + 1)

    def test_of_several_layouts_the_largest_batch_is_that_which_holds_most(self):
        found = [RooflineServing("v5e", 8, one).largest_batch(LLAMA, T) for one in layouts(8)]
        assert RooflineServing("v5e", 8).largest_batch(LLAMA, T) == max(found) > min(found)

    def test_nothing_is_served_where_not_even_one_fits(self):
        assert RooflineServing("v5e").largest_batch(dataclasses.replace(LLAMA, n_layers=600), T) == 0


def simulated(serving, shape, context, layout, batch, rounds=4):
    """A server at work, event by event: seconds per generated token of each request, and device-seconds per token of all.

    Every slot serves `rounds` requests; the first are left out of what is returned. Groups do the same. A slot whose
    request has ended gets the next prompt at once; while one is read nothing is generated.
    """
    slots = batch // layout.sequences
    generated = round(serving.decode_share * context)
    prompt = context - generated
    done = [slot * generated // slots for slot in range(slots)]  # generated tokens: requests of all ages
    began, clock, ended, waits = [0.0] * slots, 0.0, [], []
    while len(ended) < rounds * slots:
        if (free := next((slot for slot in range(slots) if done[slot] == generated), None)) is not None:
            clock += serving.prefill(shape, prompt, layout).seconds
            done[free], began[free] = 0, clock
            continue
        seen = prompt + np.mean(done) + 0.5
        clock += serving.decode_step(shape, seen, layout, batch).seconds
        for slot in range(slots):
            done[slot] += 1
            if done[slot] == generated:
                waits.append((clock - began[slot]) / generated)
                ended.append(clock)
    seconds = ended[-1] - ended[-1 - slots]  # in which every slot serves one request
    return waits[slots:], serving.n_devices * seconds / (batch * context)


class TestLoad:
    @pytest.mark.parametrize("layout", [Layout(4), Layout(1, 4, 1), Layout(1, 1, 4), Layout(2, 2, 1)])
    @pytest.mark.parametrize(("slots", "share"), [(1, 0.1), (5, 0.1), (8, 0.5)])
    def test_a_server_in_its_steady_state(self, layout, slots, share):
        batch = slots * layout.sequences
        serving = RooflineServing("h100", 4, layout, batch, share)
        waits, token_seconds = simulated(serving, FEW, 4000, layout, batch)
        load = serving.load(FEW, 4000)
        assert waits == pytest.approx([load.tpot] * len(waits), rel=1e-9)
        assert load.token_seconds == pytest.approx(token_seconds, rel=1e-9)

    def test_times_of_a_request(self):
        serving = unit(4, parallelism=Layout(2, 2, 1), batch=6, decode_share=0.25)
        load, first, step = serving.load(SMALL, 80), *_phases(serving, SMALL, 80)
        assert load.ttft == first
        assert load.tpot == step + (3 - 1) * first / 20
        assert load.request == load.ttft + 20 * load.tpot

    def test_device_seconds_of_tokens(self):
        serving = unit(4, parallelism=Layout(2, 2, 1), batch=6, decode_share=0.25)
        load, first, step = serving.load(SMALL, 80), *_phases(serving, SMALL, 80)
        assert load.input_seconds == pytest.approx(4 * 3 * first / (6 * 60))
        assert load.output_seconds == pytest.approx(4 * step / 6)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
    @pytest.mark.parametrize("batch", [1, 7, "fits"])
    def test_tokens_read_and_generated_add_up_to_a_request(self, share, batch):
        load = RooflineServing("h200", 2, "tensor", batch, share).load(FEW, T)
        total = (1 - share) * load.input_seconds + share * load.output_seconds
        assert load.token_seconds == pytest.approx(total)

    def test_nobody_waits_for_prompts_that_other_devices_read(self):
        together, apart = (RooflineServing("h200", 4, "tensor", 8, disaggregated=one) for one in (False, True))
        assert apart.load(FEW, T).tpot == _phases(apart, FEW, T)[1] < together.load(FEW, T).tpot
        assert apart.load(FEW, T).token_seconds == together.load(FEW, T).token_seconds

    def test_prefill_only(self):
        load = RooflineServing("h200", decode_share=0, batch=4).load(FEW, 8192)
        assert load.request == load.ttft == RooflineServing("h200").prefill(FEW, 8192).seconds
        assert np.isnan(load.tpot)
        assert np.isnan(load.output_seconds)
        assert load.token_seconds == pytest.approx(load.input_seconds)

    def test_generation_only(self):
        serving = RooflineServing("h200", decode_share=1, batch=4)
        load = serving.load(FEW, 8192)
        assert load.request == pytest.approx(8192 * serving.decode_step(FEW, 4096).seconds)
        assert np.isnan(load.ttft)
        assert np.isnan(load.input_seconds)
        assert load.token_seconds == pytest.approx(load.output_seconds)

    def test_throughput_and_price_are_one_number(self):
        serving = RooflineServing("v6e", 2, batch=8)
        seconds, rate = serving.load(FEW, T).token_seconds, 1 / serving.seconds_per_token(FEW, T)
        assert rate == pytest.approx(1 / seconds)
        assert serving.usd_per_million_tokens(FEW, T) == pytest.approx(1e6 * seconds * CHIPS["v6e"].price.usd_per_hour / 3600)


def _phases(serving, shape, context):
    """Seconds of a prefill and of a step at the mean number of keys."""
    layout, share = serving.layouts()[0], serving.decode_share
    return (
        serving.prefill(shape, (1 - share) * context, layout).seconds,
        serving.decode_step(shape, (1 - share / 2) * context, layout).seconds,
    )


MANY = costs.Shape(
    n_layers=np.array([36, 36, 24, 80]),
    d_model=np.array([1536, 2048, 2560, 8192]),
    n_heads=np.array([32, 8, 1, 64]),
    n_kv_heads=np.array([8, 1, 1, 8]),
)


class TestBestLayout:
    @pytest.mark.parametrize(("by", "field"), [("price", "token_seconds"), ("latency", "request")])
    def test_costs_the_least_of_all(self, by, field):
        serving = server("h100", 8)
        alone = [server("h100", 8, one).load(MANY, T, by) for one in layouts(8)]
        least = np.min([np.where(load.possible, getattr(load, field), np.inf) for load in alone], axis=0)
        best = serving.load(MANY, T, by)
        assert best.possible.all()
        np.testing.assert_array_equal(getattr(best, field), least)
        assert len(set(zip(*(axis.tolist() for axis in best.layout), strict=True))) > 1

    def test_may_differ_by_what_is_minimised(self):
        found = [server("h100", 8).load(LLAMA, T, by).layout for by in ("price", "latency")]
        assert found == [(1, 8, 1), (8, 1, 1)]

    @pytest.mark.parametrize("by", ["price", "latency"])
    def test_settled_for_each_shape_it_stays(self, by):
        serving = server("h100", 8)
        fixed = serving.settled(MANY, T, by)
        for name in ("request", "token_seconds", "batch"):
            np.testing.assert_array_equal(getattr(fixed.load(MANY, T, by), name), getattr(serving.load(MANY, T, by), name))
        larger = dataclasses.replace(MANY, n_layers=3 * MANY.n_layers)
        np.testing.assert_array_equal(fixed.load(larger, 1024, by).layout.heads, serving.load(MANY, T, by).layout.heads)

    def test_what_is_fixed_stays_as_it_is(self):
        for parallelism in ("tensor", Layout(2, 2, 2)):
            assert server("h100", 8, parallelism).settled(MANY, T).parallelism == parallelism

    def test_is_of_layouts_that_serve(self):
        """One query head is not divided over heads, and one request not over sequences."""
        shape = dataclasses.replace(FEW, n_heads=1)
        assert server("h100", 4, batch=1).load(shape, T).layout == (1, 1, 4)

    @pytest.mark.parametrize(
        ("kind", "limit"), [("tpot", {"tpot": 1e-6}), ("ttft", {"ttft": 1e-6}), ("memory", {"batch": 4000})]
    )
    def test_is_the_nearest_to_be_possible_where_none_is(self, kind, limit):
        """One query head: tensor parallelism does not come far."""
        serving, shape = server("h100", 8, **limit), dataclasses.replace(FEW, n_heads=1)
        load, field = serving.load(shape, T), "memory" if kind == "memory" else kind
        assert UNSUPPORTED[load.unsupported] == kind
        alone = [serving._load(shape, T, one, "price") for one in layouts(8)]
        assert getattr(load, field) == min(getattr(one, field) for one in alone if UNSUPPORTED[one.unsupported] == kind)
        assert unsupported_reason(serving.settled(shape, T), shape, T) == unsupported_reason(serving, shape, T)

    def test_all_layouts_are_tried_tensor_parallelism_first(self):
        found = layouts(12)
        assert found[0] == Layout(12)
        assert len(set(found)) == len(found) == sum(t * p * c == 12 for t in R12 for p in R12 for c in R12)


R12 = range(1, 13)


class TestBestBatch:
    LAYOUT = Layout(2, 2, 1)

    def test_for_a_price_is_the_most_that_fit(self):
        serving = server("h100", 4, self.LAYOUT)
        assert serving.load(LLAMA, T).batch == serving.largest_batch(LLAMA, T)
        seconds = [dataclasses.replace(serving, batch=batch).load(LLAMA, T).token_seconds for batch in range(2, 11, 2)]
        assert seconds == sorted(seconds, reverse=True)

    def test_for_a_latency_is_the_fewest(self):
        serving = server("h100", 4, self.LAYOUT)
        assert serving.load(LLAMA, T, "latency").batch == 2
        assert serving.request_seconds(LLAMA, T) == dataclasses.replace(serving, batch=2).request_seconds(LLAMA, T)

    @pytest.mark.parametrize("disaggregated", [False, True])
    @pytest.mark.parametrize("tpot", [0.005, 0.01, 0.02])
    def test_with_a_limit_for_a_token_is_the_most_that_keep_it(self, tpot, disaggregated):
        serving = server("h100", 4, self.LAYOUT, tpot=tpot, disaggregated=disaggregated)
        batch = serving.load(LLAMA, 8192).batch
        assert 2 < batch < serving.largest_batch(LLAMA, 8192)
        kept, missed = (dataclasses.replace(serving, batch=one).load(LLAMA, 8192) for one in (batch, batch + 2))
        assert kept.tpot <= tpot < missed.tpot
        assert (str(UNSUPPORTED[kept.unsupported]), UNSUPPORTED[missed.unsupported]) == ("", "tpot")

    def test_with_a_limit_that_all_keep_is_the_most_that_fit(self):
        assert server("h100", tpot=100.0).load(LLAMA, T).batch == server("h100").largest_batch(LLAMA, T)

    def test_of_many_shapes_is_that_of_each(self):
        serving = server("h200", 8, Layout(1, 2, 4), tpot=0.05)
        batches = serving.load(MANY, T).batch
        assert len(set(batches)) > 2
        for i, batch in enumerate(batches):
            one = costs.Shape(*(getattr(MANY, name)[i] for name in ("n_layers", "d_model", "n_heads", "n_kv_heads")))
            assert serving.load(one, T).batch == batch


# (unsupported, how it is served, a model, what is said)
CANT = [
    ("heads", RooflineServing("h100", 8, "tensor"), dataclasses.replace(FEW, n_heads=4),
     "8 devices can't share 4 query heads: 4 can; so can these as 4,2,1 or 4,1,2"),
    ("heads", RooflineServing("h100", 4, "tensor"), dataclasses.replace(FEW, n_heads=6),
     "4 devices can't share 6 query heads: 3 or 6 can; so can these as 2,2,1 or 2,1,2"),
    ("heads", RooflineServing("h100", 4, "tensor"), dataclasses.replace(FEW, n_heads=1),
     "4 devices can't share 1 query head: 1 can; so can these as 1,4,1 or 1,2,2"),
    ("heads", RooflineServing("h100", 8, "tensor"), dataclasses.replace(FEW, n_heads=3.5),
     "8 devices can't share 3.5 query heads: 3 can; so can these as 2,4,1 or 2,2,2"),
    ("memory", RooflineServing("v5e", 1, batch=4), LLAMA,
     r"takes 40.7 GB of each v5e with 4 requests \(1 fit\), and a server has 15.2 GB"),
    ("memory", RooflineServing("l4", 1), dataclasses.replace(FEW, n_layers=360),
     "takes 38.2 GB of each l4, and a server has 21.7 GB"),
    ("ttft", RooflineServing("h100", 1, ttft=1e-3), LLAMA, r"first token after \S+ s, not 0.001 s"),
    ("tpot", RooflineServing("h100", 1, tpot=1e-4), LLAMA, r"token after \S+ s, not 0.0001 s"),
]  # fmt: skip
cant = pytest.mark.parametrize(("kind", "serving", "shape", "text"), CANT, ids=[f"{row[0]}-{i}" for i, row in enumerate(CANT)])


class TestObstacles:
    @cant
    def test_have_a_kind_and_words(self, kind, serving, shape, text):
        load = serving.load(shape, T)
        assert UNSUPPORTED[load.unsupported] == kind
        assert not load.possible
        assert re.fullmatch(text, unsupported_reason(serving, shape, T))

    @cant
    def test_make_costs_infinite(self, kind, serving, shape, text):
        assert serving.request_seconds(shape, T) == serving.usd_per_million_tokens(shape, T) == math.inf
        assert 1 / serving.seconds_per_token(shape, T) == 0

    def test_fewer_requests_than_groups(self):
        assert UNSUPPORTED[RooflineServing("h100", 4, batch=2)._load(FEW, T, Layout(1, 4, 1), "price").unsupported] == "batch"

    def test_nothing_is_said_of_what_can_be_served(self):
        assert unsupported_reason(RooflineServing("h100"), FEW, T) == ""

    def test_heads_that_grow_with_a_width_are_shared_by_no_more_devices_than_there_are(self):
        loads = [RooflineServing("h100", 4, "tensor").load(dataclasses.replace(FEW, n_heads=n), T) for n in (3.5, 4.5)]
        assert [UNSUPPORTED[load.unsupported] for load in loads] == ["heads", ""]

    def test_memory_that_is_said_is_that_of_the_layout_that_needs_least(self):
        """One key/value head, so that over heads all devices hold it; over the context each holds a fourth of it."""
        serving, shape = RooflineServing("v5e", 4, batch=80), dataclasses.replace(FEW, n_heads=4)
        least = serving.memory_bytes(shape, T, layout=Layout(1, 1, 4))
        assert least < 0.5 * serving.memory_bytes(shape, T, layout=Layout(4))
        assert unsupported_reason(serving, shape, T).startswith(f"takes {least / 1e9:.1f} GB of each v5e with 80 requests (")

    @pytest.mark.parametrize(("kind", "name"), [("ttft", "first token"), ("tpot", "token")])
    def test_time_that_is_said_is_that_of_the_fastest_layout(self, kind, name):
        serving = RooflineServing("h100", 8, batch=8, **{kind: 1e-6})
        least = min(getattr(serving._load(FEW, T, one, "price"), kind) for one in layouts(8))
        assert unsupported_reason(serving, FEW, T) == f"{name} after {least:.3g} s, not 1e-06 s"

    @pytest.mark.parametrize("kind", ["ttft", "tpot"])
    def test_a_limit_is_kept_by_what_takes_just_as_long(self, kind):
        free = RooflineServing("h100", 4, Layout(2, 2, 1), batch=8)
        seconds = float(getattr(free.load(FEW, T), kind))
        assert dataclasses.replace(free, **{kind: seconds}).load(FEW, T).possible
        assert UNSUPPORTED[dataclasses.replace(free, **{kind: seconds * 0.999}).load(FEW, T).unsupported] == kind


class TestReplication:
    def test_costs_nothing_where_every_device_has_key_value_heads_of_its_own(self):
        assert replication_cost(RooflineServing("h100", 8, "tensor", 8), LLAMA, T) == 0
        assert replication_cost(RooflineServing("h100", 1, batch=1), FEW, T) == 0

    @pytest.mark.parametrize(("by", "field"), [("price", "token_seconds"), ("latency", "request")])
    def test_is_what_heads_cost_that_several_devices_hold(self, by, field):
        """Against a cache and matrices of an eighth of a head each."""
        serving = unit(parallelism="tensor", decode_share=1.0)
        shape = dataclasses.replace(SMALL, n_kv_heads=1)
        load = serving.load(shape, 100, by)
        undivided = 12 * (2 * 2 * 4 * 1 * 2 * 50) + 2 * 128 * 1 + 12 * 2 * 128  # seconds a step of what is replicated
        expected = 1 / (1 - 7 / 8 * undivided / load.decode.seconds) - 1
        assert replication_cost(serving, shape, 100, by) == pytest.approx(expected)

    def test_is_nothing_where_other_things_decide(self):
        """In the bound a prefill is as long as its FLOPs take, of which those of one head more are few but attention's many."""
        serving = RooflineServing("h100", 8, "tensor", 1, decode_share=0.0, efficiency="bound")
        assert 0 <= replication_cost(serving, FEW, T) < 0.01

    def test_is_nan_where_it_can_not_be_served(self):
        shape = dataclasses.replace(FEW, n_heads=np.array([4, 8]))
        found = replication_cost(RooflineServing("h100", 8, "tensor", 1), shape, T)
        assert np.isnan(found[0])
        assert found[1] > 0

    def test_is_of_the_layout_and_batch_of_the_answer_whatever_the_limits(self):
        limited = server("h100", 8, Layout(4, 2, 1), tpot=0.02)
        batch = int(limited.load(FEW, T).batch)
        found, free = (replication_cost(one, FEW, T) for one in (limited, server("h100", 8, Layout(4, 2, 1), batch)))
        assert found == pytest.approx(free)
        assert found > 0


ODD = costs.Shape(np.array([36, np.inf, np.nan]), np.array([2048, np.inf, np.nan]), np.array([32, np.inf, np.nan]), 8)
HOW = [
    {}, {"efficiency": 0.4}, {"efficiency": "bound"}, {"decode_share": 0.0}, {"decode_share": 1.0}, {"batch": "fits"},
    {"batch": 4}, {"tpot": 0.5}, {"ttft": 100.0}, {"disaggregated": True},
]  # fmt: skip


class TestArrays:
    @pytest.mark.parametrize("settings", HOW, ids=str)
    @pytest.mark.parametrize("n_devices", [1, 4])
    def test_sizes_that_no_model_has_cost_infinity_or_nan(self, n_devices, settings):
        """Heads that grow with the width, as Llama 3's do, included; none of it warns."""
        for parallelism in ("best", "tensor", Layout(1, n_devices, 1), Layout(1, 1, n_devices)):
            serving = RooflineServing("h200", n_devices, parallelism, **settings)
            served = serving.request_seconds, serving.seconds_per_token, serving.usd_per_million_tokens
            for cost in (*served, serving.memory_bytes):
                finite, infinite, nan = cost(ODD, T)
                assert (math.isfinite(finite), infinite, math.isnan(nan)) == (True, math.inf, True)

    def test_they_do_not_fit_and_have_no_limit(self):
        serving = RooflineServing("h200", 4)
        np.testing.assert_array_equal(serving.fits(ODD, T), [True, False, False])
        np.testing.assert_array_equal(serving.largest_batch(ODD, T)[1:], [0, 0])
        np.testing.assert_array_equal(serving.decode_step(ODD, T).limit[1:], ["", ""])
        assert 1 / serving.seconds_per_token(ODD, T)[1] == 0

    def test_a_size_beside_which_the_cache_is_nothing_does_not_fit(self):
        """As draws have them near the entropy: 1e40 parameters."""
        assert RooflineServing("h200").largest_batch(costs.Shape(1e12, 1e14, 8, 1), T) == 0
        assert RooflineServing("h200").request_seconds(costs.Shape(1e12, 1e14, 8, 1), T) == math.inf

    @pytest.mark.parametrize("parallelism", ["best", "tensor", Layout(2, 2, 1)])
    @pytest.mark.parametrize("batch", ["best", "fits", 8])
    def test_shapes_and_contexts_broadcast(self, parallelism, batch):
        serving = RooflineServing("h200", 4, parallelism, batch)
        shape = costs.Shape(np.array([36, 24]), np.array([2048, 1024]), np.array([8, 16]), np.array([1, 4]))
        for cost in (serving.request_seconds, serving.seconds_per_token, serving.memory_bytes, serving.largest_batch):
            many = cost(shape, np.array([[8192], [T]]))
            one = cost(costs.Shape(24, 1024, 16, 4), 8192)
            assert many.shape == (2, 2)
            assert np.ndim(one) == 0
            assert many[0, 1] == pytest.approx(one, rel=1e-14)

    def test_a_layout_for_each_shape(self):
        serving = RooflineServing("h200", 4, Layout(np.array([4, 1]), np.array([1, 2]), np.array([1, 2])), 8)
        found = serving.seconds_per_token(FEW, T)
        alone = [RooflineServing("h200", 4, one, 8).seconds_per_token(FEW, T) for one in (Layout(4), Layout(1, 2, 2))]
        assert found == pytest.approx(alone)


class TestLayout:
    def test_text_there_and_back(self):
        assert Layout.parse("4,2,1") == Layout(4, 2, 1)
        assert str(Layout(4, 2, 1)) == "4,2,1"
        assert RooflineServing("h100", 8, "4,2,1").parallelism == Layout(4, 2, 1)
        assert RooflineServing("h100", 8, (4, 2, 1)).layouts() == [Layout(4, 2, 1)]

    def test_in_words(self):
        assert Layout(4, 2, 1).describe() == "heads over 4, sequences over 2"
        assert Layout(1, 1, 8).describe() == "context over 8"
        assert Layout().describe() == ""

    @pytest.mark.parametrize("text", ["4,2", "4,2,1,1", "4,2,x", "4,0,2", "-4,2,1", "", "Tensor", "2.0,2,2"])
    def test_what_is_no_layout_is_refused(self, text):
        with pytest.raises(ValueError, match=f"parallelism {text!r}: tensor, best, or three integers of at least 1"):
            Layout.parse(text)


class TestDescribe:
    def test_every_device_is_json_with_its_peaks_and_its_price(self):
        for name, chip in CHIPS.items():
            found = json.loads(json.dumps(RooflineServing(name).describe()))
            assert (found["peak_flops"], found["memory_bandwidth"]) == (chip.peak_flops, chip.memory_bandwidth)
            assert found["usd_per_hour"] == chip.price.usd_per_hour
            assert chip.price.date in found["price"]

    def test_seconds_of_collectives_are_those_of_every_part_of_a_layout(self):
        found = RooflineServing("v5e", 8).describe()["collective_seconds"]
        assert found == [[m, CHIPS["v5e"].collective_seconds(m)] for m in (2, 4, 8)]
        assert RooflineServing("v5e").describe()["collective_seconds"] == [[1, 0.0]]

    @pytest.mark.parametrize(
        ("parallelism", "said"),
        [("best", "best"), ("2,2,1", [2, 2, 1]), (Layout(np.array([4, 1]), 1, np.array([1, 4])), [[4, 1, 1], [1, 1, 4]])],
    )
    def test_layouts(self, parallelism, said):
        assert json.loads(json.dumps(RooflineServing("v5e", 4, parallelism).describe()))["parallelism"] == said

    def test_a_price_of_your_own(self):
        found = RooflineServing("h200", usd_per_hour=2.0).describe()
        assert (found["usd_per_hour"], found["price"]) == (2.0, "as given")

    def test_a_device_without_a_price_is_described_and_has_no_price_of_tokens(self):
        mine = RooflineServing(dataclasses.replace(CHIPS["h200"], name="mine", prices=()))
        assert (mine.describe()["usd_per_hour"], mine.describe()["price"]) == (None, "no price")
        assert mine.request_seconds(FEW, T) == RooflineServing("h200").request_seconds(FEW, T)
        with pytest.raises(ValueError, match="device 'mine' has no list price: give usd_per_hour"):
            mine.usd_per_million_tokens(FEW, T)


GOOD = {"matmul": 0.6, "attention": 0.9, "weights_bandwidth": 0.8, "cache_bandwidth": 0.7, "layer_seconds": 2e-5}


class TestEfficiencyFile:
    def written(self, tmp_path, content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def test_is_read_with_its_source(self, tmp_path):
        path = self.written(tmp_path, {"efficiency": GOOD, "source": "measured here"})
        assert read_efficiency(path) == Efficiency(**GOOD, source="measured here")
        assert RooflineServing("h100", efficiency=path).efficiency == read_efficiency(path)

    def test_may_say_what_the_links_reach(self, tmp_path):
        found = read_efficiency(self.written(tmp_path, {"efficiency": GOOD | {"exchange": 0.5}}))
        assert found.exchange == 0.5
        assert found.source.endswith("mine.json")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "Expecting property name"),
            ([], "must have"),
            ({}, "must have"),
            ({"efficiency": {"matmul": 0.5}}, "must have"),
            ({"efficiency": GOOD | {"speed": 1.0}}, "must have"),
            ({"efficiency": GOOD | {"matmul": "fast"}}, "could not convert string to float"),
            ({"efficiency": GOOD | {"matmul": None}}, "not 'NoneType'"),
            ({"efficiency": GOOD | {"matmul": 1.2}}, "matmul = 1.2: a share above 0 and at most 1"),
            ({"efficiency": GOOD | {"layer_seconds": -1}}, "layer_seconds = -1.0: seconds of at least 0"),
        ],
    )
    def test_what_is_none_is_refused(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=f"efficiency .*mine.json: .*{message}"):
            read_efficiency(self.written(tmp_path, content))

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
            RooflineServing("h100", efficiency=str(tmp_path / "none.json"))


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"device": "H200"}, "device 'H200' is unknown: did you mean 'h200'"),
            ({"device": "gpu"}, "device 'gpu' is unknown: allowed: v4, v5e"),
            ({"n_devices": 0}, "n_devices = 0: must be an integer of at least 1"),
            ({"n_devices": 1.5}, "n_devices = 1.5"),
            ({"n_devices": True}, "n_devices = True"),
            ({"n_devices": 16}, "n_devices = 16: the links of h200 join 8 at most; serve several replicas instead"),
            ({"device": "v5e", "n_devices": 512}, "n_devices = 512: the links of v5e join 256 at most"),
            ({"device": dataclasses.replace(UNIT, interconnect=0.0), "n_devices": 2}, "n_devices = 2: unit has no link"),
            ({"device": dataclasses.replace(UNIT, collectives=None), "n_devices": 2}, "'unit' has no seconds per collective"),
            ({"parallelism": "heads"}, "parallelism 'heads': tensor, best, or three integers"),
            ({"parallelism": "2,1,1"}, "parallelism 2,1,1: 2 devices, and n_devices = 1; there are 1,1,1"),
            ({"parallelism": (-2, -2, 1), "n_devices": 4}, "parallelism -2,-2,1: must be integers of at least 1"),
            ({"parallelism": (0.5, 8, 1), "n_devices": 4}, "parallelism 0.5,8,1: must be integers of at least 1"),
            ({"batch": 0}, "batch = 0: must be a whole number of requests, at least 1, or fits, or best"),
            ({"batch": 2.5}, "batch = 2.5"),
            ({"batch": True}, "batch = True"),
            ({"batch": math.nan}, "batch = nan"),
            ({"batch": math.inf}, "batch = inf"),
            ({"batch": "most"}, "batch 'most': a number of requests, fits"),
            ({"batch": 2, "parallelism": "1,4,1", "n_devices": 4}, "batch = 2: below the 4 devices over which sequences"),
            ({"decode_share": 1.1}, "decode_share = 1.1: from 0"),
            ({"decode_share": math.nan}, "decode_share = nan"),
            ({"param_dtype": "int3"}, "dtype 'int3' is unknown here: use float32"),
            ({"cache_dtype": "fp8"}, "dtype 'fp8' is unknown here"),
            ({"efficiency": 0}, "efficiency = 0: above 0 and at most 1"),
            ({"efficiency": 1.5}, "efficiency = 1.5"),
            ({"efficiency": "1.5"}, "efficiency = 1.5"),
            ({"efficiency": math.nan}, "efficiency = nan"),
            ({"efficiency": True}, "efficiency = True"),
            ({"efficiency": Efficiency(2.0, 1.0, 1.0, 1.0, 0.0)}, "efficiency: matmul = 2.0: a share above 0"),
            ({"ttft": 0}, "ttft = 0: must be seconds, above 0"),
            ({"tpot": math.inf}, "tpot = inf: must be seconds, above 0"),
            ({"tpot": 0.1, "decode_share": 0}, "tpot = 0.1: with decode_share = 0 nothing is generated"),
            ({"ttft": 0.1, "decode_share": 1}, "ttft = 0.1: with decode_share = 1 there is no prompt"),
            ({"usd_per_hour": -1}, "usd_per_hour = -1: must be US dollars"),
        ],
        ids=str,
    )
    def test_what_can_not_serve(self, settings, message):
        with pytest.raises(ValueError, match=message):
            RooflineServing(**({"device": "h200"} | settings))

    def test_a_chip_of_your_own_may_have_any_number_of_links(self):
        assert RooflineServing(UNIT, 64).decode_step(SMALL, KEYS, Layout(8, 8, 1), 8).exchange > 0


def test_head_sizes_may_be_an_array_too():
    sizes = np.array([64.0, 128.0, 64.0])
    serving = RooflineServing("h200", batch=2, cache_dtype="int8")
    many = serving.load(dataclasses.replace(LLAMA, head_dim=sizes), 8192)
    for i, size in enumerate((64, 128, 64)):
        one = serving.load(dataclasses.replace(LLAMA, head_dim=size), 8192)
        assert (many.ttft[i], many.tpot[i], many.memory[i]) == pytest.approx((one.ttft, one.tpot, one.memory))


def test_a_phase_that_there_is_not_is_limited_by_nothing():
    assert RooflineServing("h200", batch=1, decode_share=1).load(LLAMA, 8192).prefill.limit == ""
    assert RooflineServing("h200", batch=1, decode_share=0.5).load(LLAMA, 8192).prefill.limit == "matmul"
