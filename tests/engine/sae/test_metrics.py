"""Every number of the reconstruction meter against a plain float64 computation of its formula.

Compared once by hand with SAELens 6.54.12's `get_sparsity_and_variance_metrics`, in three batches
of 8 windows of SmolLM2-135M at the output of block 10 (3,048 tokens without the first of each
window), for a JumpReLU dictionary of 600 latents along +-300 principal directions. Ours | theirs:
explained_variance .92905767 | .92905767, explained_variance_legacy .92194995 | .92194998,
cosine .98309506 | .98309505, l2_ratio .97167453 | .97167456, mse 672.27069 | 672.27069,
l0 156.70013 | 156.70013, l1 906.40350 | 906.40356. reconstruction_bias .9871639 | .9871632: theirs
is the mean of the batches' ratios, ours the ratio of means.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from mistudio.engine.sae import metrics
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.dictionary import Codes, Dictionary
from mistudio.engine.sae.metrics import ReconstructionMeter, evaluate
from mistudio.errors import InvalidInput


def sparse(z):
    rows, latents = z.nonzero(as_tuple=True)
    return Codes(rows, latents, z[rows, latents], *z.shape)


def streamed(y, y_hat, z, batch):
    meter = ReconstructionMeter(y.shape[1], z.shape[1])
    for part in zip(y.split(batch), y_hat.split(batch), z.split(batch), strict=True):
        meter.add(part[0], part[1], sparse(part[2]))
    return meter.result()


def by_formula(y, y_hat, z, batch):
    """Everything in float64 over all tokens at once, each line the formula of its number."""
    y, y_hat, z = y.double(), y_hat.double(), z.double()
    error = (y - y_hat).pow(2).sum(1)
    variance = (y - y.mean(0)).pow(2).sum(1).mean()
    batched = torch.cat([(part - part.mean(0)).pow(2).sum(1) for part in y.split(batch)])
    about_zero = y.pow(2).sum(1).mean() - y.pow(2).mean() ** 2
    frequency = (z != 0).double().mean(0)
    return {
        "tokens": len(y),
        "l0": (z != 0).sum(1).double().mean(),
        "l1": z.abs().sum(1).mean(),
        "mse": error.mean(),
        "fvu": error.mean() / variance,
        "explained_variance": 1 - error.mean() / variance,
        "explained_variance_legacy": (1 - error / batched).mean(),
        "explained_variance_about_zero": 1 - error.mean() / about_zero,
        "cosine": torch.cosine_similarity(y, y_hat, dim=1).mean(),
        "l2_ratio": (y_hat.norm(dim=1) / y.norm(dim=1)).mean(),
        "reconstruction_bias": y_hat.pow(2).sum(1).mean() / (y * y_hat).sum(1).mean(),
        "dead_share": (frequency == 0).double().mean(),
        "dense_share": (frequency > 0.1).double().mean(),
        "dead_share_window": len(y),
    }


def draw(n=1000, d=16, m=60, offset=5.0):
    """(y, y_hat, z): off-centre targets; latents that are dead, rare, common and dense."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) / d + offset
    y_hat = 0.9 * y + 0.4 * torch.randn(n, d, generator=generator)
    frequency = torch.cat([torch.zeros(m // 4), torch.logspace(-3, -0.01, m - m // 4)])
    z = torch.rand(n, m, generator=generator) * (torch.rand(n, m, generator=generator) < frequency)
    return y, y_hat, z


@pytest.mark.parametrize("batch", [1000, 300, 128])
def test_streamed_numbers_equal_their_formulas(batch):
    y, y_hat, z = draw()
    found = streamed(y, y_hat, z, batch)
    for name, value in by_formula(y, y_hat, z, batch).items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), name
    assert 0 < found.dead_share < 1
    assert 0 < found.dense_share < 1


def test_a_mean_far_above_the_spread_costs_no_digits():
    """E||y||^2 - ||E y||^2 from float32 sums would be off by more than the variance itself."""
    y, y_hat, z = draw(offset=3000.0)
    y_hat = y + (y_hat - y) / (y_hat - y).std()
    found = streamed(y, y_hat, z, 130)
    exact = by_formula(y, y_hat, z, 130)
    assert found.fvu == pytest.approx(float(exact["fvu"]), rel=1e-4)
    assert found.explained_variance_legacy == pytest.approx(
        float(exact["explained_variance_legacy"]), rel=1e-4
    )


def test_large_batches_are_measured_in_pieces(monkeypatch):
    y, y_hat, z = draw()
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 16 * 70)
    found = streamed(y, y_hat, z, 500)
    for name, value in by_formula(y, y_hat, z, 500).items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), name


def test_activations_in_bfloat16_are_measured_in_float32():
    y, y_hat, z = draw()
    y, y_hat = y.bfloat16(), y_hat.bfloat16()
    found = streamed(y, y_hat, z, 250)
    for name, value in by_formula(y, y_hat, z, 250).items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), name


def test_a_constant_error_is_an_error():
    """A variance-only formula, 1 - Var(y - y^) / Var(y), would not see it."""
    y, _, z = draw()
    assert streamed(y, y + 3, z, 300).fvu > 0.9


def test_quantiles_of_tokens_are_exact_to_their_stated_resolution():
    y, y_hat, z = draw(n=5000)
    y_hat[::50] = y[::50]  # some tokens are perfect
    y_hat[1::40] -= 30  # and some are lost
    found = streamed(y, y_hat, z, 700)
    error = (y - y_hat).double().pow(2).sum(1).sort().values
    relative = error / (y.double() - y.double().mean(0)).pow(2).sum(1).mean()
    for value, share in ((found.fvu_p50, 0.5), (found.fvu_p90, 0.9), (found.fvu_p99, 0.99)):
        rank = -(-share * len(y) // 1)  # the smallest value that `share` of tokens do not exceed
        assert value == pytest.approx(float(relative[int(rank) - 1]), rel=0.006)
    assert 10 * found.fvu_p50 < found.fvu_p99


def test_perfect_tokens_have_no_error():
    y, _, z = draw()
    found = streamed(y, y, z, 300)
    assert (found.mse, found.fvu, found.fvu_p50, found.fvu_p99) == (0, 0, 0, 0)
    assert found.explained_variance == found.explained_variance_legacy == 1
    assert found.cosine == pytest.approx(1)


def test_density_counts_latents_by_the_log_of_their_frequency():
    m = 1000
    generator = torch.Generator().manual_seed(1)
    fired = (10 ** (6 * torch.rand(m, generator=generator, dtype=torch.float64))).long() - 1
    found = metrics.density(fired, 10**6)
    assert found.never_fired == int((fired == 0).sum()) > 0
    logs = (fired[fired > 0].double() / 10**6).log10().tolist()
    edges = list(found.log10_edges)
    counts = [sum(low <= value < high for value in logs) for low, high in pairwise(edges)]
    assert list(found.counts) == counts
    assert sum(found.counts) + found.never_fired == m


def test_frequencies_at_and_beyond_the_edges_are_counted():
    found = metrics.density(torch.tensor([10**9, 1, 0]), 10**9)  # always; 1e-9; never
    assert (found.counts[-1], found.counts[0], found.never_fired) == (1, 1, 1)
    assert sum(found.counts) == 2
    assert len(found.counts) == len(found.log10_edges) - 1


def test_results_are_strict_json_even_where_nothing_can_be_said():
    y, y_hat, z = draw()
    found = json.loads(json.dumps(streamed(y, y_hat, z, 300).as_dict(), allow_nan=False))
    assert found["fvu_of_skip"] is None
    assert sum(found["density"]["counts"]) + found["density"]["never_fired"] == z.shape[1]
    constant = streamed(torch.ones_like(y), y_hat, z, 300)
    assert json.loads(json.dumps(constant.as_dict(), allow_nan=False))["fvu"] is None
    diverged = streamed(y, y_hat * float("nan"), z, 300)
    assert json.loads(json.dumps(diverged.as_dict(), allow_nan=False))["fvu"] is None
    assert diverged.as_dict()["fvu_p50"] is None


def test_a_batch_of_one_token_does_not_spoil_the_mean_of_ratios():
    y, y_hat, z = draw(n=301)
    found = streamed(y, y_hat, z, 300)  # the last batch has no spread of its own
    expected = by_formula(y[:300], y_hat[:300], z[:300], 300)["explained_variance_legacy"]
    assert found.explained_variance_legacy == pytest.approx(float(expected), rel=1e-5)


def test_no_tokens_are_refused():
    with pytest.raises(InvalidInput, match="Nothing to judge by"):
        ReconstructionMeter(4, 8).result()
    meter = ReconstructionMeter(4, 8)
    meter.add(torch.empty(0, 4), torch.empty(0, 4), sparse(torch.zeros(0, 8)))
    with pytest.raises(InvalidInput):
        meter.result()


# --- every wiring ---------------------------------------------------------------------------------


def wired(kind, d_in=12, d_out=12, m=40):
    """A dictionary with random weights of each wiring."""
    torch.manual_seed(2)
    parts = {
        "encoder": torch.randn(m, d_in),
        "b_enc": 0.1 * torch.randn(m),
        "decoder": 0.1 * torch.randn(m, d_out),
        "b_dec": torch.randn(d_out),
        "activation": TopK(5),
    }
    if kind == "autoencoder":
        return Dictionary(**parts, scale=0.3)
    if kind == "skip":
        return Dictionary(**parts, skip=0.2 * torch.eye(d_in), scale=0.5)
    if kind == "layer_norm":
        return Dictionary(**parts, norm="layer_norm")
    if kind == "normed skip":
        return Dictionary(**parts, norm="centre", skip=torch.randn(d_out, d_in) / 9)
    parts["centre"] = torch.randn(d_in)
    if kind == "transcoder":
        return Dictionary(**parts, scale=0.4, out_scale=1.7)
    skip = torch.randn(d_out, d_in) / 5
    return Dictionary(**parts, scale=0.4, out_scale=1.7, skip=skip)


@pytest.mark.parametrize(
    ("kind", "d_out"),
    [
        ("autoencoder", 12),
        ("skip", 12),
        ("layer_norm", 12),
        ("normed skip", 12),
        ("transcoder", 7),
        ("skip transcoder", 7),
    ],
)
def test_every_wiring_is_judged_against_its_target(kind, d_out):
    dictionary = wired(kind, d_out=d_out)
    x = torch.randn(500, 12) + 2
    y = x if d_out == 12 else torch.randn(500, 7) * 2 - 1
    found = evaluate(dictionary, zip(x.split(128), y.split(128), strict=True), d_out).result()
    z = dictionary.encode(x).dense()
    y_hat = dictionary.reconstruct(x)
    for name, value in by_formula(y, y_hat, z, 128).items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), name
    if dictionary.skip is None:
        assert found.fvu_of_skip is None
        return
    scale = dictionary.scale if dictionary.out_scale is None else dictionary.out_scale
    passed = x - x.mean(1, keepdim=True) if kind == "normed skip" else x
    passed = dictionary.scale / scale * passed @ dictionary.skip.T
    if kind == "normed skip":
        passed = passed + x.mean(1, keepdim=True)
    left = (y - passed).double()
    expected = (y - y_hat).double().pow(2).sum() / (left - left.mean(0)).pow(2).sum()
    assert found.fvu_of_skip == pytest.approx(float(expected), rel=1e-5)


def test_a_skip_with_every_latent_dead_has_explained_nothing():
    """With alpha = 0.9 the plain FVU is 0.01, which no latent has earned; it must not pass as a
    good dictionary."""
    torch.manual_seed(3)
    x = torch.randn(2000, 24) * 3 + 7
    alpha = 0.9
    dead = Dictionary(
        torch.randn(30, 24),
        torch.zeros(30),
        torch.randn(30, 24),
        (1 - alpha) * x.mean(0),
        JumpReLU(torch.full((30,), 1e9)),
        skip=alpha * torch.eye(24),
    )
    found = evaluate(dead, ((part, part) for part in x.split(300)), 24).result()
    assert found.dead_share == 1
    assert found.fvu == pytest.approx((1 - alpha) ** 2, rel=1e-4)
    assert found.fvu_of_skip == pytest.approx(1.0, rel=1e-4)


def test_a_transcoder_is_not_judged_by_its_own_input():
    torch.manual_seed(4)
    x, y = torch.randn(400, 6), torch.randn(400, 6)
    echo = Dictionary(
        torch.cat([torch.eye(6), -torch.eye(6)]),
        torch.zeros(12),
        torch.cat([torch.eye(6), -torch.eye(6)]),
        torch.zeros(6),
        JumpReLU(torch.zeros(12)),
        centre=torch.zeros(6),
    )
    assert evaluate(echo, [(x, x)], 6).result().fvu == pytest.approx(0, abs=1e-10)
    assert evaluate(echo, [(x, y)], 6).result().fvu > 1


def test_the_skip_goes_with_every_batch_or_with_none():
    y, y_hat, z = draw()
    meter = ReconstructionMeter(16, 60)
    meter.add(y, y_hat, sparse(z), y_hat)
    meter.add(y, y_hat, sparse(z))
    with pytest.raises(ValueError, match="skip_only"):
        meter.result()
