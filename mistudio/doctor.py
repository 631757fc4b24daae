"""`mistudio doctor`: what this machine has, whether the library is whole, what to mend and how."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from mistudio import device
from mistudio.formatting import count, size
from mistudio.library.library import Library


@dataclass(frozen=True)
class Finding:
    """One line of the examination. `mend` says what to do where `ok` is False."""

    area: str
    text: str
    ok: bool = True
    mend: str = ""


def examine(library: Library) -> list[Finding]:
    """Everything, from the machine up."""
    return [*_machine(), *_versions(), *_window(), *_library(library), *_jobs(library)]


def _machine() -> list[Finding]:
    found = device.current()
    memory = psutil.virtual_memory()
    findings = [
        Finding("device", f"{found.name} ({found.kind}, {device.cores()} cores)"),
        Finding(
            "memory",
            f"{size(memory.available)} free of {size(memory.total)}",
            memory.available > 1.5e9,
            "Close other programs: the sample needs about 1.5 GB.",
        ),
    ]
    if found.kind == "cuda":
        findings.append(Finding("gpu memory", f"{size(found.free)} free of {size(found.memory)}"))
    return findings


def _versions() -> list[Finding]:
    text = ", ".join(f"{name} {version}" for name, version in device.versions().items())
    findings = [Finding("versions", text)]
    import torch

    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if nvidia and not torch.cuda.is_available():
        findings.append(
            Finding(
                "torch",
                f"{torch.__version__} cannot use this machine's NVIDIA GPU",
                False,
                "Install the CUDA build of torch (see README, 'Which torch').",
            )
        )
    return findings


def _window() -> list[Finding]:
    """Qt is tried in a child process: a missing system library would end this one."""
    code = (
        "import PySide6.QtWidgets, PySide6.QtSvg; "
        "from PySide6 import QtCore; print(QtCore.qVersion())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [
            Finding(
                "window",
                f"Qt cannot start: {last}",
                False,
                "Run `python3 run.py app`: it names the system libraries that are missing and "
                "the command that installs them. The command line works without.",
            )
        ]
    shown = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")) or (
        sys.platform in ("win32", "darwin")
    )
    return [
        Finding("window", f"Qt {child.stdout.strip()}, {'a display' if shown else 'no display'}")
    ]


def _library(library: Library) -> list[Finding]:
    usage = shutil.disk_usage(library.root)
    findings = [
        Finding(
            "disk",
            f"{size(usage.free)} free where the library lies",
            usage.free > 2e9,
            "Free some space: activations of the sample take about 0.4 GB.",
        )
    ]
    verdict = library.rows("PRAGMA integrity_check")[0][0]
    findings.append(
        Finding(
            "library",
            f"{library.root}: database {verdict}",
            verdict == "ok",
            "Copy the library's folder, then restore library.db from a backup.",
        )
    )
    tables = (
        "datasets",
        "models",
        "tokenizations",
        "extractions",
        "trainings",
        "saes",
        "feature_runs",
    )
    for table in tables:
        for row in library.rows(f"SELECT id, folder FROM {table}"):
            if not library.path(row["folder"]).is_dir():
                findings.append(
                    Finding(
                        "library",
                        f"{table} {row['id']}: its folder {row['folder']} is missing",
                        False,
                        "Put the folder back, or delete the entry in its tab.",
                    )
                )
    counts = ", ".join(
        f"{count(getattr(library, t).count())} {t.replace('_', ' ')}" for t in tables
    )
    findings.append(Finding("contents", counts))
    return findings


def _jobs(library: Library) -> list[Finding]:
    interrupted = library.jobs.all("status = 'interrupted'")
    if not interrupted:
        return [Finding("jobs", f"{len(library.jobs.active())} active, none interrupted")]
    return [
        Finding(
            "jobs",
            f"{job.title} (job {job.id}) was interrupted",
            False,
            f"Run it again: `mistudio job retry {job.id}`, or Run again in the window's job list; "
            f"`mistudio job dismiss {job.id}` puts it away.",
        )
        for job in interrupted
    ]
