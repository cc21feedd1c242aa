"""Kernels under jax_enable_x64, and what importing attention leaves alone."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax import attention
from gqa_jax.attention import conformance, dispatch, spec
from tests import attention_cases as cases
from tests import machines

MASKS = {
    "causal": lambda: {},
    "documents": lambda: {"segment_ids": cases.segments(64)},
    "an offset": lambda: {"q_offset": 2},
    "a traced offset": lambda: {"q_offset": jnp.asarray(2)},  # int64
}


def with_gradient(implementation, how):
    """(q, k, v) -> gradients of a sum of output and log-sum-exp."""

    def run(q, k, v):
        out, lse = attention.attention(q, k, v, implementation=implementation, return_lse=True, **how)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(run, argnums=(0, 1, 2))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton"])
def test_kernels_give_the_same_bits_in_64_bit_mode(implementation, mask):
    q, k, v, _ = (np.asarray(x) for x in cases.inputs(2, 1, 16, 64))
    found = []
    for wide in (False, True):
        with attention.interpreted(), jax.enable_x64(wide):
            found.append(jax.jit(with_gradient(implementation, MASKS[mask]()))(q, k, v))
    for narrow, wide in zip(*found, strict=True):
        assert wide.dtype == jnp.bfloat16
        np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu", "pallas_triton"])
def test_decoding_in_64_bit_mode(implementation, head_dim):
    q, k, v, _ = cases.inputs(4, 2, head_dim, 1, keys=48, dtype=jnp.float32)
    exact, _ = conformance.exact(q, k, v, q_offset=36)
    with attention.interpreted(), jax.enable_x64(True):
        decode = jax.jit(lambda q, k, v, n: attention.decode(q, attention.cache_of(k, v), n, implementation=implementation))
        out = decode(*(np.asarray(x) for x in (q[:, 0], k, v)), jnp.asarray(37))
    np.testing.assert_allclose(out, exact[:, 0], atol=2e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("implementation", "chip", "mask"),
    [
        pytest.param("pallas_tpu", "v5e", "a traced offset", marks=pytest.mark.needs("libtpu")),
        pytest.param("pallas_triton", "h200", "documents", marks=pytest.mark.needs("jax-cuda13-plugin")),
        pytest.param("pallas_gpu", "h200", "documents", marks=pytest.mark.needs("jax-cuda13-plugin")),
    ],
)
def test_kernels_compile_in_64_bit_mode(implementation, chip, mask):
    """What Pallas interprets on a CPU in 64 bits, a chip's compiler need not take."""
    mesh = machines.mesh(chip)
    q, k = (jax.ShapeDtypeStruct((1, 64, n, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())) for n in (2, 1))
    with jax.enable_x64(True):
        gradient = with_gradient(implementation, MASKS[mask]())
        with jax.set_mesh(mesh):
            jax.jit(gradient).lower(q, k, k).compile()


def loaded_after(program):
    """Names of modules that a fresh process has loaded."""
    program += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_no_gpu_backend_of_pallas_is_loaded_where_none_runs():
    """Pallas-Triton is deprecated, and will be gone; both take time to load."""
    loaded = loaded_after("""
import jax, jax.numpy as jnp, gqa_jax.train
from gqa_jax import attention
x = jnp.ones((1, 8, 1, 16))
jax.grad(lambda x: attention.attention(x, x, x).sum())(x)
attention.decode(x[:, 0], attention.cache_of(x, x), 3)
case = attention.Case("gpu", "NVIDIA H200", 1, 8192, 8192, 8, 1, 64, jnp.dtype("bfloat16"), segments=True)
assert attention.resolve(None, case) == "pallas_triton"
assert attention.unsupported_reason("tokamax", case)
""")
    assert "gqa_jax.attention.dispatch" in loaded
    assert not loaded & {
        "jax.experimental.pallas.triton", "jax._src.pallas.triton.primitives", "jax.experimental.pallas.mosaic_gpu",
        "gqa_jax.attention.hopper", "gqa_jax.attention.tpu",
    }  # fmt: skip


def test_a_jax_without_pallas_triton_says_so_and_leaves_the_rest(monkeypatch):
    there = dispatch.importlib.util.find_spec
    monkeypatch.setattr(
        dispatch.importlib.util,
        "find_spec",
        lambda name: None if name == "jax.experimental.pallas.triton" else there(name),
    )
    q, k, v, _ = cases.inputs(2, 1, 16, 8)
    said = r"can't run here: this jax \(.*\) has no jax.experimental.pallas.triton any more: .*jax>=0.11,<0.12.* These can: ref"
    for ask in (lambda: attention.attention(q, k, v, implementation="pallas_triton"),
                lambda: attention.decode(q[:, 0], attention.cache_of(k, v), 3, implementation="pallas_triton")):  # fmt: skip
        with attention.interpreted(), pytest.raises(ValueError, match=said):
            ask()
    case = attention.Case("gpu", "NVIDIA H200", 1, 8192, 8192, 8, 1, 64, jnp.dtype("bfloat16"))
    assert attention.resolve(None, case) == "cudnn"
    assert attention.resolve(None, case._replace(segments=True)) == "xla"


@pytest.mark.parametrize(
    ("chip", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 8.0), ("NVIDIA A10G", 8.6), ("NVIDIA L40S", 8.9), ("NVIDIA L4", 8.9), ("Tesla T4", 7.5),
        ("NVIDIA H100 80GB HBM3", 9.0), ("NVIDIA GH200 480GB", 9.0), ("NVIDIA B200", 10.0), ("NVIDIA GeForce RTX 4090", 8.9),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 12.0), ("NVIDIA Imaginary 1", None), ("gfx942", None), ("cpu", None),
    ],
)  # fmt: skip
def test_compute_capability_by_name(chip, expected):
    assert spec.compute_capability(chip) == expected


def test_compute_capabilities_are_those_of_jax():
    triton = pytest.importorskip("jax.experimental.pallas.triton")
    unknown = []
    for version in triton.GpuVersion:
        ours = spec.compute_capability(version.value)
        theirs = triton.get_gpu_info_from_version(version).compute_capability / 10
        if ours is None:
            unknown.append(version.value)
        else:
            assert ours == theirs, version
    assert not unknown
