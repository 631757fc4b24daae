"""Excerpts are the contexts as text; the intruder test is fair and its interval exact."""

from __future__ import annotations

import numpy as np
import pytest
from planted_store import CONTEXT, NEVER, NOISE, PAIR, RARE, TOKEN

from mistudio.engine.features.excerpts import excerpts, pieces, with_activations
from mistudio.engine.features.intruder import exact_interval, judged, trials
from mistudio.engine.features.score import ACTIVE, HARD, RANDOM, tried
from mistudio.errors import InvalidInput


@pytest.fixture(scope="module")
def of_pair(planted_run, tokens):
    store, x, _, _ = planted_run
    found = excerpts(store, tokens.train, PAIR)
    assert not any(len(e.activations) for e in found)
    return with_activations(found, found, lambda windows: x[windows, :, PAIR])


def test_excerpts_are_the_text_and_its_activations(planted_run, tokens, of_pair):
    _, x, _, (_, pair, _) = planted_run
    assert {e.kind for e in of_pair} >= {ACTIVE, RANDOM, HARD}
    for e in of_pair:
        assert 0 <= e.peak < len(e.ids) == len(e.activations) <= 32
        text = tokens.train.windows([e.window], CONTEXT)[0].numpy()
        assert np.array_equal(text[e.first : e.first + len(e.ids)], e.ids)
        assert np.array_equal(
            x[e.window, e.first : e.first + len(e.ids), PAIR].astype(np.float32),
            e.activations.astype(np.float32),
        )
        assert (e.activations[e.peak] > 0) == e.is_active
        assert e.activations.any() == e.is_active
        assert e.tried == tried(np.array([e.document]))[0]
        if e.is_active:
            assert e.ids[e.peak] == pair % 1024


def test_pieces_are_the_text_whatever_the_bytes(tiny_tokenizer):
    text = " The moon 🌕 and 月 — naïve"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tiny_tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert "🌕" in found and "月" in found
    # Cut within a character: what is left of it is not shown.
    last = max(i for i, part in enumerate(found) if part == "🌕")
    cut = pieces(tiny_tokenizer, ids[:last])
    assert "\ufffd" not in "".join(cut) and "".join(cut) == text[: text.index("🌕")]
    assert pieces(tiny_tokenizer, []) == []


def test_a_trial_has_one_intruder_among_four_of_one_strength(of_pair):
    made = trials(of_pair, seed=3)
    assert len(made) == 10
    everything = [e for trial in made for e in trial.excerpts]
    assert len({id(e) for e in everything}) == 50
    assert sorted(trial.decile for trial in made) == list(range(10))
    for trial in made:
        odd = trial.excerpts[trial.intruder]
        assert not odd.is_active
        others = [e for e in trial.excerpts if e is not odd]
        assert [(e.kind, e.decile) for e in others] == [(ACTIVE, trial.decile)] * 4
    intruders = [trial.excerpts[trial.intruder].kind for trial in made]
    assert intruders.count(HARD) == 5
    assert len({trial.intruder for trial in made}) > 2


def test_the_same_seed_shows_the_same_trials(of_pair):
    def shown(seed):
        return [[id(e) for e in trial.excerpts] for trial in trials(of_pair, seed)]

    assert shown(1) == shown(1) != shown(2)


def test_the_place_of_the_intruder_tells_nothing(of_pair):
    places = np.bincount([t.intruder for seed in range(60) for t in trials(of_pair, seed)])
    assert len(places) == 5
    assert (abs(places - 120) < 4 * np.sqrt(600 * 0.2 * 0.8)).all()


def test_too_few_examples_are_refused(planted_run, tokens):
    store = planted_run[0]
    for feature in (NEVER, RARE):
        with pytest.raises(InvalidInput, match="Too few examples"):
            trials(excerpts(store, tokens.train, feature))
    assert len(trials(excerpts(store, tokens.train, TOKEN))) >= 5
    assert len(trials(excerpts(store, tokens.train, NOISE))) == 10


def test_the_interval_is_exact():
    # Clopper and Pearson's own, from tables.
    assert exact_interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert exact_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert exact_interval(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert exact_interval(1, 4)[0] == pytest.approx(1 - 0.975**0.25, abs=1e-9)


def test_guessing_is_told_from_knowing():
    assert judged(2, 10).by_chance == pytest.approx(0.6242, abs=1e-4)
    sure = judged(9, 10)
    assert sure.by_chance < 1e-5
    assert sure.accuracy == 0.9
    assert sure.low > 0.2 > judged(3, 10).low
    assert judged(0, 10).by_chance == pytest.approx(1.0)
