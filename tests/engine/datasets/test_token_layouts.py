"""Every way to lay documents out in windows holds what it says, and goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistudio.engine.activations.positions import countable
from mistudio.engine.datasets import encoding, token_writer
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.token_settings import (
    HELP,
    LABELS,
    PADDINGS,
    TRUNCATIONS,
    TokenSettings,
)
from mistudio.engine.datasets.token_writer import count_tokens, write_token_store
from mistudio.engine.datasets.tokens import TokenSplit, TokenStore
from mistudio.engine.progress import Cancelled, Interrupted
from mistudio.errors import InvalidInput

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
PAD, SEPARATOR = 188, 0  # the byte 0xff, which no text in UTF-8 has


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Short and long ones; some have no token, some one."""
    with SAMPLE.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 60)]
    odd = ["", "a", "the cat", *(text[:40] for text in texts[:10]), " ".join(texts[:5])]
    return [Document(text) for text in [*texts, *odd]]


def write(
    documents: Any, tokenizer: Any, folder: Path, settings: TokenSettings, **options: Any
) -> TokenStore:
    options = {"bos_id": None, "separator_id": SEPARATOR, "pad_id": PAD, **options}
    write_token_store(
        documents,
        tokenizer,
        folder,
        special_ids=[SEPARATOR],
        tokenizer_hash="h",
        settings=settings,
        **options,
    )
    return TokenStore(folder)


def ids_of(tokenizer: Any, documents: list[Document], settings: TokenSettings) -> list[list[int]]:
    """(training) documents' ids, cut as told, by the tokenizer itself."""
    options: dict[str, Any] = {"add_special_tokens": False}
    if settings.truncates:
        options |= {"truncation": True, "max_length": settings.max_length}
    return [list(tokenizer(document.text, **options)["input_ids"]) for document in documents]


def expected_windows(
    lists: list[list[int]], context: int, pad: bool, bos: int | None
) -> tuple[list[list[int]], list[int]]:
    """The windows of documents by themselves, written down a second time; and whose they are."""
    windows, whose = [], []
    stride = context - (bos is not None)
    for number, ids in enumerate(lists):
        for start in range(0, len(ids), stride):
            part = ids[start : start + stride]
            if len(part) < stride and not pad:
                continue
            front = [] if bos is None else [bos]
            windows.append([*front, *part, *([PAD] * (stride - len(part)))])
            whose.append(number)
    return windows, whose


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("truncation", ["longest_first", "only_second"])
@pytest.mark.parametrize("padding", ["max_length", "longest", "none"])
@pytest.mark.parametrize("context", [32, 20])
def test_windows_of_single_documents(
    documents: list[Document],
    tiny_tokenizer: Any,
    tmp_path: Path,
    padding: str,
    truncation: str,
    bos: int | None,
    context: int,
) -> None:
    settings = TokenSettings(32, padding, truncation, add_special_tokens=False, heldout_share=0.0)
    split = write(documents, tiny_tokenizer, tmp_path, settings, bos_id=bos).train
    lists = ids_of(tiny_tokenizer, documents, settings)
    windows, whose = expected_windows(lists, context, padding != "none", bos)
    assert split.n_windows(context) == len(windows)
    found = split.windows(np.arange(len(windows)), context)
    assert found.tolist() == windows
    chosen = [len(windows) - 1, 0, 3]
    assert torch.equal(split.windows(chosen, context), found[chosen])
    assert [split.document_at(w, 1, context) for w in range(len(windows))] == whose
    mask = split.attention_mask(np.arange(len(windows)), context)
    assert torch.equal(mask, found != PAD)
    # Padding never counts: it is one of the special ids, whatever they were before.
    counted = countable(found, split.meta.special_ids)
    assert not (counted & (found == PAD)).any()


def test_a_batch_is_as_wide_as_its_longest_document(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = TokenSettings(64, "longest", add_special_tokens=False, heldout_share=0.0)
    split = write(documents, tiny_tokenizer, tmp_path, settings).train
    lists = ids_of(tiny_tokenizer, documents, settings)
    short = [i for i, ids in enumerate([ids for ids in lists if ids]) if len(ids) < 12]
    assert len(short) > 1
    batch = split.batch(short, 64)
    whole = split.windows(short, 64)
    width = batch.shape[1]
    assert width == max(len(ids) for ids in lists if ids and len(ids) < 12)
    assert torch.equal(batch, whole[:, :width])
    assert (whole[:, width:] == PAD).all()
    fixed = TokenSettings(64, "max_length", add_special_tokens=False, heldout_share=0.0)
    assert (
        write(documents, tiny_tokenizer, tmp_path / "m", fixed).train.batch(short, 64).shape[1]
        == 64
    )


def test_packing_ignores_the_length_and_cuts_nothing_off(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    short = write(documents, tiny_tokenizer, tmp_path / "a", TokenSettings(max_length=4))
    long = write(documents, tiny_tokenizer, tmp_path / "b", TokenSettings())
    for name in ("train.ids", "heldout.ids", "train.starts.npy", "train.documents.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert short.train.attention_mask([0, 1], 16).all()
    assert long.meta.settings == {"heldout_share": 0.1}


def test_a_store_of_an_earlier_version_is_read_as_packed(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    store = write(documents, tiny_tokenizer, tmp_path, TokenSettings())
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    del meta["pad_id"], meta["settings"]
    path.write_text(json.dumps(meta))
    old = TokenStore(tmp_path)
    n = store.train.n_windows(16)
    assert torch.equal(old.train.windows(range(n), 16), store.train.windows(range(n), 16))


# --- refusals -------------------------------------------------------------------------------------


def test_a_context_longer_than_the_cut_is_refused(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    split = write(documents, tiny_tokenizer, tmp_path, TokenSettings(32, "max_length")).train
    split.require_windows(32, 1, "Training")
    with pytest.raises(InvalidInput, match="cut off at 32 when they were tokenised"):
        split.require_windows(33, 1, "Training")


def test_too_few_whole_windows_are_refused_with_the_reason(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    split = write(documents, tiny_tokenizer, tmp_path, TokenSettings(400, "none")).train
    with pytest.raises(InvalidInput, match="Only documents that fill a whole window are used"):
        split.require_windows(400, 50, "Training")


def test_padded_documents_of_one_token_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    settings = TokenSettings(8, "max_length", add_special_tokens=False, heldout_share=0.0)
    split = write([Document("a")] * 20, tiny_tokenizer, tmp_path, settings).train
    with pytest.raises(InvalidInput, match="have one token each"):
        split.require_windows(8, 4, "Training")


def test_masks_that_were_not_asked_for_are_refused(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = TokenSettings(16, "max_length", attention_mask=False)
    split = write(documents, tiny_tokenizer, tmp_path, settings).train
    with pytest.raises(InvalidInput, match="no attention masks"):
        split.attention_mask([0], 16)


def test_documents_without_any_token_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Not one document has a token"):
        write([Document("")], tiny_tokenizer, tmp_path, TokenSettings())


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"padding": "left"}, "padding"),
        ({"truncation": "yes"}, "truncation"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 1 << 20}, "max_length"),
        ({"max_length": 2.5}, "max_length"),
        ({"heldout_share": 1.5}, "heldout_share"),
        ({"stride": 3}, "stride"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        TokenSettings.from_dict(values)
    assert refusal.value.field == field


# --- what a dialog needs --------------------------------------------------------------------------


def test_settings_are_found_again_by_what_makes_a_difference() -> None:
    """A change of a field that is said to be in effect changes the key, of another it does not."""
    others = {
        "max_length": 100,
        "truncation": "do_not_truncate",
        "add_special_tokens": False,
        "attention_mask": False,
        "heldout_share": 0.2,
    }
    for padding in PADDINGS:
        settings = TokenSettings(padding=padding)
        for name, value in others.items():
            changed = TokenSettings.from_dict({"padding": padding, name: value})
            assert (changed.key() != settings.key()) == (name in settings.in_effect()), (
                padding,
                name,
            )
        again = TokenSettings.from_dict(settings.key())
        assert again.key() == settings.key()
    assert TokenSettings().key() == {"heldout_share": 0.1}  # as earlier versions wrote it


def test_every_choice_has_its_words() -> None:
    assert set(LABELS["padding"]) == set(PADDINGS)
    assert set(LABELS["truncation"]) == set(TRUNCATIONS)
    for field in TokenSettings.__dataclass_fields__:
        assert HELP[field]
    for name in PADDINGS:
        assert HELP[f"padding.{name}"]
        assert TokenSettings(padding=name).describe()
    for name in TRUNCATIONS:
        assert HELP[f"truncation.{name}"]


# --- counting -------------------------------------------------------------------------------------


def test_token_counts_equal_a_plain_recount(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    store = write(documents, tiny_tokenizer, tmp_path, TokenSettings())
    counts: dict[int, int] = {}
    for ids in ids_of(tiny_tokenizer, documents, TokenSettings()):
        for i in ids:
            counts[i] = counts.get(i, 0) + 1
    found = store.meta.statistics
    ranked = sorted(counts.values(), reverse=True)
    assert found["vocabulary"] == len(tiny_tokenizer)
    special = {SEPARATOR}
    ordinary = [i for i in range(len(tiny_tokenizer)) if i not in special]
    assert found["coverage"] == sum(i in counts for i in ordinary) / len(ordinary)
    assert found["once"] == sum(n == 1 for n in counts.values())
    assert found["zipf"][0] == [1, ranked[0]]
    assert found["zipf"][-1] == [len(ranked), ranked[-1]]
    assert all(ranked[rank - 1] == n for rank, n in found["zipf"])
    assert found["empty_documents"] == 1
    half = found["half_of_text"]
    assert sum(ranked[: half - 1]) < sum(ranked) / 2 <= sum(ranked[:half])
    assert {i: n for i, n in enumerate(count_tokens(store).tolist()) if n} == counts


# --- stopping and going on ------------------------------------------------------------------------


class Stopper:
    """Raises at the nth check, and keeps what is reported."""

    def __init__(self, at: int = 0, error: type[Exception] = Interrupted) -> None:
        self._left, self._error = at, error
        self.notes: list[str] = []
        self.reports: list[tuple[float, float | None]] = []

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: Any
    ) -> None:
        self.reports.append((done, total))
        if "note" in metrics:
            self.notes.append(metrics["note"])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 4)


class Stream:
    """Documents of unknown number, as a link has them."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        yield from self._documents


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("settings", [TokenSettings(), TokenSettings(32, "longest")])
def test_an_interrupted_tokenisation_goes_on_to_the_same_store(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path, settings: TokenSettings
) -> None:
    write(Stream(documents), tiny_tokenizer, tmp_path / "whole", settings)
    folder = tmp_path / "parts"
    for at in (40, 60):
        with pytest.raises(Interrupted):
            write(Stream(documents), tiny_tokenizer, folder, settings, progress=Stopper(at))
    last = Stopper()
    write(Stream(documents), tiny_tokenizer, folder, settings, progress=last)
    assert any(note.startswith("Going on after") for note in last.notes)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("change", ["text", "settings", "fewer", "damage", "shorter file"])
def test_what_does_not_fit_is_begun_anew(
    documents: list[Document], tiny_tokenizer: Any, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        write(Stream(documents), tiny_tokenizer, folder, TokenSettings(), progress=Stopper(60))
    settings, now = TokenSettings(), list(documents)
    if change == "text":
        now[2] = Document("another text")
    elif change == "fewer":
        now = now[:5]
    elif change == "settings":
        settings = TokenSettings(add_special_tokens=False)
    elif change == "damage":
        (folder / "resume.npz").write_bytes(b"PK\x03\x04 not whole")
    else:
        os.truncate(folder / "train.ids", 10)
    watch = Stopper()
    write(Stream(now), tiny_tokenizer, folder, settings, progress=watch)
    write(Stream(now), tiny_tokenizer, tmp_path / "whole", settings)
    assert contents(folder) == contents(tmp_path / "whole")
    said = "The documents have changed: their tokenisation begins anew."
    assert (said in watch.notes) == (change in ("text", "fewer"))


KILLED = """
import sys, os, signal, json
from itertools import islice
from pathlib import Path
from mistudio.engine.datasets import encoding, token_writer
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.models.loading import load_tokenizer
encoding.BATCH_DOCUMENTS, token_writer.FLUSH_SECONDS = 4, 0
sample, tokenizer, folder = map(Path, sys.argv[1:])

def documents():
    with sample.open(encoding="utf-8") as lines:
        for i, line in enumerate(islice(lines, 60)):
            if i == 50:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Document(json.loads(line)["text"])

token_writer.write_token_store(
    documents(), load_tokenizer(tokenizer), folder, bos_id=None, separator_id=0,
    special_ids=[0], tokenizer_hash="h", settings=TokenSettings(), pad_id=188)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_tokenisation_goes_on_from_its_last_flush(
    documents: list[Document], tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(SAMPLE), str(tiny_folder), str(tmp_path / "parts")],
        cwd=ROOT,
        capture_output=True,
    )
    assert child.returncode == -9, child.stderr
    for name in ("train.ids", "train.starts.npy", "heldout.documents.npy"):
        with (tmp_path / "parts" / name).open("ab") as file:
            file.write(b"written after the last flush")
    watch = Stopper()
    write(documents[:60], tiny_tokenizer, tmp_path / "parts", TokenSettings(), progress=watch)
    assert int(watch.notes[0].split()[3]) >= 20  # documents; a few batches may be on their way
    write(documents[:60], tiny_tokenizer, tmp_path / "whole", TokenSettings())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_stop_does_not_wait_for_the_text_that_is_being_encoded(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The encoding of the first batch never ends by itself; the stop is heard all the same."""
    gate = threading.Event()

    class Slow(encoding.Encoder):
        def encode(self, documents: list[Document]) -> encoding.Encoded:
            gate.wait()
            return super().encode(documents)

    class Stop(Stopper):
        def check(self) -> None:
            if time.monotonic() > began + 0.2:
                raise Cancelled

    began = time.monotonic()
    slow = Slow(tiny_tokenizer, TokenSettings())
    try:
        with pytest.raises(Cancelled):
            list(encoding.encode_all([Document("text")], slow, Stop()))
    finally:
        gate.set()


def test_progress_is_in_bytes_of_the_stored_documents(
    tiny_tokenizer: Any, tmp_path: Path, documents: list[Document]
) -> None:
    from mistudio.engine.datasets.documents import Documents, write_documents

    write_documents(documents, tmp_path / "documents")
    stored = Documents(tmp_path / "documents")
    watch = Stopper()
    write(stored, tiny_tokenizer, tmp_path / "t", TokenSettings(), progress=watch)
    assert watch.reports[-1] == (stored.bytes, stored.bytes)
    assert [done for done, _ in watch.reports] == sorted(done for done, _ in watch.reports)


def test_the_index_of_documents_is_appended_not_kept(tmp_path: Path) -> None:
    column = token_writer._Column(tmp_path / "a.npy", None)
    column.append(np.arange(5))
    column.append(np.arange(3))
    column.close()
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    column = token_writer._Column(tmp_path / "a.npy", 6)
    column.append(np.asarray([9]))
    column.close()
    assert np.load(tmp_path / "a.npy", mmap_mode="r").tolist() == [0, 1, 2, 3, 4, 0, 9]


def test_splits_of_any_layout_feed_a_model(
    documents: list[Document], tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """What training streams: rows only of positions that count, in every layout."""
    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.progress import SILENT

    point = HookPoint.parse("blocks.1.hook_resid_post")
    for padding in PADDINGS:
        settings = TokenSettings(24, padding, add_special_tokens=False, heldout_share=0.3)
        store = write(documents, tiny_tokenizer, tmp_path / padding, settings)
        source = LiveActivations(tiny, store, (point,), 24)
        rows = sum(len(batch[point]) for batch in source.heldout(64, 10**9, SILENT))
        split: TokenSplit = store.heldout
        ids = split.windows(np.arange(split.n_windows(24)), 24)
        wanted = int(countable(ids, store.meta.special_ids).sum())
        assert 0.9 * wanted <= rows <= wanted, padding  # outliers apart
