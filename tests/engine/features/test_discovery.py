"""Discovery against brute force over all tokens, for every latent of several kinds of dictionary;
and that neither batches nor interruptions nor other sites change a byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.features import accumulators, discovery
from mistudio.engine.features.discovery import RADIUS, Options, Subject, discover
from mistudio.engine.features.live import window_activations
from mistudio.engine.features.passing import LivePassage, choose_windows
from mistudio.engine.features.store import NEGATIVES, NONE, PER_DECILE, FeatureStore
from mistudio.engine.features.summary import same_tokens
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Interrupted
from mistudio.engine.sae.activation import JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site

POINT, OTHER = HookPoint("resid_post", 2), HookPoint("resid_post", 1)
CONTEXT, TOP, WINDOWS = 64, 5, 150
KINDS = ("jumprelu", "topk", "relu")


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    """Limits that so little text reaches, so that what happens at them happens here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(accumulators, "SAMPLE", 40)
    patch.setattr(accumulators, "PENDING", 20_000)
    patch.setattr(discovery, "POOL", 60)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def medians(tiny, tokens):
    return calibrate_medians(tiny, tokens.train, (POINT, OTHER), CONTEXT)


@pytest.fixture(scope="module")
def order(tokens):
    return choose_windows(tokens.train, CONTEXT, WINDOWS * CONTEXT)


@pytest.fixture(scope="module")
def dictionaries(tiny, tokens, medians):
    """Random directions; of the first kind with thresholds at different densities, its last
    latent never fires."""
    g = torch.Generator().manual_seed(1)
    m = 40
    encoder = torch.randn(m, 128, generator=g)
    encoder /= encoder.norm(dim=1, keepdim=True)
    passage = LivePassage(tiny, tokens.train, (POINT,), np.arange(0, 500, 9), CONTEXT, 8, medians)
    pre = torch.cat([chunk[POINT].activations for chunk in passage.chunks(0)]) @ encoder.T
    quantiles = 1 - torch.logspace(-0.4, -3.2, m)
    threshold = torch.stack([pre[:, i].quantile(q) for i, q in enumerate(quantiles)]).clamp_min(0)
    threshold[-1] = 1e9
    sizes = torch.linspace(0.5, 2, m)[:, None]
    kinds = {"jumprelu": JumpReLU(threshold), "topk": TopK(2), "relu": ReLU()}
    bias = {"jumprelu": torch.zeros(m), "topk": torch.zeros(m), "relu": -threshold.roll(5)}
    return {
        kind: Dictionary(encoder, bias[kind], encoder * sizes, torch.zeros(128), kinds[kind])
        for kind in KINDS
    }


def run(tiny, tokens, tokenizer, medians, order, subjects, batch_windows=8, **more):
    passage = LivePassage(
        tiny,
        tokens.train,
        tuple(sorted({subject.site.input for subject in subjects})),
        order,
        CONTEXT,
        batch_windows,
        medians,
    )
    options = Options(top_k=TOP, seed=3, **more.pop("options", {}))
    return discover(passage, subjects, model=tiny, tokenizer=tokenizer, options=options, **more)


@pytest.fixture(scope="module")
def discovered(tiny, tokens, tiny_tokenizer, medians, order, dictionaries, tmp_path_factory):
    """All kinds at one site in one pass."""
    folder = tmp_path_factory.mktemp("features")
    subjects = [Subject(kind, Site.at(POINT), dictionaries[kind], folder / kind) for kind in KINDS]
    run(tiny, tokens, tiny_tokenizer, medians, order, subjects)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def store(discovered, kind):
    return FeatureStore(discovered / kind)


@pytest.fixture(scope="module")
def jump(discovered):
    return FeatureStore(discovered / "jumprelu")


class Everything:
    """Activations [n, m] of all tokens that count, dense, with their places and ids [n]."""

    def __init__(self, tiny, tokens, medians, order, dictionary):
        passage = LivePassage(tiny, tokens.train, (POINT,), order, CONTEXT, 8, medians)
        sites = [chunk[POINT] for chunk in passage.chunks(0)]
        self.dense = torch.cat([dictionary.encode(s.activations).dense() for s in sites]).numpy()
        self.windows = np.concatenate([s.rows.windows for s in sites])
        self.positions = np.concatenate([s.rows.positions for s in sites])
        self.ids = np.concatenate([s.rows.tokens for s in sites])

    def of(self, feature):
        """(value, window, position, id) of the active tokens."""
        on = self.dense[:, feature] > 0
        return (
            self.dense[on, feature],
            self.windows[on],
            self.positions[on],
            self.ids[on],
        )

    def places(self):
        return set(zip(self.windows.tolist(), self.positions.tolist(), strict=True))


@pytest.fixture(scope="module")
def everything(tiny, tokens, medians, order, dictionaries, kind):
    return Everything(tiny, tokens, medians, order, dictionaries[kind])


def entries(array):
    return [
        (float(e["value"]), int(e["window"]), int(e["position"])) for e in array if e["value"] > 0
    ]


# --- against brute force --------------------------------------------------------------------------


def test_the_values_are_the_encoders(everything, dictionaries, kind, tiny, tokens, medians, order):
    passage = LivePassage(tiny, tokens.train, (POINT,), order[:3], CONTEXT, 1, medians)
    x = torch.cat([chunk[POINT].activations for chunk in passage.chunks(0)])
    d = dictionaries[kind]
    pre = x @ d.encoder.T + d.b_enc
    if kind == "topk":
        kept = pre >= pre.topk(2, dim=1).values[:, -1:]
    else:
        kept = pre > (d.activation.threshold if kind == "jumprelu" else 0)
    want = (pre * kept).clamp_min(0).numpy()
    assert np.allclose(everything.dense[: len(want)], want, atol=1e-4)


def test_top_examples_equal_brute_force(store, everything):
    for feature in range(len(store)):
        best = {}
        for value, window, position, _ in zip(*everything.of(feature), strict=True):
            if window not in best or value > best[window][0]:
                best[window] = (float(value), int(window), int(position))
        want = sorted(best.values(), key=lambda e: (-e[0], e[1]))[:TOP]
        assert entries(store.top[feature]) == want, feature
        assert store.columns["n_examples"][feature] == len(want)


def test_without_one_per_context_every_token_is_an_example(
    tiny, tokens, tiny_tokenizer, medians, order, dictionaries, everything, kind, tmp_path
):
    subject = Subject("a", Site.at(POINT), dictionaries[kind], tmp_path)
    run(tiny, tokens, tiny_tokenizer, medians, order, [subject], options={"one_per_context": False})
    store = FeatureStore(tmp_path)
    shared = 0
    for feature in range(len(store)):
        value, window, position, _ = everything.of(feature)
        chosen = np.lexsort((position, window, -value))[:TOP]
        want = [(float(value[i]), int(window[i]), int(position[i])) for i in chosen]
        assert entries(store.top[feature]) == want, feature
        shared += len({e[1] for e in want}) < len(want)
    assert shared, "no feature had two examples in one window: nothing was tested"


def test_counts_densities_and_moments_equal_brute_force(store, everything, dictionaries, kind):
    dense, n = everything.dense, len(everything.dense)
    assert store.meta.tokens == n
    assert store.meta.contexts == len(set(everything.windows.tolist()))
    column = store.columns
    for feature in range(len(store)):
        values, windows, positions, _ = everything.of(feature)
        exact = values.astype(np.float64)
        assert column["n_active"][feature] == len(values)
        assert column["density"][feature] == np.float32(len(values) / n)
        assert column["n_contexts"][feature] == len(set(windows.tolist()))
        assert column["context_density"][feature] == np.float32(
            len(set(windows.tolist())) / store.meta.contexts
        )
        if not len(values):
            assert column["max_activation"][feature] == column["mean_activation"][feature] == 0
            assert np.isnan(column["burst_length"][feature])
            continue
        assert column["max_activation"][feature] == values.max()
        assert column["mean_activation"][feature] == np.float32(exact.mean())
        assert column["std_activation"][feature] == pytest.approx(exact.std(), rel=1e-5, abs=1e-9)
        if exact.std() > 0:
            z = (exact - exact.mean()) / exact.std()
            assert column["skewness"][feature] == pytest.approx((z**3).mean(), rel=1e-4, abs=1e-5)
            assert column["kurtosis"][feature] == pytest.approx(
                (z**4).mean() - 3, rel=1e-4, abs=1e-4
            )
        order = np.lexsort((positions, windows))
        step = np.diff(positions[order]) == 1
        same = np.diff(windows[order]) == 0
        runs = 1 + int((~(step & same)).sum())
        assert column["burst_length"][feature] == np.float32(len(values) / runs)
        inside = np.isin(everything.windows, windows).sum()
        assert column["active_share"][feature] == np.float32(len(values) / inside)
        length = float(dictionaries[kind].decoder[feature].norm())
        assert column["relative_norm"][feature] == pytest.approx(
            values.max() * length / store.meta.median_norm, rel=1e-5
        )
        assert column["encoder_cosine"][feature] == pytest.approx(1, abs=1e-5)
    assert dense.any()


def test_histograms_count_every_activation(store, everything):
    for feature in range(len(store)):
        values = everything.of(feature)[0].astype(np.float64)
        histogram = store.histogram(feature)
        assert histogram.counts.sum() == len(values)
        if not len(values):
            continue
        assert histogram.edges[-2] <= values.max() < histogram.edges[-1]
        place = np.searchsorted(histogram.edges, values, side="right") - 1
        want = np.bincount(np.maximum(place, 0), minlength=64)
        assert np.array_equal(histogram.counts, want), feature


def test_quantiles_are_right_to_a_sixteenth_of_an_octave(store, everything):
    for feature in range(len(store)):
        values = np.sort(everything.of(feature)[0].astype(np.float64))
        for name, share in (("median_activation", 0.5), ("p99_activation", 0.99)):
            found = store.columns[name][feature]
            if not len(values):
                assert np.isnan(found)
                continue
            want = values[max(0, int(np.ceil(share * len(values))) - 1)]
            assert 2 ** (-1 / 16) <= found / want <= 2 ** (1 / 16), (feature, name)


def test_deciles_hold_a_sample_of_each_tenth(store, everything):
    seed, checked = store.meta.seed, 0
    for feature in range(len(store)):
        values, windows, positions, _ = everything.of(feature)
        tenths = store.decile_examples(feature)
        edges = store.decile_edges(feature)
        if not len(values):
            assert tenths == [[] for _ in range(10)] and np.isnan(edges).all()
            continue
        assert edges[0] == values.min() and edges[-1] == values.max()
        exact = np.sort(values.astype(np.float64))
        for i in range(1, 10):
            want = exact[max(0, int(np.ceil(i * len(exact) / 10)) - 1)]
            assert 2 ** (-1 / 16) <= edges[i] / want <= 2 ** (1 / 16)
        rank = accumulators.priority(seed, feature, windows, positions)
        sampled = np.argsort(rank)[: accumulators.SAMPLE]
        for i, tenth in enumerate(tenths):
            inside = (values[sampled] >= edges[i] if i else True) & (
                values[sampled] < edges[i + 1] if i < 9 else True
            )
            want = [
                (int(windows[j]), int(positions[j]), float(values[j]))
                for j in sampled[inside][:PER_DECILE]
            ]
            assert [(e.window, e.position, e.activation) for e in tenth] == want
            checked += len(want)
        assert store.columns["n_decile_examples"][feature] == sum(map(len, tenths))
    assert checked > 200


def test_token_counts_equal_brute_force(store, everything):
    """Counts may fall short by the stated error; where it is 0 they are exact."""
    exact = 0
    for feature in range(len(store)):
        ids = everything.of(feature)[3]
        want = np.bincount(ids)
        found = store.token_counts(feature)
        for token in found:
            assert token.count <= want[token.token] <= token.count + token.error
            assert token.occurrences == (everything.ids == token.token).sum()
        if len(ids) and not found[0].error:
            exact += 1
            listed = sorted(want[want > 0].tolist(), reverse=True)[:16]
            assert [token.count for token in found] == listed
            first = found[0]
            assert first.token == want.argmax() == store.columns["common_token"][feature]
            assert store.columns["common_token_share"][feature] == np.float32(
                first.count / len(ids)
            )
            assert store.columns["token_recall"][feature] == np.float32(
                first.count / first.occurrences
            )
        assert bool(found) == bool(len(ids))
    assert exact


def test_inactive_windows_and_hard_negatives_are_silent(store, everything, tokens):
    hard = 0
    special = set(tokens.train.meta.special_ids)
    for feature in range(len(store)):
        active = set(everything.of(feature)[1].tolist())
        inactive = store.inactive_windows(feature)
        pool = discovery.pool_of(np.unique(everything.windows), store.meta.seed)
        assert (
            len(set(inactive)) == len(inactive) == min(NEGATIVES, len(set(pool.tolist()) - active))
        )
        assert not active & set(inactive)
        favourites = {token.token for token in store.token_counts(feature)[:5]}
        found = store.hard_negatives(feature)
        assert len({window for window, _ in found}) == len(found)
        places = everything.places()
        for window, position in found:
            assert window not in active
            assert (window, position) in places
            token = int(tokens.train.windows([window], CONTEXT)[0, position])
            assert token in favourites and token not in special
            hard += 1
    assert hard > 50


def test_every_hard_negative_there_is_is_found(store, everything):
    """The pool is small enough here for all of a token's windows to be looked at."""
    pool = discovery.pool_of(np.unique(everything.windows), store.meta.seed)
    for feature in range(len(store)):
        favourites = [token.token for token in store.token_counts(feature)[:5]]
        active = set(everything.of(feature)[1].tolist())
        with_one = set(everything.windows[np.isin(everything.ids, favourites)].tolist())
        want = (with_one & set(pool.tolist())) - active
        assert len(store.hard_negatives(feature)) == min(NEGATIVES, len(want))


def test_nothing_excluded_appears_anywhere(store, everything, tokens):
    places = everything.places()
    special = set(tokens.train.meta.special_ids)
    for name in ("top", "deciles"):
        for _, window, position in entries(np.array(store.array(name)).ravel()):
            assert (window, position) in places and position > 0
            assert int(tokens.train.windows([window], CONTEXT)[0, position]) not in special
    assert not store.array("token_counts")[sorted(special)].any()
    assert store.array("token_counts").sum() == len(everything.ids)


def test_top_token_purity_and_entropy(store, everything, tokens, tiny_tokenizer):
    same = same_tokens(tiny_tokenizer, len(tiny_tokenizer))
    text = [tiny_tokenizer.decode([i]).strip().lower() for i in range(len(same))]
    assert all(text[i] == text[other] for i, other in enumerate(same))
    assert (same != np.arange(len(same))).any()
    for feature in range(len(store)):
        examples = store.examples(feature, tokens.train)
        token = int(store.columns["top_token"][feature])
        if not examples:
            assert token == -1
            continue
        peaks = [int(e.ids[e.peak]) for e in examples]
        assert peaks.count(token) == max(map(peaks.count, peaks))
        assert store.columns["top_token_share"][feature] == pytest.approx(
            peaks.count(token) / len(peaks)
        )
        sample = [e for tenth in store.decile_examples(feature) for e in tenth]
        ids = same[[int(tokens.train.windows([e.window], CONTEXT)[0, e.position]) for e in sample]]
        p = np.unique(ids, return_counts=True)[1] / len(ids)
        assert store.columns["token_purity"][feature] == pytest.approx(p.max())
        entropy = -(p * np.log(p)).sum() / np.log(len(ids)) if len(ids) > 1 else 0
        assert store.columns["token_entropy"][feature] == pytest.approx(entropy, abs=1e-6)
        promoted = {token for token, _ in store.promoted(feature)}
        assert store.columns["input_score"][feature] == pytest.approx(
            np.mean([peak in promoted for peak in peaks])
        )


def test_spans_hold_the_activations_around_the_peak(store, tokens, everything):
    checked = 0
    for feature in range(0, len(store), 4):
        value, window, position, _ = everything.of(feature)
        by_place = dict(zip(zip(window, position, strict=True), value, strict=True))
        for example in store.examples(feature, tokens.train):
            assert (
                example.ids[example.peak]
                == tokens.train.windows([example.window], CONTEXT)[0, example.position]
            )
            first = example.position - example.peak
            for offset, found in enumerate(example.activations):
                want = by_place.get((example.window, first + offset), 0.0)
                assert float(found) == pytest.approx(want, rel=2e-3, abs=1e-4 * example.activation)
                checked += 1
            assert len(example.ids) <= 2 * RADIUS + 1
    assert checked > 500


def test_live_activations_are_those_of_the_pass(
    store, everything, tiny, tokens, medians, dictionaries, kind
):
    windows = [int(w) for w in np.unique(everything.windows)[[3, 0, 7]]]
    values, mask = window_activations(
        tiny,
        dictionaries[kind],
        POINT,
        store.meta.median_norm,
        tokens.train,
        windows,
        [5, 2],
        CONTEXT,
    )
    for i, window in enumerate(windows):
        rows = everything.windows == window
        assert np.array_equal(np.flatnonzero(mask[i]), everything.positions[rows])
        found = values[i][everything.positions[rows]]
        assert np.allclose(found, everything.dense[rows][:, [5, 2]], atol=1e-4)
        assert not values[i][~mask[i]].any()


def test_a_silent_latent_has_nothing(jump, tokens):
    last = len(jump) - 1
    assert not jump.alive[last]
    assert jump.examples(last, tokens.train) == []
    assert jump.columns["top_token"][last] == jump.columns["common_token"][last] == -1
    assert jump.columns["band"][last] == 0
    assert jump.hard_negatives(last) == [] and len(jump.inactive_windows(last)) == NEGATIVES
    assert jump.token_counts(last) == [] and (jump.tokens["token"][last] == NONE).all()


def test_logit_lens_is_the_final_norm_and_unembedding(tiny, dictionaries, jump):
    model = tiny.model
    logits = (dictionaries["jumprelu"].decoder * model.model.norm.weight) @ model.lm_head.weight.T
    logits = logits - logits.mean(1, keepdim=True)
    want = logits.topk(20, dim=1)
    assert [token for token, _ in jump.promoted(3)] == want.indices[3].tolist()
    assert [v for _, v in jump.promoted(3)] == pytest.approx(want.values[3].tolist(), abs=1e-4)
    assert jump.suppressed(3)[0][1] == pytest.approx(float(logits[3].min()), abs=1e-4)
    assert jump.columns["logit_std"][3] == pytest.approx(
        float(logits[3].std(correction=0)), rel=1e-4
    )
    z = logits[3] / logits[3].std(correction=0)
    assert jump.columns["logit_kurtosis"][3] == pytest.approx(float((z**4).mean()) - 3, abs=1e-3)


def test_where_no_logit_lens_applies_there_are_no_tokens(
    tiny, tokens, tiny_tokenizer, dictionaries, tmp_path
):
    point = HookPoint("mlp_in", 1)
    passage = LivePassage(tiny, tokens.train, (point,), np.arange(8), CONTEXT)
    subject = Subject("a", Site.at(point), dictionaries["topk"], tmp_path)
    discover(passage, [subject], model=tiny, tokenizer=tiny_tokenizer)
    store = FeatureStore(tmp_path)
    assert store.promoted(0) == [] == store.suppressed(0)
    assert "logit_std" not in store.columns and "input_score" not in store.columns
    assert store.alive.any()


# --- what must not matter -------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_size_of_the_batches_does_not_matter(
    tiny, tokens, tiny_tokenizer, medians, order, dictionaries, jump, tmp_path
):
    """The model's sums round otherwise in other batches: what is counted stays the same."""
    subject = Subject("a", Site.at(POINT), dictionaries["jumprelu"], tmp_path)
    run(tiny, tokens, tiny_tokenizer, medians, order, [subject], batch_windows=3)
    other = FeatureStore(tmp_path)
    for name in ("window", "position"):
        assert np.array_equal(other.top[name], jump.top[name])
        assert np.array_equal(other.deciles[name], jump.deciles[name])
    for name in ("tokens", "histogram", "inactive", "hard"):
        assert np.array_equal(other.array(name), jump.array(name)), name
    for name, column in jump.columns.items():
        assert np.allclose(other.columns[name], column, rtol=1e-4, equal_nan=True), name


def test_a_pass_over_several_sites_equals_single_ones(
    tiny, tokens, tiny_tokenizer, medians, order, dictionaries, discovered, tmp_path
):
    subjects = [
        Subject("here", Site.at(POINT), dictionaries["topk"], tmp_path / "here"),
        Subject("there", Site.at(OTHER), dictionaries["topk"], tmp_path / "there"),
    ]
    run(tiny, tokens, tiny_tokenizer, medians, order, subjects)
    alone = Subject("alone", Site.at(OTHER), dictionaries["topk"], tmp_path / "alone")
    run(tiny, tokens, tiny_tokenizer, medians, order, [alone])
    assert bytes_of(tmp_path / "here") == bytes_of(discovered / "topk")
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "alone")
    assert bytes_of(tmp_path / "here") != bytes_of(tmp_path / "there")


class Quits:
    """The application quits at the n-th report."""

    def __init__(self, n):
        self.left = n
        self.reports = []

    def check(self):
        if self.left <= 0:
            raise Interrupted

    def report(self, done, total=None, phase=None, **metrics):
        self.reports.append(done)
        self.left -= 1


@pytest.mark.parametrize("how", ["quits", "is killed"])
def test_going_on_gives_the_same_bytes(
    tiny,
    tokens,
    tiny_tokenizer,
    medians,
    order,
    dictionaries,
    discovered,
    tmp_path,
    monkeypatch,
    how,
):
    monkeypatch.setattr(discovery, "SAVE_EVERY", 4)
    monkeypatch.setattr(discovery, "SAVING_SHARE", 1e9)
    keep = tmp_path / "keep"
    subjects = [
        Subject(kind, Site.at(POINT), dictionaries[kind], tmp_path / kind)
        for kind in ("topk", "jumprelu")
    ]

    def once(progress):
        run(
            tiny,
            tokens,
            tiny_tokenizer,
            medians,
            order,
            subjects,
            keep=keep,
            progress=progress,
        )

    class Killed(BaseException):
        pass

    stops = Quits(6)
    if how == "is killed":
        stops.check = lambda: exec("raise Killed", {"Killed": Killed}) if stops.left <= 0 else None
    with pytest.raises((Interrupted, Killed)):
        once(stops)
    (kept,) = keep.iterdir()
    assert kept.name == ("00000006" if how == "quits" else "00000004")
    half = keep / "00000009.part"
    half.mkdir()  # what a kill leaves in the middle of a saving
    (half / "state.json").write_text("{")
    goes_on = Quits(10**9)
    once(goes_on)
    assert goes_on.reports[0] == int(kept.name)
    for kind in ("topk", "jumprelu"):
        assert bytes_of(tmp_path / kind) == bytes_of(discovered / kind)


def test_the_state_of_another_pass_is_not_gone_on_from(
    tiny, tokens, tiny_tokenizer, medians, order, dictionaries, discovered, tmp_path
):
    keep = tmp_path / "keep"
    for kind, first in (("topk", 0), ("jumprelu", 0)):
        subject = Subject("a", Site.at(POINT), dictionaries[kind], tmp_path / kind)
        watched = Quits(10**9)
        run(
            tiny,
            tokens,
            tiny_tokenizer,
            medians,
            order,
            [subject],
            keep=keep,
            progress=watched,
        )
        assert watched.reports[0] == first + 1
        assert bytes_of(tmp_path / kind) == bytes_of(discovered / kind)
    (kept,) = keep.iterdir()
    assert json.loads((kept / "state.json").read_text())["done"] == -(-len(order) // 8)
