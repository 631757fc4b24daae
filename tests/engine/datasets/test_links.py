"""Datasets that stay where they are: read again as long as the files are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mistudio.engine.datasets.documents import Documents
from mistudio.engine.datasets.links import link_to, open_link
from mistudio.engine.datasets.sources import ReadOptions, Rejected
from mistudio.errors import InvalidInput, NotFound, UserError
from mistudio.jobs.datasets import AddDataset
from mistudio.jobs.job import run_job, submit
from mistudio.library.library import Library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"text of {name}")
    return folder


def texts(link: dict[str, object]) -> list[str]:
    stored = json.loads(json.dumps(link))  # as a record gives it back
    return [document.text for document in open_link(stored)]


def test_a_link_gives_the_documents_every_time(folder: Path) -> None:
    link = link_to(folder, ReadOptions())
    assert texts(link) == texts(link) == ["text of a", "text of b", "text of c"]


def test_a_link_keeps_how_to_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "one", "text": "no"}\nbroken\n{"x": "two"}\n{"x": "three"}\n')
    link = link_to(path, ReadOptions("x", bad_rows="skip", max_documents=2))
    rejected = Rejected()
    assert [document.text for document in open_link(link, rejected=rejected)] == ["one", "two"]
    assert rejected.rows == 1


def test_what_changed_is_said(folder: Path) -> None:
    link = link_to(folder, ReadOptions())
    (folder / "b.txt").write_text("longer than before")
    with pytest.raises(UserError, match=r"b\.txt changed since .*9 bytes then, 18 now") as refusal:
        texts(link)
    assert refusal.value.next_step.startswith("Add the dataset again")


def test_the_same_size_at_another_time_is_a_change(folder: Path) -> None:
    link = link_to(folder, ReadOptions())
    os.utime(folder / "a.txt", ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.txt changed since"):
        texts(link)


def test_what_is_gone_or_new_is_said(folder: Path) -> None:
    link = link_to(folder, ReadOptions())
    (folder / "d.txt").write_text("new")
    with pytest.raises(UserError, match=r"d\.txt is new in"):
        texts(link)
    (folder / "d.txt").unlink()
    (folder / "a.txt").unlink()
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt and 1 more are gone from"):
        texts(link)


def test_a_folder_that_is_gone_is_said(folder: Path, tmp_path: Path) -> None:
    link = link_to(folder, ReadOptions())
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(NotFound, match="linked files are gone"):
        texts(link)


def test_a_path_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt"))
    path.write_text("text")
    with pytest.raises(InvalidInput, match="cannot be kept as a link"):
        link_to(path, ReadOptions())


def test_the_dataset_keeps_only_its_first_documents(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(1500)))
    library = Library(tmp_path / "library")
    job = AddDataset(str(path), keep_in_place=True)
    row = run_job(library, job, submit(library, job))
    dataset = library.datasets.get(row.result["dataset_id"])
    assert dataset.documents == len(Documents(library.path(dataset.folder))) == 1000
    assert (dataset.link["kind"], dataset.link["path"]) == ("files", str(path))
    assert len(list(open_link(dataset.link))) == 1500
    library.close()
