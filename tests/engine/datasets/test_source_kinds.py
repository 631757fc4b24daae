"""Encodings, packed files, Parquet and Arrow, folders with splits, previews, progress."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.files.encodings import of_bytes
from mistudio.engine.datasets.files.listing import find_files, kind_of, split_of, stem
from mistudio.engine.datasets.sources import (
    MAX_ROW,
    ReadOptions,
    Rejected,
    describe,
    documents_of_rows,
    read_documents,
)
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput, UserError


class Watch:
    """Records what is reported; stops after so many checks."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[tuple[float, float | None]] = []
        self.checks = 0
        self.stop_after = stop_after

    def check(self) -> None:
        self.checks += 1
        if self.checks == self.stop_after:
            raise Cancelled

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self.reports.append((done, total))


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path, options: ReadOptions = ReadOptions()) -> list[str]:  # noqa: B008
    return [document.text for document in read_documents(path, options)]


# --- encodings ------------------------------------------------------------------------------------

FRENCH = "Les élèves français étudient à l'école près de la forêt où règne un été très agréable. "
SPANISH = "El niño mañana irá a la montaña con su compañero. ¿Cuándo vendrás? ¡Qué día señalado! "
GERMAN = "Für immer und über alle Maßen schön wäre es, könnten wir dort größere Häuser bauen. "
POLISH = "Wczoraj późnym wieczorem poszedłem do sklepu, żeby kupić chleb i masło. "
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy. Dnes je krásné počasí a děti si hrají. "


@pytest.mark.parametrize("times", [1, 30])
@pytest.mark.parametrize(
    ("text", "codec"),
    [
        (FRENCH, "cp1252"),
        (SPANISH, "cp1252"),
        (GERMAN, "cp1252"),
        (POLISH, "cp1250"),
        (CZECH, "cp1250"),
        ("text\nfür immer\n", "cp1252"),
        ("The café is open. " + "English words here and there. " * 50, "cp1252"),
    ],
)
def test_encodings_without_a_mark_are_guessed(text: str, codec: str, times: int) -> None:
    encoding = of_bytes((text * times).encode(codec))
    assert encoding is not None
    assert (encoding.codec, encoding.guessed) == (codec, True)


def test_the_encoding_is_reported_and_may_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Ég er að læra".encode("cp1252"))
    rejected = Rejected()
    list(read_documents(path, rejected=rejected))
    assert list(rejected.encodings) == ["Windows-1252 (guessed)"]
    assert read(path, ReadOptions(encoding="cp1251")) == ["Йg er aр lжra"]
    for name in ("klingon", "hex", "rot13"):
        with pytest.raises(InvalidInput, match="not the name of a text encoding"):
            read(path, ReadOptions(encoding=name))


def test_other_characters_are_looked_for_beyond_a_plain_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    plain = ('{"text": "' + "plain words " * 20 + '"}\n') * 2000  # 500 kB
    path.write_bytes(plain.encode() + '{"text": "für"}\n'.encode("latin-1"))
    assert read(path)[-1] == "für"


def test_what_is_no_character_is_replaced_only_where_asked_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"text": "日本語"}\n'.encode()
    path.write_bytes(good * 3 + b'{"text": "a\xffb\xfec"}\n')
    with pytest.raises(InvalidInput, match=r"line 4: byte 0xff") as refusal:
        read(path)
    assert refusal.value.field == "encoding"
    rejected = Rejected()
    documents = list(read_documents(path, ReadOptions(bad_rows="skip"), rejected))
    assert documents[3].text == "a\ufffdb\ufffdc"
    assert (rejected.replaced, rejected.rows) == (2, 0)


# --- packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
def test_packed_files_are_read_as_what_is_inside(tmp_path: Path, suffix: str) -> None:
    plain = rows(tmp_path / "a.jsonl", ["one", "two"])
    pack = zstandard.compress if suffix == ".zst" else gzip.compress
    packed = tmp_path / f"b.jsonl{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert read(packed) == ["one", "two"]
    assert read(tmp_path) == ["one", "two"] * 2


def test_names_say_the_kind(tmp_path: Path) -> None:
    assert kind_of(Path("a.b.JSONL.gz")) == (".jsonl", ".gz")
    assert kind_of(Path("a.ndjson")) == (".jsonl", "")
    assert kind_of(Path("a.gz")) is None
    assert stem(Path("my.texts.jsonl.gz")) == "my.texts"
    assert stem(Path("folder.v2")) == "folder.v2"


# --- Parquet and Arrow ----------------------------------------------------------------------------


def table(n: int, wide: str = "x") -> pa.Table:
    return pa.table(
        {
            "picture": [wide.encode() * 2000 + bytes([255, i % 256]) for i in range(n)],
            "text": [f"document {i}" for i in range(n)],
            "title": [f"title {i}" for i in range(n)],
        }
    )


def test_parquet_keeps_titles_and_guesses_the_column(tmp_path: Path) -> None:
    pq.write_table(table(250), tmp_path / "a.parquet", row_group_size=100)
    found = list(read_documents(tmp_path / "a.parquet"))
    assert found == [Document(f"document {i}", f"title {i}") for i in range(250)]
    with pytest.raises(InvalidInput, match="columns picture, text, title; 'body'"):
        read(tmp_path / "a.parquet", ReadOptions(text_column="body"))


def test_only_the_columns_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(
        self: pq.ParquetFile, *args: object, columns: list[str], **kw: object
    ) -> object:
        asked.append(columns)
        return real(self, *args, columns=columns, **kw)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    pq.write_table(table(250), tmp_path / "a.parquet", row_group_size=50)
    list(read_documents(tmp_path / "a.parquet"))
    assert asked[-5:] == [["text", "title"]] * 5  # a row group at a time


def test_memory_stays_flat_over_a_parquet_file(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none") as writer:
        for group in range(8):
            texts = [f"{group} {i} " + "abc" * 1000 for i in range(1000)]
            writer.write_table(pa.table({"text": texts}, schema=schema))
    before = pa.total_allocated_bytes()
    most = 0
    for _ in read_documents(tmp_path / "a.parquet"):  # 24 MB
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10e6


@pytest.mark.parametrize("shape", ["list", "object"])
def test_memory_stays_flat_over_a_large_json_file(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "a.json"
    item = json.dumps({"text": "some words " * 1000})
    with path.open("w") as file:
        file.write("[" if shape == "list" else '{"data": [')
        file.write(",".join([item] * (2 * MAX_ROW // len(item))))
        file.write("]" if shape == "list" else "]}")
    next(read_documents(path))  # imports
    documents = read_documents(path)
    next(documents)
    tracemalloc.start()
    count = 1 + sum(1 for _ in documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2 * MAX_ROW // len(item)
    assert peak < 8 * 1024**2


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("train/a.txt", "train"),
        ("test.jsonl", "test"),
        ("my_val.csv", "validation"),
        ("dev/train.txt", "train"),
        ("latest.txt", ""),
        ("a.txt", ""),
    ],
)
def test_names_say_the_split(name: str, split: str) -> None:
    assert split_of(name) == split


def test_splits_of_a_folder_lie_side_by_side(tmp_path: Path) -> None:
    for name in ("b/test.txt", "a/train.txt", "c/train.txt", "notes.txt", "z/valid.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [(d.split, d.text) for d in read_documents(tmp_path)]
    assert found == [
        ("train", "a/train.txt"),
        ("train", "c/train.txt"),
        ("validation", "z/valid.txt"),
        ("test", "b/test.txt"),
        ("", "notes.txt"),
    ]


def test_without_a_training_split_names_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("text")
    assert [d.split for d in read_documents(tmp_path)] == [""]


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").symlink_to("/etc/hostname")
    rejected = Rejected()
    list(read_documents(tmp_path, rejected=rejected))
    assert rejected.left_out == [
        "1 link was not followed: only files that lie in the folder itself are read.",
        "1 empty file was left out.",
    ]


def test_bad_rows_are_counted_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "bad\n" * 80)
    (tmp_path / "b.jsonl").write_text('bad\n{"text": "b"}\n')
    (tmp_path / "c.json").write_text("[")
    rejected = Rejected()
    options = ReadOptions(bad_rows="skip")
    assert [d.text for d in read_documents(tmp_path, options, rejected)] == ["a", "b"]
    assert (rejected.rows, rejected.files, len(rejected.first)) == (81, 1, 50)
    assert str(rejected.first[0]) == "a.jsonl:2"
    assert rejected.first[0].reason == "column 1: Expecting value."


# --- files that do not stay as they are -----------------------------------------------------------


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["text " * 100] * 3000)
    documents = read_documents(path)
    next(documents)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        list(documents)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["text " * 100] * 3000)
    documents = read_documents(path)
    next(documents)
    with path.open("r+") as file:
        file.truncate(800_000)
    with pytest.raises(UserError, match="changed while it was read"):
        list(documents)


def test_a_file_that_vanishes_before_its_turn_is_named(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", ["a"])
    second = rows(tmp_path / "b.jsonl", ["b"])
    documents = read_documents(tmp_path)
    next(documents)
    second.unlink()
    with pytest.raises(UserError, match=r"vanished.*b\.jsonl was there"):
        list(documents)


# --- previews, progress, rows from elsewhere ------------------------------------------------------


def test_a_preview_tells_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("id;review\n" + "1;größer als gedacht\n" * 5000).encode("cp1252"))
    preview = describe(path)
    assert (preview.files, preview.bytes, preview.formats) == (1, path.stat().st_size, (".csv",))
    assert (preview.encoding, preview.encoding_name) == ("cp1252", "Windows-1252 (guessed)")
    assert (preview.columns, preview.text_column) == (("id", "review"), "review")
    assert len(preview.first) == 20
    assert preview.first[0].text == "größer als gedacht"


def test_a_preview_offers_the_columns_where_none_holds_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": [2]}\n')
    preview = describe(path)
    assert preview.columns == ("a", "b")
    assert preview.first == ()
    assert isinstance(preview.problem, InvalidInput)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_preview_reads_only_the_beginning(tmp_path: Path, name: str) -> None:
    """The whole terabyte would take hours."""
    path = tmp_path / name
    line = json.dumps({"text": "x" * 5000}) + "\n"
    path.write_text({"a.csv": "text\n" + "x" * 5000 + "\n"}.get(name, line) + line * 2000)
    with path.open("r+b") as file:
        file.truncate(10**12)
    assert len(describe(path).first[0].text) == 2000


def test_progress_is_in_bytes_of_the_files(tmp_path: Path) -> None:
    plain = rows(tmp_path / "a.jsonl", ["text " * 100] * 2000)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    watch = Watch()
    list(read_documents(tmp_path, progress=watch))
    total = sum(file.size for file in find_files(tmp_path).files)
    done = [done for done, _ in watch.reports]
    assert {t for _, t in watch.reports} == {total}
    assert done[-1] == total


def bomb() -> bytes:
    return gzip.compress(b"\n" * 12_000_000)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "json"])
def test_reading_can_be_stopped_where_no_document_comes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"gz": "a.jsonl.gz"}.get(kind, f"a.{kind}")
    if kind == "gz":
        path.write_bytes(bomb())
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [" "] * 100_000}), path)
    else:
        path.write_text("\n" * 3_000_000 if kind == "jsonl" else "[" + " " * 3_000_000 + "]")
    watch = Watch(stop_after=6)
    with pytest.raises(Cancelled):
        list(read_documents(path, ReadOptions(bad_rows="skip"), progress=watch))


def test_rows_from_elsewhere_follow_the_same_rules() -> None:
    def given() -> Iterator[object]:
        yield {"content": "one", "title": "T"}
        yield {"content": 2}
        yield {"content": "three"}

    with pytest.raises(InvalidInput, match="hub/set, row 2: column 'content' holds a number"):
        list(documents_of_rows(given(), "hub/set", ReadOptions()))
    rejected = Rejected()
    options = ReadOptions(bad_rows="skip")
    found = list(documents_of_rows(given(), "hub/set", options, rejected))
    assert found == [Document("one", "T"), Document("three")]
    assert [str(row) for row in rejected.first] == ["hub/set:2"]


def test_options_go_into_a_record_and_back() -> None:
    options = ReadOptions("body", "skip", 10, None, "cp1252")
    assert ReadOptions.from_json(json.loads(json.dumps(options.as_json()))) == options
    assert ReadOptions().as_json() == {}
    assert ReadOptions.from_json({"of_another_version": 1}) == ReadOptions()
    with pytest.raises(InvalidInput):
        ReadOptions(bad_rows="perhaps")
