"""The loss with a dictionary spliced in, against plain computations on the same model.

Compared once by hand with SAELens 6.54.12's `get_downstream_reconstruction_metrics`, on the data
and the dictionary described in `test_metrics.py`. Ours | theirs: ce_clean 3.0176069 | 3.0176072,
ce_sae 3.0342268 | 3.0342264. ce_zero 10.18782 | 10.80267, hence ce_loss_score .99768 | .99787:
theirs zeroes the first position of each window too, where the attention sink is; zeroing all
positions gives 10.80267 here as well. kl .09180 | .09159: theirs also counts the last position,
which predicts nothing. The formulas of ce_loss_score and kl_score are the same.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae import loss
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.loss import loss_recovered
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible, InvalidInput

POINT = HookPoint("resid_post", 1)
MLP = Site.across_mlp(HookPoint("mlp_in", 1))
CONTEXT = 64
MAX_TOKENS = 1024


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


def random_weights(wiring, d=128, m=300):
    """A dictionary of each wiring that does some harm, but less than zero ablation."""
    generator = torch.Generator().manual_seed(5)
    encoder = torch.randn(m, d, generator=generator) / d**0.5
    found = Dictionary(encoder, torch.zeros(m), 0.5 * encoder, torch.zeros(d), TopK(60))
    if wiring == "skip":
        return replace(found, skip=0.3 * torch.eye(d), scale=0.7)
    if wiring in ("transcoder", "skip transcoder"):
        found = replace(found, centre=torch.zeros(d), scale=0.7, out_scale=1.4)
    if wiring == "skip transcoder":
        return replace(found, skip=torch.randn(d, d, generator=generator) / d)
    return found


@pytest.fixture(scope="module")
def medians(tiny, tokens):
    return calibrate_medians(tiny, tokens.heldout, (POINT, *MLP.points), CONTEXT)


@pytest.fixture(scope="module")
def ids(tokens):
    available = tokens.heldout.n_windows(CONTEXT)
    n = min(available, MAX_TOKENS // CONTEXT)
    chosen = np.unique(np.linspace(0, available - 1, n).astype(int))
    return tokens.heldout.windows(chosen, CONTEXT)


def measure(tiny, tokens, medians, dictionary, site=POINT, **options):
    return loss_recovered(
        tiny,
        tokens.heldout,
        site,
        dictionary,
        medians,
        **{"context": CONTEXT, "max_tokens": MAX_TOKENS, **options},
    )


def counted_by_hand(tiny, tokens, medians, ids, points):
    mask = ~torch.isin(ids, torch.tensor(tokens.heldout.meta.special_ids))
    mask[:, 0] = False
    for point, x in tiny.capture(ids, points).items():
        mask &= x.norm(dim=-1) <= 10 * medians[point]
    return mask


def log_p_with(tiny, ids, module, change):
    """log p of every next token with `change(inputs, outputs)` as the module's output, by a hook
    of PyTorch's own."""

    def hook(_module, args, output):
        if isinstance(output, tuple):
            return (change(args[0], output[0]), *output[1:])
        return change(args[0], output)

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return tiny.model(ids).logits.double().log_softmax(-1)[:, :-1]
    finally:
        handle.remove()


def by_formula(tiny, tokens, medians, ids, dictionary, site):
    """Everything at once in float64: (numbers, differences of loss, counted predictions)."""
    layer = tiny.model.model.layers[1]
    module = layer.mlp if site.is_transcoder else layer
    mask = counted_by_hand(tiny, tokens, medians, ids, site.points)
    y = tiny.capture(ids, [site.output])[site.output]

    def put(rows):
        return torch.where(mask[..., None], rows, y)

    def spliced(x, y):
        rows = x if site.is_transcoder else y
        return put(dictionary.reconstruct(rows.flatten(0, 1)).view_as(y))

    log_p = {
        "clean": log_p_with(tiny, ids, module, lambda _, y: y),
        "sae": log_p_with(tiny, ids, module, spliced),
        "zero": log_p_with(tiny, ids, module, lambda _, y: put(torch.zeros_like(y))),
        "mean": log_p_with(tiny, ids, module, lambda _, y: put(y[mask].mean(0).expand_as(y))),
    }
    here = mask[:, :-1]
    losses = {name: -lp.gather(2, ids[:, 1:, None])[..., 0] for name, lp in log_p.items()}
    ce = {name: float(values[here].mean()) for name, values in losses.items()}
    clean = log_p["clean"]
    kl = {
        name: float((clean.exp() * (clean - log_p[name])).sum(-1)[here].mean())
        for name in ("sae", "zero")
    }
    numbers = {
        **{f"ce_{name}": value for name, value in ce.items()},
        "tokens": int(here.sum()),
        "ce_increase": ce["sae"] - ce["clean"],
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_loss_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl": kl["sae"],
        "kl_zero": kl["zero"],
        "kl_score": (kl["zero"] - kl["sae"]) / kl["zero"],
        "ce_windows": len(ids),
        "ce_mean_tokens": int(mask.sum()),
    }
    return numbers, losses["sae"] - losses["clean"], here


@pytest.mark.parametrize("wiring", ["autoencoder", "skip", "transcoder", "skip transcoder"])
def test_every_number_equals_a_plain_computation(tiny, tokens, medians, ids, wiring):
    dictionary = random_weights(wiring)
    site = MLP if "transcoder" in wiring else Site.at(POINT)
    found = measure(tiny, tokens, medians, dictionary, site)
    expected, _, _ = by_formula(tiny, tokens, medians, ids, dictionary, site)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert found.ce_clean < found.ce_sae
    assert found.kl > 0
    assert found.ce_mean_tokens > found.tokens > 500


def test_a_transcoder_reads_the_mlps_input(tiny, tokens, medians):
    """One that hands its input on as the MLP's output is not the model."""
    found = measure(tiny, tokens, medians, identity(), MLP)
    assert found.ce_increase > 0.1
    echo = measure(tiny, tokens, medians, identity(), MLP.output)
    assert echo.ce_increase == pytest.approx(0.0, abs=1e-4)


def test_a_perfect_dictionary_recovers_all_of_the_loss(tiny, tokens, medians):
    found = measure(tiny, tokens, medians, identity())
    assert found.ce_sae == pytest.approx(found.ce_clean, abs=1e-4)
    assert found.ce_loss_score == pytest.approx(1.0, abs=1e-3)
    assert found.kl == pytest.approx(0.0, abs=1e-5)
    assert found.kl_score == pytest.approx(1.0, abs=1e-3)


def test_an_empty_dictionary_recovers_none(tiny, tokens, medians):
    for site in (POINT, MLP):
        found = measure(tiny, tokens, medians, nothing(), site)
        assert found.ce_sae == pytest.approx(found.ce_zero, abs=1e-4)
        assert found.ce_loss_score == pytest.approx(0.0, abs=1e-4)
        assert found.kl == pytest.approx(found.kl_zero, abs=1e-4)
        assert found.kl_score == pytest.approx(0.0, abs=1e-4)
        assert min(found.ce_zero, found.ce_mean) > found.ce_clean


def test_outliers_of_either_point_are_left_alone(tiny, tokens, medians, ids):
    """At the output too: its massive activations are not the transcoder's to make."""
    output = tiny.capture(ids, [MLP.output])[MLP.output].norm(dim=-1)
    strict = {**medians, MLP.output: float(output.quantile(0.7)) / 10}
    found = measure(tiny, tokens, strict, random_weights("transcoder"), MLP)
    mask = counted_by_hand(tiny, tokens, strict, ids, MLP.points)
    assert found.tokens == int(mask[:, :-1].sum())
    assert found.tokens < 0.8 * measure(tiny, tokens, medians, nothing(), MLP).tokens


def test_one_median_will_do_for_one_point(tiny, tokens, medians):
    alone = measure(tiny, tokens, medians[POINT], random_weights("autoencoder"))
    assert alone == measure(tiny, tokens, medians, random_weights("autoencoder"))


def test_the_error_of_the_increase_is_that_of_windows(tiny, tokens, medians, ids):
    dictionary = random_weights("autoencoder")
    found = measure(tiny, tokens, medians, dictionary)
    site = Site.at(POINT)
    _, difference, here = by_formula(tiny, tokens, medians, ids, dictionary, site)
    sums = (difference * here).sum(1).numpy()
    counts = here.sum(1).numpy()
    residuals = sums - counts * sums.sum() / counts.sum()
    error = np.std(residuals, ddof=1) * len(ids) ** 0.5 / counts.sum()
    assert found.ce_increase_error == pytest.approx(error, rel=1e-3)
    lone = measure(tiny, tokens, medians, dictionary, max_tokens=CONTEXT)
    assert lone.ce_windows == 1
    assert lone.as_dict()["ce_increase_error"] is None


class Softmaxes(TorchDispatchMode):
    """Notes the size of every softmax."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "softmax" in str(func):
            self.sizes.append(out.numel())
        return out


def test_wide_vocabularies_are_taken_in_pieces(tiny, tokens, medians, monkeypatch):
    whole = measure(tiny, tokens, medians, random_weights("autoencoder"))
    cells = 3 * CONTEXT * tiny.vocab_size
    monkeypatch.setattr(loss, "LOGIT_CELLS", cells + 1)
    monkeypatch.setattr(loss, "CHUNK_CELLS", 7 * tiny.vocab_size)
    sizes = []

    def note(_module, _args, output):
        if output.logits is not None:
            sizes.append(output.logits.numel())

    handle = tiny.model.register_forward_hook(note)
    try:
        with Softmaxes() as softmaxes:
            pieces = measure(tiny, tokens, medians, random_weights("autoencoder"))
    finally:
        handle.remove()
    assert max(sizes) == cells
    # Those of the vocabulary: the model's attention is one fused operation.
    assert max(softmaxes.sizes) == 7 * tiny.vocab_size
    for name, value in whole.as_dict().items():
        assert getattr(pieces, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_progress_is_told_of_every_window(tiny, tokens, medians, ids):
    class Watch:
        checks, reports = 0, ()

        def check(self):
            self.checks += 1

        def report(self, done, total=None, phase=None, **metrics):
            self.reports += ((done, total),)

    watch = Watch()
    measure(tiny, tokens, medians, nothing(), progress=watch, batch_windows=8)
    assert watch.reports == ((8, len(ids)), (len(ids), len(ids)))
    assert watch.checks >= 5 * len(watch.reports)  # before every forward pass


def test_results_are_strict_json_even_where_a_score_has_no_value(tiny, tokens, medians):
    found = measure(tiny, tokens, medians, identity())
    text = json.dumps(replace(found, ce_loss_score=float("nan")).as_dict(), allow_nan=False)
    assert json.loads(text)["ce_loss_score"] is None


def test_what_does_not_fit_is_refused(tiny, tokens, medians):
    with pytest.raises(Incompatible, match="does not fit"):
        measure(tiny, tokens, medians, identity(64))
    wide = replace(identity(), decoder=torch.zeros(256, 64), b_dec=torch.zeros(64))
    with pytest.raises(Incompatible, match="64"):
        measure(tiny, tokens, medians, wide, MLP)
    with pytest.raises(ValueError, match="only after"):
        measure(tiny, tokens, medians, identity(), Site(MLP.output, MLP.input))
    with pytest.raises(InvalidInput, match="Too little text"):
        measure(tiny, tokens, medians, identity(), context=10**6)
    with pytest.raises(InvalidInput, match="Nothing to measure"):
        measure(tiny, tokens, 0.0, identity())
