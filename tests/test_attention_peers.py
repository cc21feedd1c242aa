"""Attention of others: what each refuses, and that our arguments reach it as it takes them. Their kernels need their chips."""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import conformance, peers, unsupported_reason
from gqa_jax.attention.spec import Case, Mask
from tests import machines

H200 = Case("gpu", "NVIDIA H200", 1, 256, 256, 8, 2, 128, jnp.dtype("bfloat16"))
V5E = H200._replace(platform="tpu", chip="TPU v5 lite")


@pytest.fixture
def with_tokamax(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.17")


BEYOND_CAUSAL = [
    ({"segments": True}, "no segments"),
    ({"aligned": False}, "no offsets"),
    ({"keys": 512}, "as many keys as queries"),
]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "chip": "cpu"}, "runs on NVIDIA GPUs"),
        ({"platform": "tpu", "chip": "TPU v5 lite"}, "runs on NVIDIA GPUs"),
        ({"chip": "Tesla T4"}, "compute capability 8.0"),
        ({"dtype": jnp.dtype("float32")}, "not float32"),
        ({"head_dim": 260}, "up to 256"),
        ({"chip": "NVIDIA L4", "head_dim": 256}, "up to 128 on NVIDIA L4"),
        ({"return_lse": True}, "no log-sum-exp that has a gradient"),
        *BEYOND_CAUSAL,
    ],
)
def test_obstacles_of_cudnn(change, reason):
    assert unsupported_reason("cudnn", H200) is None
    assert reason in unsupported_reason("cudnn", H200._replace(**change))


@pytest.mark.usefixtures("with_tokamax")
@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (H200, {"platform": "cpu", "chip": "cpu"}, "TPUs or NVIDIA GPUs"),
        (H200, {"chip": "Tesla T4"}, "compute capability 8.0"),
        (H200, {"dtype": jnp.dtype("float32")}, "not float32"),
        (V5E, {"dtype": jnp.dtype("float16")}, "not float16"),
        (V5E, {"length": 200, "keys": 200}, "multiple of 128"),
        (V5E, {"return_lse": True}, "no log-sum-exp that has a gradient"),
        *((case, *rest) for case in (H200, V5E) for rest in BEYOND_CAUSAL),
    ],
)
def test_obstacles_of_tokamax(case, change, reason):
    assert unsupported_reason("tokamax", case) is None
    assert reason in unsupported_reason("tokamax", case._replace(**change))


def test_tokamax_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "pip install 'tokamax>=0.0.17'" in unsupported_reason("tokamax", V5E)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    assert "0.0.9 is too old: pip install" in unsupported_reason("tokamax", V5E)


def test_blocks_divide_the_length():
    assert [peers.tpu_block(length) for length in (128, 384, 1280, 8192, 2**19)] == [128, 128, 256, 1024, 1024]


def test_gpus_get_the_kernel_of_their_generation():
    chips = {"NVIDIA H200": "mosaic_gpu", "NVIDIA B200": "mosaic_gpu", "NVIDIA L4": "triton", "NVIDIA A100-SXM4-80GB": "triton"}
    assert {chip: peers.tokamax_operation(H200._replace(chip=chip)) for chip in chips} == chips


def problem(length=256):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, length, 2, 4, 128), *[(1, length, 2, 128)] * 2)]


def test_cudnn_is_given_our_heads_and_scale(monkeypatch):
    theirs, asked = jax.nn.dot_product_attention, []

    def plain(*arrays, implementation, **options):
        asked.append((implementation, *(x.shape for x in arrays)))
        return theirs(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    q, k, v = problem()
    out, lse = peers.cudnn(q, k, v, Mask(), 0.1, H200)
    assert lse is None
    assert asked == [("cudnn", (1, 256, 8, 128), (1, 256, 2, 128), (1, 256, 2, 128))]  # keys are not repeated
    np.testing.assert_allclose(out, conformance.exact(q, k, v, scale=0.1)[0], atol=1e-5)


@pytest.mark.thorough
@pytest.mark.needs("tokamax")
def test_tokamax_is_given_our_heads_and_scale(monkeypatch):
    monkeypatch.setattr(peers, "tokamax_operation", lambda case: "xla")
    q, k, v = problem()
    out, lse = peers.tokamax(q, k, v, Mask(), 0.1, V5E)
    assert lse is None
    np.testing.assert_allclose(out, conformance.exact(q, k, v, scale=0.1)[0], atol=1e-5)


@pytest.mark.thorough
@pytest.mark.needs("tokamax", "libtpu")
def test_tokamax_compiles_for_a_tpu_without_gigabytes():
    import tokamax

    mesh = machines.mesh("v5e")
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
        for shape in ((1, 8192, 1, 8, 64), (1, 8192, 1, 64))
    )
    case = V5E._replace(length=8192, keys=8192, n_heads=8, n_kv_heads=1, head_dim=64)

    def loss(q, k, v):
        return peers.tokamax(q, k, v, Mask(), 0.125, case)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh), tokamax.config.cross_compile(True):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29  # 2 GiB with its own block of 128
