"""The sources on a CUDA device: pinned memory, a stream of its own, and the same batches."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch

from mistudio.engine.activations.hybrid import HybridActivations
from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.models.hooks import HookedDecoder, HookPoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64


@pytest.fixture
def model(tiny):
    return HookedDecoder(copy.deepcopy(tiny.model).half().to("cuda"))


def live(model, tokens, **options):
    return LiveActivations(
        model, tokens, (A, B), CONTEXT, batch_windows=4, buffer_tokens=1024, **options
    )


def test_overlap_is_on_and_changes_no_batch(model, tokens):
    with live(model, tokens, overlap=False).batches(384, 3) as plain:
        want = list(islice(plain, 20))
    with live(model, tokens).batches(384, 3) as ahead:
        for batch in want:
            got = next(ahead)
            assert ahead._producer is not None
            for point in (A, B):
                assert got[point].is_cuda and got[point].dtype == torch.float32
                # The training step's work must not disturb what is on its way.
                (got[point] @ got[point].T).sum()
                assert torch.equal(got[point], batch[point])
        assert all(rows.is_pinned() for rows in ahead._fill.rows.values())
        assert all(rows.dtype == torch.float16 for rows in ahead._fill.rows.values())


def test_resumed_as_if_never_interrupted(model, tokens):
    with live(model, tokens).batches(384, 3) as stream:
        whole = list(islice(stream, 12))
    for stop in (1, 4, 7):
        with live(model, tokens).batches(384, 3) as stream:
            for _ in islice(stream, stop):
                pass
        assert all(tensor.device.type == "cpu" for tensor in stream.state().values())
        with live(model, tokens).batches(384, 3, state=stream.state()) as resumed:
            for want, got in zip(whole[stop:], resumed, strict=False):
                assert torch.equal(want[A], got[A])


def test_stored_batches_are_those_of_the_cpu(tiny, tokens, tmp_path):
    extract(tiny, tokens, (A, B), tmp_path, max_tokens=6_000, context=CONTEXT)
    here, there = StoredActivations(tmp_path), StoredActivations(tmp_path, "cuda")
    with here.batches(300, 0) as want, there.batches(300, 0) as got:
        for _ in range(30):
            a, b = next(want), next(got)
            assert b[A].is_cuda
            assert torch.allclose(a[A], b[A].cpu(), rtol=1e-6)


def test_a_phase_gives_the_models_memory_back(tiny, tokens, tmp_path):
    def load():
        return HookedDecoder(copy.deepcopy(tiny.model).to("cuda"))

    source = HybridActivations(load, tokens, (A, B), CONTEXT, tmp_path, 1024, device="cuda")
    before = torch.cuda.memory_allocated()  # the first extraction has left its libraries' scratch
    size = sum(p.numel() * p.element_size() for p in tiny.model.parameters())
    with source.batches(300, 0) as stream:
        for batch in islice(stream, 8):
            rows = sum(values.numel() * 4 for values in batch.values())
            assert torch.cuda.memory_allocated() < before + size // 2 + 4 * rows
