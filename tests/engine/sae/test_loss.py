"""Cross-entropy with a dictionary spliced in, against a plain computation on the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.loss import loss_recovered

POINT = HookPoint("resid_post", 1)
CONTEXT = 64


def identity(d=128):
    """A dictionary that gives back exactly what it gets: +x and -x halves, threshold 0."""
    eye = torch.eye(d)
    return Dictionary(
        torch.cat([eye, -eye]),
        torch.zeros(2 * d),
        torch.cat([eye, -eye]),
        torch.zeros(d),
        JumpReLU(torch.zeros(2 * d)),
    )


def nothing(d=128):
    return Dictionary(
        torch.randn(8, d),
        torch.zeros(8),
        torch.randn(8, d),
        torch.zeros(d),
        JumpReLU(torch.full((8,), 1e9)),
    )


@pytest.fixture(scope="module")
def median(tiny, tokens):
    return calibrate_medians(tiny, tokens.heldout, (POINT,), CONTEXT)[POINT]


def measure(tiny, tokens, median, dictionary):
    return loss_recovered(
        tiny, tokens.heldout, POINT, dictionary, median, context=CONTEXT, max_tokens=1024
    )


def test_clean_loss_is_the_models_own(tiny, tokens, median):
    found = measure(tiny, tokens, median, identity())
    n = min(tokens.heldout.n_windows(CONTEXT), 1024 // CONTEXT)
    chosen = np.unique(np.linspace(0, tokens.heldout.n_windows(CONTEXT) - 1, n).astype(int))
    ids = tokens.heldout.windows(chosen, CONTEXT)
    logits = tiny.model(ids).logits[:, :-1].log_softmax(-1)
    losses = -logits.gather(2, ids[:, 1:, None])[..., 0]
    special = torch.tensor(tokens.heldout.meta.special_ids)
    x = tiny.capture(ids, [POINT])[POINT]
    mask = ~torch.isin(ids, special) & (x.norm(dim=-1) <= 10 * median)
    mask[:, 0] = False
    mask = mask[:, :-1]
    assert found.tokens == int(mask.sum())
    assert found.ce_clean == pytest.approx(float(losses[mask].mean()), rel=1e-4)


def test_a_perfect_dictionary_recovers_all_of_the_loss(tiny, tokens, median):
    found = measure(tiny, tokens, median, identity())
    assert found.ce_sae == pytest.approx(found.ce_clean, abs=1e-4)
    assert found.ce_loss_score == pytest.approx(1.0, abs=1e-3)
    assert found.ce_increase == pytest.approx(0.0, abs=1e-4)


def test_an_empty_dictionary_recovers_none(tiny, tokens, median):
    found = measure(tiny, tokens, median, nothing())
    assert found.ce_sae == pytest.approx(found.ce_zero, abs=1e-4)
    assert found.ce_loss_score == pytest.approx(0.0, abs=1e-4)
    assert found.ce_zero > found.ce_mean > found.ce_clean
