"""How late the window's event loop is while a dictionary trains in the same process.

A 5 ms precise timer in the GUI thread measures how late it fires, with the main window shown, the
job drawer open and a live chart. `--synthetic` trains with a plain torch loop; the default is the
real Train job on the tiny model of the tests. Target: p95 below 50 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from mistudio.jobs.control import Phase  # noqa: E402
from mistudio.jobs.job import JobContext  # noqa: E402
from mistudio.library.library import Library  # noqa: E402

INTERVAL_MS = 5
TARGET_P95_MS = 50.0


@dataclass(frozen=True)
class TorchLoop:
    """A TopK autoencoder 576 -> 4608 on noise: the arithmetic of a training run, no data."""

    seconds: float = 10.0
    kind: ClassVar[str] = "torch_loop"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("train"),)

    def title(self, library: Library) -> str:
        return "Train a dictionary (synthetic)"

    def run(self, context: JobContext) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        encoder = torch.nn.Linear(576, 4608)
        decoder = torch.nn.Linear(4608, 576)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-4)
        began, step = time.monotonic(), 0
        while (spent := time.monotonic() - began) < self.seconds:
            context.check()
            batch = torch.randn(256, 576, generator=generator)
            values, indices = encoder(batch).topk(32, dim=-1)
            sparse = torch.zeros(256, 4608).scatter_(-1, indices, values.relu())
            loss = (decoder(sparse) - batch).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            context.record({"step": step, "loss": loss.item()})
            context.report(spent, self.seconds, "train", loss=loss.item())
        return {"steps": step}


def real_job(library: Library, tokens: int) -> Any:
    """The Train job on the tests' tiny model and the sample text."""
    from mistudio.jobs.job import run_job, submit
    from mistudio.jobs.kinds import AddDataset, AddModel, Train
    from mistudio.resources import resource

    text = resource("sample", "wikipedia_vital_intros.jsonl")
    ids = []
    for job, key in (
        (AddModel(str(ROOT / "tests" / "data" / "tiny-llama-0.9m")), "model_id"),
        (AddDataset(str(text)), "dataset_id"),
    ):
        record = run_job(library, job, submit(library, job))
        if record.status != "finished":
            raise SystemExit(f"{record.title}: {record.error}")
        ids.append(record.result[key])
    config = {"tokens": tokens, "expansion": 32.0}
    return Train(ids[0], ids[1], ["blocks.1.hook_resid_post"], config)


def measure(seconds: float, synthetic: bool, tokens: int, threads: int) -> dict[str, float]:
    from PySide6.QtCore import QObject, Qt, QTimer
    from PySide6.QtWidgets import QApplication

    from mistudio.settings import Settings
    from mistudio.ui import theme
    from mistudio.ui.main_window import MainWindow
    from mistudio.ui.widgets.metric_chart import MetricChart

    app = QApplication.instance() or QApplication([])
    theme.apply(app)
    with tempfile.TemporaryDirectory(prefix="mistudio-bench-") as home:
        os.environ["MISTUDIO_HOME"] = home
        import torch

        torch.set_num_threads(threads or os.cpu_count() or 2)
        library = Library(Path(home) / "library")
        window = MainWindow(library, Settings())
        chart = MetricChart("Loss", {"loss": "Loss"})
        chart.setWindowTitle("Loss")
        chart.resize(640, 300)

        class Probe(QObject):
            """Fires every 5 ms and notes how late."""

            def __init__(self) -> None:
                super().__init__()
                self.late: list[float] = []
                self.rows = 0
                self.last = time.perf_counter()
                self.job_id = -1

            def on_timeout(self) -> None:
                now = time.perf_counter()
                self.late.append(max(0.0, (now - self.last) * 1000 - INTERVAL_MS))
                self.last = now

            def on_tick(self) -> None:
                rows = window.services.jobs.metrics(self.job_id, self.rows)
                self.rows += len(rows)
                chart.append(rows)

        probe = Probe()
        timer = QTimer()
        timer.setTimerType(Qt.TimerType.PreciseTimer)
        timer.setInterval(INTERVAL_MS)
        timer.timeout.connect(probe.on_timeout)
        window.services.jobs.tick.connect(probe.on_tick)
        window.show()
        chart.show()
        window.start()
        window.drawer.show()
        job = TorchLoop(seconds) if synthetic else real_job(library, tokens)
        probe.job_id = window.services.jobs.submit(job)
        window.services.jobs.idle.connect(app.quit)
        probe.last = time.perf_counter()
        timer.start()
        app.exec()
        timer.stop()
        chart.close()
        window.close()
        record = library.jobs.get(probe.job_id)
        library.close()
    if record.status != "finished":
        raise SystemExit(f"The job ended as {record.status}: {record.error}")
    ordered = sorted(probe.late)
    return {
        "samples": len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[int(len(ordered) * 0.95)],
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
        "rows": probe.rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the app takes")
    arguments = parser.parse_args()
    found = measure(arguments.seconds, arguments.synthetic, arguments.tokens, arguments.threads)
    print(
        f"event-loop lag while training: p50 {found['p50']:.1f} ms, p95 {found['p95']:.1f} ms, "
        f"p99 {found['p99']:.1f} ms, max {found['max']:.1f} ms "
        f"({found['samples']:.0f} samples, {found['rows']:.0f} metric rows drawn; "
        f"target p95 {TARGET_P95_MS:.0f} ms)"
    )
    return 0 if found["p95"] < TARGET_P95_MS else 1


if __name__ == "__main__":
    sys.exit(main())
