"""A stream that was stopped goes on as if it had not been, whatever its source."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import READ_BLOCK, StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import Incompatible

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64
BATCH = 384
SEED = 5


@pytest.fixture(scope="module")
def folder(tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    # About 6,200 rows: an epoch is 16 batches and a part of one; no whole number of read blocks.
    extract(tiny, tokens, (A, B), folder, max_tokens=8_300, context=CONTEXT)
    return folder


class FewWindows:
    """The training split cut to `n` windows, so that epochs are short."""

    def __init__(self, split, n):
        self._split, self._n = split, n

    def __getattr__(self, name):
        return getattr(self._split, name)

    def n_windows(self, context):
        return self._n


@pytest.fixture(scope="module")
def few(tokens):
    class Few:
        train = FewWindows(tokens.train, 50)
        heldout = tokens.heldout

    return Few


@pytest.fixture(params=["live", "stored"])
def make(request, tiny, few, folder):
    """Makes the source anew, as another process would."""
    if request.param == "stored":
        return lambda: StoredActivations(folder)
    # 50 windows in fills of 16 or 17: an epoch is 4 fills, about 8 batches.
    return lambda: LiveActivations(tiny, few, (A, B), CONTEXT, batch_windows=4, buffer_tokens=1024)


def equal(a: Mapping, b: Mapping) -> bool:
    return set(a) == set(b) and all(torch.equal(a[point], b[point]) for point in a)


def test_a_resumed_stream_gives_what_the_first_would_have_given(make, tmp_path):
    with make().batches(BATCH, SEED) as stream:
        whole = list(islice(stream, 40))
    # Stops before the first batch, inside fills, at their ends, and in three epochs.
    for stop in (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33):
        with make().batches(BATCH, SEED) as stream:
            for _ in islice(stream, stop):
                pass
            save_file(stream.state(), tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
        with make().batches(BATCH, SEED, state=state) as resumed:
            for want, got in zip(whole[stop : stop + 7], resumed, strict=False):
                assert equal(want, got), f"stopped after {stop}"


def test_a_run_may_be_stopped_again_and_again(make):
    with make().batches(BATCH, SEED) as stream:
        whole = list(islice(stream, 20))
    state = None
    for want in whole:
        with make().batches(BATCH, SEED, state=state) as stream:
            assert equal(want, next(stream))
        state = stream.state()  # a closed stream still knows its place


def test_asking_for_the_place_changes_nothing(make):
    with make().batches(BATCH, SEED) as quiet, make().batches(BATCH, SEED) as asked:
        for _ in range(12):
            asked.state()
            assert equal(next(quiet), next(asked))
        early = asked.state()
        kept = {name: tensor.clone() for name, tensor in early.items()}
        next(asked)
        assert equal(early, kept)  # a state is not written to afterwards


def test_batches_are_whole_and_float32(make):
    with make().batches(100, SEED) as stream:  # no multiple of a read block
        for batch in islice(stream, 80):
            for rows in batch.values():
                assert rows.shape == (100, 128)
                assert rows.dtype == torch.float32


def tally(rows):
    """How often each row is there; two tokens may have equal rows."""
    found, counts = torch.unique(rows, dim=0, return_counts=True)
    return {tuple(row): int(n) for row, n in zip(found[:, :6].tolist(), counts, strict=True)}


def test_every_row_comes_once_an_epoch(make):
    """Also where batches divide neither an epoch, nor a fill, nor a block."""
    with make().batches(1, SEED) as stream:
        one = [next(stream)[A]]
        while int(stream.state()["epoch"]) == 0:
            one.append(next(stream)[A])
    n = len(one)
    assert n % 9 and (n % READ_BLOCK or not isinstance(make(), StoredActivations))
    want = tally(torch.cat(one))
    with make().batches(9, SEED) as stream:
        seen = torch.cat([batch[A] for batch in islice(stream, 2 * n // 9)])
    # At most eight rows of an epoch come in the next.
    first, both = tally(seen[: n // 9 * 9]), tally(seen)
    assert sum(want.values()) - sum(first.values()) < 9
    assert all(count <= want[row] for row, count in first.items())
    assert sum(both.values()) > 2 * n - 9
    assert all(count <= 2 * want[row] for row, count in both.items())


def test_another_batch_size_goes_on_with_the_same_rows(make):
    """Memory may have become short: the batch is then smaller."""
    with make().batches(BATCH, SEED) as stream:
        first = list(islice(stream, 3))
    with make().batches(BATCH, SEED, state=stream.state()) as same:
        want = next(same)
    with make().batches(BATCH // 3, SEED, state=stream.state()) as smaller:
        parts = list(islice(smaller, 3))
    if isinstance(make(), StoredActivations):
        assert torch.equal(torch.cat([part[A] for part in parts]), want[A])
    assert all(part[A].shape == (BATCH // 3, 128) for part in parts)
    rows = torch.cat([batch[A] for batch in [*first, *parts]])
    assert max(tally(rows).values()) <= 2  # two tokens of one context may be alike, no more


def test_a_state_of_other_data_is_refused(make, tiny, tokens):
    with make().batches(BATCH, SEED) as stream:
        next(stream)
    state = stream.state()
    with pytest.raises(Incompatible, match="the seed was 5; now it is 6"):
        make().batches(BATCH, 6, state=state)
    with pytest.raises(Incompatible, match="another kind of source"):
        make().batches(BATCH, SEED, state={"seed": state["seed"]})
    changed = dict(state)
    for name in ("windows", "rows"):
        if name in changed:
            changed[name] = changed[name] + 1
    with pytest.raises(Incompatible, match="now it is"):
        make().batches(BATCH, SEED, state=changed)


def test_a_state_of_other_sites_is_refused(tiny, few):
    def stream(points, state=None):
        source = LiveActivations(tiny, few, points, CONTEXT, buffer_tokens=1024)
        return source.batches(BATCH, SEED, state=state)

    with stream((A,)) as alone:
        list(islice(alone, 3))
    with pytest.raises(Incompatible, match="other hook points"):
        stream((A, B), alone.state())


def test_a_live_checkpoint_is_smaller_than_a_batch(tiny, few):
    source = LiveActivations(tiny, few, (A, B), CONTEXT, buffer_tokens=1024)
    with source.batches(BATCH, SEED) as stream:
        for _ in islice(stream, 11):
            state = stream.state()
            size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            assert size < BATCH * 2 * 128 * 4


def test_dropped_positions_are_counted_once_across_a_stop(tiny, few):
    def source():
        return LiveActivations(tiny, few, (A, B), CONTEXT, batch_windows=4, buffer_tokens=1024)

    uninterrupted = source()
    with uninterrupted.batches(BATCH, SEED) as stream:
        for _ in islice(stream, 13):
            pass
    for stop in (3, 8, 12):
        with source().batches(BATCH, SEED) as stream:
            for _ in islice(stream, stop):
                pass
        resumed = source()
        with resumed.batches(BATCH, SEED, state=stream.state()) as stream:
            for _ in islice(stream, 13 - stop):
                pass
        assert resumed.dropped == uninterrupted.dropped
    assert uninterrupted.dropped.seen % CONTEXT == 0
    assert uninterrupted.dropped.special >= uninterrupted.dropped.seen // CONTEXT


def test_each_epoch_has_an_order_of_its_own(make):
    with make().batches(1, SEED) as stream:
        epochs = {0: [], 1: []}
        while (epoch := int(stream.state()["epoch"])) < 2:
            epochs[epoch].append(next(stream)[A])
    first, second = (torch.cat(rows) for rows in epochs.values())
    assert tally(first) == tally(second)
    assert (first == second).all(1).float().mean() < 0.01
