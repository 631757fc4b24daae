"""Several points of one pass: row i of every site is the same token, whatever the source.

A transcoder learns from pairs: what enters an MLP, and what this MLP makes of it.
"""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch

from mistudio.engine.activations.hybrid import HybridActivations
from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.models.hooks import HookedDecoder, HookPoint

MLP_IN, MLP_OUT = HookPoint("mlp_in", 1), HookPoint("mlp_out", 1)
POINTS = (MLP_IN, MLP_OUT)
CONTEXT = 64


@pytest.fixture(params=["live", "ahead", "stored", "hybrid"])
def source(request, tiny, tokens, tmp_path):
    if request.param == "stored":
        extract(tiny, tokens, POINTS, tmp_path, max_tokens=6_000, context=CONTEXT)
        return StoredActivations(tmp_path)
    if request.param == "hybrid":

        def load():
            return HookedDecoder(copy.deepcopy(tiny.model))

        return HybridActivations(load, tokens, POINTS, CONTEXT, tmp_path, 1024)
    return LiveActivations(
        tiny, tokens, POINTS, CONTEXT, buffer_tokens=1024, overlap=request.param == "ahead"
    )


@pytest.fixture
def mlp(tiny):
    """The layer's MLP as the model holds it, on rows [n, d]."""
    module = tiny.model.get_submodule(tiny.module_path(MLP_IN))
    assert tiny.module_path(MLP_OUT) == tiny.module_path(MLP_IN)
    return torch.inference_mode()(lambda rows: module(rows[None])[0])


def worst(mlp, batch, shift=0):
    """Largest error of a row relative to the norm of a typical one."""
    error = mlp(batch[MLP_IN]).roll(shift, 0) - batch[MLP_OUT]
    return float(error.norm(dim=1).max() / batch[MLP_OUT].norm(dim=1).median())


def test_the_mlp_makes_each_output_row_of_its_input_row(source, mlp):
    limit = 1e-5 if isinstance(source, LiveActivations) else 2e-2  # stored values are fp16
    with source.batches(500, 3) as stream:
        # Enough to see carried rows, fills, phases and the ends of epochs.
        batches = list(islice(stream, 15))
    batches += source.heldout(500, 1200)
    for batch in batches:
        assert set(batch) == set(POINTS)
        assert worst(mlp, batch) < limit
    assert worst(mlp, batches[0], shift=1) > 0.3  # a row's neighbour is not its pair
    assert not torch.equal(batches[0][MLP_IN], batches[0][MLP_OUT])
