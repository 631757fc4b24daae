"""Frame times of the training charts with 100,000 points in each of four curves.

A chart is appended to, panned and zoomed while another thread trains (torch, all cores) or not; a
frame is the change and everything the window then does to show it, painting included. Target: 95 %
of the frames within 16.7 ms (60 a second). Processor time of the GUI thread is told beside the
clock: the clock also counts what other processes take.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from mistudio import bootstrap  # noqa: E402

bootstrap.prepare()

POINTS, CURVES, FRAMES = 100_000, 4, 200
FRAME_MS = 1000 / 60
WIDTHS = (580, 1200)  # of a chart in the card at 1280 px and above, and alone


class Load(threading.Thread):
    """What a training does: products of matrices, and Python between them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.steps = 0

    def run(self) -> None:
        import torch

        weights, batch = torch.randn(576, 4608), torch.randn(2048, 576)
        while not self.over.is_set():
            values = (batch @ weights).relu_()
            rows = [{"step": n, "loss": 1.0 / (n + 1)} for n in range(200)]
            self.steps += len(rows) > 0 and float(values[0, 0]) >= 0


def frames(change: Callable[[int], None], app: object) -> tuple[list[float], list[float]]:
    """ms of each frame by the clock and of the GUI thread's processor time, in order of size."""
    clock, own = [], []
    for number in range(FRAMES):
        at, spent = time.perf_counter(), time.thread_time()
        change(number)
        app.processEvents()  # type: ignore[attr-defined]
        clock.append((time.perf_counter() - at) * 1000)
        own.append((time.thread_time() - spent) * 1000)
        time.sleep(0.002)  # others get their turn, as between two frames of a screen
    return sorted(clock), sorted(own)


def curves(points: int) -> list[object]:
    """Losses as they fall, with noise and a spike each."""
    import numpy as np

    rng, steps = np.random.default_rng(0), np.arange(points)
    found = []
    for curve in range(CURVES):
        y = 0.2 + 0.05 * curve + 2 / (1 + steps / 500) + rng.normal(0, 0.02, points)
        y[points // 3 + curve] = 4.0
        found.append(y)
    return found  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=POINTS)
    arguments = parser.parse_args()
    import numpy as np
    from PySide6.QtWidgets import QApplication

    from mistudio.ui import theme
    from mistudio.ui.widgets.metric_chart import Axis, MetricChart

    app = QApplication([])
    theme.apply(app)
    points = arguments.points
    axes = (Axis("step", "Steps"), Axis("seconds", "Time", True))
    keys = [f"L{n}" for n in range(CURVES)]
    print(f"{CURVES} curves of {points:,} points; frames of 60 a second last {FRAME_MS:.1f} ms; "
          f"load of the machine {os.getloadavg()[0]:.1f}")  # fmt: skip
    kept = True
    for training in (False, True):
        load = Load()
        if training:
            load.start()
        for width in WIDTHS:
            chart = MetricChart("Loss", {key: key for key in keys}, axes=axes)
            chart.resize(width, 260)
            chart.show()
            steps = np.arange(points, dtype=float)
            began = time.thread_time()
            for key, y in zip(keys, curves(points), strict=True):
                chart.extend(key, {"step": steps, "seconds": steps / 4}, y)  # type: ignore[arg-type]
            taken = (time.thread_time() - began) * 1000
            chart.draw_if_needed()
            app.processEvents()

            def append(number: int, chart: MetricChart = chart) -> None:
                step = float(points + number)
                place = {"step": step, "seconds": step / 4}
                chart.append([{**place, **dict.fromkeys(keys, 0.2)}])

            def pan(number: int, chart: MetricChart = chart) -> None:
                start = points / 2 * number / FRAMES
                chart._view.setXRange(start, start + points / 3, padding=0)

            def zoom(number: int, chart: MetricChart = chart) -> None:
                half = points / 2 * 0.97**number + 20
                chart._view.setXRange(points / 3 - half, points / 3 + half, padding=0)

            for name, change in (("append", append), ("pan", pan), ("zoom", zoom)):
                clock, own = frames(change, app)
                at = int(FRAMES * 0.95)
                kept &= clock[at] < FRAME_MS
                print(f"{'training' if training else 'idle':8} {width:5} px {name:6}  "
                      f"p50 {clock[FRAMES // 2]:5.1f} ms  p95 {clock[at]:5.1f} ms  "
                      f"(its own processor time {own[FRAMES // 2]:4.1f} and "
                      f"{own[at]:4.1f} ms)")  # fmt: skip
            if width == WIDTHS[0] and not training:
                print(f"taking in all points: {taken:.0f} ms")
            chart.close()
        if training:
            load.over.set()
            load.join()
            print(f"(the other thread made {load.steps} steps)")
    print(f"target p95 < {FRAME_MS:.1f} ms: {'kept' if kept else 'NOT kept'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
