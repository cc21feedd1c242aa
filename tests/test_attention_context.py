"""Attention over a context axis against one device, its collectives and its work counted, and compiled for a TPU slice."""

import collections
import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gqa_jax import attention, config
from gqa_jax.attention import conformance, context, dispatch, xla
from gqa_jax.attention.vjp import Kernel
from tests import machines

METHODS = ["gather", "ring"]
NAMES = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
NOTHING = jax.checkpoint_policies.nothing_saveable
SHARDS = PartitionSpec("data", "context")


def mesh_of(size, data=1):
    devices = np.array(jax.devices()[: data * size]).reshape(data, size)
    return Mesh(devices, ("data", "context"), axis_types=(AxisType.Auto, AxisType.Auto))


def shards(f, size, data=1):
    """f of local shards, as a function of global arrays."""
    return jax.shard_map(f, mesh=mesh_of(size, data), in_specs=SHARDS, out_specs=SHARDS, check_vma=False)


def step(size, *, policy=None, **how):
    """(q, k, v, d_out, segment_ids) -> output and gradients to q, k, v, as a device computes them of its shards."""

    def run(q, k, v, d_out, segment_ids=None):
        attend = functools.partial(attention.context_attention, axis="context", size=size, segment_ids=segment_ids, **how)
        attend = jax.checkpoint(attend, policy=policy) if policy else attend
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run


def arrays(heads, n_kv, length, *, batch=1, head_dim=8, dtype=jnp.float32, segments=False, seed=0):
    """q, k, v, d_out and segments of documents that end anywhere, shards' borders not excepted."""
    rng = np.random.default_rng(seed)
    values = [jnp.asarray(rng.normal(size=(batch, length, n, head_dim)), dtype) for n in (heads, n_kv, n_kv, heads)]
    return *values, jnp.asarray(np.sort(rng.integers(0, 5, size=(batch, length)), axis=1), jnp.int32) if segments else None


def run(case, size, data=1, **how):
    """`step` over devices, of arrays in the order of the sequence; results too."""
    order = attention.zigzag(case[0].shape[1], size)
    spread = (None if x is None else x[:, order] for x in case)
    results = jax.jit(shards(step(size, **how), size, data))(*spread)
    return [np.asarray(x)[:, np.argsort(order)] for x in results]


def exact(case):
    q, k, v, d_out, ids = case
    grouped = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    q, d_out, known = q.reshape(grouped), d_out.reshape(grouped), {"q_segments": ids, "kv_segments": ids}
    out, dq, dk, dv = conformance.exact(q, k, v, **known)[0], *conformance.exact_gradients(q, k, v, d_out, **known)
    return out.reshape(case[0].shape), dq.reshape(case[0].shape), dk, dv


@functools.cache
def answers(heads, n_kv, length, *, segments=False, **kind):
    """A case, and its results in float64 and from one device."""
    case = arrays(heads, n_kv, length, segments=segments, **kind)
    return case, exact(case), run(case, 1)


# The order of positions.


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 16), st.integers(1, 9))
def test_zigzag_gives_each_device_a_block_from_the_front_and_one_from_the_back(size, block):
    order = attention.zigzag(2 * size * block, size)
    assert sorted(order) == list(range(2 * size * block))
    if size == 1:
        assert list(order) == sorted(order)
    blocks = np.arange(2 * size * block).reshape(2 * size, block)
    for i, shard in enumerate(np.split(order, size)):
        np.testing.assert_array_equal(shard, np.concatenate([blocks[i], blocks[2 * size - 1 - i]]))
    pairs = [int((shard + 1).sum()) for shard in np.split(order, size)]  # keys that a device's queries see
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("size", [1, 2, 8])
def test_positions_are_those_of_zigzag(size):
    found = jax.jit(shards(lambda x: attention.positions(x.shape[1], "context", size)[None], size))(jnp.zeros((1, 48)))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[0], attention.zigzag(48, size))


# Numbers.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "data", "heads", "segments"),
    [
        (2, 1, (8, 1), True), (4, 2, (4, 4), False), (3, 1, (4, 2), True), (8, 1, (8, 2), True), (8, 1, (8, 1), False),
    ],
)  # fmt: skip
def test_equals_one_device_and_the_oracle(method, size, data, heads, segments):
    case, truths, alone = answers(*heads, 80 - 80 % (2 * size), batch=2, segments=segments)
    got = run(case, size, data, method=method)
    for name, mine, one, truth in zip(("out", "dq", "dk", "dv"), got, alone, truths, strict=True):
        np.testing.assert_allclose(mine, one, rtol=2e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(mine, truth, rtol=2e-5, atol=1e-5, err_msg=name)
    if segments:  # documents are no detail: without them, results are others
        everything = exact((*case[:4], None))
        assert all(np.abs(mine - other).max() > 0.1 for mine, other in zip(got, everything, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_error_in_bfloat16_is_that_of_one_device(method):
    case, truths, alone = answers(8, 1, 128, head_dim=16, dtype=jnp.bfloat16)
    for name, mine, one, truth in zip(("out", "dq", "dk", "dv"), run(case, 8, method=method), alone, truths, strict=True):
        errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (mine, one)]
        assert errors[0] <= 1.5 * errors[1], f"{name}: rms error {errors[0]:.3g}, of one device {errors[1]:.3g}"


def test_pallas_kernels_inside_shard_map():
    case = arrays(4, 2, 64, head_dim=16, segments=True)
    with attention.interpreted():
        got = run(case, 2, method="ring", implementation="pallas_tpu")
    for mine, truth in zip(got, exact(case), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=2e-5)


# Collectives, passes of kernels and memory, counted in the traced program.


@pytest.fixture
def calls(monkeypatch):
    """What `xla`'s kernel is made for and called with: cases, and (pass, query offset, shape of q, of k).

    Programs show the passes as `jit` equations of these names.
    """
    cases, passes = [], []

    def kernel(case, scale):
        cases.append(case)
        made = xla.kernel(case, scale)

        def forward(q, k, v, mask, *rest):
            passes.append(("forward", mask.q_offset, q.shape[:2], k.shape[:2]))

            def forward_pass(q, k, v):
                return made.forward(q, k, v, mask, *rest)

            return jax.jit(forward_pass)(q, k, v)

        def backward(q, k, v, lse, delta, d_out, mask, *rest):
            passes.append(("backward", mask.q_offset, q.shape[:2], k.shape[:2]))

            def backward_pass(*arrays):
                return made.backward(*arrays, mask, *rest)

            return jax.jit(backward_pass)(q, k, v, lse, delta, d_out)

        return Kernel(forward, backward, scale, made.options)

    monkeypatch.setitem(dispatch._ALL, "xla", dispatch.Implementation((dispatch.ANYWHERE,), kernel))
    return cases, passes


COUNTED = ("all_gather", "reduce_scatter", "ppermute", "psum", "all_to_all")


def counts(size, *, segments=False, **how):
    """How often a step runs each pass and each collective, loops multiplied out; elements that each collective is given."""
    case = arrays(8, 1, 32 * size, head_dim=16, segments=segments, dtype=jnp.bfloat16)
    times, given = collections.Counter(), {}

    def walk(jaxpr, repeated):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in COUNTED:
                operand = equation.invars[0].aval
                times[f"{name} {operand.dtype}"] += repeated
                given.setdefault(f"{name} {operand.dtype}", set()).add(operand.size)
            elif equation.params.get("name") in ("forward_pass", "backward_pass"):
                # a loop's constants are taken out of it, and keep the name
                times[equation.params["name"]] += repeated * (equation.outvars[0].aval.ndim == 5)
            else:
                repeats = repeated * (equation.params["length"] if name == "scan" else 1)
                for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                    if hasattr(value, "eqns"):
                        walk(value, repeats)

    walk(jax.make_jaxpr(shards(step(size, **how), size))(*case).jaxpr, 1)
    return dict(times), given


KV = 2 * 32 * 16  # elements of a device's keys and values


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("segments", [False, True])
def test_gather_is_one_all_gather_and_one_reduce_scatter(segments):
    times, given = counts(4, method="gather", segments=segments)
    segments = {"all_gather int32": 1} if segments else {}
    assert times == {
        "forward_pass": 2, "backward_pass": 2, "all_gather bfloat16": 1, "reduce_scatter float32": 1, **segments,
    }  # fmt: skip
    sizes = {"all_gather bfloat16": {KV}, "reduce_scatter float32": {4 * KV}}  # queries stay where they are
    assert given == sizes | ({"all_gather int32": {32}} if segments else {})


def test_gather_compiles_to_those_collectives():
    text = jax.jit(shards(step(4, method="gather"), 4)).lower(*arrays(8, 1, 80)[:4]).compile().as_text()
    found = re.findall(r" (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)\(", text)
    assert sorted(found) == ["all-gather", "reduce-scatter"]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("size", [2, 8])
def test_ring_hops_no_further_than_it_must(size):
    times, given = counts(size, method="ring")
    # keys and values visit all others, forward and backward; their gradients then go home
    hops = {"ppermute bfloat16": 2 * (size - 1), "ppermute float32": size}
    assert times == {"forward_pass": size, "backward_pass": size, **hops}
    assert given == {name: {KV} for name in hops}


def test_the_ring_program_does_not_grow_with_the_ring():
    def lines(size):
        return len(str(jax.make_jaxpr(shards(step(size, method="ring"), size))(*arrays(8, 1, 32 * size)[:4])).splitlines())

    assert lines(8) == lines(4)


@pytest.mark.usefixtures("calls")
def test_kept_by_name_attention_is_not_computed_again():
    def passes(method, policy):
        times, _ = counts(4, method=method, policy=policy)
        return times.pop("forward_pass"), times.pop("backward_pass"), times

    gradients = {"reduce_scatter float32": 1}
    assert passes("gather", NAMES) == (2, 2, {"all_gather bfloat16": 2, **gradients})  # keys and values are gathered again
    assert passes("gather", NOTHING) == (4, 2, {"all_gather bfloat16": 2, **gradients})
    gradients = {"ppermute float32": 4}
    assert passes("ring", NAMES) == (4, 4, {"ppermute bfloat16": 6, **gradients})  # as without rematerialisation
    assert passes("ring", NOTHING) == (8, 4, {"ppermute bfloat16": 9, **gradients})


@pytest.mark.parametrize(("method", "whole_keys"), [("gather", 1.5), ("ring", 0)])
@pytest.mark.parametrize("size", [2, 8])
def test_what_the_backward_pass_keeps(method, whole_keys, size):
    """Ring: q, k, v, the output and its log-sum-exp, all local. Gather: keys and values of the sequence, and of its half."""
    kept = {}

    def record(q, k, v, *_):
        attend = functools.partial(attention.context_attention, axis="context", size=size, method=method)
        _, pull = jax.vjp(attend, q, k, v)
        kept["elements"] = sum(x.size for x in jax.tree.leaves(pull) if x.ndim)
        return q

    jax.eval_shape(shards(record, size), *arrays(8, 1, 32 * size, head_dim=16)[:4])
    queries, keys = 32 * 8 * 16, 32 * 16
    local_keys = 2 * keys if method == "ring" else 0
    assert kept["elements"] == 2 * queries + 32 * 8 + local_keys + 2 * whole_keys * keys * size


# Which implementation runs, and on what.


def plan(case, size, method):
    q, k, *_, ids = case
    return attention.planned_case(
        batch=q.shape[0], length=q.shape[1] // size, n_heads=q.shape[2], n_kv_heads=k.shape[2], head_dim=q.shape[3],
        dtype=q.dtype, size=size, method=method, segments=ids is not None,
    )  # fmt: skip


def test_ring_computes_no_pair_of_blocks_in_vain(calls):
    """Own keys: one causal call. A visitor: two pairs of blocks, wholly visible, in one call; the other two are not computed.

    That no visible pair is left out is what equality with one device says.
    """
    case = arrays(4, 2, 80, batch=2, segments=True)
    jax.eval_shape(shards(step(4, method="ring"), 4), *case)
    own, visit = (0, (2, 20), (2, 20)), (10, (4, 10), (4, 10))  # the last key a query sees is q_offset or more
    assert calls[1] == [(name, *pair) for name in ("forward", "backward") for pair in (own, visit, visit)]
    assert calls[0] == [plan(case, 4, "ring")._replace(batch=2, length=20, keys=20, aligned=True), plan(case, 4, "ring")]


def test_gather_leaves_out_the_half_that_front_blocks_never_see(calls):
    case = arrays(4, 2, 80, batch=2, segments=True)
    jax.eval_shape(shards(step(4, method="gather"), 4), *case)
    assert [(q, k) for name, _, q, k in calls[1] if name == "forward"] == [((2, 10), (2, 40)), ((2, 10), (2, 80))]
    assert calls[0][1] == plan(case, 4, "gather")


def test_one_device_is_plain_attention(calls):
    case = arrays(4, 2, 30, segments=True)
    jax.eval_shape(shards(step(1, method="ring"), 1), *case)
    assert calls[0] == [plan(case, 1, "ring")]
    assert [shape for _, *shape in calls[1]] == [[0, (1, 30), (1, 30)]] * 2


def test_none_takes_the_best_that_can_run_it():
    case = arrays(8, 1, 64, dtype=jnp.bfloat16, head_dim=64)
    for method in METHODS:
        planned = plan(case, 4, method)
        assert attention.resolve(None, planned) == "xla"
        assert attention.resolve(None, planned._replace(platform="tpu", chip="TPU v5 lite")) == "pallas_tpu"
        assert attention.resolve(None, planned._replace(platform="gpu", chip="NVIDIA H200")) == "pallas_triton"
    alone = plan(case, 1, "ring")._replace(platform="gpu", chip="NVIDIA H200")
    assert attention.resolve(None, alone) == "cudnn"


def test_the_written_out_form_runs_where_it_can():
    case = arrays(4, 2, 32)
    for mine, truth in zip(run(case, 2, method="gather", implementation="reference"), exact(case), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "how", "message"),
    [
        (
            16,
            {"method": "ring", "implementation": "reference"},
            "one by one, and reference has none .* These can: xla\n",
        ),
        (16, {"method": "gather", "implementation": "cudnn"}, "can't run here: .*NVIDIA GPU"),
        (16, {"method": "rign"}, "'rign' .* there are gather, ring"),
        (14, {"method": "ring"}, "7 positions are odd"),
        (14, {"method": "gather"}, "7 positions are odd"),
        (16, {"method": "gather", "scale": -1}, "scale must be a positive"),
        (16, {"method": "ring", "implementation": "rign"}, "unknown: allowed: reference, xla"),
    ],
)
def test_what_is_refused(length, how, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(shards(step(2, **how), 2), *arrays(4, 2, length)[:4])


def test_orders_that_are_refused():
    for length, size in ((12, 4), (7, 2), (8, 0)):
        with pytest.raises(ValueError, match=f"{length} positions over {size} devices"):
            attention.zigzag(length, size)


def test_methods_are_those_of_the_configuration():
    assert context.METHODS == config.CONTEXT_ATTENTION


# Compiled for a slice that is not there.

CHIPS = 8
SCHEDULED = re.compile(
    r"(gqa_\w+?ward)[\w.]* = |(all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-(start|done))?\("
)


def compiled(method, length):
    """A step of 8 query heads and 1 key/value head for 8 chips."""
    machines.mesh("v5e")
    devices = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, CHIPS), ("data", "context"), axis_types=(AxisType.Auto, AxisType.Auto))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=NamedSharding(mesh, SHARDS))
    q, k = (shape((1, length, n, 64)) for n in (8, 1))
    with jax.set_mesh(mesh):
        f = jax.shard_map(step(CHIPS, method=method), mesh=mesh, in_specs=SHARDS, out_specs=SHARDS, check_vma=False)
        return jax.jit(f).lower(q, k, k, q).compile()


def schedules(program):
    """Collectives and kernels of each loop's body and of the whole, in the order in which they run, as text."""
    found = [" ".join("-".join(filter(None, x)) for x in SCHEDULED.findall(c)) for c in program.as_text().split("\n\n")]
    return [x for x in found if x]


@pytest.mark.thorough
@pytest.mark.needs("libtpu")
def test_128k_tokens_over_8_chips_by_gather():
    program = compiled("gather", 128 * 1024)
    assert schedules(program) == ["all-gather gqa_forward gqa_forward gqa_backward gqa_backward reduce-scatter"]
    queries, keys = 8 * 128 * 1024 // CHIPS * 64 * 4, 128 * 1024 * 64 * 4  # bytes in float32
    assert program.memory_analysis().temp_size_in_bytes <= 3.5 * queries + 2 * keys


@pytest.mark.thorough
@pytest.mark.needs("libtpu")
def test_128k_tokens_over_8_chips_by_ring():
    program = compiled("ring", 128 * 1024)
    *loops, whole = schedules(program)
    hop, arrived = "collective-permute-start", "collective-permute-done"
    assert loops == [f"{hop} gqa_forward {arrived}", f"{hop} {hop} gqa_backward {arrived} {arrived}"]  # hidden behind the work
    assert whole.startswith(f"{hop} gqa_forward {arrived} gqa_forward")
    assert whole.count(hop) == 3  # the first, that both passes share here, and of gradients the last and home
    assert program.memory_analysis().temp_size_in_bytes <= 4 * 8 * 128 * 1024 // CHIPS * 64 * 4
