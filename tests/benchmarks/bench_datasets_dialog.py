"""Opening a dataset of five million rows, a page of it, and a search of one million rows.

Run it as `python tests/benchmarks/bench_datasets_dialog.py [rows of the large one]` on a machine
that does nothing else; it writes about 1 GB to the temporary folder and takes a few minutes.
Targets: opening 50 ms, a page 50 ms (from the click until it is shown), the first page of a search
500 ms. The rows are generated: words of the sample corpus in an order of chance, a number in each.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PySide6.QtWidgets import QApplication, QWidget  # noqa: E402

from mistudio.engine.datasets import search  # noqa: E402
from mistudio.engine.datasets.documents import DOCUMENTS, OFFSETS  # noqa: E402
from mistudio.library.library import Library  # noqa: E402
from mistudio.settings import Settings  # noqa: E402
from mistudio.ui import theme  # noqa: E402
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager  # noqa: E402
from mistudio.ui.datasets.dialog import DatasetDialog  # noqa: E402
from mistudio.ui.services import Services  # noqa: E402
from mistudio.ui.widgets import ToastArea  # noqa: E402

RUNS = 7
SEARCHED = 1_000_000
# Common, rare, one row of a million, two words that never stand together, nothing, two letters,
# not ASCII.
QUERIES = ("the", "philosophy", "row 999,990 ", "volcano sonata", "not in there", "qz", "Zürich")


def corpus_words() -> list[str]:
    path = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
    with path.open(encoding="utf-8") as file:
        return [word for line in file for word in json.loads(line)["text"].split()]


def make_dataset(library: Library, name: str, rows: int, words: int) -> int:
    """Written as `write_documents` writes, but many rows from few: the texts are built once."""
    chance = random.Random(0)
    vocabulary = corpus_words()
    texts = []
    for _ in range(20_000):
        start = chance.randrange(len(vocabulary) - words)
        chosen = vocabulary[start : start + words]
        chance.shuffle(chosen)
        texts.append(json.dumps(" ".join(chosen), ensure_ascii=False)[1:-1])
    folder = library.new_folder("datasets", name)
    path = library.path(folder)
    path.mkdir(parents=True)
    offsets = np.zeros(rows + 1, np.int64)
    with (path / DOCUMENTS).open("wb", 1 << 20) as file:
        at = 0
        for number in range(rows):
            text = texts[chance.randrange(len(texts))]
            line = f'{{"text": "row {number:,} {text}"}}\n'.encode()
            at += file.write(line)
            offsets[number + 1] = at
    np.save(path / OFFSETS, offsets)
    return library.datasets.add(
        name=name, source="local", origin=name, folder=folder, documents=rows,
        characters=int(offsets[-1]), bytes=int(offsets[-1]), provenance={},
    )  # fmt: skip


class Taken(NamedTuple):
    """Milliseconds: by the clock, and of the processor for this thread, which a busy machine does
    not lengthen as much."""

    wall: float
    cpu: float


class Clock:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def taken(self) -> Taken:
        wall, cpu = time.perf_counter() - self._wall, time.thread_time() - self._cpu
        return Taken(1000 * wall, 1000 * cpu)


class Bench:
    """A window's services over one library."""

    def __init__(self, library: Library) -> None:
        self.application = QApplication.instance() or QApplication([])
        theme.apply(self.application)
        self.window = QWidget()
        self.window.resize(1280, 720)
        self.changes = ChangeNotifier(library)
        self.services = Services(
            library=library,
            jobs=JobManager(library, self.changes),
            changes=self.changes,
            background=Background(library),
            settings=Settings(),
            toasts=ToastArea(self.window),
            navigate=lambda tab_name, **context: None,
        )

    def until(self, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + 600
        while not done():
            self.application.processEvents()
            if time.monotonic() > limit:
                raise SystemExit("It takes more than ten minutes.")

    def open(self, dataset_id: int) -> tuple[DatasetDialog, Taken]:
        """A dialog, and milliseconds from the call until it is painted."""
        began = Clock()
        dataset = self.services.library.datasets.get(dataset_id)
        dialog = DatasetDialog(self.services, dataset, self.window)
        dialog.show()
        dialog.grab()
        return dialog, began.taken()

    def close(self) -> None:
        self.services.jobs.shutdown()
        self.services.background.wait(30)
        self.changes.close()


def opening(bench: Bench, dataset_id: int) -> list[Taken]:
    times = []
    for _ in range(RUNS):
        dialog, taken = bench.open(dataset_id)
        times.append(taken)
        dialog.close()
        bench.services.background.wait(30)
        bench.application.processEvents()
    return times


def pages(bench: Bench, dataset_id: int, rows: int) -> list[Taken]:
    """From asking for a page anywhere in the dataset until its ten rows are painted."""
    dialog, _ = bench.open(dataset_id)
    dialog.tabs.setCurrentIndex(1)
    samples = dialog.samples
    bench.until(lambda: "Showing" in samples.summary.text())
    chance, times = random.Random(1), []
    for _ in range(RUNS + 1):
        wanted = chance.randrange(rows // 10 - 1) * 10
        began = Clock()
        dialog.presenter.read_samples(wanted)
        bench.until(lambda wanted=wanted: samples.rows[0].sample.index == wanted)
        dialog.grab()
        times.append(began.taken())
    dialog.close()
    return times[1:]  # the first lays ten rows out for the first time


def searching(folder: Path, query: str) -> tuple[list[Taken], int]:
    """From nothing open to the numbers of the first page."""
    times, found = [], 0
    for _ in range(RUNS):
        began = Clock()
        with search.DocumentSearch(folder) as documents:
            found = len(documents.find(query).indices)
        times.append(began.taken())
    return times, found


def main() -> int:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    searched = min(SEARCHED, rows)
    with tempfile.TemporaryDirectory(prefix="mistudio-bench-") as root:
        library = Library(Path(root))
        bench = Bench(library)
        kept = True

        def report(name: str, times: list[Taken], target: float, note: str = "") -> None:
            nonlocal kept
            median = statistics.median(taken.wall for taken in times)
            cpu = statistics.median(taken.cpu for taken in times)
            kept = kept and median < target
            print(
                f"{name:<44} {median:>8.1f} ms {cpu:>8.1f} ms {target:>6.0f} ms  {note}",
                flush=True,
            )

        large = make_dataset(library, "large", rows, 8)
        print(f"{'':<44} {'median':>11} {'CPU':>11} {'target':>9}")
        report(f"opening {rows:,} rows", opening(bench, large), 50)
        report(f"a page of {rows:,} rows", pages(bench, large, rows), 50)
        one = make_dataset(library, "searched", searched, 40)
        folder = library.path(library.datasets.get(one).folder)
        size = (folder / DOCUMENTS).stat().st_size
        began = time.perf_counter()
        search.build_index(folder)
        seconds = time.perf_counter() - began
        index = (folder / search.INDEX).stat().st_size
        print(
            f"index of {searched:,} rows: {size / 1e6:.0f} MB of documents in {seconds:.0f} s "
            f"({size / 1e6 / seconds:.1f} MB/s), {index / 1e6:.0f} MB"
        )
        for query in QUERIES:
            times, found = searching(folder, query)
            report(f"search {query!r} in {searched:,} rows", times, 500, f"{found} found")
        bench.close()
        library.close()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"load average {load:.1f}; {'every target is kept' if kept else 'NOT every target is kept'}"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
