"""Exports of features as jobs: refused before anything is done, whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistudio.engine.features.store import FeatureStore
from mistudio.errors import InvalidInput
from mistudio.jobs import feature_exports
from mistudio.jobs.control import Control
from mistudio.jobs.feature_exports import (
    FORMATS,
    ExportFeatures,
    ExportWholeContexts,
    estimated_bytes,
    parse_features,
    write_features,
)
from mistudio.jobs.job import run_job, submit
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def test_features_are_told_as_ranges() -> None:
    assert write_features([5, 3, 4, 9, 4]) == "3-5,9"
    assert parse_features("3-5,9", 10) == [3, 4, 5, 9]
    assert parse_features("", 3) == [0, 1, 2]
    for text in ("x", "3-", "10", "5-3", "-1"):
        with pytest.raises(InvalidInput):
            parse_features(text, 10)


def test_every_format_is_written_near_its_estimated_size(library: Library, tmp_path: Path) -> None:
    library.feature_notes.write(1, 3, label="my label", starred=True)
    number = library.feature_lists.add(name="mine")
    library.feature_lists.put(number, 1, [3])
    for name, format in FORMATS.items():
        target = tmp_path / f"out{format.suffix or '-' + name}"
        job = ExportFeatures(1, str(target), name, "0-7")
        guess = estimated_bytes(library, job) if name in ("json", "neuronpedia_b") else None
        row = run(library, job)
        assert row.status == "finished", row.error
        assert row.result == {"path": str(target)}
        files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
        true = sum(file.stat().st_size for file in files)
        assert guess is None or 0.2 * true < guess < 6 * true, name
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["feature"]) for r in rows] == list(range(8))
    assert rows[3]["label"] == "my label" and rows[3]["lists"] == '["mine"]'
    assert rows[3]["description"]
    assert "my label" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_whole_contexts_come_from_the_model(library: Library, tmp_path: Path) -> None:
    store = FeatureStore(library.path(library.feature_runs.get(1).folder))
    alive = np.flatnonzero(store.alive)[:4]
    job = ExportWholeContexts(1, str(tmp_path / "a.json"), "json", write_features(alive))
    row = run(library, job)
    assert row.status == "finished", row.error
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [feature["feature"] for feature in document["features"]] == alive.tolist()
    for feature in document["features"]:
        top = [example for example in feature["examples"] if example["group"] == "top"]
        for example, entry in zip(top, store.top[feature["feature"]], strict=False):
            assert len(example["values"]) == len(example["tokens"]) == store.meta.context
            assert example["values"][example["peak"]] == pytest.approx(entry["value"], rel=2e-2)
            assert example["values"][0] == 0
    groups = {example["group"] for f in document["features"] for example in f["examples"]}
    assert groups == {"top", "decile"}
    assert not list((library.root / "work").glob("*/contexts"))


def test_what_cannot_be_is_refused_and_leaves_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    for target, format, title in (
        ("there.csv", "csv", "something at this place"),
        ("x", "word", "Unknown export format"),
    ):
        row = run(library, ExportFeatures(1, str(tmp_path / target), format, "0"))
        assert row.status == "failed" and title in row.error["title"], row.error
    assert (tmp_path / "there.csv").read_text() == "mine"

    class Full:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda place: Full)
    row = run(library, ExportFeatures(1, str(tmp_path / "y.csv"), "csv", "0-9"))
    assert row.status == "failed" and row.error["title"] == "Not enough disk space"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["there.csv"]


def test_a_cancelled_export_leaves_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, target = Control(), tmp_path / "out" / "import"
    written = feature_exports._written
    seen: list[Path] = []

    def stopped(job: Any, material: Any, place: Path, progress: Any) -> None:
        if place.parent == target.parent:
            seen.append(place)
            (place / "half").write_text("x")
            control.cancel()
        written(job, material, place, progress)

    monkeypatch.setattr(feature_exports, "_written", stopped)
    row = run(library, ExportFeatures(1, str(target), "neuronpedia_b", "0-9"), control=control)
    assert row.status == "cancelled" and seen
    assert list(target.parent.iterdir()) == []
