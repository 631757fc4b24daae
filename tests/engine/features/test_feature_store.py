"""The feature store's files: read as they were written, of the first format too, refused in words
where they are damaged; and the table of statistics."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest

from mistudio.engine.features.columns import ANALYSES, BY_NAME, DISCOVERY, SCORES, TABLE
from mistudio.engine.features.store import (
    EARLIER_COLUMNS,
    ENTRY,
    FORMAT,
    NONE,
    PLACE,
    TOKEN,
    FeatureMeta,
    FeatureStore,
    Occurrence,
    TokenCount,
    add_arrays,
    add_columns,
    write_store,
)
from mistudio.errors import CorruptFile, Incompatible

N, K, RADIUS, CONTEXT = 3, 4, 2, 10


class Text:
    """Token ids that tell where they stand."""

    def windows(self, numbers, context):
        import torch

        return torch.as_tensor(np.asarray(numbers)[:, None] * 100 + np.arange(context))


@pytest.fixture
def folder(tmp_path):
    meta = FeatureMeta(
        n_features=N,
        tokens=1000,
        contexts=100,
        context=CONTEXT,
        split="train",
        top_k=K,
        radius=RADIUS,
        hook_point="blocks.1.hook_resid_post",
        format=FORMAT,
        seed=7,
        provenance={"sae": "abc"},
    )
    columns = {column.name: np.arange(N) for column in DISCOVERY}
    columns["density"] = np.array([0.5, 0.0, 0.25])
    top = np.zeros((N, K), ENTRY)
    top[0, 0], top[0, 1], top[2, 0] = (7, 1, 8.0), (3, 9, 4.0), (5, 5, 0.5)
    span = np.zeros((N, K, 2 * RADIUS + 1), np.float16)
    span[0, 0], span[0, 1, 2], span[2, 0] = [9, 0, 1, 0.5, 0.25], 1, [0, 0.5, 1, 0, 2]
    deciles = np.zeros((N, 10, 5), ENTRY)
    deciles[0, 0, 0], deciles[0, 9, 0], deciles[0, 9, 1] = (1, 2, 0.5), (3, 4, 8.0), (5, 6, 7.5)
    hard = np.zeros((N, 25), PLACE)
    hard["window"] = NONE
    hard[2, 0] = (6, 3)
    inactive = np.full((N, 25), NONE, np.uint32)
    inactive[0, :2] = 8, 9
    tokens = np.zeros((N, 16), TOKEN)
    tokens["token"] = NONE
    tokens[0, 0], tokens[0, 1] = (4, 12), (2, 3)
    histogram = np.zeros((N, 64), np.uint32)
    histogram[0, 63], histogram[0, 0] = 5, 2
    arrays = {
        "top": top,
        "top_span": span,
        "deciles": deciles,
        "decile_edges": np.tile(np.linspace(0, 1, 11, dtype=np.float32), (N, 1)),
        "hard": hard,
        "inactive": inactive,
        "tokens": tokens,
        "token_error": np.array([1, 0, 0], np.uint32),
        "token_counts": np.arange(50, dtype=np.uint32) * 10,
        "histogram": histogram,
        "histogram_top": np.array([4, -32768, 0], np.int16),
        "logit_ids": np.arange(N * 4).reshape(N, 2, 2),
        "logit_values": np.ones((N, 2, 2), np.float32),
    }
    write_store(tmp_path / "run", meta, columns, arrays)
    return tmp_path / "run"


def test_what_was_written_is_read(folder):
    store = FeatureStore(folder)
    assert len(store) == N and store.meta.seed == 7 and store.meta.provenance == {"sae": "abc"}
    assert store.alive.tolist() == [True, False, True]
    assert set(store.columns) == {column.name for column in DISCOVERY}
    assert store.columns["n_active"].dtype == np.int64
    assert store.columns["top_token"].dtype == np.int32
    assert [store.n_examples(i) for i in range(N)] == [2, 0, 1]
    tenths = store.decile_examples(0)
    assert tenths[0] == [Occurrence(1, 2, 0.5)]
    assert tenths[9] == [Occurrence(3, 4, 8.0), Occurrence(5, 6, 7.5)]
    assert tenths[1:9] == [[]] * 8 and store.decile_examples(1) == [[]] * 10
    assert store.inactive_windows(0) == [8, 9] and store.inactive_windows(1) == []
    assert store.hard_negatives(2) == [(6, 3)] and store.hard_negatives(0) == []
    assert store.token_counts(0) == [TokenCount(4, 12, 40, 1), TokenCount(2, 3, 20, 1)]
    assert store.token_counts(1) == []
    assert store.promoted(1) == [(4, 1.0), (5, 1.0)] and store.suppressed(1)[0] == (6, 1.0)
    histogram = store.histogram(0)
    assert histogram.edges[-2] == 2.0 and histogram.edges[-1] == pytest.approx(2 * 2**0.25)
    assert histogram.counts[63] == 5 and histogram.counts[0] == 2
    assert store.histogram(1).counts.sum() == 0


def test_examples_are_cut_at_the_windows_ends(folder):
    first, second = FeatureStore(folder).examples(0, Text())
    assert (first.window, first.position, first.activation, first.peak) == (7, 1, 8.0, 1)
    assert first.ids.tolist() == [700, 701, 702, 703]
    assert first.activations.tolist() == [0, 8, 4, 2]
    assert second.ids.tolist() == [307, 308, 309] and second.peak == 2
    assert second.activations.tolist() == [0, 0, 4]
    (third,) = FeatureStore(folder).examples(2, Text())
    assert third.activations.tolist() == [0, 0.25, 0.5, 0, 1]
    assert len(FeatureStore(folder).examples(0, Text(), limit=1)) == 1
    assert FeatureStore(folder).examples(1, Text()) == []


def test_analyses_add_their_columns_and_arrays(folder):
    add_columns(folder, {"logit_std": np.array([1, 2, 3])})
    add_arrays(folder, {"neighbours": np.ones((N, 5))})
    store = FeatureStore(folder)
    assert store.columns["logit_std"].tolist() == [1, 2, 3]
    assert store.columns["logit_std"].dtype == np.float32
    assert store.array("neighbours").shape == (N, 5)
    add_columns(folder, {"logit_std": np.array([4, 5, 6])})
    assert FeatureStore(folder).columns["logit_std"].tolist() == [4, 5, 6]
    with pytest.raises(KeyError):
        add_columns(folder, {"made_up": np.ones(N)})
    assert not list(folder.rglob("*.part"))


def test_a_discovery_of_the_first_format_opens(tmp_path):
    values = np.array([[2.0, 1.0], [0.0, 0.0]], np.float32)
    arrays = {name: np.ones(2, np.float32) for name in EARLIER_COLUMNS} | {
        "top_value": values,
        "top_window": np.array([[5, 6], [0, 0]], np.uint32),
        "top_position": np.array([[3, 4], [0, 0]], np.uint16),
        "top_span": np.tile(np.array([0.5, 2.0, 0.25], np.float16), (2, 2, 1)),
        "logit_ids": np.arange(8).reshape(2, 2, 2),
        "logit_values": np.zeros((2, 2, 2), np.float32),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    meta = FeatureMeta(2, 10, 2, CONTEXT, "train", 2, 1, "blocks.0.hook_resid_post")
    first = {f.name: getattr(meta, f.name) for f in fields(meta)[:9]}
    (tmp_path / "meta.json").write_text(json.dumps(first))
    store = FeatureStore(tmp_path)
    assert store.meta == meta and set(store.columns) == set(EARLIER_COLUMNS)
    example = store.examples(0, Text())[0]
    assert (example.window, example.position, example.activation) == (5, 3, 2.0)
    assert example.activations.tolist() == [0.5, 2.0, 0.25]  # as they were, not shares
    assert store.n_examples(1) == 0 and store.promoted(0) == [(0, 0.0), (1, 0.0)]
    for read in (
        lambda: store.deciles,
        lambda: store.histogram(0),
        lambda: store.hard_negatives(0),
        lambda: store.token_counts(0),
    ):
        with pytest.raises(Incompatible, match="again"):
            read()


@pytest.mark.parametrize("name", ["run.json", "top.npy", "columns/n_active.npy", "deciles.npy"])
@pytest.mark.parametrize("how", ["missing", "cut short", "something else"])
def test_damage_is_told(folder, name, how):
    path = folder / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if how == "cut short" else b"[1, 2]")
    with pytest.raises(CorruptFile, match="again"):
        _ = FeatureStore(folder).deciles


def test_a_newer_format_is_refused_and_new_fields_are_not(folder):
    path = folder / "run.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"of_a_newer_version": 1}))
    assert FeatureStore(folder).meta.seed == 7
    path.write_text(json.dumps(meta | {"format": FORMAT + 1}))
    with pytest.raises(Incompatible, match="newer version"):
        FeatureStore(folder)


def test_nothing_is_unpickled(folder):
    array = np.array([{"a": 1}] * N, object)
    np.save(folder / "evil.npy", array, allow_pickle=True)
    with pytest.raises(CorruptFile):
        FeatureStore(folder).array("evil")


def test_a_folder_whose_writing_was_broken_off_is_not_whole(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "run.json").unlink()
    with pytest.raises(CorruptFile):
        FeatureStore(tmp_path / "half")


def test_every_statistic_is_described():
    assert len(TABLE) >= 25 and len(BY_NAME) == len(TABLE)
    assert TABLE == DISCOVERY + ANALYSES + SCORES
    counts = {f.name for f in fields(FeatureMeta)} | set(BY_NAME) | {""}
    for column in TABLE:
        assert column.label[0] == column.label[0].upper() and len(column.label) <= 24, column
        assert column.definition.endswith(".") and len(column.definition) > 30, column
        assert column.sample in counts, column
        assert column.better in ("", "higher", "lower")
        kind = np.dtype(column.dtype).kind
        assert kind in "iuf"
        assert column.none is None or kind in "iu"
    assert {name for name in EARLIER_COLUMNS if name not in BY_NAME} == set()
