"""Attention of others, by name, as what ours is measured against: cuDNN through `jax.nn`, and tokamax.

Each runs what it has for plain causal attention and refuses the rest: there is no segment mask short of an O(T S) one, no
offset, and no log-sum-exp that keeps float32 and its gradient. Keys and values are passed as they are, not repeated.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import typing

import jax
import jax.numpy as jnp

from gqa_jax.attention.capability import compute_capability

TOKAMAX = "0.0.17"  # the first whose tile sizes can be chosen through its public modules
LARGEST_TPU_BLOCK = 1024


def _beyond_causal(name: str, case) -> str | None:
    if case.segments:
        return f"{name} has segments only as a mask of T x S elements"
    if not case.aligned or case.length != case.keys:
        return f"{name} runs causal attention of a sequence with itself: no offsets, as many keys as queries"
    return None


def cudnn_obstacle(case) -> str | None:
    """`case` is a `gqa_jax.attention.implementations.Case`. Limits: `jax.nn.dot_product_attention`, jax 0.11."""
    capability = compute_capability(case.chip) if case.platform == "gpu" else None
    if capability is None or capability < 8:
        return f"cudnn needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, this is {case.platform} ({case.chip})"
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn takes bfloat16 and float16, not {case.dtype}"
    largest = 256 if capability >= 9 else 128
    if case.head_dim % 8 or case.head_dim > largest:
        return f"cudnn takes head sizes of a multiple of 8 up to {largest} on {case.chip}, not {case.head_dim}"
    if case.return_lse:
        return "cudnn's log-sum-exp comes through jax.nn rounded to the dtype of the output, and without a gradient"
    return _beyond_causal("cudnn", case)


def cudnn(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale: float, case):
    del mask, case  # the obstacles leave the plain causal one
    batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
    q_BxTxNxH = q_BxTxKxGxH.reshape(batch, length, n_kv * group, head_dim)
    out = jax.nn.dot_product_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, scale=scale, is_causal=True, implementation="cudnn")
    return out.reshape(q_BxTxKxGxH.shape), None


def tokamax_obstacle(case) -> str | None:
    """tokamax's Mosaic kernels on TPUs (splash attention), Hopper and data-centre Blackwell, its Triton ones on other GPUs."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return f"tokamax is not installed: pip install 'tokamax>={TOKAMAX}'"
    if [int(part) for part in version.split(".")[:3]] < [int(part) for part in TOKAMAX.split(".")]:
        return f"tokamax {version} is too old: pip install 'tokamax>={TOKAMAX}'"
    if case.platform not in ("gpu", "tpu"):
        return f"tokamax's kernels run on TPUs and NVIDIA GPUs, this is {case.platform}"
    if case.platform == "gpu" and (compute_capability(case.chip) or 0) < 8:
        return f"tokamax needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, this is {case.chip}"
    dtypes = (jnp.bfloat16, jnp.float32) if case.platform == "tpu" else (jnp.bfloat16, jnp.float16)
    if case.dtype not in dtypes:
        return f"tokamax takes {' and '.join(jnp.dtype(d).name for d in dtypes)} on a {case.platform}, not {case.dtype}"
    if case.platform == "tpu" and (case.length % 128 or case.keys % 128):
        return f"tokamax on a TPU takes lengths of a multiple of 128, not {case.length}"
    if case.return_lse:
        return "tokamax gives its log-sum-exp without a gradient"
    return _beyond_causal("tokamax", case)


def tokamax(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale: float, case):
    del mask
    batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
    q_BxTxNxH = q_BxTxKxGxH.reshape(batch, length, n_kv * group, head_dim)
    package = importlib.import_module("tokamax")
    out = package.dot_product_attention(
        q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, scale=scale, is_causal=True, implementation=[tokamax_operation(case)]
    )
    return out.reshape(q_BxTxKxGxH.shape), None


def tokamax_operation(case):
    """The kernel by itself, not tokamax's choice of one: it falls back to its O(T S) XLA form where a kernel can't run."""
    if case.platform == "gpu":
        return "mosaic_gpu" if 9 <= compute_capability(case.chip) < 11 else "triton"
    tpu = importlib.import_module("tokamax.ops.tpu")
    # Its default block of 128 makes the partial dq of its backward pass, (S / block, N, T, H) float32, 8 GiB at T = 8K
    block = tpu_block(case.length)
    # an enumeration that the package does not export, found by the field that takes it
    minor = typing.get_type_hints(tpu.FlashAttentionConfig)["q_layout"].HEAD_DIM_MINOR
    operation = tpu.FlashAttention(
        config=tpu.FlashAttentionConfig(
            block_q=block, block_kv=block, block_kv_compute=min(block, 512), use_experimental_scheduler=True,
            q_layout=minor, k_layout=minor, v_layout=minor,
        )
    )  # fmt: skip
    gradient = operation.vjp.config_cls(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block)
    return operation.replace(vjp=operation.vjp.replace(config=gradient))


def tpu_block(length: int) -> int:
    """The largest power of two up to 1024 that divides a length of a multiple of 128."""
    return min(LARGEST_TPU_BLOCK, length & -length)
