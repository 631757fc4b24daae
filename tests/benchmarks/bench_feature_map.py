"""How long a map of features takes, what the window feels of it, and how smoothly it pans.

`python3 run.py bench feature_map`. `BENCH_FEATURES=8192,65536` are the sizes that are laid out
(65,536 take minutes), `BENCH_METHODS=umap,tsne`. Directions are drawn around a sixty-fourth as many
centres, 576 wide, as an SAE's on a small model are. Frames are painted on a picture of
1200 x 700 pixels, by the widget itself: everything that the GUI thread does for a frame but copying
it to the screen. Target: below 16 ms. The clock also counts what other processes take.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

SIZES = [int(n) for n in os.environ.get("BENCH_FEATURES", "8192").split(",") if n]
METHODS = os.environ.get("BENCH_METHODS", "umap,tsne").split(",")
WIDTH, POINTS, FRAMES, TARGET_MS = 576, 65_536, 120, 16.0


def directions(n: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(n // 64, 8), WIDTH, generator=generator)
    which = torch.randint(0, len(centres), (n,), generator=generator)
    return centres[which] + 1.2 * torch.randn(n, WIDTH, generator=generator)


def processor() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def lay_out(n: int, method: str) -> None:
    """Prints the seconds of each step and the longest that this thread, a window's, had to wait."""
    from mistudio.engine.features import maps
    from mistudio.engine.features.layout import MapSettings
    from mistudio.engine.progress import SILENT
    from mistudio.jobs.map_process import lay_out_apart

    decoder, settings = directions(n), MapSettings(method=method)
    took: dict[str, float] = {}
    found: dict[str, Any] = {}

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            made = maps.prepare(decoder, np.arange(n), settings)
            took["neighbours"] = time.perf_counter() - began
            began = time.perf_counter()
            places, groups = lay_out_apart(
                made.neighbours, made.distances, made.start, settings, Path(folder), SILENT
            )
            took["layout"] = time.perf_counter() - began
            began = time.perf_counter()
            found["quality"] = maps.judge(decoder, made.features, places)
            took["judging"] = time.perf_counter() - began
            found["groups"], found["components"] = int(groups.max()) + 1, made.components

    maps.prepare(decoder[:64], np.arange(64), settings)  # imports are not what is measured
    thread = threading.Thread(target=work)
    longest, began, spent = 0.0, time.perf_counter(), processor()
    thread.start()
    while thread.is_alive():
        before = time.perf_counter()
        time.sleep(0.005)
        longest = max(longest, time.perf_counter() - before - 0.005)
    whole, spent = time.perf_counter() - began, processor() - spent
    steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items())
    quality = found["quality"]
    reduced = f", {found['components']} components" if found["components"] else ""
    print(
        f"{method:>5} of {n:>6,}{reduced}: {whole:6.1f} s ({steps}), "
        f"{spent:.1f} s of processor; trustworthiness {quality.trust:.4f}, "
        f"{quality.kept:.0%} of neighbours kept, {found['groups']} groups; "
        f"the window's thread waited {longest * 1000:.0f} ms at most"
    )


def frames() -> bool:
    from PySide6.QtCore import QPointF
    from PySide6.QtGui import QImage
    from PySide6.QtWidgets import QApplication

    from mistudio.ui import theme
    from mistudio.ui.features.pictures.point_map import PointMap
    from mistudio.ui.features.pictures.scales import Scale

    app = QApplication.instance() or QApplication([])
    theme.apply(app)
    chance = np.random.default_rng(0)
    centres = chance.normal(scale=8, size=(POINTS // 64, 2))
    places = np.repeat(centres, 64, 0) + 0.3 * chance.normal(size=(POINTS, 2))
    widget = PointMap()
    widget.resize(1200, 700)
    widget.set_points(np.arange(POINTS), places[:, 0], places[:, 1])
    scale = Scale("", "points")
    widget.set_colours(scale.shades(chance.random(POINTS)), scale.palette())
    picture = QImage(1200, 700, QImage.Format.Format_RGB32)

    def time_of(move: Callable[[int], object]) -> np.ndarray:
        """[FRAMES, 2]: by the clock, and this thread's time on a processor."""
        took = []
        for number in range(FRAMES):
            began, spent = time.perf_counter(), time.thread_time()
            move(number)
            widget.render(picture)
            took.append((time.perf_counter() - began, time.thread_time() - spent))
            time.sleep(0.002)  # others get their turn, as between two frames of a screen
        return 1000 * np.array(took)

    def enclose(number: int) -> None:
        angles = np.linspace(0, 6.28, 200)
        path = np.stack([600 + 200 * np.cos(angles), 350 + 200 * np.sin(angles)], 1)
        widget.enclose(path.tolist())

    none = np.zeros(POINTS, bool)
    rows = [
        ("pan, all 65,536 in sight", time_of(lambda i: widget.pan(4 if i % 60 < 30 else -4, 2)))
    ]
    widget.show_all()
    zooming = time_of(lambda i: widget.zoom(1.04 if i < 60 else 1 / 1.04, QPointF(400, 300)))
    rows.append(("zoom in and out, 10 times", zooming))
    widget.show_all()
    widget.set_marks(chance.random(POINTS) < 0.5, none, none)
    rows.append(("pan, half of them faint", time_of(lambda i: widget.pan(3, 1))))
    widget.set_marks(~none, chance.random(POINTS) < 0.02, chance.random(POINTS) < 0.01)
    rows.append(("pan, 1,300 rings, 650 diamonds", time_of(lambda i: widget.pan(-3, 1))))
    place = QPointF(600, 350)
    rows.append(("point under the pointer, and a frame", time_of(lambda i: widget.nearest(place))))
    rows.append(("lasso of 200 corners, and a frame", time_of(enclose)))
    print(f"{POINTS:,} points, 1200 x 700 pixels: milliseconds a frame of {FRAMES}")
    for name, took in rows:
        clock, own = (np.percentile(took[:, i], (50, 95)) for i in (0, 1))
        print(
            f"  {name:<38} clock: median {clock[0]:5.1f}, p95 {clock[1]:5.1f}; "
            f"processor: median {own[0]:5.1f}, p95 {own[1]:5.1f}"
        )
    panned = [took for name, took in rows if "lasso" not in name]
    return all(float(np.percentile(took[:, 1], 95)) < TARGET_MS for took in panned)


def main() -> int:
    good = frames()
    for n in SIZES:
        for method in METHODS:
            lay_out(n, method)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"target: 95 % of frames below {TARGET_MS:.0f} ms of processor; load average {load:.1f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
