"""Steering as a job: methods, scopes, layers and controls as a request says, kept with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.files import load_sae
from mistudio.jobs import steering
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Steer, job_from_row
from mistudio.jobs.models import loaded_model
from mistudio.jobs.steering import Recipe
from mistudio.library.library import Library

PROMPT = "The sea was"


def steered(library: Library, **options: Any) -> dict[str, Any]:
    job = Steer(
        **{"sae_id": 1, "features": [[3, 2.0]], "prompt": PROMPT, "max_new_tokens": 6} | options
    )
    row = run_job(library, job, submit(library, job))
    assert row.status == "finished", row.error
    found = library.generations.get(row.result["generation_id"])
    assert job_from_row("steer", found.request) == job
    return found.result


def refusal(library: Library, **options: Any) -> str:
    job = Steer(
        **{"sae_id": 1, "features": [[3, 2.0]], "prompt": PROMPT, "max_new_tokens": 2} | options
    )
    row = run_job(library, job, submit(library, job))
    assert row.status == "failed" and "traceback" not in row.error, row.error
    return " ".join(map(str, row.error.values()))


def test_a_request_of_everything_is_kept_and_gives_the_same_text_again(library: Library) -> None:
    options = {
        "features": [[3, 1.5, "clamp"], [5, 1.0]],
        "scales": (0.5, 1.0),
        "top_k": 30,
        "repetition_penalty": 1.2,
        "scope": "from_last",
        "keep_norm": True,
        "control": True,
        "seed": 3,
    }
    first, second = steered(library, **options), steered(library, **options)
    assert [v["ids"] for v in first["variants"]] == [v["ids"] for v in second["variants"]]
    assert [v["control"] for v in first["variants"]] == [False, False, True]
    assert [v["scale"] for v in first["variants"]] == [0.5, 1.0, 1.0]
    assert first["variants"][0]["percent_of_norm"] is None  # clamping depends on the text
    assert first["together"]


def test_a_scope_reaches_the_text(library: Library) -> None:
    """Steered from the first generated token on, the first token is the unsteered one."""
    strong = {"features": [[3, 9.0]], "temperature": 0.0}
    late = steered(library, scope="generated", **strong)
    assert late["variants"][0]["ids"][0] == late["unsteered_ids"][0]
    assert late["variants"][0]["kl_by_token"][0] == pytest.approx(0, abs=1e-6)
    assert late["variants"][0]["kl_by_token"][1] > 0
    chosen = steered(library, scope="chosen", positions=(1,), **strong)
    assert chosen["variants"][0]["kl_by_token"][0] > 0


def test_one_vector_at_several_layers_has_each_layers_size(library: Library) -> None:
    model = loaded_model(library, 1)
    job = Steer(1, [[3, 2.0]], PROMPT, layers=(0, 2, 3))
    (planned,) = Recipe(library, job, model).planned()
    store, tokens = open_features(library, newest_run(library, 1))
    saved = load_sae(library.path(library.saes.get(1).folder))
    points = [HookPoint("resid_post", layer) for layer in (0, 2, 3)]
    norms = calibrate_medians(model, tokens, tuple(points), 64)
    vector = 2.0 * float(store.columns["max_activation"][3]) * saved.dictionary.decoder[3]
    share = float(vector.norm()) / float(saved.record["metrics"]["median_norm"])
    assert [site.site.output for site in planned.variant.sites] == points
    for site, point in zip(planned.variant.sites, points, strict=True):
        assert float(site.vector.norm()) == pytest.approx(share * norms[point] / 3**0.5, rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(site.vector, vector, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert planned.percent_of_norm == pytest.approx(100 * share / 3**0.5, rel=1e-4)
    assert steered(library, layers=(0, 2, 3))["variants"][0]["kl_per_token"] > 0


def test_features_of_another_sae_act_at_their_own_site(library: Library) -> None:
    model = loaded_model(library, 1)
    job = Steer(1, [[3, 2.0]], PROMPT, others=([1, 5, 1.0, "ablate"],))
    (planned,) = Recipe(library, job, model).planned()
    (site,) = planned.variant.sites
    assert [(e.feature, e.method) for e in site.edits] == [(3, "add"), (5, "ablate")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": [[3, 1.0, "shout"]]}, "No such intervention"),
        ({"scales": (1, 2, 3, 4, 5)}, "at most 4"),
        ({"scope": "chosen", "positions": (99,)}, "cannot be steered"),
        ({"scope": "somewhere"}, "No such scope"),
        ({"layers": (0, 99)}, "99"),
        ({"layers": (0,), "features": [[3, 1.0, "clamp"]]}, "must be added features"),
        ({"repetition_penalty": 9.0}, "repetition penalty must be between"),
        ({"top_k": -1}, "top k must be between"),
        ({"features": [[3, float("nan")]]}, "strength cannot be used"),
        ({"features": [[3, 1.0, "clamp"], [3, 2.0, "clamp"]]}, "in two ways at once"),
        ({"features": [[3, 1.0], [3, 0.0, "ablate"]]}, "in two ways at once"),
        ({"seed": 10**30}, "seed is too large"),
        ({"prompt": "sea " * 300}, "too long for this model"),
    ],
)
def test_what_cannot_be_done_is_refused(library: Library, change: dict, words: str) -> None:
    assert words in refusal(library, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": [[999, 1.0]]}, "No such feature"),
        ({"features": []}, "No feature chosen"),
        ({"scales": ()}, "0 were asked for"),
        ({"scales": (float("inf"),)}, "strength cannot be used"),
        ({"prompt": " "}, "prompt is empty"),
        ({"max_new_tokens": 9000}, "max new tokens must be"),
        ({"others": ([99, 3, 1.0],)}, "No SAE with number 99"),
    ],
)
def test_what_needs_no_model_to_be_seen_is_refused_before_one_is_loaded(
    library: Library, monkeypatch, change: dict, words: str
) -> None:
    monkeypatch.setattr(steering, "loaded_model", None)
    assert words in refusal(library, **change)


def test_where_there_is_no_number_there_is_none(library: Library) -> None:
    """Of one token there is no bigram, and JSON knows no NaN."""
    result = steered(library, max_new_tokens=1)
    json.dumps(result, allow_nan=False)
    assert result["variants"][0]["distinct_2"] is None


def test_a_feature_added_twice_is_added_with_the_sum(library: Library) -> None:
    twice, once = steered(library, features=[[3, 1.0], [3, 1.0]]), steered(library)
    assert twice["variants"][0]["ids"] == once["variants"][0]["ids"]
    nothing = steered(library, features=[[3, 1.0], [3, -1.0]])["variants"][0]
    assert nothing["kl_per_token"] < 1e-6
