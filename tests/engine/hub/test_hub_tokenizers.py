"""Tokenizers from the Hub: only the tokenizer's files, in a form that can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer

from mistudio.engine.datasets.tokenizers import download_tokenizer
from mistudio.engine.models.loading import load_tokenizer
from mistudio.errors import AccessDenied, InvalidInput

DATA = Path(__file__).parents[2] / "data"
WHOLE = (DATA / "tiny-llama-0.9m" / "tokenizer.json").read_bytes()
PIECES = (DATA / "sentencepiece" / "bpe_bytes.model").read_bytes()
NAME = "owner/model"


def test_only_the_tokenizers_files_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    files = {
        "tokenizer.json": WHOLE,
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["own.Own", null]}}',
        "tokenizer.model": PIECES,
        "model.safetensors": b"weights",
        "own.py": b"import os",
        "original/tokenizer.json": b"another",
    }
    repo = hub.add(NAME, files, kind="model", card={"license": "mit"})
    told = download_tokenizer(NAME, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert (told["revision"], told["licence"]) == (repo.sha, "mit")
    assert len(hub.asked("/resolve/")) == 2
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    assert len(load_tokenizer(tmp_path)) == 1024


def test_a_sentencepiece_model_is_converted(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"tokenizer.model": PIECES, "config.json": b"{}"}, kind="model")
    download_tokenizer(NAME, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.decode(tokenizer("Hello 😀", add_special_tokens=False)["input_ids"]) == (
        "Hello 😀"
    )


def test_refusals(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"model.safetensors": b"weights"}, kind="model")
    with pytest.raises(InvalidInput, match="no tokenizer here"):
        download_tokenizer(NAME, tmp_path / "none")
    hub.add(NAME, {"tokenizer.json": WHOLE}, kind="model")
    hub.repos["model", NAME].gated = "auto"
    with pytest.raises(AccessDenied, match="gated"):
        download_tokenizer(NAME, tmp_path / "gated")
