"""Devices that a run was given, against those that JAX has: `gqa_jax.hardware.allocation`, `gqa_jax.training.devices`."""

import glob
import json
import re
import sys
from types import SimpleNamespace

import jax
import pytest
from etils import epath

from gqa_jax import hardware, train
from gqa_jax.config import ConfigError
from gqa_jax.hardware import allocation
from gqa_jax.hardware.allocation import Allocation
from gqa_jax.training import devices, distributed, run_folder, setup
from gqa_jax.training.run_folder import WrongDevices
from launch.cells import Layout
from launch.executors import base, local
from tests.test_train import tiny


def some(platform, kind, count):
    return [SimpleNamespace(platform=platform, device_kind=kind)] * count


CPU, H100 = some("cpu", "cpu", 1), some("gpu", "NVIDIA H100 80GB HBM3", 8)
V5E = some("tpu", "TPU v5 lite", 16)


@pytest.mark.parametrize(
    ("text", "there", "local", "fits"),
    [
        ("gpu", H100, 8, True),
        ("gpu,chip=h100,devices=8,per_process=8", H100, 8, True),
        ("gpu,chip=h100,devices=16,per_process=8", 2 * H100, 8, True),
        ("gpu,chip=a100", some("cuda", "NVIDIA A100-SXM4-40GB", 2), 2, True),  # the smaller board is of that row
        ("tpu,chip=v5e,devices=16", V5E, 4, True),
        ("cpu", CPU, 1, True),
        ("gpu", CPU, 1, False),
        ("tpu,chip=v5e,devices=1", CPU, 1, False),
        ("cpu", H100, 8, False),
        ("gpu,chip=h200", H100, 8, False),
        ("gpu,chip=h100,devices=8", H100[:7], 7, False),
        ("gpu,chip=h100,devices=16,per_process=8", 2 * H100, 16, False),
        ("tpu,chip=v5e,devices=16", V5E[:4], 4, False),  # a host that does not see the others
        ("gpu,devices=2", [*H100[:1], *CPU], 2, False),
    ],
)
def test_devices_are_compared_with_what_was_given(text, there, local, fits):
    wanted = Allocation.read(text)
    assert str(wanted) == text
    assert wanted.is_of(there, local) == fits
    if fits:
        devices.require(there, local, {allocation.VARIABLE: text}, "", {})
        return
    with pytest.raises(WrongDevices) as caught:
        devices.require(there, local, {allocation.VARIABLE: text}, "", {})
    given = f"this run was given {wanted.said()}, and jax has {allocation.found(there, local)}: "
    assert str(caught.value).startswith(given)
    assert run_folder.classify(caught.value) == ("infrastructure", str(caught.value))
    assert run_folder.exit_code(caught.value) == 1
    assert run_folder.blamed(caught.value) is not None


@pytest.mark.parametrize(
    "text",
    ["gpus", "gpu,chip=h101", "gpu,devices=0", "gpu,shared_by=0", "gpu,devices=²", "gpu,devices=x", "gpu,count=8", "gpu:8"],
)
def test_a_text_that_cannot_be_read_says_what_can(text):
    with pytest.raises(
        ConfigError, match=rf"^{allocation.VARIABLE}={text}: (must be cpu, gpu, tpu|chip=h101: did you mean 'h100')"
    ):
        Allocation.read(text)


def test_devices_in_words():
    assert Allocation.of_slices(hardware.find("h100:8"), 2).said() == "16 GPUs (h100), 8 of each process"
    assert Allocation.of_slices(hardware.find("h100:1")).said() == "1 GPU (h100)"
    assert Allocation.of_slices(hardware.find("v5p:2x2x4")).said() == "16 TPUs (v5p)"
    assert Allocation("cpu").said() == "CPUs"
    assert Allocation("gpu", None, 1, 1, 4).said() == "1 GPU, which 4 runs share"
    assert Allocation.read("gpu,devices=1,per_process=1,shared_by=4") == Allocation("gpu", None, 1, 1, 4)
    assert allocation.found(V5E, 4) == "16 TPUs (TPU v5 lite), 4 of them in this process"
    assert allocation.found([*CPU, *H100], 9) == "1 CPU and 8 GPUs (NVIDIA H100 80GB HBM3)"


TPU = {"engine": "tpu", "project": "pppppp", "zones": ["us-x1-a"]}


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"engine": "slurm"}, "cpu"),
        ({"engine": "slurm", "topology": "h100:8", "nodes": 2}, "gpu,chip=h100,devices=16,per_process=8"),
        ({"engine": "slurm", "gpus_per_node": 3}, "gpu,devices=3,per_process=3"),
        ({"engine": "slurm", "gpus_per_node": "A100:4"}, "gpu,chip=a100,devices=4,per_process=4"),
        ({"engine": "slurm", "gpus_per_node": "rtx_6000:4"}, "gpu,devices=4,per_process=4"),
        ({"engine": "slurm", "gpus_per_node": "hopper:8", "topology": "h200:8"}, "gpu,chip=h200,devices=8,per_process=8"),
        (TPU | {"topology": "v5p:2x2x4"}, "tpu,chip=v5p,devices=16"),
        (TPU | {"topology": "v5e:4x4", "slices": 2}, "tpu,chip=v5e,devices=32"),
        ({"engine": "sky"}, "cpu"),
        ({"engine": "sky", "topology": "h100:8", "num_nodes": 2}, "gpu,chip=h100,devices=16,per_process=8"),
        ({"engine": "sky", "accelerators": "A100:4"}, "gpu,chip=a100,devices=4,per_process=4"),
        ({"engine": "sky", "accelerators": "A10G"}, "gpu,devices=1,per_process=1"),
        ({"engine": "sky", "accelerators": "H100-SXM:8", "topology": "h100:8"}, "gpu,chip=h100,devices=8,per_process=8"),
        ({"engine": "sky", "topology": "v6e:4x4"}, "tpu,chip=v6e,devices=16"),
        ({"engine": "sky", "accelerators": "tpu-v5litepod-16"}, "tpu"),
        ({"engine": "local", "topology": "l4:1"}, "gpu,chip=l4,devices=1,per_process=1"),
    ],
)
def test_engines_know_what_a_cell_is_given(cluster, told):
    given = base.make(cluster, Layout(epath.Path("/shared/study"))).options.allocation
    assert str(given) == told
    assert Allocation.read(told) == given


@pytest.mark.parametrize(
    ("environment", "processes", "told"),
    [
        ({}, 1, ["cpu"]),
        ({"JAX_PLATFORMS": ""}, 1, ["cpu"]),
        ({"JAX_PLATFORMS": "tpu,cpu"}, 1, ["tpu"]),
        ({"JAX_PLATFORMS": "METAL"}, 1, [None]),
        ({"JAX_PLATFORMS": "cpu,cuda", "CUDA_VISIBLE_DEVICES": "0,1"}, 1, ["cpu"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, ["gpu,devices=2,per_process=2"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, ["gpu,devices=2,per_process=1"] * 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1", allocation.VARIABLE: ""}, 1, [""]),
    ],
)
def test_a_slot_of_this_machine_says_what_it_is(environment, processes, told, monkeypatch):
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    (first, *_) = local.slots(None, 2, processes, environment)
    assert [one.get(allocation.VARIABLE) for one in first.environments] == told


def test_gpus_without_a_plugin_are_said_before_anything_starts(tmp_path, monkeypatch):
    """With `environment` of a cluster file as with that of the shell."""
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    engine = local.Executor(local.Options(), Layout(tmp_path))
    monkeypatch.setattr(allocation, "has_plugin", lambda platform: False)
    with pytest.raises(ConfigError, match=r"has GPUs \(GPU 0\), .* pip install 'gqa-jax\[cuda\]'; or, .*: JAX_PLATFORMS=cpu"):
        engine.check()
    local.Executor(local.Options(environment={"JAX_PLATFORMS": "cpu"}), Layout(tmp_path)).check()
    monkeypatch.setattr(allocation, "has_plugin", lambda platform: True)
    engine.check()


BY_HAND = [
    ("", CPU, None),
    ("cpu", CPU, None),
    ("cpu,cuda", CPU, None),
    ("cuda,cpu", H100, None),
    ("proxy", some("tpu", "TPU v5 lite", 1), None),
    ("cuda,cpu", CPU, r"JAX_PLATFORMS=cuda,cpu names cuda first, and jax has 1 CPU: .*; to .* the CPU: JAX_PLATFORMS=cpu$"),
    ("tpu,cpu", CPU, r"JAX_PLATFORMS=tpu,cpu names tpu first, and jax has 1 CPU: "),
]  # fmt: skip


@pytest.mark.parametrize(("platforms", "there", "message"), BY_HAND)
def test_by_hand_a_cpu_that_is_named_last_is_no_choice(platforms, there, message):
    if message is None:
        devices.require(there, len(there), {}, platforms, {})
        return
    with pytest.raises(WrongDevices, match=message):
        devices.require(there, len(there), {allocation.VARIABLE: " "}, platforms, {})


@pytest.mark.parametrize(
    ("platform", "environment", "files", "plugin", "why"),
    [
        ("gpu", {"CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidia0"], True, "CUDA_VISIBLE_DEVICES= hides all GPUs"),
        ("gpu", {"CUDA_VISIBLE_DEVICES": "0"}, [], True, "there is no /dev/nvidia*: no GPU, no driver, or a container"),
        ("gpu", {}, ["/dev/nvidia0"], False, "no plugin for GPUs: pip install 'gqa-jax[cuda]'"),
        ("gpu", {}, ["/dev/nvidia0"], True, "the driver, or a GPU, may have failed: see nvidia-smi"),
        ("tpu", {}, [], True, "neither /dev/accel* nor /dev/vfio/*"),
        ("tpu", {}, ["/dev/vfio/0"], False, "no libtpu: pip install 'gqa-jax[tpu]'"),
        ("tpu", {}, ["/dev/accel0"], True, "another process may hold it"),
    ],
)
def test_what_is_probably_missing(platform, environment, files, plugin, why, monkeypatch):
    monkeypatch.setattr(
        glob, "glob", lambda pattern: [file for file in files if file.startswith(pattern.partition("[")[0][:9])]
    )
    monkeypatch.setattr(allocation, "has_plugin", lambda _: plugin)
    assert why in allocation.why_missing(platform, environment)
    said = {"cuda": "INTERNAL: no supported devices found for platform CUDA", "tpu": ""}
    with pytest.raises(WrongDevices, match=re.escape(why)) as caught:
        devices.require(CPU, 1, environment | {allocation.VARIABLE: platform}, "", said)
    assert ("(jax says: cuda: INTERNAL: no supported devices" in str(caught.value)) == (platform == "gpu")


def test_a_plugin_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(allocation.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not allocation.has_plugin("gpu")
    assert not allocation.has_plugin("tpu")
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    (tmp_path / "libtpu").mkdir()
    allocation.importlib.invalidate_caches()
    assert allocation.has_plugin("gpu")
    assert allocation.has_plugin("tpu")


def test_a_run_on_other_devices_than_it_was_given_opens_nothing(tmp_path, monkeypatch):
    """Says so in exit.json, which is tried again elsewhere, and keeps what machine it was."""
    monkeypatch.setenv(allocation.VARIABLE, "gpu,chip=h100,devices=8,per_process=8")
    monkeypatch.setenv("SLURMD_NODENAME", "node07")
    monkeypatch.setattr(setup, "open_data", lambda _: pytest.fail("the store was opened"))
    with pytest.raises(WrongDevices, match=r"was given 8 GPUs \(h100\), and jax has 8 CPUs: "):
        train.train_and_evaluate(tiny(), tmp_path)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["class"], end["attempt"]) == (1, "infrastructure", 0)
    ((at, path),) = run_folder.failures(tmp_path).items()
    assert json.loads(path.read_text()) == end | {"host": "node07"}
    assert at == pytest.approx(end["time"], abs=0.01)
    assert not (tmp_path / "attempts").exists()
    monkeypatch.setenv(allocation.VARIABLE, "cpu,devices=8,per_process=8")
    monkeypatch.setattr(setup, "open_data", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it goes on to the store
        train.train_and_evaluate(tiny(), tmp_path)


def test_a_run_that_shares_its_devices_counts_its_part_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv(allocation.VARIABLE, "cpu,devices=8,per_process=8,shared_by=4")
    result = train.train_and_evaluate(tiny(), tmp_path)
    assert result["shared_by"] == 4
    assert result["device_seconds"] == pytest.approx(result["n_devices"] / 4 * result["seconds_total"], rel=0.05)


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda': FAILED_PRECONDITION"), AssertionError()])
def test_devices_that_do_not_start_are_recorded_too(error, tmp_path, monkeypatch):
    """JAX asserts where JAX_PLATFORMS names nothing that is there."""

    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(train.distributed.jax_distributed.global_state, "client", None)
    monkeypatch.setattr(train, "_WORKDIR", SimpleNamespace(value=str(tmp_path / "run")))
    with pytest.raises(WrongDevices, match="jax has no devices: "), train._recorded():
        distributed.initialize("off")
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (end["class"], end["attempt"]) == ("infrastructure", None)
    assert ("(jax says: Unable to initialize" in end["reason"]) == bool(str(error))
    monkeypatch.setattr(train, "_WORKDIR", SimpleNamespace(value=str(tmp_path / "other")))
    with pytest.raises(ConfigError), train._recorded():
        distributed.initialize("never")
    assert not (tmp_path / "other").exists()
