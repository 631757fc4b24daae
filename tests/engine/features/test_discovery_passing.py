"""The text that a discovery looks through: whole windows, what was asked for and no more, the same
wherever one goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistudio.engine.activations import extraction
from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.features import passing
from mistudio.engine.features.passing import LivePassage, StoredPassage, choose_windows
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT
from mistudio.errors import InvalidInput

POINTS = (HookPoint("resid_post", 0), HookPoint("resid_post", 1))
CONTEXT = 64


@pytest.fixture(scope="module")
def stored(tiny, tokens, tmp_path_factory):
    """130 windows in blocks of 16."""
    folder = tmp_path_factory.mktemp("activations")
    patch = pytest.MonkeyPatch()
    patch.setattr(extraction, "WRITE_BUFFER", 16 * CONTEXT)
    extraction.extract(tiny, tokens, POINTS, folder, max_tokens=160 * CONTEXT, context=CONTEXT)
    patch.undo()
    return StoredActivations(folder)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(passing, "SLICE", 300)


def read(passage, first=0):
    return list(passage.chunks(first, SILENT))


def places(chunks, point=POINTS[0]):
    rows = [chunk[point].rows for chunk in chunks]
    return [(int(w), int(p)) for r in rows for w, p in zip(r.windows, r.positions, strict=True)]


def check_chunks(chunks, tokens):
    """Windows ascend within a chunk, positions within a window; a window is in one chunk only."""
    seen = set()
    for chunk in chunks:
        rows = chunk[POINTS[0]].rows
        order = rows.windows * CONTEXT + rows.positions
        assert (np.diff(order) > 0).all()
        windows = set(rows.windows.tolist())
        assert not windows & seen
        seen |= windows
        text = tokens.windows(rows.windows, CONTEXT).numpy()
        assert np.array_equal(rows.tokens, text[np.arange(len(text)), rows.positions])
        assert (rows.positions > 0).all()
    return seen


def test_stored_rows_come_once_in_whole_windows(stored, tokens):
    passage = StoredPassage(stored, tokens.train, POINTS, 10**9)
    chunks = read(passage)
    assert len(chunks) == len(passage) > 20
    assert check_chunks(chunks, tokens.train) == set(passage.windows.tolist())
    table = stored.rows["train"][0 : stored.meta.tokens["train"]]
    found = places(chunks)
    want = zip(table["window"].tolist(), table["position"].tolist(), strict=True)
    assert len(found) == passage.total and set(found) == set(want)
    assert max(len(chunk[POINTS[0]].rows.windows) for chunk in chunks) <= 300


def test_stored_activations_are_those_of_the_place(stored, tiny, tokens):
    passage = StoredPassage(stored, tokens.train, POINTS, 600)
    for chunk in read(passage):
        for point in POINTS:
            rows, values = chunk[point].rows, chunk[point].activations
            ids = tokens.train.windows(rows.windows[:5], CONTEXT)
            want = tiny.capture(ids, (point,))[point][torch.arange(len(ids)), rows.positions[:5]]
            assert torch.allclose(values[:5], want, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("limit", [1, 500, 3000])
def test_a_limit_ends_with_the_window_that_reaches_it(stored, tokens, limit):
    passage = StoredPassage(stored, tokens.train, POINTS, limit)
    chunks = read(passage)
    windows = check_chunks(chunks, tokens.train)
    assert windows == set(passage.windows.tolist())
    n = len(places(chunks))
    assert limit <= n == passage.total < limit + CONTEXT
    everything = places(read(StoredPassage(stored, tokens.train, POINTS, 10**9)))
    assert sum(window in windows for window, _ in everything) == n


def test_only_the_first_documents_windows_count(stored, tokens):
    below = tokens.train.windows_within(60, CONTEXT)
    passage = StoredPassage(stored, tokens.train, POINTS, 10**9, 60)
    windows = check_chunks(read(passage), tokens.train)
    everything = StoredPassage(stored, tokens.train, POINTS, 10**9).windows
    assert windows == {w for w in everything.tolist() if w < below} and windows
    with pytest.raises(InvalidInput, match="documents"):
        StoredPassage(stored, tokens.train, POINTS, 10**9, 1)


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_going_on_gives_the_same_chunks(stored, tiny, tokens, kind):
    if kind == "stored":
        passage = StoredPassage(stored, tokens.train, POINTS, 4000)
    else:
        passage = LivePassage(tiny, tokens.train, POINTS, np.arange(40), CONTEXT, 4)
    whole, later = read(passage), read(passage, 5)
    assert len(whole) == len(passage) and len(later) == len(whole) - 5
    for first, second in zip(whole[5:], later, strict=True):
        for point in POINTS:
            assert np.array_equal(first[point].rows.windows, second[point].rows.windows)
            assert np.array_equal(first[point].rows.positions, second[point].rows.positions)
            assert torch.equal(first[point].activations, second[point].activations)


def test_a_position_counts_at_each_site_by_itself(tiny, tokens):
    """An outlier at one site is left out there, and counts at the other."""
    windows = np.arange(6)
    medians = calibrate_medians(tiny, tokens.train, POINTS, CONTEXT)
    strict = {POINTS[0]: medians[POINTS[0]] / 10.5, POINTS[1]: medians[POINTS[1]]}
    (chunk,) = read(LivePassage(tiny, tokens.train, POINTS, windows, CONTEXT, 6, strict))
    few, many = (set(places([chunk], point)) for point in POINTS)
    assert few < many and len(few) < 0.9 * len(many)
    for point in POINTS:
        alone = LivePassage(tiny, tokens.train, (point,), windows, CONTEXT, 6, strict)
        assert places(read(alone), point) == places([chunk], point)


def test_windows_are_spread_over_what_is_allowed(tokens):
    total = tokens.train.n_windows(CONTEXT)
    chosen = choose_windows(tokens.train, CONTEXT, 20 * CONTEXT)
    assert len(chosen) == 20 and chosen[0] == 0 and chosen[-1] == total - 1
    assert len(choose_windows(tokens.train, CONTEXT, 10**9)) == total
    first = choose_windows(tokens.train, CONTEXT, 10**9, 50)
    assert first.tolist() == list(range(tokens.train.windows_within(50, CONTEXT)))
    with pytest.raises(InvalidInput, match="documents") as refusal:
        choose_windows(tokens.train, 4096, 10**9, 1)
    assert refusal.value.field == "max_documents"
