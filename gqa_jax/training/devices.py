"""Whether JAX has the devices that a run was given, before anything is opened or compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import jax
from jax._src import xla_bridge  # what kept a platform from starting is not public

from gqa_jax import errors
from gqa_jax.hardware import allocation
from gqa_jax.hardware.allocation import Allocation, Device, platform_of
from gqa_jax.training.run_folder import WrongDevices


def start() -> None:
    """Starts JAX's devices. Raises WrongDevices, with what is probably missing, where it can't."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS names only what is not there
        platform = platform_of(_first_platform())
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms}: " if platform else ""
        said = f" (jax says: {errors.first_line(error)})" if str(error).strip() else ""
        raise WrongDevices(f"{asked}jax has no devices: {allocation.why_missing(platform, os.environ)}{said}") from error


def require(
    devices: Sequence[Device], local: int, environment: Mapping[str, str], platforms: str, said: Mapping[str, str]
) -> Allocation | None:
    """What $GQA_JAX_DEVICES says that the run was given. Raises WrongDevices unless `devices` are that.

    Without it, as by hand, unless they are on a CPU that `platforms` names only in case an accelerator is not there.

    Args:
      devices: of all processes; `local` of them in this one.
      platforms: of JAX_PLATFORMS. said: why a platform did not start, by JAX's name of it.
    """
    has = allocation.found(devices, local)
    if text := environment.get(allocation.VARIABLE, "").strip():
        wanted = Allocation.read(text)
        if wanted.is_of(devices, local):
            return wanted
        platform = wanted.platform
        sentence = f"this run was given {wanted.said()}, and jax has {has}"
        if all(platform_of(each.platform) == platform for each in devices):
            raise WrongDevices(
                f"{sentence}: another machine than was asked for, or devices that failed or are held by another process"
            )
        fix = ""
    else:
        first = platforms.split(",")[0]
        platform = platform_of(first)
        if platform not in ("gpu", "tpu") or any(platform_of(each.platform) != "cpu" for each in devices):
            return None
        sentence = f"JAX_PLATFORMS={platforms} names {first} first, and jax has {has}"
        fix = "; to train on the CPU: JAX_PLATFORMS=cpu"
    words = [f"{name}: {words}" for name, words in said.items() if platform_of(name) == platform and words]
    why = allocation.why_missing(platform, environment) + (f" (jax says: {'; '.join(words)})" if words else "")
    raise WrongDevices(f"{sentence}: {why}{fix}")


def require_here() -> Allocation | None:
    """`require`, of this process and its environment."""
    arguments = os.environ, jax.config.jax_platforms or "", getattr(xla_bridge, "_backend_errors", {})
    return require(jax.devices(), jax.local_device_count(), *arguments)


def _first_platform() -> str:
    return (jax.config.jax_platforms or "").split(",")[0]
