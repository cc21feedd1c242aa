"""Attention in a training step: what kernels know while tracing, what is kept of them, derivatives there are and are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from gqa_jax import attention
from gqa_jax.attention import conformance
from gqa_jax.config import REMAT_POLICIES, TrainConfig
from gqa_jax.training import optimizer, program, sharding
from tests import attention_cases as cases
from tests import machines


def step_config(context_length, implementation, remat):
    """Two layers, two micro-batches of a sequence, one device."""
    values = TrainConfig(steps=10).to_dict()
    values |= {"context_length": context_length, "batch_tokens": 2 * context_length}
    values["execution"] |= {"mesh": "data=1", "accumulation_steps": 2, "context_attention": "gather"}
    values["execution"] |= {"remat": remat, "attention": implementation}
    values["data"]["block_tokens"] = values["evaluation"]["tokens"] = context_length
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 8, "n_kv_heads": 1, "vocab_size": 256, "d_ff": None}
    values["model"] |= sizes
    return TrainConfig.from_dict(values)


def traced_step(config, mesh):
    """`program.train_step` as it is compiled: a scan over layers, with remat, in one over micro-batches, in a shard_map."""
    step = functools.partial(program.train_step, config, optimizer.adamw(config.optimizer, config.n_steps), mesh)
    arguments = program.abstract_state(config, mesh), program.abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(step).trace(*arguments)


def kernels(jaxpr):
    """Name, grid (of Pallas for TPUs and Triton) and number of operands of each kernel, in equations within others too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "mpmd_map"):  # the latter is Mosaic GPU's
            mapping = equation.params.get("grid_mapping")
            found.add((equation.params["name"], mapping.grid if mapping else None, len(equation.invars)))
            continue
        for x in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(x, "jaxpr", x)
            found |= kernels(inner) if hasattr(inner, "eqns") else set()
    return found


def kernels_of(implementation, length, **how):
    """`kernels` of attention and its gradient, by themselves: 8 query heads, one of keys."""
    q, k = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.bfloat16) for n in (8, 1))

    def run(q, k, v, offset):
        offsets = {name: offset if value is None else value for name, value in how.items()}
        out, lse = attention.attention(q, k, v, implementation=implementation, return_lse=True, **offsets)
        return out.astype(jnp.float32).sum() + lse.sum()

    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2)))
    return kernels(gradient.trace(q, k, k, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr.jaxpr)


@pytest.mark.parametrize(
    "implementation",
    ["pallas_tpu", "pallas_triton", pytest.param("pallas_gpu", marks=pytest.mark.needs("jax-cuda13-plugin"))],
)
def test_the_causal_mask_of_a_training_step_is_known_while_it_is_traced(implementation):
    config = step_config(8192, implementation, "attention_only")
    if implementation == "pallas_gpu":  # checkpoint refuses the interpreter of Mosaic GPU
        step = traced_step(config, machines.mesh("h100:1", config.execution.mesh))
    else:
        with attention.interpreted():
            step = traced_step(config, sharding.make_mesh(config.execution.mesh, jax.devices()[:1]))
    with attention.interpreted():
        static, traced = kernels_of(implementation, 8192), kernels_of(implementation, 8192, q_offset=None)
    found = kernels(step.jaxpr.jaxpr)
    assert found == static
    operands, more = ({name: n for name, _, n in x} for x in (found, traced))
    assert {name: n + 1 for name, n in operands.items()} == more  # a traced offset is an operand
    if implementation == "pallas_tpu":
        grids, longer = ({name: np.prod(grid) for name, grid, _ in x} for x in (found, traced))
        assert grids["gqa_forward"] <= 0.65 * longer["gqa_forward"]  # folded: no step is in vain
        assert grids["gqa_backward"] <= 0.65 * longer["gqa_backward"]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton", "pallas_gpu"])
def test_offsets_that_are_ints_are_no_operands(implementation):
    with attention.interpreted():
        static = kernels_of(implementation, 256)
        shifted = kernels_of(implementation, 256, q_offset=np.int64(7), kv_offset=3)
    assert {(name, n) for name, _, n in shifted} == {(name, n) for name, _, n in static}


# What is kept for the backward pass.


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """Tracing asks cuDNN for its version, no more."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_cudnn_runs_once_where_its_results_are_kept(remat):
    config = step_config(2048, "cudnn", remat)
    mesh = machines.mesh("h100:1", config.execution.mesh)
    text = traced_step(config, mesh).lower().as_text()  # the body of the scan over layers is there once in each direction
    forward, backward = (text.count(f"@__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward"))
    assert backward == 1
    assert forward == {"none": 1, "attention_only": 1, "offload": 1, "full": 2, "dots": 2}[remat]


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.usefixtures("cudnn_is_there")
def test_of_cudnn_the_output_and_its_statistics_are_kept_and_nothing_else():
    mesh = machines.mesh("h100")
    q, k = (jax.ShapeDtypeStruct((2, 512, n, 64), jnp.bfloat16) for n in (4, 2))

    def layer(q, k, v):
        return attention.attention(2 * q, 2 * k, 2 * v, implementation="cudnn")

    def gradient(q, k, v):
        out, pull = jax.vjp(jax.checkpoint(layer, policy=attention.results_saveable), q, k, v)
        return pull(out), pull

    with jax.set_mesh(mesh):
        _, pull = jax.eval_shape(gradient, q, k, k)
    kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(pull))
    operands = [(x.shape, x.dtype.name) for x in (q, k, k)]
    assert kept == sorted([*operands, ((2, 512, 4, 64), "bfloat16"), ((2, 4, 512), "float32")])


# Rows that see no key.


@pytest.mark.parametrize(
    ("implementation", "length"),
    [("reference", 40), ("xla", 40), ("xla", 1100), ("pallas_tpu", 40), ("pallas_triton", 40)],
)
def test_the_cotangent_of_a_row_that_sees_no_key_reaches_no_gradient(implementation, length):
    """As of a penalty on the log-sum-exp that leaves out what is infinite only after it was squared."""
    q, k, v, d_out = cases.inputs(2, 1, 16, length, dtype=jnp.float32)
    exact = conformance.exact_gradients(
        q, k, v, d_out, np.where(np.arange(length) < 3, 0, 1) * np.ones((1, 1, 2, 1)), kv_offset=3
    )

    @jax.jit
    def gradients(q, k, v):
        def run(q, k, v):
            return attention.attention(q, k, v, kv_offset=3, implementation=implementation, return_lse=True)

        (_, lse), pull = jax.vjp(run, q, k, v)
        return pull((d_out, jnp.where(jnp.isfinite(lse), 1, jnp.nan)))

    with attention.interpreted():
        found = gradients(q, k, v)
    for mine, truth in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-4)


def test_parts_of_the_keys_merge_with_finite_gradients():
    """Queries of the first half see no key of the second part, the first three no key at all."""
    q, k, v, d_out = cases.inputs(2, 1, 16, 60, dtype=jnp.float32)

    @jax.jit
    def gradients(q, k, v, middle):
        def merged(q, k, v):
            front = attention.attention(q, k[:, :30], v[:, :30], kv_offset=middle - 30, return_lse=True)
            back = attention.attention(q, k[:, 30:], v[:, 30:], kv_offset=middle, return_lse=True)
            return attention.merge(*(jnp.stack(x) for x in zip(front, back, strict=True)))[0]

        return jax.vjp(merged, q, k, v)[1](d_out)

    for mine, truth in zip(gradients(q, k, v, 33), conformance.exact_gradients(q, k, v, d_out, kv_offset=3), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-4)


# Derivatives of other kinds.


def loss_of(implementation, length=40, **how):
    q, k, v, _ = cases.inputs(2, 1, 16, length, dtype=jnp.float32)
    direction = jax.random.normal(jax.random.key(1), q.shape)
    return lambda q: (attention.attention(q, k, v, implementation=implementation, **how) ** 2).sum(), q, direction


TWICE = {
    "reverse over reverse": lambda f, q, d: jax.grad(lambda q: (jax.grad(f)(q) * d).sum())(q),
    "of a jitted function": lambda f, q, d: jax.grad(lambda q: (jax.grad(jax.jit(f))(q) * d).sum())(q),
    "forward over reverse": lambda f, q, d: jax.jvp(jax.grad(f), (q,), (d,))[1],
}


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton", "pallas_gpu"])
@pytest.mark.parametrize("how", TWICE)
def test_a_second_derivative_of_a_kernel_is_refused_by_name(implementation, how):
    q, k, v, d = (x.astype(jnp.bfloat16) for x in cases.inputs(2, 1, 64, 64))

    def loss(q):
        return (attention.attention(q, k, v, implementation=implementation).astype(jnp.float32) ** 2).sum()

    said = f"{implementation!r} can't be differentiated twice here: 'reference' can, and 'xla' with offsets that are equal ints"
    with attention.interpreted(), pytest.raises(NotImplementedError, match=said):
        jax.eval_shape(lambda q: TWICE[how](loss, q, d), q)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton", "xla"])
def test_forward_mode_is_refused_by_name(implementation):
    loss, q, direction = loss_of(implementation, 1100 if implementation == "xla" else 40)
    said = f"{implementation!r} can't be differentiated in forward mode .* here: 'reference' can"
    with attention.interpreted(), pytest.raises(NotImplementedError, match=said):
        jax.jvp(loss, (q,), (direction,))


@pytest.mark.parametrize(
    ("how", "length"), [("reverse over reverse", 40), ("forward over reverse", 40), ("forward over reverse", 1100)]
)
def test_second_derivatives_that_there_are(how, length):
    of = {name: loss_of(name, length) for name in ("reference", "xla")}
    along = {name: jax.jit(lambda q, x=x: TWICE[how](x[0], q, x[2]))(x[1]) for name, x in of.items()}
    np.testing.assert_allclose(along["xla"], along["reference"], rtol=1e-3, atol=1e-4)
    loss, q, direction = of["reference"]
    step, gradient = 1e-2, jax.jit(jax.grad(loss))
    numeric = (gradient(q + step * direction) - gradient(q - step * direction)) / (2 * step)
    np.testing.assert_allclose(along["reference"], numeric, rtol=0.05, atol=1e-2)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_forward_mode_where_jax_differentiates(implementation):
    loss, q, direction = loss_of(implementation)
    slope = jax.jit(lambda q: jax.jvp(loss, (q,), (direction,))[1])(q)
    np.testing.assert_allclose(slope, (jax.jit(jax.grad(loss))(q) * direction).sum(), rtol=1e-4)
