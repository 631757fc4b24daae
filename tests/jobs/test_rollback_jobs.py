"""A training is taken back to a checkpoint, as if what came after had never been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from journeys import road

from mistudio.engine.training import checkpoints
from mistudio.engine.training.checkpoints import AutoSave
from mistudio.errors import CorruptFile, InvalidInput, NotFound
from mistudio.jobs import sources
from mistudio.jobs.control import Control
from mistudio.jobs.job import JobContext, keep_auto_save, read_metrics, run_job, take_up
from mistudio.jobs.kinds import Train, job_from_row
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

from .test_training_jobs import At, done, files, history, left, run, training


class Acts:
    """Does one thing after another, each when a step is done or the job pauses (`PAUSED`); from
    the job's own thread, so that no time is waited for."""

    PAUSED = -1

    def __init__(self, control: Control, *acts: tuple[int, Callable[[], None]]) -> None:
        self.control, self.acts = control, list(acts)
        self.paused_at: list[tuple[int, str]] = []
        self.context: JobContext

    def start(self, context: JobContext) -> None:
        self.context = context
        report, check = context.report, context.check

        def watched(done: float, total: float | None = None, **rest: Any) -> None:
            report(done, total, **rest)
            rows = context.metrics.since(0) if context.metrics else []
            while self.acts and rows and 0 <= self.acts[0][0] <= rows[-1]["step"] + 1:
                self.acts.pop(0)[1]()

        def checked() -> None:
            control = self.control
            if control.paused and self.acts and self.acts[0][0] == self.PAUSED:
                rows = context.metrics.since(0) if context.metrics else []
                self.paused_at.append((rows[-1]["step"] + 1, context.snapshot().phase))
                self.acts.pop(0)[1]()
            check()

        context.report = watched  # type: ignore[method-assign]
        context.check = checked  # type: ignore[method-assign]


def steps(library: Library, job_id: int) -> list[int]:
    return [c.step for c in checkpoints.listing(library.checkpoint_folder(job_id))]


# --- while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extraction_id", "source"), [(1, "auto"), (None, "stream"), (None, "hybrid")]
)
def test_a_run_that_was_rolled_back_ends_as_if_the_later_steps_had_never_been(
    library: Library, extraction_id: int | None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PHASE_TOKENS", 3000)
    options = {"extraction_id": extraction_id, "source": source}
    whole = done(library, training(**options))["training_id"]

    control = Control()
    seen: dict[str, Any] = {}

    def look() -> None:
        job_id = acts.context.job_id
        seen["status"] = library.jobs.get(job_id).status
        seen["steps"] = steps(library, job_id)
        folder = library.checkpoint_folder(job_id)
        seen["rows"] = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
        seen["new_log"] = acts.context.metrics is not before[0]
        control.resume()

    def back() -> None:
        before.append(acts.context.metrics)
        control.roll_back(5)

    before: list[Any] = []
    acts = Acts(control, (17, back), (Acts.PAUSED, look))
    job = training({"autosave_steps": 5}, **options)
    row = run(library, job, control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert acts.paused_at == [(5, "train")]
    assert seen == {"status": "paused", "steps": [5], "rows": [0, 1, 2, 3, 4], "new_log": True}
    found = row.result["training_id"]
    assert files(library, found) == files(library, whole)
    assert history(library, found) == history(library, whole)
    record = library.trainings.get(found).record
    (event,) = record["events"]
    assert (event["event"], event["step"], event["from_step"]) == ("rolled back", 5, 17)
    assert record["tokens"] == 24 * 256
    assert left(library) == []


def test_a_paused_run_is_rolled_back_and_pauses_there(library: Library) -> None:
    whole = done(library, training())["training_id"]
    control = Control()
    acts = Acts(
        control,
        (12, control.pause),
        (Acts.PAUSED, lambda: control.roll_back(4)),
        (Acts.PAUSED, lambda: control.roll_back(4)),  # twice is no harm
        (Acts.PAUSED, control.resume),
    )
    job = training({"autosave_steps": 4})
    row = run(library, job, control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert [place for place, _ in acts.paused_at] == [12, 4, 4]
    assert files(library, row.result["training_id"]) == files(library, whole)
    record = library.trainings.get(row.result["training_id"]).record
    assert [(e["from_step"], e["step"]) for e in record["events"]] == [(12, 4), (4, 4)]


def test_a_run_is_rolled_back_while_it_is_judged(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish came in the last moment: the end of the training was already over."""
    from mistudio.jobs import training as module

    whole = done(library, training())["training_id"]
    control = Control()
    real, asked = module._losses, []

    def judged(*args: Any) -> Any:
        if not asked:
            asked.append(1)
            control.roll_back(6)
        return real(*args)

    monkeypatch.setattr(module, "_losses", judged)
    acts = Acts(control, (Acts.PAUSED, control.resume))
    job = training({"autosave_steps": 6})
    row = run(library, job, control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert acts.paused_at == [(6, "train")]
    assert files(library, row.result["training_id"]) == files(library, whole)


def test_a_checkpoint_that_is_gone_costs_nothing_but_the_way_there(library: Library) -> None:
    whole = done(library, training())["training_id"]
    control = Control()

    def act() -> None:
        checkpoints.delete(library.checkpoint_folder(acts.context.job_id), 4)
        control.roll_back(4)

    acts = Acts(control, (14, act), (Acts.PAUSED, control.resume))
    row = run(library, training({"autosave_steps": 4}), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert acts.paused_at == [(12, "train")]
    record = library.trainings.get(row.result["training_id"]).record
    assert record["events"] == []
    assert "There is no such checkpoint" in record["notes"][0]
    assert files(library, row.result["training_id"]) == files(library, whole)


def test_who_resumes_at_once_is_not_kept_waiting(library: Library) -> None:
    control = Control()
    states: list[str] = []

    def act() -> None:
        control.roll_back(4)
        accept = control.accept_roll_back

        def accepted() -> int | None:
            step = accept()
            control.resume()  # while the checkpoint is being read
            return step

        control.accept_roll_back = accepted  # type: ignore[method-assign]

    def look() -> None:
        states.append(library.jobs.get(acts.context.job_id).status)

    acts = Acts(control, (14, act), (16, look))
    row = run(library, training({"autosave_steps": 4}), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert (acts.paused_at, states) == ([], ["running"])


def test_a_run_that_was_rolled_back_can_be_stopped_and_cancelled(library: Library) -> None:
    for stop, status in (("interrupt", "interrupted"), ("cancel", "cancelled")):
        control = Control()
        acts = Acts(
            control,
            (14, lambda control=control: control.roll_back(4)),
            (Acts.PAUSED, getattr(control, stop)),
        )
        row = run(library, training({"autosave_steps": 4}), control=control, on_start=acts.start)
        assert row.status == status
        assert steps(library, row.id) == ([4] if status == "interrupted" else [])


# --- saving ---------------------------------------------------------------------------------------


def test_saving_now_is_reported_and_stays(library: Library) -> None:
    control = Control()
    reports: list[Any] = []
    kept: list[Any] = []

    def look() -> None:
        reports.append(acts.context.save_report)
        folder = library.checkpoint_folder(acts.context.job_id)
        kept.extend((c.step, c.kept, c.bytes) for c in checkpoints.listing(folder))

    acts = Acts(control, (7, control.save_now), (11, look))
    row = run(library, training(), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    (report,) = reports
    assert (report.number, report.step, report.problem) == (1, 7, "")
    assert kept == [(7, True, report.bytes)] and report.bytes > 10_000


def test_a_paused_training_takes_one_step_to_be_saved_and_pauses_again(library: Library) -> None:
    control = Control()
    found: list[Any] = []

    def look() -> None:
        found.extend(steps(library, acts.context.job_id))
        control.resume()

    acts = Acts(control, (7, control.pause), (Acts.PAUSED, control.save_now), (Acts.PAUSED, look))
    row = run(library, training(), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert acts.paused_at == [(7, "train"), (8, "train")]
    assert found == [8]


def test_a_save_that_failed_is_reported(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.save

    def full(folder: Any, step: int, *rest: Any, **options: Any) -> Any:
        if step < 20:
            raise OSError(28, "No space left on device")
        return real(folder, step, *rest, **options)

    monkeypatch.setattr(checkpoints, "save", full)
    control = Control()
    reports: list[Any] = []
    acts = Acts(
        control, (7, control.save_now), (11, lambda: reports.append(acts.context.save_report))
    )
    row = run(library, training(), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert [(r.number, r.problem) for r in reports] == [(1, "The disk is full")]


def test_a_running_training_saves_as_often_as_it_is_told(library: Library) -> None:
    control = Control()
    found: list[int] = []
    acts = Acts(
        control,
        (6, lambda: control.save_every(AutoSave(8, 0))),
        (18, lambda: found.extend(steps(library, acts.context.job_id))),
    )
    row = run(library, training({"autosave_steps": 5}), control=control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert found == [16, 8, 5]


# --- after it ended badly -------------------------------------------------------------------------


def interrupted(library: Library, step: int = 14, **config: Any) -> JobRecord:
    control = Control()
    row = run(
        library,
        training({"autosave_steps": 4, **config}),
        control=control,
        on_start=At(step, control.interrupt).start,
    )
    assert row.status == "interrupted"
    return row


def go_on(library: Library, row: JobRecord) -> JobRecord:
    return run_job(library, job_from_row(row.kind, row.params), row.id)


def test_an_interrupted_training_goes_on_from_an_earlier_checkpoint(library: Library) -> None:
    whole = done(library, training())["training_id"]
    row = interrupted(library)
    assert steps(library, row.id) == [14, 12, 8, 4]
    row = take_up(library, row.id, 8)
    assert (row.status, steps(library, row.id)) == ("queued", [8, 4])
    row = go_on(library, row)
    assert row.status == "finished", row.error
    found = row.result["training_id"]
    assert files(library, found) == files(library, whole)
    assert history(library, found) == history(library, whole)
    (event,) = library.trainings.get(found).record["events"]
    assert (event["event"], event["step"], event["from_step"]) == ("went on", 8, 14)


def test_what_cannot_be_gone_back_to_leaves_everything_as_it_was(library: Library) -> None:
    row = interrupted(library)
    folder = library.checkpoint_folder(row.id)
    with pytest.raises(NotFound):
        take_up(library, row.id, 5)
    path = folder / "step-00000008" / "source.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        take_up(library, row.id, 8)
    assert (library.jobs.get(row.id).status, steps(library, row.id)) == (
        "interrupted",
        [14, 12, 8, 4],
    )
    take_up(library, row.id)
    with pytest.raises(InvalidInput):  # somebody was quicker
        take_up(library, row.id, 4)
    assert steps(library, row.id) == [14, 12, 8, 4]


def test_how_often_it_saves_is_remembered_for_when_it_goes_on(library: Library) -> None:
    row = interrupted(library, step=6)
    keep_auto_save(library, row.id, AutoSave(10, 0.0))
    row = take_up(library, row.id)
    job = job_from_row(row.kind, row.params)
    assert isinstance(job, Train)
    assert (job.config["autosave_steps"], job.config["autosave_minutes"]) == (10, 0.0)
    found: list[int] = []
    control = Control()
    acts = Acts(control, (22, lambda: found.extend(steps(library, row.id))))
    row = run_job(library, job, row.id, control, on_start=acts.start)
    assert row.status == "finished", row.error
    assert found == [20, 10, 6, 4]
    keep_auto_save(library, row.id, AutoSave(None, 5.0))
    assert library.jobs.get(row.id).params["config"]["autosave_steps"] is None


def test_a_rollback_that_was_killed_goes_on(library: Library, tmp_path: Any) -> None:
    """Killed between the deletion of later checkpoints and everything else."""
    whole = done(library, training())["training_id"]
    row = interrupted(library)
    checkpoints.rewind(library.checkpoint_folder(row.id), 4)
    rows = read_metrics(library.checkpoint_folder(row.id) / "metrics.jsonl")
    assert rows[-1]["step"] == 13  # not yet cut
    row = go_on(library, take_up(library, row.id))
    assert row.status == "finished", row.error
    assert history(library, row.result["training_id"]) == history(library, whole)
    assert files(library, row.result["training_id"]) == files(library, whole)


def test_checkpoints_are_listed_gone_back_to_and_deleted_on_the_command_line(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    row = interrupted(library)
    assert road.run_cli(library.root, "checkpoints", row.id, "--delete", 12) == 0
    assert steps(library, row.id) == [14, 8, 4]
    assert road.run_cli(library.root, "checkpoints", row.id, "--delete", 12) == 1
    capsys.readouterr()
    assert road.run_cli(library.root, "checkpoints", row.id) == 0
    out = capsys.readouterr().out
    assert "14" in out and "best" in out
    assert road.run_cli(library.root, "resume", row.id, "--step", 8) == 0
    assert library.jobs.get(row.id).status == "finished"
