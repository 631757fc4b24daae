"""Features on show: what a rule tells most surely, topics first."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from planted_store import NOISE, PAIR, TOKEN, TOPIC

from mistudio.engine.features.rules import BY_NAME
from mistudio.engine.features.score import INTERPRETABLE
from mistudio.engine.features.showcase import showcase, uses_of_words
from mistudio.engine.features.store import FeatureStore, add_arrays


def kept(store, scores, folder):
    shutil.copytree(store.folder, folder)
    add_arrays(folder, scores.arrays())
    return FeatureStore(folder)


def test_the_most_telling_come_first(planted_run, planted_scores, tmp_path):
    store, _, vocabulary, _ = planted_run
    found = showcase(kept(store, planted_scores, tmp_path / "store"), vocabulary, n=8)
    assert len(found) == 8
    assert {feature for feature, _ in found[:3]} == {TOKEN, PAIR, TOPIC}
    lows = [shown.low for _, shown in found]
    assert lows == sorted(lows, reverse=True)
    for feature, shown in found:
        assert shown.text == planted_scores.description(feature, vocabulary)
        assert shown.accuracy == pytest.approx(planted_scores.accuracy[feature])
        assert shown.contexts == planted_scores.tried[feature]
    everything = showcase(FeatureStore(tmp_path / "store"), vocabulary, n=10_000)
    assert len(everything) == int((~np.isnan(planted_scores.accuracy)).sum())


def test_topics_come_before_single_words(planted_run, planted_scores, tmp_path):
    store, _, vocabulary, _ = planted_run
    first, _, last = sorted((TOKEN, PAIR, TOPIC), key=lambda f: -planted_scores.low[f])
    counts = np.asarray(store.array("token_counts"))
    seldom = [int(vocabulary.word[t]) for t in np.argsort(counts, kind="stable")[:200]]
    seldom = [code for code in dict.fromkeys(seldom) if code > 0][:2]
    often = int(vocabulary.word[int(np.argmax(np.where(vocabulary.word[:-1] > 0, counts, 0)))])
    family, members = planted_scores.rules.family.copy(), planted_scores.rules.members.copy()
    family[[first, last, NOISE]] = BY_NAME["topic"]
    members[[first, last, NOISE]] = 0
    members[first, :2] = (seldom[0], often)  # an everyday word: no topic
    members[[last, NOISE], :2] = seldom
    rules = replace(planted_scores.rules, family=family, members=members)
    scores = replace(planted_scores, rules=rules)
    found = showcase(kept(store, scores, tmp_path / "store"), vocabulary, n=3)
    assert found[0][0] == last  # and not the noise, whose topic tells nothing
    assert found[0][1].family == "topic" and len(found[0][1].words) >= 2
    assert found[0][1].low >= INTERPRETABLE
    assert {feature for feature, _ in found} == {TOKEN, PAIR, TOPIC}


def test_a_discovery_without_scores_has_nothing_on_show(planted_run):
    store, _, vocabulary, _ = planted_run
    assert showcase(store, vocabulary) == []


def test_words_are_counted_by_their_beginnings():
    assert uses_of_words("He builds buildings. Built", ["building"]) == 2
    assert uses_of_words("Nothing here", ["building"]) == 0
