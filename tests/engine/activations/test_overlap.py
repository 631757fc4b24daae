"""The thread that works ahead: it changes no batch, and it never outlives its stream."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Cancelled, Silent

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64
WAIT = 20.0


@pytest.fixture
def make(tiny, tokens):
    def _make(overlap=True):
        return LiveActivations(
            tiny,
            tokens,
            (A, B),
            CONTEXT,
            batch_windows=4,
            buffer_tokens=1024,
            overlap=overlap,
        )

    return _make


def producers():
    return [thread for thread in threading.enumerate() if thread.name == "activations"]


def gone():
    """No producer is left, or not for long."""
    deadline = time.monotonic() + WAIT
    while producers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not producers()


class Watched(Silent):
    """Progress that counts the checks of producers, and can pause or stop them."""

    def __init__(self):
        self.checks = 0
        self.go = threading.Event()
        self.go.set()
        self.cancelled = False

    def check(self):
        if threading.current_thread().name == "activations":
            self.checks += 1
        self.go.wait()
        if self.cancelled:
            raise Cancelled


def settled(progress, least):
    """The number of a producer's checks, at least `least`, once it does no more of them."""
    deadline = time.monotonic() + WAIT
    while progress.checks < least and time.monotonic() < deadline:
        time.sleep(0.01)
    before, since = progress.checks, time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.02)
        if progress.checks != before:
            before, since = progress.checks, time.monotonic()
    return before


def test_overlap_changes_no_batch(make):
    with make(True).batches(384, 3) as ahead, make(False).batches(384, 3) as plain:
        for want, got in islice(zip(plain, ahead, strict=True), 20):
            assert all(torch.equal(want[point], got[point]) for point in (A, B))
            assert {k: v.tolist() for k, v in plain.state().items()} == {
                k: v.tolist() for k, v in ahead.state().items()
            }
        assert producers()
    assert not producers()


def test_resumed_with_overlap_as_without(make):
    with make(False).batches(384, 3) as plain:
        whole = list(islice(plain, 12))
    for stop in (1, 2, 5, 8):
        with make(True).batches(384, 3) as ahead:
            for _ in islice(ahead, stop):
                pass
        with make(True).batches(384, 3, state=ahead.state()) as resumed:
            for want, got in zip(whole[stop:], resumed, strict=False):
                assert torch.equal(want[A], got[A])


def test_what_is_made_ahead_is_not_counted(make):
    source, progress = make(True), Watched()
    with source.batches(384, 3, progress) as stream:
        next(stream)
        assert settled(progress, 8) == 8  # two fills of four forward passes each, and no third
        assert source.dropped.seen in (15 * CONTEXT, 16 * CONTEXT)  # one fill's windows


def test_no_thread_before_the_first_batch_and_none_after_the_last(make):
    stream = make().batches(384, 3)
    assert not producers()
    next(stream)
    assert len(producers()) == 1
    stream.close()
    assert not producers()
    stream.close()
    assert list(stream) == []


def test_a_dropped_stream_takes_its_thread_with_it(make):
    for _batch in make().batches(384, 3):
        break
    gc.collect()
    assert gone()


def test_closing_does_not_wait_for_the_whole_fill(make, tiny, monkeypatch):
    source, progress = make(), Watched()
    entered, leave = threading.Event(), threading.Event()
    capture, passes = tiny.capture, []

    def slow(ids, points):
        passes.append(1)
        if len(passes) > 4:
            entered.set()
            assert leave.wait(WAIT)
        return capture(ids, points)

    monkeypatch.setattr(tiny, "capture", slow)
    with source.batches(384, 3, progress) as stream:
        next(stream)
        assert entered.wait(WAIT)  # in the first forward pass of the second fill
        threading.Timer(0.2, leave.set).start()
    assert len(passes) == 5
    assert not producers()


def test_an_error_in_the_thread_reaches_the_consumer_after_what_was_made(make, tiny, monkeypatch):
    source = make()
    with make(False).batches(384, 3) as plain:
        want = list(islice(plain, 3))
    capture, calls = tiny.capture, []

    def breaks(ids, points):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("the device fell out")
        return capture(ids, points)

    monkeypatch.setattr(tiny, "capture", breaks)
    got = []
    stream = source.batches(384, 3)
    with pytest.raises(RuntimeError, match="the device fell out"):
        for batch in stream:
            got.append(batch)
    assert len(got) == 2  # the first fill's
    assert all(torch.equal(a[A], b[A]) for a, b in zip(got, want, strict=False))
    assert not producers()
    monkeypatch.undo()
    # The stream's place is still known: a new one goes on from there.
    with source.batches(384, 3, state=stream.state()) as again:
        assert torch.equal(next(again)[A], want[2][A])


def test_cancelling_ends_the_thread(make):
    progress = Watched()
    stream = make().batches(384, 3, progress)
    next(stream)
    progress.cancelled = True
    with pytest.raises(Cancelled):
        for _ in stream:
            pass
    assert not producers()


def test_pausing_the_job_pauses_the_thread(make):
    progress = Watched()
    with make().batches(384, 3, progress) as stream:
        next(stream)
        made = settled(progress, 8)
        progress.go.clear()
        next(stream)
        next(stream)  # the second fill's first: the first one's memory is free again
        assert settled(progress, made + 1) == made + 1  # it woke, and waits in its check
        progress.go.set()
        assert settled(progress, made + 4) == made + 4


def test_a_cancel_during_a_pause_ends_the_thread(make):
    progress = Watched()
    stream = make().batches(384, 3, progress)
    next(stream)
    progress.go.clear()
    progress.cancelled = True
    threading.Timer(0.1, progress.go.set).start()
    with pytest.raises(Cancelled):
        for _ in stream:
            pass
    assert not producers()


def test_held_out_text_and_edits_beside_a_stream_change_nothing(make, tiny, tokens):
    """The model runs in two threads, one at a time, and never edited for the stream."""
    with make(False).batches(384, 3) as plain:
        want = list(islice(plain, 10))
    heldout = torch.cat([batch[A] for batch in make(False).heldout(512, 2000)])
    source = make(True)
    ids = tokens.heldout.windows(np.arange(2), CONTEXT)
    with source.batches(384, 3) as ahead:
        for batch in want:
            assert torch.equal(next(ahead)[A], batch[A])
            seen = torch.cat([rows[A] for rows in source.heldout(512, 2000)])
            assert torch.equal(seen, heldout)
            with (
                source.exclusive(),
                tiny.intervene({HookPoint("resid_post", 0): torch.zeros_like}),
            ):
                tiny.capture(ids, (A,))
                time.sleep(0.05)


def test_who_has_the_model_to_himself_really_has(make, tiny, monkeypatch):
    source, progress, passes = make(), Watched(), []
    capture = tiny.capture

    def counting(ids, points):
        passes.append(threading.current_thread().name)
        return capture(ids, points)

    monkeypatch.setattr(tiny, "capture", counting)
    with source.batches(384, 3, progress) as stream:
        next(stream)
        settled(progress, 8)
        made = len(passes)
        with source.exclusive():
            next(stream)
            next(stream)  # made before; now there is room for another fill
            settled(progress, 9)
            assert len(passes) == made
            list(source.heldout(512, 512))  # one may use it oneself
            assert "activations" not in passes[made:]
        settled(progress, 12)
        assert passes[-1] == "activations"


def test_a_program_that_forgets_a_stream_still_ends(tmp_path):
    """No thread of ours keeps the interpreter from ending."""
    script = tmp_path / "forgets.py"
    script.write_text(
        """
import torch
from queue import SimpleQueue
from mistudio.engine.activations.ring import Devices, Layout, RingStream
from mistudio.engine.activations.stream import Dropped
from mistudio.engine.models.hooks import HookPoint

point = HookPoint("resid_post", 0)
cpu = torch.device("cpu")
stream = RingStream(
    lambda windows: ({point: torch.ones(len(windows) * 8, 4)}, Dropped(kept=len(windows) * 8)),
    lambda: None, Layout(32, 8, 4, 8), (point,), 0, 16, Devices(cpu, cpu, True),
    lambda counts: None, None,
)
keep = [stream]
keep.append(keep)
next(stream)
print("given", flush=True)
"""
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "given\n"
