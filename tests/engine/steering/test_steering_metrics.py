"""The figures beside two texts, against computations that share nothing with ours."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.interventions import (
    FeatureEdit,
    SiteSteering,
    Variant,
    adding,
    wanted,
)
from mistudio.engine.steering.metrics import (
    divergences,
    effectiveness,
    reactivation,
    share_among,
    steering_effect,
    word_cosine,
    word_jaccard,
)

POINT = HookPoint("resid_post", 2)
PROMPT, PLAIN, STEERED = [9, 40, 41, 42, 43], [30, 41, 52, 63], [30, 99, 120, 120, 77]


@pytest.fixture(scope="module")
def dictionary(tiny):
    g = torch.Generator().manual_seed(4)
    encoder = torch.randn(64, 128, generator=g) / 10
    return Dictionary(
        encoder, torch.zeros(64), torch.randn(64, 128, generator=g), torch.zeros(128), TopK(8)
    )


@pytest.fixture(scope="module")
def vector(tiny):
    norm = tiny.capture(torch.tensor([PROMPT]), [POINT])[POINT][0, 1:].norm(dim=1).median()
    v = torch.randn(128, generator=torch.Generator().manual_seed(6))
    return v / v.norm() * norm


def distributions(tiny, text, vector=None):
    """float64 log-probabilities [len(text), vocab] before each token, by a plain torch hook."""
    handle = None
    if vector is not None:

        def add(module, args, output):
            return torch.cat([output[:, :1], output[:, 1:] + vector], dim=1)

        handle = tiny.model.model.layers[POINT.layer].register_forward_hook(add)
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([PROMPT + text])).logits[0].numpy().astype(np.float64)
    if handle is not None:
        handle.remove()
    logits = logits[len(PROMPT) - 1 : -1]
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - (logits.max(1, keepdims=True))
    )


def test_kl_and_perplexity_are_an_independent_computations_to_1e_4(tiny, vector) -> None:
    found = steering_effect(tiny, adding(POINT, vector), PROMPT, PLAIN, STEERED, "a", "b", [0, 1])
    base, steered = distributions(tiny, STEERED), distributions(tiny, STEERED, vector)
    kl = (np.exp(steered) * (steered - base)).sum(1)
    assert min(kl) > 0.01
    np.testing.assert_allclose(found.kl_by_token, kl, rtol=0, atol=1e-4)
    assert found.kl_per_token == pytest.approx(kl.mean(), abs=1e-4)
    nll = -base[range(len(STEERED)), STEERED].mean()
    plain = -distributions(tiny, PLAIN)[range(len(PLAIN)), PLAIN].mean()
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert found.perplexity_unsteered == pytest.approx(math.exp(plain), rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp(nll - plain), rel=1e-4)


def test_divergences_can_be_held_against_another_steering(tiny, vector) -> None:
    one, other = adding(POINT, vector), adding(POINT, -0.5 * vector)
    (found,) = divergences(tiny, [one], PROMPT, [STEERED], [0, 1], against=other)
    p, q = distributions(tiny, STEERED, vector), distributions(tiny, STEERED, -0.5 * vector)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.nll, -q[range(5), STEERED], rtol=0, atol=1e-4)
    (same,) = divergences(tiny, [one], PROMPT, [STEERED], [0, 1], against=one)
    assert max(same.kl) == 0


def test_reactivation_is_the_mean_over_generated_tokens_under_the_unsteered_model(
    tiny, dictionary
) -> None:
    special = [120]
    x = tiny.capture(torch.tensor([PROMPT + STEERED]), [POINT])[POINT][0]
    busy = dictionary.encode(x[-4:]).dense().sum(0).topk(2).indices.tolist()
    found = reactivation(tiny, dictionary, POINT, busy, PROMPT, [PLAIN, STEERED, [120]], special)
    for text, means in zip((PLAIN, STEERED), found, strict=False):
        ids = PROMPT + text
        x = tiny.capture(torch.tensor([ids]), [POINT])[POINT][0]
        dense = dictionary.encode(x).dense()
        counted = [i for i in range(len(PROMPT), len(ids)) if ids[i] != 120]
        for feature, mean in zip(busy, means, strict=True):
            assert mean == pytest.approx(float(dense[counted, feature].mean()), abs=1e-5)
    assert max(max(means) for means in found[:2]) > 0
    assert all(math.isnan(mean) for mean in found[2])


def test_a_steering_that_reads_the_prompt_does_not_change_what_is_reactivated(
    tiny, dictionary
) -> None:
    """The features are read where nothing is steered, whatever steered the text."""
    edit = FeatureEdit(3, 5.0, 1.0, "clamp")
    variant = Variant((SiteSteering(Site.at(POINT), dictionary, (edit,)),))
    before = reactivation(tiny, dictionary, POINT, [3], PROMPT, [STEERED], [])
    divergences(tiny, [variant], PROMPT, [STEERED], [])
    assert reactivation(tiny, dictionary, POINT, [3], PROMPT, [STEERED], []) == before


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0.5, 1.0, 1.0), 3 / (2 + 1 + 1)),
        ((2.0, 1.5, 1.0), 1.0),  # each counts 1 at most
        ((0.5, 0.8, 6.0), 3 / (2 + 1.25 + 2)),
        ((-0.1, 1.0, 1.0), 0.0),
        ((0.0, 1.0, 1.0), 0.0),
    ],
)
def test_effectiveness_is_the_harmonic_mean_of_its_three_parts(parts, expected) -> None:
    assert effectiveness(*parts) == pytest.approx(expected)


def test_effectiveness_is_unknown_where_a_part_is() -> None:
    assert math.isnan(effectiveness(0.5, math.nan, 1.0))


@pytest.mark.parametrize(
    ("method", "strength", "direction"),
    [
        ("add", 2.0, 1), ("add", -2.0, -1), ("add", 0.0, 0),
        ("clamp", 1.0, 1), ("clamp", 0.0, -1), ("clamp_min", 1.0, 1),
        ("scale", 2.0, 1), ("scale", 0.5, -1), ("scale", 1.0, 0),
        ("orthogonal", 0.0, -1), ("ablate", 1.0, -1), ("cap", 1.0, -1),
    ],
)  # fmt: skip
def test_what_an_edit_wants(method: str, strength: float, direction: int) -> None:
    assert wanted(FeatureEdit(1, strength, 2.0, method)) == direction


def test_own_tokens_are_counted_among_all() -> None:
    assert share_among([5, 6, 5, 7], {5, 9}) == 0.5
    assert math.isnan(share_among([], {5}))


def test_similarity_and_overlap_are_what_their_tooltips_say() -> None:
    """Cosine of word counts; words in both of words in either; whatever case and signs."""
    a, b = "The cat sat on the mat.", "THE cat — the cat! isn't on a sofa"
    x = Counter(["the", "cat", "sat", "on", "the", "mat"])
    y = Counter(["the", "cat", "the", "cat", "isn't", "on", "a", "sofa"])
    vocabulary = sorted({*x, *y})
    u, v = (np.array([c[w] for w in vocabulary], float) for c in (x, y))
    cosine = float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert word_cosine(a, b) == pytest.approx(cosine)
    assert word_jaccard(a, b) == pytest.approx(len({*x} & {*y}) / len({*x} | {*y}))
