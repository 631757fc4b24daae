"""Co-activation and direction neighbours against brute force, for every pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.features import coactivation as module
from mistudio.engine.features.coactivation import (
    as_csr,
    co_activation,
    decoder_neighbours,
    pair_matrix,
    sample_codes,
)
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import InvalidInput

CONTEXT = 48
SITES = (Site.at(HookPoint("resid_post", 1)), Site.at(HookPoint("resid_post", 2)))


@pytest.fixture(scope="module")
def sae(tiny, tokens):
    """24 random latents that fire on 2 % to 50 % of tokens; the last one never."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(24, 128, generator=g)
    w /= w.norm(dim=1, keepdim=True)
    w[1] = w[0] + 0.2 * w[1]
    x = tiny.capture(tokens.train.windows(np.arange(8), CONTEXT), [SITES[0].input])
    pre = x[SITES[0].input][:, 1:].flatten(0, 1) @ w.T
    share = torch.linspace(0.5, 0.98, 24)
    threshold = torch.stack([pre[:, i].quantile(float(q)) for i, q in enumerate(share)])
    threshold = threshold.clamp_min(0)
    threshold[-1] = 1e9
    return Dictionary(w, torch.zeros(24), w, torch.zeros(128), JumpReLU(threshold))


@pytest.fixture(scope="module")
def samples(tiny, tokens, sae):
    points = tuple(site.input for site in SITES)
    medians = calibrate_medians(tiny, tokens.train, points, CONTEXT)
    found = sample_codes(
        tiny, tokens.train, dict.fromkeys(SITES, sae), medians, CONTEXT, max_tokens=2000
    )
    return found, medians


def brute(a: np.ndarray, b: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each pair by itself, from dense activations [tokens, n] and [tokens, m]."""
    shape = a.shape[1], b.shape[1]
    values = {kind: np.full(shape, np.nan) for kind in ("phi", "jaccard", "pearson")}
    together = np.zeros(shape, np.int64)
    for i, j in itertools.product(*map(range, shape)):
        x, y = a[:, i].astype(np.float64), b[:, j].astype(np.float64)
        fires_x, fires_y = x > 0, y > 0
        together[i, j] = (fires_x & fires_y).sum()
        if not fires_x.any() or not fires_y.any():
            continue
        values["phi"][i, j] = np.corrcoef(fires_x, fires_y)[0, 1]
        values["jaccard"][i, j] = together[i, j] / (fires_x | fires_y).sum()
        values["pearson"][i, j] = np.corrcoef(x, y)[0, 1]
    return values, together


def check(found, values, together, top, min_pairs, own):
    """Every row lists exactly the largest values among the pairs that count."""
    for i in range(len(values)):
        allowed = [
            j
            for j in range(values.shape[1])
            if together[i, j] >= min_pairs and not (own and i == j) and np.isfinite(values[i, j])
        ]
        want = sorted((values[i, j] for j in allowed), reverse=True)[:top]
        listed = [int(j) for j in found.index[i] if j >= 0]
        assert len(listed) == len(set(listed)) == len(want)
        assert set(listed) <= set(allowed)
        n = len(want)
        assert found.value[i, :n] == pytest.approx(want, abs=1e-5)
        assert found.value[i, :n] == pytest.approx([values[i, j] for j in listed], abs=1e-5)
        assert found.together[i, :n].tolist() == [together[i, j] for j in listed]
        assert (found.index[i, n:] == -1).all()
        assert np.isnan(found.value[i, n:]).all()


@pytest.mark.parametrize("across", [False, True])
def test_neighbours_equal_brute_force_for_every_pair(samples, monkeypatch, across):
    monkeypatch.setattr(module, "CELLS", 5 * 24)  # five rows of the table at a time
    codes = samples[0]
    a, b = codes[SITES[0]], codes[SITES[1]]
    assert a.shape == b.shape
    found = co_activation(a, b if across else None, top=6, min_pairs=10)
    values, together = brute(a.toarray(), (b if across else a).toarray())
    assert found.tokens == a.shape[0] > 1500
    assert found.fired.tolist() == (a.toarray() > 0).sum(0).tolist()
    for kind in ("phi", "jaccard", "pearson"):
        check(getattr(found, kind), values[kind], together, 6, 10, own=not across)
    assert found.phi.index[0, 0] == (0 if across else 1)
    assert (found.phi.index[-1] == -1).all()  # it never fires
    few = (together < 10) & (together > 0)
    assert few.any()  # there are pairs that are left out


def test_more_neighbours_than_latents_leaves_the_rest_empty(samples):
    found = co_activation(samples[0][SITES[0]], top=40, min_pairs=1)
    values, together = brute(*2 * [samples[0][SITES[0]].toarray()])
    check(found.pearson, values["pearson"], together, 40, 1, own=True)


def test_the_sample_is_what_the_dictionaries_say_on_the_same_tokens(tiny, tokens, sae, samples):
    codes, medians = samples
    available = tokens.train.n_windows(CONTEXT)
    order = np.unique(np.linspace(0, available - 1, 2000 // CONTEXT).astype(np.int64))
    ids = tokens.train.windows(order, CONTEXT)
    points = [site.input for site in SITES]
    captured = tiny.capture(ids, points)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    mask &= ~torch.isin(ids, torch.tensor(tokens.meta.special_ids))
    for point in points:
        mask &= captured[point].norm(dim=-1) <= 10 * medians[point]
    for site in SITES:
        pre = captured[site.input][mask] @ sae.encoder.T
        want = pre * (pre > sae.activation.threshold)
        assert np.allclose(codes[site].toarray(), want, atol=1e-4)


def test_rows_of_other_tokens_are_refused(samples):
    a = samples[0][SITES[0]]
    with pytest.raises(ValueError, match="same tokens"):
        co_activation(a, csr_array(a[:-1]))


def test_codes_become_the_same_table():
    g = torch.Generator().manual_seed(2)
    w = torch.randn(9, 16, generator=g)
    d = Dictionary(w, torch.zeros(9), w, torch.zeros(16), JumpReLU(torch.full((9,), 2.0)))
    codes = d.encode(torch.randn(40, 16, generator=g))
    assert np.array_equal(as_csr(codes).toarray(), codes.dense().numpy())


@pytest.mark.parametrize("across", [False, True])
def test_direction_neighbours_equal_brute_force(monkeypatch, across):
    monkeypatch.setattr(module, "CELLS", 4 * 17)
    g = torch.Generator().manual_seed(8)
    a, b = torch.randn(17, 12, generator=g), torch.randn(11, 12, generator=g)
    a[3] = 0
    b[5] = 0
    other = b if across else a
    found = decoder_neighbours(a, b if across else None, top=4)
    for i in range(17):
        cosines = {
            j: float(torch.cosine_similarity(a[i], other[j], dim=0))
            for j in range(len(other))
            if a[i].any() and other[j].any() and (across or i != j)
        }
        want = sorted(cosines, key=lambda j: -cosines[j])[:4]
        assert [int(j) for j in found.index[i] if j >= 0] == want
        assert found.value[i, : len(want)] == pytest.approx([cosines[j] for j in want], abs=1e-5)


@pytest.mark.parametrize("metric", ["phi", "jaccard", "pearson", "cosine"])
def test_a_matrix_of_selected_features_holds_every_pair(samples, sae, metric):
    codes = samples[0][SITES[0]]
    features = [5, 0, 23, 1, 12, 5]
    found = pair_matrix(metric, features, codes, sae.decoder)
    assert found.features == (5, 0, 23, 1, 12)
    dense = codes.toarray()[:, list(found.features)]
    values, together = brute(dense, dense)
    if metric == "cosine":
        rows = sae.decoder[list(found.features)]
        want = torch.cosine_similarity(rows[:, None], rows[None], dim=2).numpy()
    else:
        want = values[metric]
        assert np.isnan(found.values[2]).all()  # 23 never fires
    assert np.allclose(found.values, want, atol=1e-5, equal_nan=True)
    assert np.array_equal(found.together, together)
    assert found.tokens == codes.shape[0]
    assert sorted(found.order) == [0, 1, 2, 3, 4]


def test_alike_features_stand_side_by_side():
    generator = np.random.default_rng(0)
    base = generator.random((300, 3)) < 0.2
    groups = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    dense = np.stack([base[:, g] & (generator.random(300) < 0.9) for g in groups], axis=1)
    found = pair_matrix("phi", range(9), csr_array(dense.astype(np.float32)))
    ordered = [groups[i] for i in found.order]
    assert sum(a != b for a, b in itertools.pairwise(ordered)) == 2


def test_selections_that_make_no_matrix_are_refused(samples):
    codes = samples[0][SITES[0]]
    with pytest.raises(InvalidInput, match="201 different"):
        pair_matrix("phi", range(201), csr_array((5, 300), dtype=np.float32))
    with pytest.raises(InvalidInput, match="1 different"):
        pair_matrix("phi", [3, 3], codes)
    with pytest.raises(InvalidInput, match="Unknown measure"):
        pair_matrix("pmi", [1, 2], codes)
