"""Models from the Hub: only what a model needs, verified, and nothing that could run code."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from hub_server import HubServer

from mistudio.engine.hub import download_model, model_info, search_models
from mistudio.engine.hub.catalogue import _found
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


def weights(**tensors: int) -> bytes:
    """A safetensors file of bf16 vectors of these lengths."""
    header, end = {}, 0
    for name, n in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [n], "data_offsets": [end, end + 2 * n]}
        end += 2 * n
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def test_models_are_searched_among_those_that_write_text_and_are_safe(hub: HubServer) -> None:
    hub.add("ada/small-lm", dict(FILES), kind="model", downloads=5, card={"license": "mit"})
    hub.add("bob/small-lm", dict(FILES), kind="model", downloads=90, gated="manual", likes=3)
    hub.add("ada/small-lm", {"a.txt": b"a dataset"})
    first, second = search_models(" small-lm ")
    assert (first.repository, first.gated, first.likes) == ("bob/small-lm", "manual", 3)
    assert (second.repository, second.licence) == ("ada/small-lm", "mit")
    asked = hub.asked("/api/models?")[0].path
    assert "search=small-lm" in asked and "filter=safetensors" in asked
    assert "pipeline_tag=text-generation" in asked and "expand=safetensors" in asked


def test_the_size_of_a_found_model_is_that_of_its_weights() -> None:
    def size_of(parameters: object) -> int | None:
        row = {"id": "a/b", "usedStorage": 99, "safetensors": {"parameters": parameters}}
        return _found(row).bytes

    assert size_of({"BF16": 100, "F32": 10}) == 240
    assert size_of({"BF16": 100, "Q7": 10}) == 99
    assert size_of("nonsense") == 99


def test_a_model_is_described_without_its_weights(hub: HubServer) -> None:
    files = {**FILES, "model.safetensors": weights(a=70_000, b=30_000), "config.json": b'{"x": 1}'}
    repo = hub.add(NAME, files, kind="model", gated="", card={"license": "mit"}, likes=4)
    info = model_info(NAME)
    assert (info.revision, info.config, info.licence, info.likes) == (
        repo.sha, b'{"x": 1}', "mit", 4)  # fmt: skip
    assert (info.parameters, info.dtypes, info.problem) == (100_000, ("BF16",), "")
    assert info.weight_bytes == len(files["model.safetensors"])
    assert info.bytes == info.weight_bytes + len(files["config.json"]) + 2
    assert all(0 < int(r.rpartition("-")[2]) < 300 for r in hub.ranges("model.safetensors"))


def test_what_a_model_lacks_is_said(hub: HubServer) -> None:
    hub.add("a/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, kind="model")
    assert "safetensors" in model_info("a/pickled").problem
    hub.add("a/bare", {"model.safetensors": weights(a=1)}, kind="model")
    assert "config.json" in model_info("a/bare").problem
    many = {f"model-{n}.safetensors": b"not read" for n in range(5)}
    hub.add("a/large", {"config.json": b"{}", **many}, kind="model")
    large = model_info("a/large")
    assert (large.parameters, large.dtypes, large.weight_bytes) == (None, (), 40)
    hub.add("a/lie", {"config.json": b"{}", "model.safetensors": b"weights" * 99}, kind="model")
    with pytest.raises(CorruptFile, match="header"):
        model_info("a/lie")
