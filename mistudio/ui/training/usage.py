"""How busy the device is: the GPU where there is one that training uses, else the processor.

Measured in the background, at most once a second; nothing is measured while nobody looks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
from PySide6.QtCore import QObject, Signal

from mistudio import device
from mistudio.ui.background import Background

EVERY_SECONDS = 1.0
CPU_HELP = "miStudio's share of all {cores} CPU cores over the last {seconds:.1f} seconds"
GPU_HELP = "Share of the time that the GPU was computing, as its driver tells, for any program"
NO_GPU_HELP = "The GPU's driver does not tell how busy it is (NVML and nvidia-smi are missing)"


@dataclass(frozen=True)
class Usage:
    """`share` 0..1, None where it cannot be told; `label` names the device."""

    label: str
    share: float | None
    help: str


class Meter:
    """Looks at the device; called in a background thread, one call at a time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last: tuple[float, float] | None = None

    def measure(self) -> Usage:
        gpu = gpu_share()
        if gpu is not None:
            share = gpu[0]
            return Usage("GPU use", share, GPU_HELP if share is not None else NO_GPU_HELP)
        times = self._process.cpu_times()
        now, spent = time.monotonic(), times.user + times.system
        last, self._last = self._last, (now, spent)
        cores = device.cores()
        if last is None or now - last[0] < 0.2:
            return Usage("CPU use", None, CPU_HELP.format(cores=cores, seconds=EVERY_SECONDS))
        share = (spent - last[1]) / (now - last[0]) / cores
        help = CPU_HELP.format(cores=cores, seconds=now - last[0])
        return Usage("CPU use", min(max(share, 0.0), 1.0), help)


def gpu_share() -> tuple[float | None] | None:
    """None where this process uses no GPU; else its busy share, itself None where neither NVML
    nor nvidia-smi is there to tell."""
    torch = sys.modules.get("torch")  # whoever trains has imported it
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None
    try:
        return (torch.cuda.utilization() / 100,)
    except (ImportError, RuntimeError):  # no NVML for Python
        return (_nvidia_smi(str(getattr(torch.cuda.get_device_properties(), "uuid", ""))),)


def _nvidia_smi(uuid: str) -> float | None:
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(
            [*query, *(["-i", name] if uuid else [])],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        return float(found.stdout.splitlines()[0]) / 100
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


class DeviceUse(QObject):
    """Asks for the device's use when it is told that time passes (`tick`)."""

    changed = Signal(object)
    """A new `Usage`."""

    def __init__(self, background: Background, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._background, self._meter = background, Meter()
        self._asking, self._asked = False, 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if self._asking or now - self._asked < EVERY_SECONDS:
            return
        self._asking, self._asked = True, now
        self._background.run(self._meter.measure, self._on_measured, self._on_failed)

    def _on_measured(self, usage: Usage) -> None:
        self._asking = False
        self.changed.emit(usage)

    def _on_failed(self, error: Exception) -> None:
        """A process that may not look at itself: nothing is shown, and it is not asked again."""
