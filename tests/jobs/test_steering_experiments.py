"""Experiments: their tables are single generations put together, with intervals over seeds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from journeys import road
from scipy import stats

from mistudio.engine.progress import Cancelled
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.experiments import MEASURES, estimate, write_experiment
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import LayerStudy, PromptBatch, Steer, Sweep, job_from_row
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.steering import Experiment

PROMPTS = ("The sea was", "In this article")
QUICK: dict[str, Any] = {"prompts": PROMPTS, "seeds": (0, 7), "max_new_tokens": 4}


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def experiment(library: Library, job: Any, **options: Any) -> Experiment:
    row = run(library, job, **options)
    assert row.status == "finished", row.error
    found = library.experiments.get(row.result["experiment_id"])
    assert job_from_row(found.kind, found.request) == job
    return found


def alone(library: Library, prompt: str, seed: int, **options: Any) -> dict[str, Any]:
    job = Steer(1, [[3, 2.0]], prompt, seed=seed, max_new_tokens=4, **options)
    row = run(library, job)
    return library.generations.get(row.result["generation_id"]).result


def test_a_sweep_is_its_generations_one_by_one(library: Library) -> None:
    told: list[Snapshot] = []
    job = Sweep(1, [[3, 2.0]], strengths=(0.5, 2.0), layers=(1, 2), name=" Far  enough ", **QUICK)
    found = experiment(library, job, listener=told.append)
    assert (found.name, found.kind) == ("Far enough", "sweep")
    rows = found.result["rows"]
    assert [(r["layer"], r["strength"]) for r in rows] == [(1, 0.5), (1, 2.0), (2, 0.5), (2, 2.0)]
    for row in rows[3:]:
        assert [(t["seed"], t["prompt"]) for t in row["texts"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        kl = []
        for text in row["texts"]:
            single = alone(
                library, PROMPTS[text["prompt"]], (0, 7)[text["seed"]],
                scales=(row["strength"],), layers=(row["layer"],),
            )  # fmt: skip
            (one,) = single["variants"]
            assert text["text"] == one["text"]
            for name in ("kl_per_token", "similarity", "word_overlap", "effectiveness"):
                assert text[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
            ratio = one["distinct_2"] / one["distinct_2_unsteered"]
            assert text["distinct_ratio"] == pytest.approx(ratio)
            (feature,) = one["features"]
            assert text["reactivation"] == pytest.approx(feature["gain"], rel=1e-3, abs=1e-5)
            raised = feature["own_share"] - feature["own_share_unsteered"]
            assert text["own_share"] == pytest.approx(raised)
            kl.append(one["kl_per_token"])
        means = [(kl[0] + kl[1]) / 2, (kl[2] + kl[3]) / 2]
        low, high = stats.t.interval(0.95, 1, sum(means) / 2, stats.sem(means))
        summed = row["summary"]["kl_per_token"]
        assert summed["mean"] == pytest.approx(sum(means) / 2, rel=1e-3)
        assert summed["low"] == pytest.approx(low, rel=1e-2, abs=1e-3)
        assert summed["high"] == pytest.approx(high, rel=1e-2)
        assert set(row["summary"]) == set(MEASURES)
    unsteered = found.result["unsteered"]
    assert unsteered[3]["text"] == alone(library, PROMPTS[1], 7)["unsteered"]
    live = [s.metrics["rows"] for s in told if s.metrics.get("rows")]
    assert live and len(live[-1]) == 4 and "texts" not in live[-1][0]


def test_more_steerings_than_fit_into_a_batch_are_as_alone(library: Library) -> None:
    strengths = tuple(0.25 * n for n in range(1, 10))
    job = Sweep(1, [[3, 2.0]], strengths=strengths, **QUICK | {"seeds": (3,)})
    found = experiment(library, job).result
    assert len(found["unsteered"]) == 2
    single = alone(library, PROMPTS[0], 3, scales=(strengths[8],))
    assert found["rows"][8]["texts"][0]["text"] == single["variants"][0]["text"]
    assert found["rows"][8]["summary"]["kl_per_token"]["low"] is None  # one seed


def test_a_list_of_prompts_goes_through_several_steerings(library: Library) -> None:
    variants = [
        {"name": "up", "features": [[3, 2.0]]},
        {"features": [[3, 2.0]], "control": True},
        {"name": "gone", "others": [[1, 5, 1.0, "ablate"]], "keep_norm": True},
    ]
    found = experiment(library, PromptBatch(1, variants, **QUICK))
    rows = found.result["rows"]
    assert [row["name"] for row in rows] == ["up", "Steering 2", "gone"]
    single = alone(library, PROMPTS[1], 0, control=True)
    assert rows[0]["texts"][1]["text"] == single["variants"][0]["text"]
    kl = single["variants"][1]["kl_per_token"]
    assert rows[1]["texts"][1]["kl_per_token"] == pytest.approx(kl, rel=1e-2)
    assert rows[2]["percent_of_norm"] is None


def test_a_study_of_layers_says_what_each_does_alone_and_what_is_lost_without(
    library: Library,
) -> None:
    job = LayerStudy(1, [[3, 3.0]], layers=(1, 2), **QUICK)
    found = experiment(library, job).result
    assert [row["layer"] for row in found["rows"]] == [1, 2]
    first, second = found["rows"]
    # Of two layers, all but one is the other alone.
    assert first["without"]["texts"] == second["alone"]["texts"]
    assert first["alone"]["texts"] == second["without"]["texts"]
    together = alone(library, PROMPTS[0], 0, layers=(1, 2), scales=(1.5,))
    assert found["all"]["texts"][0]["text"] == together["variants"][0]["text"]
    for row in (first, second):
        assert row["kl_without"]["mean"] > 0
        assert row["alone"]["summary"]["kl_per_token"]["mean"] > 0


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Sweep(1, [[3, 1.0]], (), (1.0,)), "1 to 1,000 prompts; there are 0"),
        (Sweep(1, [[3, 1.0]], ("a",), ()), "1 to 64 strengths"),
        (Sweep(1, [[3, 1.0]], ("a",), seeds=()), "1 to 100 seeds"),
        (Sweep(1, [[3, 1.0]], ("a",) * 900, seeds=(0, 1)), "1 to 5,000 texts"),
        (Sweep(1, [[3, 1.0]], (" ",)), "The prompt is empty"),
        (Sweep(1, [[3, 1.0]], ("a",), layers=(99,)), "99"),
        (PromptBatch(1, [], ("a",)), "1 to 32 variants"),
        (PromptBatch(1, [{}], ("a",)), "No feature chosen"),
        (LayerStudy(1, [[3, 1.0]], ("a",)), "needs several"),
    ],
)
def test_what_cannot_be_tried_is_refused(library: Library, job: Any, words: str) -> None:
    before = road.contents(library.root)
    row = run(library, job)
    assert row.status == "failed" and "traceback" not in row.error, row.error
    assert words in " ".join(map(str, row.error.values()))
    assert road.contents(library.root) == before


def test_a_stopped_experiment_leaves_nothing(library: Library) -> None:
    class Stop(Control):
        calls = 0

        def check(self) -> float:
            self.calls += 1
            if self.calls == 20:
                raise Cancelled
            return super().check()

    before = road.contents(library.root)
    assert run(library, Sweep(1, [[3, 2.0]], **QUICK), control=Stop()).status == "cancelled"
    assert road.contents(library.root) == before


def test_ratios_are_averaged_as_logarithms_and_unknown_ones_left_out() -> None:
    texts = [
        {"seed": 0, "r": 2.0},
        {"seed": 0, "r": 8.0},
        {"seed": 1, "r": 16.0},
        {"seed": 1, "r": None},
    ]
    found = estimate(texts, "r", in_logs=True)
    assert found is not None
    assert found["mean"] == pytest.approx(8.0) and found["n"] == 2
    half = stats.t.ppf(0.975, 1) * stats.sem([math.log(4), math.log(16)])
    assert found["high"] == pytest.approx(8 * math.exp(half))
    assert estimate([{"seed": 0, "r": None}], "r") is None


def test_an_experiment_leaves_as_a_table_or_whole(library: Library, tmp_path: Path) -> None:
    job = LayerStudy(1, [[3, 3.0]], layers=(1, 2), **QUICK)
    study = experiment(library, job)
    write_experiment(study, tmp_path / "study.csv")
    with (tmp_path / "study.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["layer"], line["part"]) for line in lines] == [
        ("", "all"), ("1", "alone"), ("1", "without"), ("2", "alone"), ("2", "without"),
    ]  # fmt: skip
    kept = study.result["rows"][1]["without"]["summary"]["kl_per_token"]
    assert float(lines[4]["kl_per_token"]) == kept["mean"]
    assert float(lines[4]["kl_per_token_high"]) == kept["high"]
    assert lines[3]["kl_without"] == ""
    write_experiment(study, tmp_path / "study.json")
    whole = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert whole["result"] == study.result
    assert {path.name for path in tmp_path.iterdir()} >= {"study.csv", "study.json"}
    assert not list(tmp_path.glob(".*"))
