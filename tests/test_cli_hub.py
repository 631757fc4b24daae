"""The Hub on the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from mistudio import cli, credentials
from mistudio.engine.hub import access

TOKEN = "hf_abcdefgh12345678"
LINES = b"".join(b'{"text": "Document %d."}\n' % n for n in range(9))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run("dataset", "search", "x")` -> (exit code, result)."""
    from mistudio import logs

    monkeypatch.setattr(logs, "set_up", lambda: None)

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "result.json"
        out.unlink(missing_ok=True)
        code = cli.run([*arguments, "--library", str(tmp_path / "lib"), "--json", str(out)])
        return code, json.loads(out.read_text()) if out.exists() else {}

    return call


def test_search_look_and_download(
    hub: HubServer, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"license": "mit", "dataset_info": {"features": [{"name": "text", "dtype": "string"}]}}
    hub.add("owner/texts", {"train.jsonl": LINES}, downloads=12_000, card=about)
    code, found = run("dataset", "search", "TEXT")
    assert (code, found["datasets"][0]["repository"]) == (0, "owner/texts")
    assert "owner/texts" in capsys.readouterr().out
    assert run("dataset", "info", "owner/texts")[0] == 0
    assert "text (string)" in capsys.readouterr().out
    code, result = run("dataset", "download", "owner/texts", "--max-documents", "4")
    assert (code, result["documents"]) == (0, 4)
    code, result = run("dataset", "download", "owner/texts", "--link", "--name", "Linked")
    assert (code, result["documents"]) == (0, 9)
    assert "Linked, the first 9 documents" in capsys.readouterr().out
    assert run("dataset", "download", "owner/nothing")[0] == 1
    assert "No such dataset on the Hub." in capsys.readouterr().err


def test_login_and_logout(
    hub: HubServer, run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text + "\n"))

    typed(TOKEN)
    assert run("login")[0] == 1
    assert credentials.remembered() is None
    hub.accounts[TOKEN] = "ann"
    typed(TOKEN)
    assert run("login") == (0, {"name": "ann", "kept_in": "file"})
    typed("hf_another_token")
    assert run("login", "--unchecked")[0] == 0
    code, result = run("logout")
    assert (code, result) == (0, {"signed_in": False})
    assert credentials.remembered() is None
    said = capsys.readouterr()
    assert "only you can read" in said.out
    assert TOKEN not in said.out + said.err
