"""The pieces of a journey: real text, the tiny trained model, a library with everything in it, the
command line in this process and in processes of its own that can be killed."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "data" / "tiny-llama-0.9m"
CORPUS = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
POINT = "blocks.1.hook_resid_post"
QUICK = {"tokens": 8000, "batch_size": 512, "expansion": 1, "k": 8, "context": 64}
KINDS = ("datasets", "models", "activations", "trainings", "features")


def quick_options() -> list[str]:
    """A training of a second or two, as options of the command line."""
    return [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]


def texts(n: int, skip: int = 0) -> list[dict[str, str]]:
    with CORPUS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, skip, skip + n)]


def write_texts(path: Path, n: int) -> Path:
    """The first `n` documents of the sample corpus as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(n)), encoding="utf-8")
    return path


def run_cli(root: Path, *arguments: object) -> int:
    """`mistudio --library ROOT ...` in this process; the exit code."""
    from mistudio import cli

    before = list(logging.getLogger().handlers)
    try:
        return cli.run(["--library", str(root), *map(str, arguments)])
    finally:
        for handler in [h for h in logging.getLogger().handlers if h not in before]:
            logging.getLogger().removeHandler(handler)
            handler.close()


def build(folder: Path) -> Path:
    """A library with one of everything: dataset `small`, the tiny model, stored activations, run
    `first` of layer 1 learnt from them, its features and a generation."""
    root = folder / "library"
    text = write_texts(folder / "small.jsonl", 120)
    train = ("train", "--model", MODEL.name, "--dataset", "small", "--layers", 1)
    steer = ("steer", "first", "--feature", 3, "--strength", 1, "--max-tokens", 4)
    for arguments in (
        ("dataset", "add", text),
        ("model", "add", MODEL, "--precision", "fp32"),
        (*train, "--name", "first", "--source", "store", *quick_options()),
        ("discover", "first", "--top-k", 5),
        (*steer, "--prompt", "The sea"),
    ):
        assert run_cli(root, *arguments) == 0, arguments
    return root


_built: list[Path] = []


def built_once(folders: Any) -> Path:
    """What `build` makes, once a session, for every folder of tests that asks."""

    if not _built:
        _built.append(build(folders.mktemp("built")))
    return _built[0]


def copy_of(built: Path, folder: Path) -> Path:
    """A library of the test's own. Its database is copied whole, log included."""
    target = folder / "copied"
    shutil.copytree(built, target)
    return target


# --- looking at a library from outside ------------------------------------------------------------


def rows(root: Path, sql: str, *params: object) -> list[dict[str, Any]]:
    """Read the database as any other program would, without opening the library."""
    connection = sqlite3.connect(f"file:{root / 'library.db'}?mode=ro", uri=True, timeout=10)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(sql, params)]
    finally:
        connection.close()


def contents(root: Path) -> dict[str, Any]:
    """Everything that a library holds but its jobs: rows, and files with their sizes."""
    tables = [
        row["name"]
        for row in rows(root, "SELECT name FROM sqlite_master WHERE type = 'table'")
        if row["name"] != "jobs"
    ]
    found: dict[str, Any] = {table: rows(root, f"SELECT * FROM {table}") for table in tables}
    found["files"] = {
        str(path.relative_to(root)): path.stat().st_size
        for kind in (*KINDS, "exports", "trash", "work")
        for path in (root / kind).rglob("*")
        if path.is_file()
    }
    return found


def check_whole(root: Path) -> None:
    """The library opens, its database is sound, every record's folder is there and complete, and
    nothing lies about that no record names."""
    from mistudio.engine.activations.store import StoredActivations
    from mistudio.engine.datasets.documents import Documents
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.loading import check_folder, describe, load_tokenizer
    from mistudio.engine.sae.files import load_sae
    from mistudio.library.library import Library

    library = Library(root)
    try:
        assert library.rows("PRAGMA integrity_check")[0][0] == "ok"
        assert library.rows("PRAGMA foreign_key_check") == []
        named = set()
        for dataset in library.datasets.all():
            documents = Documents(library.path(dataset.folder))
            assert sum(1 for _ in documents) == len(documents) == dataset.documents
            assert sum(len(d.text) for d in documents) == dataset.characters
            named.add(dataset.folder)
        for model in library.models.all():
            check_folder(library.path(model.folder))
            assert describe(library.path(model.folder)).parameters == model.parameters
            load_tokenizer(library.path(model.folder))
            named.add(model.folder)
        for tokenization in library.tokenizations.all():
            store = TokenStore(library.path(tokenization.folder))
            assert len(store.train) + len(store.heldout) == tokenization.tokens
            named.add(tokenization.folder)
        for extraction in library.extractions.all():
            stored = StoredActivations(library.path(extraction.folder))
            assert sum(map(len, stored.rows.values())) == extraction.tokens
            named.add(extraction.folder)
        for training in library.trainings.all():
            record = json.loads((library.path(training.folder) / "run.json").read_text("utf-8"))
            assert record["tokens"] == training.record["tokens"]
            assert library.saes.of_training(training.id)
            named.add(training.folder)
        for sae in library.saes.all():
            assert load_sae(library.path(sae.folder)).dictionary.d_sae == sae.d_sae
        for run in library.feature_runs.all():
            assert len(FeatureStore(library.path(run.folder))) == run.n_features
            named.add(run.folder)
        there = {f"{kind}/{path.name}" for kind in KINDS for path in (root / kind).iterdir()}
        assert there == named
        assert list((root / "work").iterdir()) == []
    finally:
        library.close()


# --- processes of their own -----------------------------------------------------------------------


class Child:
    """One `mistudio` in a process of its own, which can be sent signals."""

    def __init__(self, answers: Any, folder: Path, pid: int) -> None:
        self.pid = pid
        self._answers, self._folder = answers, folder
        self._code: int | None = None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal that ended it."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(json.loads(self._answers.readline())["status"])
        return self._code

    @property
    def ended(self) -> bool:
        return self._code is not None

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text(encoding="utf-8")


class Children:
    """Starts one child at a time, forked from a process that has imported torch already: the
    same code from `main()` on, a new process each time, three seconds less."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: Child | None = None
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "warm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: object, limit: int | None = None) -> Child:
        """`mistudio ARGUMENTS`; `limit` is the largest file it may write, in bytes."""
        assert self._parent.stdin and self._parent.stdout
        if self._last and not self._last.ended:  # of a test that failed
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                self._last.signal(signal.SIGKILL)
            self._last.wait()
        request = {"arguments": list(map(str, arguments)), "limit": limit}
        request |= {"folder": str(self._folder), "home": os.environ["MISTUDIO_HOME"]}
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        pid = json.loads(self._parent.stdout.readline())["pid"]
        self._last = Child(self._parent.stdout, self._folder, pid)
        return self._last

    def run(self, *arguments: object, limit: int | None = None) -> Child:
        child = self.start(*arguments, limit=limit)
        child.wait()
        return child

    def close(self) -> None:
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.close()
        self._parent.wait(timeout=30)
        self._parent.stdout.close()


_children: list[Children] = []


def children_once(folders: Any) -> Children:
    """One such process a session, for every folder of tests that asks."""
    if sys.platform == "win32":
        pytest.skip("Windows cannot fork")
    if not _children:
        _children.append(Children(folders.mktemp("children")))
        atexit.register(_children[0].close)
    return _children[0]


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def in_phase(root: Path, kind: str, phase: str, progress: float = 0.0) -> Callable[[], bool]:
    """Whether a job of this kind is running this phase and its bar is beyond `progress`."""

    def look() -> bool:
        if not (root / "library.db").exists():
            return False
        try:
            found = rows(root, "SELECT * FROM jobs WHERE kind = ? AND status = 'running'", kind)
        except sqlite3.OperationalError:
            return False  # the tables are being made
        return any(row["phase"] == phase and row["fraction"] >= progress for row in found)

    return look


def kill(child: Child) -> None:
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
