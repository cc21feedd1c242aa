"""Errors that tell of a machine, its devices, its network or its files, and not of a program: by their words and numbers.

Such a run is worth another attempt, best elsewhere. A row is here because somebody has met its words, who is named; what may as
well be a fault of a kernel or a compiler (CUDA_ERROR_ILLEGAL_ADDRESS; "Core halted unexpectedly" of a TPU) has none, and memory
that a program asks for and does not get is the program's. Only errors of the system and of libraries are read, not mistakes of
code (TypeError, KeyError); and of an error that a person has to correct (`ConfigError`) only the number of what caused it.
"""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from gqa_jax import errors
from gqa_jax.errors import ConfigError


class Fault(NamedTuple):
    """A row: errors whose text has these words, or whose number is one of these."""

    kind: str  # class of `gqa_jax.training.run_folder.classify`
    what: str  # in words
    words: str = r"(?!)"  # a regular expression
    numbers: tuple[int, ...] = ()  # of OSError
    of_host: bool = True  # whether it is of the machine that it is seen on, so that another one would do
    source: str = ""  # who has met it: an issue of github.com, or a file of a program


#: The first row that fits is taken.
FAULTS = (
    Fault(
        "out_of_memory", "out of memory", r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|NCCL .*out of memory",
        source="jax-ml/jax/issues/13428; of NCCL openxla/xla/pull/7201; NovaSky-AI/SkyRL/issues/624",
    ),
    Fault(
        "infrastructure", "a GPU has failed",
        r"CUDA_ERROR_(ECC|NVLINK)_UNCORRECTABLE|uncorrectable (ECC|NVLink) error|over nvlink or a hardware error",
        source="nagadit/DeepFaceLab_Linux/issues/89; MIC-DKFZ/nnUNet/issues/1519; daydreamlive/scope/issues/749",
    ),
    Fault(
        "infrastructure", "the GPUs or their driver do not start",
        r"CUDA_ERROR_(NO_DEVICE|NOT_INITIALIZED|SYSTEM_NOT_READY)|cuInit.*CUDA_ERROR_UNKNOWN|No visible GPU devices"
        r"|no supported devices found for platform CUDA",
        source="jax-ml/jax/issues/24866, 28376, 20722, 17624 and pull/19605",
    ),
    Fault(
        "infrastructure", "the TPU is taken, or does not start",
        r"TPU initialization failed|The TPU is already in use|libtpu\.so already in use"
        r"|open\(/dev/(vfio/\w+|accel\d+)\): (Device or resource busy|Operation not permitted)",
        source="vllm-project/tpu-inference/pull/2257; marin-community/levanter/pull/1127; jax-ml/jax/issues/22070",
    ),
    Fault(
        "infrastructure", "the devices do not start",
        r"Unable to initialize backend '(cuda|rocm|tpu)'|Backend '(cuda|rocm|tpu)' failed to initialize",
        source="jax/_src/xla_bridge.py; rgommers/pixi-dev-scipystack/issues/1",
    ),
    Fault(
        "infrastructure", "GPUs do not reach each other",
        r"NCCL operation .* failed: (unhandled (system|cuda) error|internal error|remote process exited)",
        source="jax-ml/jax/issues/22747, 17399 and 15628; LargeWorldModel/LWM/issues/42",
    ),
    Fault(
        "infrastructure", "another process is gone, or late",
        r"Barrier timed out|Barrier failed because|heartbeat timeout|CoordinationService/|RPC to coordination service",
        of_host=False,
        source="ayaka14732/llama-2-jax/issues/20; AI-Hypercomputer/gpu-recipes/issues/2; jax-ml/jax/issues/23599, pull/39095",
    ),
    Fault(
        "infrastructure", "files are not reached",
        r"Stale file handle|Input/output error|Transport endpoint is not connected",
        (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
        source="huggingface/transformers/issues/9732; GoogleCloudPlatform/gcsfuse/issues/288; "
        "GoogleCloudPlatform/gcs-fuse-csi-driver/issues/50; as tensorstore says it google/orbax/issues/2837",
    ),
)  # fmt: skip


def of(error: BaseException) -> tuple[Fault, BaseException] | None:
    """The row of an error, or of what has caused it, and which of these it is; None: it has none."""
    chain = errors.chain(error)
    if any(isinstance(each, ConfigError) for each in chain):
        chain = [each for each in chain if _number(each) is not None]
    return next(((row, each) for row in FAULTS for each in chain if _fits(row, each)), None)


def _fits(row: Fault, error: BaseException) -> bool:
    if (number := _number(error)) is not None:
        return number in row.numbers
    of_tensorstore = isinstance(error, ValueError) and "tensorstore/" in str(error)  # it raises ValueError for whatever happens
    return (isinstance(error, OSError | RuntimeError) or of_tensorstore) and re.search(row.words, str(error)) is not None


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None
