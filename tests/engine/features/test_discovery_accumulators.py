"""What discovery gathers, over invented streams: the same bytes however the stream is cut, equal to
a brute-force count; and the memory that was planned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mistudio.engine.features import accumulators
from mistudio.engine.features.accumulators import Collector, Rows, Size, collector_bytes, priority
from mistudio.engine.features.columns import BANDS, bands
from mistudio.engine.features.discovery import Options, plan
from mistudio.engine.sae.dictionary import Codes

FEATURES, CONTEXT, WINDOWS, VOCABULARY, TOP = 50, 16, 400, 300, 6


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(accumulators, "SAMPLE", 24)
    monkeypatch.setattr(accumulators, "PENDING", 3000)
    monkeypatch.setattr(accumulators, "COUNTERS", 16)
    monkeypatch.setattr(accumulators, "BLOCK", 7)


@pytest.fixture(scope="module")
def stream():
    """(dense float32 [n, F], Rows): values over twenty octaves, many of them equal; windows come in
    no order, some positions are missing; the last latent never fires."""
    g = np.random.default_rng(5)
    place = np.arange(CONTEXT * WINDOWS)
    place = place[(place % CONTEXT > 0) & (g.random(len(place)) > 0.1)]
    rows = Rows(
        3 * g.permutation(WINDOWS)[place // CONTEXT],
        place % CONTEXT,
        (g.random(len(place)) ** 4 * VOCABULARY).astype(np.int64),
    )
    dense = np.exp2(np.round(g.normal(0, 3.5, (len(place), FEATURES)), 1)).astype(np.float32)
    dense *= g.random(dense.shape) < np.geomspace(0.5, 0.004, FEATURES)
    dense[:, -1] = 0
    return dense, rows


def size_of(pool):
    return Size(FEATURES, CONTEXT, TOP, 3, len(pool), VOCABULARY)


def collected(stream, cuts, one_per_context=True, restart_at=None):
    """Everything gathered with the stream cut before each of the windows that come at `cuts`."""
    dense, rows = stream
    pool = np.unique(rows.windows)[::3]

    def new():
        return Collector(size_of(pool), pool=pool, seed=9, one_per_context=one_per_context)

    collector = new()
    edges = [0, *np.searchsorted(rows.ordinal, cuts), len(dense)]
    for number, (first, last) in enumerate(pairwise(edges)):
        if number == restart_at:
            state = {name: array.copy() for name, array in collector.state().items()}
            collector = new()
            collector.restore(state)
        part = torch.from_numpy(dense[first:last])
        row, latent = part.nonzero(as_tuple=True)
        codes = Codes(row, latent, part[row, latent], len(part), FEATURES)
        collector.add(
            codes,
            Rows(rows.windows[first:last], rows.positions[first:last], rows.tokens[first:last]),
        )
    return collector


def results(collector):
    """All figures, in an order that does not depend on places within a pool."""
    collector.tokens.count()
    every = np.arange(FEATURES)
    collector.top.compact(every)
    ranks = collector.sample.ranks(every)
    order = np.argsort(ranks, axis=1)[:, : accumulators.SAMPLE]
    sample = {
        f"sample.{name}": np.take_along_axis(collector.sample.arrays[name], order, axis=1)
        for name in ("window", "position", "value")
    }
    state = collector.state()
    exact = {n: a for n, a in state.items() if n.split(".")[0] not in ("sample", "top")}
    k = collector.size.top_k
    top = {f"top.{n}": state[f"top.{n}"][:, :k] for n in ("window", "position", "value", "span")}
    return {name: array.tobytes() for name, array in {**exact, **sample, **top}.items()}


CUTS = ([], list(range(1, WINDOWS)), [3, 30, 31, 200, 390])


@pytest.mark.parametrize("one_per_context", [True, False])
def test_the_cuts_do_not_matter(stream, one_per_context):
    first, *others = [results(collected(stream, cuts, one_per_context)) for cuts in CUTS]
    for other in others:
        assert [name for name in first if other[name] != first[name]] == []


def test_going_on_from_a_state_does_not_matter(stream):
    whole = results(collected(stream, CUTS[1]))
    again = results(collected(stream, CUTS[1], restart_at=211))
    assert [name for name in whole if again[name] != whole[name]] == []


def test_a_state_of_another_size_is_refused(stream):
    collector = collected(stream, [])
    smaller = Size(FEATURES - 1, CONTEXT, TOP, 3, 10, VOCABULARY)
    with pytest.raises(ValueError, match="not"):
        Collector(smaller, pool=np.arange(10)).restore(collector.state())


def test_counts_and_sums_equal_brute_force(stream):
    dense, rows = stream
    held = collected(stream, CUTS[2]).totals.arrays
    exact = dense.astype(np.float64)
    assert np.array_equal(held["n_active"], (dense > 0).sum(0))
    for power in (1, 2, 3, 4):
        assert np.allclose(held[f"sum{power}"], (exact**power).sum(0), rtol=1e-12)
    assert np.array_equal(held["max"], dense.max(0))
    lowest = np.where(dense > 0, dense, np.inf).min(0)
    assert np.array_equal(held["min"], lowest)
    numbers = np.unique(rows.windows)
    fires = np.stack([(dense[rows.windows == w] > 0).any(0) for w in numbers])
    sizes = np.array([(rows.windows == w).sum() for w in numbers])
    assert np.array_equal(held["n_contexts"], fires.sum(0))
    assert np.array_equal(held["context_tokens"], (fires * sizes[:, None]).sum(0))
    for feature in range(FEATURES):
        on = np.flatnonzero(dense[:, feature] > 0)
        places = rows.windows[on] * 1000 + rows.positions[on]
        assert held["runs"][feature] == len(on) - (np.diff(places) == 1).sum()


def test_the_histogram_keeps_sixteen_octaves_below_the_maximum(stream):
    dense, _ = stream
    histograms = collected(stream, CUTS[1]).histograms
    clamped = 0
    for feature in range(FEATURES - 1):
        values = dense[dense[:, feature] > 0, feature].astype(np.float64)
        top = int(np.floor(np.log2(values.max()) * 4))
        assert histograms.arrays["top"][feature] == top
        edges = 2.0 ** (np.arange((top - 63) * 4, (top + 1) * 4 + 1) / 16)
        place = np.searchsorted(edges, values, side="right") - 1
        clamped += (place < 0).sum()
        want = np.bincount(np.maximum(place, 0), minlength=256)
        assert np.array_equal(histograms.arrays["counts"][feature], want)
        assert np.array_equal(histograms.stored()[feature], want.reshape(64, 4).sum(1))
    assert clamped > 20
    assert not histograms.arrays["counts"][-1].any()
    assert np.isnan(histograms.quantiles(np.array([0.5]))[-1])


@pytest.mark.parametrize("one_per_context", [True, False])
def test_top_examples_equal_brute_force(stream, one_per_context):
    dense, rows = stream
    top = collected(stream, CUTS[2], one_per_context).top
    top.compact(np.arange(FEATURES))
    for feature in range(FEATURES):
        on = np.flatnonzero(dense[:, feature] > 0)
        order = np.lexsort((rows.positions[on], rows.windows[on], -dense[on, feature]))
        want, seen = [], set()
        for i in on[order]:
            if one_per_context and rows.windows[i] in seen:
                continue
            seen.add(rows.windows[i])
            want.append(i)
        want = want[:TOP]
        for j in range(TOP):
            got = [top.arrays[n][feature, j] for n in ("value", "window", "position")]
            if j >= len(want):
                assert got[0] == 0
                continue
            i = want[j]
            assert got == [dense[i, feature], rows.windows[i], rows.positions[i]]
            near = np.zeros(7)
            for k in on[rows.windows[on] == rows.windows[i]]:
                offset = rows.positions[k] - rows.positions[i] + 3
                if 0 <= offset < 7:
                    near[offset] = min(dense[k, feature] / dense[i, feature], 60_000)
            assert np.allclose(top.arrays["span"][feature, j], near, rtol=1e-3, atol=1e-6)


def test_the_sample_is_what_has_the_lowest_hash(stream):
    dense, rows = stream
    sample = collected(stream, CUTS[1]).sample
    for feature in range(FEATURES):
        on = np.flatnonzero(dense[:, feature] > 0)
        rank = priority(9, feature, rows.windows[on], rows.positions[on])
        assert len(set(rank.tolist())) == len(on)
        want = {(rows.windows[i], rows.positions[i]) for i in on[np.argsort(rank)][:24]}
        ranks = sample.ranks(np.array([feature]))[0]
        order = np.argsort(ranks)[: min(24, len(on))]
        got = {
            (int(sample.arrays["window"][feature, j]), int(sample.arrays["position"][feature, j]))
            for j in order
        }
        assert got == want


def test_samples_are_even():
    """Places have no say in their rank, nor have features: each half of the text gives half."""
    windows = np.arange(20_000)
    for feature in (0, 1, 77):
        lowest = np.argsort(priority(3, feature, windows))[:1000]
        assert 430 < (lowest < 10_000).sum() < 570
    first, second = (set(np.argsort(priority(3, f, windows))[:1000].tolist()) for f in (0, 1))
    assert 20 < len(first & second) < 90  # 50 by chance
    other = set(np.argsort(priority(4, 0, windows))[:1000].tolist())
    assert 20 < len(first & other) < 90


def test_token_counts_are_exact_up_to_the_stated_error(stream):
    dense, rows = stream
    tokens = collected(stream, CUTS[2]).tokens
    tokens.count()
    held = tokens.arrays
    assert np.array_equal(held["occurrences"], np.bincount(rows.tokens, minlength=VOCABULARY))
    wrong = 0
    for feature in range(FEATURES):
        want = np.bincount(rows.tokens[dense[:, feature] > 0], minlength=VOCABULARY)
        error = int(held["error"][feature])
        found = {}
        for token, count in zip(held["token"][feature], held["count"][feature], strict=True):
            if count:
                found[int(token)] = int(count)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for token, count in found.items():
            assert count <= want[token] <= count + error
            wrong += count < want[token]
        missing = [int(n) for token, n in enumerate(want) if token not in found]
        # What is not listed is no commoner than the last that is, but for the error.
        least = min(found.values()) if len(found) == 16 else 0
        assert max(missing, default=0) <= least + error
        if (want > 0).sum() <= 16:
            assert error == 0 and len(found) == (want > 0).sum()
    assert wrong and (held["error"] == 0).any(), "one of the two cases was not tested"


def test_the_error_of_one_lot_is_the_highest_count_dropped(stream, monkeypatch):
    monkeypatch.setattr(accumulators, "PENDING", 10**6)
    dense, rows = stream
    tokens = collected(stream, CUTS[2]).tokens
    tokens.count()
    distinct = 0
    for feature in range(FEATURES):
        want = np.sort(np.bincount(rows.tokens[dense[:, feature] > 0], minlength=VOCABULARY))[::-1]
        assert np.array_equal(tokens.arrays["count"][feature], want[:16])
        assert tokens.arrays["error"][feature] == want[16]
        distinct += want[16] > want[17]
    assert distinct


def test_activity_is_kept_for_the_pool(stream):
    dense, rows = stream
    activity = collected(stream, CUTS[2]).activity
    for place, window in enumerate(activity.pool):
        inside = rows.windows == window
        want = (dense[inside] > 0).any(0)
        assert np.array_equal(activity.fires(np.arange(FEATURES), np.full(FEATURES, place)), want)
        assert np.array_equal(
            np.flatnonzero(activity.arrays["counted"][place]), rows.positions[inside]
        )


def test_the_planned_memory_is_what_the_arrays_take(stream):
    collector = collected(stream, [])
    held = sum(array.nbytes for array in collector.state().values())
    pending = collector.tokens.state()["pending"].nbytes
    assert collector_bytes(collector.size) == held - pending + 8 * accumulators.PENDING


def test_65536_features_take_less_than_two_gigabytes_however_much_text_there_is(monkeypatch):
    monkeypatch.undo()
    plans = [
        plan(
            [(65_536, 576, 576)],
            context=128,
            windows=tokens // 128,
            vocabulary=49_152,
            options=Options(),
        )
        for tokens in (1_000_000, 10**9)
    ]
    assert plans[0].memory_bytes < 2e9
    # Beyond the pool, nothing grows: 65,536 bits for each of the windows that are missing.
    assert plans[1].memory_bytes - plans[0].memory_bytes < 10e6
    both = plan([(65_536, 576, 576)] * 2, context=128, windows=7812, vocabulary=49_152)
    assert both.memory["gathered"] == 2 * plans[0].memory["gathered"]
    assert both.disk == 2 * plans[0].disk


def test_bands_by_density():
    n = np.array([0, 1, 9, 10, 10**4, 10**4 + 1, 10**5, 10**5 + 1])
    found = [BANDS[i] for i in bands(n, 10**6)]
    assert found[0] == "dead" and bands(np.array([1]), 10**7)[0] == BANDS.index("ultra-rare")
    assert found[1:] == [
        "rare",
        "rare",
        "normal",
        "normal",
        "frequent",
        "frequent",
        "dense",
    ]
