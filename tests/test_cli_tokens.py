"""Tokenising, statistics and tokenizers from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from journeys import road

MODEL = Path(__file__).parent / "data" / "sentencepiece" / "bpe_bytes.model"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road.built_once(tmp_path_factory)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    return road.copy_of(built, tmp_path)


def run(root: Path, tmp_path: Path, *arguments: object) -> tuple[int, Any]:
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    code = road.run_cli(root, *arguments, "--json", report)
    return code, json.loads(report.read_text()) if report.exists() else None


def test_a_tokenizer_is_added_used_and_removed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(root, tmp_path, "tokenizer", "add", MODEL, "--name", "Small")
    assert code == 0
    assert "Tokenizer 1: Small, 1,000 tokens" in capsys.readouterr().out
    options = ("--padding", "longest", "--max-length", 64, "--truncation", "do_not_truncate")
    code, result = run(root, tmp_path, "dataset", "tokenize", 1, "--tokenizer", "Small", *options)
    assert code == 0
    assert result["statistics"]["vocabulary"] == 1000
    out = capsys.readouterr().out
    assert "padded to at most 64 tokens, long documents continued, 10% held out" in out
    code, listed = run(root, tmp_path, "list")
    assert [row["name"] for row in listed["tokenizers"]] == ["Small"]
    assert run(root, tmp_path, "tokenizer", "remove", "Small")[0] == 0
    assert run(root, tmp_path, "list")[1]["tokenizers"] == []


def test_one_tokenizer_must_be_named(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path, "dataset", "tokenize", 1)[0] == 2
    both = ("--model", 1, "--tokenizer", 1)
    assert run(root, tmp_path, "dataset", "tokenize", 1, *both)[0] == 2


def test_statistics_are_printed_with_what_to_know(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(root, tmp_path, "dataset", "statistics", 1)
    assert code == 0
    out = capsys.readouterr().out
    found = result["statistics"]
    assert f"{found['documents']:,} documents" in out
    assert f"exact duplicates: {found['duplicates']['copies']}" in out
    assert all(f"{warning['title']}: {warning['text']}" in out for warning in result["warnings"])
    assert result["warnings"]
