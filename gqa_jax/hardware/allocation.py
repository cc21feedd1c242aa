"""Devices that a run was given, and whether JAX has them: where they are missing, it goes on with the CPU in silence."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import importlib.util
import pkgutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from gqa_jax.errors import ConfigError, closest
from gqa_jax.hardware import CHIPS, Slice

VARIABLE = "GQA_JAX_DEVICES"  # of the environment of a training process: an `Allocation` as text, which a launcher sets
PLATFORMS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}  # in words


class Device(Protocol):
    """What is asked of a device of JAX."""

    platform: str
    device_kind: str


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Devices of a run, as far as they are known.

    As text: "gpu,chip=h100,devices=16,per_process=8"; what is None is left out, and of devices that are its own `shared_by`.
    """

    platform: str  # of PLATFORMS
    chip: str | None = None  # a row of CHIPS
    devices: int | None = None  # of all processes, as JAX counts them
    per_process: int | None = None
    shared_by: int = 1  # runs that share each device, this one among them

    def __str__(self) -> str:
        fields = dataclasses.asdict(self) | ({"shared_by": None} if self.shared_by == 1 else {})
        return ",".join([fields.pop("platform"), *(f"{key}={value}" for key, value in fields.items() if value is not None)])

    @classmethod
    def read(cls, text: str) -> Allocation:
        """Of its text. Raises ConfigError for another."""
        platform, *rest = text.split(",")
        fields = dict(field.partition("=")[::2] for field in rest)
        counts = {name: fields[name] for name in ("devices", "per_process", "shared_by") if name in fields}
        wrong = platform not in PLATFORMS or fields.keys() - counts.keys() - {"chip"}
        if wrong or not all(count.isascii() and count.isdecimal() and int(count) for count in counts.values()):
            raise ConfigError(
                f"{VARIABLE}={text}: must be {', '.join(PLATFORMS)}, and after it what is known of chip=NAME, devices=N, "
                'per_process=N and shared_by=N, as "gpu,chip=h100,devices=8"; empty: nothing is compared'
            )
        if fields.get("chip", "h100") not in CHIPS:
            raise ConfigError(f"{VARIABLE}={text}: chip={fields['chip']}: {closest(fields['chip'], CHIPS)}")
        return cls(platform, fields.get("chip"), **{name: int(count) for name, count in counts.items()})

    @classmethod
    def of_slices(cls, where: Slice, count: int = 1) -> Allocation:
        """So many of a slice, each of GPUs with a process of its own; which chips a process of a TPU slice has is not said."""
        per_process = None if where.is_tpu else where.n_chips
        return cls(where.chip.kind, where.chip.name, count * where.n_chips, per_process)

    def is_of(self, devices: Sequence[Device], local: int) -> bool:
        """Whether these are the devices of JAX in all processes, `local` of them in this one."""
        chip = None if self.chip is None else CHIPS[self.chip]
        return (
            all(platform_of(each.platform) == self.platform for each in devices)
            and (chip is None or all(chip.is_called(each.device_kind) for each in devices))
            and self.devices in (None, len(devices))
            and self.per_process in (None, local)
        )

    def said(self) -> str:
        """In words: "16 GPUs (h100), 8 of each process"."""
        word = PLATFORMS[self.platform]
        text = f"{word}s" if self.devices is None else f"{self.devices} {word}{'s' * (self.devices > 1)}"
        text += "" if self.chip is None else f" ({self.chip})"
        text += "" if self.shared_by == 1 else f", which {self.shared_by} runs share"
        return text if self.per_process in (None, self.devices) else f"{text}, {self.per_process} of each process"


def platform_of(name: str) -> str:
    """JAX's name of a platform, of which several are GPUs."""
    return "gpu" if name.lower() in ("cuda", "rocm", "gpu") else name.lower()


def found(devices: Sequence[Device], local: int) -> str:
    """Devices of JAX in words: "4 GPUs (NVIDIA A100-SXM4-40GB), 2 of them in this process"."""
    parts = []
    for (platform, kind), count in Counter((platform_of(each.platform), each.device_kind) for each in devices).items():
        name = f" ({kind})" if kind.lower() != platform else ""
        parts.append(f"{count} {PLATFORMS.get(platform, platform)}{'s' * (count > 1)}{name}")
    return " and ".join(parts) + (f", {local} of them in this process" if local != len(devices) else "")


def why_missing(platform: str, environment: Mapping[str, str]) -> str:
    """Why JAX probably has no devices of a platform on this machine."""
    if platform == "gpu":
        if (visible := environment.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
            return f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs"
        if not glob.glob("/dev/nvidia[0-9]*") and not glob.glob("/dev/kfd"):
            return "there is no /dev/nvidia*: no GPU, no driver, or a container that was started without its GPUs"
        if not has_plugin("gpu"):
            return "this Python has no plugin for GPUs: pip install 'gqa-jax[cuda]'"
        return "the plugin is there and /dev/nvidia* too: the driver, or a GPU, may have failed: see nvidia-smi"
    if platform == "tpu":
        if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
            return "there is neither /dev/accel* nor /dev/vfio/*: this machine has no TPU"
        if not has_plugin("tpu"):
            return "this Python has no libtpu: pip install 'gqa-jax[tpu]'"
        return "libtpu and the TPU are there: another process may hold it, or it has failed"
    return "JAX_PLATFORMS, or the machine, is another"


def has_plugin(platform: str) -> bool:
    """Whether this Python has what JAX needs for a platform. Imports neither."""
    if platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    names = [point.name for point in importlib.metadata.entry_points(group="jax_plugins")]
    if (package := importlib.util.find_spec("jax_plugins")) is not None:
        names += [module.name for module in pkgutil.iter_modules(package.submodule_search_locations)]
    return any("cuda" in name or "rocm" in name for name in names)
