"""Trainings that are interrupted, go on, run short of memory, and take what options there are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from journeys import road

from mistudio.engine.sae.files import load_sae
from mistudio.engine.training import checkpoints
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.step import SiteTrainer
from mistudio.jobs import loaded, plans, sources
from mistudio.jobs.control import Control
from mistudio.jobs.job import JobContext, can_go_on, run_job, submit
from mistudio.jobs.kinds import Train, job_from_row
from mistudio.jobs.models import parse_points
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

POINT = road.POINT
MLP_IN, MLP_OUT = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
SHORT = {
    "steps": 24,
    "batch_size": 256,
    "expansion": 1,
    "k": 8,
    "context": 64,
    "autosave_minutes": 0,
}


def training(config: dict[str, Any] | None = None, **options: Any) -> Train:
    given = {"extraction_id": 1, "loss_tokens": 256, **options}
    return Train(1, 1, given.pop("points", [POINT]), {**SHORT, **(config or {})}, **given)


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any, **options: Any) -> dict[str, Any]:
    row = run(library, job, **options)
    assert row.status == "finished", row.error
    return row.result


def go_on(library: Library, record: JobRecord, **options: Any) -> JobRecord:
    """As the command line and the window do it."""
    assert can_go_on(library, record)
    assert library.jobs.requeue(record.id)
    return run_job(library, job_from_row(record.kind, record.params), record.id, **options)


class At:
    """Calls `act` once when a training has done `step` steps (a listener of a job)."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._step, self._act, self._context = step, act, None
        self._acted = False

    def start(self, context: JobContext) -> None:
        """Looks at every report and not only at those ten a second that listeners hear of."""
        report = context.report

        def watched(done: float, total: float | None = None, **rest: Any) -> None:
            report(done, total, **rest)
            rows = context.metrics.since(0) if context.metrics else []
            if not self._acted and rows and rows[-1]["step"] + 1 >= self._step:
                self._acted = True
                self._act()

        context.report = watched  # type: ignore[method-assign]


def files(library: Library, training_id: int) -> dict[str, bytes]:
    """The tensors of a run's SAEs, byte by byte."""
    folder = library.path(library.trainings.get(training_id).folder)
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def history(library: Library, training_id: int) -> list[dict[str, Any]]:
    folder = library.path(library.trainings.get(training_id).folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "time")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def left(library: Library) -> list[str]:
    """What lies about that no record names."""
    return [
        path.name for kind in ("work", "checkpoints") for path in (library.root / kind).iterdir()
    ]


# --- interrupted and gone on with -----------------------------------------------------------------


@pytest.mark.parametrize("extraction_id", [1, None], ids=["stored", "streamed"])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    library: Library, extraction_id: int | None
) -> None:
    job = training(extraction_id=extraction_id)
    whole = done(library, job)["training_id"]
    assert left(library) == []

    control = Control()
    at = At(9, control.interrupt)
    row = run(library, job, control=control, on_start=at.start)
    assert (row.status, library.trainings.count()) == ("interrupted", 2)
    assert [c.step for c in checkpoints.listing(library.checkpoint_folder(row.id))] == [9]

    library.close()  # the application starts again
    again = Library(library.root)
    assert again.jobs.get(row.id).status == "interrupted"
    row = go_on(again, again.jobs.get(row.id))
    assert (row.status, row.result["status"]) == ("finished", "completed"), row.error
    assert files(again, row.result["training_id"]) == files(again, whole)
    assert history(again, row.result["training_id"]) == history(again, whole)
    assert again.trainings.get(row.result["training_id"]).record["tokens"] == 24 * 256
    assert left(again) == []
    again.close()


def test_a_training_that_failed_at_its_end_need_not_be_trained_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training()
    whole = done(library, job)["training_id"]

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Library, "commit", broken)
        row = run(library, job)
    assert (row.status, row.error["title"]) == ("failed", "The disk is full")
    assert can_go_on(library, row)
    steps: list[int] = []
    monkeypatch.setattr(SiteTrainer, "step", lambda self, *a, **k: steps.append(1))
    row = go_on(library, row)
    assert (row.status, steps) == ("finished", [])
    assert files(library, row.result["training_id"]) == files(library, whole)


def test_a_damaged_checkpoint_is_told_of(library: Library) -> None:
    job = training({"autosave_steps": 6})
    whole = done(library, training())["training_id"]
    control = Control()
    row = run(library, job, control=control, on_start=At(14, control.interrupt).start)
    folder = library.checkpoint_folder(row.id)
    newest, older, *_ = checkpoints.listing(folder)
    assert (newest.step, older.step) == (14, 12)
    path = newest.folder / POINT / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    row = go_on(library, row)
    found = library.trainings.get(row.result["training_id"])
    (note,) = found.record["notes"]
    assert "step-00000014" in note and "An older one is used" in note
    assert files(library, found.id) == files(library, whole)
    assert history(library, found.id) == history(library, whole)


def test_a_cancelled_training_keeps_nothing(library: Library) -> None:
    control = Control()
    job = training({"autosave_steps": 3})
    row = run(library, job, control=control, on_start=At(8, control.cancel).start)
    assert row.status == "cancelled"
    assert left(library) == []
    assert not can_go_on(library, row)


def test_other_work_that_is_interrupted_is_cancelled(library: Library) -> None:
    control = Control()
    control.interrupt()
    row = run(library, training(extraction_id=None), control=control)
    assert (row.status, left(library)) == ("cancelled", [])


def test_putting_an_interrupted_training_away_removes_its_checkpoints(library: Library) -> None:
    control = Control()
    row = run(library, training(), control=control, on_start=At(5, control.interrupt).start)
    assert left(library) == [f"job-{row.id}"]
    library.jobs.remove(row.id)
    assert left(library) == []


def test_checkpoints_of_jobs_that_are_gone_are_swept(library: Library) -> None:
    control = Control()
    row = run(library, training(), control=control, on_start=At(5, control.interrupt).start)
    (library.root / "checkpoints" / "job-999" / "step-00000001").mkdir(parents=True)
    library.recover()
    assert left(library) == [f"job-{row.id}"]


def test_a_checkpoint_is_written_when_asked_for(library: Library) -> None:
    control = Control()
    steps: list[int] = []

    at = At(7, control.save_now)

    def start(context: JobContext) -> None:
        at.start(context)
        folder = library.checkpoint_folder(context.job_id)
        library.observe(lambda change: steps.extend(c.step for c in checkpoints.listing(folder)))

    done(library, training(), control=control, on_start=start)
    assert min(steps) in (7, 8)


# --- where activations come from ------------------------------------------------------------------


@pytest.mark.parametrize("source", ["extract", "hybrid"])
def test_a_model_may_be_freed_before_the_training(
    library: Library, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PHASE_TOKENS", 3000)
    row = run(library, training(extraction_id=None, source=source))
    assert row.status == "finished", row.error
    record = library.trainings.get(row.result["training_id"]).record
    assert record["source"].startswith("stored for this run")
    assert ("in portions" in record["source"]) == (source == "hybrid")
    assert left(library) == []
    (sae,) = library.saes.of_training(row.result["training_id"])
    assert 0 < sae.metrics["explained_variance"] < 1


@pytest.mark.parametrize("source", ["extract", "hybrid"])
def test_such_a_training_goes_on_too(
    library: Library, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PHASE_TOKENS", 3000)
    job = training(extraction_id=None, source=source)
    whole = done(library, job)["training_id"]
    control = Control()
    row = run(library, job, control=control, on_start=At(15, control.interrupt).start)
    row = go_on(library, row)
    assert row.status == "finished", row.error
    assert files(library, row.result["training_id"]) == files(library, whole)


def test_an_unknown_source_is_refused(library: Library) -> None:
    row = run(library, training(extraction_id=None, source="air"))
    assert (row.status, row.error["title"]) == ("failed", "Unknown source of activations")


def test_where_model_and_training_do_not_fit_together_they_take_turns(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at step 11 while the model is there, in however small parts."""
    real = SiteTrainer.step
    tried: list[int] = []

    def step(self: SiteTrainer, *args: Any, **options: Any) -> Any:
        if self.step_number == 10 and loaded.loaded_models():
            tried.append(self.parts)
            raise MemoryError
        return real(self, *args, **options)

    monkeypatch.setattr(SiteTrainer, "step", step)
    row = run(library, training(extraction_id=None))
    assert row.status == "finished", row.error
    found = library.trainings.get(row.result["training_id"])
    assert tried == [1, 2, 4]  # 64 rows of 256
    assert found.record["source"] == "stored for this run"
    assert found.record["tokens"] == 24 * 256
    notes = " ".join(found.record["notes"])
    assert "the batch is now worked through in 4 parts" in notes
    assert "activations are now stored first" in notes
    steps = [row["step"] for row in history(library, found.id)]
    assert steps == list(range(24))  # it went on from step 10
    assert left(library) == []


def test_where_the_plan_says_so_they_take_turns_from_the_start(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plans.planned

    def small_computer(*args: Any, **options: Any) -> Any:
        """On which they do not fit beside each other, but one after the other."""
        plan = real(*args, **options)
        return plan and dataclasses.replace(plan, fits=args[-1] != "stream")

    monkeypatch.setattr(plans, "planned", small_computer)
    row = run(library, training({"steps": 4}, extraction_id=None))
    found = library.trainings.get(row.result["training_id"]).record
    assert found["source"] == "stored for this run"
    (note,) = found["notes"]
    assert "are free: activations are stored first" in note
    row = run(library, training({"steps": 4}, extraction_id=None, source="stream"))
    assert library.trainings.get(row.result["training_id"]).record["source"] == "streamed"


def test_a_plan_knows_the_model_and_this_computer(library: Library) -> None:
    points = parse_points([POINT])
    config = TrainingConfig(**SHORT)
    plan = plans.planned(library, 1, points, config, "stream", timed=True)
    assert plan is not None
    assert plan.fits and plan.disk_fits
    assert plan.run.model.parameters == library.models.get(1).parameters
    assert plan.machine.disk_free > 0
    assert plan.seconds and plan.seconds > 0
    stored = plans.planned(library, 1, points, config, "stored")
    assert stored is not None and stored.memory < plan.memory
    library.execute("UPDATE models SET summary = '{}'")
    assert plans.planned(library, 1, points, config, "stream") is None


def test_out_of_memory_without_another_road_says_so(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: SiteTrainer, *args: Any, **options: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory: 7 bytes")

    monkeypatch.setattr(SiteTrainer, "step", step)
    row = run(library, training())
    assert (row.status, row.error["title"]) == ("failed", "Out of memory")
    assert "traceback" not in row.error


# --- transcoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["transcoder", "skip_transcoder"])
def test_a_transcoder_reads_the_mlps_input_and_writes_its_output(
    library: Library, wiring: str
) -> None:
    row = run(library, training({"wiring": wiring}, points=[MLP_IN], extraction_id=None))
    assert row.status == "finished", row.error
    (sae,) = library.saes.of_training(row.result["training_id"])
    assert (sae.hook_point, sae.hook_point_out, sae.wiring) == (MLP_IN, MLP_OUT, wiring)
    saved = load_sae(library.path(sae.folder))
    assert (saved.site.input.name, saved.site.output.name) == (MLP_IN, MLP_OUT)
    assert sae.metrics["ce_zero"] > sae.metrics["ce_clean"]


def test_a_transcoder_of_another_place_is_refused(library: Library) -> None:
    row = run(library, training({"wiring": "transcoder"}))
    assert (row.status, row.error["title"]) == ("failed", "A transcoder reads the MLP's input")


# --- every option ---------------------------------------------------------------------------------

# A value for each option that is not its default, and what else it needs.
OTHER: dict[str, tuple[str, dict[str, str]]] = {
    "sparsity": ("topk", {}),
    "wiring": ("skip_sae", {}),
    "skip": ("fixed", {"wiring": "skip_sae"}),
    "skip_share": ("0.25", {"wiring": "skip_sae", "skip": "fixed"}),
    "skip_rank": ("5", {"wiring": "skip_sae"}),
    "expansion": ("2", {}),
    "k": ("9", {}),
    "tokens": ("5000", {"tokens": "3000", "steps": "auto"}),
    "width": ("136", {}),
    "steps": ("20", {}),
    "batch_size": ("128", {}),
    "learning_rate": ("0.002", {}),
    "l1_coefficient": ("2.5", {"sparsity": "standard"}),
    "optimizer": ("sgd", {}),
    "weight_decay": ("0.1", {"optimizer": "adamw"}),
    "schedule": ("cosine", {}),
    "warmup_share": ("0.3", {}),
    "decay_share": ("0.5", {}),
    "anneal_share": ("0.5", {}),
    "auxk": ("off", {"dead_window": "1000", "width": "512", "steps": "20"}),
    "revive": ("no", {"dead_window": "1000", "width": "512", "steps": "40"}),
    "mixed_precision": ("true", {}),
    "gradient_accumulation": ("2", {}),
    "dead_window": ("1_000", {"width": "512", "steps": "40"}),
    "context": ("32", {}),
    "autosave_steps": ("7", {}),
    "autosave_minutes": ("3", {}),
    "seed": ("4", {}),
}
# These change how a run is saved or worked through, and nothing that it gives.
SILENT = ("autosave_steps", "autosave_minutes", "gradient_accumulation")


_plain: dict[str, dict[str, bytes]] = {}  # what a training without the option gives


def test_no_option_is_left_out() -> None:
    assert {entry.name for entry in fields(TrainingConfig)} == set(OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_every_option_reaches_the_training(library: Library, name: str) -> None:
    value, more = OTHER[name]
    base = {"steps": 12, **more}
    extraction_id = None if name == "context" else 1  # what is stored has its own
    key = json.dumps([base, extraction_id])
    if key not in _plain:
        _plain[key] = files(
            library,
            done(library, training(base, loss_tokens=64, extraction_id=extraction_id))[
                "training_id"
            ],
        )
    changed = done(
        library, training({**base, name: value}, loss_tokens=64, extraction_id=extraction_id)
    )["training_id"]
    (sae,) = library.saes.of_training(changed)
    plan = load_sae(library.path(sae.folder)).record["plan"]["config"]
    assert plan[name] != getattr(TrainingConfig(), name)
    before, after = _plain[key], files(library, changed)
    if name in SILENT:
        assert before.keys() == after.keys()
    else:
        assert before != after


def test_ghost_gradients_mean_todays_care_for_dead_latents(library: Library) -> None:
    found = done(library, training({"ghost_gradients": "false", "steps": 4}))["training_id"]
    (sae,) = library.saes.of_training(found)
    plan = load_sae(library.path(sae.folder)).record["plan"]["config"]
    assert (plan["auxk"], plan["revive"]) == (False, False)


# --- the command line -----------------------------------------------------------------------------


def typed(library: Library, *arguments: object) -> int:
    options = {**SHORT, "steps": 6}
    given = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    train = ("train", "--model", 1, "--dataset", 1, "--layers", "1")
    return road.run_cli(library.root, *train, *given, *arguments)


def test_a_transcoder_is_typed_by_its_wiring_alone(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(library, "--set", "wiring=transcoder", "--name", "across") == 0
    told = capsys.readouterr().err
    assert "Plan:" in told and "memory:" in told and "disk:" in told
    (sae,) = library.saes.of_training(library.trainings.all("name = 'across'")[0].id)
    assert sae.hook_point == "blocks.1.mlp.hook_in"
    assert typed(library, "--set", "wiring=transcoder", "--site", "resid_post") == 1
    assert "A transcoder reads the MLP's input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("stream", "streamed"),
        ("store", "stored activations"),
        ("extract", "stored for this run"),
        ("hybrid", "stored for this run, in portions"),
        ("auto", "streamed"),
    ],
)
def test_the_source_is_typed(library: Library, source: str, told: str) -> None:
    assert typed(library, "--source", source, "--name", "typed") == 0
    (run,) = library.trainings.all("name = 'typed'")
    assert run.record["source"] == told


def test_what_cannot_be_gone_on_with_is_said(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (("resume",), "No training with a checkpoint was interrupted"),
        (("resume", 1), "Job 1 (finished) has no checkpoint"),
        (("resume", 999), "No job with number 999"),
    ):
        assert road.run_cli(library.root, *arguments) == 1
        assert words in capsys.readouterr().err
    control = Control()
    row = run(library, training(), control=control, on_start=At(5, control.interrupt).start)
    assert road.run_cli(library.root, "resume", row.id, "--step", 4) == 1
    assert "there are: 5" in capsys.readouterr().err
    assert road.run_cli(library.root, "checkpoints") == 0
    assert row.title in capsys.readouterr().out
    assert road.run_cli(library.root, "job", "retry", row.id) == 0  # the same as `resume`
    assert library.jobs.get(row.id).status == "finished"
