"""The embedding scorer: what whole contexts share is found, chance and strangers score nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_store import NOISE, POINT, RARE, TOPIC

from mistudio.engine.features.embedding_score import embed, embedding_scores
from mistudio.engine.features.excerpts import excerpts
from mistudio.engine.features.score import ACTIVE, RANDOM, STRONGEST


@pytest.fixture(scope="module")
def contexts(planted_run, tokens):
    store = planted_run[0]
    return {f: excerpts(store, tokens.train, f) for f in (TOPIC, NOISE, RARE)}


def clouds(contexts, distance, generator):
    """Made-up embeddings: active contexts lie `distance` from inactive ones."""
    return {
        f: generator.standard_normal((len(found), 8))
        + distance * np.array([[e.is_active] for e in found])
        for f, found in contexts.items()
    }


def test_an_embedding_is_the_mean_activation_without_the_first_token(tiny, contexts):
    some = [*contexts[TOPIC][:20], replace(contexts[TOPIC][0], ids=contexts[TOPIC][0].ids[:1])]
    found = embed(tiny, POINT, some)
    assert found.shape == (21, tiny.width(POINT))
    for e, row in zip(some[:20], found, strict=False):
        whole = tiny.capture(torch.from_numpy(e.ids)[None], (POINT,))[POINT][0]
        assert row == pytest.approx(whole[1:].float().mean(0).numpy(), abs=1e-4)
    assert np.isnan(found[20]).all()


def test_clouds_that_lie_apart_are_told_apart(contexts):
    generator = np.random.default_rng(0)
    found = embedding_scores(contexts, clouds(contexts, 4.0, generator))
    assert set(found) == {TOPIC, NOISE}  # the rare one has too few contexts
    one = found[TOPIC]
    test = [e for e in contexts[TOPIC] if e.tried and e.kind != STRONGEST]
    assert one.active == sum(e.kind == ACTIVE for e in test)
    assert one.inactive == sum(not e.is_active for e in test)
    # Here any feature's centres tell any other's contexts: the null takes it all back.
    assert one.null > 0.95 and one.nulls == 2
    assert one.accuracy < 0.55


def test_a_feature_of_its_own_beats_its_null(contexts):
    generator = np.random.default_rng(0)
    embedded = clouds(contexts, 0.0, generator)
    active = np.array([e.is_active for e in contexts[TOPIC]])
    embedded[TOPIC][:, 0] += 4.0 * active
    found = embedding_scores(contexts, embedded)
    assert found[TOPIC].accuracy > 0.9 and found[TOPIC].low > 0.8
    assert abs(found[NOISE].accuracy - 0.5) < 0.2
    assert found[NOISE].low < 0.5 < found[NOISE].high
    assert abs(found[TOPIC].null - 0.5) < 0.2


def test_what_is_tried_has_no_part_in_the_centres(contexts):
    generator = np.random.default_rng(1)
    embedded = clouds(contexts, 0.0, generator)
    active = np.array([e.is_active for e in contexts[TOPIC]])
    sides = np.array([e.tried for e in contexts[TOPIC]])
    embedded[TOPIC][:, 0] += 4.0 * active * np.where(sides, -1, 1)  # the other way round
    assert embedding_scores(contexts, embedded)[TOPIC].accuracy < 0.55


def test_shuffled_labels_score_nothing(contexts):
    generator = np.random.default_rng(2)
    base = contexts[NOISE]
    many = {}
    for f in range(60):
        kinds = generator.permutation([e.kind for e in base])
        many[f] = [
            replace(e, kind=RANDOM if k != ACTIVE else ACTIVE)
            for e, k in zip(base, kinds, strict=True)
        ]
    embedded = {f: generator.standard_normal((len(base), 8)) for f in many}
    found = embedding_scores(many, embedded)
    assert len(found) == 60
    accuracy = np.array([one.accuracy for one in found.values()])
    assert abs(accuracy.mean() - 0.5) < 3 * accuracy.std() / len(accuracy) ** 0.5 + 0.005
    within = [one.low <= 0.5 <= one.high for one in found.values()]
    assert np.mean(within) >= 0.9
