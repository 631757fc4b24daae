"""The interpretability score: known causes are found, chance scores nothing, halves never mix."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import planted_text as planted
import pytest
from planted_store import CONTEXT, LATENTS, MEANT, NEVER, NOISE, PAIR, RARE, TOKEN, TOPIC

from mistudio.engine.features import score as module
from mistudio.engine.features.ablation import example_windows
from mistudio.engine.features.columns import SCORES, why_no_score
from mistudio.engine.features.rules import NOTHING
from mistudio.engine.features.score import (
    ACTIVE,
    EMPTY,
    HARD,
    RANDOM,
    STRONGEST,
    Scores,
    rule_descriptions,
    score_contexts,
    score_store,
    stored_contexts,
    tried,
)
from mistudio.engine.features.store import FeatureStore, add_arrays, add_columns

KNOWN = [
    planted.among(" New"),
    planted.behind(" New", " York"),
    planted.about_topic,
    planted.at_random,
]


@pytest.fixture(scope="module")
def vocabulary():
    return planted.vocabulary()


@pytest.fixture(scope="module")
def text():
    return planted.documents(500)


@pytest.fixture(scope="module")
def block(text):
    """The four known ones, and twenty that fire on a word each."""
    words = [planted.among(word) for word in planted.PLAIN[:20]]
    return planted.contexts(KNOWN + words, text)


@pytest.fixture(scope="module")
def scores(vocabulary, block):
    return score_contexts(vocabulary, [block])


def test_planted_features_are_scored_and_described_by_their_cause(scores, vocabulary):
    token, pair, topic, noise = (scores.of(i) for i in range(4))
    assert scores.description(0, vocabulary) == 'The token " New"'
    assert scores.description(1, vocabulary) == 'The last word of "new york"'
    assert scores.description(2, vocabulary).startswith("Contexts about ")
    words = scores.rules.rule(2, vocabulary).members
    assert {f" {word}" for word in words[:3]} <= set(planted.TOPIC)
    assert scores.description(3, vocabulary).startswith("No clear pattern")
    assert min(token.score, pair.score) > 0.9
    assert topic.score > 0.7
    assert noise.low < 0.5 + 0.05 and noise.score < 0.3
    assert scores.interpretable[:4].tolist() == [True, True, True, False]
    assert scores.nulls >= 200
    assert 0.45 < scores.null < 0.6
    assert token.percentile > 90 > noise.percentile


def test_a_score_is_the_balanced_accuracy_on_the_half_that_was_not_fitted(
    scores, vocabulary, block
):
    hit = scores.rules.matches(vocabulary, block.ids, block.first)
    test = tried(block.document)
    excess = max(scores.null - 0.5, 0.0)
    for i in range(len(scores)):
        active = test[i] & (block.kind[i] == ACTIVE)
        inactive = test[i] & np.isin(block.kind[i], (RANDOM, HARD))
        right = hit[i][active].mean(), 1 - hit[i][inactive].mean()
        accuracy = sum(right) / 2 - excess
        found = scores.of(i)
        assert found.accuracy == pytest.approx(accuracy)
        assert found.score == pytest.approx(np.clip(2 * accuracy - 1, 0, 1))
        assert (found.active, found.inactive) == (active.sum(), inactive.sum())
        assert found.low <= found.accuracy + 0.02
        assert found.high >= found.accuracy - 0.02
        assert found.low < found.high
        for d in range(10):
            tenth = active & (block.decile[i] == d)
            want = (hit[i][tenth].mean() + right[1]) / 2 - excess if tenth.any() else np.nan
            assert found.by_decile[d] == pytest.approx(want, nan_ok=True)


def test_what_is_tried_has_no_part_in_the_rule(scores, vocabulary, block):
    """Whatever stands in the contexts that are tried, the same rules come out."""
    spoilt = block.ids.copy()
    spoilt[:, tried(block.document)] = planted.ID[" of"]
    again = score_contexts(vocabulary, [replace(block, ids=spoilt)])
    assert np.array_equal(again.rules.family, scores.rules.family)
    assert np.array_equal(again.rules.members, scores.rules.members)
    assert np.array_equal(again.rules.fit, scores.rules.fit)
    assert not np.array_equal(again.accuracy, scores.accuracy)


def test_a_document_is_on_one_side_for_all_features():
    documents = np.arange(4000)
    sides = tried(documents)
    assert np.array_equal(tried(documents[::-1].reshape(2, -1)), sides[::-1].reshape(2, -1))
    assert 0.45 < sides.mean() < 0.55


def test_the_strongest_examples_are_fitted_on_and_never_tried(scores, vocabulary, block):
    kind = block.kind.copy()
    test = tried(block.document)
    kind[(kind == ACTIVE) & ~test] = STRONGEST
    again = score_contexts(vocabulary, [replace(block, kind=kind)])
    assert np.array_equal(again.rules.members, scores.rules.members)
    assert np.array_equal(again.active, scores.active)
    kind = np.where(block.kind == ACTIVE, STRONGEST, block.kind)
    assert np.isnan(score_contexts(vocabulary, [replace(block, kind=kind)]).accuracy).all()


def test_shuffled_labels_score_nothing(vocabulary, text):
    """Active and inactive drawn by lot: chance, for the mean and for nearly each interval."""
    words = planted.PLAIN[:45]
    block = planted.contexts([planted.among(word) for word in words], text, per_kind=30)
    generator = np.random.default_rng(5)
    kind, document = block.kind.copy(), block.document
    for i in range(block.n):
        full = np.flatnonzero(kind[i] != EMPTY)
        kind[i, full] = generator.permutation(kind[i, full])
    peak = np.where(kind == ACTIVE, np.maximum(block.peak, 12), 0)
    shuffled = replace(
        block, kind=kind, peak=peak, decile=np.zeros_like(block.decile), document=document
    )
    honest = score_contexts(vocabulary, [block])
    chance = score_contexts(vocabulary, [shuffled])
    known = ~np.isnan(chance.accuracy)
    assert known.sum() > 40
    accuracy = chance.accuracy[known]
    error = accuracy.std() / len(accuracy) ** 0.5
    assert abs(accuracy.mean() - 0.5) < 3 * error + 0.005
    within = (chance.low[known] <= 0.5) & (chance.high[known] >= 0.5)
    assert within.mean() >= 0.9
    assert not chance.interpretable.any()
    # Where they were fitted they look better than they are.
    assert chance.rules.fit[known].mean() > accuracy.mean() + 0.05
    assert honest.interpretable.mean() > 0.9


def test_too_few_contexts_give_no_score_but_a_description(vocabulary, block):
    kind = block.kind.copy()
    for i in range(len(kind)):
        kind[i, np.flatnonzero(kind[i] == ACTIVE)[19:]] = EMPTY
    kind[5, kind[5] == ACTIVE] = EMPTY
    kind[6, kind[6] != ACTIVE] = EMPTY
    found = score_contexts(vocabulary, [replace(block, kind=kind)])
    assert all(found.of(i) is None for i in range(len(found)))
    assert np.isnan(found.score).all()
    assert not found.interpretable.any()
    assert found.description(0, vocabulary) == 'The token " New"'
    assert found.description(5, vocabulary) == "Never active in this text"
    assert found.description(6, vocabulary) == "Active in nearly every context"
    assert found.null == 0.5
    assert found.contexts[:7].tolist() == [19] * 5 + [0, 19]


def test_a_missing_score_is_explained():
    assert why_no_score(0, 0.0) == "Never active in this text."
    assert why_no_score(12, 0.01) == "Active in 12 contexts only; a score takes 20."
    assert why_no_score(990, 0.99).startswith("Active in 99 % of all contexts")
    assert "documents" in why_no_score(40, 0.02)


def test_blocks_of_features_give_the_same_rules_and_accuracies(scores, vocabulary, block):
    def part(a, b):
        return replace(
            block,
            ids=block.ids[:, a:b],
            **{
                name: getattr(block, name)[a:b]
                for name in ("first", "peak", "kind", "decile", "document", "window")
            },
        )

    cut = score_contexts(vocabulary, [part(0, 11), part(11, 24)])
    # What topics are measured against is drawn anew in each block.
    same = cut.rules.family == scores.rules.family
    assert same.mean() > 0.9
    raw = cut.accuracy + max(cut.null - 0.5, 0) - scores.accuracy - max(scores.null - 0.5, 0)
    assert raw[same] == pytest.approx(0, abs=1e-9)


def test_the_same_contexts_give_the_same_scores(scores, vocabulary, block):
    again = score_contexts(vocabulary, [block])
    for name in ("accuracy", "low", "high", "percentile"):
        assert np.array_equal(getattr(again, name), getattr(scores, name))


def test_the_interval_holds_the_truth_nearly_always():
    """Rules that are right with probability 0.8: 95 % of the intervals hold 0.8; and ten right
    answers of ten are no certainty."""
    generator = np.random.default_rng(1)
    n, m = 600, 60
    active = np.tile(np.arange(m) < m // 2, (n, 1))
    right = generator.random((n, m)) < 0.8
    low, high = module.interval(right == active, active, ~active, 0)
    assert 0.92 < ((low <= 0.8) & (high >= 0.8)).mean() <= 1.0
    active = np.tile(np.arange(20) < 10, (1, 1))
    low, high = module.interval(active, active, ~active, 0)
    assert low[0] < 0.95


# --- a discovery of a planted SAE -----------------------------------------------------------------


def test_a_planted_sae_is_discovered_scored_and_described_correctly(planted_run, tokens):
    store, _, vocabulary, (token, pair, word) = planted_run
    found = score_store(store, tokens.train, vocabulary, range(MEANT))
    texts = vocabulary.texts
    spelt = [texts[i].strip().lower() for i in (pair // 1024, pair % 1024)]
    assert found.description(TOKEN, vocabulary) == f'The token "{texts[token]}"'
    assert found.description(PAIR, vocabulary) == f'The last word of "{spelt[0]} {spelt[1]}"'
    topic = found.rules.rule(TOPIC, vocabulary)
    assert texts[word].strip().lower() in [m.strip().lower() for m in topic.members]
    assert found.description(NOISE, vocabulary).startswith("No clear pattern")
    assert found.description(NEVER, vocabulary) == "Never active in this text"
    assert found.of(NEVER) is None
    assert found.of(RARE) is None
    assert found.contexts[RARE] == 10
    assert min(found.of(i).score for i in (TOKEN, PAIR)) > 0.85
    assert found.of(TOPIC).score > 0.6
    assert found.of(NOISE).low < 0.55
    assert found.of(NOISE).score < 0.4
    assert found.interpretable.tolist() == [True, True, True, False, False, False]
    some = score_store(store, tokens.train, vocabulary, [PAIR, NEVER])
    assert some.description(0, vocabulary) == found.description(PAIR, vocabulary)
    assert len(some) == 2


def test_latents_that_fire_at_random_score_nothing(planted_run, tokens):
    """Nothing about how contexts are chosen and cut tells active from inactive ones."""
    store, _, vocabulary, _ = planted_run
    found = score_store(store, tokens.train, vocabulary, range(MEANT, LATENTS))
    known = ~np.isnan(found.accuracy)
    assert known.all()
    raw = found.accuracy + max(found.null - 0.5, 0.0)
    assert abs(raw.mean() - 0.5) < 3 * raw.std() / len(raw) ** 0.5
    assert abs(found.null - 0.5) < 0.02
    assert ((found.low <= 0.5) & (found.high >= 0.5)).mean() >= 0.9
    assert not found.interpretable.any()


def test_windows_to_ablate_on_hold_the_strongest_and_all_tenths(planted_run):
    store, x, _, _ = planted_run
    strongest = np.argsort(-x.max(1), axis=0, kind="stable")
    for feature in (TOKEN, PAIR, NOISE, RARE, NEVER):
        fired = (x[..., feature] > 0).any(1)
        sampled = store.deciles[feature]
        everything = set(store.top[feature]["window"][store.top[feature]["value"] > 0].tolist())
        everything |= set(sampled["window"][sampled["value"] > 0].tolist())
        for limit in (6, 20, 500):
            found = example_windows(store, feature, limit).tolist()
            assert found == sorted(set(found))
            assert len(found) == min(limit, len(everything))
            assert fired[found].all()
            half = min(limit // 2, int(fired.sum()), len(store.top[feature]))
            assert set(strongest[:half, feature].tolist()) <= set(found)
    some = set(example_windows(store, TOKEN, 40).tolist())
    assert all(some & set(tenth["window"].tolist()) for tenth in store.deciles[TOKEN])


def test_scores_are_kept_with_the_discovery(planted_run, planted_scores, tmp_path):
    store, _, vocabulary, _ = planted_run
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    found = planted_scores
    assert Scores.read(FeatureStore(folder)) is None
    add_arrays(folder, found.arrays())
    again = Scores.read(FeatureStore(folder))
    assert (again.null, again.nulls) == (found.null, found.nulls)
    for i in range(len(found)):
        assert again.description(i, vocabulary) == found.description(i, vocabulary)
        if found.of(i) is None:
            assert again.of(i) is None
        else:
            assert str(again.of(i)) == str(found.of(i))


def test_scores_become_statistics_of_the_store(planted_run, planted_scores, tmp_path):
    store, _, _, _ = planted_run
    found = planted_scores
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    add_columns(folder, found.columns())
    columns = FeatureStore(folder).columns
    assert {column.name for column in SCORES} <= set(columns)
    for i in range(len(found)):
        one, values = found.of(i), {c.name: columns[c.name][i] for c in SCORES}
        if one is None:
            assert values.pop("score_contexts") == 0
            assert np.isnan(list(values.values())).all()
            continue
        assert values["score_contexts"] == one.active + one.inactive > 0
        wanted = {
            "score": one.score,
            "score_accuracy": one.accuracy,
            "score_low": one.low,
            "score_high": one.high,
            "score_percentile": one.percentile,
        }
        for name, value in wanted.items():
            assert values[name] == pytest.approx(value, abs=1e-6)


def test_every_feature_is_described_by_its_rule(planted_run, planted_scores):
    store, _, vocabulary, _ = planted_run
    found = planted_scores
    texts = list(rule_descriptions(store, found, vocabulary))
    assert len(texts) == len(store)
    plain = [i for i in range(len(found)) if not found.unclear[i]]
    assert {TOKEN, PAIR, TOPIC, NEVER} <= set(plain)
    assert [texts[i] for i in plain] == [found.description(i, vocabulary) for i in plain]


def test_descriptions_without_a_pattern_name_tokens(planted_run, planted_scores, tmp_path):
    """What an unclear feature promotes, where that is few tokens; on what a dense one fires."""
    store, _, vocabulary, _ = planted_run
    found = planted_scores
    assert found.unclear[NOISE]
    gap = np.zeros(len(store))
    gap[NOISE] = 9.0
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    add_columns(folder, {"logit_top_gap": gap})
    store = FeatureStore(folder)
    family = found.rules.family.copy()
    family[TOKEN] = -1
    dense = replace(found, rules=replace(found.rules, family=family))
    texts = list(rule_descriptions(store, dense, vocabulary))
    promoted = [vocabulary.texts[token] for token, _ in store.promoted(NOISE)[:3]]
    assert texts[NOISE].endswith("; promotes " + ", ".join(f'"{text}"' for text in promoted))
    liked = vocabulary.texts[store.token_counts(TOKEN)[0].token]
    assert texts[TOKEN] == f'Active in nearly every context, most often on "{liked}"'
    others = [i for i in range(len(found)) if i not in (NOISE, TOKEN)]
    assert not [texts[i] for i in others if "promotes" in texts[i] or "most often" in texts[i]]


def test_contexts_are_what_the_text_and_the_activations_say(planted_run, tokens):
    store, x, _, _ = planted_run
    split = tokens.train
    block = stored_contexts(store, split, np.arange(6))
    entries = np.concatenate([store.deciles.reshape(LATENTS, -1), store.top], axis=1)
    n_active = entries.shape[1]
    sides = tried(block.document)
    earlier: list[list[bool]] = [[] for _ in range(6)]
    for f in range(6):
        active = (block.kind[f] == ACTIVE) | (block.kind[f] == STRONGEST)
        fired = (x[..., f] > 0).any(1)
        windows = np.concatenate(
            [entries["window"][f], store.inactive[f], store.hard["window"][f]]
        ).astype(np.int64)
        listed = windows[active]
        assert len(set(listed)) == len(listed)
        full = entries["value"][f] > 0
        assert set(listed) == set(windows[:n_active][full])
        liked = {t.token for t in store.token_counts(f)[:5]}
        for j in np.flatnonzero(block.kind[f] != EMPTY):
            window, first = windows[j], block.first[f, j]
            position = first + block.peak[f, j]
            ids = split.windows([window], CONTEXT)[0].numpy()
            assert first >= 1
            assert 0 <= block.peak[f, j] < len(block.ids)
            if active[j]:
                assert x[window, position, f] > 0
            else:
                assert not fired[window]
            if block.kind[f, j] == HARD:
                assert ids[position] in liked
                earlier[f].append(ids[position] in ids[1:position])
            assert block.document[f, j] == split.document_at(window, int(position), CONTEXT)
            for w, token in enumerate(block.ids[:, f, j]):
                place = int(first) + w
                own = split.document_at(window, place, CONTEXT) == block.document[f, j]
                special = ids[place] in split.meta.special_ids
                assert token == (ids[place] if own and not special else NOTHING)
        used = block.kind[f] != EMPTY
        halves = [set(block.document[f][used & side]) for side in (sides[f], ~sides[f])]
        assert not halves[0] & halves[1]
        if f in (TOKEN, TOPIC, NOISE):
            assert min(map(len, halves)) > 5
    assert (block.ids[:, block.kind == EMPTY] == NOTHING).all()
    # Not always the first place of the token in its window.
    assert 0 < sum(earlier[PAIR]) < len(earlier[PAIR])
    assert ((block.kind == HARD).sum(1)[[TOKEN, PAIR]] > 0).tolist() == [False, True]
