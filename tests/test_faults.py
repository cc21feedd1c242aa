"""Errors of machines by words that people have met: each row of `gqa_jax.hardware.faults`, and what has none."""

import errno
import json
import socket

import pytest

from gqa_jax import storage
from gqa_jax.config import ConfigError
from gqa_jax.hardware import faults
from gqa_jax.training import run_folder


def caused(error, cause):
    error.__cause__ = cause
    return error


BUSY = "open(/dev/vfio/0): Device or resource busy: Device or resource busy; Couldn't open iommu group /dev/vfio/0"
NCCL = (
    "INTERNAL: xla/xla/service/gpu/nccl_utils.cc:305: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed: "
    "{} (run with NCCL_DEBUG=INFO for details). Last NCCL warning(error) log entry (may be unrelated) '{}'."
)
TENSORSTORE = 'Failed to rename fd: 14 "/home/user/0.orbax-checkpoint-tmp/d/8f39.__lock" [OS error {}] [source locations=\'{}'
SOURCE = "tensorstore/internal/os/file_util_posix.cc:406\\ntensorstore/kvstore/transaction.cc:133']"

# (error, class, words of the sentence, whether another machine would do)
MET = [
    # jax-ml/jax/issues/13428; jax.errors.JaxRuntimeError is a RuntimeError
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes"), "out_of_memory", "62914", None),
    # openxla/xla/pull/7201
    (RuntimeError(NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'")), "out_of_memory", "NCCL", None),
    (MemoryError(), "out_of_memory", "out of memory (MemoryError)", None),
    # nagadit/DeepFaceLab_Linux/issues/89
    (
        RuntimeError(
            "Internal: failed call to cuDevicePrimaryCtxRetain: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error"
        ),
        "infrastructure", "a GPU has failed (RuntimeError: Internal: ", True,
    ),
    # MIC-DKFZ/nnUNet/issues/1519, daydreamlive/scope/issues/749
    (RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"), "infrastructure", "GPU has", True),
    (RuntimeError("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error"), "infrastructure", "", True),
    # jax-ml/jax/issues/24866, 28376, 20722, 17624
    (
        RuntimeError("Failed call to cuInit: CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized"),
        "infrastructure", "GPUs or their driver do not start", True,
    ),
    (RuntimeError("FAILED_PRECONDITION: No visible GPU devices."), "infrastructure", "driver", True),
    (RuntimeError("operation gpuDeviceGetAttribute failed: CUDA_ERROR_NOT_INITIALIZED"), "infrastructure", "driver", True),
    (RuntimeError("failed call to cuInit: CUDA_ERROR_UNKNOWN: unknown error"), "infrastructure", "driver", True),
    # vllm-project/tpu-inference/pull/2257, marin-community/levanter/pull/1127, jax-ml/jax/issues/22070
    (
        RuntimeError(f"Unable to initialize backend 'tpu': FAILED_PRECONDITION: TPU initialization failed: {BUSY}"),
        "infrastructure", "the TPU is taken, or does not start", True,
    ),
    (
        RuntimeError("UNKNOWN: TPU initialization failed: open(/dev/accel3): Operation not permitted: Operation not permitted"),
        "infrastructure", "TPU", True,
    ),
    (RuntimeError("ABORTED: The TPU is already in use by process with pid 176028."), "infrastructure", "taken", True),
    # rgommers/pixi-dev-scipystack/issues/1
    (
        RuntimeError("Backend 'cuda' failed to initialize: Unable to use CUDA because of the following issues with CUDA"),
        "infrastructure", "the devices do not start", True,
    ),
    # jax-ml/jax/issues/22747, 15628, LargeWorldModel/LWM/issues/42
    (
        RuntimeError(NCCL.format("unhandled system error", "socketTryAccept: Accept failed: Bad file descriptor")),
        "infrastructure", "GPUs do not reach each other", True,
    ),
    (RuntimeError("NCCL operation ncclGroupEnd() failed: unhandled cuda error."), "infrastructure", "GPUs do not reach", True),
    (
        RuntimeError(NCCL.format("internal error - please report this issue", "Attribute busid of node nic not found")),
        "infrastructure", "GPUs do not reach", True,
    ),
    # ayaka14732/llama-2-jax/issues/20, AI-Hypercomputer/gpu-recipes/issues/2, jax-ml/jax/issues/23599, jax-ml/jax/pull/39095
    (
        RuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Barrier_id: PjRT_Client_Connect. Timed out task names:"),
        "infrastructure", "another process is gone, or late", False,
    ),
    (
        RuntimeError("UNAVAILABLE: Task /job:jax_worker/replica:0/task:0 heartbeat timeout. This indicates that the remote"),
        "infrastructure", "another process", False,
    ),
    (
        RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died"),
        "infrastructure", "another process", False,
    ),
    # huggingface/transformers/issues/9732, GoogleCloudPlatform/gcsfuse/issues/288, gcs-fuse-csi-driver/issues/50
    (OSError(116, "Stale file handle"), "infrastructure", "files are not reached (OSError: [Errno 116] Stale", True),
    (OSError(5, "Input/output error"), "infrastructure", "files are not reached", True),
    (OSError(107, "Transport endpoint is not connected"), "infrastructure", "files are not reached", True),
    # in the form of google/orbax/issues/2837, which is of another number
    (ValueError(f"UNKNOWN: {TENSORSTORE.format('116: ESTALE Stale file handle', SOURCE)}"), "infrastructure", "files", True),
    (OSError(28, "No space left on device"), "disk_full", "free space", None),
    (OSError(122, "Disk quota exceeded"), "disk_full", "free space", None),
    # What libraries put into errors of their own.
    (caused(ValueError("not saved"), OSError(116, "Stale file handle")), "infrastructure", "Stale file handle", True),
    (caused(ConfigError("tokens.bin can't be read"), OSError(errno.EIO, "Input/output")), "infrastructure", "tokens", True),
    # Not of a machine, or not to be known.
    (caused(ConfigError("no store"), RuntimeError("Barrier timed out")), "config", "no store", None),
    (caused(ConfigError("no store"), FileNotFoundError(2, "No such file or directory")), "config", "no store", None),
    (ValueError("Stale file handle"), "error", "ValueError: Stale file handle", None),
    (TypeError("CUDA_ERROR_NO_DEVICE"), "error", "TypeError", None),
    (FileNotFoundError(2, "No such file or directory", "runs/NCCL operation failed: internal error"), "error", "No such", None),
    (ValueError(f"NOT_FOUND: {TENSORSTORE.format('2: ENOENT No such file', SOURCE)}"), "error", "NOT_FOUND", None),
    # jaxleyverse/jaxley/issues/53, vllm-project/tpu-inference/pull/412: of kernels
    (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered."), "error", "ILLEGAL", None),
    (RuntimeError("INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted premature"), "error", "Core", None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "words", "of_host"), MET)
def test_words_that_were_met(error, kind, words, of_host, monkeypatch):
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    found, sentence = run_folder.classify(error)
    assert found == kind
    assert words in sentence
    assert run_folder.exit_code(error) == (2 if kind == "config" else 1)
    assert run_folder.blamed(error) == (socket.gethostname() if of_host else None)
    if kind == "infrastructure" and not isinstance(error, ConfigError):
        assert sentence.endswith("then run the same command again: it goes on from the last checkpoint")


def test_every_row_was_met_by_somebody():
    rows = [faults.of(error)[0] for error, *_ in MET if faults.of(error) is not None]
    assert set(rows) == set(faults.FAULTS)
    assert all(row.source for row in faults.FAULTS)


def test_too_many_requests_to_gcs_are_no_memory():
    error = ValueError("RESOURCE_EXHAUSTED: Error reading gs://b/x: Too many requests [http_response_code='429']")
    assert run_folder.classify(error)[0] == "infrastructure"
    assert run_folder.blamed(error) is None


def test_faults_of_machines_are_kept_one_by_one(tmp_path, monkeypatch):
    times = iter([100.25, 101.5, 102.0])
    monkeypatch.setattr(run_folder.time, "time", lambda: next(times))
    run_folder.record_exit(tmp_path, 1, "infrastructure", "first", 0, "node1")
    run_folder.record_exit(tmp_path, 1, "error", "no fault", 1)
    run_folder.record_exit(tmp_path, 1, "infrastructure", "second", 2)
    (tmp_path / "failures" / ".103000.json.1.tmp").touch()
    kept = {at: storage.read_json(path) for at, path in run_folder.failures(tmp_path).items()}
    assert {at: (values["host"], values["reason"]) for at, values in kept.items()} == {
        100.25: ("node1", "first"),
        102.0: (None, "second"),
    }
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "second"
    assert run_folder.failures(tmp_path / "none") == {}


def test_a_process_that_failed_says_of_what_class():
    error = run_folder.ProcessFailed("devices: process 1: x", "infrastructure", "node3")
    assert run_folder.classify(error) == ("infrastructure", "devices: process 1: x")
    assert run_folder.exit_code(error) == 1
