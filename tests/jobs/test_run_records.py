"""The record of a run is complete, is what its schema says, and holds every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import twelve_layers
from journeys import road

from mistudio.engine.sae.files import load_sae
from mistudio.engine.sae.formats.reading import read_sae
from mistudio.jobs import run_page
from mistudio.jobs.control import Control
from mistudio.jobs.kinds import AddModel
from mistudio.jobs.run_records import printable_page, save_record
from mistudio.library.library import Library

from .json_schema import problems
from .test_rollback_jobs import Acts, interrupted
from .test_training_jobs import POINT, done, history, run, training

SCHEMA = json.loads(
    Path(run_page.__file__).with_name("run_record.schema.json").read_text(encoding="utf-8")
)


def record_of(library: Library, training_id: int) -> dict[str, Any]:
    folder = library.path(library.trainings.get(training_id).folder)
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert found == library.trainings.get(training_id).record
    return found


def test_a_record_says_everything_that_a_run_depends_on(library: Library) -> None:
    given = {"k": 9, "seed": 5, "steps": 20}
    found = done(library, training(given, name="my run"))["training_id"]
    record = record_of(library, found)
    assert problems(record, SCHEMA) == []
    row, model, dataset = (
        library.trainings.get(found),
        library.models.get(1),
        library.datasets.get(1),
    )
    assert (record["name"], record["status"], record["seed"]) == ("my run", "completed", 5)
    assert record["wall_seconds"] == row.seconds >= record["training_seconds"] > 0
    assert record["configuration"]["given"].items() >= given.items()
    plan = record["configuration"]["derived"][POINT]
    assert (plan["k"], plan["steps"], plan["config"]["seed"]) == (9, 20, 5)
    assert plan["learning_rate"] > 0  # nobody gave one
    assert record["model"]["files"] == model.provenance["weights"] != []
    assert all(len(file["sha256"]) == 64 for file in record["model"]["files"])
    assert record["model"]["precision"] == "fp32"
    assert record["dataset"]["sha256"] == dataset.provenance["sha256"]
    assert len(record["dataset"]["sha256"]) == 64
    (tokenization,) = library.tokenizations.of_dataset(1)
    assert record["tokenizer_hash"] == tokenization.tokenizer_hash
    counted = record["tokenization"]
    assert counted["train_tokens"] + counted["heldout_tokens"] == counted["tokens"]
    assert counted["tokens"] == tokenization.tokens
    assert record["tokens"] == 20 * 256
    assert record["hook_points"] == [
        {"site": POINT, "layer": 1, "reads": POINT, "writes": POINT, "module": "model.layers.1"}
    ]
    assert record["versions"]["torch"] == torch.__version__
    assert (record["events"], record["notes"]) == ([], [])
    (sae,) = library.saes.of_training(found)
    assert record["sites"][POINT] == json.loads(json.dumps(sae.metrics))
    for name, entry in record["definitions"].items():
        if entry["sample"] and record["sites"][POINT].get(name) is not None:
            assert record["sites"][POINT][entry["sample"]] > 0


def test_the_schema_refuses_what_is_no_record(library: Library) -> None:
    record = record_of(library, 1)
    assert problems(record, SCHEMA) == []
    for name in SCHEMA["required"]:
        assert problems({k: v for k, v in record.items() if k != name}, SCHEMA), name
    for name, wrong in (
        ("format_version", 2), ("seed", -1), ("seed", True), ("tokens", "5"), ("sites", {}),
        ("events", [{}]), ("status", "half"), ("notes", [1]), ("hook_points", []),
    ):  # fmt: skip
        assert problems({**record, name: wrong}, SCHEMA), name
    with pytest.raises(ValueError, match="not known"):
        problems({}, {"format": "x"})


def test_interruptions_and_rollbacks_are_in_the_record(library: Library) -> None:
    row = interrupted(library)  # at step 14, saved at every fourth
    library.jobs.requeue(row.id)
    control = Control()
    acts = Acts(control, (20, lambda: control.roll_back(16)), (Acts.PAUSED, control.resume))
    from mistudio.jobs.job import run_job
    from mistudio.jobs.kinds import job_from_row

    row = library.jobs.get(row.id)
    row = run_job(library, job_from_row(row.kind, row.params), row.id, control, on_start=acts.start)
    assert row.status == "finished", row.error
    record = record_of(library, row.result["training_id"])
    assert problems(record, SCHEMA) == []
    told = [(e["event"], e["from_step"], e["step"]) for e in record["events"]]
    assert told == [("went on", 14, 14), ("rolled back", 20, 16)]
    page = printable_page(library, library.trainings.get(row.result["training_id"]))
    assert "went on from step 14" in page and "taken back from step 20 to step 16" in page


def test_a_run_of_twelve_layers_has_all_of_them_everywhere(
    library: Library, tmp_path: Path
) -> None:
    model = done(library, AddModel(str(twelve_layers.model(tmp_path / "twelve")), "fp32"))[
        "model_id"
    ]
    points = twelve_layers.POINTS
    job = training(
        {"steps": 8, "autosave_steps": 4}, points=points, extraction_id=None, loss_tokens=128
    )
    job = type(job)(**{**vars(job), "model_id": model})
    seen: list[set[str]] = []
    control = Control()

    def look() -> None:
        kept = library.checkpoint_folder(acts.context.job_id) / "step-00000004"
        seen.append({path.name for path in kept.iterdir() if path.is_dir()})

    acts = Acts(control, (6, look))
    row = run(library, job, control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert seen == [set(points)]  # a checkpoint has a folder for each layer

    training_id = row.result["training_id"]
    record = record_of(library, training_id)
    assert problems(record, SCHEMA) == []
    assert list(record["sites"]) == [point["site"] for point in record["hook_points"]]
    assert set(record["sites"]) == set(record["configuration"]["derived"]) == set(points)
    fvus = {values["fvu"] for values in record["sites"].values()}
    assert len(fvus) == len(points), "every layer has its own"
    steps = {row["step"] for row in history(library, training_id)}
    assert len(history(library, training_id)) == len(points) * len(steps)

    folder = library.path(library.trainings.get(training_id).folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(points)
    for point in points:
        ours, (read,) = load_sae(folder / point).dictionary, read_sae(folder / point)
        assert read.site is not None and read.site.input.name == point
        x = torch.randn(5, 32)
        assert torch.allclose(ours.reconstruct(x), read.dictionary.reconstruct(x), atol=1e-5)
        assert (read.dictionary.d_in, read.dictionary.d_sae) == (32, 32)
    text = printable_page(library, library.trainings.get(training_id))
    for point in points:
        assert text.count(f">{point}<") >= 2  # results and a legend


def test_records_are_saved_whole_or_not_at_all(library: Library, tmp_path: Path) -> None:
    path = save_record(library, 1, tmp_path / "run.json", to_print=False)
    assert json.loads(path.read_text(encoding="utf-8")) == library.trainings.get(1).record
    page = save_record(library, 1, tmp_path / "run.html", to_print=True)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "<polyline" in page.read_text(encoding="utf-8")
    with pytest.raises(OSError):
        save_record(library, 1, tmp_path / "missing" / "run.json", to_print=False)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError):
        save_record(library, 1, tmp_path / "folder.html", to_print=True)
    assert sorted(entry.name for entry in tmp_path.glob("*.*")) == [
        "folder.html",
        "run.html",
        "run.json",
    ]


def test_a_record_of_an_older_version_is_printed_too(library: Library) -> None:
    training = library.trainings.get(1)
    old = {key: training.record[key] for key in ("job", "model", "dataset", "sites", "tokens")}
    library.trainings.update(1, record=old)
    text = printable_page(library, library.trainings.get(1))
    assert training.name in text and "explained_variance" in text and "—" in text


def test_the_record_is_printed_and_saved_on_the_command_line(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "record.json", tmp_path / "record.html"
    arguments = ("record", "first", "--json", paths[0], "--html", paths[1])
    assert road.run_cli(library.root, *arguments) == 0
    out = capsys.readouterr().out
    assert "first, completed" in out and POINT in out
    assert json.loads(paths[0].read_text(encoding="utf-8")) == library.trainings.get(1).record
    assert "<!DOCTYPE html>" in paths[1].read_text(encoding="utf-8")
    assert road.run_cli(library.root, "record", "nobody") == 1
