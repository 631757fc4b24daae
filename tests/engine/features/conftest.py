"""What several tests of features look at."""

from __future__ import annotations

import planted_store
import pytest


@pytest.fixture(scope="session")
def planted_run(tiny, tokens, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "store"
    return planted_store.planted_store(tiny, tiny_tokenizer, tokens, folder)


@pytest.fixture(scope="session")
def planted_scores(planted_run, tokens):
    """Of all its features."""
    from mistudio.engine.features.score import score_store

    store, _, vocabulary, _ = planted_run
    return score_store(store, tokens.train, vocabulary)
