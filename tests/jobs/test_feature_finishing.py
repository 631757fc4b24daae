"""What a discovery leaves beside its pass: neighbours, scores, an index to search in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistudio.engine.features.columns import ANALYSES
from mistudio.engine.features.rules import Vocabulary
from mistudio.engine.features.score import INTERPRETABLE, rule_descriptions, score_store
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.loading import load_tokenizer
from mistudio.engine.sae.files import load_sae
from mistudio.jobs.features import newest_run, open_features
from mistudio.library.feature_index import FILE, FeatureIndex
from mistudio.library.library import Library


@pytest.fixture
def store(library: Library) -> FeatureStore:
    return open_features(library, newest_run(library, library.saes.all()[0].id))[0]


def test_every_column_is_there(store: FeatureStore) -> None:
    assert {column.name for column in ANALYSES} <= set(store.columns)


def test_the_nearest_direction_is_that_of_the_largest_cosine(
    library: Library, store: FeatureStore
) -> None:
    (sae,) = library.saes.all()
    decoder = load_sae(library.path(sae.folder)).dictionary.decoder
    unit = torch.nn.functional.normalize(decoder.double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-1).numpy()
    np.testing.assert_allclose(store.columns["nearest_cosine"], cosines.max(1), atol=1e-5)
    nearest = np.asarray(store.columns["nearest_feature"])
    rows = np.arange(len(nearest))
    np.testing.assert_allclose(cosines[rows, nearest], cosines.max(1), atol=1e-5)
    ids, values = store.array("neighbour_ids"), store.array("neighbour_cosines")
    np.testing.assert_array_equal(ids[:, 0], nearest)
    assert (np.diff(values, axis=1) <= 0).all()


def test_scores_descriptions_and_counts_are_those_of_the_engine(
    library: Library, store: FeatureStore
) -> None:
    run = newest_run(library, library.saes.all()[0].id)
    _, tokens = open_features(library, run)
    record = library.models.get(library.saes.all()[0].model_id)
    tokenizer = load_tokenizer(library.path(record.folder))
    vocabulary = Vocabulary.of(tokenizer, max(tokens.meta.vocab_size, len(tokenizer)))
    scores = score_store(store, tokens, vocabulary)
    np.testing.assert_allclose(store.columns["score_low"], scores.low, rtol=1e-6)
    assert run.summary["scored"] == (~np.isnan(scores.low)).sum() > 0
    assert run.summary["interpretable"] == (scores.low >= INTERPRETABLE).sum()

    index = FeatureIndex(store.folder / FILE)
    texts = list(rule_descriptions(store, scores, vocabulary))
    assert any(texts) and [store.description(i) for i in range(len(store))] == texts
    for feature, text in enumerate(texts):
        assert not text or feature in index.search(text.replace("\ufffd", ""), ("description",))


def test_the_text_of_top_examples_is_found(library: Library, store: FeatureStore) -> None:
    run = newest_run(library, library.saes.all()[0].id)
    _, tokens = open_features(library, run)
    record = library.models.get(library.saes.all()[0].model_id)
    tokenizer = load_tokenizer(library.path(record.folder))
    index = FeatureIndex(store.folder / FILE)
    for feature in np.flatnonzero(store.alive)[:20].tolist():
        example = store.examples(feature, tokens, 1)[0]
        text = tokenizer.decode(example.ids[max(0, example.peak - 8) : example.peak + 8])
        word = max(text.split()[1:-1], key=len, default="")
        assert not word or feature in index.search(word, ("context",))
    dead = np.flatnonzero(~store.alive)
    everything = index.search("e", ("context", "tokens", "logits"))
    assert not set(dead.tolist()) & set(everything.tolist())
