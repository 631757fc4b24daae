"""Cross-entropy with a dictionary spliced in, against a plain computation on the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.metrics import ReconstructionMeter, loss_recovered

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


def test_streamed_quality_equals_one_pass():
    torch.manual_seed(0)
    x = torch.randn(1000, 16) * 3 + 5
    x_hat = x + torch.randn(1000, 16)
    d = Dictionary(
        torch.randn(20, 16),
        torch.zeros(20),
        torch.randn(20, 16),
        torch.zeros(16),
        JumpReLU(torch.full((20,), 12.0)),
    )
    meter = ReconstructionMeter(16, 20)
    for part, part_hat in zip(x.split(300), x_hat.split(300), strict=True):
        meter.add(part, part_hat, d.encode(part))
    found = meter.result()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    z = d.encode(x).dense()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert found.explained_variance == pytest.approx(1 - float(fvu), rel=1e-5)
    assert found.l0 == pytest.approx(float((z > 0).sum(1).float().mean()))
    assert found.dead_share == pytest.approx(float((~(z > 0).any(0)).float().mean()))
    assert found.dense_share == pytest.approx(float(((z > 0).float().mean(0) > 0.1).float().mean()))
    cosine = torch.cosine_similarity(x, x_hat, dim=1).mean()
    assert found.cosine == pytest.approx(float(cosine), rel=1e-5)
    # A constant error is an error: a variance-only formula would not see it.
    shifted = ReconstructionMeter(16, 20)
    shifted.add(x, x + 3, d.encode(x))
    assert shifted.result().fvu > 0.9
