"""How late the window's event loop is while dictionaries train in it, and what the window costs.

The same training runs by turns with the real window (offscreen, the Training tab open, its live
charts in sight) and without any, each in a process of its own. With the window a 5 ms precise timer
in the GUI thread measures how late it fires. Targets, from the first step to the last: p95 below
16 ms, worst below 200 ms; training in the window at least 95 % as fast as without.

By default four layers of the tests' tiny model train; where MISTUDIO_SAMPLE_MODEL names a folder
with SmolLM2-135M, `--sample` trains on that. `--load N` keeps N other processes busy meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from mistudio import bootstrap  # noqa: E402

bootstrap.prepare()  # as the application does, before anything imports torch

INTERVAL_MS = 5
TARGET_P95_MS, TARGET_WORST_MS, TARGET_SHARE = 16.0, 200.0, 0.95
SIZE = (1920, 1080)
TINY = ROOT / "tests" / "data" / "tiny-llama-0.9m"
TEXT = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"


# --- one run, in a process of its own -------------------------------------------------------------


def run_plain(library: Any, job: Any) -> dict[str, Any]:
    """Without a window, in the main thread."""
    from mistudio.jobs.job import run_job, submit

    use_all_cores()
    record = run_job(library, job, submit(library, job))
    return outcome(library, record)


def run_in_window(library: Any, job: Any, profile: Path | None) -> dict[str, Any]:
    """In the main window, as after a click on Start Training."""
    from PySide6.QtCore import QObject, Qt, QTimer
    from PySide6.QtWidgets import QApplication

    from mistudio.settings import Settings
    from mistudio.ui import theme
    from mistudio.ui.device import find_device
    from mistudio.ui.main_window import MainWindow
    from mistudio.ui.training.presenter import import_engine

    app = QApplication.instance() or QApplication([])
    theme.apply(app)
    window = MainWindow(library, Settings())
    window.resize(*SIZE)
    window.show()
    window.start()

    class Probe(QObject):
        """Fires every 5 ms and notes how late, and what the card shows then."""

        def __init__(self) -> None:
            super().__init__()
            self.job_id = -1
            self.gaps: list[float] = []  # ms, from the first step to the last
            self.begun: list[float] = []  # ms, from the click to the first step
            self.last = time.perf_counter()
            self.first: tuple[float, float] | None = None
            self.collecting = 0.0
            self.collections: list[float] = []  # ms of full garbage collections
            self.scrolled = False
            self.loaded = 0

        def on_collection(self, phase: str, info: dict[str, Any]) -> None:
            now = time.perf_counter()
            if phase == "start":
                self.collecting = now
            elif info["generation"] == 2 and self.gaps:
                self.collections.append((now - self.collecting) * 1000)

        def on_loaded(self, _: object) -> None:
            self.loaded += 1
            if self.loaded == 2:
                self.job_id = window.services.jobs.submit(job)
                window.navigate("training", job_id=self.job_id)
                self.last = time.perf_counter()
                timer.start()

        def on_timeout(self) -> None:
            now = time.perf_counter()
            gap, self.last = (now - self.last) * 1000, now
            page = window.page("training")
            card = next((c for c in page.job_cards() if c.job.id == self.job_id), None)
            trains = card is not None and card._n_rows > 0
            (self.gaps if trains else self.begun).append(gap)
            if trains and self.first is None:
                self.first = (now, time.thread_time())
            if trains and not self.scrolled and card.charts is not None and card.charts.density:
                self.scrolled = True
                place = card.charts.mapTo(page.column_page.widget(), card.charts.rect().topLeft())
                page.column_page.verticalScrollBar().setValue(place.y())

    probe = Probe()
    gc.callbacks.append(probe.on_collection)
    timer = QTimer()
    timer.setTimerType(Qt.TimerType.PreciseTimer)
    timer.setInterval(INTERVAL_MS)
    timer.timeout.connect(probe.on_timeout)
    window.services.jobs.idle.connect(app.quit)
    window.services.background.run(lambda: find_device(0), probe.on_loaded)
    window.services.background.run(import_engine, probe.on_loaded)
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
        app.exec()
        profiler.disable()
        profiler.dump_stats(profile)
    else:
        app.exec()
    assert probe.first is not None
    own = time.thread_time() - probe.first[1], time.perf_counter() - probe.first[0]
    timer.stop()
    gc.callbacks.remove(probe.on_collection)
    if not probe.scrolled:
        raise SystemExit("The training ended before its charts were seen: use more --tokens")
    record = library.jobs.get(probe.job_id)
    window.services.background.wait(10)
    window.close()
    return {**outcome(library, record), "gaps": probe.gaps, "begun": probe.begun,
            "collections": probe.collections, "own": own}  # fmt: skip


def use_all_cores() -> None:
    import torch

    from mistudio import device

    torch.set_num_threads(device.cores())


def outcome(library: Any, record: Any) -> dict[str, Any]:
    if record.status != "finished":
        raise SystemExit(f"The job ended as {record.status}: {record.error}")
    training = library.trainings.get(record.result["training_id"]).record
    return {"speed": training["tokens_per_second"], "seconds": training["training_seconds"]}


def child(kind: str, folder: Path, job: str, profile: Path | None) -> int:
    from mistudio.jobs.kinds import job_from_row
    from mistudio.library.library import Library

    os.environ["MISTUDIO_HOME"] = str(folder)
    library = Library(folder / "library")
    work = job_from_row("train", json.loads(job))
    found = run_plain(library, work) if kind == "plain" else run_in_window(library, work, profile)
    library.close()
    print("\n" + json.dumps(found))
    return 0


# --- by turns -------------------------------------------------------------------------------------


def prepare(folder: Path, model: Path, layers: list[int], tokens: int) -> dict[str, Any]:
    """A library with the model, the text and its tokens; the parameters of the training."""
    from mistudio.jobs.job import run_job, submit
    from mistudio.jobs.kinds import AddDataset, AddModel, Train
    from mistudio.library.library import Library

    use_all_cores()
    library = Library(folder / "library")
    ids = []
    for job, key in ((AddModel(str(model)), "model_id"), (AddDataset(str(TEXT)), "dataset_id")):
        record = run_job(library, job, submit(library, job))
        if record.status != "finished":
            raise SystemExit(f"{record.title}: {record.error}")
        ids.append(record.result[key])
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    short = Train(*ids, points[:1], {"tokens": 4096, "expansion": 1, "context": 128})
    record = run_job(library, short, submit(library, short))  # tokenises the text
    if record.status != "finished":
        raise SystemExit(f"{record.title}: {record.error}")
    library.close()
    config = {"tokens": tokens, "context": 128, "autosave_minutes": 0.0}
    return {"model_id": ids[0], "dataset_id": ids[1], "hook_points": points, "config": config}


def turn(kind: str, prepared: Path, job: dict[str, Any], profile: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mistudio-bench-") as home:
        shutil.copytree(prepared, home, dirs_exist_ok=True)
        command = [sys.executable, __file__, "--child", kind, home, json.dumps(job)]
        command += ["--profile", str(profile)] if profile else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"The run {kind} failed (exit {done.returncode})")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def lateness(gaps: list[float]) -> list[float]:
    return sorted(max(0.0, gap - INTERVAL_MS) for gap in gaps)


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def waits(gaps: list[float], share: float) -> float:
    """ms that an event at a random moment waits at most, in this share of the moments: of a gap
    of g ms, g - w ms are such that an event then waits longer than w."""
    whole, low, high = sum(gaps), 0.0, max(gaps)
    for _ in range(40):
        middle = (low + high) / 2
        longer = sum(max(0.0, gap - middle) for gap in gaps)
        low, high = (middle, high) if longer > (1 - share) * whole else (low, middle)
    return high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=0, help="0: about a minute a run")
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    parser.add_argument("--sample", action="store_true", help="the model of MISTUDIO_SAMPLE_MODEL")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="N busy processes beside")
    parser.add_argument("--profile", type=Path, help="cProfile of the GUI thread, to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, job = arguments.child
        return child(kind, Path(folder), job, arguments.profile)
    model = TINY
    if arguments.sample:
        model = Path(os.environ.get("MISTUDIO_SAMPLE_MODEL", ""))
        if not (model / "config.json").exists():
            raise SystemExit("MISTUDIO_SAMPLE_MODEL names no folder with a model")
    layers = arguments.layers or ([10] if arguments.sample else [0, 1, 2, 3])
    tokens = arguments.tokens or (200_000 if arguments.sample else 3_000_000)
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.load)
    ]
    try:
        return measure(model, layers, tokens, arguments.rounds, arguments.profile)
    finally:
        for process in busy:
            process.kill()


def measure(model: Path, layers: list[int], tokens: int, rounds: int, profile: Path | None) -> int:
    speeds: dict[str, list[float]] = {"plain": [], "window": []}
    gaps: list[float] = []
    begun: list[float] = []
    collections: list[float] = []
    own: list[tuple[float, float]] = []  # seconds of processor time of the GUI thread, of the clock
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    with tempfile.TemporaryDirectory(prefix="mistudio-bench-") as folder:
        job = prepare(Path(folder), model, layers, tokens)
        for number in range(rounds):
            order = ("plain", "window") if number % 2 == 0 else ("window", "plain")
            for kind in order:
                found = turn(kind, Path(folder), job, profile if kind == "window" else None)
                speeds[kind].append(found["speed"])
                gaps += found.get("gaps", [])
                begun += found.get("begun", [])
                collections += found.get("collections", [])
                if "own" in found:
                    own.append(found["own"])
    late = lateness(gaps)
    shares = [w / p for w, p in zip(speeds["window"], speeds["plain"], strict=True)]
    share = statistics.median(shares)
    p95, worst = quantile(late, 0.95), late[-1]
    kept = p95 < TARGET_P95_MS and worst < TARGET_WORST_MS and share >= TARGET_SHARE
    print(f"{model.name}, layers {layers}, {tokens:,} tokens, {rounds} rounds by turns; "
          f"load of the machine before: {load:.1f}")  # fmt: skip
    moments = f"an event at a random moment waits at most {waits(gaps, 0.95):.1f} ms in 95 %"
    print(f"event loop, first step to last: p50 {quantile(late, 0.5):.1f} ms, p95 {p95:.1f} ms, "
          f"p99 {quantile(late, 0.99):.1f} ms, worst {worst:.0f} ms ({len(late)} samples; "
          f"{moments})")  # fmt: skip
    before = lateness(begun)
    print(f"before the first step (loading, tokens): p95 {quantile(before, 0.95):.1f} ms, "
          f"worst {before[-1]:.0f} ms ({len(before)} samples)")  # fmt: skip
    at = [sum(gaps[:n]) / 1000 for n in sorted(range(len(gaps)), key=gaps.__getitem__)[-3:]]
    print(f"the worst came {', '.join(f'{second:.1f}' for second in at)} s after the first step; "
          f"full garbage collections: {len(collections)}, longest "
          f"{max(collections, default=0):.0f} ms")  # fmt: skip
    spent, clock = (sum(values) for values in zip(*own, strict=True))
    print(f"the window's thread took {spent:.1f} s of processor time in {clock:.0f} s: "
          f"{spent / clock:.1%} of one core")  # fmt: skip
    for kind, values in speeds.items():
        print(f"tokens/s {kind}: {', '.join(f'{value:,.0f}' for value in values)}")
    print(f"speed in the window: {share:.3f} of that without "
          f"({', '.join(f'{value:.3f}' for value in shares)})")  # fmt: skip
    print(f"targets p95 < {TARGET_P95_MS:.0f} ms, worst < {TARGET_WORST_MS:.0f} ms, "
          f"speed >= {TARGET_SHARE}: {'kept' if kept else 'NOT kept'}")  # fmt: skip
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
