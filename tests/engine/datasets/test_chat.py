"""Conversations in rows become messages and a plain reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mistudio.engine.datasets.chat import messages_of, plain_reading
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.sources import ReadOptions, describe, read_documents
from mistudio.errors import InvalidInput

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
EXPECTED = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (MESSAGES, EXPECTED),
        ({"messages": MESSAGES}, EXPECTED),
        (SHAREGPT, EXPECTED[1:]),
        ([{"from": "GPT", "value": "a"}], (("assistant", "a"),)),
        ([{"role": "critic", "content": "a"}], (("critic", "a"),)),
        ([{"role": "assistant", "content": None}], (("assistant", ""),)),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"],
                }
            ],
            (("user", "a\nb"),),
        ),
        ([], None),
        (["a", "b"], None),
        ("text", None),
        ([{"role": "user"}], None),
        ([{"role": 3, "content": "a"}], None),
        ([{"role": "user", "content": 7}], None),
        ([*MESSAGES, "stray"], None),
    ],
)
def test_what_is_a_conversation(value: object, expected: object) -> None:
    assert messages_of(value) == expected


def test_the_plain_reading_leaves_out_turns_without_words() -> None:
    messages = (("user", "Hi"), ("assistant", " "), ("tool", "42"), ("assistant", "It is 42."))
    assert plain_reading(messages) == "User: Hi\n\nTool: 42\n\nAssistant: It is 42."


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_rows_with_a_conversation_are_read_from_every_format(tmp_path: Path, column: str) -> None:
    value = MESSAGES[1:] if column == "messages" else SHAREGPT
    rows = [{"id": "a long identifier of the row", column: value, "title": "T"}] * 2
    expected = [Document("User: Hi\n\nAssistant: Hello!", "T", messages=EXPECTED[1:])] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (lines(tmp_path / "a.jsonl", rows), tmp_path / "a.json", tmp_path / "a.parquet"):
        assert list(read_documents(path)) == expected, path
        preview = describe(path)
        assert (preview.chat, preview.text_column) == (True, column)


def test_a_column_called_text_goes_before_messages(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": MESSAGES, "text": "as text"}])
    assert [d.text for d in read_documents(path)] == ["as text"]
    chosen = list(read_documents(path, ReadOptions(text_column="messages")))
    assert chosen[0].messages == EXPECTED


def test_a_broken_conversation_is_a_bad_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": MESSAGES}, {"messages": [{"role": "user"}]}])
    with pytest.raises(InvalidInput, match="line 2: column 'messages' holds a list, not text"):
        list(read_documents(path))
    assert len(list(read_documents(path, ReadOptions(bad_rows="skip")))) == 1
