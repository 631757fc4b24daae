"""`torchrun -m mistudio ...`: the first process does what was typed, the second only helps it to
train; what ends one of them ends both, and nothing that was learnt is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from journeys import road
from safetensors.torch import load_file

from mistudio.engine.training import checkpoints, distributed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals are those of Unix"),
]
TRAIN = ("train", "--model", road.MODEL.name, "--dataset", "small", "--layers", 1)
SECONDS = 150  # until a test gives up on processes that hang
# Norms of differences against norms of weights, float32: see test_distributed.py.
ROUNDING = 5e-3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    text = road.write_texts(folder / "small.jsonl", 120)
    assert road.run_cli(folder / "library", "dataset", "add", text) == 0
    assert road.run_cli(folder / "library", "model", "add", road.MODEL, "--precision", "fp32") == 0
    return folder / "library"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return road.copy_of(made, tmp_path)


class Launched:
    """Two processes under torchrun, each with what it wrote."""

    def __init__(self, launcher: subprocess.Popen[bytes], logs: Path) -> None:
        self.launcher, self._logs = launcher, logs

    def wait(self) -> int:
        return self.launcher.wait(SECONDS)

    def said(self, rank: int, stream: str = "stderr") -> str:
        found = self._logs.glob(f"*/attempt_0/{rank}/{stream}.log")
        return "".join(path.read_text(encoding="utf-8") for path in found)

    def process(self, rank: int) -> psutil.Process:
        for child in psutil.Process(self.launcher.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        raise AssertionError(f"process {rank} has ended: {self.said(0)} {self.said(1)}")


@contextmanager
def launched(root: Path, logs: Path, *arguments: object) -> Iterator[Launched]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(logs)]
    command += ["-m", "mistudio", "--library", str(root), *map(str, arguments)]
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(road.ROOT)}
    if sys.platform == "linux":
        here["GLOO_SOCKET_IFNAME"] = "lo"
    logs.mkdir()
    with (logs / "launcher").open("w") as quiet:
        launcher = subprocess.Popen(
            command, env={**os.environ, **here}, stdout=quiet, stderr=subprocess.STDOUT
        )
    try:
        yield Launched(launcher, logs)
    finally:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(), launcher]:
                process.kill()
            launcher.wait()


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    (path,) = root.glob(f"trainings/{name}-*/{road.POINT}/sae_weights.safetensors")
    return load_file(path)


def learning(root: Path) -> Callable[[], bool]:
    """Whether the newest job has learnt for some steps."""

    def some_steps() -> bool:
        histories = list(root.glob("checkpoints/*/metrics.jsonl"))
        return any(path.stat().st_size > 2000 for path in histories)

    return some_steps


def test_two_processes_train_what_one_trains(root: Path, tmp_path: Path) -> None:
    options = (*TRAIN, "--source", "store", *road.quick_options())
    with launched(root, tmp_path / "logs", *options, "--name", "two") as run:
        assert run.wait() == 0, run.said(0)
    assert "Run 1: two (completed)" in run.said(0, "stdout")
    assert run.said(1) == run.said(1, "stdout") == ""
    assert road.run_cli(root, *options, "--name", "one") == 0
    one, two = weights(root, "one"), weights(root, "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float((value - two[name]).norm() / value.norm()) < ROUNDING, name
    kinds = [row["kind"] for row in road.rows(root, "SELECT kind FROM jobs ORDER BY id")]
    assert kinds.count("train") == 2  # the second process began none
    road.check_whole(root)


def test_a_killed_process_ends_the_run_and_another_number_of_them_goes_on(
    root: Path, tmp_path: Path
) -> None:
    options = (*TRAIN, "--source", "stream", *road.quick_options(), "--set", "tokens=200000")
    with launched(root, tmp_path / "logs", *options, "--name", "cut") as run:
        road.wait_until(learning(root), SECONDS)
        run.process(1).send_signal(signal.SIGKILL)
        assert run.wait() == 1
    assert "Another process of this run has ended." in run.said(0)
    assert "Traceback" not in run.said(0)
    assert run.said(1) == ""
    (job,) = road.rows(root, "SELECT id, status FROM jobs WHERE kind = 'train'")
    assert job["status"] == "failed"
    assert f"`mistudio resume {job['id']}` goes on" in run.said(0)
    checkpoint, notes = checkpoints.newest(root / "checkpoints" / f"job-{job['id']}")
    assert checkpoint is not None and checkpoint.step > 0 and notes == []
    assert road.run_cli(root, "resume", job["id"]) == 0
    road.check_whole(root)


def test_what_only_one_process_can_do_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Two:
        rank, size = 0, 2

    monkeypatch.setattr(distributed, "_current", Two())
    assert road.run_cli(root, *TRAIN, "--source", "hybrid", *road.quick_options()) == 1
    assert "cannot take turns in several processes" in capsys.readouterr().err
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "from_environment", distributed.current)
    assert road.run_cli(root, "app") == 2
    assert "The window needs one process" in capsys.readouterr().err
