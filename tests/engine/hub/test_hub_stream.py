"""Documents read on the Hub: the same as from the files, and no more bytes than needed."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub_server import HubServer

from mistudio.engine.datasets.links import open_link
from mistudio.engine.datasets.sources import ReadOptions, Rejected
from mistudio.engine.hub import Access, dataset_info, search_datasets, stream
from mistudio.engine.progress import Cancelled
from mistudio.errors import CorruptFile, InvalidInput, NotFound, Offline

NAME = "owner/texts"
ROWS = [
    {
        "text": f'Document {n}, with "quotes",\nlines and 漢字. ' + "word " * (n % 50),
        "title": f"t{n}",
    }
    for n in range(3000)
]
TEXTS = [row["text"] for row in ROWS]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["title", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]], group: int = 500) -> bytes:
    out = io.BytesIO()
    wide = [{**row, "blob": "x" * 2000 + str(n)} for n, row in enumerate(rows)]
    pq.write_table(
        pa.Table.from_pylist(wide), out, row_group_size=group, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    return out.getvalue()


def arrow(rows: list[dict[str, Any]], kind: Any) -> bytes:
    out = io.BytesIO()
    data = pa.Table.from_pylist(rows)
    with kind(out, data.schema) as writer:
        writer.write_table(data, max_chunksize=700)
    return out.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: jsonl(ROWS),
    "a.jsonl.gz": lambda: gzip.compress(jsonl(ROWS)),
    "a.jsonl.zst": lambda: zstandard.compress(jsonl(ROWS)),
    "a.json": lambda: json.dumps(ROWS).encode(),
    "a.csv": lambda: table(ROWS, ","),
    "a.tsv.gz": lambda: gzip.compress(table(ROWS, "\t")),
    "a.parquet": lambda: parquet(ROWS),
    "a.arrow": lambda: arrow(ROWS, pa.ipc.new_file),
    "b.arrow": lambda: arrow(ROWS, pa.ipc.new_stream),
}


def read(link: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    return list(
        stream.stream_documents({"repository": NAME, **(link or {})}, ReadOptions(**options))
    )


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_its_documents(
    hub: HubServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_SEGMENT", 8192)
    hub.add(NAME, {f"train/{name}": FILES[name]()})
    hub.cut[f"train/{name}"] = 0.6
    found = read()
    assert [document.text for document in found] == TEXTS
    assert {document.split for document in found} == {"train"}
    assert found[7].title == "t7"


def test_plain_text_arrives_whole(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_SEGMENT", 4096)
    paragraphs = "\n\n".join(TEXTS)
    hub.add(NAME, {"a.txt": paragraphs.encode(), "b.txt": "wide".encode("utf-16") * 9})
    words = " ".join(document.text for document in read()).split()
    assert words[: len(paragraphs.split())] == paragraphs.split()
    assert "wide" in words[-1]


def test_splits_come_one_after_the_other_and_can_be_chosen(hub: HubServer) -> None:
    hub.add(NAME, {"test.jsonl": jsonl(ROWS[:3]), "train.jsonl": jsonl(ROWS[3:8])})
    assert [document.split for document in read()] == ["train"] * 5 + ["test"] * 3
    assert [document.text for document in read({"split": "test"})] == TEXTS[:3]
    with pytest.raises(InvalidInput, match="train, test"):
        read({"split": "dev"})
    with pytest.raises(InvalidInput, match="default"):
        read({"config": "german"})


def test_a_limit_of_a_large_file_fetches_its_beginning(hub: HubServer) -> None:
    content = jsonl(ROWS) * 40
    hub.add(NAME, {"a.jsonl": content})
    hub.bytes_per_second = 20_000_000
    assert [document.text for document in read(max_documents=10)] == TEXTS[:10]
    few = read(max_bytes=5000)
    assert sum(len(document.text.encode()) for document in few) <= 5000
    assert [document.text for document in few] == TEXTS[: len(few)]


def test_of_parquet_only_the_needed_groups_and_columns_are_fetched(hub: HubServer) -> None:
    """The blob column is nine tenths of each row group; after the first group it is left out."""
    content = parquet(ROWS)
    hub.add(NAME, {"a.parquet": content})

    def fetched() -> int:
        spans = [span.removeprefix("bytes=").split("-") for span in hub.ranges("a.parquet") if span]
        return sum(int(end) - int(start) + 1 for start, end in spans)

    assert len(read(max_documents=10)) == 10
    first = fetched()
    assert first < len(content) / 3
    hub.requests.clear()
    assert len(read()) == len(ROWS)
    assert fetched() < len(content) / 2


def test_a_link_is_read_at_its_revision(hub: HubServer) -> None:
    repo = hub.add(NAME, {"a.jsonl": jsonl(ROWS[:5])})
    link = {"kind": "hub", "repository": NAME, "revision": repo.sha, "config": "default",
            "split": None, "options": {"max_documents": 4}}  # fmt: skip
    assert [document.text for document in open_link(link)] == TEXTS[:4]
    repo.files["a.jsonl"] = jsonl(ROWS[5:9])
    with pytest.raises(NotFound, match="revision"):
        list(open_link(link))


def test_bad_rows_are_named_by_the_lines_of_the_file(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_SEGMENT", 4096)
    lines = jsonl(ROWS).splitlines(keepends=True)
    lines[1500] = b"{broken\n"
    hub.add(NAME, {"a.jsonl": b"".join(lines)})
    rejected = Rejected()
    found = list(
        stream.stream_documents(
            {"repository": NAME}, ReadOptions(bad_rows="skip"), rejected=rejected
        )
    )
    assert len(found) == len(ROWS) - 1
    assert (rejected.rows, [str(row) for row in rejected.first]) == (1, ["a.jsonl:1501"])
    with pytest.raises(CorruptFile, match="Counted from line"):
        read()


def test_the_text_column_of_the_first_file_holds_for_all(hub: HubServer) -> None:
    hub.add(NAME, {
        "a.jsonl": jsonl([{"review": "long enough to be it", "id": "1"}]),
        "b.jsonl": jsonl([{"review": "short", "id": "a much longer identifier"}]),
    })  # fmt: skip
    assert [document.text for document in read()] == ["long enough to be it", "short"]
    assert read(text_column="id")[0].text == "1"


def test_conversations_stay_conversations(hub: HubServer) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant",
             "content": "A"}]} for n in range(3)]  # fmt: skip
    for name, content in (("a.jsonl", jsonl(rows)), ("a.parquet", parquet(rows))):
        hub.add(NAME, {name: content})
        assert read()[2].messages == (("user", "Q2"), ("assistant", "A"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_refused_in_words(hub: HubServer, name: str) -> None:
    content = FILES[name]()
    hub.add(NAME, {name: content[: len(content) // 2] + b"\0" * 3000})
    with pytest.raises((CorruptFile, InvalidInput)):
        read()


def test_reading_can_be_stopped_and_leaves_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.jsonl": jsonl(ROWS)})
    hub.bytes_per_second = 200_000

    class Stop:
        stopped = False

        def check(self) -> None:
            if self.stopped:
                raise Cancelled

        def report(self, *_: Any, **__: Any) -> None:
            pass

    stop = Stop()
    documents = stream.stream_documents(
        {"repository": NAME}, ReadOptions(), stop, scratch=tmp_path / "in"
    )
    with pytest.raises(Cancelled):
        for _ in documents:
            stop.stopped = True
    assert not list((tmp_path / "in").iterdir())


# --- search and description -----------------------------------------------------------------------


def test_search_gives_what_one_chooses_by(hub: HubServer) -> None:
    hub.add("a/stories", {"x.txt": b"1234"}, downloads=5, likes=2, card={"license": "mit"})
    hub.add(
        "b/more-Stories", {"x.txt": b""}, downloads=90, gated="manual", description="Two\nlines"
    )
    hub.add("c/poems", {})
    hub.add("d/secret-stories", {}, private=True)
    first, second = search_datasets(" stories ")
    assert (first.repository, first.gated, first.description) == (
        "b/more-Stories", "manual", "Two lines")  # fmt: skip
    assert (second.repository, second.downloads, second.likes) == ("a/stories", 5, 2)
    assert (second.bytes, second.licence, second.gated) == (4, "mit", "")
    assert len(search_datasets("stories", limit=1)) == 1


def test_what_a_dataset_holds(hub: HubServer) -> None:
    card = {
        "license": ["mit", "cc0"],
        "dataset_info": {
            "features": [{"name": "text", "dtype": "string"}],
            "splits": [{"name": "train", "num_examples": 9}],
        },
    }
    repo = hub.add(NAME, {"train.parquet": b"PAR1" * 500, "test.parquet": b"P", "README.md": b"#"},
                   card=card, gated="auto")  # fmt: skip
    hub.accepted.add(("ann", NAME))
    hub.accounts["hf_annannann"] = "ann"
    from mistudio.engine.hub import Secret

    info = dataset_info(
        f"{hub.endpoint}/datasets/{NAME}/tree/main",
        access=Access(hub.endpoint, Secret("hf_annannann")),
    )
    assert (info.repository, info.revision, info.licence) == (NAME, repo.sha, "mit, cc0")
    config, splits = info.choose(None, None)
    assert [(split.name, split.rows, split.bytes) for split in splits] == [
        ("train", 9, 2000), ("test", None, 1)]  # fmt: skip
    assert config.columns == (("text", "string"),)
    assert (info.gated, info.problem) == ("auto", "")
    assert info.page == f"{hub.endpoint}/datasets/{NAME}"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"texts.py": b"import os"}, "programs of others are never run"),
        ({"README.md": b"#", ".gitattributes": b""}, "holds no files yet"),
        ({"a.png": b"", "b/c.wav": b""}, ".png, .wav"),
    ],
)
def test_where_nothing_can_be_read_it_says_why(
    hub: HubServer, files: dict[str, bytes], said: str
) -> None:
    hub.add(NAME, files)
    assert said in dataset_info(NAME).problem
    with pytest.raises(NotFound, match="Nothing here can be read"):
        read()


@pytest.mark.parametrize("text", ["", "a/b/c", "../x", "a b/c", "owner/..", "http://", "a--b/c"])
def test_what_is_no_repository_id_is_not_asked_for(hub: HubServer, text: str) -> None:
    with pytest.raises(InvalidInput, match="repository id"):
        dataset_info(text)
    assert hub.requests == []


@pytest.mark.parametrize("body", ["<html>", "[1, 2", '{"sha": 3}', "[" * 100_000, '"text"'])
def test_answers_that_make_no_sense_are_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    import hub_server

    def answer(self: Any, value: Any, extra: Any = None) -> None:
        self._send(200, body.encode(), {})

    monkeypatch.setattr(hub_server._Handler, "_json", answer)
    hub.add(NAME, {})
    with pytest.raises(CorruptFile, match="cannot be used"):
        dataset_info(NAME)
    if body != '{"sha": 3}':
        with pytest.raises(CorruptFile, match="cannot be used"):
            search_datasets("x")


def test_offline_nothing_is_read(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.add(NAME, {"a.jsonl": jsonl(ROWS[:2])})
    with pytest.raises(Offline):
        read()
    with pytest.raises(Offline):
        search_datasets("x")
    assert hub.requests == []
