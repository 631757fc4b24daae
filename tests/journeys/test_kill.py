"""The process is killed in the middle of every kind of work: what was finished stays, what was not
leaves no trace but its job, which can be run again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from journeys import road
from mistudio.engine.models.checks import TEXT_LIMIT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


@dataclass(frozen=True)
class Moment:
    """Work that is long enough to be hit, the phase to hit it in, and what has been written of it
    by then (in the test's folder)."""

    kind: str
    phase: str
    arguments: Callable[[Path, Path], tuple[object, ...]]
    progress: float = 0.0
    half: str = "copied"

    def reached(self, root: Path, folder: Path) -> bool:
        """Whether it is in the middle of it now."""
        running = road.in_phase(root, self.kind, self.phase, self.progress)
        return running() and any(folder.glob(self.half))


def _long_text(root: Path, folder: Path) -> Path:
    text = road.write_texts(folder / "long.jsonl", 2000)
    with text.open("a", encoding="utf-8") as file:
        content = text.read_text(encoding="utf-8")
        for _ in range(4):
            file.write(content)
    return text


def _add_dataset(root: Path, folder: Path) -> tuple[object, ...]:
    return "dataset", "add", _long_text(root, folder)


def _add_model(root: Path, folder: Path) -> tuple[object, ...]:
    """Files of zeros that take no room here make the copy take a while."""
    model = folder / "model"
    shutil.copytree(road.MODEL, model)
    for number in range(300_000_000 // TEXT_LIMIT + 1):
        with (model / f"notes{number}.txt").open("wb") as notes:
            notes.truncate(TEXT_LIMIT)
    return "model", "add", model


def _tokenize(root: Path, folder: Path) -> tuple[object, ...]:
    text = _long_text(root, folder)
    assert road.run_cli(root, "dataset", "add", text, "--name", "long") == 0
    return (*_train(root, folder)[:4], "long", "--layers", "1", "--source", "store")


def _train(root: Path, folder: Path) -> tuple[object, ...]:
    train = ("train", "--model", road.MODEL.name, "--dataset", "small", "--layers", "1")
    return (
        *train,
        "--source",
        "stream",
        *road.quick_options(),
        "--set",
        "tokens=120000",
        "--set",
        "batch_size=64",
    )


def _extract(root: Path, folder: Path) -> tuple[object, ...]:
    train = ("train", "--model", road.MODEL.name, "--dataset", "small", "--layers", "2,3")
    return (*train, "--source", "store", *road.quick_options())


def _evaluate(root: Path, folder: Path) -> tuple[object, ...]:
    train = ("train", "--model", road.MODEL.name, "--dataset", "small", "--layers", "1")
    return (*train, "--source", "stream", *road.quick_options())


def _discover(root: Path, folder: Path) -> tuple[object, ...]:
    return "discover", "first"


def _steer(root: Path, folder: Path) -> tuple[object, ...]:
    steer = ("steer", "first", "--feature", "3", "--strength", "1", "--prompt", "The sea")
    return (*steer, "--max-tokens", "150")


WORK = "copied/work/job-*"
MOMENTS = (
    Moment("add_dataset", "read", _add_dataset, half=f"{WORK}/dataset/documents.jsonl"),
    Moment("add_model", "import", _add_model, half=f"{WORK}/model/notes0.txt"),
    Moment(
        "tokenize", "tokenize", _tokenize, half="copied/checkpoints/job-*/step-tokens/train.ids"
    ),
    Moment(
        "extract", "extract", _extract, half="copied/checkpoints/job-*/extraction/train/*/*.f16"
    ),
    Moment("train", "train", _train, progress=0.1, half="copied/checkpoints/job-*/metrics.jsonl"),
    Moment("train", "evaluate", _evaluate),
    Moment("discover", "discover", _discover),
    Moment("steer", "generate", _steer),
)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m.kind}-{m.phase}")
def test_a_kill_costs_only_the_unfinished_work_which_can_be_run_again(
    moment: Moment,
    root: Path,
    tmp_path: Path,
    mistudio: road.Children,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = moment.arguments(root, tmp_path)
    before = road.contents(root)
    child = mistudio.start("--library", root, *arguments)
    road.wait_until(lambda: moment.reached(root, tmp_path))
    road.kill(child)
    (job,) = road.rows(root, "SELECT * FROM jobs WHERE status = 'running'")
    assert (job["kind"], job["phase"]) == (moment.kind, moment.phase)

    # What was finished before is there, whole, and nothing else is.
    road.check_whole(root)
    after = road.contents(root)
    assert after["files"].items() >= before["files"].items()
    for table in ("datasets", "models", "trainings", "saes", "feature_runs", "generations"):
        assert after[table] == before[table], table
    assert _visible(tmp_path / "exported") == []

    # The job says so, and runs again.
    listed = tmp_path / "listed.json"
    assert mistudio.run("--library", root, "list", "--json", listed).wait() == 0
    shown = json.loads(listed.read_text(encoding="utf-8"))["jobs"]
    assert [(row["id"], row["status"]) for row in shown] == [(job["id"], "interrupted")]
    again = mistudio.run("--library", root, "job", "retry", job["id"])
    assert again.wait() == 0, again.err
    # What had been learnt or tokenized already is gone on with, in the same job.
    kept = (moment.kind, moment.phase) in (("train", "evaluate"), ("tokenize", "tokenize"))
    (new,) = road.rows(root, "SELECT * FROM jobs WHERE id > ? - ?", job["id"], int(kept))
    assert (new["kind"], new["params"]) == (moment.kind, job["params"])
    assert new["status"] == "finished"
    road.check_whole(root)
    assert road.run_cli(root, "list") == 0
    assert "interrupted" not in capsys.readouterr().out
    if moment.kind == "export":
        assert _visible(tmp_path / "exported") == [road.POINT]
        assert not list(tmp_path.glob(".exported*"))


def _visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))


# --- going on with a training ---------------------------------------------------------------------


def _long_train(name: str) -> tuple[object, ...]:
    """Some seconds, saved every few steps."""
    options = {"steps": 150, "batch_size": 64, "autosave_steps": 7, "expansion": 2, "k": 8}
    return (
        *("train", "--model", road.MODEL.name, "--dataset", "small", "--layers", "1"),
        *("--source", "stream", "--name", name, "--set", "context=64"),
        *(part for pair in options.items() for part in ("--set", "=".join(map(str, pair)))),
    )


def _tensors(root: Path, name: str) -> dict[str, bytes]:
    (run,) = road.rows(root, "SELECT folder FROM trainings WHERE name = ?", name)
    folder = root / run["folder"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def _history(root: Path, name: str) -> list[dict[str, object]]:
    (run,) = road.rows(root, "SELECT folder FROM trainings WHERE name = ?", name)
    lines = (root / run["folder"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = ("tokens_per_second", "time")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_a_training_killed_at_any_moments_ends_as_if_it_had_never_been(
    root: Path, mistudio: road.Children
) -> None:
    whole = mistudio.run("--library", root, *_long_train("whole"))
    assert whole.wait() == 0, whole.err
    moments = random.Random()  # another place every time: a wrong one will be hit some day
    arguments, kills = _long_train("killed"), 0
    for _ in range(2):
        child = mistudio.start("--library", root, *arguments)
        road.wait_until(lambda: any((root / "checkpoints").glob("*/step-*")))
        road.wait_until(road.in_phase(root, "train", "train"))
        time.sleep(moments.uniform(0.0, 0.4))
        child.signal(signal.SIGKILL)
        if child.wait() == 0:
            break  # it was quicker
        kills += 1
        arguments = ("resume",)
    else:
        last = mistudio.run("--library", root, "resume")
        assert last.wait() == 0, last.err
    assert kills > 0
    assert _tensors(root, "killed") == _tensors(root, "whole")
    assert _history(root, "killed") == _history(root, "whole")
    jobs = road.rows(root, "SELECT status FROM jobs WHERE kind = 'train'")
    assert {job["status"] for job in jobs} == {"finished"}
    assert list((root / "checkpoints").iterdir()) == []
    road.check_whole(root)


def test_a_training_that_is_told_to_end_says_how_to_go_on(
    root: Path, mistudio: road.Children, tmp_path: Path
) -> None:
    """As the system does when it shuts down."""
    child = mistudio.start("--library", root, *_long_train("ended"))
    road.wait_until(lambda: any((root / "checkpoints").glob("*/step-*")))
    child.signal(signal.SIGTERM)
    assert child.wait() == 130
    (job,) = road.rows(root, "SELECT * FROM jobs WHERE status = 'interrupted'")
    assert f"`mistudio resume {job['id']}` goes on" in child.err
    listed = tmp_path / "listed.json"
    assert mistudio.run("--library", root, "checkpoints", "--json", listed).wait() == 0
    found = json.loads(listed.read_text(encoding="utf-8"))["checkpoints"]
    assert {row["job"] for row in found} == {job["id"]}
    first = min(row["step"] for row in found)
    again = mistudio.run("--library", root, "resume", job["id"], "--step", first)
    assert again.wait() == 0, again.err
    assert f"Going on from step {first}." in again.err
    nothing = mistudio.run("--library", root, "resume")
    assert nothing.wait() == 1
    assert "There is nothing to go on with" in nothing.err


def test_ctrl_c_during_training_keeps_the_sae(
    root: Path, mistudio: road.Children, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    child = mistudio.start("--library", root, *_train(root, tmp_path), "--json", report)
    road.wait_until(road.in_phase(root, "train", "train", 0.1))
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    assert "the SAE is kept" in child.err
    assert "Traceback" not in child.err
    result = json.loads(report.read_text(encoding="utf-8"))
    (training,) = road.rows(root, "SELECT * FROM trainings WHERE id = ?", result["training_id"])
    assert training["status"] == "stopped"
    record = json.loads(training["record"])
    assert record["stopped"] is True
    assert 0 < record["tokens"] < 120_000
    road.check_whole(root)


def test_a_second_ctrl_c_during_training_discards_it(
    root: Path, mistudio: road.Children, tmp_path: Path
) -> None:
    before = road.contents(root)
    child = mistudio.start("--library", root, *_train(root, tmp_path))
    road.wait_until(road.in_phase(root, "train", "train", 0.1))
    child.signal(signal.SIGINT)
    road.wait_until(lambda: "the SAE is kept" in child.err)
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    assert road.contents(root) == before


def test_ctrl_c_during_discovery_leaves_nothing_new(
    root: Path, mistudio: road.Children, tmp_path: Path
) -> None:
    before = road.contents(root)
    child = mistudio.start("--library", root, *_discover(root, tmp_path))
    road.wait_until(road.in_phase(root, "discover", "discover"))
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    assert child.err.rstrip().endswith("Stopped.")
    assert road.contents(root) == before
    (job,) = road.rows(root, "SELECT status FROM jobs ORDER BY id DESC LIMIT 1")
    assert job["status"] == "cancelled"


def test_a_library_that_is_being_written_can_be_read_and_written_by_another_process(
    root: Path, mistudio: road.Children, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = mistudio.start("--library", root, *_train(root, tmp_path))
    road.wait_until(road.in_phase(root, "train", "train"))
    text = tmp_path / "note.txt"
    text.write_text("Call me Ishmael. " * 50)
    assert road.run_cli(root, "dataset", "add", text) == 0
    assert road.run_cli(root, "list") == 0
    assert "running" in capsys.readouterr().out
    assert (root / "work" / f"job-{_newest_train(root)}").is_dir()
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    road.check_whole(root)


def _newest_train(root: Path) -> int:
    (row,) = road.rows(root, "SELECT max(id) AS id FROM jobs WHERE kind = 'train'")
    return int(row["id"])
