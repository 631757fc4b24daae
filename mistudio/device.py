"""What this computer is: its compute device, memory, and how much of both is free."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Device:
    """The device that models run on. `name` is what people call it; bytes."""

    kind: str
    name: str
    memory: int
    free: int


def processor_name() -> str:
    """The CPU as the system names it; needs no torch."""
    jetson = Path("/proc/device-tree/model")
    if jetson.exists():
        return jetson.read_text(errors="replace").strip("\0\n ")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def current(preferred: str = "auto") -> Device:
    """The device models run on: CUDA, then Apple's MPS, then the CPU. Imports torch."""
    import torch

    if preferred in ("auto", "cuda") and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Device("cuda", torch.cuda.get_device_name(), total, free)
    memory = psutil.virtual_memory()
    if preferred in ("auto", "mps") and torch.backends.mps.is_available():
        return Device("mps", f"Apple {platform.machine()} GPU", memory.total, memory.available)
    return Device("cpu", processor_name(), memory.total, memory.available)


def give_back() -> None:
    """Hand memory that torch keeps for later allocations back to the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """Versions that a run record and a bug report need; packages that are absent are left out."""
    from importlib.metadata import PackageNotFoundError, version

    import mistudio

    found: dict[str, Any] = {"mistudio": mistudio.__version__, "python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "PySide6-Essentials",
        "pyqtgraph",
        "sqlite-utils",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
