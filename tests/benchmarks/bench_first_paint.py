"""How long a cold start takes until the window has painted.

Run it as `python tests/benchmarks/bench_first_paint.py` on a machine that does nothing else.
Each start is a process of its own with an empty library. Target: median below one second.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STARTS = 5
TARGET_MS = 1000


def start_once(home: Path) -> float:
    """Start and quit; milliseconds from process start to the first paint."""
    target = home / "first_paint.txt"
    environment = {
        **os.environ,
        "MISTUDIO_HOME": str(home / "library"),
        "MISTUDIO_FIRST_PAINT_FILE": str(target),
        "PYTHONPATH": str(ROOT),
    }
    environment.setdefault("QT_QPA_PLATFORM", "offscreen")
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from mistudio.app import main; sys.exit(main([]))"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate(timeout=60)
    if process.returncode or not target.exists():
        raise SystemExit(f"The window did not start:\n{errors}")
    return float(target.read_text())


def main() -> int:
    paints, cpu = [], []
    for _ in range(STARTS):
        before = os.times()
        with tempfile.TemporaryDirectory(prefix="mistudio-bench-") as home:
            paints.append(start_once(Path(home)))
        after = os.times()
        cpu.append(
            (after.children_user - before.children_user)
            + (after.children_system - before.children_system)
        )
        time.sleep(0.2)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{'start':>6} {'first paint':>12} {'CPU time':>10}")
    for number, (paint, seconds) in enumerate(zip(paints, cpu, strict=True), 1):
        print(f"{number:>6} {paint:>9.0f} ms {seconds * 1000:>7.0f} ms")
    median = statistics.median(paints)
    print(f"median {median:.0f} ms (target {TARGET_MS} ms), load average {load:.1f}")
    return 0 if median < TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
