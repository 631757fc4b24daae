"""Model and training take turns: the model is gone while batches are given."""

from __future__ import annotations

import copy
import json
import shutil
import weakref
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.engine.activations.hybrid import HybridActivations
from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.errors import Incompatible

A, B = HookPoint("resid_post", 1), HookPoint("resid_post", 2)
CONTEXT = 64
BATCH = 384
SEED = 5
PHASE = 16 * CONTEXT  # about 1,000 rows: three batches


class Loader:
    """Makes the tiny model anew, and knows which of the models it gave are still there."""

    def __init__(self, tiny):
        self._tiny = tiny
        self._given = []

    def __call__(self):
        model = HookedDecoder(copy.deepcopy(self._tiny.model))
        self._given += [weakref.ref(model), weakref.ref(model.model)]
        return model

    @property
    def loaded(self):
        return len(self._given) // 2

    @property
    def alive(self):
        return [ref for ref in self._given if ref() is not None]


@pytest.fixture
def loader(tiny):
    return Loader(tiny)


@pytest.fixture
def make(loader, tokens, tmp_path):
    def _make(folder="run", phase_tokens=PHASE, **options):
        return HybridActivations(
            loader, tokens, (A, B), CONTEXT, tmp_path / folder, phase_tokens, **options
        )

    return _make


def test_no_model_is_alive_while_batches_are_given(make, loader):
    source = make()
    assert loader.loaded == 1
    assert not loader.alive
    with source.batches(BATCH, SEED) as stream:
        for _ in islice(stream, 10):
            assert not loader.alive
    assert loader.loaded == 5  # the start and four phases
    next(source.heldout(100, 200))
    assert loader.loaded == 5


def test_rows_are_the_models_own_and_each_phase_brings_others(make, tiny, tokens):
    ids = tokens.train.windows(np.arange(tokens.train.n_windows(CONTEXT)), CONTEXT)
    every = tiny.capture(ids, [A])[A].flatten(0, 1)
    source = make()
    with source.batches(BATCH, SEED) as stream:
        batches = [batch[A] for batch in islice(stream, 6)]
    rows = torch.cat(batches)[:50]
    distance = torch.cdist(rows, every, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert float(distance.max()) < 2e-3 * float(every.norm(dim=1).median())
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert not set(map(tuple, first[:, :6].tolist())) & set(map(tuple, second[:, :6].tolist()))


def test_a_phase_gives_every_row_as_often_as_asked(make, tmp_path):
    source = make(epochs_per_phase=2)
    with source.batches(BATCH, SEED) as stream:
        first = [next(stream)[A]]
        stored = StoredActivations(tmp_path / "run" / "phase")
        rows = stored.meta.tokens["train"]
        while int(stream.state()["phase"]) == 0:
            first.append(next(stream)[A])
    given = torch.cat(first)
    assert 0 <= len(given) - 2 * rows < BATCH
    _, counts = torch.unique(given, dim=0, return_counts=True)
    assert int(counts.min()) >= 2


def test_resumed_in_any_phase_as_if_never_interrupted(make, loader, tmp_path):
    with make().batches(BATCH, SEED) as stream:
        whole = list(islice(stream, 12))
    for stop in (1, 3, 8):
        shutil.rmtree(tmp_path / "stopped", ignore_errors=True)
        with make("stopped").batches(BATCH, SEED) as stream:
            for _ in islice(stream, stop):
                pass
        save_file(stream.state(), tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
        for gone in (False, True):
            if gone:
                shutil.rmtree(tmp_path / "stopped")
            before = loader.loaded
            with make("stopped").batches(BATCH, SEED, state=state) as resumed:
                for want, got in zip(whole[stop : stop + 1], resumed, strict=False):
                    assert torch.equal(want[A], got[A]) and torch.equal(want[B], got[B])
                # A whole phase that is still there is used again without the model.
                between = stop == 3
                assert loader.loaded - before == (2 if gone else between)
                for want, got in zip(whole[stop + 1 : stop + 4], resumed, strict=False):
                    assert torch.equal(want[A], got[A])


def test_what_an_interruption_left_behind_is_made_again(make, loader, tmp_path):
    with make().batches(BATCH, SEED) as stream:
        whole = list(islice(stream, 2))
    phase = tmp_path / "run" / "phase"
    path = phase / "train" / "00000" / f"{A.name}.f16"
    path.write_bytes(path.read_bytes()[:-1])
    with make().batches(BATCH, SEED) as again:
        assert torch.equal(next(again)[A], whole[0][A])
    key = json.loads((phase / "key.json").read_text())
    (phase / "key.json").write_text(json.dumps(key | {"phase": 1}))
    before = loader.loaded
    with make().batches(BATCH, SEED) as again:
        assert torch.equal(next(again)[A], whole[0][A])
    assert loader.loaded == before + 1


def test_text_that_fits_into_one_phase_needs_the_model_once(make, loader):
    source = make(phase_tokens=10**9)
    with source.batches(4096, SEED) as stream:
        rows = 0
        while rows < 3 * source.n_windows * CONTEXT:
            rows += len(next(stream)[A])
    assert loader.loaded == 2


def test_held_out_text_is_the_stored_one(make, tiny, tokens):
    source = make()
    live = LiveActivations(tiny, tokens, (A, B), CONTEXT)
    want = torch.cat([batch[A] for batch in live.heldout(512, 3000)])
    got = torch.cat([batch[A] for batch in source.heldout(512, 3000)])
    assert torch.allclose(want, got, atol=0.05)
    assert source.medians == live.medians
    assert source.width(A) == 128
    total = sum(len(batch[A]) for batch in source.heldout(512, 10**9))
    assert total == sum(len(batch[A]) for batch in live.heldout(512, 10**9))


def test_dropped_positions_are_counted_once_across_a_stop(make):
    one = make("one")
    with one.batches(BATCH, SEED) as stream:
        for _ in islice(stream, 7):
            pass
    assert one.dropped.seen == 3 * PHASE
    for stop in (2, 3, 5):
        with make("two").batches(BATCH, SEED) as stream:
            for _ in islice(stream, stop):
                pass
        two = make("two")
        with two.batches(BATCH, SEED, state=stream.state()) as stream:
            for _ in islice(stream, 7 - stop):
                pass
        assert two.dropped == one.dropped


def test_a_cancelled_extraction_leaves_no_half_phase(make, loader, tmp_path):
    class Stops(Silent):
        checks = 0

        def check(self):
            self.checks += 1
            if self.checks == 3:
                raise Cancelled

    source = make()
    with pytest.raises(Cancelled):
        next(source.batches(BATCH, SEED, Stops()))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["heldout"]
    with source.batches(BATCH, SEED) as stream:
        assert next(stream)[A].shape == (BATCH, 128)
        assert not loader.alive


def test_other_phases_are_refused(make):
    with make().batches(BATCH, SEED) as stream:
        next(stream)
    state = stream.state()
    with pytest.raises(Incompatible, match="of a phase was 16; now it is 32"):
        make(phase_tokens=2 * PHASE).batches(BATCH, SEED, state=state)
    with pytest.raises(Incompatible, match="seed"):
        make().batches(BATCH, SEED + 1, state=state)
