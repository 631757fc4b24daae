"""Files: complete before they are named, back where they were when rows fail, never lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.rows import (
    add_dataset,
    add_extraction,
    add_feature_run,
    add_model,
    add_tokenization,
    add_training,
    folder_with_files,
    tree,
)
from mistudio.errors import DiskFull, InUse, NotFound, UserError
from mistudio.library.library import Change, Library

DAY = 86400


def trash(library: Library) -> list[Path]:
    return sorted((library.root / "trash").iterdir())


# --- commit ---------------------------------------------------------------------------------------


def test_commit_moves_the_whole_folder_and_adds_the_row(library: Library) -> None:
    dataset = library.datasets.get(add_dataset(library))
    folder = library.path(dataset.folder)
    assert tree(folder) == ["deep", "deep/numbers.bin", "text.txt"]
    assert list((library.root / "work").iterdir()) == []


def test_where_the_rows_fail_the_files_go_back(library: Library) -> None:
    source = folder_with_files(library)
    target = library.new_folder("datasets", "Text")
    with pytest.raises(ZeroDivisionError), library.commit(source, target):
        library.jobs.submit("demo", "A", "disk", {})
        raise ZeroDivisionError
    assert (source / "deep" / "numbers.bin").read_bytes() == b"1234"
    assert not library.path(target).exists()
    assert library.jobs.count() == 0


def test_a_kill_between_rename_and_commit_costs_only_the_new_folder(
    library: Library,
) -> None:
    kept = library.datasets.get(add_dataset(library, "Kept"))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from library.rows import folder_with_files\n"
        "from mistudio.library.library import Library\n"
        "library = Library(Path(sys.argv[1]))\n"
        "with library.commit(folder_with_files(library), 'datasets/half-made'):\n"
        "    assert library.path('datasets/half-made').is_dir()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(library.root)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert library.path("datasets/half-made").is_dir()

    again = Library(library.root)
    assert not again.path("datasets/half-made").exists()
    assert [path.name[:9] for path in trash(again)] == ["half-made"]
    assert [dataset.id for dataset in again.datasets.all()] == [kept.id]
    assert tree(again.path(kept.folder)) == ["deep", "deep/numbers.bin", "text.txt"]
    again.close()


def test_nothing_is_swept_while_another_process_has_a_job(library: Library) -> None:
    library.jobs.move(library.jobs.submit("demo", "A", "disk", {}), ("queued",), "running")
    with library.commit(folder_with_files(library), "datasets/new"):
        pass  # named by no row
    (library.root / "datasets" / "new" / ".no-record-yet").touch()
    Library(library.root).close()
    assert library.path("datasets/new").is_dir()


def test_a_lost_database_does_not_cost_the_folders(root: Path) -> None:
    library = Library(root)
    dataset = library.datasets.get(add_dataset(library))
    library.close()
    for file in root.glob("library.db*"):
        file.unlink()
    library = Library(root)
    assert library.path(dataset.folder).is_dir()
    assert trash(library) == []
    library.close()


def test_what_a_dead_job_was_writing_is_cleared_away(library: Library) -> None:
    work = library.work_folder(12)
    (work / "half.bin").write_bytes(b"0" * 100)
    Library(library.root).close()
    assert list((library.root / "work").iterdir()) == []


# --- discard --------------------------------------------------------------------------------------


def test_discard_moves_the_files_to_the_trash(library: Library) -> None:
    heard: list[Change] = []
    dataset = library.datasets.get(add_dataset(library))
    library.observe(heard.append)
    library.discard("datasets", dataset.id)
    assert library.datasets.find(dataset.id) is None
    assert not library.path(dataset.folder).exists()
    (kept,) = trash(library)
    assert (kept / "text.txt").read_text() == "some text"
    assert heard == [Change("datasets", frozenset({dataset.id}))]


def test_discarding_what_is_not_there_is_refused(library: Library) -> None:
    with pytest.raises(NotFound, match="No model with number 3"):
        library.discard("models", 3)


def test_a_record_whose_folder_is_missing_can_still_be_discarded(library: Library) -> None:
    dataset = library.datasets.get(add_dataset(library))
    shutil.rmtree(library.path(dataset.folder))
    library.discard("datasets", dataset.id)
    assert library.datasets.count() == 0


def test_a_dataset_takes_its_tokenizations_along(library: Library) -> None:
    dataset = add_dataset(library)
    add_tokenization(library, dataset, "aa")
    add_tokenization(library, dataset, "bb")
    library.discard("datasets", dataset)
    assert (library.datasets.count(), library.tokenizations.count()) == (0, 0)
    assert len(trash(library)) == 3
    assert list((library.root / "datasets").iterdir()) == []


def test_a_run_takes_its_saes_and_their_features_along(library: Library) -> None:
    model, dataset = add_model(library), add_dataset(library)
    tokens = add_tokenization(library, dataset)
    training = add_training(library, model, dataset, tokens)
    add_feature_run(library, training)
    library.discard("trainings", training)
    assert (library.trainings.count(), library.saes.count()) == (0, 0)
    assert library.feature_runs.count() == 0
    assert list((library.root / "features").iterdir()) == []
    assert list((library.root / "trainings").iterdir()) == []
    library.discard("models", model)
    library.discard("datasets", dataset)


def test_what_others_depend_on_is_not_discarded(library: Library) -> None:
    model, dataset = add_model(library), add_dataset(library)
    tokens = add_tokenization(library, dataset)
    extraction = add_extraction(library, model, tokens)
    add_training(library, model, dataset, tokens, extraction)
    add_feature_run(library, add_training(library, model, dataset, tokens))
    before = tree(library.root)
    refusals = {
        ("datasets", dataset): "2 runs, 1 extraction and 1 feature run use this dataset",
        ("models", model): "2 runs, 1 extraction and 2 SAEs use this model",
        ("tokenizations", tokens): "2 runs, 1 extraction and 1 feature run use this tokenization",
        ("extractions", extraction): "1 run uses this extraction",
    }
    for (table, number), sentence in refusals.items():
        with pytest.raises(InUse, match=sentence):
            library.discard(table, number)
    assert tree(library.root) == before
    assert library.datasets.get(dataset)


def test_what_an_unfinished_job_needs_is_not_discarded(library: Library) -> None:
    dataset = add_dataset(library)
    job = library.jobs.submit("tokenize", "T", "disk", {"dataset_id": dataset, "model_id": 1})
    with pytest.raises(InUse, match="1 unfinished job uses this dataset"):
        library.discard("datasets", dataset)
    library.jobs.move(job, ("queued",), "cancelled")
    library.discard("datasets", dataset)


def test_a_run_outlives_the_job_that_made_it(library: Library) -> None:
    model, dataset = add_model(library), add_dataset(library)
    tokens = add_tokenization(library, dataset)
    job = library.jobs.submit("train", "Train", "compute", {})
    training = add_training(library, model, dataset, tokens, job_id=job)
    library.jobs.move(job, ("queued",), "finished")
    library.jobs.remove(job)
    assert library.jobs.find(job) is None
    assert library.trainings.get(training).job_id is None


def test_the_trash_is_emptied_after_seven_days_and_not_before(library: Library) -> None:
    for name in ("Old", "Recent"):
        dataset = library.datasets.get(add_dataset(library, name))
        # Old files, discarded now: what counts is the day of the discard.
        os.utime(library.path(dataset.folder), (0, 0))
        library.discard("datasets", dataset.id)
    Library(library.root).close()
    assert len(trash(library)) == 2
    now = time.time()
    for path, age in zip(trash(library), (7.1 * DAY, 6.9 * DAY), strict=True):
        os.utime(path, (now - age, now - age))
        expected = path
    Library(library.root).close()
    assert trash(library) == [expected]


# --- places and room ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["../outside", "datasets/../../outside", "/etc", "", "."])
def test_a_path_outside_the_library_is_refused(library: Library, folder: str) -> None:
    with pytest.raises(UserError, match="points outside the library"):
        library.path(folder)


def test_a_link_that_leads_out_of_the_library_is_refused(library: Library, tmp_path: Path) -> None:
    (library.root / "datasets" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="points outside"):
        library.path("datasets/link/file")


def test_new_folders_are_plain_names_and_never_the_same(library: Library) -> None:
    first, second = (library.new_folder("models", "../Ünïcode / name?*") for _ in range(2))
    assert first != second
    assert first.startswith("models/")
    assert library.path(first).parent == library.root / "models"


def test_too_little_room_is_refused_with_numbers(library: Library) -> None:
    free = shutil.disk_usage(library.root).free
    library.require_space(free // 2, "This")
    with pytest.raises(DiskFull, match=r"Storing it needs \d[\d.]* [KMGT]B .*; \d[\d.]* [KMGT]B"):
        library.require_space(free, "Storing it")
