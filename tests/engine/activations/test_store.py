"""What is on disk: written in flat memory, refused where it is not whole."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from mistudio.engine.activations import store
from mistudio.engine.activations.store import ROW, StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import CorruptFile

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64


@pytest.fixture(scope="module")
def whole(tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    extract(tiny, tokens, (A, B), folder, max_tokens=4_000, context=CONTEXT)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "activations")


def test_extraction_counts_what_it_left_out(folder):
    stored = StoredActivations(folder)
    dropped = stored.dropped
    windows = sum(len(np.unique(rows["window"])) for rows in stored.rows.values())
    assert dropped.kept == sum(stored.meta.tokens.values())
    assert dropped.seen == windows * CONTEXT
    assert dropped.special >= windows


@pytest.mark.parametrize("name", [f"train/{A.name}.f16", f"heldout/{B.name}.f16"])
@pytest.mark.parametrize("change", [-2, -1000, 2])
def test_a_file_of_another_length_is_refused(folder, name, change):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CorruptFile, match=r"bytes; .* were written\. Delete them and extract"):
        StoredActivations(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "train" / f"{A.name}.f16").unlink()
    with pytest.raises(CorruptFile, match="It has 0 bytes"):
        StoredActivations(folder)


@pytest.mark.parametrize("keep", [0, 60, -6])
def test_cut_places_are_refused(folder, keep):
    path = folder / "train" / "rows.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match=r"rows\.npy"):
        StoredActivations(folder)


def test_places_of_another_extraction_are_refused(folder):
    rows = np.load(folder / "train" / "rows.npy")
    np.save(folder / "train" / "rows.npy", rows[:-1])
    with pytest.raises(CorruptFile, match="does not belong"):
        StoredActivations(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"points": 3}', "[1]"])
def test_a_broken_description_is_refused(folder, text):
    (folder / "meta.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"meta\.json"):
        StoredActivations(folder)


def written(folder, monkeypatch, n):
    """The most memory that writing `n` rows took, in bytes of numpy and Python."""
    monkeypatch.setattr(store, "WRITE_BUFFER", 512)
    writer = store._Writer(folder, (A,), np.random.default_rng(0), 512 + 64)
    values = {A: torch.arange(64.0)[:, None].expand(64, 4).contiguous()}
    rows = np.zeros(64, ROW)
    tracemalloc.start()
    with writer.split("train"):
        for number in range(n // 64):
            rows["window"] = number
            rows["position"] = np.arange(64)
            writer.add(values, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    few = written(tmp_path / "few", monkeypatch, 16 * 512)
    many = written(tmp_path / "many", monkeypatch, 256 * 512)
    rows = np.load(tmp_path / "many" / "train" / "rows.npy", mmap_mode="r")
    assert len(rows) == 256 * 512
    assert many < few + 100_000  # the rows' places alone take 786,432 bytes
    values = np.fromfile(tmp_path / "many" / "train" / f"{A.name}.f16", np.float16)
    assert np.array_equal(values.reshape(-1, 4)[:, 0], rows["position"])
    assert [path.name for path in (tmp_path / "many" / "train").glob("*.part")] == []
