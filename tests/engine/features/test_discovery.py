"""Discovery against brute force: exact top examples, densities, spans, logit lens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from mistudio.engine.activations.source import calibrate_medians, token_rows
from mistudio.engine.features.describe import background, describe, search, showcase, uses_of_words
from mistudio.engine.features.discovery import RADIUS, discover
from mistudio.engine.features.logit_lens import logit_lens
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary

POINT = HookPoint("resid_post", 2)
CONTEXT, TOP = 64, 5


@pytest.fixture(scope="module")
def median(tiny, tokens):
    return calibrate_medians(tiny, tokens.train, (POINT,), CONTEXT)[POINT]


@pytest.fixture(scope="module")
def dictionary(tiny, tokens, median):
    """Random directions with thresholds at different densities; the last latent never fires."""
    g = torch.Generator().manual_seed(1)
    m = 30
    encoder = torch.randn(m, 128, generator=g)
    encoder /= encoder.norm(dim=1, keepdim=True)
    sample = next(rows_of(tiny, tokens, median)).activations
    pre = sample @ encoder.T
    quantiles = torch.linspace(0.5, 0.995, m)
    threshold = torch.stack([pre[:, i].quantile(q) for i, q in enumerate(quantiles)]).clamp_min(0)
    threshold[-1] = 1e9
    return Dictionary(
        encoder, torch.zeros(m), encoder.clone(), torch.zeros(128), JumpReLU(threshold)
    )


def rows_of(tiny, tokens, median, batch_windows=8):
    n = tokens.train.n_windows(CONTEXT)
    return token_rows(tiny, tokens.train, POINT, median, np.arange(n), CONTEXT, batch_windows)


@pytest.fixture(scope="module")
def store(tiny, tokens, median, dictionary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    discover(
        rows_of(tiny, tokens, median),
        dictionary,
        tokens.train,
        folder,
        model=tiny,
        hook_point=POINT,
        context=CONTEXT,
        total_tokens=1,
        top_k=TOP,
    )
    return FeatureStore(folder)


@pytest.fixture(scope="module")
def everything(tiny, tokens, median, dictionary):
    """feature -> [(value, window, position)] over all counted tokens, and the token count."""
    found, n = defaultdict(list), 0
    for chunk in rows_of(tiny, tokens, median):
        pre = chunk.activations @ dictionary.W_enc
        dense = (pre * (pre > dictionary.activation.threshold)).numpy()
        n += len(dense)
        for i, f in zip(*np.nonzero(dense), strict=True):
            found[int(f)].append(
                (float(dense[i, f]), int(chunk.windows[i]), int(chunk.positions[i]))
            )
    return found, n


def test_top_examples_equal_brute_force(store, everything):
    found, _ = everything
    for feature in range(len(store)):
        best = {}
        for value, window, position in found[feature]:
            if window not in best or value > best[window][0]:
                best[window] = (value, window, position)
        want = sorted(best.values(), key=lambda e: (-e[0], e[1]))[:TOP]
        got = [
            (
                float(store.top["value"][feature, i]),
                int(store.top["window"][feature, i]),
                int(store.top["position"][feature, i]),
            )
            for i in range(store.n_examples(feature))
        ]
        assert [e[1:] for e in got] == [e[1:] for e in want], feature
        assert [e[0] for e in got] == pytest.approx([e[0] for e in want], rel=1e-5)


def test_densities_and_moments_equal_brute_force(store, everything):
    found, n = everything
    assert store.meta.tokens == n
    for feature in range(len(store)):
        values = np.asarray([e[0] for e in found[feature]])
        windows = {e[1] for e in found[feature]}
        column = {name: float(store.columns[name][feature]) for name in store.columns}
        assert column["density"] == pytest.approx(len(values) / n, rel=1e-5)
        assert column["context_density"] == pytest.approx(
            len(windows) / store.meta.contexts, rel=1e-5
        )
        if len(values):
            assert column["max_activation"] == pytest.approx(values.max(), rel=1e-5)
            assert column["mean_activation"] == pytest.approx(values.mean(), rel=1e-5)
            assert column["std_activation"] == pytest.approx(values.std(), rel=1e-3, abs=1e-5)


def test_the_size_of_the_batches_does_not_matter(tiny, tokens, median, dictionary, store, tmp_path):
    discover(
        rows_of(tiny, tokens, median, batch_windows=3),
        dictionary,
        tokens.train,
        tmp_path,
        model=tiny,
        hook_point=POINT,
        context=CONTEXT,
        total_tokens=1,
        top_k=TOP,
    )
    other = FeatureStore(tmp_path)
    assert np.array_equal(other.top["window"], store.top["window"])
    assert np.array_equal(other.top["position"], store.top["position"])
    assert np.allclose(other.columns["density"], store.columns["density"])


def test_spans_hold_the_activations_around_the_peak(store, tokens, everything):
    found, _ = everything
    checked = 0
    for feature in range(0, len(store) - 1, 4):
        by_place = {(w, p): v for v, w, p in found[feature]}
        for example in store.examples(feature, tokens.train):
            assert (
                example.ids[example.peak]
                == tokens.train.windows([example.window], CONTEXT)[0, example.position]
            )
            first = example.position - example.peak
            for offset, value in enumerate(example.activations):
                want = by_place.get((example.window, first + offset), 0.0)
                assert float(value) == pytest.approx(want, rel=2e-3, abs=1e-3)
                checked += 1
            assert len(example.ids) <= 2 * RADIUS + 1
    assert checked > 500


def test_position_zero_is_never_an_example(store, tokens):
    special = set(tokens.train.meta.special_ids)
    for feature in range(len(store)):
        for example in store.examples(feature, tokens.train):
            assert example.position > 0
            assert int(example.ids[example.peak]) not in special


def test_a_silent_latent_has_nothing(store, tokens):
    last = len(store) - 1
    assert not store.alive[last]
    assert store.examples(last, tokens.train) == []
    assert store.columns["top_token"][last] == -1


def test_top_token_is_the_most_common_peak(store, tokens):
    for feature in range(0, len(store) - 1, 5):
        peaks = [int(e.ids[e.peak]) for e in store.examples(feature, tokens.train)]
        token = int(store.columns["top_token"][feature])
        assert peaks.count(token) == max(map(peaks.count, peaks))
        assert store.columns["top_token_share"][feature] == pytest.approx(
            peaks.count(token) / len(peaks)
        )


def test_logit_lens_is_the_final_norm_and_unembedding(tiny, dictionary, store):
    model = tiny.model
    gain = model.model.norm.weight
    logits = (dictionary.decoder * gain) @ model.lm_head.weight.T
    logits = logits - logits.mean(1, keepdim=True)
    ids, values = logit_lens(tiny, dictionary.decoder, top=10)
    want = logits.topk(10, dim=1)
    assert torch.allclose(values[:, 0], want.values, atol=1e-4)
    assert torch.equal(ids[:, 0].long(), want.indices)
    assert torch.allclose(values[:, 1], logits.topk(10, dim=1, largest=False).values, atol=1e-4)
    assert store.promoted(3)[0][0] == int(want.indices[3, 0])
    assert store.suppressed(3)[0][1] == pytest.approx(float(logits[3].min()), abs=1e-4)


def test_descriptions_name_what_examples_share(store, tokens, tiny_tokenizer):
    common = background(tokens.train, tiny_tokenizer, CONTEXT)
    for feature in range(len(store) - 1):
        examples = store.examples(feature, tokens.train)
        found = describe(examples, tiny_tokenizer, common)
        assert found.n == len(examples)
        assert 0 < found.share <= 1
        if found.kind == "token":
            peaks = [tiny_tokenizer.decode([int(e.ids[e.peak])]).strip().lower() for e in examples]
            assert found.text.strip('"') in peaks
    assert describe([], tiny_tokenizer, common) is None


def test_search_finds_promoted_tokens(store, tiny_tokenizer):
    word = tiny_tokenizer.decode([store.promoted(7)[0][0]]).strip()
    found = search(store, tiny_tokenizer, word, range(len(store)))
    assert 7 in found
    assert search(store, tiny_tokenizer, "no such token at all", range(len(store))) == []


def test_showcase_picks_only_features_with_examples(store, tokens, tiny_tokenizer):
    for feature, description in showcase(store, tokens.train, tiny_tokenizer, n=5):
        assert store.n_examples(feature) >= 5
        assert description.share > 0


def test_uses_of_words_counts_forms_of_a_word():
    words = ("building", "king")
    assert uses_of_words("The King builds buildings; kingdoms fall. Asking.", words) == 4
    assert uses_of_words("nothing here", words) == 0
