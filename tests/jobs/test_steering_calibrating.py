"""Calibrations as jobs: what is kept is what was measured, feature by feature; output scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from journeys import road

from mistudio.engine.models.loading import load_tokenizer, special_ids
from mistudio.engine.progress import Cancelled
from mistudio.engine.sae.files import load_sae
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.calibration import STRENGTHS, calibrate
from mistudio.engine.steering.interventions import FeatureEdit, SiteSteering, Variant
from mistudio.jobs.calibrating import SCORE_KIND
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Calibrate, ScoreOutputs, job_from_row
from mistudio.jobs.models import loaded_model
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

PROMPTS = ("The sea was", "In this article")
QUICK: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 5}


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def test_what_is_kept_is_what_the_engine_measures(library: Library) -> None:
    seen: list[Snapshot] = []
    job = Calibrate(1, [3, 5], suppress=True, **QUICK)
    row = run(library, job, listener=seen.append)
    assert row.status == "finished", row.error
    assert job_from_row("calibrate", row.params) == job
    kept = library.calibrations.of_sae(1)
    assert set(kept) == {(3, "add"), (5, "add")}
    store, _ = open_features(library, newest_run(library, 1))
    saved = load_sae(library.path(library.saes.get(1).folder))
    model = loaded_model(library, 1)
    tokenizer = load_tokenizer(library.path(library.models.get(1).folder))
    largest = float(store.columns["max_activation"][3])
    own = [token for token, _ in store.promoted(3)]

    def steered(strength: float) -> Variant:
        edit = FeatureEdit(3, strength, largest)
        return Variant((SiteSteering(Site.at(saved.site.output), saved.dictionary, (edit,)),))

    for sign in (1, -1):
        found = calibrate(
            model, tokenizer, steered, special_ids=sorted(special_ids(tokenizer)), own=own,
            strengths=[sign * s for s in STRENGTHS], prompts=PROMPTS, new_tokens=5,
        )  # fmt: skip
        rows = kept[3, "add"].tried(sign)
        assert [r["zone"] for r in rows] == [one.zone for one in found.tried]
        for r, one in zip(rows, found.tried, strict=True):
            for name in ("strength", "tokens", "kl", "perplexity_ratio", "own_share"):
                assert r[name] == pytest.approx(getattr(one, name), rel=1e-4), name
        side = kept[3, "add"].curve if sign > 0 else kept[3, "add"].curve["suppress"]
        assert (side["recommended"], side["s_max"]) == (found.recommended, found.breaks)
    assert kept[3, "add"].recommended == kept[3, "add"].curve["recommended"]
    curve = kept[3, "add"].curve
    assert (curve["prompts"], curve["new_tokens"]) == (list(PROMPTS), 5)
    assert curve["own_tokens"] == own
    median = float(saved.record["metrics"]["median_norm"])
    percent = 100 * largest * float(saved.dictionary.decoder[3].norm()) / median
    assert curve["percent_of_norm"] == pytest.approx(percent, rel=1e-4)
    # Told while it ran: which feature, and its curve so far.
    told = [s.metrics for s in seen if s.metrics.get("tried")]
    assert told and {t["feature"] for t in told} <= {3, 5}
    assert [r["strength"] for r in told[-1]["tried"]] in ([*STRENGTHS], [-s for s in STRENGTHS])


def test_a_stopped_calibration_keeps_whole_features_only(library: Library) -> None:
    class Stop(Control):
        def check(self) -> float:
            if library.calibrations.of_sae(1):
                raise Cancelled
            return super().check()

    row = run(library, Calibrate(1, [3, 5], **QUICK), control=Stop())
    assert row.status == "cancelled"
    assert set(library.calibrations.of_sae(1)) == {(3, "add")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "ablate"}, "no strength to calibrate"),
        ({"features": []}, "features must be between 1 and"),
        ({"features": [3, 999]}, "0 to 127"),
        ({"prompts": ("Fine", " ")}, "A prompt is empty"),
        ({"max_new_tokens": 2}, "new tokens must be between 4"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(library: Library, change: dict, words: str) -> None:
    before = road.contents(library.root)
    row = run(library, Calibrate(**{"sae_id": 1, "features": [3], **QUICK} | change))
    assert row.status == "failed" and "traceback" not in row.error, row.error
    assert words in " ".join(map(str, row.error.values()))
    assert road.contents(library.root) == before


def test_output_scores_are_the_models_own_probabilities(library: Library) -> None:
    row = run(library, ScoreOutputs(1, (3, 5)))
    assert row.status == "finished", row.error
    kept = library.feature_analyses.of_run(newest_run(library, 1).id, SCORE_KIND)
    assert set(kept) == {3, 5}
    store, _ = open_features(library, newest_run(library, 1))
    saved = load_sae(library.path(library.saes.get(1).folder))
    model = loaded_model(library, 1)
    tokenizer = load_tokenizer(library.path(library.models.get(1).folder))
    ids = torch.tensor([tokenizer("From my experience,")["input_ids"]])
    vector = 10 * float(store.columns["max_activation"][3]) * saved.dictionary.decoder[3]

    def amplified(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + vector], dim=1)

    with model.intervene({saved.site.output: amplified}):
        p = model.model(ids).logits[0, -1].detach().softmax(-1)
    own = [token for token, _ in store.promoted(3)]
    best = max(own, key=lambda token: float(p[token]))
    rank = int((p > p[best]).sum())
    assert kept[3]["rank"] == rank
    assert kept[3]["probability"] == pytest.approx(float(p[best]), rel=1e-3)
    assert kept[3]["score"] == pytest.approx(float(p[best]) * (1 - rank / len(p)), rel=1e-3)


def test_all_features_that_fired_are_scored_where_none_is_named(library: Library) -> None:
    row = run(library, ScoreOutputs(1))
    assert row.status == "finished", row.error
    store, _ = open_features(library, newest_run(library, 1))
    kept = library.feature_analyses.of_run(newest_run(library, 1).id, SCORE_KIND)
    assert set(kept) == set(store.alive.nonzero()[0].tolist())
