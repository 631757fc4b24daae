"""Saved configurations in the training form: saved, loaded, marked, deleted, sent and taken in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication

from mistudio.engine.training.config import parse
from mistudio.jobs import templates
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.templates.import_dialog import ImportDialog
from mistudio.ui.templates.section import LIST_HEIGHT, TemplateSection
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.widgets import ConfirmDialog

from .checks import cut_off, nameless, too_small
from .screens import shot

SIZES = [(1280, 720), (1920, 1080)]


@pytest.fixture
def services(services_of: Callable[[Library], Services], trained_library: Library) -> Services:
    return services_of(trained_library)


@pytest.fixture
def page(qtbot: Any, services: Services) -> TrainingPage:
    made = TrainingPage(services)
    qtbot.addWidget(made)
    made.resize(*SIZES[0])
    made.show()
    return made


@pytest.fixture
def section(page: TrainingPage) -> TemplateSection:
    found = page.configuration.templates
    found.set_expanded(True)
    return found


def fill(page: TrainingPage, **values: str | bool) -> None:
    for name, value in values.items():
        page.configuration.fields[name].set_value(value)
    page.configuration._recheck.flush()


def saved(section: TemplateSection, name: str) -> Any:
    return section._services.library.templates.named("training", name)


def test_the_section_counts_what_there_is_and_shows_favourites_first(
    section: TemplateSection,
) -> None:
    assert "Training Templates" in section.button.text() and "(4)" in section.button.text()
    names = [line.template.name for line in section.rows()]
    assert names[0] == "5-minute classroom" and names[-1] == "Large Expansion"
    assert section._scroll.height() <= LIST_HEIGHT


def test_what_is_saved_comes_back_field_by_field(
    qtbot: Any, page: TrainingPage, section: TemplateSection
) -> None:
    fill(
        page, sparsity="jumprelu", wiring="skip_sae", expansion="4x", k="12", tokens="30,000",
        learning_rate="0.0007", optimizer="adamw", schedule="cosine", seed="7", auxk=False,
    )  # fmt: skip
    card = page.configuration
    card.layers.set_selected([1, 3])
    card.site.set_value("mlp_out")
    card.source.set_value("hybrid")
    before = card.form()
    assert card.refresh_check() is None and card.check and not card.check.errors
    config = card.check.config

    qtbot.mouseClick(section.save, Qt.MouseButton.LeftButton)
    assert section.form.isVisible() and section.name.text().startswith("skip_4x_30000tokens_")
    qtbot.keyClicks(section.name, "mine")  # the whole name is selected
    section.description.setText("for the lecture")
    qtbot.mouseClick(section.commit, Qt.MouseButton.LeftButton)
    template = saved(section, "mine")
    assert template is not None and not section.form.isVisible()
    assert template.config["model"]["name"] == "tiny-llama-0.9m"
    assert parse(template.config["hyperparameters"]) == parse(config)

    qtbot.mouseClick(card.reset, Qt.MouseButton.LeftButton)
    fill(page, sparsity="batchtopk", wiring="sae", k="32", expansion="8", tokens="2,000,000")
    card.layers.set_selected([0])
    card.source.set_value("auto")
    card.model.setCurrentIndex(0)  # none
    mine = lambda: [line for line in section.rows() if line.template.name == "mine"]  # noqa: E731
    qtbot.waitUntil(lambda: len(mine()) == 1)
    (line,) = mine()
    qtbot.mouseClick(line.load, Qt.MouseButton.LeftButton)
    after = card.form()
    assert after.layers == before.layers and after.site == before.site
    assert (after.model, after.dataset, after.source) == (before.model, before.dataset, "hybrid")
    assert card.check and card.check.config == config and not card.check.blocker


def test_a_wrong_form_is_not_saved(
    qtbot: Any, page: TrainingPage, section: TemplateSection
) -> None:
    fill(page, k="0")
    qtbot.mouseClick(section.save, Qt.MouseButton.LeftButton)
    assert not section.form.isVisible()


def test_a_name_is_needed_and_must_be_free(
    qtbot: Any, page: TrainingPage, section: TemplateSection
) -> None:
    qtbot.mouseClick(section.save, Qt.MouseButton.LeftButton)
    section.name.setText("Large Expansion")
    assert not section.commit.isEnabled()
    assert "There is one of this name" in section._name_row.error.text()
    section.name.setText("   ")
    assert not section.commit.isEnabled()
    section.name.setText("new")
    qtbot.keyClick(section.name, Qt.Key.Key_Return)
    assert saved(section, "new") is not None


def test_seeds_load_and_layers_that_the_model_lacks_are_said(
    page: TrainingPage, section: TemplateSection
) -> None:
    card = page.configuration
    for name in ("5-minute classroom", "Fast Prototyping", "High Quality SAE", "Large Expansion"):
        template = saved(section, name)
        card.load_template(template)
        assert card.check is not None and card.check.errors == {}
        loaded = parse(card.check.config)
        for key, value in template.config["hyperparameters"].items():
            assert getattr(loaded, key) == value, (name, key)


def test_a_star_and_a_deletion(
    qtbot: Any, monkeypatch: pytest.MonkeyPatch, section: TemplateSection
) -> None:
    last = section.rows()[-1]
    qtbot.mouseClick(last.star, Qt.MouseButton.LeftButton)
    assert saved(section, "Large Expansion").favourite
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    count = len(section.rows())
    (line,) = [line for line in section.rows() if line.template.name == "Large Expansion"]
    qtbot.mouseClick(line.delete, Qt.MouseButton.LeftButton)
    assert saved(section, "Large Expansion") is None
    qtbot.waitUntil(lambda: len(section.rows()) == count - 1)
    assert "(3)" in section.button.text()


def test_export_and_import_through_the_window(
    qtbot: Any, tmp_path: Path, page: TrainingPage, section: TemplateSection
) -> None:
    path = tmp_path / "out.json"
    section.export_to(path)
    qtbot.waitUntil(path.exists)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["training_templates"][0]["name"] = "from afar"
    document["training_templates"][1]["config"]["hyperparameters"]["k"] = -4
    path.write_text(json.dumps(document), encoding="utf-8")
    section.import_from(path)
    qtbot.waitUntil(lambda: bool(dialogs()))
    (dialog,) = dialogs()
    assert "5 of 6 entries can be added" in dialog._summary.text()
    assert saved(section, "from afar") is None  # nothing before the button
    shot(dialog, "templates_import")
    assert not nameless(dialog) and not too_small(dialog)
    qtbot.mouseClick(dialog.accept_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: dialog.accept_button.text() == "Close")
    assert dialog._summary.text() == "1 added, 4 already there, 1 refused."
    assert saved(section, "from afar") is not None
    qtbot.mouseClick(dialog.accept_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not dialogs())


def dialogs() -> list[ImportDialog]:
    found = QApplication.topLevelWidgets()
    return [widget for widget in found if isinstance(widget, ImportDialog) and widget.isVisible()]


def test_a_file_that_is_none_is_refused_with_a_sentence(
    qtbot: Any, tmp_path: Path, services: Services, section: TemplateSection
) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    before = services.library.templates.count()
    section.import_from(path)
    qtbot.waitUntil(lambda: len(services.toasts.toasts) == 1)
    assert "not a file of templates" in services.toasts.toasts[0].message
    services.toasts.toasts[0].dismiss()
    assert not dialogs() and services.library.templates.count() == before


def test_automatic_names_of_the_section_are_those_of_the_jobs() -> None:
    from mistudio.ui.templates.section import AUTOMATIC

    assert AUTOMATIC["training"] is templates.training_name


def test_pictures(qtbot: Any, page: TrainingPage, section: TemplateSection) -> None:
    qtbot.mouseClick(section.save, Qt.MouseButton.LeftButton)
    for size in SIZES:
        page.resize(*size)
        page.column_page.ensureWidgetVisible(section, 0, 0)
        page.column_page.verticalScrollBar().setValue(
            section.mapTo(page.column_page.widget(), section.rect().topLeft()).y() - 24
        )
        shot(page, f"templates_training-{size[0]}x{size[1]}")
        assert not cut_off(page) and not too_small(page) and not nameless(page)
