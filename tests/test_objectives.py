import dataclasses
import json
import math

import numpy as np
import pytest

from gqa_jax import costs, formatting, hardware
from gqa_jax.hardware import CHIPS
from gqa_jax.search import objectives, optimum, presets, words
from gqa_jax.search.objectives import OBJECTIVES, Flops, Memory, Training, Z, make
from gqa_jax.search.roofline import RooflineServing
from gqa_jax.search.serving import Lifetime
from launch import answers

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
    ("latency", {"device": "v5e", "n_devices": 8, "batch": 40, "decode_share": 0.02, "cache_dtype": "int8"}),
    ("latency", {"device": "v5p", "decode_share": 0.0}),
    ("latency", {"device": "a100", "n_devices": 8, "decode_share": 1.0, "efficiency": 0.4, "parallelism": "tensor"}),
    ("latency", {"device": "h100", "n_devices": 4, "parallelism": "1,2,2", "efficiency": "bound", "ttft": 5.0}),
    ("latency", {"device": "h100", "n_devices": 4, "batch": 30, "disaggregated": True, "param_dtype": "int4"}),
    ("throughput", {"device": "v6e", "batch": 16, "n_devices": 4}),
    ("throughput", {"device": "b200", "n_devices": 8, "batch": "fits", "param_dtype": "float4", "cache_dtype": "float8"}),
    ("throughput", {"device": "l4", "n_devices": 2, "tpot": 0.2, "untied": True, "cache_dtype": "int4"}),
    ("throughput", {"device": "l4", "batch": "fits", "untied": True}),
    ("price", {"device": "h100", "batch": 32, "param_dtype": "float8"}),
    ("price", {"device": "v5e", "usd_per_hour": 0.5, "n_devices": 4, "tpot": 0.03, "efficiency": 0.5}),
    ("price", {"device": "h100", "n_devices": 2, "tpot": 0.03, "disaggregated": True, "batch": "best"}),
    ("price", {"device": "h200", "n_devices": 8, "parallelism": "tensor", "batch": "fits", "efficiency": "bound"}),
    ("train", {}),
    ("train", {"tokens_per_param": 100.0, "train_context": 8192, "convention": "paper"}),
    ("train", {"tokens": 1e12}),
    ("lifetime", {"served_tokens": 1e13, "tokens_per_param": 50.0}),
    ("lifetime", {"served_tokens": 1e12, "device": "v5p", "batch": 32, "train_context": 8192}),
    ("lifetime", {"served_tokens": 1e11, "device": "v5e", "n_devices": 4, "training_mfu": 0.3}),
    ("lifetime", {"served_tokens": 0.0, "device": "h200"}),
]


class Server:
    """The load of a device by what `RooflineServing.describe` says alone, in plain arithmetic, one layout after another."""

    def __init__(self, said, shape, context):
        self.said, self.shape, self.context = said, shape, context
        self.waits = {1: 0.0} | dict(said["collective_seconds"])
        self.value = {"bfloat16": 2, "float8": 1, "int8": 1 + 2 / shape.head_dim, "int4": 18 / 32}[said["cache_dtype"]]

    def least(self, by):
        """(seconds of a request, device-seconds per token) of the layout and batch with the least of `by`, 0 or 1 of them."""
        n, given = self.said["n_devices"], self.said["parallelism"]
        counts = [count for count in range(1, n + 1) if n % count == 0]
        if given == "tensor":
            layouts = [(n, 1, 1)]
        elif given == "best":
            layouts = [(t, p, n // t // p) for t in counts for p in counts if n // t % p == 0]
        else:
            layouts = [tuple(given)]
        return min((self.best_batch(by, *layout) for layout in layouts), key=lambda found: found[by])

    def best_batch(self, by, t, p, c):
        """Of one layout; infinite where it can't be."""
        said = self.said
        if isinstance(said["batch"], int):
            return self.load(t, p, c, said["batch"])
        room = (said["memory_bytes"] - self.held(t, p, c, 0)) // (self.held(t, p, c, p) - self.held(t, p, c, 0))
        if said["batch"] == "fits" or by == 1:
            tried = range(int(room), 0, -1)
        else:
            tried = [1]
        found = (self.load(t, p, c, own * p) for own in tried)
        return next((load for load in found if load[0] < math.inf), (math.inf, math.inf))

    def parts(self, t):
        """Parameters of the network, the vocabulary, queries, keys and values of a device, norms; its key/value heads."""
        layers, d, h = self.shape.n_layers, self.shape.d_model, self.shape.head_dim
        n_heads, group = self.shape.n_heads, self.shape.n_heads // self.shape.n_kv_heads
        own = n_heads // t
        kv = max(len({head // group for head in range(i * own, (i + 1) * own)}) for i in range(t)) if n_heads % t == 0 else 1
        count = self.said["convention"]["ffn_matrices"] * layers * d * self.shape.d_ff, d * self.shape.vocab_size
        return *count, 2 * layers * d * h * n_heads, 2 * layers * d * h * kv, (2 * layers + 1) * d, kv

    def held(self, t, p, c, batch):
        ffn, vocabulary, queries, keys, norms, _ = self.parts(t)
        head = 2 if self.said["untied"] else 1
        each = (ffn + head * vocabulary) / self.said["n_devices"] + queries / (t * c) + keys + norms
        return self.said["param_bytes"] * each + math.ceil(batch / p) * self.cached(t, self.context) / c

    def cached(self, t, tokens):
        return 2 * self.shape.n_layers * self.shape.head_dim * self.parts(t)[-1] * self.value * tokens

    def seconds(self, matmul, attention, weights, cache, sent, waited):
        said, reached = self.said, self.said["efficiency"]
        share = 1.0
        if said["attention_share"] and not reached["bound"]:
            size, share = next(
                (row for row in said["attention_share"] if row[0] >= self.shape.head_dim), said["attention_share"][-1]
            )
            share *= min(1, self.shape.head_dim / size)
        compute = [matmul / said["peak_flops"] / reached["matmul"]]
        compute += [attention / said["attention_flops"] / share / reached["attention"]]
        memory = [weights / said["memory_bandwidth"] / reached["weights_bandwidth"]]
        memory += [cache / said["memory_bandwidth"] / reached["cache_bandwidth"]]
        exchange = (sent / said["interconnect"] + waited) / reached["exchange"]
        if reached["bound"]:
            return max(sum(compute), sum(memory), exchange)
        return sum(compute) + sum(memory) + exchange + self.shape.n_layers * reached["layer_seconds"]

    def prefill(self, t, p, c, tokens):
        n, layers, d, h = self.said["n_devices"], self.shape.n_layers, self.shape.d_model, self.shape.head_dim
        ffn, _, queries, keys, norms, kv = self.parts(t)
        gathered = 4 * h * kv * tokens + self.said["param_bytes"] * 2 * d * h * self.shape.n_heads / t
        sent = 4 * d * ((n - 1) / n * p * tokens + (t - 1) / t * tokens / c) + (c - 1) / c * gathered
        return self.seconds(
            2 * tokens * (p * ffn / n + queries / (t * c) + keys / c),
            2 * layers * h * self.shape.n_heads / t * tokens**2 / c,
            self.said["param_bytes"] * (ffn / n + queries / t + keys + norms),
            self.cached(t, tokens) / c,
            layers * sent,
            layers * (self.waits[t] + self.waits[n] + self.waits[c]),
        )

    def step(self, t, p, c, seen, batch):
        n, layers, d, h = self.said["n_devices"], self.shape.n_layers, self.shape.d_model, self.shape.head_dim
        ffn, vocabulary, queries, keys, norms, _ = self.parts(t)
        own, group, n_heads = math.ceil(batch / p), t * c, self.shape.n_heads
        sent = 4 * d * ((n - 1) / n * batch + (group - 1) / group * own) + (c - 1) / c * own * n_heads / t * (4 * h + 4)
        return self.seconds(
            2 * batch * (ffn + vocabulary) / n + 2 * own * (queries / group + keys),
            4 * own * layers * h * n_heads / t * seen / c,
            self.said["param_bytes"] * ((ffn + vocabulary) / n + queries / group + keys + norms),
            own * self.cached(t, seen) / c,
            layers * sent,
            layers * (self.waits[group] + self.waits[n] + self.waits[c]) + self.waits[n],
        )

    def load(self, t, p, c, batch):
        said, share = self.said, self.said["decode_share"]
        prompt, generated = (1 - share) * self.context, share * self.context
        rounds = batch / p
        first = self.prefill(t, p, c, prompt) if share < 1 else 0.0
        each = self.step(t, p, c, (1 - share / 2) * self.context, batch) if share > 0 else 0.0
        others = 0.0 if said["disaggregated"] or share == 0 else (rounds - 1) * first / generated
        late = (said["ttft"] or math.inf) < first or (said["tpot"] or math.inf) < each + others
        if self.shape.n_heads % t or p > batch or self.held(t, p, c, batch) > said["memory_bytes"] or late:
            return math.inf, math.inf
        busy = said["n_devices"] * (rounds * first + generated * each)
        return first + generated * (each + others), busy / (batch * self.context)


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

    def per_token(said):
        return Server(said, shape, context).least(1)[1]

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
        seconds = train(said["training"]) / (said["training_mfu"] * serving["attention_flops"])
        served = said["served_tokens"] * per_token(serving) if said["served_tokens"] else 0.0
        return (seconds + served) * serving["usd_per_hour"] / 3600

    return {
        "z": z, "memory": memory, "flops": flops, "train": train, "lifetime": lifetime,
        "latency": lambda said: Server(said["serving"], shape, context).least(0)[0],
        "throughput": lambda said: per_token(said["serving"]),
        "price": lambda said: 1e6 * per_token(said["serving"]) * said["serving"]["usd_per_hour"] / 3600,
    }[said["cost"]](said)  # fmt: skip


@pytest.mark.parametrize(("cost", "settings"), SETTINGS)
def test_the_description_is_enough_to_compute_the_cost(cost, settings):
    objective = make(cost, **settings)
    said = json.loads(json.dumps(objective.describe()))
    assert [said[name] for name in ("cost", "label", "unit")] == [cost, objective.label, objective.unit]
    for context in (1024, T):
        found = objective(SHAPE, context)
        assert math.isfinite(found)
        assert computed(said, SHAPE, context) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("settings", [{"parallelism": "tensor"}, {"batch": 2000}, {"ttft": 0.1}, {"tpot": 1e-3}], ids=str)
def test_the_description_says_also_what_can_not_be(settings):
    few = costs.Shape(42.6, 2400.0, 4, 1)
    objective = make("price", device="v5e", n_devices=8, **settings)
    assert computed(json.loads(json.dumps(objective.describe())), few, T) == objective(few, T) == math.inf


@pytest.mark.parametrize("heads", [(6, 3), (12, 3), (24, 6), (40, 5)])
def test_the_description_is_enough_for_heads_that_devices_share_unevenly(heads):
    objective = make("latency", device="h200", n_devices=2, parallelism="tensor", batch=3)
    shape = costs.Shape(30, 1920, *heads)
    assert computed(objective.describe(), shape, T) == pytest.approx(objective(shape, T), rel=1e-12)


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
    assert [Lifetime(1e12).unit, Lifetime(1e12, serving=RooflineServing("h200")).unit] == ["FLOPs", "US dollars"]


def test_the_price_of_a_token_is_the_time_of_devices():
    settings = {"device": "v6e", "batch": 16, "n_devices": 4, "parallelism": "tensor"}
    latency, throughput, price = (make(cost, **settings)(SHAPE, T) for cost in ("latency", "throughput", "price"))
    assert throughput == pytest.approx(4 * latency / (16 * T))
    assert price == pytest.approx(1e6 * throughput * 2.70 / 3600)


@pytest.mark.parametrize("cost", ["price", "lifetime"])
def test_dollars_need_a_price(cost):
    mine = dataclasses.replace(CHIPS["h100"], name="mine", prices=())
    tokens = {"served_tokens": 1e9} if cost == "lifetime" else {}
    with pytest.raises(ValueError, match="'mine' has no list price: give usd_per_hour"):
        make(cost, device=mine, **tokens)
    assert make(cost, device=mine, usd_per_hour=1.0, **tokens).unit == "US dollars"


class TestSettled:
    SHAPES = costs.Shape(np.array([20, 60]), np.array([1024, 6144]), np.array([16, 48]), np.array([8, 8]))

    @pytest.mark.parametrize(("cost", "by"), [("latency", "latency"), ("throughput", "price"), ("price", "price")])
    def test_the_layout_is_that_which_costs_the_least_by_the_same_measure(self, cost, by):
        objective = make(cost, device="h100", n_devices=8)
        assert objective.by == by
        fixed = objective.settled(self.SHAPES, T)
        for found, best in zip(fixed.serving.parallelism, objective.serving.load(self.SHAPES, T, by).layout, strict=True):
            np.testing.assert_array_equal(found, best)
        np.testing.assert_array_equal(fixed(self.SHAPES, T), objective(self.SHAPES, T))

    def test_a_lifetime_is_settled_by_its_price(self):
        objective = make("lifetime", served_tokens=1e12, device="h100", n_devices=8)
        assert objective.by == "price"
        np.testing.assert_array_equal(objective.settled(self.SHAPES, T)(self.SHAPES, T), objective(self.SHAPES, T))

    def test_other_sizes_keep_the_layout(self):
        objective = make("latency", device="h100", n_devices=8).settled(self.SHAPES, T)
        free = make("latency", device="h100", n_devices=8)
        swapped = costs.Shape(**{name: value[::-1] for name, value in _arrays(self.SHAPES)}, vocab_size=50_304, head_dim=64)
        assert (objective(swapped, 4096) >= free(swapped, 4096)).all()
        assert (objective(swapped, 4096) > free(swapped, 4096)).any()

    def test_what_leaves_nothing_open_stays_as_it_is(self):
        for objective in (make("z"), make("lifetime", served_tokens=1e12), make("price", device="h100", parallelism="tensor")):
            assert objective.settled(self.SHAPES, T) is objective


def _arrays(shape):
    return [(name, getattr(shape, name)) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads")]


def test_training_tokens():
    count = costs.count_params(SHAPE, "exact").non_embedding
    assert Training()(SHAPE, T) == costs.train_flops(SHAPE, T, 20 * count)
    assert Training(tokens=1e9, train_context=8192)(SHAPE, T) == costs.train_flops(SHAPE, 8192, 1e9)


def test_a_lifetime_goes_from_training_to_serving():
    context = 8192
    forward = costs.forward_flops(SHAPE, context / 2).total
    assert Lifetime(0)(SHAPE, context) == Training()(SHAPE, context)
    assert Lifetime(1e13)(SHAPE, context) - Lifetime(0)(SHAPE, context) == pytest.approx(1e13 * forward)
    serving = RooflineServing("h200", batch=8)
    dollars = [Lifetime(tokens, serving=serving, training_mfu=0.5)(SHAPE, context) for tokens in (0, 1e12)]
    assert dollars[0] == pytest.approx(Training()(SHAPE, context) / (0.5 * 989e12) * 10.4365 / 3600)
    assert dollars[1] - dollars[0] == pytest.approx(1e6 * serving.usd_per_million_tokens(SHAPE, context))


@pytest.mark.parametrize("device", ["h200", "v5e"])
def test_training_reaches_what_was_measured_of_the_class_of_device(device):
    lifetime = Lifetime(1e12, serving=RooflineServing(device))
    assert lifetime.mfu == lifetime.describe()["training_mfu"] == hardware.trained_mfu(CHIPS[device])
    assert Lifetime(1e12).mfu is None


def test_settings_reach_their_part_and_none_is_the_default():
    assert make("z", lam=0.5, alpha=None, flops=None) == Z(lam=0.5)
    assert make("latency", device="h200", batch=None).serving == RooflineServing("h200")
    lifetime = make("lifetime", served_tokens=1e12, device="v5e", batch=2, tokens_per_param=30)
    assert lifetime == Lifetime(1e12, Training(tokens_per_param=30), RooflineServing("v5e", batch=2))
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
        ("lifetime", {"served_tokens": 1e12, "training_mfu": 0.4}, "training_mfu = 0.4 given without a device"),
        ("lifetime", {"served_tokens": 1e12, "device": "h200", "training_mfu": 1.2}, "training_mfu = 1.2: a share of the peak"),
        ("lifetime", {"served_tokens": 1e12, "device": "h200", "training_mfu": 0.0}, "training_mfu = 0.0: a share of the peak"),
    ],
)
def test_what_can_not_be_minimised_is_refused(cost, settings, message):
    with pytest.raises(ValueError, match=message):
        make(cost, **settings)


@dataclasses.dataclass(frozen=True)
class Layers(objectives.Objective):
    """A cost that nobody has: the number of layers to a power."""

    power: float = 1.0

    name = "layers"
    heading = "deep"
    choice = "layers"
    label = "number of layers"
    unit = "layers"

    def __call__(self, shape, context):
        return np.asarray(shape.n_layers, np.float64) ** self.power

    def describe(self):
        return super().describe() | {"power": self.power}


def test_a_further_cost_is_a_class_and_a_line(monkeypatch):
    """It is made, searched, said and shown like the others, without a word of it anywhere else."""
    monkeypatch.setitem(OBJECTIVES, "layers", f"{__name__}.Layers")
    with pytest.raises(ValueError, match="powr = 2: unknown, did you mean 'power'"):
        make("layers", powr=2)
    with pytest.raises(ValueError, match="cost 'z' has no use for it"):
        make("z", power=2)
    goal = make("layers", power=2.0)
    answer = optimum.search(presets.load("paper"), 2.615, T, goal, aspect="paper", draws=0)
    assert answer.cost == pytest.approx(answer.n_layers**2)
    assert answer.candidates["cost"].is_monotonic_increasing
    assert "cost is the number of layers" in words.headline(answer)
    table = answers.candidates(answer)
    assert "deep" in table.headings
    assert table.rows[0][table.headings.index("deep")] == formatting.amount(answer.cost, "layers")
    assert json.loads(json.dumps(answer.to_dict()))["objective"]["power"] == 2.0
