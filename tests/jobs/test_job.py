"""Running a job: what its row says at every turn, its progress, its pauses, its end."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import pytest

from mistudio.errors import Incompatible, InvalidInput
from mistudio.jobs.control import Control, Meter, Phase, Snapshot
from mistudio.jobs.job import JobContext, run_job, submit
from mistudio.jobs.kinds import (
    KINDS,
    Ablate,
    AddDataset,
    AddModel,
    AddSampleDataset,
    AddTokenizer,
    AnalyseDataset,
    Calibrate,
    CheckQuality,
    CoActivate,
    Demo,
    DescribeFeatures,
    Discover,
    DiscoverRun,
    DownloadDataset,
    DownloadSae,
    Export,
    ExportFeatures,
    ExportVector,
    ExportWholeContexts,
    Extract,
    ImportSae,
    IndexDataset,
    LayerStudy,
    MapFeatures,
    Measure,
    MeasureSae,
    PromptBatch,
    SampleFeatures,
    ScoreFeatures,
    ScoreOutputs,
    Steer,
    Sweep,
    Tokenize,
    Train,
    job_from_row,
)
from mistudio.jobs.stages import Stage
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library


@dataclass(frozen=True)
class Work:
    """A job that does what a test hands it."""

    do: Callable[[JobContext], dict[str, Any]]
    phases: tuple[Phase, ...] = (Phase("first", 1), Phase("second", 3))

    kind: ClassVar[str] = "work"
    lane: ClassVar[str] = "disk"

    def title(self, library: Library) -> str:
        return "Some work"

    def run(self, context: JobContext) -> dict[str, Any]:
        return self.do(context)


def run(library: Library, do: Callable[[JobContext], Any], **options: Any) -> JobRecord:
    job_id = library.jobs.submit("work", "Some work", "disk", {})
    return run_job(library, Work(do), job_id, **options)


# --- how a job ends -------------------------------------------------------------------------------


def test_a_finished_job_keeps_its_result_and_no_work_folder(empty: Library) -> None:
    seen = []

    def do(context: JobContext) -> dict[str, Any]:
        row = empty.jobs.get(context.job_id)
        seen.append((row.status, row.phase, context.work_folder.is_dir()))
        (context.work_folder / "scratch").write_text("x")
        return {"answer": 42}

    row = run(empty, do)
    assert seen == [("running", "first", True)]
    assert (row.status, row.fraction, row.result) == ("finished", 1.0, {"answer": 42})
    assert row.started_at and row.ended_at and row.error == {}
    assert list((empty.root / "work").iterdir()) == []


def test_a_known_error_is_kept_in_its_own_words(empty: Library) -> None:
    def do(context: JobContext) -> None:
        (context.work_folder / "half").write_text("x")
        raise InvalidInput("No good", "It has 3 legs.", "Use 4.", field="legs")

    row = run(empty, do)
    assert row.status == "failed"
    assert row.error == {
        "title": "No good",
        "what": "It has 3 legs.",
        "next_step": "Use 4.",
        "retryable": False,
        "field": "legs",
    }
    assert list((empty.root / "work").iterdir()) == []


def test_a_bug_is_kept_with_its_traceback(empty: Library) -> None:
    def do(context: JobContext) -> None:
        raise KeyError("a surprise")

    row = run(empty, do)
    assert row.status == "failed"
    assert row.error["what"] == "KeyError: 'a surprise'"
    assert "test_job.py" in row.error["traceback"]
    assert "bug" in row.error["next_step"]


def test_a_panic_of_a_library_is_kept_as_a_bug_is(empty: Library) -> None:
    """The tokenizers library panics on some broken files; what it raises then is no Exception."""

    class PanicException(BaseException):
        pass

    def do(context: JobContext) -> None:
        raise PanicException("index out of bounds")

    row = run(empty, do)
    assert row.status == "failed"
    assert row.error["what"] == "PanicException: index out of bounds"
    assert list((empty.root / "work").iterdir()) == []


def test_a_result_that_cannot_be_kept_is_a_failure_and_not_a_crash(empty: Library) -> None:
    row = run(empty, lambda context: {"object": object()})
    assert row.status == "failed"
    assert "not JSON serializable" in row.error["what"]


@pytest.mark.parametrize(
    ("error", "title"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (OSError("16384 requested and 8192 written"), "The disk is full"),
        (OSError(errno.EFBIG, "File too large", "a.bin"), "A file would become too large"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "No permission"),
        (MemoryError(), "Out of memory"),
    ],
)
def test_errors_of_the_system_become_sentences(
    empty: Library, error: Exception, title: str
) -> None:
    def do(context: JobContext) -> None:
        raise error

    row = run(empty, do)
    assert (row.status, row.error["title"]) == ("failed", title)
    assert row.error["next_step"]
    assert "traceback" not in row.error


def test_a_cancelled_job_is_no_error(empty: Library) -> None:
    control = Control()

    def do(context: JobContext) -> None:
        control.cancel()
        context.check()

    row = run(empty, do, control=control)
    assert (row.status, row.error, row.result) == ("cancelled", {}, {})


def test_a_job_cancelled_in_the_queue_does_not_run(empty: Library) -> None:
    job_id = empty.jobs.submit("work", "Some work", "disk", {})
    empty.jobs.move(job_id, ("queued",), "cancelled")
    row = run_job(empty, Work(lambda context: pytest.fail("it ran")), job_id)
    assert row.status == "cancelled"


def test_a_job_runs_once_however_often_it_is_started(empty: Library) -> None:
    job_id = empty.jobs.submit("work", "Some work", "disk", {})
    times: list[int] = []
    for _ in range(2):
        run_job(empty, Work(lambda context: times.append(1) or {}), job_id)
    assert times == [1]


def test_a_job_that_was_asked_to_finish_early_keeps_what_it_has(empty: Library) -> None:
    control = Control()

    def do(context: JobContext) -> dict[str, Any]:
        for step in range(1000):
            context.check()
            if context.wants_finish():
                return {"steps": step}
            if step == 6:
                control.finish_early()
        return {}

    row = run(empty, do, control=control)
    assert (row.status, row.result) == ("finished", {"steps": 7})


# --- pause ----------------------------------------------------------------------------------------


def test_a_paused_job_waits_says_so_and_goes_on(empty: Library) -> None:
    control = Control()
    statuses: list[str] = []
    snapshots: list[Snapshot] = []

    def do(context: JobContext) -> dict[str, Any]:
        context.report(1, 2)
        control.pause()

        def watch() -> None:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                if empty.jobs.get(context.job_id).status == "paused":
                    break
                time.sleep(0.01)
            time.sleep(0.3)
            statuses.append(empty.jobs.get(context.job_id).status)
            empty.close()
            control.resume()

        watcher = threading.Thread(target=watch)
        watcher.start()
        context.check()
        watcher.join()
        statuses.append(empty.jobs.get(context.job_id).status)
        snapshots.append(context.snapshot())
        return {}

    began = time.monotonic()
    row = run(empty, do, control=control)
    took = time.monotonic() - began
    assert statuses == ["paused", "running"]
    assert row.status == "finished"
    assert took > 0.3
    assert snapshots[0].elapsed < took - 0.29  # the pause does not count


def test_a_pause_counts_once_for_all_threads_of_a_job(
    empty: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, idle, waiting = Control(), [], threading.Barrier(3)
    monkeypatch.setattr(Meter, "add_idle", lambda meter, seconds: idle.append(seconds))

    def check(context: JobContext) -> None:
        waiting.wait()
        context.check()

    def resume(job_id: int) -> None:
        while empty.jobs.get(job_id).status != "paused":
            time.sleep(0.01)
        time.sleep(0.2)  # for the others to wait too
        control.resume()

    def do(context: JobContext) -> dict[str, Any]:
        control.pause()
        threads = [threading.Thread(target=check, args=(context,)) for _ in range(2)]
        threads.append(threading.Thread(target=resume, args=(context.job_id,)))
        for thread in threads:
            thread.start()
        check(context)
        for thread in threads:
            thread.join()
        return {}

    assert run(empty, do, control=control).status == "finished"
    assert len(idle) == 1


def test_a_paused_job_can_be_cancelled(empty: Library) -> None:
    control = Control()

    def do(context: JobContext) -> None:
        control.pause()
        threading.Timer(0.05, control.cancel).start()
        context.check()

    assert run(empty, do, control=control).status == "cancelled"


def test_a_job_that_ends_does_not_pause() -> None:
    for end in (Control.cancel, Control.finish_early):
        control = Control()
        end(control)
        control.pause()
        assert not control.paused


def test_finishing_early_wakes_a_paused_job() -> None:
    control = Control()
    control.pause()
    threading.Timer(0.05, control.finish_early).start()
    assert control.check() >= 0.04
    assert control.wants_finish


# --- progress -------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter() -> tuple[Meter, Clock]:
    clock = Clock()
    phases = (Phase("load", 10), Phase("work", 60), Phase("tidy", 30))
    return Meter(7, phases, clock), clock


def test_the_fraction_counts_phases_by_their_weight() -> None:
    m, _ = meter()
    assert (m.snapshot().phase, m.snapshot().fraction) == ("load", 0.0)
    m.report(5, 10, None, {})
    assert m.snapshot().fraction == pytest.approx(0.05)
    m.report(1, 4, "work", {})
    assert m.snapshot().fraction == pytest.approx(0.1 + 0.6 / 4)
    m.report(2, None, None, {})  # the total is remembered
    assert m.snapshot().fraction == pytest.approx(0.1 + 0.6 / 2)
    m.report(0, None, "tidy", {})  # and belongs to its phase
    assert (m.snapshot().fraction, m.snapshot().total) == (pytest.approx(0.7), None)
    m.report(50, 10, None, {})
    assert m.snapshot().fraction == 1.0


def test_the_remaining_time_is_this_phases_speed_and_the_later_phases_weight() -> None:
    m, clock = meter()
    m.report(0, 10, "work", {})
    assert m.snapshot().remaining is None
    clock.now += 20
    m.report(5, 10, None, {})
    # 20 s for half of a phase of weight 60: 20 s to go here, 40 s * 30 / 60 for the next
    assert m.snapshot().remaining == pytest.approx(20 + 20)
    assert m.snapshot().elapsed == pytest.approx(20)


def test_no_time_is_promised_before_something_is_known() -> None:
    m, clock = meter()
    m.report(0, 10_000, "work", {})
    clock.now += 60
    m.report(1, 10_000, None, {})
    assert m.snapshot().remaining is None  # 0.01 % says nothing
    m.report(5000, 10_000, "tidy", {})
    clock.now += 0.1
    assert m.snapshot().remaining is None  # nor does a tenth of a second


def test_paused_time_counts_neither_as_elapsed_nor_towards_speed() -> None:
    m, clock = meter()
    m.report(0, 10, "tidy", {})
    clock.now += 10
    m.add_idle(8)
    m.report(5, 10, None, {})
    assert m.snapshot().elapsed == pytest.approx(2)
    assert m.snapshot().remaining == pytest.approx(2)


def test_metrics_belong_to_their_phase() -> None:
    m, _ = meter()
    m.report(1, 2, "work", {"loss": 3.0, "l0": 9})
    m.report(2, 2, None, {"loss": 2.0})
    assert m.snapshot().metrics == {"loss": 2.0, "l0": 9}
    m.report(0, 2, "tidy", {})
    assert m.snapshot().metrics == {}


def test_a_listener_hears_every_new_phase_at_once_and_the_rest_now_and_then(
    empty: Library,
) -> None:
    heard: list[Snapshot] = []

    def do(context: JobContext) -> dict[str, Any]:
        for done in range(200):
            context.report(done, 200)
        context.report(0, 10, phase="second")
        return {"phase": empty.jobs.get(context.job_id).phase}

    assert run(empty, do, listener=heard.append).result == {"phase": "second"}
    assert heard[-1].phase == "second"
    assert len(heard) < 20


def test_recorded_metrics_are_kept_in_memory_and_on_disk(empty: Library) -> None:
    def do(context: JobContext) -> dict[str, Any]:
        for step in range(3):
            context.record({"step": step})
        assert context.metrics is not None
        assert context.metrics.since(1) == [{"step": 1}, {"step": 2}]
        text = (context.work_folder / "metrics.jsonl").read_text()
        return {"lines": text.splitlines()}

    assert run(empty, do).result["lines"] == ['{"step": 0}', '{"step": 1}', '{"step": 2}']


# --- a step as part of a larger job ---------------------------------------------------------------


@dataclass
class Outer:
    reports: list[tuple[str | None, float]] = field(default_factory=list)
    details: list[object] = field(default_factory=list)
    checks: int = 0

    def check(self) -> None:
        self.checks += 1

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        assert total
        self.reports.append((phase, round(done / total, 6)))
        self.details.append(metrics.get("detail"))


def test_a_stage_maps_the_phases_of_a_step_onto_its_own() -> None:
    outer = Outer()
    stage = Stage(outer, "train", {"prepare": (0.0, 0.2), "learn": (0.2, 1.0)})
    stage.report(1, 2, phase="prepare")
    stage.report(2)
    stage.report(5, 10, phase="learn", loss=1.0)
    stage.report(10)
    assert outer.reports == [("train", value) for value in (0, 0.1, 0.2, 0.6, 1.0)]
    assert outer.details == ["", "prepare", "prepare", "learn", "learn"]
    stage.check()
    assert outer.checks == 1


def test_a_stage_without_parts_is_the_steps_own_share() -> None:
    outer = Outer()
    stage = Stage(outer, "extract")
    stage.report(3, 4, phase="whatever")
    assert outer.reports[-1] == ("extract", 0.75)


def test_a_stage_never_runs_backwards() -> None:
    outer = Outer()
    stage = Stage(outer, "train", {"a": (0.0, 0.5), "b": (0.5, 1.0)})
    for done, phase in ((2, "b"), (0, "a"), (4, "unknown"), (1, "b"), (9, "b"), (3, "b")):
        stage.report(done, 4, phase=phase)
    values = [value for _, value in outer.reports]
    assert values == sorted(values)
    assert values[-1] == 1.0


# --- a job from its row ---------------------------------------------------------------------------

EXAMPLES = (
    AddDataset("/a/b.jsonl", "text", "Name", True),
    AddSampleDataset(),
    DownloadDataset("a/b", "en", "train", "main", "text", "Name", True, 100, 10**6, False),
    IndexDataset(3),
    AnalyseDataset(3, True),
    AddTokenizer("openai-community/gpt2", "GPT-2"),
    Tokenize(3, 4, None, {"padding": "longest", "max_length": 64}),
    CheckQuality(2),
    AddModel("/models/tiny", "bf16"),
    Extract(1, 2, ["blocks.0.hook_resid_post"], 1000, 64, 4, 5),
    Train(1, 2, ["blocks.0.hook_mlp_out"], {"k": 8, "sparsity": "topk"}, 3, "My run", 512),
    Discover(5, 1000, 7, None, 50, False, 3),
    DiscoverRun(5, 1000, 7, 50, False, 3),
    Ablate(3, [1, 2], "mean", 8, 2, 5),
    CoActivate(3, 5000, 4),
    ScoreFeatures(3, [1, 2], 5),
    DescribeFeatures(3, [1, 2], None, "http://127.0.0.1:8080", "model", 20, False, 5),
    MapFeatures(3, "tsne", 10, 0.1, 20.0, True, 4),
    SampleFeatures(3, 5000),
    Calibrate(5, [1, 2], "clamp", ("Once",), True, 16, 3),
    ScoreOutputs(5, (1, 2)),
    Sweep(5, [[3, 1.5]], (1.0, 2.0), (2, 3), prompts=("Once",), seeds=(4,), name="Name"),
    PromptBatch(5, [{"features": [[3, 1.5]]}], prompts=("Once", "Twice"), temperature=0.9),
    LayerStudy(5, [[3, 1.5]], (2, 3), ([6, 1, 1.0, "add"],), prompts=("Once",), seeds=(4,)),
    ExportVector({"sae_id": 5}, "/tmp/x.gguf", "gguf", 2.0),
    Steer(5, [[3, 1.5], [4, -2.0]], "Hello", 0.9, 0.8, 20, 7, True, (1.0, 2.0)),
    Export(9, "/tmp/x", "saelens"),
    Export(None, "/tmp/x", "sparsify", 4),
    ExportFeatures(4, "/tmp/x.csv", "csv", "0-9", "Title", "res", "k8", "me", True),
    ExportWholeContexts(4, "/tmp/x", "neuronpedia_b", "0-9", "Title", "res", "k8", "me", True),
    ImportSae("/a/b", 2, "Name", "sparsify", 3, "mlp_out"),
    DownloadSae("a/b", "main", ["x/cfg.json"], "x", 2, "Name", 3, "mlp_out"),
    MeasureSae(5, 1, 4096),
    Measure(1, 2, ["blocks.0.hook_mlp_out"], {"k": 8}),
    Demo(4),
)


def test_every_kind_of_job_has_an_example_here() -> None:
    assert {type(job) for job in EXAMPLES} == set(KINDS.values())


@pytest.mark.parametrize("job", EXAMPLES, ids=lambda job: job.kind)
def test_every_job_comes_back_from_its_row_as_it_was(empty: Library, job: Any) -> None:
    job_id = empty.jobs.submit(job.kind, "title", job.lane, asdict(job))
    row = empty.jobs.get(job_id)
    assert job_from_row(row.kind, row.params) == job


@pytest.mark.parametrize("job", EXAMPLES, ids=lambda job: job.kind)
def test_a_row_of_a_newer_or_older_version_still_gives_a_job(job: Any) -> None:
    defaults = {name for name in asdict(job) if name not in _required(job)}
    older = {name: value for name, value in asdict(job).items() if name not in defaults}
    assert type(job_from_row(job.kind, {**older, "of_a_newer_version": 1})) is type(job)


def _required(job: Any) -> set[str]:
    from dataclasses import MISSING, fields

    return {f.name for f in fields(job) if f.default is MISSING and f.default_factory is MISSING}


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(Incompatible, match="'juggle'"):
        job_from_row("juggle", {})


def test_a_title_says_what_the_job_works_on(library: Library) -> None:
    titles = [
        (AddDataset("/a/book.txt"), "Add book.txt"),
        (Tokenize(1, 1), "Tokenize small for tiny-llama-0.9m"),
        (Discover(1), "Discover features of blocks.1.hook_resid_post (128 latents)"),
        (Export(1, "/x"), "Export first as saelens"),
    ]
    for job, title in titles:
        assert library.jobs.get(submit(library, job)).title == title
    train = Train(1, 1, ["blocks.2.hook_resid_post", "blocks.1.hook_resid_post"])
    assert train.title(library) == "Train on tiny-llama-0.9m + small, layer 1, 2"
    assert Steer(1, [[3, 1.5]], "x").title(library) == "Steer with #3 x 1.5"
    assert "2 sites" in Extract(1, 1, ["a", "b"]).title(library)
