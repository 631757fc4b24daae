"""A whole run: what it reports, that it stops when asked, that its numbers are true."""

from __future__ import annotations

import pytest
import torch

from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.sae.site import Site
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.run import train

POINTS = (HookPoint("resid_post", 1), HookPoint("mlp_out", 2))
CONFIG = TrainingConfig(tokens=40_000, expansion=2, k=8, batch_size=512, context=64)


@pytest.fixture(scope="module")
def stored(tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    extract(tiny, tokens, POINTS, folder, max_tokens=10**9, context=64)
    return StoredActivations(folder)


@pytest.fixture(scope="module")
def run(stored):
    rows = []
    return train(stored, CONFIG, record=rows.append), rows


def test_every_site_gets_its_own_dictionary(run):
    result, _ = run
    assert set(result.sites) == {Site.at(point) for point in POINTS}
    a, b = result.sites.values()
    assert not torch.equal(a.dictionary.decoder, b.dictionary.decoder)
    for site in (a, b):
        assert site.dictionary.scale == 1.0  # folded: takes raw activations
        assert site.quality.explained_variance > 0.4


def test_calibrated_sparsity_holds_on_heldout_text(run):
    result, _ = run
    for site in result.sites.values():
        assert site.quality.l0 == pytest.approx(8, rel=0.1)


def test_quality_equals_a_plain_computation(run, stored):
    result, _ = run
    for at, site in result.sites.items():
        x = torch.cat([batch[at.input] for batch in stored.heldout(4096, 10**9)]).double()
        d = site.dictionary
        pre = (x - d.b_dec) @ d.W_enc.double() + d.b_enc
        z = pre * (pre > d.activation.threshold)
        x_hat = z @ d.W_dec.double() + d.b_dec
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert site.quality.tokens == len(x)
        assert site.quality.fvu == pytest.approx(float(fvu), rel=1e-4)
        assert site.quality.l0 == pytest.approx(float((z > 0).sum(1).double().mean()), rel=1e-4)
        assert site.quality.dead_share == pytest.approx(
            float((~(z > 0).any(0)).double().mean()), abs=2 / d.d_sae
        )
        assert torch.allclose(site.frequencies, (z > 0).double().mean(0), atol=2 / len(x))


def test_history_starts_at_the_first_step_and_ends_at_the_last(run):
    _, rows = run
    steps = [row["step"] for row in rows if row["site"] == POINTS[0].name]
    assert steps[0] == 0
    assert steps[-1] == 40_000 // 512 - 1
    assert {row["site"] for row in rows} == {point.name for point in POINTS}


def test_same_seed_same_dictionary(stored):
    short = TrainingConfig(tokens=6_000, expansion=2, k=8, batch_size=512, context=64)
    first, second = train(stored, short), train(stored, short)
    for point in POINTS:
        assert torch.equal(
            first.sites[Site.at(point)].dictionary.encoder,
            second.sites[Site.at(point)].dictionary.encoder,
        )


def test_finishing_early_keeps_a_usable_dictionary(stored):
    steps = 0

    def wants_finish() -> bool:
        nonlocal steps
        steps += 1
        return steps == 10

    result = train(stored, CONFIG, wants_finish=wants_finish)
    assert result.stopped
    assert result.tokens == 10 * 512
    site = result.sites[Site.at(POINTS[0])]
    assert 0 < site.quality.l0 < 100


def test_cancelling_raises_at_once(stored):
    class Stop(Silent):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls > 5:
                raise Cancelled

    with pytest.raises(Cancelled):
        train(stored, CONFIG, progress=Stop())


def test_streamed_activations_train_too(tiny, tokens):
    source = LiveActivations(tiny, tokens, POINTS[:1], 64, buffer_tokens=4096)
    result = train(source, TrainingConfig(tokens=20_000, expansion=2, k=8, batch_size=512))
    assert result.sites[Site.at(POINTS[0])].quality.explained_variance > 0.3
