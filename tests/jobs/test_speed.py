"""The job that measures a training's speed: it says how fast, and leaves nothing but its row."""

from __future__ import annotations

from typing import Any

import pytest
from journeys import road

from mistudio.engine.training import measuring
from mistudio.engine.training.config import derive, parse
from mistudio.jobs import speed
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Measure, Train, job_from_row
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

CONFIG = {"k": 8, "expansion": 1, "context": 64, "batch_size": 256, "tokens": 8000}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.1)


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def a_job(**changes: Any) -> Measure:
    return Measure(1, 1, [road.POINT], {**CONFIG, **changes})


def test_it_measures_and_is_found_again(library: Library) -> None:
    before = road.contents(library.root)
    row = run(library, a_job())
    assert row.status == "finished", row.error
    for name in ("forward", "step", "encode", "whole"):
        assert row.result[name] > 0
    assert row.result["precision"] == "fp32" and row.result["text"] == "dataset"
    assert road.contents(library.root) == before
    plan = derive(parse(CONFIG), library.models.get(1).d_model)
    found = speed.earlier(library, speed.speed_key(1, [road.POINT], plan))
    assert found is not None and found["step"] == row.result["step"] and found["measured_at"]
    assert job_from_row("measure", row.params) == a_job()


def test_what_changes_the_speed_is_told_apart_and_nothing_else(library: Library) -> None:
    def key(points: tuple[str, ...] = (road.POINT,), **changes: Any) -> Any:
        return speed.key_of(
            library, {"model_id": 1, "hook_points": list(points), "config": {**CONFIG, **changes}}
        )

    assert key() == key(tokens=20_000) == key(seed=3) == key(learning_rate=1e-3, warmup_share=0.2)
    others = [key(expansion=2), key(k=9), key(batch_size=512), key(context=32),
              key(sparsity="topk"), key(optimizer="sgd"), key(mixed_precision=True),
              key(("blocks.2.hook_resid_post",))]  # fmt: skip
    assert all(other != key() for other in others)
    # A training's row has the same key: what was trained is known as what was measured.
    job = Train(1, 1, [road.POINT], CONFIG)
    assert speed.key_of(library, dict(vars(job))) == key()
    assert speed.key_of(library, {"model_id": 99}) is None
    assert speed.key_of(library, {"model_id": 1, "config": {"nonsense": 1}}) is None


def test_a_dataset_without_tokens_is_measured_on_the_sample(library: Library) -> None:
    fields = {name: value for name, value in vars(library.datasets.get(1)).items() if name != "id"}
    other = library.datasets.add(**{**fields, "folder": "datasets/another"})
    before = road.contents(library.root)
    row = run(library, Measure(1, other, [road.POINT], CONFIG))
    assert row.status == "finished", row.error
    assert row.result["text"] == "sample"
    assert library.tokenizations.of_dataset(other) == []
    assert road.contents(library.root) == before


@pytest.mark.parametrize("phase", ["load model", "measure"])
def test_stopped_in_any_phase_it_leaves_nothing(library: Library, phase: str) -> None:
    before, control = road.contents(library.root), Control()

    def listen(snapshot: Snapshot) -> None:
        if snapshot.phase == phase:
            control.cancel()

    row = run(library, a_job(), control=control, listener=listen)
    assert row.status == "cancelled"
    assert road.contents(library.root) == before
    speed.forget_old(library)
    assert library.jobs.find(row.id) is None


def test_a_layer_that_does_not_exist_is_refused(library: Library) -> None:
    row = run(library, Measure(1, 1, ["blocks.99.hook_resid_post"], CONFIG))
    assert row.status == "failed" and "traceback" not in row.error


def test_only_the_newest_measurements_are_kept(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "KEPT", 2)
    rows = [run(library, a_job(k=k)).id for k in (4, 5, 6)]
    trained = len(library.jobs.all("kind != 'measure'"))
    speed.forget_old(library)
    assert {row.id for row in library.jobs.all("kind = 'measure'")} == set(rows[1:])
    assert len(library.jobs.all("kind != 'measure'")) == trained
