"""Both sources give the same thing: counted positions only, shuffled, every row traceable."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from mistudio.engine.activations.positions import OUTLIER_MULTIPLE, countable, within_norm
from mistudio.engine.activations.source import (
    CALIBRATION_BATCH,
    CALIBRATION_WINDOWS,
    LiveActivations,
    calibrate_medians,
    token_rows,
)
from mistudio.engine.activations.store import READ_BLOCK, StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import InvalidInput

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    extract(tiny, tokens, (A, B), folder, max_tokens=10**9, context=CONTEXT, batch_windows=16)
    return folder


@pytest.fixture
def stored(folder):
    return StoredActivations(folder)


def captured_by_place(tiny, tokens, point):
    """(window, position) -> activation over the training split, straight from the model."""
    ids = tokens.train.windows(np.arange(tokens.train.n_windows(CONTEXT)), CONTEXT)
    return ids, tiny.capture(ids, [point])[point].float()


def test_stored_values_are_the_models_own(tiny, tokens, stored):
    rows = stored.rows["train"]
    for point in (A, B):
        _, whole = captured_by_place(tiny, tokens, point)
        want = whole[rows["window"].astype(int), rows["position"].astype(int)]
        got = stored._read("train", point, np.arange(len(rows)))
        scale = want.norm(dim=1).median()
        assert (got - want).norm(dim=1).max() < 2e-3 * scale  # fp16 of a unit-scaled value


def test_every_counted_position_is_there_once_and_no_other(tiny, tokens, stored):
    rows = stored.rows["train"]
    places = set(zip(rows["window"].tolist(), rows["position"].tolist(), strict=True))
    assert len(places) == len(rows)
    ids, a = captured_by_place(tiny, tokens, A)
    b = tiny.capture(ids, [B])[B].float()
    special = set(tokens.train.meta.special_ids)
    medians = calibrate_medians(tiny, tokens.train, (A, B), CONTEXT)
    expected = {
        (w, p)
        for w in range(len(ids))
        for p in range(1, CONTEXT)
        if int(ids[w, p]) not in special
        and a[w, p].norm() <= OUTLIER_MULTIPLE * medians[A]
        and b[w, p].norm() <= OUTLIER_MULTIPLE * medians[B]
    }
    assert places == expected
    assert stored.meta.dropped_special == sum(
        int(
            (
                ~countable(
                    tokens.split(s).windows(np.arange(tokens.split(s).n_windows(CONTEXT)), CONTEXT),
                    list(special),
                )
            ).sum()
        )
        for s in ("train", "heldout")
    )


def test_a_batch_mixes_many_windows(stored):
    batch = next(stored.batches(512, seed=0))
    assert batch[A].shape == (512, 128)
    assert len(batch[B]) == 512
    # Rows of one read block come from as many windows as the write buffer held.
    rows = stored.rows["train"][:READ_BLOCK]
    assert len(np.unique(rows["window"])) > READ_BLOCK // 2


def test_sites_stay_aligned(tiny, tokens, stored):
    _, a = captured_by_place(tiny, tokens, A)
    _, b = captured_by_place(tiny, tokens, B)
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    batch = next(stored.batches(64, seed=1))
    for i in range(0, 64, 7):
        nearest = (flat_a - batch[A][i]).norm(dim=1).argmin()
        other = (flat_b[nearest] - batch[B][i]).norm() / batch[B][i].norm()
        assert other < 0.01


def test_same_seed_same_batches_other_seed_others(stored):
    first = [b[A] for b in islice(stored.batches(256, seed=4), 5)]
    again = [b[A] for b in islice(stored.batches(256, seed=4), 5)]
    other = [b[A] for b in islice(stored.batches(256, seed=5), 5)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_an_epoch_gives_nearly_every_row(stored):
    n = stored.meta.tokens["train"]
    seen = torch.cat([b[A][:, 0] for b in islice(stored.batches(256, seed=0), n // 256)])
    assert len(torch.unique(seen)) > 0.9 * len(
        torch.unique(stored._read("train", A, np.arange(n))[:, 0])
    )


def test_token_rows_hold_whole_windows_in_order(stored):
    seen = set()
    total = 0
    for chunk in stored.token_rows("train", A):
        here = set(chunk.windows.tolist())
        assert not here & seen
        seen |= here
        order = np.lexsort((chunk.positions, chunk.windows))
        assert (order == np.arange(len(order))).all()
        total += len(order)
    assert total == stored.meta.tokens["train"]


def test_token_rows_of_a_model_equal_the_stored_ones(tiny, tokens, stored):
    n = tokens.train.n_windows(CONTEXT)
    medians = calibrate_medians(tiny, tokens.train, (A,), CONTEXT)
    live = list(token_rows(tiny, tokens.train, A, medians[A], np.arange(n), CONTEXT))
    windows = np.concatenate([chunk.windows for chunk in live])
    values = torch.cat([chunk.activations for chunk in live])
    disk = list(stored.token_rows("train", A))
    disk_windows = np.concatenate([chunk.windows for chunk in disk])
    disk_values = torch.cat([chunk.activations for chunk in disk])
    order = np.argsort(disk_windows, kind="stable")
    assert (disk_windows[order] == windows).all()
    assert torch.allclose(disk_values[order], values, atol=0.05)


def test_live_batches_are_real_activations_from_many_windows(tiny, tokens):
    source = LiveActivations(tiny, tokens, (A,), CONTEXT, buffer_tokens=4096)
    _, whole = captured_by_place(tiny, tokens, A)
    flat = whole.flatten(0, 1)
    batch = next(source.batches(512, seed=0))[A]
    # cdist's fast path for many rows is itself only good to a few hundredths
    distance, nearest = torch.cdist(
        batch[:100], flat, compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert float(distance.max()) < 1e-3
    windows = nearest // CONTEXT
    assert len(torch.unique(windows)) > 40
    assert int(windows.max()) > 0.8 * len(whole)  # not the text's beginning
    assert not bool((nearest % CONTEXT == 0).any())  # never position 0


def test_live_and_stored_heldout_agree(tiny, tokens, stored):
    source = LiveActivations(tiny, tokens, (A, B), CONTEXT)
    live = torch.cat([b[A] for b in source.heldout(512, 10**9)])
    disk = torch.cat([b[A] for b in stored.heldout(512, 10**9)])
    assert live.shape == disk.shape
    assert torch.allclose(live, disk, atol=0.05)
    assert len(torch.cat([b[A] for b in source.heldout(512, 700)])) == 700


def test_norm_outliers_are_left_out():
    activations = torch.ones(2, 3, 4)
    activations[1, 2] *= 30
    assert within_norm(activations, 2.0).tolist() == [[True] * 3, [True, True, False]]


def test_position_zero_and_special_tokens_never_count():
    ids = torch.tensor([[5, 6, 0, 7], [6, 5, 5, 0]])
    assert countable(ids, [0]).tolist() == [
        [False, True, False, True],
        [False, True, True, False],
    ]


def test_too_little_text_is_refused_with_numbers(tiny, tokens, tmp_path):
    with pytest.raises(InvalidInput, match="windows of 60000 tokens"):
        extract(tiny, tokens, (A,), tmp_path, max_tokens=1000, context=60000)


def test_a_limit_leaves_enough_to_judge_by(tokens):
    from mistudio.engine.activations.extraction import choose_windows

    counts = {s: tokens.split(s).n_windows(CONTEXT) for s in ("train", "heldout")}
    for limit in (1_000, 4_000, 20_000, 10**9):
        orders = choose_windows(tokens, CONTEXT, limit)
        total = sum(map(len, orders.values()))
        assert total == min(max(10, limit // CONTEXT), sum(counts.values()))
        assert len(orders["heldout"]) >= min(counts["heldout"], total // 4)
        assert len(set(orders["train"].tolist())) == len(orders["train"])
        assert orders["heldout"].tolist() == list(range(len(orders["heldout"])))


def test_the_calibration_sees_each_of_its_windows_once(tiny, tokens):
    n = tokens.train.n_windows(CONTEXT)
    chosen = np.unique(np.linspace(0, n - 1, min(CALIBRATION_WINDOWS, n)).astype(np.int64))
    assert len(chosen) > CALIBRATION_BATCH
    ids = tokens.train.windows(chosen, CONTEXT)
    rows = tiny.capture(ids, [A])[A][countable(ids, tokens.train.meta.special_ids)]
    expected = float(rows.float().norm(dim=-1).median())
    found = calibrate_medians(tiny, tokens.train, (A,), CONTEXT)[A]
    assert found == pytest.approx(expected, rel=1e-5)
