"""The Pallas-Triton kernels: numerics in interpret mode against float64, and compiled for GPUs that need not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import conformance, triton, unsupported_reason
from gqa_jax.attention.conformance import Problem
from gqa_jax.attention.spec import Case, Mask
from gqa_jax.attention.triton import kernels
from gqa_jax.attention.vjp import Kernel, attend
from tests import attention_cases as cases
from tests import machines


@pytest.mark.parametrize(
    "problem", [Problem((8, 1), 64, 300), Problem((4, 4), 128, 130), Problem((4, 2), 64, 90, dtype="float32")]
)
def test_tiles_of_the_table(problem):
    assert conformance.check("pallas_triton", problem, interpret=True).status == "right"


def test_two_runs_are_bit_equal():
    arrays = cases.inputs(8, 1, 64, 150)
    options = triton.choose(150, 150, 8, 64, jnp.bfloat16, interpret=True)
    first, second = (cases.run(kernels.forward, kernels.backward, options, arrays) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


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
        pytest.param("l4", 4, 2, 256, False, marks=pytest.mark.thorough),
        pytest.param("a100", 6, 2, 80, False, marks=pytest.mark.thorough),
        pytest.param("b200", 8, 1, 128, False, marks=pytest.mark.thorough),
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
@pytest.mark.parametrize(
    "head_dim", [64, pytest.param(128, marks=pytest.mark.thorough), pytest.param(256, marks=pytest.mark.thorough)]
)
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
