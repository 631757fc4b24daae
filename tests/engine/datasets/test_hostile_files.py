"""Whatever file somebody adds: it becomes a dataset or a clear refusal, soon, and nothing is left.

The cases are in `hostile_texts`, `hostile_packed` and `hostile_paths`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_packed
import hostile_paths
import hostile_texts
import pytest
from hostile import CASES, ONCE, Case, Outcome

from mistudio.engine.datasets.documents import Documents
from mistudio.jobs.datasets import AddDataset
from mistudio.jobs.job import run_job, submit
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

pytestmark = pytest.mark.timeout(20)
assert hostile_packed and hostile_paths and hostile_texts  # they fill CASES


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    opened = Library(tmp_path_factory.mktemp("library"))
    yield opened
    opened.close()


def test_there_are_at_least_two_hundred() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("hostile", CASES.values(), ids=lambda case: case.name)
def test_it_ends_well_or_clearly(library: Library, tmp_path: Path, hostile: Case) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    path = hostile.make(folder)
    _add(library, AddDataset(str(path)), hostile.refusing)
    if hostile.skipping != ONCE:
        _add(library, AddDataset(str(path), skip_bad_rows=True), hostile.skipping)


def _add(library: Library, job: AddDataset, expected: Outcome) -> None:
    row = run_job(library, job, submit(library, job))
    assert not any((library.root / "work").iterdir())
    try:
        if row.status == "finished":
            _check_good(library, row.result["dataset_id"], expected)
        else:
            _check_refusal(library, row, expected)
    finally:  # so that the next case finds an empty library
        for dataset in library.datasets.all():
            library.discard("datasets", dataset.id)
        library.jobs.remove(row.id)


def _check_good(library: Library, dataset_id: int, expected: Outcome) -> None:
    dataset = library.datasets.get(dataset_id)
    documents = Documents(library.path(dataset.folder))
    if isinstance(expected, list):
        assert [document.text for document in documents] == expected
    else:
        assert not isinstance(expected, str), f"added, though {expected!r} was to be said"
        assert expected in (None, len(documents))
    assert dataset.documents == len(documents) > 0


def _check_refusal(library: Library, row: JobRecord, expected: Outcome) -> None:
    error: dict[str, Any] = row.error
    assert row.status == "failed"
    assert "traceback" not in error, error["traceback"]
    said = " ".join([error["title"] + ".", error["what"], error["next_step"]])
    assert error["title"] and error["what"] and error["next_step"], said
    assert len(said) < 1000
    json.dumps(said, ensure_ascii=False).encode()  # can be printed
    assert library.datasets.count() == 0
    assert not any((library.root / "datasets").glob("*"))
    if expected is not None:
        assert isinstance(expected, str), f"refused: {said}"
        assert expected in said
