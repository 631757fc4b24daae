"""Models from the Hub: only what a model needs, verified, and nothing that could run code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_server import HubServer

from mistudio.engine.hub import download_model
from mistudio.errors import AccessDenied, CorruptFile, DiskFull, UnsupportedModel

NAME = "owner/model"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 500,
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"import os",
    "onnx/model.safetensors": b"not at the top",
}


def free(needed: int, what: str) -> None:
    if needed > 1_000_000:
        raise DiskFull("Full", what)


def test_only_what_a_model_needs_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add(NAME, dict(FILES), kind="model", card={"license": "mit"})
    hub.cut["model.safetensors"] = 0.5
    told = download_model(NAME, tmp_path, free)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors"}  # fmt: skip
    assert (told["revision"], told["licence"]) == (repo.sha, "mit")
    [weights] = [file for file in told["files"] if file["name"] == "model.safetensors"]
    assert weights["sha256"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert len(hub.ranges("model.safetensors")) == 2


def test_pickled_weights_gates_and_full_disks_are_refused_first(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add(NAME, {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}, kind="model")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        download_model(NAME, tmp_path, free)
    hub.add(NAME, dict(FILES), kind="model")
    hub.listed_size["model.safetensors"] = 10**9
    with pytest.raises(DiskFull):
        download_model(NAME, tmp_path, free)
    assert hub.asked("/resolve/") == []
    hub.listed_size.clear()
    hub.repos["model", NAME].gated = "auto"
    with pytest.raises(AccessDenied, match="This model is gated") as refusal:
        download_model(NAME, tmp_path, free)
    assert f"{hub.endpoint}/{NAME}," in refusal.value.next_step
    assert not list(tmp_path.iterdir())


def test_changed_weights_leave_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, dict(FILES), kind="model")
    hub.sent["model.safetensors"] = FILES["model.safetensors"][:-1] + b"!"
    with pytest.raises(CorruptFile, match="hash"):
        download_model(NAME, tmp_path, free)
    assert not list(tmp_path.iterdir())
