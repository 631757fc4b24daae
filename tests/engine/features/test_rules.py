"""Rules: what they match, and that the cause of a feature is found whatever its kind."""

from __future__ import annotations

import numpy as np
import planted_text as planted
import pytest

from mistudio.engine.features import rules as module
from mistudio.engine.features.rules import (
    BY_NAME,
    FAMILIES,
    MEMBERS,
    NOTHING,
    Rules,
    Vocabulary,
    balanced_accuracy,
    fit,
    word_shares,
)
from mistudio.engine.features.score import ACTIVE, RANDOM

CAUSES = {
    'the token " New"': planted.among(" New"),
    '"york" in any spelling': planted.among(" York", "york", " YORK"),
    'the last word of "new york"': planted.behind(" New", " York"),
    'words starting with "inter"': planted.among(*planted.STARTING),
    'words ending in "ogy"': planted.among(*planted.ENDING),
    'what follows "of"': planted.behind(" of"),
    'what comes before "of"': planted.ahead(" of"),
    "years": planted.among(*planted.YEARS),
    "numbers": planted.among(*planted.NUMBERS),
    "numbers, 2 or more in a context": planted.crowded(2, *planted.NUMBERS),
    "Cyrillic letters": planted.among(*planted.RUSSIAN),
    "the first token of a line": planted.behind("\n"),
    "tokens at position 4 to 7 of a context": planted.at_start,
}


@pytest.fixture(scope="module")
def vocabulary():
    return planted.vocabulary()


@pytest.fixture(scope="module")
def text():
    return planted.documents(400)


@pytest.fixture(scope="module")
def block(text):
    return planted.contexts(list(CAUSES.values()), text)


@pytest.fixture(scope="module")
def fitted(vocabulary, block):
    active = block.kind == ACTIVE
    inactive = block.kind > ACTIVE
    background = np.full(len(vocabulary.words), 0.05)
    return fit(vocabulary, block.ids, block.first, block.peak, active, inactive, background)


def test_the_cause_of_every_kind_of_feature_is_found(fitted, vocabulary):
    found = [fitted.rule(i, vocabulary).text for i in range(len(CAUSES))]
    assert found == list(CAUSES)
    assert (fitted.fit > 0.95).all()


def test_a_topic_is_told_by_its_words(vocabulary, text):
    block = planted.contexts([planted.about_topic], text)
    active, inactive = block.kind == ACTIVE, block.kind > ACTIVE
    counts = word_shares(vocabulary, block.ids, block.kind == RANDOM)
    shares = (counts[:-1] + 0.5) / (counts[-1] + 1)
    rules = fit(vocabulary, block.ids, block.first, block.peak, active, inactive, shares)
    rule = rules.rule(0, vocabulary)
    assert rule.family == "topic"
    assert {f" {member}" for member in rule.members[:4]} <= set(planted.TOPIC)
    assert rule.text.startswith(f"contexts about {rule.members[0]}, ")
    assert rules.fit[0] > 0.9


def test_words_of_a_topic_are_commoner_there_than_elsewhere(vocabulary, text):
    """By counting: each candidate is in three active contexts at least, and in three times as
    large a share of them as of those drawn at random."""
    block = planted.contexts([planted.about_topic, planted.among(" burk")], text)
    active = block.kind == ACTIVE
    drawn = block.ids[:, block.kind == RANDOM]
    counts = word_shares(vocabulary, block.ids, block.kind == RANDOM)
    background = (counts[:-1] + 0.5) / (counts[-1] + 1)
    codes = vocabulary.codes("topic", block.ids, block.first)
    candidates = module._topic_words(codes, active, background)
    assert set(candidates[0][candidates[0] > 0]) >= {
        vocabulary.word[planted.ID[t]] for t in planted.TOPIC
    }
    for i in range(2):
        for word in candidates[i][candidates[i] > 0]:
            own = (vocabulary.word[block.ids[:, i][:, active[i]]] == word).any(0)
            others = (vocabulary.word[drawn] == word).any(0)
            assert own.sum() >= 3
            assert own.mean() > 3 * (others.sum() + 0.5) / (len(others) + 1)


def test_the_fit_is_the_balanced_accuracy_of_what_matches(fitted, vocabulary, block):
    hit = fitted.matches(vocabulary, block.ids, block.first)
    active, inactive = block.kind == ACTIVE, block.kind > ACTIVE
    assert fitted.fit == pytest.approx(balanced_accuracy(hit, active, inactive))
    for i in range(len(CAUSES)):
        right = hit[i][active[i]].mean(), (~hit[i][inactive[i]]).mean()
        assert fitted.fit[i] == pytest.approx(sum(right) / 2)


def plainly(family: str, member: str, ids: np.ndarray, first: int) -> int:
    """How many tokens of one context [W] match, from the definition and the texts alone."""
    texts = ["" if i == NOTHING else planted.TEXTS[i] for i in ids]
    words = [t.strip().lower() for t in texts]
    found = 0
    for w, t in enumerate(texts):
        if not t:
            continue
        before = words[w - 1] if w else ""
        raw_before = texts[w - 1] if w else ""
        after = words[w + 1] if w + 1 < len(texts) else ""
        word, bare = words[w], t.strip()
        letters = word.isalpha()
        low, _, high = member.partition(" to ")
        found += {
            "token": t == member,
            "word": bool(word) and word == member,
            "pair": bool(word) and bool(before) and f"{before} {word}" == member,
            "prefix": letters and t[0] == " " and word.startswith(member) and word != member,
            "suffix": letters and word.endswith(member) and word != member,
            "after": bool(before) and before == member,
            "before": bool(after) and after == member,
            "kind": {
                "years": bare.isdigit() and len(bare) == 4 and bare[0] in "12",
                "numbers": bare.isdigit() and not (len(bare) == 4 and bare[0] in "12"),
            }.get(member, False),
            "script": letters and ("а" <= word[0] <= "я") == (member == "Cyrillic letters"),
            "line": "\n" in raw_before,
            "position": low.isdigit() and int(low) <= first + w <= int(high or low),
        }[family.split()[0]]
    return found


def test_rules_match_what_they_say(fitted, vocabulary, block):
    hit = fitted.matches(vocabulary, block.ids, block.first)
    for i in range(len(CAUSES)):
        rule = fitted.rule(i, vocabulary)
        for j in range(block.kind.shape[1]):
            times = sum(
                plainly(rule.family, member, block.ids[:, i, j], int(block.first[i, j]))
                for member in rule.members
            )
            assert hit[i, j] == (times >= rule.at_least), (rule, j)


def test_every_number_of_every_family_means_what_its_name_says(vocabulary, text):
    """Each family against the texts, token by token, with gaps where nothing counts."""
    ids = text[:6, :32].T.copy()
    ids[5:9, 2] = NOTHING
    first = np.array([1, 3, 5, 9, 17, 60])
    for family in (f.name for f in FAMILIES if f.name not in ("topic", "kind", "script")):
        codes = vocabulary.codes(family, ids, first)
        for c in range(6):
            for code in np.unique(codes[:, c]):
                if code == 0:
                    continue
                name = vocabulary.name(family, int(code))
                times = int((codes[:, c] == code).sum())
                assert times == plainly(family, name, ids[:, c], int(first[c])), (family, name)


def test_shares_of_words_count_each_context_once(vocabulary, block):
    chosen = block.kind == RANDOM
    counts = word_shares(vocabulary, block.ids, chosen)
    assert counts[-1] == chosen.sum()
    for text in (" rocket", " York", " bark"):
        word = text.strip().lower()
        alike = [i for i, other in enumerate(planted.TEXTS) if other.strip().lower() == word]
        want = np.isin(block.ids[:, chosen], alike).any(0).sum()
        assert counts[vocabulary.word[alike[0]]] == want > 0


def test_features_without_contexts_of_either_kind_have_no_rule(vocabulary, block):
    none = np.zeros_like(block.kind, bool)
    active = block.kind == ACTIVE
    background = np.full(len(vocabulary.words), 0.05)
    for a, i in ((active, none), (none, active)):
        rules = fit(vocabulary, block.ids, block.first, block.peak, a, i, background)
        assert (rules.family == -1).all()
        assert np.isnan(rules.fit).all()
        assert rules.rule(0, vocabulary) is None


def test_the_vocabulary_of_a_tokenizer_has_the_blanks_before_words(tiny_tokenizer):
    vocabulary = Vocabulary.of(tiny_tokenizer, 1024)
    assert len(vocabulary.texts) == 1024
    assert any(text.startswith(" ") and text.strip().isalpha() for text in vocabulary.texts)
    token = tiny_tokenizer.encode(" the", add_special_tokens=False)[-1]
    assert vocabulary.words[vocabulary.word[token]] == "the"
    assert vocabulary.word[NOTHING] == vocabulary.token[NOTHING] == 0


def test_descriptions_can_be_read():
    """Signs have no spelling, blanks and line breaks are seen, one word makes no topic."""
    texts = ["(", " (", "\n", " ", "\u00a0", " and", " moon", " star"]
    vocabulary = Vocabulary(texts)
    number = {word: i for i, word in enumerate(vocabulary.words)}

    def text(family, *codes, at_least=1):
        members = np.zeros((1, MEMBERS), np.int64)
        members[0, : len(codes)] = codes
        place = np.array([BY_NAME[family]], np.int8)
        rules = Rules(place, members, np.array([at_least], np.int8), np.ones(1))
        return rules.rule(0, vocabulary).text

    assert text("word", number["("]) == '"("'
    assert text("word", number["("], number["and"]) == '"(" or "and" in any spelling'
    tokens = [vocabulary.token[i] for i in (2, 3, 4)]
    assert text("token", *tokens) == 'the tokens "↵", "␣" or "no-break space"'
    assert text("topic", number["moon"]) == 'contexts that contain "moon"'
    assert text("topic", number["moon"], number["star"]) == "contexts about moon, star"
