"""Attention of others, by name, as what ours is measured against: cuDNN through `jax.nn`, and tokamax.

tokamax runs its Mosaic kernels on TPUs (splash attention), Hopper and data-centre Blackwell, its Triton ones on other GPUs.
Each runs what it has for plain causal attention, and its limits refuse the rest (`gqa_jax.attention.dispatch`): there is no
segment mask short of an O(T S) one, no offset, and no log-sum-exp that keeps float32 and its gradient. Keys and values are
passed as they are, not repeated.
"""

from __future__ import annotations

import importlib
import typing

import jax

from gqa_jax.attention.spec import Case, compute_capability

LARGEST_TPU_BLOCK = 1024


def cudnn(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale: float, case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    del mask, case  # plain causal: its limits let no other pass
    batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
    q_BxTxNxH = q_BxTxKxGxH.reshape(batch, length, n_kv * group, head_dim)
    out = jax.nn.dot_product_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, scale=scale, is_causal=True, implementation="cudnn")
    return out.reshape(q_BxTxKxGxH.shape), None


def tokamax(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale: float, case: Case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    del mask
    batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
    q_BxTxNxH = q_BxTxKxGxH.reshape(batch, length, n_kv * group, head_dim)
    package = importlib.import_module("tokamax")
    out = package.dot_product_attention(
        q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, scale=scale, is_causal=True, implementation=[tokamax_operation(case)]
    )
    return out.reshape(q_BxTxKxGxH.shape), None


def tokamax_operation(case: Case):
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
