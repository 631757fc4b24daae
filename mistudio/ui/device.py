"""What models run on here, as the window shows it. Imports torch: call it off the GUI thread."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio import device, formatting
from mistudio.ui.pauses import set_imports_aside


@dataclass(frozen=True)
class DeviceInfo:
    """`kind` is torch's word: cpu, cuda, mps."""

    kind: str
    name: str
    detail: str


def find_device(threads: int = 0) -> DeviceInfo:
    """Import torch, set its thread count, name the device.

    All cores compute: as OpenMP threads wait without spinning (bootstrap.py), the window's event
    loop stays on time (tests/benchmarks/bench_gui_lag.py: p95 3 ms with all, 3 ms with one less).
    """
    import torch

    set_imports_aside()
    torch.set_num_threads(threads or device.cores())
    found = device.current()
    detail = (
        f"{found.name}, {formatting.size(found.memory)} memory, torch {torch.__version__}, "
        f"{torch.get_num_threads()} of {device.cores()} CPU cores compute"
    )
    return DeviceInfo(found.kind, short_name(found.name), detail)


def gpu_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the GPU once a job has opened it; None before."""
    import torch

    return torch.cuda.mem_get_info() if torch.cuda.is_initialized() else None


def short_name(name: str) -> str:
    """A processor's name without its marks and its clock."""
    for mark in ("(R)", "(TM)", " CPU", " Processor"):
        name = name.replace(mark, "")
    return " ".join(name.partition("@")[0].split())
