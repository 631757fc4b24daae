"""The schema: made, brought up to date, shared, refused where it cannot be read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mistudio.errors import CorruptFile, Incompatible, InvalidInput
from mistudio.library import database
from mistudio.library.library import Library

TABLES = {
    "datasets",
    "models",
    "tokenizations",
    "tokenizers",
    "extractions",
    "trainings",
    "saes",
    "feature_runs",
    "feature_notes",
    "feature_labels",
    "feature_lists",
    "feature_list_items",
    "feature_views",
    "feature_scores",
    "feature_analyses",
    "feature_calibrations",
    "experiments",
    "generations",
    "templates",
    "jobs",
}


def tables_of(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in rows}
    finally:
        connection.close()


def test_a_new_folder_becomes_a_library_with_every_table_at_the_newest_schema(root: Path) -> None:
    library = Library(root)
    assert library.rows("PRAGMA user_version")[0][0] == database.migrations()[-1][0]
    library.close()
    assert tables_of(root / "library.db") == TABLES
    assert {"datasets", "models", "trainings", "trash"} <= {p.name for p in root.iterdir()}


def test_opening_again_changes_nothing(root: Path) -> None:
    first = Library(root)
    first.jobs.submit("demo", "A job", "compute", {"seed": 1})
    first.close()
    second = Library(root)
    assert [job.title for job in second.jobs.all()] == ["A job"]
    assert second.rows("PRAGMA user_version")[0][0] == database.migrations()[-1][0]
    second.close()


def test_a_migration_that_fails_leaves_nothing_of_itself(tmp_path: Path) -> None:
    db = database.connect(tmp_path / "library.db")
    sql = "CREATE TABLE good (id INTEGER PRIMARY KEY);\nCREATE TABLE bad (id NONSENSE(;\n"
    with pytest.raises(sqlite3.OperationalError):
        database._apply(db, 1, sql)
    assert db.conn.execute("PRAGMA user_version").fetchone()[0] == 0
    db.conn.close()
    assert tables_of(tmp_path / "library.db") == set()


def test_many_processes_may_open_a_new_library_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mistudio.library.library import Library\n"
        "while time.time() < float(sys.argv[1]): pass\n"
        "for number in range(12):\n"
        "    Library(Path(sys.argv[2]) / str(number)).jobs.submit('demo', 'A', 'disk', {})\n"
    )
    start = time.time() + 1.0
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(start), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    errors = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], errors
    for number in range(12):
        library = Library(tmp_path / str(number))
        assert library.jobs.count() == 3
        assert library.rows("PRAGMA integrity_check")[0][0] == "ok"
        library.close()


def test_a_library_of_a_newer_version_is_refused_and_left_as_it_is(root: Path) -> None:
    library = Library(root)
    newest = database.migrations()[-1][0]
    library.execute(f"PRAGMA user_version = {newest + 1}")
    library.close()
    with pytest.raises(Incompatible, match=rf"number {newest + 1}; .* up to {newest}"):
        Library(root)
    connection = sqlite3.connect(root / "library.db")
    assert connection.execute("PRAGMA user_version").fetchone()[0] == newest + 1
    connection.close()


def test_a_file_that_is_no_database_is_refused_with_a_sentence(root: Path) -> None:
    root.mkdir()
    (root / "library.db").write_bytes(b"this was never a database\n" * 200)
    with pytest.raises(CorruptFile, match=r"library.db is not a SQLite database"):
        Library(root)
    assert (root / "library.db").read_bytes().startswith(b"this was never")


def test_a_database_with_overwritten_pages_is_refused_with_a_sentence(root: Path) -> None:
    library = Library(root)
    library.close()
    for log in root.glob("library.db-*"):
        log.unlink()
    content = bytearray((root / "library.db").read_bytes())
    content[100:] = b"\xaa" * (len(content) - 100)  # the header stays, all pages are rubbish
    (root / "library.db").write_bytes(content)
    with pytest.raises(CorruptFile, match="damaged"):
        Library(root)


def test_a_file_in_the_place_of_the_library_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for place in (file, file / "inside"):
        with pytest.raises(InvalidInput, match="must be a folder"):
            Library(place)
    assert file.read_text() == "mine"


def test_every_connection_has_wal_full_sync_and_foreign_keys(library: Library) -> None:
    found: list[tuple[object, ...]] = []

    def look() -> None:
        names = ("journal_mode", "foreign_keys", "synchronous")
        found.append(tuple(library.rows(f"PRAGMA {name}")[0][0] for name in names))
        library.close()

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [("wal", 1, 2)] * 2


def test_a_row_may_not_point_at_a_record_that_is_not_there(library: Library) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        library.tokenizations.add(dataset_id=99, tokenizer_hash="", folder="datasets/x", tokens=1)


def test_opening_waits_for_another_process_that_is_switching_to_wal(tmp_path: Path) -> None:
    path = tmp_path / "library.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, lambda: (other.execute("COMMIT"), other.close()))
    release.start()
    database.connect(path).conn.close()
    release.join()
