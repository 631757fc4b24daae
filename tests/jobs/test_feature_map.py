"""The jobs behind the pictures: the map in a process of its own, the sample of activations."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from journeys import road

from mistudio.engine.features.code_sample import load_sample
from mistudio.engine.features.layout import MapSettings
from mistudio.engine.features.live import window_activations
from mistudio.engine.features.maps import load_map
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT
from mistudio.engine.sae.files import load_sae
from mistudio.errors import ProcessLost
from mistudio.jobs import map_process
from mistudio.jobs.control import Control
from mistudio.jobs.feature_map import MapFeatures, SampleFeatures
from mistudio.jobs.features import open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import job_from_row
from mistudio.jobs.models import loaded_model
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def folder_of(library: Library) -> Path:
    return library.path(library.feature_runs.all()[0].folder)


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "mistudio.jobs.map_process" in " ".join(child.cmdline())
    ]


def test_a_map_is_made_once_and_states_what_it_is_of(library: Library) -> None:
    run_id = library.feature_runs.all()[0].id
    told: list[tuple[str, float]] = []
    job = MapFeatures(run_id, "tsne", perplexity=8)
    row = run(library, job, listener=lambda now: told.append((now.phase, now.fraction)))
    assert row.status == "finished", row.error
    assert {phase for phase, _ in told} == {"find neighbours", "lay out", "judge"}
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and any(0.3 < fraction < 0.9 for fraction in fractions)
    made = load_map(folder_of(library), row.result["map"])
    assert made is not None
    store, _ = open_features(library, library.feature_runs.get(run_id))
    density = np.asarray(store.columns["density"])
    assert made.features.tolist() == np.flatnonzero((density > 0) & (density <= 0.1)).tolist()
    assert made.n == row.result["features"] == len(made.features)
    assert made.n + made.dead + made.dense + made.no_direction == len(store)
    assert made.settings == MapSettings("tsne", perplexity=8)
    assert made.quality.trust == row.result["trust"] > 0.7
    assert set(made.versions) == {"openTSNE", "scikit-learn"}
    assert children() == []

    kept = road.contents(library.root)
    again = run(library, job_from_row(row.kind, library.jobs.get(row.id).params))
    assert again.status == "finished" and again.result == row.result
    assert road.contents(library.root) == kept
    read = load_map(folder_of(library), row.result["map"])
    assert read is not None and (read.made_at, read.seconds) == (made.made_at, made.seconds)


def test_a_cancelled_map_leaves_neither_files_nor_a_process(library: Library) -> None:
    before = road.contents(library.root)
    control = Control()

    def listener(now: Any) -> None:
        if now.phase == "lay out":
            assert children() or now.fraction < 0.25  # just before it is started
            control.cancel()

    row = run(library, MapFeatures(1, "tsne"), control=control, listener=listener)
    assert row.status == "cancelled"
    assert road.contents(library.root) == before
    assert children() == []


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (MapFeatures(1, "pca"), "Unknown kind of map"),
        (MapFeatures(1, neighbours=1), "neighbours must be from 2 to 200"),
        (SampleFeatures(1, 10), "1,000 to 10,000,000"),
    ],
)
def test_what_cannot_be_made_is_refused(library: Library, job: Any, words: str) -> None:
    before = road.contents(library.root)
    row = run(library, job)
    assert row.status == "failed" and "traceback" not in row.error
    assert words in json.dumps(row.error)
    assert road.contents(library.root) == before


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    numbers, objects = np.zeros((12, 3), np.int32), np.array([None])  # which are never unpickled
    with pytest.raises(RuntimeError, match="Object arrays cannot be loaded"):
        map_process.lay_out_apart(numbers, numbers, objects, MapSettings(), tmp_path, SILENT)
    assert children() == []


def test_a_process_that_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killing:
        def check(self) -> None:
            for child in children():
                child.kill()

        def report(self, *told: object, **more: object) -> None:
            pass

    neighbours = np.zeros((12, 3), np.int32)
    with pytest.raises(ProcessLost):
        map_process.lay_out_apart(
            neighbours, neighbours, neighbours[:, :2], MapSettings(), tmp_path, Killing()
        )


def test_a_process_whose_window_is_gone_ends_by_itself(tmp_path: Path) -> None:
    numbers = np.zeros((12, 3), np.int32)
    np.savez(
        tmp_path / map_process.INPUT, neighbours=numbers, distances=numbers, start=numbers[:, :2]
    )
    done = subprocess.run(
        [sys.executable, "-m", "mistudio.jobs.map_process", str(tmp_path)],
        input=json.dumps(asdict(MapSettings("tsne"))).encode() + b"\n",  # and nothing after it
        capture_output=True,
        timeout=60,
        env=map_process._environment(),
    )
    assert done.returncode == 1 and b'"phase": "layout"' in done.stdout
    assert not (tmp_path / map_process.OUTPUT).exists()


def test_a_sample_holds_the_activations_of_its_windows(library: Library) -> None:
    record = library.feature_runs.all()[0]
    row = run(library, SampleFeatures(record.id, 2000))
    assert row.status == "finished", row.error
    sample = load_sample(folder_of(library))
    assert sample is not None
    assert row.result == {
        "feature_run_id": record.id,
        "tokens": sample.tokens,
        "windows": len(sample.windows),
    }
    store, tokens = open_features(library, record)
    sae = library.saes.get(record.sae_id)
    saved = load_sae(library.path(sae.folder))
    features = np.argsort(-np.asarray(store.columns["density"]))[:5]
    values, counted = window_activations(
        loaded_model(library, sae.model_id),
        saved.dictionary,
        HookPoint.parse(store.meta.hook_point),
        store.meta.median_norm,
        tokens,
        sample.windows,
        features,
        store.meta.context,
    )
    assert sample.tokens == counted.sum()
    np.testing.assert_allclose(sample.of(features).toarray(), values[counted], atol=1e-5)
    peaks, places = sample.strongest(features)
    np.testing.assert_allclose(peaks, values.max(axis=1).T, atol=1e-5)
    fires = peaks > 0
    np.testing.assert_array_equal(places[fires], values.argmax(axis=1).T[fires])
