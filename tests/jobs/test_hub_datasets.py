"""Datasets from the Hub come into the library, and the access token comes nowhere else."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, wait_until

from mistudio import credentials, logs, paths
from mistudio.engine.datasets.documents import Documents
from mistudio.engine.datasets.links import open_link
from mistudio.engine.hub import access, session
from mistudio.jobs import hub_datasets
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import DownloadDataset, job_from_row
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.settings import Settings

NAME = "owner/texts"
TOKEN = "hf_SecretSecretSecret1234"
ODD_TOKEN = "oauth-of-no-usual-form-77"  # no redaction by its looks


def jsonl(first: int, count: int) -> bytes:
    rows = [{"text": f"Document {n}. " + "word " * 20} for n in range(first, first + count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {"train.jsonl": jsonl(0, 2500), "test.jsonl": jsonl(2500, 50), "README.md": b"# Texts"}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    for name in access._OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(autouse=True)
def nobody_signed_in() -> Iterator[None]:
    credentials._typed.clear()
    yield
    credentials._typed.clear()


def do(
    library: Library,
    control: Control | None = None,
    listener: Callable[[Snapshot], None] | None = None,
    **fields: Any,
) -> JobRecord:
    job = DownloadDataset(NAME, **fields)
    return run_job(library, job, submit(library, job), control, listener)


def untouched(library: Library) -> bool:
    return (
        not library.datasets.all()
        and not list((library.root / "datasets").iterdir())
        and not list((library.root / "work").iterdir())
    )


def test_a_dataset_arrives_with_where_it_came_from(hub: HubServer, empty: Library) -> None:
    repo = hub.add(NAME, dict(FILES), card={"license": "cc-by-4.0"})
    seen: list[Snapshot] = []
    record = do(empty, listener=seen.append)
    assert record.status == "finished", record.error
    [dataset] = empty.datasets.all()
    assert (dataset.name, dataset.source, dataset.origin) == ("texts", "hub", NAME)
    documents = Documents(empty.path(dataset.folder))
    assert [document.text.partition(".")[0] for document in documents] == [
        f"Document {n}" for n in range(2550)
    ]
    assert documents.splits == {"train": range(2500), "test": range(2500, 2550)}
    told = dataset.provenance
    assert (told["repository"], told["revision"], told["config"]) == (NAME, repo.sha, "default")
    assert told["licence"] == "cc-by-4.0"
    assert [file["name"] for file in told["source_files"]] == ["train.jsonl", "test.jsonl"]
    assert {file["verified_by"] for file in told["source_files"]} == {"sha256"}
    assert not list((empty.root / "downloads").iterdir())  # the files are not kept twice
    assert list(dict.fromkeys(s.phase for s in seen)) == ["look", "download", "read"]
    assert "rows" in seen[-1].metrics  # how many depends on when it was last told


def test_one_split_and_a_name_of_its_own(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, dict(FILES))
    record = do(empty, split="test", name="Mine")
    assert record.result["documents"] == 50
    assert empty.datasets.get(record.result["dataset_id"]).name == "Mine"
    assert hub.ranges("train.jsonl") == []


@pytest.mark.parametrize("limit", [{"max_documents": 7}, {"max_bytes": 800}])
def test_the_first_part(hub: HubServer, empty: Library, limit: dict[str, int]) -> None:
    hub.add(NAME, dict(FILES))
    record = do(empty, **limit)
    assert record.result["documents"] == 7, record.error
    dataset = empty.datasets.get(record.result["dataset_id"])
    assert dataset.provenance.items() >= limit.items()
    assert dataset.link == {}


def test_a_link_keeps_only_a_look(hub: HubServer, empty: Library) -> None:
    repo = hub.add(NAME, dict(FILES))
    record = do(empty, store=False, split="train")
    dataset = empty.datasets.get(record.result["dataset_id"])
    assert dataset.documents == 1000
    assert dataset.link["revision"] == repo.sha
    assert len(list(open_link(dataset.link))) == 2500


def test_it_is_run_again_from_its_row(empty: Library) -> None:
    job = DownloadDataset(NAME, split="test", max_bytes=10, store=False)
    row = empty.jobs.get(submit(empty, job))
    assert job_from_row(row.kind, row.params) == job


def test_a_stopped_download_goes_on_where_it_was(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, dict(FILES))
    hub.bytes_per_second = 200_000
    control = Control()

    def stop(snapshot: Snapshot) -> None:
        if snapshot.metrics.get("bytes_done", 0) > 30_000:
            control.cancel()

    assert do(empty, control, stop).status == "cancelled"
    assert untouched(empty)
    hub.bytes_per_second = None
    hub.requests.clear()
    assert do(empty).status == "finished"
    [span] = hub.ranges("train.jsonl")
    assert int(span.removeprefix("bytes=").rstrip("-")) > 20_000


def test_a_killed_process_leaves_what_the_next_one_needs(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, dict(FILES))
    hub.bytes_per_second = 300_000
    child = subprocess.Popen(
        [sys.executable, "-m", "mistudio", "dataset", "download", NAME, "--library",
         str(tmp_path / "lib")],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def half() -> bool:
        assert child.poll() is None
        parts = list((tmp_path / "lib").glob("downloads/*/parts/*.part"))
        return any(part.stat().st_size > 50_000 for part in parts)

    wait_until(half, 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hub.bytes_per_second = None
    hub.requests.clear()
    library = Library(tmp_path / "lib")
    [row] = library.jobs.all()
    assert row.status == "interrupted"
    job = job_from_row(row.kind, row.params)
    assert run_job(library, job, submit(library, job)).result["documents"] == 2550
    [span] = hub.ranges("train.jsonl")
    assert int(span.removeprefix("bytes=").rstrip("-")) > 50_000
    library.close()


def test_two_downloads_of_the_same_do_not_meet(
    hub: HubServer, empty: Library, tmp_path: Path
) -> None:
    hub.add(NAME, dict(FILES))
    hub.bytes_per_second = 100_000
    control = Control()
    first: list[JobRecord] = []

    def other() -> None:
        first.append(do(empty, control))
        empty.close()

    thread = threading.Thread(target=other)
    thread.start()
    wait_until(lambda: hub.ranges("train.jsonl"))
    second = do(empty)
    control.cancel()
    thread.join()
    assert second.error["title"] == "This dataset is being downloaded already"


def test_what_is_left_from_long_ago_is_cleared(hub: HubServer, empty: Library) -> None:
    old, new = empty.root / "downloads" / "old", empty.root / "downloads" / "new"
    for folder in (old, new):
        (folder / "parts").mkdir(parents=True)
        (folder / "parts" / "a.part").touch()
    for path in [*old.rglob("*"), old]:
        os.utime(path, (0, 0))
    hub.add(NAME, dict(FILES))
    do(empty)
    assert [entry.name for entry in (empty.root / "downloads").iterdir()] == ["new"]


# --- refusals -------------------------------------------------------------------------------------


def test_the_disk_is_looked_at_first(
    hub: HubServer, empty: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, dict(FILES))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert do(empty).error["title"] == "Not enough disk space"
    assert hub.asked("/resolve/") == []


@pytest.mark.parametrize(
    ("files", "fields", "title"),
    [
        ({"a.png": b"1"}, {}, "Nothing here can be read"),
        ({"a.jsonl": b'{"n": 1}\n'}, {}, "No text column"),
        ({"a.jsonl": b'{"text": "x"}\n'}, {"text_column": "body"}, "No such column"),
        ({"a.jsonl": b'{"text": "x"}\n'}, {"split": "test"}, "No such split"),
        ({"a.jsonl": b'{"text": "x"}\n'}, {"revision": "v9"}, "No such revision"),
        ({"a.jsonl": b'{"text": "x"}\n'}, {"max_bytes": 0}, "The limit is too small"),
        ({"../a.jsonl": b'{"text": "x"}\n'}, {}, "A file name of the repository is not safe"),
        ({"a.jsonl": b'{"text": "x"}\n{broken\n'}, {}, "A line is not valid JSON"),
    ],
)
def test_refusals_leave_nothing(
    hub: HubServer, empty: Library, files: dict[str, bytes], fields: dict[str, Any], title: str
) -> None:
    hub.add(NAME, files)
    record = do(empty, **fields)
    assert (record.status, record.error["title"]) == ("failed", title), record.error
    assert "traceback" not in record.error or not record.error["traceback"]
    assert untouched(empty)


def test_after_a_wrong_column_nothing_is_fetched_again(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, dict(FILES))
    assert do(empty, text_column="body").status == "failed"
    hub.requests.clear()
    assert do(empty).status == "finished"
    assert hub.asked("/resolve/") == []


def test_bad_rows_are_skipped_and_named(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, {"a.jsonl": jsonl(0, 3) + b"{broken\n" + jsonl(3, 2)})
    record = do(empty, skip_bad_rows=True)
    assert (record.result["documents"], record.result["skipped_rows"]) == (5, ["a.jsonl:4"])


def test_the_offline_switch_is_honoured(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, dict(FILES))
    Settings().set("offline", True)
    record = do(empty)
    assert record.error["title"] == "Offline mode is on"
    assert "Settings" in record.error["what"]
    assert hub.requests == []


# --- the token ------------------------------------------------------------------------------------


def everything_written(library: Library) -> bytes:
    """Every byte under the library, the settings and the log; the token's own file left out."""
    roots = [library.root, paths.log_folder(), paths.config_folder()]
    return b"".join(
        path.read_bytes()
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != credentials.FILE
    )


@pytest.fixture
def log() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    logs.set_up()
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        handler.close()
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("token", [TOKEN, ODD_TOKEN])
@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "typed"])
def test_the_token_is_written_nowhere(
    hub: HubServer, empty: Library, log: None, token: str, remembered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.add(NAME, dict(FILES), gated="auto")
    hub.accounts[token] = "ann"
    hub.echo_token = True  # the server repeats the token in its error texts
    if remembered:
        credentials.remember(token)
    else:
        credentials.use_for(NAME, token)
    records = [do(empty)]  # gated
    assert records[0].error["title"] == "This dataset is gated"
    assert f"{hub.endpoint}/datasets/{NAME}" in records[0].error["next_step"]
    hub.accounts.clear()
    records.append(do(empty))  # not accepted
    assert records[1].error["title"] == "The access token is not accepted"
    hub.accounts[token] = "ann"
    hub.accepted.add(("ann", NAME))
    monkeypatch.setattr(
        hub_datasets, "clear_old_downloads", lambda _: (_ for _ in ()).throw(ValueError(token))
    )
    records.append(do(empty))  # a bug whose message has it
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for name in access._OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MISTUDIO_HOME", str(paths.config_folder().parent))
    logging.getLogger("mistudio").error("careless %s", token)
    written = everything_written(empty)
    assert b"gated" in written  # the search does see rows and log
    assert token.encode() not in written


def test_a_typed_token_is_for_its_repository_alone(hub: HubServer, empty: Library) -> None:
    hub.add(NAME, dict(FILES), gated="auto")
    hub.accounts[TOKEN] = "ann"
    hub.accepted.add(("ann", NAME))
    credentials.use_for("someone/else", TOKEN)
    assert do(empty).error["title"] == "This dataset is gated"
    assert all("authorization" not in request.headers for request in hub.requests)
    credentials.use_for("Owner/Texts", TOKEN)
    assert do(empty).status == "finished"
