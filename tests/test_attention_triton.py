"""The Pallas-Triton kernels: numerics in interpret mode against float64, and compiled for GPUs that need not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import conformance, triton, unsupported_reason, xla
from gqa_jax.attention.spec import Case, Mask
from gqa_jax.attention.triton import kernels
from gqa_jax.attention.vjp import Kernel, attend
from tests import machines

SMALL = triton.Options(*(triton.Tile(rows, keys, 4, 2) for rows, keys in ((64, 32), (32, 16), (32, 64))), interpret=True)


def problem(
    n_heads, n_kv, head_dim, length, *,
    keys=None, batch=1, segments=False, size=1.0, dtype=jnp.bfloat16, static=False, **offsets,
):  # fmt: skip
    """Arrays, cotangents, mask, and the oracle's arguments for the mask; `static` offsets are Python ints."""
    rng = np.random.default_rng(0)
    keys, group = keys or length, n_heads // n_kv
    shapes = (batch, length, n_kv, group, head_dim), (batch, keys, n_kv, head_dim)
    q, k, v, d_out = (
        jnp.asarray(s * rng.normal(size=shape), dtype)
        for s, shape in ((size, shapes[0]), (size, shapes[1]), (1, shapes[1]), (1, shapes[0]))
    )
    d_lse = rng.normal(size=(batch, n_kv, group, length)).astype(np.float32)
    ids = [np.sort(rng.integers(0, 4, size=(batch, n)), axis=1).astype(np.int32) if segments else None for n in (length, keys)]
    known = int if static else jnp.int32
    mask = Mask(**{name: known(value) for name, value in offsets.items()}, q_segments_BxT=ids[0], kv_segments_BxS=ids[1])
    return (q, k, v), (d_out, d_lse), mask, dict(q_segments=ids[0], kv_segments=ids[1], **offsets)


def compiled(kernel, arrays, cotangents, mask):
    @jax.jit
    def run(*arrays):
        outputs, pull = jax.vjp(lambda *x: attend(kernel, *x, mask), *arrays)
        return *outputs, *pull(cotangents)

    return run.lower(*arrays).compile({"xla_backend_optimization_level": 0})  # compiling is what takes time here


def results(kernel, arrays, cotangents, mask):
    return compiled(kernel, arrays, cotangents, mask)(*arrays)


def errors(found, expected):
    """Largest absolute error of each array; infinite ones (log-sum-exps of rows that see nothing) must be the same."""
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(np.asarray(f, np.float64)), np.isfinite(e))
    return [
        np.abs(np.where(np.isfinite(e), np.asarray(f, np.float64) - np.where(np.isfinite(e), e, 0), 0)).max()
        for f, e in zip(found, expected, strict=True)
    ]


def check(case, options):
    arrays, cotangents, mask, arguments = case
    group, head_dim = arrays[0].shape[3:]
    scale = head_dim**-0.5
    out, lse = conformance.exact(*arrays, **arguments)
    d_out, d_lse = cotangents[0], np.where(np.isfinite(lse), cotangents[1], 0)
    expected = out, lse, *conformance.exact_gradients(*arrays, d_out, d_lse, **arguments)
    cotangents = d_out, jnp.where(np.isfinite(lse), d_lse, jnp.nan)  # of a row that sees no key it may be anything
    found = results(Kernel(kernels.forward, kernels.backward, scale, options), arrays, cotangents, mask)
    n_heads = arrays[0].shape[2] * group
    plain = Kernel(xla.forward, xla.backward, scale, xla.choose(arrays[0].shape[0], arrays[0].shape[1], n_heads))
    allowed = errors(results(plain, arrays, cotangents, mask), expected)
    for name, error, limit in zip(("out", "lse", "dq", "dk", "dv"), errors(found, expected), allowed, strict=True):
        # float32's own, where products are summed in another order
        rounding = 2 * np.spacing(np.float32(abs(lse[np.isfinite(lse)]).max(initial=20)))
        assert error <= max(1.5 * limit, rounding), f"{name}: {error:.1e} where xla has {limit:.1e}"
    return found


@pytest.mark.parametrize(
    ("n_heads", "n_kv", "head_dim", "length"),
    [
        (1, 1, 64, 64), (1, 1, 128, 150), (8, 1, 64, 200), (8, 1, 128, 31), (8, 2, 64, 1), (8, 2, 128, 77),
        (32, 8, 64, 40), (32, 8, 128, 33), (32, 32, 64, 65),
    ],
)  # fmt: skip
def test_as_close_to_float64_as_xla(n_heads, n_kv, head_dim, length):
    check(problem(n_heads, n_kv, head_dim, length), SMALL)


@pytest.mark.parametrize(
    "case",
    [
        {"n_heads": 8, "n_kv": 1, "length": 300},
        {"n_heads": 4, "n_kv": 4, "head_dim": 128, "length": 130},
        {"n_heads": 4, "n_kv": 2, "length": 90, "dtype": jnp.float32},
    ],
)
def test_tiles_of_the_table(case):
    case = problem(**{"head_dim": 64, **case})
    _, length, _, group, head_dim = case[0][0].shape
    check(case, triton.choose(length, length, group, head_dim, case[0][0].dtype, interpret=True))


@pytest.mark.parametrize(
    "case",
    [
        {"length": 70, "keys": 130, "q_offset": 60},
        {"length": 100, "keys": 70, "q_offset": 13, "kv_offset": 40},  # the first 27 queries see no key
        {"length": 100, "keys": 70, "q_offset": 13, "kv_offset": 40, "static": True},
        {"length": 50, "keys": 80, "segments": True, "q_offset": 30, "static": True},
        {"length": 20, "keys": 40, "kv_offset": 1000},  # no query does
        {"length": 90, "segments": True, "batch": 2},
        {"length": 50, "keys": 80, "segments": True, "q_offset": 30},
        {"length": 70, "size": 30.0},  # logits of thousands
        {"length": 70, "dtype": jnp.float32},
        {"length": 70, "dtype": jnp.float16},
        {"length": 60, "head_dim": 80, "n_heads": 6, "n_kv": 2},  # a head and a group that are no powers of two
    ],
)
def test_masks_and_dtypes(case):
    check(problem(**{"n_heads": 8, "n_kv": 2, "head_dim": 64, **case}), SMALL)


def test_runs_a_case():
    (q, k, v), _, mask, arguments = problem(8, 2, 64, 50)
    case = Case("cpu", "cpu", 1, 50, 50, 8, 2, 64, q.dtype, interpreted=True)
    assert unsupported_reason("pallas_triton", case) is None
    out, lse = attend(triton.kernel(case, 0.125), q, k, v, mask)
    exact_out, exact_lse = conformance.exact(q, k, v, **arguments)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact_out, atol=2e-2)
    np.testing.assert_allclose(lse, exact_lse, atol=2e-6)


def test_two_runs_are_bit_equal():
    arrays, cotangents, mask, _ = problem(8, 1, 64, 150)
    program = compiled(Kernel(kernels.forward, kernels.backward, 0.125, SMALL), arrays, cotangents, mask)
    for a, b in zip(program(*arrays), program(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "tpu"}, "runs on NVIDIA GPUs of compute capability 8.0 (Ampere) or later"),
        ({"chip": "Tesla T4"}, "compute capability 8.0"),
        ({"chip": "gfx942"}, "compute capability 8.0"),
        ({"dtype": jnp.dtype("float64")}, "not float64"),
        ({"head_dim": 72}, "multiple of 16"),
        ({"head_dim": 512}, "multiple of 16 up to 256"),
        ({"batch": 70000}, "grid"),
    ],
)
def test_obstacles(change, reason):
    case = Case("gpu", "NVIDIA A100-SXM4-80GB", 1, 128, 128, 8, 1, 64, jnp.dtype("bfloat16"))
    assert unsupported_reason("pallas_triton", case) is None
    assert reason in unsupported_reason("pallas_triton", case._replace(**change))


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("gpu", "n_heads", "n_kv", "head_dim", "segments"),
    [
        ("h200", 8, 1, 64, False),
        ("h200", 32, 8, 128, True),
        ("l4", 8, 1, 64, True),
        ("l4", 8, 2, 128, False),
        pytest.param("l4", 4, 2, 256, False, marks=pytest.mark.slow),
        pytest.param("a100", 6, 2, 80, False, marks=pytest.mark.slow),
        pytest.param("b200", 8, 1, 128, False, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus_without_spills(gpu, n_heads, n_kv, head_dim, segments):
    mesh = machines.mesh(gpu)
    length, group = 8192, n_heads // n_kv
    options = triton.choose(length, length, group, head_dim, jnp.bfloat16)

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    q, k, column = shape(1, length, n_kv, group, head_dim), shape(1, length, n_kv, head_dim), (1, n_kv, group, length)
    ids = shape(1, length, dtype=jnp.int32)
    columns = [shape(*column, dtype=jnp.float32)] * 2

    def mask(ids):
        return Mask(q_segments_BxT=ids, kv_segments_BxS=ids) if segments else Mask()

    programs = {
        "forward": (lambda ids, q, k, v: kernels.forward(q, k, v, mask(ids), 0.1, options), (q, k, k)),
        "backward": (lambda ids, *x: kernels.backward(*x, mask(ids), 0.1, options), (q, k, k, *columns, q)),
    }
    for name, (program, arguments) in programs.items():
        with jax.set_mesh(mesh):
            lowered = jax.jit(program).lower(ids, *arguments)
            compiled = lowered.compile({"xla_gpu_fail_ptx_compilation_on_register_spilling": True})
        assert f"gqa_triton_{'forward' if name == 'forward' else 'dq'}" in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes <= 2**14, name  # no copy of anything


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)])
def test_float32_fits_the_smallest_gpus(head_dim):
    mesh = machines.mesh("l4")
    options = triton.choose(1000, 1000, 2, head_dim, jnp.float32)
    kernel = Kernel(kernels.forward, kernels.backward, 0.1, options)
    sharding = NamedSharding(mesh, PartitionSpec())
    q, k = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in ((1, 1000, 2, 2, head_dim), (1, 1000, 2, head_dim))
    )
    with jax.set_mesh(mesh):
        loss = functools.partial(lambda *x: attend(kernel, *x, Mask())[0].sum())
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
