"""What costs forward passes and is kept: ablation of single features, features firing together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from journeys import road

from mistudio.engine.features import together
from mistudio.engine.features.ablation import ablate, example_windows
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.files import load_sae, save_sae
from mistudio.engine.sae.site import Site
from mistudio.jobs import ablation as jobs_ablation
from mistudio.jobs.ablation import KIND, Ablate, ablation_params
from mistudio.jobs.coactivation import CoActivate, medians_of
from mistudio.jobs.control import Control
from mistudio.jobs.features import Discover, open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.models import loaded_model
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

ELSEWHERE = HookPoint("resid_post", 2)


@pytest.fixture(scope="module")
def shared(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One library for the tests that only add to it; its run has a second SAE, of another layer,
    with features."""
    library = Library(road.copy_of(built, tmp_path_factory.mktemp("analyses")))
    (sae,) = library.saes.all()
    saved = load_sae(library.path(sae.folder))
    folder = f"{sae.folder}-above"
    save_sae(
        saved.dictionary, library.path(folder), site=Site.at(ELSEWHERE), model_name="", context=64
    )
    values = {name: value for name, value in vars(sae).items() if name not in ("id", "created_at")}
    above = {"hook_point": ELSEWHERE.name, "hook_point_out": ELSEWHERE.name, "layer": 2}
    number = library.saes.add(**{**values, **above, "folder": folder})
    done(library, Discover(number, max_tokens=4000, top_k=3))
    yield library
    library.close()


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run(library, job)
    assert row.status == "finished", row.error
    return row.result


def opened(library: Library, sae_id: int = 1) -> Any:
    feature_run = library.feature_runs.newest_of_sae(sae_id)
    return feature_run, *open_features(library, feature_run)


# --- ablation -------------------------------------------------------------------------------------


def kept(library: Library, feature: int, **params: Any) -> dict[str, Any] | None:
    return library.feature_analyses.get(1, feature, KIND, ablation_params(**params))


def test_an_ablation_is_kept_as_the_engine_measured_it(
    shared: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_ablation, "PLACES", 10_000)  # all there are
    _, store, tokens = opened(shared)
    feature = int(np.argmax(store.columns["n_active"]))
    asked = {"mode": "mean", "contexts": 6, "controls": 2, "seed": 3}
    done(shared, Ablate(1, [feature], **asked))
    found = kept(shared, feature, **asked)
    model = loaded_model(shared, 1)
    saved = load_sae(shared.path(shared.saes.get(1).folder))
    windows = example_windows(store, feature, 6)
    ids = tokens.windows(windows, store.meta.context)
    mean = float(store.columns["mean_activation"][feature] * store.columns["density"][feature])
    expected = ablate(
        model, saved.dictionary, saved.site, feature, ids,
        medians=medians_of(model, tokens, [saved.site], store.meta),
        special_ids=tokens.meta.special_ids, mode="mean", mean_activation=mean, controls=2, seed=3,
    )  # fmt: skip
    assert found["mean_activation"] == pytest.approx(mean) and not found["silent"]
    for name in ("active", "following"):
        group, wanted = found[name], getattr(expected, name)
        assert group["above"] == wanted.above
        for side in ("feature", "control"):
            assert group[side]["tokens"] == getattr(wanted, side).tokens
            for key in ("mean", "low", "high"):
                measured = getattr(getattr(wanted, side).delta_ce, key)
                assert group[side]["delta_ce"][key] == pytest.approx(measured, abs=1e-6)
    assert [i for i, _ in found["raised"]] == [i for i, _ in expected.raised]
    kl = np.where(expected.per_token.activations > 0, np.nan_to_num(expected.per_token.kl), 0)
    assert [p["kl"] for p in found["places"]] == pytest.approx(np.sort(kl[kl > 0])[::-1])
    for place in found["places"]:
        row, column = int(np.flatnonzero(windows == place["window"])[0]), place["position"]
        assert place["next"] == int(ids[row, column + 1])
        assert place["before"] == expected.per_token.before[row, column] >= 0
        assert place["after"] == expected.per_token.after[row, column] >= 0
    assert kept(shared, feature) is None  # other settings are another result


def test_a_feature_that_never_fires_changes_nothing_exactly(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store, _ = opened(library)
    sae = library.saes.get(1)
    saved = load_sae(library.path(sae.folder))
    dead = 5
    saved.dictionary.encoder[dead] = 0.0
    saved.dictionary.b_enc[dead] = -100.0
    folder = f"{sae.folder}-dead"
    save_sae(saved.dictionary, library.path(folder), site=saved.site, model_name="", context=64)
    library.saes.update(1, folder=folder)
    done(library, Discover(1, max_tokens=3000, top_k=3))
    number = library.feature_runs.newest_of_sae(1).id
    _, store, _ = opened(library)
    assert store.columns["n_active"][dead] == 0
    done(library, Ablate(number, [dead], contexts=4, controls=1))
    params = ablation_params(contexts=4, controls=1)
    found = library.feature_analyses.get(number, dead, KIND, params)
    assert found["silent"] and found["contexts"] == 4
    assert found["active"] is None and found["following"] is None and found["places"] == []
    everywhere = found["everywhere"]
    assert everywhere["tokens"] > 100
    for name in ("delta_ce", "kl", "changed"):
        assert everywhere[name]["mean"] == everywhere[name]["low"] == everywhere[name]["high"] == 0


def test_what_is_kept_is_plain_json(shared: Library) -> None:
    _, store, _ = opened(shared)
    alive = np.flatnonzero(store.columns["n_contexts"] == 1)
    feature = int(alive[0]) if len(alive) else int(np.argmin(store.columns["n_active"]))
    done(shared, Ablate(1, [feature], contexts=1, controls=0))
    found = kept(shared, feature, contexts=1, controls=0)
    text = json.dumps(found, allow_nan=False)  # the interval of a single context is no number
    assert json.loads(text) == found


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Ablate(1, [9999]), "No such feature"),
        (Ablate(1, []), "features must be between 1 and 200"),
        (Ablate(1, [0], controls=999), "controls must be between 0 and 50"),
        (Ablate(1, [0], mode="half"), "Unknown way to ablate"),
        (CoActivate(1, max_tokens=10), "too little to compare features on"),
    ],
)
def test_what_cannot_be_done_is_refused(shared: Library, job: Any, words: str) -> None:
    before = road.contents(shared.root)
    row = run(shared, job)
    assert row.status == "failed" and "traceback" not in row.error, row.error
    assert words in f"{row.error['title']} {row.error['what']}"
    assert road.contents(shared.root) == before


# --- firing together ------------------------------------------------------------------------------


def dense(model: Any, tokens: Any, store: FeatureStore, saes: dict[int, Any], limit: int) -> Any:
    """Activations [tokens, d_sae] of each SAE by its number, on the positions that count in all."""
    n = tokens.n_windows(store.meta.context)
    windows = np.unique(np.linspace(0, n - 1, min(n, limit // store.meta.context)).astype(int))
    ids = tokens.windows(windows, store.meta.context)
    points = [saved.site.input for saved in saes.values()]
    captured = model.capture(ids, points)
    medians = medians_of(model, tokens, [saved.site for saved in saes.values()], store.meta)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    mask &= ~torch.isin(ids, torch.tensor(tokens.meta.special_ids))
    for point in points:
        mask &= captured[point].norm(dim=-1) <= 10 * medians[point]
    found = {}
    for number, saved in saes.items():
        codes = saved.dictionary.encode(captured[saved.site.input][mask])
        table = np.zeros((codes.n_rows, saved.dictionary.d_sae))
        table[codes.rows.numpy(), codes.latents.numpy()] = codes.values.numpy()
        found[number] = table
    return found


def test_neighbours_equal_brute_force_in_every_layer(shared: Library) -> None:
    feature_run, store, tokens = opened(shared)
    folder = shared.path(feature_run.folder)
    result = done(shared, CoActivate(1, max_tokens=3000, min_pairs=5))
    model = loaded_model(shared, 1)
    saes = {sae.id: load_sae(shared.path(sae.folder)) for sae in shared.saes.all()}
    tables = dense(model, tokens, store, saes, 3000)
    (other,) = set(saes) - {1}
    sample = together.sample_of(folder)
    assert sample == together.Sample(len(tables[1]), result["contexts"], 5, (other,))
    a = tables[1]
    on = a > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = {
            number: np.corrcoef(on, tables[number or 1] > 0, rowvar=False)[
                : len(store), len(store) :
            ]
            for number in (None, other)
        }
    for feature in range(len(store)):
        assert together.fired(folder, feature) == on[:, feature].sum()
        for number, against in ((None, a), (other, tables[other])):
            there = against > 0
            both = (on[:, [feature]] & there).sum(0)
            either = (on[:, [feature]] | there).sum(0)
            close = np.flatnonzero(both >= 5)
            close = close[close != feature] if number is None else close
            with np.errstate(divide="ignore", invalid="ignore"):
                jaccard = both / either
            phi = correlation[number][feature, close]
            found = together.neighbours(folder, feature, "jaccard", number)
            assert [n.together for n in found] == [both[n.feature] for n in found]
            wanted = np.sort(jaccard[close])[::-1][:20]
            assert np.allclose([n.value for n in found], wanted, atol=1e-6)
            assert np.allclose([n.value for n in found], [jaccard[n.feature] for n in found])
            found = together.neighbours(folder, feature, "phi", number)
            assert np.allclose([n.value for n in found], np.sort(phi)[::-1][:20], atol=1e-5)
            assert all(n.sae_id == number for n in found)


def test_a_count_that_is_stopped_leaves_the_discovery_as_it_was(library: Library) -> None:
    class AtPairs(Control):
        def check(self) -> float:
            if library.jobs.all("kind = 'co_activate'")[0].phase == "count pairs":
                self.cancel()
            return super().check()

    before = road.contents(library.root)
    row = run(library, CoActivate(1, max_tokens=2000), control=AtPairs())
    assert row.status == "cancelled"
    assert road.contents(library.root) == before
    assert together.sample_of(library.path(library.feature_runs.get(1).folder)) is None


def test_a_count_that_fails_halfway_leaves_nothing_that_would_be_read(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(library, CoActivate(1, max_tokens=2000))
    folder = library.path(library.feature_runs.get(1).folder)
    assert together.sample_of(folder) is not None
    whole = together.add_arrays

    def full(target: Path, arrays: Any) -> None:
        if together.FIRED in arrays:
            raise OSError(28, "No space left on device")
        whole(target, arrays)

    monkeypatch.setattr(together, "add_arrays", full)
    assert run(library, CoActivate(1, max_tokens=2000)).status == "failed"
    assert together.sample_of(folder) is None  # old and new arrays lie side by side
