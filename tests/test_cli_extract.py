"""`mistudio extract`: the plan, what is stored, how it refuses, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from journeys import road

from mistudio.engine.activations import extraction
from mistudio.engine.activations.store import StoredActivations
from mistudio.jobs.control import Control
from mistudio.jobs.job import can_go_on, run_job, submit
from mistudio.jobs.kinds import Extract, job_from_row
from mistudio.jobs.models import unload_model
from mistudio.library.library import Library

MODEL = road.MODEL.name
LIMITS = ("--context", "64", "--max-tokens", "3000", "--batch-size", "4")


@pytest.fixture(scope="module", autouse=True)
def nothing_left_loaded() -> Iterator[None]:
    yield
    unload_model()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road.built_once(tmp_path_factory)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    return road.copy_of(built, tmp_path)


def extract(root: Path, tmp_path: Path, *arguments: object) -> tuple[int, Any]:
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    names = ("--model", MODEL, "--dataset", "small", *arguments)
    code = road.run_cli(root, "extract", *names, "--json", report)
    return code, json.loads(report.read_text(encoding="utf-8")) if report.exists() else None


def test_several_sites_of_several_layers_are_stored_in_one_pass(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = "resid_post,attn_out,mlp_out,mlp_in"
    code, result = extract(root, tmp_path, "--layers", "0,2", "--sites", sites, *LIMITS)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "Plan: " in err and "tokens/s, measured" in err
    assert "blocks.2.mlp.hook_in" in out and "mean norm" in out
    library = Library(root)
    record = library.extractions.get(result["extraction_id"])
    stored = StoredActivations(library.path(record.folder))
    stored.verify()
    assert len(stored.points) == 8
    assert result["bytes"] == sum(
        path.stat().st_size for path in stored.folder.rglob("*") if path.is_file()
    )
    assert stored.meta.batch_windows == 4 and record.statistics["plan"]["batches"] > 0
    assert not library.checkpoint_folder(library.jobs.all()[0].id).exists()
    library.close()


def test_a_plan_stores_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = road.contents(root)
    code, result = extract(root, tmp_path, "--layers", "1", "--plan", *LIMITS)
    assert code == 0
    plan = result["plan"]
    assert plan["tokens"] == 46 * 64 and plan["batch_seconds"] > 0
    assert plan["disk"] == plan["tokens"] * (2 * 128 + 18)
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    assert road.contents(root)["files"] == before["files"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "9"), "has the layers 0 to 3; 9 was asked"),
        (("--layers", "1", "--sites", "middle"), '"middle" is not a hook site'),
        (("--layers", "1", "--max-samples", "2"), "first 2 documents give"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    before = road.contents(root)["files"]
    code, result = extract(root, tmp_path, *arguments)
    assert (code, result) == (1, None)
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert road.contents(root)["files"] == before


class InterruptedAt(Control):
    """As if the system shut down after so many batches."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self._left = checks

    def check(self) -> float:
        self._left -= 1
        if self._left == 0:
            self.interrupt()
        return super().check()


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_an_interrupted_job_goes_on_with_its_shards_and_a_cancelled_one_leaves_none(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(extraction, "WRITE_BUFFER", 8 * 64)
    library = Library(root)
    job = Extract(1, 1, ["blocks.1.hook_mlp_out"], 3000, 64, 4)
    whole = run_job(library, job, submit(library, job))
    assert whole.status == "finished", whole.error

    control = InterruptedAt(12)  # three of the measurement, then batches: in the fifth block
    if how == "cancel":
        control.interrupt = control.cancel  # type: ignore[method-assign]
    number = submit(library, job)
    stopped = run_job(library, job, number, control)
    folder = library.checkpoint_folder(number)
    if how == "cancel":
        assert stopped.status == "cancelled" and not folder.exists()
        library.close()
        return
    assert stopped.status == "interrupted" and can_go_on(library, stopped)
    assert list(folder.glob("extraction/train/00000"))
    assert library.jobs.requeue(number)
    again = run_job(library, job_from_row(stopped.kind, stopped.params), number)
    assert again.status == "finished" and not folder.exists()
    first, second = (
        library.path(library.extractions.get(row.result["extraction_id"]).folder)
        for row in (whole, again)
    )
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    library.close()
