"""Discoveries that are interrupted and go on, look at all SAEs of a run, or run short of memory."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from journeys import road

from mistudio.engine.features import discovery
from mistudio.engine.features.store import FeatureStore
from mistudio.jobs import features
from mistudio.jobs.control import Control
from mistudio.jobs.features import Discover, DiscoverRun
from mistudio.jobs.job import can_go_on, run_job, submit
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library


@pytest.fixture(autouse=True)
def saved_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "SAVE_EVERY", 1)
    monkeypatch.setattr(discovery, "SAVING_SHARE", 1e9)


@pytest.fixture
def two(library: Library) -> Library:
    """The run has a second SAE: the same dictionary under its own number."""
    (sae,) = library.saes.all()
    values = {name: value for name, value in vars(sae).items() if name not in ("id", "created_at")}
    folder = f"{sae.folder}-again"
    shutil.copytree(library.path(sae.folder), library.path(folder))
    library.saes.add(**{**values, "folder": folder})
    return library


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run(library, job)
    assert row.status == "finished", row.error
    return row.result


def bytes_of(library: Library, run_id: int) -> dict[str, str]:
    folder = library.path(library.feature_runs.get(run_id).folder)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.npy")
    }


def left(library: Library) -> list[Path]:
    return [*(library.root / "work").iterdir(), *(library.root / "checkpoints").iterdir()]


class InterruptedAt(Control):
    """The application quits when a pass has saved so many chunks."""

    def __init__(self, library: Library, chunk: int) -> None:
        super().__init__()
        self._library, self._name = library, f"{chunk:08d}"

    def check(self) -> float:
        if any((self._library.root / "checkpoints").glob(f"*/*/*/{self._name}")):
            self.interrupt()
        return super().check()


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "live"])
def test_an_interrupted_discovery_goes_on_as_if_it_had_not_been(
    library: Library, stored: bool
) -> None:
    if not stored:
        library.trainings.update(1, extraction_id=None)
    job = Discover(1, max_tokens=6000, top_k=3)
    whole = done(library, job)["feature_run_id"]
    before = library.feature_runs.count()
    row = run(library, job, control=InterruptedAt(library, 2))
    assert row.status == "interrupted" and can_go_on(library, row)
    assert library.feature_runs.count() == before
    library.recover()  # as the next start does
    assert library.jobs.requeue(row.id)
    seen: list[float] = []
    row = run_job(library, job, row.id, listener=lambda now: seen.append(now.fraction))
    assert row.status == "finished", row.error
    assert bytes_of(library, row.result["feature_run_id"]) == bytes_of(library, whole)
    assert left(library) == []


def test_a_cancelled_discovery_leaves_nothing(library: Library) -> None:
    before = road.contents(library.root)
    control = Control()
    row = run(library, Discover(1, 6000), control=control, listener=lambda _: control.cancel())
    assert row.status == "cancelled"
    assert road.contents(library.root) == before


def test_all_saes_of_a_run_are_looked_at_in_one_pass(
    two: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    once = discovery.discover
    monkeypatch.setattr(
        discovery, "discover", lambda p, s, **more: passes.append(len(s)) or once(p, s, **more)
    )
    alone = done(two, Discover(1, max_tokens=4000, top_k=3))["feature_run_id"]
    result = done(two, DiscoverRun(1, max_tokens=4000, top_k=3))
    assert passes == [1, 2]
    first, second = result["feature_run_ids"]
    assert {two.feature_runs.get(i).sae_id for i in (first, second)} == {1, 2}
    assert bytes_of(two, first) == bytes_of(two, second) == bytes_of(two, alone)
    store = FeatureStore(two.path(two.feature_runs.get(first).folder))
    assert result["alive"] == 2 * int(store.alive.sum())
    assert store.meta.provenance["sae"] and store.meta.provenance["documents"]
    assert str(two.root) not in str(store.meta)
    assert left(two) == []


def test_where_memory_is_short_there_are_several_passes(
    two: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second, the job does not look through the text for the first again."""
    work = features._Discovery
    needs = work._needs
    monkeypatch.setattr(
        work, "_needs", lambda self, group: (10**15 if len(group) > 1 else 1, needs(self, group)[1])
    )
    job = DiscoverRun(1, max_tokens=4000, top_k=3)
    passes: list[str] = []
    once = discovery.discover

    def counted(passage: Any, subjects: Any, **more: Any) -> Any:
        passes.append(subjects[0].name)
        if len(passes) == 2:
            control.interrupt()
        return once(passage, subjects, **more)

    monkeypatch.setattr(discovery, "discover", counted)
    control = Control()
    row = run(two, job, control=control)
    assert (row.status, passes) == ("interrupted", ["1", "2"])
    assert can_go_on(two, row)
    assert two.jobs.requeue(row.id)
    row = run_job(two, job, row.id)
    assert row.status == "finished", row.error
    assert passes == ["1", "2", "2"]
    assert len({*bytes_of(two, row.result["feature_run_ids"][0]).items()}) > 20
    assert left(two) == []


def test_what_does_not_fit_at_all_is_refused(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = road.contents(library.root)
    monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    row = run(library, DiscoverRun(1))
    assert row.status == "failed" and row.error["title"] == "Not enough memory"
    assert road.contents(library.root) == before


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "live"])
def test_only_the_first_documents_are_looked_at(library: Library, stored: bool) -> None:
    if not stored:
        library.trainings.update(1, extraction_id=None)
    number = done(library, Discover(1, max_tokens=10**6, top_k=3, max_documents=30))[
        "feature_run_id"
    ]
    store, tokens = features.open_features(library, library.feature_runs.get(number))
    windows = tokens.windows_within(30, store.meta.context)
    assert 0 < store.meta.contexts <= windows
    top = store.top[store.top["value"] > 0]
    assert top["window"].max() < windows < tokens.n_windows(store.meta.context)


def test_what_fails_before_it_begins_leaves_nothing_to_go_on_from(library: Library) -> None:
    (extraction,) = library.extractions.all()
    (library.path(extraction.folder) / "meta.json").write_text("{}")
    before = road.contents(library.root)
    row = run(library, Discover(1))
    assert row.status == "failed" and "traceback" not in row.error
    assert not can_go_on(library, row)
    assert road.contents(library.root) == before


@pytest.mark.parametrize(("option", "value"), [("max_documents", 0), ("max_documents", -3)])
def test_documents_out_of_range_are_refused(library: Library, option: str, value: int) -> None:
    row = run(library, Discover(1, **{option: value}))
    assert row.error["what"].startswith("max documents must be between 1")
