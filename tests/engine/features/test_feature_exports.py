"""What is exported is what was found, in the shapes that others read, whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from planted_store import POINT, PlantedPassage

from mistudio.engine.features.exports import neuronpedia_a, neuronpedia_b, page, tables, writing
from mistudio.engine.features.exports.material import (
    Label,
    Material,
    Origin,
    OtherScore,
    Said,
)
from mistudio.engine.features.exports.neuronpedia_a import Naming, linear_bins
from mistudio.engine.features.exports.neuronpedia_b import Release
from mistudio.engine.features.exports.texts import TokenTexts
from mistudio.engine.features.exports.whole import GatheredWindows, Wanted
from mistudio.engine.features.store import Histogram
from mistudio.engine.progress import SILENT, Interrupted
from mistudio.errors import InvalidInput

sys.path.append(str(Path(__file__).resolve().parents[2] / "jobs"))
from json_schema import problems

SCHEMAS = Path(tables.__file__).parent / "schemas"
HOSTILE = '</title><script>alert("1")</script>\u202e&amp;\0'
SAID = {
    0: Said(
        label='=HYPERLINK("x")',
        note=HOSTILE,
        starred=True,
        lists=("a, b",),
        labels=(Label("a label", "human"), Label(HOSTILE, "model", "m")),
        scores=(OtherScore("human", 0.9, 0.7, 0.99, 8, 2),),
    )
}


def schema(name):
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def material(planted_run, tokens, tiny_tokenizer):
    store = planted_run[0]
    return Material(
        store,
        tokens.train,
        TokenTexts(tiny_tokenizer),
        Origin("org/tiny", "planted", 2, POINT.name, "text", version="1"),
        np.arange(9),  # never firing 4, rare 5, 6 to 8 at random
        SAID,
        describe=lambda features: [f"rule of {feature}" for feature in features],
        directions=lambda features: np.eye(128, dtype=np.float32)[features],
    )


@pytest.fixture(scope="module")
def whole(planted_run, tokens, material, tmp_path_factory):
    """With the activations of whole windows."""
    store, x = planted_run[0], planted_run[1]
    wide = np.zeros((*x.shape[:2], 128))
    wide[..., : x.shape[2]] = x
    passage = PlantedPassage(tokens.train, wide)
    import torch

    from mistudio.engine.sae.activation import JumpReLU
    from mistudio.engine.sae.dictionary import Dictionary

    w, zeros = torch.eye(128)[:66], torch.zeros(66)
    dictionary = Dictionary(w, zeros, w, torch.zeros(128), JumpReLU(zeros))
    features = np.arange(6)
    held = GatheredWindows(tmp_path_factory.mktemp("whole"), features, store.meta.context)
    held.gather(passage, POINT, dictionary, Wanted(store, features, 5))
    return dataclasses.replace(material, features=features, whole=held)


# --- what is read ---------------------------------------------------------------------------------


def test_whole_windows_hold_every_activation_of_their_examples(whole, planted_run):
    x = planted_run[1]
    groups = set()
    for feature in whole:
        for context in feature.contexts:
            want = x[context.window, :, feature.index]
            assert np.allclose(context.values, want, rtol=1e-6)
            assert context.values[context.peak] == pytest.approx(context.activation)
            groups.add(context.group)
            if context.group == "decile":
                low, high = feature.decile_edges[context.decile : context.decile + 2]
                assert low <= context.activation * (1 + 1e-6)
                assert context.activation <= high * (1 + 1e-6)
        assert bool(feature.contexts) == feature.alive
    assert groups == {"top", "decile"}


def test_only_what_is_wanted_is_gathered(planted_run):
    wanted = Wanted(planted_run[0], np.arange(6), 5)
    feature, window = wanted.keys >> 32, wanted.keys & 0xFFFFFFFF
    assert wanted.among(feature, window).all()
    others = np.setdiff1d(wanted.keys + 1, wanted.keys)
    assert not wanted.among(others >> 32, others & 0xFFFFFFFF).any()


def test_stored_examples_hold_their_own_activations(material, planted_run, tokens):
    x = planted_run[1]
    for feature in dataclasses.replace(material, features=np.arange(6)):
        for context in feature.contexts:
            text = tokens.train.windows([context.window], 64)[0].tolist()
            first = context.position - context.peak
            radius = material.store.meta.radius
            assert first == max(0, context.position - radius)
            assert list(context.ids) == text[first : context.position + radius + 1]
            values = x[context.window, first : first + len(context.ids), feature.index]
            if context.known:
                assert np.allclose(context.values, values, rtol=2e-3)
            else:
                assert np.flatnonzero(context.values).tolist() == [context.peak]


def test_tokens_join_to_the_text_whatever_they_cut(tiny_tokenizer):
    text = "naïve 日本 🙂 — слово"
    ids = tiny_tokenizer(text).input_ids
    texts = TokenTexts(tiny_tokenizer)
    pieces = texts.of(ids)
    assert len(pieces) == len(ids) > len(text) - 8
    assert "".join(pieces) == text
    smile = pieces.index("🙂") if "🙂" in pieces else pieces.index(" 🙂")
    assert pieces[smile + 1] == ""
    cut = texts.of(ids[: smile + 2])  # in the middle of a character
    assert "".join(cut).startswith("naïve 日本 ") and "<0xF0>" in "".join(cut)


def test_linear_bins_keep_every_activation():
    edges = 2.0 ** (np.arange(-60, 5) / 4)
    counts = np.zeros(64, np.int64)
    counts[[3, 40, 41, 62]] = 5, 100, 7, 1
    centres, found = linear_bins(Histogram(edges, counts), 1e-3, 1.9)
    assert sum(found) == counts.sum() and len(found) == len(centres) == 50
    assert found[-1] >= 1 and found[0] >= 1 and min(found) >= 0
    # All in one bin; known besides: nine tenths of them lie below 1.25.
    counts = np.zeros(64, np.int64)
    counts[61] = 100
    centres, found = linear_bins(Histogram(edges, counts), 1.2, 1.41, [(1.25, 0.9)])
    assert sum(found) == 100 and abs(sum(found[: np.searchsorted(centres, 1.25)]) - 90) <= 2
    assert linear_bins(Histogram(edges, 0 * counts), float("nan"), float("nan"))[1] == []


# --- tables ---------------------------------------------------------------------------------------


def test_csv_has_every_statistic_of_every_feature(material, tmp_path):
    tables.write_csv(material, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["feature"]) for row in rows] == material.features.tolist()
    for name, column in material.store.columns.items():
        for row, value in zip(rows, column[material.features], strict=True):
            if name == "band":
                continue
            if row[name] == "":
                assert np.isnan(value) or value == -1, name
            else:
                assert float(row[name]) == pytest.approx(float(value), rel=1e-6), name
    first = rows[0]
    assert first["label"] == '\'=HYPERLINK("x")', "a spreadsheet would have run it"
    assert first["note"] == HOSTILE and first["starred"] == "true"
    assert json.loads(first["lists"]) == ["a, b"]
    assert float(first["human_accuracy"]) == 0.9 and first["human_contexts"] == "10"
    counts = material.store.token_counts(0)
    assert json.loads(first["top_token_counts"]) == [entry.count for entry in counts]


def test_parquet_has_the_same_as_numbers_and_lists(material, tmp_path):
    tables.write_parquet(material, tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    rows = found.to_pylist()
    assert len(rows) == len(material)
    for name, every in material.store.columns.items():
        column = np.asarray(every)[material.features]
        if name != "band":
            values = np.array([np.nan if r[name] is None else r[name] for r in rows], float)
            want = np.where(column == -1, np.nan, column.astype(float))
            if column.dtype.kind == "f":
                want = column.astype(float)
            assert np.allclose(values, want, equal_nan=True), name
    assert rows[0]["labels"] == ["a label", HOSTILE]
    assert rows[0]["promoted"][0] == material.texts[material.store.promoted(0)[0][0]]
    assert b"above 0" in found.schema.field("n_active").metadata[b"definition"]
    assert json.loads(found.schema.metadata[b"mistudio"])["tokens"] == material.store.meta.tokens


def test_json_fits_its_schema_and_holds_the_examples(material, whole, tmp_path):
    for number, chosen in enumerate((material, whole)):
        path = tmp_path / f"{number}.json"
        tables.write_json(chosen, path)
        found = json.loads(path.read_text(encoding="utf-8"))
        assert problems(found, schema("features")) == []
        for row, feature in zip(found["features"], chosen, strict=True):
            assert row["description"] == f"rule of {feature.index}"
            for example, context in zip(row["examples"], feature.contexts, strict=True):
                assert len(example["ids"]) == len(example["tokens"])
                if context.known:
                    assert len(example["values"]) == len(example["tokens"])
                    assert np.allclose(example["values"], context.values, atol=1e-5)
                else:
                    assert example["values"] is None


# --- Neuronpedia ----------------------------------------------------------------------------------


def batches(folder):
    paths = sorted(folder.glob("batch-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def check_lengths(feature):
    for name in ("neg", "pos"):
        assert len(feature[f"{name}_str"]) == len(feature[f"{name}_values"]) == 10
    for name in ("freq", "logits"):
        bars = f"{name}_hist_data_bar"
        assert len(feature[f"{bars}_heights"]) == len(feature[f"{bars}_values"]) == 50


def test_batch_files_fit_saedashboards_shapes(material, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia_a, "BATCH", 4)
    for number, chosen in enumerate((material, whole)):
        target = neuronpedia_a.write(chosen, tmp_path / str(number), Naming("res", vectors=True))
        assert target.name == f"org-tiny_res_{POINT.name}_66"
        found = batches(target)
        features = [feature for batch in found for feature in batch["features"]]
        alive = [int(f) for f in chosen.features if chosen.store.columns["n_active"][f]]
        assert [feature["feature_index"] for feature in features] == alive
        skipped = json.loads((target / "skipped_indexes.json").read_text())["skipped_indexes"]
        assert sorted(alive + skipped) == chosen.features.tolist() and skipped
        assert len(found) == -(-len(alive) // 4)
        for batch in found:
            assert problems(batch, schema("neuronpedia_a")) == []
        for row in features:
            check_lengths(row)
            index = row["feature_index"]
            n = int(chosen.store.columns["n_active"][index])
            assert sum(row["freq_hist_data_bar_heights"]) == n
            assert row["frac_nonzero"] == n / chosen.store.meta.tokens
            assert row["neuron_alignment_indices"][0] == index  # its decoder row is that channel
            for example in row["activations"]:
                assert len(example["tokens"]) == len(example["values"])
                place = example["qualifying_token_index"]
                assert example["values"][place] > 0
                assert all(round(value, 5) == value for value in example["values"])
            assert max(max(e["values"]) for e in row["activations"]) == pytest.approx(
                chosen.store.columns["max_activation"][index], abs=1e-5
            )
            kinds = {example["bin_min"] == -1 for example in row["activations"]}
            assert kinds == ({True} if chosen is material else {True, False})
    assert {len(e["tokens"]) for f in features for e in f["activations"]} == {63}, "no position 0"


def lines(path):
    held = path.read_bytes()
    held = gzip.decompress(held) if path.suffix == ".gz" else held
    return [json.loads(line) for line in held.decode().splitlines()]


def test_the_import_directory_fits_neuronpedias_tables(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia_b, "BATCH", 4)
    release = Release("rel", "A release", "me")
    target = neuronpedia_b.write(whole, tmp_path, Naming("res", "k8", True), release)
    assert target.relative_to(tmp_path).as_posix() == "org-tiny/2-res__k8"
    shapes = schema("neuronpedia_b")["properties"]
    for name in ("release", "model", "sourceset", "source"):
        (row,) = lines(target / f"{name}.jsonl")
        assert problems(row, shapes[name]) == [], name
    features, activations = [], []
    for kind, into in (("features", features), ("activations", activations)):
        for path in sorted((target / kind).iterdir()):
            assert re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name)
            rows = lines(path)
            assert len({tuple(row) for row in rows}) <= 1, "columns are those of the first line"
            assert kind == "activations" or len(rows) <= 4
            into += rows
    assert [row["index"] for row in features] == [str(i) for i in whole.features]
    for row in features:
        assert problems(row, shapes["feature"]) == []
        assert row["hasVector"] and len(row["vector"]) == 128
    for row in activations:
        assert problems(row, shapes["activation"]) == []
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])
    assert len({row["id"] for row in activations}) == len(activations)
    of = {row["index"]: row["maxActApprox"] for row in features}
    strongest = {row["index"]: row["maxValue"] for row in reversed(activations)}
    assert all(of[index] >= value for index, value in strongest.items())


def test_the_same_import_directory_has_the_same_bytes(whole, tmp_path):
    from datetime import datetime

    release = Release("rel", created=datetime(2026, 1, 2))
    some = dataclasses.replace(whole, features=whole.features[:3])
    one, two = (neuronpedia_b.write(some, tmp_path / name, Naming("res"), release) for name in "ab")
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files) and files
    times = {(one / f).read_bytes()[4:8] for f in files if f.suffix == ".gz"}
    assert times == {bytes(4)}, "a gzip file would hold the second at which it was written"


def test_no_nul_reaches_a_database(material, tmp_path, monkeypatch):
    monkeypatch.setattr(material.texts, "of", lambda ids: ["a\0b\ud800"] * len(ids))
    some = dataclasses.replace(material, features=material.features[:1])
    target = neuronpedia_a.write(some, tmp_path, Naming("res"))
    (batch,) = batches(target)
    tokens = batch["features"][0]["activations"][0]["tokens"]
    assert set(tokens) == {"a b?"}


# --- the page -------------------------------------------------------------------------------------


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.outside = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "style") or name.startswith("on"):
                self.outside.append((tag, name, value))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_hostile_texts_as_texts(material, tmp_path, monkeypatch):
    monkeypatch.setattr(material.texts, "of", lambda ids: ["<script>x()</script>\ud800"] * len(ids))
    some = dataclasses.replace(material, features=material.features[:1])
    page.write_page(some, tmp_path / "a.html", HOSTILE, "today")
    seen = Seen()
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    seen.feed(written)
    assert "script" not in seen.tags and "alert" in seen.text and "x()" in seen.text
    assert (
        "<U+D800>" in seen.text
        and "\u202e" not in written
        and "<U+202E>" in seen.text
        and "\0" not in written
    )
    assert {(tag, name) for tag, name, _ in seen.outside} == {("a", "href")}
    assert all(value.startswith("#f") for _, _, value in seen.outside)
    assert "default-src 'none'" in page.POLICY and "unsafe" not in page.POLICY
    assert page.STYLE in written


def test_the_page_tells_what_was_found(material, tmp_path):
    page.write_page(material, tmp_path / "a.html", "Planted", "today")
    seen = Seen()
    seen.feed((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert seen.tags.count("section") == len(material) + 1
    assert seen.tags.count("svg") >= 2 * 8
    top = material.store.top["value"][0, 0]
    assert f"{top:.3g}" in seen.text
    assert "It fired on none of the" in seen.text
    assert "0.90" in seen.text and "0.70 to 0.99" in seen.text  # the human's score


# --- whole or not at all --------------------------------------------------------------------------


def test_what_is_there_stays(tmp_path):
    (tmp_path / "a.csv").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for name, folder in (("a.csv", False), ("full", True)):
        with (
            pytest.raises(InvalidInput, match="never overwrites"),
            writing.appearing(tmp_path / name, folder),
        ):
            pass
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "full" / "x").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with writing.appearing(tmp_path / "empty", folder=True) as place:
        (place / "y").write_text("new")
    assert (tmp_path / "empty" / "y").exists()


class Stopping:
    """Interrupts after a few features."""

    def __init__(self, after):
        self.left = after

    def __getattr__(self, name):
        return getattr(SILENT, name)

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise Interrupted


@pytest.mark.parametrize("folder", [True, False])
def test_an_interrupted_export_leaves_nothing(whole, tmp_path, folder):
    with pytest.raises(Interrupted), writing.appearing(tmp_path / "x", folder) as place:
        if folder:
            neuronpedia_b.write(whole, place, Naming("res"), Release("r"), Stopping(2))
        else:
            tables.write_json(whole, place, Stopping(2))
    assert list(tmp_path.iterdir()) == []
