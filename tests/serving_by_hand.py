"""What serving a model costs, counted by hand: device by device, matrix by matrix, message by message.

The independent count that `gqa_jax.search.roofline` is compared with (`tests/test_serving_by_hand.py`). It takes nothing from
the package. Formulas are not copied either: which key/value heads a device needs is read off the list of its query heads, the
bytes it sends off the chunks that a ring passes on, the work of a prefill off the area of a causal triangle. Numbers of
devices are literals, so that no row of `hardware/chips.py` moves a result. Integer splits are not rounded: 2048 columns over 3
devices are 682.67 each.

Layout: device (i_t, i_p, i_c) of t p c. Its group is the t c devices that share i_p. Feed-forward network and unembedding are
split over all t p c; query and output projections over the group; key and value projections follow the query heads. In prefill
with c > 1 a device has a c-th of the prompt for all its heads, but holds a c-th of their query and output projections: the rest
is gathered over c and read, in every layer.

What is simplified, as in `roofline`, unless a case names it in `besides`:

embedding     one that is split over the vocabulary gives partial sums, a reduce-scatter over all devices before the first
              layer; and rows are gathered over all of them once more before the logits
rings         where it does not, chunks differ, and the device that sends the most sends more than the mean
first token   a prefill ends with logits of the last position
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

ACTIVATION = 2  # bytes: activations travel in bfloat16
LOG_SUM_EXP = 4  # bytes: one float32 for a head's part of a softmax
WEIGHT_BYTES = {"bfloat16": 2, "float8": 1, "int8": 1}


#: What can be named in `Case.besides`.
BESIDES = ("embedding", "rings", "first token")


class Model(NamedTuple):
    """A decoder with gated feed-forward layers (three matrices) and two norms a layer."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    untied: bool


class Device(NamedTuple):
    """FLOP/s by dtype, bytes/s of memory, bytes, bytes/s of the links, all-reduce seconds by number of devices, USD an hour."""

    flops: dict[str, float]
    bandwidth: float
    memory: float
    links: float
    all_reduce: dict[int, float]
    usd: float
    attention_share: dict[int, float]  # of the bfloat16 FLOP/s, by head size


class Shares(NamedTuple):
    """What is reached: of FLOP/s in matrices, of FLOP/s in attention, of bandwidth twice, seconds a layer, of the links."""

    matmul: float = 1.0
    attention: float = 1.0
    weights: float = 1.0
    cache: float = 1.0
    layer_seconds: float = 0.0
    links: float = 1.0


class Case(NamedTuple):
    """A question: `batch` requests of `context` tokens at once, a `share` of them generated. `shares` None: the bound."""

    model: Model
    device: Device
    layout: tuple[int, int, int]
    batch: int
    context: int
    share: float = 0.1
    weights: str = "bfloat16"
    cache: str = "bfloat16"
    shares: Shares | None = None
    disaggregated: bool = False
    besides: frozenset[str] = frozenset()  # what is not simplified: names of the module's docstring

    @property
    def n_devices(self) -> int:
        return math.prod(self.layout)

    @property
    def prompt(self) -> float:
        return (1 - self.share) * self.context

    @property
    def generated(self) -> float:
        return self.share * self.context


class Place(NamedTuple):
    """A device of the layout and what of attention is on it."""

    at: tuple[int, int, int]
    heads: list[int]
    kv_heads: list[int]
    sequences: list[int]
    context: float  # share of every sequence's positions


def places(case: Case) -> list[Place]:
    """Every device: its query heads in order, the key/value heads that these read, sequences dealt out one by one."""
    t, p, c = case.layout
    model = case.model
    assert model.heads % t == 0
    assert case.batch >= p
    readers = model.heads // model.kv_heads  # query head h reads key/value head h // readers
    found = []
    for i_t, i_p, i_c in itertools.product(range(t), range(p), range(c)):
        heads = [h for h in range(model.heads) if h // (model.heads // t) == i_t]
        kv_heads = sorted({h // readers for h in heads})
        sequences = [s for s in range(case.batch) if s % p == i_p]
        found.append(Place((i_t, i_p, i_c), heads, kv_heads, sequences, 1 / c))
    return found


class Matrix(NamedTuple):
    """A product's parameters: rows x columns, and what their number is divided by: query heads, key/value heads, or devices."""

    name: str
    rows: int
    columns: int
    split: str  # "heads", "kv_heads", "devices", "copied"


def layer_matrices(model: Model) -> list[Matrix]:
    """One layer's. A norm's scale is a matrix of one row that every device has."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return [
        Matrix("norm before attention", 1, model.width, "copied"),
        Matrix("query", model.width, queries, "heads"),
        Matrix("key", model.width, keys, "kv_heads"),
        Matrix("value", model.width, keys, "kv_heads"),
        Matrix("output", queries, model.width, "heads"),
        Matrix("norm before feed-forward", 1, model.width, "copied"),
        Matrix("gate", model.width, model.ffn, "devices"),
        Matrix("up", model.width, model.ffn, "devices"),
        Matrix("down", model.ffn, model.width, "devices"),
    ]


def end_matrices(model: Model) -> list[Matrix]:
    """What stands after the layers. A tied unembedding is the embedding too."""
    return [
        Matrix("last norm", 1, model.width, "copied"),
        Matrix("unembedding", model.width, model.vocabulary, "devices"),
    ]


def held(case: Case, place: Place, matrix: Matrix) -> float:
    """Parameters of a matrix on a device."""
    _, _, c = case.layout
    size = matrix.rows * matrix.columns
    match matrix.split:
        case "heads":
            return size / case.model.heads * len(place.heads) / c
        case "kv_heads":
            return size / case.model.kv_heads * len(place.kv_heads)
        case "devices":
            return size / case.n_devices
    return size


def cache_bytes(dtype: str, head_dim: int) -> float:
    """Bytes of one position of one head's key or value, with scales."""
    scale = 2  # bytes
    return {
        "bfloat16": 2 * head_dim,
        "float8": head_dim,
        "int8": head_dim + scale,
        "int4": head_dim // 2 + head_dim // 32 * scale,
    }[dtype]


# Messages. Each function: the bytes that every device of a ring sends, from the bytes of the chunk that each has or is to get.


def ring_all_gather(chunks: list[float]) -> list[float]:
    """Device i passes on its own chunk, then in every step the one that it has just received: all but its successor's."""
    n = len(chunks)
    return [sum(chunks[(i - step) % n] for step in range(n - 1)) for i in range(n)]


def ring_reduce_scatter(chunks: list[float]) -> list[float]:
    """Device i ends with the sum of chunk i: it passes on every other chunk's partial sum once."""
    n = len(chunks)
    return [sum(chunks[(i - 1 - step) % n] for step in range(n - 1)) for i in range(n)]


def all_to_all(parts: list[list[float]]) -> list[float]:
    """Device i sends part j to device j."""
    return [sum(part for j, part in enumerate(row) if j != i) for i, row in enumerate(parts)]


class Message(NamedTuple):
    """One exchange: bytes that a device sends, seconds that it takes whatever the bytes."""

    name: str
    sent: float
    waited: float


def _message(case: Case, name: str, sent: list[float]) -> Message:
    """Of one group's devices. An all-gather or a reduce-scatter waits half of an all-reduce."""
    bytes_sent = max(sent) if "rings" in case.besides else sum(sent) / len(sent)
    return Message(name, bytes_sent, seconds_of_all_reduce(case, len(sent)) / 2)


def seconds_of_all_reduce(case: Case, n: int) -> float:
    return 0.0 if n == 1 else case.device.all_reduce[n]


def groups(case: Case, axis: str) -> list[list[Place]]:
    """Devices that exchange: over "t", over "c", over "tc" (an attention group), over "tpc" (all)."""
    fixed = [i for i, name in enumerate("tpc") if name not in axis]
    by: dict[tuple[int, ...], list[Place]] = {}
    for place in places(case):
        by.setdefault(tuple(place.at[i] for i in fixed), []).append(place)
    return list(by.values())


def _over(case: Case, axis: str, name: str, count: Callable[[list[Place]], list[float]]) -> Message:
    """Of the group that sends the most."""
    return max((_message(case, name, count(group)) for group in groups(case, axis)), key=lambda message: message.sent)


def decode_messages(case: Case) -> tuple[list[Message], list[Message]]:
    """Of a decode step: one layer's, in order, and those of the whole step."""
    model = case.model
    row = model.width * ACTIVATION
    t, _, c = case.layout

    def rows(group: list[Place]) -> list[float]:  # each device's chunk of its group's sequences
        return [len(place.sequences) * row / (t * c) for place in group]

    def queries(group):  # a c-th of the heads' queries each
        return [len(x.sequences) * len(x.heads) / c * model.head_dim * ACTIVATION for x in group]

    def parts(group):  # a device has all its heads' results over its positions; device j merges a c-th of the heads
        head = model.head_dim * ACTIVATION + LOG_SUM_EXP
        return [[len(x.sequences) * len(x.heads) / c * head for _ in group] for x in group]

    layer = [
        _over(case, "tc", "rows to the group", lambda group: ring_all_gather(rows(group))),
        _over(case, "c", "queries over the context", lambda group: ring_all_gather(queries(group))),
        _over(case, "c", "parts of the softmax", lambda group: all_to_all(parts(group))),
        _over(case, "tc", "sums of the output projection", lambda group: ring_reduce_scatter(rows(group))),
        _over(case, "tpc", "rows to all", lambda group: ring_all_gather(rows(group))),
        _over(case, "tpc", "sums of the feed-forward network", lambda group: ring_reduce_scatter(rows(group))),
    ]
    once = [Message("which token is the likeliest", 0.0, seconds_of_all_reduce(case, case.n_devices))]
    if "embedding" in case.besides:
        once.append(_over(case, "tpc", "sums of the embedding", lambda group: ring_reduce_scatter(rows(group))))
        once.append(_over(case, "tpc", "last rows", lambda group: ring_all_gather(rows(group))))
    return layer, once


def prefill_messages(case: Case, tokens: float, prompts: int) -> tuple[list[Message], list[Message]]:
    """Of a prefill, a prompt for each of `prompts` groups, a c-th of its positions on each device: a layer's, the whole's.

    Rows of groups without a prompt aren't sent; those that have one are busy all the same.
    """
    model = case.model
    row = model.width * ACTIVATION
    t, p, _ = case.layout

    def chunks(group: list[Place]) -> list[float]:
        return [tokens * place.context / t * row for place in group]

    def to_all(group):
        return [chunk * prompts / p for chunk in chunks(group)]

    def keys_and_values(group):
        return [2 * len(x.kv_heads) * model.head_dim * ACTIVATION * tokens * x.context for x in group]

    def projections(group):
        wide = (matrix for matrix in layer_matrices(model) if matrix.split == "heads")
        size = sum(held(case, group[0], matrix) for matrix in wide) * WEIGHT_BYTES[case.weights]
        return [size for _ in group]

    layer = [
        _over(case, "t", "rows to the heads", lambda group: ring_all_gather(chunks(group))),
        _over(case, "c", "keys and values over the context", lambda group: ring_all_gather(keys_and_values(group))),
        _over(case, "t", "sums of the output projection", lambda group: ring_reduce_scatter(chunks(group))),
        _over(case, "tpc", "rows to all", lambda group: ring_all_gather(to_all(group))),
        _over(case, "tpc", "sums of the feed-forward network", lambda group: ring_reduce_scatter(to_all(group))),
    ]
    once = []
    layer.append(_over(case, "c", "query and output projections", lambda group: ring_all_gather(projections(group))))
    if "embedding" in case.besides:
        once.append(_over(case, "tpc", "sums of the embedding", lambda group: ring_reduce_scatter(to_all(group))))
    if "first token" in case.besides:
        once.append(Message("which token is the likeliest", 0.0, seconds_of_all_reduce(case, case.n_devices)))
    return layer, once


def exchanged(model: Model, messages: tuple[list[Message], list[Message]]) -> tuple[float, float]:
    """Bytes sent and seconds waited in a phase."""
    layer, once = messages
    return tuple(
        model.layers * sum(getattr(m, what) for m in layer) + sum(getattr(m, what) for m in once) for what in ("sent", "waited")
    )


class Count(NamedTuple):
    """What one phase asks of the busiest device: FLOPs, bytes of its memory, bytes sent, seconds waited."""

    matmul: float
    attention: float
    weights: float
    cache: float
    sent: float
    waited: float


def read_weights(case: Case, place: Place, ends: bool = True) -> float:
    """Bytes of parameters that a device reads in a phase; the unembedding where there are logits. Norms count as the rest."""
    model = case.model
    parameters = sum(model.layers * held(case, place, matrix) for matrix in layer_matrices(model))
    parameters += sum(held(case, place, matrix) for matrix in end_matrices(model) if ends or matrix.split == "copied")
    return parameters * WEIGHT_BYTES[case.weights]


def cached(case: Case, place: Place, tokens: float) -> float:
    """Bytes of one sequence's keys and values on a device."""
    model = case.model
    return model.layers * 2 * len(place.kv_heads) * tokens * place.context * cache_bytes(case.cache, model.head_dim)


def decode(case: Case, keys: float) -> Count:
    """A step that generates one token of each of the batch's sequences, each reading `keys` positions."""
    model = case.model
    counts = []
    for place in places(case):
        own = len(place.sequences)
        matmul = 0.0
        for matrix in layer_matrices(model):
            if matrix.split != "copied":
                rows = case.batch if matrix.split == "devices" else own
                matmul += model.layers * 2 * rows * held(case, place, matrix)
        matmul += 2 * case.batch * held(case, place, end_matrices(model)[1])
        # A head's row of scores: a product of head_dim numbers for every key; its result: as many again.
        attention = model.layers * own * len(place.heads) * keys * place.context * (2 * model.head_dim + 2 * model.head_dim)
        counts.append((matmul, attention, read_weights(case, place), own * cached(case, place, keys)))
    busiest = (max(part) for part in zip(*counts, strict=True))
    return Count(*busiest, *exchanged(model, decode_messages(case)))


def triangle(tokens: float, c: int, i_c: int) -> float:
    """Pairs of a query and a key not after it, on device i_c of c: chunks i_c and 2 c - 1 - i_c of 2 c chunks of queries."""
    chunk = tokens / (2 * c)

    def area(i):  # a query at y sees y keys
        return ((i + 1) * chunk) ** 2 / 2 - (i * chunk) ** 2 / 2

    return area(i_c) + area(2 * c - 1 - i_c)


def prefill(case: Case, tokens: float, prompts: int | None = None) -> Count:
    """Reads one prompt for each of `prompts` groups (default all) at once."""
    model = case.model
    _, p, c = case.layout
    prompts = p if prompts is None else prompts
    if tokens == 0:
        return Count(*6 * (0.0,))
    logits = "first token" in case.besides
    counts = []
    for place in places(case):
        own = tokens * place.context  # of the group's prompt
        matmul = 0.0
        weights = read_weights(case, place, ends=logits)
        for matrix in layer_matrices(model):
            match matrix.split:
                case "devices":
                    matmul += model.layers * 2 * prompts * tokens * held(case, place, matrix)
                case "heads":  # all of its heads for its own tokens
                    matmul += model.layers * 2 * own * c * held(case, place, matrix)
                    weights += model.layers * (c - 1) * held(case, place, matrix) * WEIGHT_BYTES[case.weights]
                case "kv_heads":
                    matmul += model.layers * 2 * own * held(case, place, matrix)
        if logits:
            matmul += 2 * prompts * held(case, place, end_matrices(model)[1])
        pairs = triangle(tokens, c, place.at[2])
        attention = model.layers * len(place.heads) * pairs * 4 * model.head_dim
        counts.append((matmul, attention, weights, cached(case, place, tokens)))
    busiest = (max(part) for part in zip(*counts, strict=True))
    return Count(*busiest, *exchanged(model, prefill_messages(case, tokens, prompts)))


def seconds(case: Case, count: Count) -> float:
    """The bound: the slowest of three, at their peaks. The expectation: all parts one after another, each at its share.

    Matrices are multiplied in the dtype of the parameters where the device has units for it. Attention multiplies queries
    with the cache: its dtype, whatever the parameters' is, says what a server could compute it in. Shares of attention are of
    bfloat16, as kernels are measured.
    """
    device, shares = case.device, case.shares
    peak = device.flops.get(case.weights, device.flops["bfloat16"])
    exchange = count.sent / device.links + count.waited
    if shares is None:
        return max(
            count.matmul / peak + count.attention / device.flops.get(case.cache, device.flops["bfloat16"]),
            (count.weights + count.cache) / device.bandwidth,
            exchange,
        )
    if not any(count):
        return 0.0
    attention_flops = device.flops["bfloat16"] * device.attention_share[case.model.head_dim]
    return (
        count.matmul / (shares.matmul * peak)
        + count.attention / (shares.attention * attention_flops)
        + count.weights / (shares.weights * device.bandwidth)
        + count.cache / (shares.cache * device.bandwidth)
        + exchange / shares.links
        + shares.layer_seconds * case.model.layers
    )


def memory(case: Case) -> float:
    """Bytes on the fullest device while every slot is at its last token."""

    def on(place):
        table = case.model.vocabulary * case.model.width * WEIGHT_BYTES[case.weights] / case.n_devices
        caches = len(place.sequences) * cached(case, place, case.context)
        return read_weights(case, place) + (table if case.model.untied else 0.0) + caches

    return max(on(place) for place in places(case))


class Bill(NamedTuple):
    """Seconds, USD, bytes; None where there are no such tokens."""

    prefill: float
    decode: float
    ttft: float | None
    tpot: float | None
    request: float
    usd_input: float | None  # a million tokens
    usd_output: float | None
    usd: float
    memory: float


def bill(case: Case) -> Bill:
    """A cycle of a full replica, in which the batch's requests are served once each.

    Prompts are read p at a time, one in each group, as they come, whatever the cycle in which their requests began. Who pays
    what is read off the cycle, not off a formula.
    """
    _, p, _ = case.layout
    read = seconds(case, prefill(case, case.prompt))
    step = seconds(case, decode(case, (case.prompt + case.context) / 2))  # the mean of first and last
    generating = case.generated * step
    reading = case.batch / p * read  # seconds of a cycle, as is `generating`
    # A request that generates is in its slot for a whole cycle; one that doesn't ends with its own prefill. Elsewhere
    # (disaggregated) nobody's prefill is in the way.
    request = read if case.disaggregated or not case.generated else reading
    request += generating
    tpot = (request - read) / case.generated if case.generated else None
    per_second = case.n_devices * case.device.usd / 3600
    usd_input, usd_output = per_second * reading / case.batch, per_second * generating / case.batch  # of a request
    return Bill(
        prefill=read,
        decode=step,
        ttft=read if case.prompt else None,
        tpot=tpot,
        request=request,
        usd_input=1e6 * usd_input / case.prompt if case.prompt else None,
        usd_output=1e6 * usd_output / case.generated if case.generated else None,
        usd=1e6 * (usd_input + usd_output) / case.context,
        memory=memory(case),
    )


# Literals. Models: Llama 3's published configurations; shapes of arXiv 2503.09579v2, Tables 7 and 9, with d_h 64 and GPT-2's
# vocabulary padded to 50,304. Devices: vendors' data sheets (dense FLOP/s, GB), list prices of 2026, seconds of an all-reduce
# as published or, of TPUs, 1 us a hop; a number of devices that nothing is published for has the next larger one's.

MODELS = {
    "Llama 3 8B": Model(32, 4096, 32, 8, 128, 14336, 128256, untied=True),
    "Llama 3 70B": Model(80, 8192, 64, 8, 128, 28672, 128256, untied=True),
    "(8,1)": Model(36, 2048, 8, 1, 64, 5472, 50304, untied=False),
    "(32,8)": Model(36, 1536, 32, 8, 64, 4096, 50304, untied=False),
    "(4,4)": Model(36, 1536, 4, 4, 64, 4096, 50304, untied=False),
    "(32,32)": Model(36, 2048, 32, 32, 64, 5472, 50304, untied=False),
    "(12,4)": Model(12, 768, 12, 4, 64, 2048, 50304, untied=False),
    "(12,3)": Model(12, 768, 12, 3, 64, 2048, 50304, untied=False),
}

_HOPPER = {64: 538 / 989, 128: 645 / 989}
_HOPPER_WAIT = {2: 3.7e-6, 3: 3.7e-6, 4: 3.7e-6, 8: 5.7e-6}
_TORUS_WAIT = {2: 2e-6, 4: 4e-6, 8: 6e-6, 16: 8e-6}
_BLACKWELL = {"bfloat16": 2250e12, "float8": 4500e12, "int8": 4500e12}
_HOPPER_FLOPS = {"bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12}

DEVICES = {
    "h100": Device(_HOPPER_FLOPS, 3.35e12, 80e9, 450e9, _HOPPER_WAIT, 3.99, _HOPPER),
    "h200": Device(_HOPPER_FLOPS, 4.8e12, 141e9, 450e9, _HOPPER_WAIT, 10.4365, _HOPPER),
    "b200": Device(_BLACKWELL, 8e12, 180e9, 900e9, {2: 5.18e-6, 4: 5.18e-6, 8: 7e-6}, 6.69, _HOPPER),
    "v5e": Device({"bfloat16": 197e12, "int8": 394e12}, 819e9, 16 * 2**30, 200e9, _TORUS_WAIT, 1.20, {64: 0.636, 128: 0.964}),
    "v6e": Device({"bfloat16": 918e12, "int8": 1836e12}, 1640e9, 32 * 2**30, 400e9, _TORUS_WAIT, 2.70, {64: 0.239, 128: 0.419}),
}

_K = 1024


def ask(model: str, device: str, layout: tuple[int, int, int], batch: int, context: int, **rest) -> Case:
    return Case(MODELS[model], DEVICES[device], layout, batch, context, **rest)


CASES = {
    "Llama 8B alone": ask("Llama 3 8B", "h100", (1, 1, 1), 1, 8 * _K),
    "Llama 8B, fewer key/value heads than t": ask("Llama 3 8B", "v5e", (16, 1, 1), 8, 128 * _K, cache="int8"),
    "Llama 70B, t, float8, half generated": ask("Llama 3 70B", "h100", (8, 1, 1), 8, 8 * _K, share=0.5, weights="float8"),
    "Llama 70B, t c, int4": ask("Llama 3 70B", "h200", (4, 1, 2), 8, 128 * _K, cache="int4", disaggregated=True),
    "Llama 70B, t p, 30 requests over 4": ask("Llama 3 70B", "b200", (2, 4, 1), 30, 8 * _K, weights="float8"),
    "Llama 8B, t p c, 30 requests over 4, no float8 unit": ask(
        "Llama 3 8B", "v6e", (2, 4, 2), 30, 128 * _K, weights="float8", cache="int8"
    ),
    "Llama 8B, p, all generated": ask("Llama 3 8B", "h200", (1, 8, 1), 64, 128 * _K, share=1.0, cache="int8"),
    "one key/value head, t": ask("(8,1)", "h200", (8, 1, 1), 64, 128 * _K),
    "one key/value head, c, nothing generated": ask("(8,1)", "v5e", (1, 1, 8), 8, 1024 * _K, share=0.0),
    "c, a million tokens": ask("(32,8)", "v6e", (1, 1, 4), 1, 1024 * _K, share=0.5),
    "p": ask("(32,8)", "h100", (1, 8, 1), 64, 8 * _K),
    "t p c, 9 requests over 2": ask("(32,8)", "h100", (2, 2, 2), 9, 8 * _K, disaggregated=True),
    "t is n_kv": ask("(4,4)", "v5e", (4, 1, 1), 8, 128 * _K, cache="int8"),
    "as many key/value heads, t p c": ask("(32,32)", "b200", (2, 2, 2), 8, 128 * _K, weights="float8", cache="int4"),
    "3 devices": ask("(12,4)", "h100", (3, 1, 1), 1, 8 * _K),
    "3 key/value heads over 2": ask("(12,3)", "v5e", (2, 2, 1), 30, 8 * _K, weights="int8", cache="int8"),
}

#: None: the bound. Peaks one after another; what servers reached; a part each that limits.
SHARES = {
    "bound": None,
    "peaks": Shares(),
    "servers": Shares(0.665, 0.92, 0.84, 0.95, 5.8e-5, 0.61),
    "slow matrices": Shares(0.3, 0.8, 0.9, 0.5, 1e-6, 1.0),
}
