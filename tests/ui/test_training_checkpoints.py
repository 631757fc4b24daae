"""Checkpoints on the card of a training, and its place in the queue: through the real buttons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QLabel

from mistudio.engine.training import checkpoints
from mistudio.engine.training.checkpoints import AutoSave
from mistudio.jobs.control import Control
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Train
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.training.cards import JobCard
from mistudio.ui.training.checkpoints import AutoSaveRow, about
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.training.presenter import import_engine
from mistudio.ui.training.queue import ordinal
from mistudio.ui.widgets import ConfirmDialog

from .checks import cut_off, nameless, too_small
from .screens import shot

POINT = "blocks.1.hook_resid_post"
CONFIG = {
    "steps": 20_000, "batch_size": 64, "expansion": 1, "k": 4, "context": 32,
    "autosave_minutes": 0, "autosave_steps": 50,
}  # fmt: skip


@pytest.fixture
def services(
    trained_library: Library, services_of: Callable[[Library], Services], qtbot: Any
) -> Services:
    import_engine()
    return services_of(trained_library)


@pytest.fixture
def page(services: Services, qtbot: Any) -> TrainingPage:
    shown = TrainingPage(services)
    qtbot.addWidget(shown)
    shown.resize(1280, 900)
    shown.show()
    return shown


def training(**config: Any) -> Train:
    return Train(1, 1, [POINT], {**CONFIG, **config}, loss_tokens=256)


def card_of(page: TrainingPage, job_id: int) -> JobCard:
    page.refresh()
    return next(card for card in page.job_cards() if card.job.id == job_id)


def click(qtbot: Any, button: Any) -> None:
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def listed(card: JobCard) -> list[int]:
    return [entry.checkpoint.step for entry in card.checkpoints.rows]


@pytest.mark.slow
def test_save_load_and_delete_on_a_running_training(
    qtbot: Any, services: Services, page: TrainingPage, answer_dialogs: Any
) -> None:
    library, jobs = services.library, services.jobs
    job_id = jobs.submit(training())
    card = card_of(page, job_id)
    section = card.checkpoints
    assert section.empty.text() == "No checkpoints saved yet"
    section.set_expanded(True)
    qtbot.waitUntil(lambda: len(listed(card)) >= 2)
    assert section.button.text() == f"Checkpoints ({len(listed(card))})"

    qtbot.waitUntil(section.save.isEnabled)
    click(qtbot, section.save)
    assert section.told.text() == "Saving…" and not section.save.isEnabled()
    qtbot.waitUntil(lambda: section.told.text().startswith("Saved at step "))
    report = jobs.save_report(job_id)
    assert report is not None and f"step {report.step:,} (" in section.told.text()
    qtbot.waitUntil(lambda: report.step in listed(card))
    (mine,) = [entry for entry in section.rows if entry.checkpoint.step == report.step]
    assert mine.title.text() == f"Step {report.step:,}"
    assert mine.about.text() == about(mine.checkpoint)
    assert mine.checkpoint.kept

    click(qtbot, card.pause)
    qtbot.waitUntil(lambda: card.job.status == "paused")
    qtbot.waitUntil(lambda: not section._reading)
    for size in ((1280, 720), (1920, 1080)):
        page.resize(*size)
        page.column_page.widget().layout().activate()
        page.column_page.verticalScrollBar().setValue(
            card.mapTo(page.column_page.widget(), card.rect().topLeft()).y() - 24
        )
        shot(page, f"training_checkpoints-{size[0]}x{size[1]}")
        assert cut_off(section) == [] and nameless(section) == [] and too_small(section) == []

    # refused by the user: nothing happens
    answer_dialogs("ConfirmDialog.exec", 0)
    click(qtbot, mine.load)
    assert section.told.text().startswith("Saved") and library.jobs.get(job_id).status == "paused"

    history = len(jobs.metrics(job_id))
    answer_dialogs("ConfirmDialog.exec", 1)
    click(qtbot, mine.load)
    assert section.told.text() == f"Loading step {report.step:,}…"
    qtbot.waitUntil(lambda: section.told.text().startswith("Back at step "))
    assert library.jobs.get(job_id).status == "paused"
    rows = jobs.metrics(job_id)
    assert rows[-1]["step"] < report.step and len(rows) <= history
    qtbot.waitUntil(lambda: card._n_rows == len(rows))
    qtbot.waitUntil(lambda: max(listed(card)) == report.step)
    if card.charts is not None:
        assert card.charts.n_rows == len(rows)

    (mine,) = [entry for entry in section.rows if entry.checkpoint.step == report.step]
    answer_dialogs("ConfirmDialog.exec", 1)
    click(qtbot, mine.delete)
    qtbot.waitUntil(lambda: report.step not in listed(card))
    folder = library.checkpoint_folder(job_id)
    assert report.step not in [c.step for c in checkpoints.listing(folder)]

    click(qtbot, card.resume)
    qtbot.waitUntil(lambda: library.jobs.get(job_id).status == "running")
    qtbot.waitUntil(lambda: jobs.metrics(job_id)[-1]["step"] > report.step)
    steps = [row["step"] for row in jobs.metrics(job_id)]
    assert steps == sorted(set(steps))
    jobs.cancel(job_id)
    qtbot.waitUntil(lambda: library.jobs.get(job_id).status == "cancelled")
    page.refresh()
    assert not card_of(page, job_id).checkpoints.isVisible()


@pytest.mark.slow
def test_how_often_it_saves_is_changed_while_it_runs_and_remembered(
    qtbot: Any, services: Services, page: TrainingPage
) -> None:
    library, jobs = services.library, services.jobs
    job_id = jobs.submit(training(autosave_steps=None))
    card = card_of(page, job_id)
    section = card.checkpoints
    section.set_expanded(True)
    qtbot.waitUntil(section.save.isEnabled)
    assert section.auto.value == AutoSave(None, 0.0) and not section.auto.steps.isEnabled()
    section.auto.steps.setValue(100)
    click(qtbot, section.auto.by_steps)
    qtbot.waitUntil(lambda: section.told.text() == "From now on it saves every 100 steps")
    config = library.jobs.get(job_id).params["config"]
    assert (config["autosave_steps"], config["autosave_minutes"]) == (100, 0.0)
    qtbot.waitUntil(lambda: len(listed(card)) >= 1)
    assert all(step % 100 == 0 for step in listed(card))
    click(qtbot, section.auto.by_steps)
    qtbot.waitUntil(lambda: section.told.text() == "It saves no more by itself")
    assert jobs._thread(job_id).control.auto_save == AutoSave(None, 0.0)
    jobs.cancel(job_id)
    qtbot.waitUntil(lambda: jobs.running() == [])


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_the_checkpoint_that_is_loaded(
    qtbot: Any, services: Services, page: TrainingPage, answer_dialogs: Any
) -> None:
    library = services.library
    job = training(steps=120, autosave_steps=40)
    job_id = submit(library, job)
    control = Control()

    def start(context: Any) -> None:
        report = context.report

        def watched(*args: Any, **options: Any) -> None:
            report(*args, **options)
            rows = context.metrics.since(0) if context.metrics else []
            if rows and rows[-1]["step"] >= 100:
                control.interrupt()

        context.report = watched

    run_job(library, job, job_id, control, on_start=start)
    card = card_of(page, job_id)
    section = card.checkpoints
    qtbot.waitUntil(lambda: len(listed(card)) >= 3)
    assert section.isVisible() and not section.save.isVisible()
    section.set_expanded(True)
    (row,) = [entry for entry in section.rows if entry.checkpoint.step == 40]
    path = row.checkpoint.folder / POINT / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    told: list[str] = []

    def agree(dialog: ConfirmDialog) -> int:
        told.extend(label.text() for label in dialog.findChildren(QLabel))
        return 1

    answer_dialogs("ConfirmDialog.exec", agree)
    answer_dialogs("ConfirmDialog.exec", agree)
    click(qtbot, row.load)
    qtbot.waitUntil(lambda: "cannot be used" in section.told.text())
    assert library.jobs.get(job_id).status == "interrupted" and len(listed(card)) >= 3
    assert "Go back to step 40?" in told
    assert "What was learnt after step 40 and 2 newer checkpoints is discarded" in " ".join(told)
    path.write_bytes(whole)
    (row,) = [entry for entry in section.rows if entry.checkpoint.step == 40]
    click(qtbot, row.load)
    qtbot.waitUntil(lambda: library.jobs.get(job_id).status == "finished")
    (event,) = library.trainings.all()[0].record["events"]
    assert (event["event"], event["step"]) == ("went on", 40)


def test_waiting_trainings_say_after_what_they_start(
    qtbot: Any, services: Services, page: TrainingPage
) -> None:
    library, jobs = services.library, services.jobs
    ids = [jobs.submit(training(seed=n)) for n in range(3)]
    first, second, third = (card_of(page, job_id) for job_id in ids)
    assert not first.queue.isVisible()
    assert not second.checkpoints.isVisible() and not second.checkpoints.save.isEnabled()
    title = library.jobs.get(ids[0]).title
    assert second.queue.text.text() == f"1st in the queue, starts after “{title}”"
    assert third.queue.text.text().startswith("2nd in the queue, starts after ")
    assert second.queue.later.isEnabled() and not second.queue.earlier.isEnabled()
    assert nameless(second.queue) == [] and too_small(second.queue) == []
    click(qtbot, third.queue.earlier)
    assert third.queue.text.text().startswith("1st in the queue")
    assert second.queue.text.text().startswith("2nd in the queue")
    page.column_page.verticalScrollBar().setValue(
        third.mapTo(page.column_page.widget(), third.rect().topLeft()).y() - 24
    )
    shot(page, "training_queue-1280x900")
    click(qtbot, second.cancel)
    assert third.queue.isVisible() and not third.queue.later.isVisible()
    jobs.cancel(ids[0])
    qtbot.waitUntil(lambda: jobs.running() == [ids[2]])  # by itself
    qtbot.waitUntil(lambda: not third.queue.isVisible())
    jobs.cancel(ids[2])
    qtbot.waitUntil(lambda: jobs.running() == [])


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 101, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "101st", "111th",
    ]  # fmt: skip


def test_auto_save_keeps_what_is_typed_until_it_is_told(qtbot: Any, themed: Any) -> None:
    shown = AutoSaveRow()
    qtbot.addWidget(shown)
    shown.set_value(AutoSave(7, 0.5))  # beyond the limits: from a template
    assert shown.value == AutoSave(7, 1.0)
    told: list[AutoSave] = []
    shown.changed.connect(told.append)
    shown.steps.setValue(300)
    shown.set_value(AutoSave(7, 0.0))
    assert shown.value.steps == 300
    qtbot.waitUntil(lambda: told == [AutoSave(300, 1.0)])
    shown.set_value(AutoSave(None, 0.0))
    assert shown.value == AutoSave(None, 0.0) and not shown.steps.isEnabled()
    assert nameless(shown) == [] and too_small(shown) == []
