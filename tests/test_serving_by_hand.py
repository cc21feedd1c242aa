"""Serving's seconds, bytes and prices against the count by hand of `tests/serving_by_hand.py`, which shares nothing with it."""

import itertools
import math

import pytest

from gqa_jax import hardware
from gqa_jax.costs import Shape
from gqa_jax.search.roofline import RooflineServing, kv_heads_held
from tests import serving_by_hand as hand

EXACT = 1e-12


@pytest.mark.parametrize("shares", hand.SHARES)
@pytest.mark.parametrize("name", hand.CASES)
def test_roofline_agrees_with_the_count_by_hand(name, shares):
    case = hand.CASES[name]._replace(shares=hand.SHARES[shares])
    by_hand = {what: math.nan if value is None else value for what, value in hand.bill(case)._asdict().items()}
    assert ours(case) == pytest.approx(by_hand, rel=EXACT, abs=0, nan_ok=True)


@pytest.mark.parametrize("name", hand.CASES)
def test_fits_where_nine_tenths_of_the_memory_hold_it(name):
    case = hand.CASES[name]
    assert bool(serving(case).fits(shape(case), case.context)) == (hand.memory(case) <= 0.9 * case.device.memory)
    smaller = case._replace(device=case.device._replace(memory=hand.memory(case) / 0.9 * (1 - EXACT)))
    assert not serving(smaller).fits(shape(case), case.context)


@pytest.mark.parametrize("shares", ["bound", "servers"])
@pytest.mark.parametrize(
    "name", ["Llama 70B, t p, 30 requests over 4", "Llama 8B, fewer key/value heads than t", "p", "t is n_kv"]
)
def test_the_best_layout_is_the_cheapest_of_all_counted_by_hand(name, shares):
    case = hand.CASES[name]._replace(shares=hand.SHARES[shares])
    n = case.n_devices
    can = [
        case._replace(layout=layout)
        for layout in itertools.product(range(1, n + 1), repeat=3)
        if math.prod(layout) == n and case.model.heads % layout[0] == 0 and layout[1] <= case.batch
    ]
    fitting = [hand.bill(one).usd for one in can if hand.memory(one) <= 0.9 * case.device.memory]
    assert len(fitting) > 2
    best = serving(case, parallelism="best").load(shape(case), case.context, by="price")
    assert serving(case).usd_per_million(best.token_seconds) == pytest.approx(min(fitting), rel=EXACT)


def test_key_value_heads_of_a_device_are_those_that_its_query_heads_read():
    for n_heads in (1, 2, 8, 12, 24, 28, 32, 36, 40, 48, 64, 96):
        divisors = [i for i in range(1, n_heads + 1) if n_heads % i == 0]
        for n_kv_heads, over in itertools.product(divisors, divisors):
            readers, own = n_heads // n_kv_heads, n_heads // over
            listed = max(len({head // readers for head in range(i * own, (i + 1) * own)}) for i in range(over))
            assert kv_heads_held(n_heads, n_kv_heads, over) == listed, (n_heads, n_kv_heads, over)


def test_hand_counts_the_published_parameters_of_llama_3():
    # github.com/thamada/modelQuery README.md. The 70B's 8 files all hold its 2 x 80 + 1 norms, which are counted once here.
    for name, published in {"Llama 3 8B": 8_030_261_248, "Llama 3 70B": 70_562_938_880 - 7 * 161 * 8192}.items():
        alone = hand.ask(name, "h200", (1, 1, 1), 1, 0)
        assert hand.memory(alone) == 2 * published


def test_a_bound_in_float8_is_of_a_cache_in_float8_and_not_of_parameters():
    # vLLM with FlashAttention-3 computes attention in float8 where the cache is (its documentation, "Quantized KV Cache"); on
    # an H100 at up to 1.2 PFLOP/s (arXiv 2407.08608), above the 989 TFLOP/s of bfloat16.
    case = hand.CASES["as many key/value heads, t p c"]
    for weights, cache in itertools.product(("bfloat16", "float8"), repeat=2):
        one = case._replace(weights=weights, cache=cache)
        assert ours(one)["ttft"] == pytest.approx(hand.bill(one).ttft, rel=EXACT), (weights, cache)


def error(case: hand.Case, left_out: str) -> float:
    """What a simplification changes in the worst of the bill's numbers, as a share of the number."""
    simplified, full = hand.bill(case), hand.bill(case._replace(besides=frozenset([left_out])))
    pairs = [(a, b) for a, b in zip(simplified, full, strict=True) if a]
    return max((b / a - 1 for a, b in pairs), key=abs)


@pytest.mark.parametrize("shares", hand.SHARES)
def test_what_is_left_out_is_small(shares):
    """Of models of 12 layers an embedding's exchanges are 1 of 24."""
    cases = {name: case._replace(shares=hand.SHARES[shares]) for name, case in hand.CASES.items()}
    for name, case in cases.items():
        assert 0 <= error(case, "embedding") < (0.015 if case.model.layers > 12 else 0.06), name
        assert 0 <= error(case, "rings") < 0.001, name
        assert 0 <= error(case, "first token") < 0.01, name


def shape(case: hand.Case) -> Shape:
    model = case.model
    return Shape(model.layers, model.width, model.heads, model.kv_heads, model.head_dim, model.ffn, model.vocabulary)


def serving(case: hand.Case, parallelism=None) -> RooflineServing:
    """The question as the package asks it, on a chip of the hand's numbers."""
    device, shares = case.device, case.shares
    chip = hardware.Chip(
        name="by hand",
        peak_flops=device.flops["bfloat16"],
        memory_bytes=device.memory,
        memory_bandwidth=device.bandwidth,
        interconnect=device.links,
        collectives=hardware.Collectives(tuple(sorted(device.all_reduce.items())), "2026-11", "a case counted by hand"),
        narrow_flops=tuple((dtype, flops) for dtype, flops in device.flops.items() if dtype != "bfloat16"),
        attention_share=tuple((size, share, share) for size, share in sorted(device.attention_share.items())),
    )
    return RooflineServing(
        device=chip,
        n_devices=case.n_devices,
        parallelism=parallelism or ("tensor" if case.layout[0] == case.n_devices else case.layout),
        batch=case.batch,
        decode_share=case.share,
        param_dtype=case.weights,
        cache_dtype=case.cache,
        untied=case.model.untied,
        efficiency=hardware.Efficiency.of_bound() if shares is None else hardware.Efficiency(*shares),
        usd_per_hour=device.usd,
        disaggregated=case.disaggregated,
    )


def ours(case: hand.Case) -> dict[str, float]:
    """A case's bill by the package, by the names of `hand.Bill`."""
    asked, model = serving(case), shape(case)
    load = asked.load(model, case.context)
    bill = {
        "prefill": load.prefill.seconds,
        "decode": load.decode.seconds,
        "ttft": load.ttft,
        "tpot": load.tpot,
        "request": asked.request_seconds(model, case.context),
        "usd_input": asked.usd_per_million(load.input_seconds),
        "usd_output": asked.usd_per_million(load.output_seconds),
        "usd": asked.usd_per_million_tokens(model, case.context),
        "memory": asked.memory_bytes(model, case.context),
    }
    return {what: float(value) for what, value in bill.items()}
