"""Models with a program of their own on the command line: a script cannot consent by accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import own_models
import pytest
from own_models import write_own_model

from mistudio import cli


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    return write_own_model(tmp_path / "own-lm", marker)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run("model", "add", "x")` -> (exit code, result)."""
    from mistudio import logs

    monkeypatch.setattr(logs, "set_up", lambda: None)

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "result.json"
        out.unlink(missing_ok=True)
        words = [str(argument) for argument in arguments]
        code = cli.run([*words, "--library", str(tmp_path / "lib"), "--json", str(out)])
        return code, json.loads(out.read_text()) if out.exists() else {}

    return call


def test_added_only_by_the_hash_of_what_was_printed(
    run: Any, folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("model", "add", folder)[0] == 1
    assert "--show-code" in capsys.readouterr().err
    code, shown = run("model", "add", folder, "--show-code")
    out = capsys.readouterr().out
    assert code == 0 and run("list")[1]["models"] == []
    for name in own_models.CODE:
        assert (folder / name).read_text() in out and name in out
    assert f"--trust-code {shown['digest'][:16]}" in out and "all your rights" in out
    for wrong in ("", "yes", "all", shown["digest"][:11], shown["digest"][:12][::-1], "0" * 16):
        assert run("model", "add", folder, "--trust-code", wrong)[0] == 1, wrong
    assert not marker.exists() and run("list")[1]["models"] == []
    code, added = run("model", "add", folder, "--precision", "fp32", "--trust-code",
                      shown["digest"][:16])  # fmt: skip
    assert code == 0 and added["name"] == "own-lm" and marker.exists()


def test_what_changed_since_it_was_printed_is_not_added(
    run: Any, folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = run("model", "add", folder, "--show-code")[1]["digest"]
    path = folder / "own_layers.py"
    path.write_text(path.read_text() + "#")
    assert run("model", "add", folder, "--trust-code", digest)[0] == 1
    assert "not the one you named" in capsys.readouterr().err and not marker.exists()


def test_a_known_architecture_has_nothing_to_show(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = run("model", "add", own_models.TOKENIZER, "--show-code")
    assert (code, shown["files"]) == (0, [])
    assert "knows this architecture itself" in capsys.readouterr().out
