"""Describe the hardware and versions of a measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

MATRIX_FLAGS = ("amx_bf16", "amx_fp16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def cpu() -> str:
    """Return the processor's name, cores and matrix units."""
    model = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = set(_cpuinfo("flags").split())
    units = ", ".join(flag for flag in MATRIX_FLAGS if flag in flags)
    return f"{model}, {os.cpu_count()} cores, {units or platform.machine()}"


def multiplies_bfloat16() -> bool:
    """Whether the processor has matrix units for bfloat16, so that `dtype: auto` chooses it."""
    return "amx_bf16" in _cpuinfo("flags").split()


def versions(packages: Iterable[str]) -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def load() -> str:
    """Return the load average over the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
