"""Files that people have -> documents; what cannot be read is refused with the place in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mistudio.engine.datasets.sources import (
    ReadOptions,
    Rejected,
    columns,
    local_files,
    read_documents,
)
from mistudio.errors import CorruptFile, InvalidInput, NotFound, UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(path: Path, rows: list[object]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, column: str | None = None, skipped: list[str] | None = None) -> list[str]:
    """The texts; bad rows are refused, or skipped and named in `skipped`."""
    options = ReadOptions(column, bad_rows="refuse" if skipped is None else "skip")
    rejected = Rejected()
    texts = [document.text for document in read_documents(path, options, rejected)]
    if skipped is not None:
        skipped += map(str, rejected.first)
    return texts


# --- what can be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_plain_text_becomes_documents_of_whole_paragraphs(tmp_path: Path, suffix: str) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 100 for i in range(12)]
    path = write(tmp_path / f"book{suffix}", "\n\n".join(paragraphs))
    documents = list(read_documents(path))
    assert len(documents) == 4
    assert [d.title for d in documents] == ["book"] * 4
    for document in documents:
        assert document.text.startswith("Paragraph")
        assert document.text.endswith("word")
    together = " ".join(" ".join(d.text.split()) for d in documents)
    assert together == " ".join(" ".join(p.split()) for p in paragraphs)


def test_json_lines_keep_title_and_topic(tmp_path: Path) -> None:
    rows: list[object] = [{"title": "T", "topic": "P", "text": "one"}, {"text": "two", "title": 3}]
    documents = list(read_documents(lines(tmp_path / "a.jsonl", rows)))
    assert [(d.text, d.title, d.topic) for d in documents] == [("one", "T", "P"), ("two", "", "")]


@pytest.mark.parametrize(
    "content",
    [
        ["one", "two"],
        [{"text": "one"}, {"text": "two"}],
        {"data": [{"text": "one"}, {"text": "two"}], "version": 1},
    ],
)
def test_json_may_be_a_list_of_texts_or_objects_or_hold_one_such_list(
    tmp_path: Path, content: object
) -> None:
    path = write(tmp_path / "a.json", json.dumps(content, indent=2))
    assert read(path) == ["one", "two"]


def test_one_json_object_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '{"text": "alone"}')) == ["alone"]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_may_hold_delimiters_quotes_and_line_breaks(
    tmp_path: Path, suffix: str, delimiter: str
) -> None:
    texts = ['he said "no", twice', "two\nlines", "tab\there", "ümlaut"]
    with (tmp_path / f"a{suffix}").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))
    assert read(tmp_path / f"a{suffix}") == texts


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbftext,n\r\nhello,1\r\n")
    assert columns(path) == ["text", "n"]
    assert read(path, "text") == ["hello"]
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]


def test_a_folder_gives_all_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.txt", "first")
    lines(tmp_path / "deep" / "c.jsonl", [{"text": "third"}])
    write(tmp_path / "image.png", b"\x89PNG\0")
    assert read(tmp_path) == ["first", "second", "third"]
    assert [p.name for p in local_files(tmp_path)] == ["a.txt", "b.txt", "c.jsonl"]


# --- the text column ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "long identifier of a row", "text": "t"}, "t"),
        ({"url": "https://example.org/a/b", "content": "c", "body": "b"}, "c"),
        ({"name": "short", "review": "the longest of them"}, "the longest of them"),
    ],
)
def test_the_column_of_text_is_guessed(tmp_path: Path, row: object, expected: str) -> None:
    assert read(lines(tmp_path / "a.jsonl", [row])) == [expected]


def test_all_rows_of_a_file_take_their_text_from_the_same_column(tmp_path: Path) -> None:
    rows: list[object] = [
        {"author": "Ursula K. Le Guin of Portland", "quote": "Brief."},
        *({"author": "Anon", "quote": f"A longer quotation, number {i}."} for i in range(20)),
    ]
    assert read(lines(tmp_path / "a.jsonl", rows))[0] == "Brief."


def test_the_chosen_column_is_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "no", "summary": "yes"}])
    assert read(path, "summary") == ["yes"]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "a", "lang": "en"}])
    with pytest.raises(InvalidInput, match="has the columns text, lang; 'body' is not") as refusal:
        read(path, "body")
    assert refusal.value.field == "text_column"


def test_a_file_without_any_text_is_refused_with_its_columns(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="columns a, b; none holds text"):
        read(lines(tmp_path / "a.jsonl", [{"a": 1, "b": [2]}]))


def test_the_columns_to_choose_from_are_those_of_the_file(tmp_path: Path) -> None:
    assert columns(write(tmp_path / "a.csv", "id,text\n1,x\n")) == ["id", "text"]
    assert columns(write(tmp_path / "a.tsv", "id\ttext\n1\tx\n")) == ["id", "text"]
    assert columns(lines(tmp_path / "a.jsonl", [{"x": 1, "y": 2}])) == ["x", "y"]
    assert columns(write(tmp_path / "a.json", '[{"p": 1}]')) == ["p"]
    assert columns(write(tmp_path / "a.txt", "words")) == []


# --- what cannot be read --------------------------------------------------------------------------


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing at"):
        read(tmp_path / "missing.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="0 bytes"):
        read(write(tmp_path / name, b""))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a text file"):
        read(write(tmp_path / "a.txt", bytes(range(256)) * 10))


def test_a_kind_of_file_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"a\.docx is not one of \.txt"):
        read(write(tmp_path / "a.docx", "text"))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"\x89PNG")
    with pytest.raises(InvalidInput, match="No text files"):
        read(tmp_path)


BROKEN_LINES = {
    "cut off": '{"text": "cut',
    "deep": "[" * 100_000,
    "huge number": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "two on a line": '{"text": "a"} {"text": "b"}',
}


@pytest.mark.parametrize("fault", BROKEN_LINES)
def test_a_broken_line_is_refused_with_its_number_and_may_be_skipped(
    tmp_path: Path, fault: str
) -> None:
    rows = ['{"text": "one"}', "", BROKEN_LINES[fault], '{"text": "four"}']
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    with pytest.raises(CorruptFile, match=r"a\.jsonl, line 3") as refusal:
        read(path)
    assert "--skip-bad-rows" in refusal.value.next_step
    skipped: list[str] = []
    assert read(path, skipped=skipped) == ["one", "four"]
    assert skipped == ["a.jsonl:3"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": 5}, "column 'text' holds a number"),
        ({"text": None}, "it has nothing in the column 'text'"),
        ({"other": "words"}, "it has nothing in the column 'text'"),
        ({"text": ["a"]}, "column 'text' holds a list"),
        (["a", "b"], "it is a list, not an object"),
        (7, "it is a number"),
    ],
)
@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("place", [2, 80])  # among the rows that the column is guessed from, beyond
def test_a_row_without_text_is_refused_with_its_line_and_may_be_skipped(
    tmp_path: Path, row: object, fault: str, column: str | None, place: int
) -> None:
    rows: list[object] = [{"text": f"row {i}"} for i in range(place - 1)]
    path = lines(tmp_path / "a.jsonl", [*rows, row, {"text": "last"}])
    with pytest.raises(InvalidInput, match=f"line {place}: {fault}"):
        read(path, column)
    skipped: list[str] = []
    assert len(read(path, column, skipped)) == place
    assert skipped == [f"a.jsonl:{place}"]


def test_broken_json_is_refused_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"a\.json, line 2, column 1"):
        read(write(tmp_path / "a.json", '[{"text": "a"},\n'))
    with pytest.raises(CorruptFile, match="nested too deeply"):
        read(write(tmp_path / "b.json", "[" * 100_000))


def test_an_open_quotation_mark_is_refused_with_the_line_of_its_row(tmp_path: Path) -> None:
    content = 'text,n\n"two\nlines",1\nfine,2\n"never closed,3\n' + "more,4\n" * 50
    with pytest.raises(CorruptFile, match=r"line 5: unexpected end of .* to line 55"):
        read(write(tmp_path / "a.csv", content))


def test_a_row_of_a_table_with_too_few_fields_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,text\n1,one\n2\n3,three\n")
    with pytest.raises(InvalidInput, match="line 3: it has nothing in the column 'text'"):
        read(path)
    skipped: list[str] = []
    assert read(path, skipped=skipped) == ["one", "three"]
    assert skipped == ["a.csv:3"]


def test_a_row_with_too_many_fields_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "id,text\n1,one,extra\n")) == ["one"]


def test_every_refusal_says_what_to_do_next(tmp_path: Path) -> None:
    cases = [
        tmp_path / "missing.txt",
        write(tmp_path / "empty.txt", b""),
        write(tmp_path / "binary.txt", b"\0\1"),
        write(tmp_path / "a.docx", "x"),
        write(tmp_path / "a.jsonl", "{"),
        write(tmp_path / "b.jsonl", '{"n": 1}'),
        write(tmp_path / "a.json", "["),
        write(tmp_path / "a.csv", 'text\n"open'),
    ]
    for path in cases:
        with pytest.raises(UserError) as refusal:
            read(path)
        assert refusal.value.title, path
        assert path.name in refusal.value.what, path
        assert refusal.value.next_step.endswith((".", ")")), path
