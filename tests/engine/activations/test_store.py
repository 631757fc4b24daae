"""What is on disk: written in flat memory, refused where it is not whole."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from mistudio.engine.activations.shards import EARLIER_ROW
from mistudio.engine.activations.store import StoredActivations, extract
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


@pytest.mark.parametrize("name", [f"train/00000/{A.name}.f16", f"heldout/00000/{B.name}.f16"])
@pytest.mark.parametrize("change", [-2, -1000, 2])
def test_a_file_of_another_length_is_refused(folder, name, change):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CorruptFile, match=r"bytes; .* were written\. Delete them and extract"):
        StoredActivations(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "train" / "00000" / f"{A.name}.f16").unlink()
    with pytest.raises(CorruptFile, match="It is missing"):
        StoredActivations(folder)


@pytest.mark.parametrize("keep", [0, 60, -6])
def test_cut_places_are_refused(folder, keep):
    path = folder / "train" / "00000" / "rows.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match=r"rows\.bin"):
        StoredActivations(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"points": 3}', "[1]"])
def test_a_broken_description_is_refused(folder, text):
    (folder / "meta.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"meta\.json"):
        StoredActivations(folder)


def test_changed_content_is_found(folder):
    stored = StoredActivations(folder)
    stored.verify()
    path = folder / "train" / "00000" / f"{B.name}.f16"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="has changed"):
        StoredActivations(folder).verify()


def test_a_store_of_a_newer_version_is_refused(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(CorruptFile, match="newer version"):
        StoredActivations(folder)


def test_a_store_of_an_earlier_version_is_read(folder, tmp_path):
    """One flat file a site, and rows that hold window and position only."""
    stored = StoredActivations(folder)
    old = tmp_path / "earlier"
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("format", "storage", "shards", "batch_windows", "limits", "definitions"):
        del meta[name]
    for split in ("train", "heldout"):
        (old / split).mkdir(parents=True)
        for point in (A, B):
            shutil.copy(folder / split / "00000" / f"{point.name}.f16", old / split)
        rows = stored.rows[split][:]
        np.save(old / split / "rows.npy", rows[["window", "position"]].astype(EARLIER_ROW))
    (old / "meta.json").write_text(json.dumps(meta))
    earlier = StoredActivations(old)
    chosen = np.arange(0, 2000, 7)
    for point in (A, B):
        assert torch.equal(
            earlier.read("train", chosen)[point], stored.read("train", chosen)[point]
        )
    chunks = zip(earlier.token_rows("train", A), stored.token_rows("train", A), strict=True)
    assert all(np.array_equal(x.positions, y.positions) for x, y in chunks)
    path = old / "train" / "rows.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(CorruptFile, match="does not belong"):
        StoredActivations(old)
