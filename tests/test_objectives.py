import json
import math

import numpy as np
import pytest

from gqa_jax import costs
from gqa_jax.search import objectives
from gqa_jax.search.objectives import OBJECTIVES, Flops, Lifetime, Memory, Training, Z, make
from gqa_jax.search.roofline import Serving

T = 131_072
SHAPE = costs.Shape(42.6, 2400.0, 8, 1)

SETTINGS = [
    ("z", {}),
    ("z", {"flops": "per_token", "lam": 0.3, "alpha": 0.7, "beta": 0.4}),
    ("z", {"convention": "exact", "cache_dtype": "int8", "lam": 1}),
    ("z", {"convention": "paper", "flops": "full_T", "lam": 0}),
    ("flops", {"convention": "paper"}),
    ("flops", {"flops": "full_T"}),
    ("memory", {}),
    ("memory", {"convention": "exact", "param_dtype": "int8", "cache_dtype": "int4"}),
    ("latency", {"device": "h200"}),
    ("latency", {"device": "v5e", "n_devices": 8, "batch": 300, "decode_share": 0.02, "cache_dtype": "int8"}),
    ("latency", {"device": "v5p", "decode_share": 0}),
    ("latency", {"device": "a100", "decode_share": 1, "efficiency": 0.4}),
    ("throughput", {"device": "v6e", "batch": 16, "n_devices": 4}),
    ("price", {"device": "h100", "batch": 64, "param_dtype": "float8"}),
    ("price", {"device": "v5e", "usd_per_hour": 0.5}),
    ("train", {}),
    ("train", {"tokens_per_param": 100.0, "train_context": 8192, "convention": "paper"}),
    ("train", {"tokens": 1e12}),
    ("lifetime", {"served_tokens": 1e13, "tokens_per_param": 50.0}),
    ("lifetime", {"served_tokens": 1e12, "device": "v5p", "batch": 32, "train_context": 8192}),
    ("lifetime", {"served_tokens": 0.0, "device": "h200"}),
]


def computed(said, shape, context):
    """The cost from what `describe` says alone, in plain arithmetic: what a page computes. None of our functions is called."""
    layers, d, n, k, h, vocab = (
        shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.vocab_size
    )  # fmt: skip

    def count(rule):
        params = 2 * layers * d * h * (n + k) + rule["ffn_matrices"] * layers * d * shape.d_ff
        norms = (2 * layers + 1) * d if rule["norms"] else 0
        return params, norms, d * vocab if rule["embedding"] else 0

    def forward(rule, keys):
        matrices, _, embedding = count(rule)
        return 2 * matrices + 4 * layers * keys * n * h, 2 * embedding

    def serve(said, context):
        rule = said["convention"]
        devices, share = said["n_devices"], said["decode_share"]

        def seconds(flops, keys, tokens):
            held = said["param_bytes"] * sum(count(rule)) + said["batch"] * said["cache_bytes"] * 2 * keys * layers * h * k
            exchanged = 8 * (devices - 1) / devices * layers * said["batch"] * d * tokens
            reached = said["efficiency"] * devices
            return max(
                flops / (reached * said["peak_flops"]),
                held / (reached * said["memory_bandwidth"]),
                exchanged / (said["efficiency"] * said["interconnect"]),
            )

        total = 0.0
        if share < 1:
            prompt = (1 - share) * context
            total += seconds(said["batch"] * prompt * forward(rule, prompt / 2)[0], prompt, prompt)
        if share > 0:
            keys = (1 - share / 2) * context
            total += share * context * seconds(said["batch"] * sum(forward(rule, keys)), keys, 1)
        return total

    def per_token(said):
        return said["n_devices"] * serve(said, context) / (said["batch"] * context)

    def memory(said):
        return said["param_bytes"] * sum(count(said["convention"])) + said["cache_bytes"] * 2 * context * layers * h * k

    def flops(said):
        times = {"per_token": 1, "half_T": context / 2, "full_T": context}[said["convention"]["flops"]]
        return sum(forward(said["convention"], context)) * times

    def train(said):
        tokens = said["tokens"] if said["tokens"] is not None else said["tokens_per_param"] * sum(count(said["convention"])[:2])
        return 3 * tokens * sum(forward(said["convention"], (said["train_context"] or context) / 2))

    def z(said):
        weighed = [(said["lam"], memory(said), said["alpha"]), (1 - said["lam"], flops(said), said["beta"])]
        return sum(weight * value**power for weight, value, power in weighed if weight)

    def lifetime(said):
        if said["serving"] is None:
            each = sum(forward(said["training"]["convention"], context / 2))
            return train(said["training"]) + said["served_tokens"] * each
        serving = said["serving"]
        seconds = train(said["training"]) / (serving["efficiency"] * serving["peak_flops"])
        return (seconds + said["served_tokens"] * per_token(serving)) * serving["usd_per_hour"] / 3600

    return {
        "z": z, "memory": memory, "flops": flops, "train": train, "lifetime": lifetime,
        "latency": lambda said: serve(said["serving"], context),
        "throughput": lambda said: per_token(said["serving"]),
        "price": lambda said: 1e6 * per_token(said["serving"]) * said["serving"]["usd_per_hour"] / 3600,
    }[said["cost"]](said)  # fmt: skip


@pytest.mark.parametrize(("cost", "settings"), SETTINGS)
def test_the_description_is_enough_to_compute_the_cost(cost, settings):
    objective = make(cost, **settings)
    said = json.loads(json.dumps(objective.describe()))
    assert [said[name] for name in ("cost", "label", "unit")] == [cost, objective.label, objective.unit]
    for context in (1024, T):
        assert computed(said, SHAPE, context) == pytest.approx(objective(SHAPE, context), rel=1e-12)


@pytest.mark.parametrize(("cost", "settings"), SETTINGS)
def test_arrays_broadcast_and_sizes_that_no_model_has_pass(cost, settings):
    objective = make(cost, **settings)
    shape = costs.Shape(np.array([42.6, np.inf, np.nan]), np.array([2400, np.inf, np.nan]), 8, 1)
    many = np.broadcast_to(objective(shape, np.array([[1024], [T]])), (2, 3))
    assert many[:, 0] == pytest.approx([objective(SHAPE, 1024), objective(SHAPE, T)], rel=1e-13)
    assert (many[:, 1] == np.inf).all()
    assert np.isnan(many[:, 2]).all()


def test_every_cost_is_tried_above():
    assert {cost for cost, _ in SETTINGS} == set(OBJECTIVES)


@pytest.mark.parametrize(("n_layers", "n_kv", "z"), [(32, 8, 75_568), (12, 8, 42_997), (12, 4, 32_668)])
def test_z_of_the_markers_of_figure_2(n_layers, n_kv, z):
    shape = costs.Shape(n_layers, 64 * n_layers, 8, n_kv)
    assert make("z")(shape, T) == make("z", flops="half_T")(shape, T) == pytest.approx(z, rel=0.004)
    assert make("z", flops="per_token")(shape, T) < 0.95 * z


def test_memory_and_flops_are_those_of_figure_1():
    llama = costs.Shape(32, 2048, 32, 8)
    assert Memory()(llama, T) == 5_704_253_440
    assert Flops(flops="per_token")(llama, T) == 37_178_310_656
    assert Flops()(llama, T) == T / 2 * 37_178_310_656
    assert Flops(flops="full_T")(llama, T) == T * 37_178_310_656


def test_units_follow_what_is_counted():
    assert [Memory().unit, Memory("exact").unit, Z().unit] == ["values", "bytes", ""]
    assert Flops("exact").label == "forward FLOPs of a token"
    assert Flops().label == "forward FLOPs of T/2 tokens"
    assert [Lifetime(1e12).unit, Lifetime(1e12, serving=Serving("h200")).unit] == ["FLOPs", "US dollars"]


def test_the_price_of_a_token_is_the_time_of_devices():
    settings = {"device": "v6e", "batch": 16, "n_devices": 4}
    latency, throughput, price = (make(cost, **settings)(SHAPE, T) for cost in ("latency", "throughput", "price"))
    assert throughput == pytest.approx(4 * latency / (16 * T))
    assert price == pytest.approx(1e6 * throughput * 2.70 / 3600)


def test_training_tokens():
    count = costs.count_params(SHAPE, "exact").non_embedding
    assert Training()(SHAPE, T) == costs.train_flops(SHAPE, T, 20 * count)
    assert Training(tokens=1e9, train_context=8192)(SHAPE, T) == costs.train_flops(SHAPE, 8192, 1e9)


def test_a_lifetime_goes_from_training_to_serving():
    context = 8192
    forward = costs.forward_flops(SHAPE, context / 2).total
    assert Lifetime(0)(SHAPE, context) == Training()(SHAPE, context)
    assert Lifetime(1e13)(SHAPE, context) - Lifetime(0)(SHAPE, context) == pytest.approx(1e13 * forward)
    serving = Serving("h200", batch=8)
    dollars = [Lifetime(tokens, serving=serving)(SHAPE, context) for tokens in (0, 1e12)]
    assert dollars[0] == pytest.approx(Training()(SHAPE, context) / 989e12 * 10.4365 / 3600)
    assert dollars[1] - dollars[0] == pytest.approx(1e6 * serving.usd_per_million_tokens(SHAPE, context))


def test_settings_reach_their_part_and_none_is_the_default():
    assert make("z", lam=0.5, alpha=None, flops=None) == Z(lam=0.5)
    assert make("latency", device="h200", batch=None).serving == Serving("h200")
    lifetime = make("lifetime", served_tokens=1e12, device="v5e", batch=2, tokens_per_param=30)
    assert lifetime == Lifetime(1e12, Training(tokens_per_param=30), Serving("v5e", batch=2))
    assert make("lifetime", served_tokens=1e12) == Lifetime(1e12)
    assert objectives.settings("train") == ["convention", "tokens", "tokens_per_param", "train_context"]


@pytest.mark.parametrize(
    ("cost", "settings", "message"),
    [
        ("latencey", {}, "cost 'latencey' is unknown: did you mean 'latency'"),
        ("Z", {}, "cost 'Z' is unknown: allowed: z, flops, memory"),
        ("z", {"lamda": 0.5}, "lamda = 0.5: unknown, did you mean 'lam'"),
        ("z", {"device": "h200"}, "device = 'h200': cost 'z' has no use for it; settings of this cost: convention, flops"),
        ("latency", {}, "cost 'latency' needs device, for example device=h200"),
        ("lifetime", {"device": "h200"}, "cost 'lifetime' needs served_tokens"),
        ("lifetime", {"served_tokens": 1e12, "batch": 4}, "batch given without a device"),
        ("latency", {"device": "h20"}, "device 'h20' is unknown: did you mean 'h200'"),
        ("z", {"lam": 1.5}, "lam = 1.5: a weight between 0"),
        ("z", {"lam": math.nan}, "lam = nan"),
        ("z", {"beta": 0}, "beta = 0: an exponent above 0"),
        ("z", {"flops": "half"}, "convention flops = 'half': allowed are per_token, half_T, full_T"),
        ("flops", {"convention": "figure"}, "'figure' is unknown: use paper, figures, exact"),
        ("memory", {"cache_dtype": "int8"}, "this convention counts values, not bytes"),
        ("z", {"param_dtype": "int8"}, "this convention counts values, not bytes"),
        ("memory", {"convention": "exact", "cache_dtype": "int3"}, "dtype 'int3' is unknown"),
        ("train", {"tokens": 1e9, "tokens_per_param": 20}, "give one of them"),
        ("train", {"tokens": 0}, "tokens = 0: must be above 0 and finite"),
        ("train", {"train_context": math.inf}, "train_context = inf"),
        ("lifetime", {"served_tokens": -1}, "served_tokens = -1: must be a finite number"),
    ],
)
def test_what_can_not_be_minimised_is_refused(cost, settings, message):
    with pytest.raises(ValueError, match=message):
        make(cost, **settings)
