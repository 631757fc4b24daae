"""Experiments: their tables are single generations put together, with intervals over seeds."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from journeys import road
from scipy import stats

from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput
from mistudio.jobs import experiments
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.experiments import MEASURES, estimate, write_experiment
from mistudio.jobs.job import JobContext, run_job, submit
from mistudio.jobs.kinds import (
    Discover,
    ImportSae,
    LayerStudy,
    PromptBatch,
    Steer,
    Sweep,
    job_from_row,
)
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
            assert row["percent_of_norm"] == pytest.approx(one["percent_of_norm"])
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
    assert found.result["continued"] == 4
    live = [s.metrics["partial"] for s in told if s.metrics.get("partial")]
    assert live[0]["continued"] < 4 and len(live[0]["rows"]) == 4
    first = live[0]["rows"][3]["texts"]
    assert first and first == rows[3]["texts"][: len(first)]


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
        {"name": "half", "features": [[3, 4.0]], "scale": 0.5},
    ]
    found = experiment(library, PromptBatch(1, variants, **QUICK))
    rows = found.result["rows"]
    assert [row["name"] for row in rows] == ["up", "Steering 2", "gone", "half"]
    single = alone(library, PROMPTS[1], 0, control=True)
    assert rows[0]["texts"][1]["text"] == single["variants"][0]["text"]
    kl = single["variants"][1]["kl_per_token"]
    assert rows[1]["texts"][1]["kl_per_token"] == pytest.approx(kl, rel=1e-2)
    assert rows[2]["percent_of_norm"] is None
    assert rows[3]["texts"] == rows[0]["texts"]  # half of twice as much


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
    share = found["all"]["percent_of_norm"]
    for row in (first, second):
        # The same share of each layer's norm, whichever of them are left.
        assert row["alone"]["percent_of_norm"] == row["without"]["percent_of_norm"] == share > 0
        assert row["kl_without"]["mean"] > 0 and row["kl_without"]["texts"] == 4
        assert row["alone"]["summary"]["kl_per_token"]["mean"] > 0


def test_each_layers_own_feature_is_studied_where_its_sae_acts(
    library: Library, tmp_path: Path
) -> None:
    """The same dictionary, said to be of the next layer, stands in for that of another layer."""
    shutil.copytree(library.path(library.saes.get(1).folder), tmp_path / "next")
    for file in (tmp_path / "next").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("blocks.1.hook", "blocks.2.hook"), encoding="utf-8")
    (other,) = run(library, ImportSae(str(tmp_path / "next"), 1)).result["sae_ids"]
    assert library.saes.get(other).layer == 2
    assert run(library, Discover(other, 2000, dataset_id=1)).status == "finished"
    job = LayerStudy(1, [[3, 2.0]], (), ([other, 5, 2.0, "clamp"],), **QUICK)
    found = experiment(library, job).result
    assert [row["layer"] for row in found["rows"]] == [1, 2]
    assert found["all"]["percent_of_norm"] is None
    single = alone(library, PROMPTS[1], 7)
    assert found["rows"][0]["alone"]["texts"][3]["text"] == single["variants"][0]["text"]
    assert found["rows"][1]["without"]["texts"] == found["rows"][0]["alone"]["texts"]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Sweep(1, [[3, 1.0]]), "1 to 1,000 prompts; there are 0"),
        (Sweep(1, [[3, 1.0]], (), prompts=("a",)), "1 to 64 strengths"),
        (Sweep(1, [[3, 1.0]], prompts=("a",), seeds=()), "1 to 100 seeds"),
        (Sweep(1, [[3, 1.0]], prompts=("a",) * 900, seeds=(0, 1)), "1 to 5,000 texts"),
        (Sweep(1, [[3, 1.0]], prompts=(" ",)), "A prompt is empty"),
        (Sweep(1, [[3, 1.0]], prompts=("a",), temperature=9.0), "temperature must be between"),
        (Sweep(1, [[3, 1.0]], prompts=("a",), seeds=(0, 10**30)), "seed is too large"),
        (Sweep(1, [[3, 1.0]], layers=(99,), prompts=("a",)), "99"),
        (PromptBatch(1, [], prompts=("a",)), "1 to 32 variants"),
        (PromptBatch(1, [{}], prompts=("a",)), "No feature chosen"),
        (LayerStudy(1, [[3, 1.0]], prompts=("a",)), "needs several"),
    ],
)
def test_what_cannot_be_tried_is_refused(library: Library, job: Any, words: str) -> None:
    before = road.contents(library.root)
    row = run(library, job)
    assert row.status == "failed" and "traceback" not in row.error, row.error
    assert words in " ".join(map(str, row.error.values()))
    assert road.contents(library.root) == before


class StopAfter(Control):
    """Stops once so many partial tables were told."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.tables = tables

    def watch(self, context: JobContext) -> None:
        self.context = context

    def check(self) -> float:
        partial = self.context.snapshot().metrics.get("partial")
        if partial is not None and partial not in self.seen:
            self.seen.append(partial)
        if len(self.seen) == self.tables:
            raise Cancelled
        return super().check()


def stopped(library: Library, job: Any, tables: int) -> tuple[Experiment | None, StopAfter]:
    control = StopAfter(tables)
    row = run_job(library, job, submit(library, job), control, on_start=control.watch)
    assert row.status == "cancelled" and control.context.work_folder.exists() is False
    number = control.context.snapshot().metrics.get("experiment_id")
    return (library.experiments.get(number) if number else None), control


def test_a_stopped_experiment_keeps_what_every_steering_went_through(library: Library) -> None:
    job = Sweep(1, [[3, 2.0]], strengths=(0.5, 2.0), **QUICK)
    whole = experiment(library, job).result
    found, control = stopped(library, job, 3)
    assert found is not None and found.name == "Sweep #3 over 2 strengths (stopped)"
    assert found.result["continued"] == 3 and len(found.result["unsteered"]) == 3
    assert found.result["rows"] == control.seen[-1]["rows"]
    for part, full in zip(found.result["rows"], whole["rows"], strict=True):
        assert part["texts"] == full["texts"][:3]
        kl = part["summary"]["kl_per_token"]  # of the seed that is through
        assert kl["mean"] == pytest.approx(
            (full["texts"][0]["kl_per_token"] + full["texts"][1]["kl_per_token"]) / 2
        )
        assert (kl["n"], kl["texts"], kl["low"]) == (1, 2, None)
    # What was asked for is all there, so that it can be done in full.
    assert job_from_row(found.kind, found.request) == job


def test_stopped_within_the_first_prompt_the_rows_that_were_through_are_kept(
    library: Library, tmp_path: Path
) -> None:
    before = road.contents(library.root)
    strengths = tuple(0.25 * n for n in range(1, 10))
    job = Sweep(1, [[3, 2.0]], strengths=strengths, **QUICK)
    assert stopped(library, job, 0) == (None, ANY)
    assert road.contents(library.root) == before
    found, _ = stopped(library, job, 1)
    assert found is not None and found.result["continued"] == 0
    assert [len(row["texts"]) for row in found.result["rows"]] == [1] * 8 + [0]
    assert found.result["rows"][8]["summary"] == dict.fromkeys(MEASURES)
    later, control = stopped(library, job, 3)  # within the second prompt
    assert later is not None and len(control.seen[-1]["rows"][0]["texts"]) == 2
    assert [len(row["texts"]) for row in later.result["rows"]] == [1] * 9
    write_experiment(found, tmp_path / "part.csv")
    last = (tmp_path / "part.csv").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith(",False,2.25,") and last.endswith("," * 45)


@pytest.mark.parametrize(
    ("prompts", "scope", "words"),
    [
        (("The sea was", "sea " * 300), {}, "too long for this model"),
        (("The sea was", "a"), {"scope": "last"}, "no token to steer"),
        (("The sea was", "a"), {"scope": "chosen", "positions": (2,)}, "cannot be steered"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_before_the_first_is_continued(
    library: Library, monkeypatch, prompts: Any, scope: dict, words: str
) -> None:
    monkeypatch.setattr(experiments, "compare", None)
    row = run(library, Sweep(1, [[3, 1.0]], prompts=prompts, seeds=(0,), **scope))
    assert words in " ".join(map(str, row.error.values())), row.error


def test_one_that_turns_out_to_be_impossible_is_kept_as_far_as_it_came(
    library: Library, monkeypatch
) -> None:
    compare, calls = experiments.compare, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise InvalidInput("This steering is too strong")
        return compare(*args)

    monkeypatch.setattr(experiments, "compare", fails)
    row = run(library, Sweep(1, [[3, 2.0]], strengths=(0.5, 2.0), **QUICK))
    assert row.status == "failed" and "too strong" in row.error["title"]
    (found,) = library.experiments.of_sae(1)
    assert found.name.endswith("(stopped)") and found.result["continued"] == 2


def test_an_experiment_repeated_from_its_record_is_the_same(library: Library) -> None:
    job = LayerStudy(1, [[3, 2.0]], layers=(1, 2), **QUICK | {"seeds": (5,)})
    first = experiment(library, job)
    assert experiment(library, job_from_row(first.kind, first.request)).result == first.result


def test_ratios_are_averaged_as_logarithms_and_unknown_ones_left_out() -> None:
    texts = [
        {"seed": 0, "r": 2.0},
        {"seed": 0, "r": 8.0},
        {"seed": 1, "r": 16.0},
        {"seed": 1, "r": None},
    ]
    found = estimate(texts, "r", in_logs=True)
    assert found is not None
    assert found["mean"] == pytest.approx(8.0) and (found["n"], found["texts"]) == (2, 3)
    half = stats.t.ppf(0.975, 1) * stats.sem([math.log(4), math.log(16)])
    assert found["high"] == pytest.approx(8 * math.exp(half))
    assert estimate([{"seed": 0, "r": None}], "r") is None
    # No interval reaches where no value can lie.
    apart = estimate([{"seed": n, "similarity": float(n)} for n in (0, 1)], "similarity")
    assert apart is not None and (apart["low"], apart["high"]) == (0.0, 1.0)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Texts of which prompt and seed have their own share: the mean of endlessly many seeds with
    these prompts is known, and 95 % of all intervals must hold it (0.93 to 0.97 of 1,500: more
    than 3.5 standard errors to each side)."""
    rng = np.random.default_rng(seeds)
    prompts = np.array([-3.0, 0.5, 4.0])
    held = 0
    for _ in range(1500):
        values = 1.0 + prompts + 0.5 * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, 3))
        texts = [{"seed": s, "x": float(v)} for s in range(seeds) for v in values[s]]
        found = estimate(texts, "x")
        assert found is not None
        held += found["low"] <= 1.5 <= found["high"]
    assert 0.93 <= held / 1500 <= 0.97


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
