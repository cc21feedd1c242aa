"""The machine that this process runs on: its processor, and the CPUs that the process may use."""

from __future__ import annotations

import os
import platform


def cpus() -> list[int]:
    """Numbers of the CPUs that this process may run on; all of the machine's where the system binds no process (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def processor() -> str:
    """Its name, such as "AMD EPYC"; where the system has none, its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Hardware")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def described() -> str:
    """Processor and CPUs in words, such as "AMD EPYC, 2 CPUs"."""
    count = len(cpus())
    return f"{processor()}, {count} CPU{'s' if count > 1 else ''}"
