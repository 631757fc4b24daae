"""The export dialog: which features, as what, where to; its job; the way to what was written."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtWidgets import QWidget

from mistudio.jobs.feature_exports import FORMATS, ExportWholeContexts
from mistudio.library.library import Library
from mistudio.ui.features import export
from mistudio.ui.features.export import ExportDialog
from mistudio.ui.features.tools import TOOLS
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .screens import shot


@pytest.fixture
def opened(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> Iterator[Callable[..., ExportDialog]]:
    services = services_of(trained_library)
    parents: list[QWidget] = []

    def make(chosen: list[int], shown: list[int]) -> ExportDialog:
        n = trained_library.feature_runs.get(1).n_features
        parent = QWidget()
        parent.resize(1280, 720)
        qtbot.addWidget(parent)
        parents.append(parent)
        dialog = ExportDialog(services, 1, chosen, shown, n, parent)
        dialog.show()
        return dialog

    yield make
    assert services.background.wait(60)  # sizes that are still being estimated


def test_what_can_be_chosen_is_what_there_is(
    opened: Callable[..., ExportDialog], trained_library: Library
) -> None:
    notes, lists = trained_library.feature_notes, trained_library.feature_lists
    notes.write(1, 7, starred=True)
    number = lists.add(name="mine")
    lists.put(number, 1, [1, 2])
    lists.add(name="empty")
    dialog = opened([3, 4], [2, 3, 4])
    titles = [dialog.which.itemText(i) for i in range(dialog.which.count())]
    assert titles == [
        "Selected (2)", "Shown in the table (3)", "Starred (1)", "List “mine” (2)", "All (256)"
    ]  # fmt: skip
    for place, want in enumerate(([3, 4], [2, 3, 4], [7], [1, 2], None)):
        dialog.which.setCurrentIndex(place)
        assert dialog.features == want
    assert dialog.job().features == ""
    assert [opened([1, 2], [1, 2]).which.itemText(0)] == ["Shown in the table (2)"]


def test_every_format_asks_for_what_it_needs(
    qtbot: Any, opened: Callable[..., ExportDialog], tmp_path: Path
) -> None:
    dialog = opened([3, 4], [2, 3, 4])
    dialog.target.setText(str(tmp_path / "v1.2-features.csv"))
    for name, format in FORMATS.items():
        dialog.format.set_value(name)
        assert dialog.target.text() == str(tmp_path / f"v1.2-features{format.suffix}")
        assert dialog.whole.isVisible() == format.contexts
        assert dialog.set_name.isVisible() == format.neuronpedia
        assert dialog.title_text.isVisible() == (name == "html")
        assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
        shot(dialog, f"features-export-{name}")
        assert dialog.height() <= 680, "room for it on a small screen"
    dialog.whole.setChecked(True)
    assert isinstance(dialog.job(), ExportWholeContexts)
    dialog.format.set_value("csv")
    assert not isinstance(dialog.job(), ExportWholeContexts), "a table has no contexts"
    qtbot.waitUntil(lambda: dialog.estimate.text().startswith("Size: About"))


def test_an_export_ends_with_the_way_to_it(
    qtbot: Any,
    opened: Callable[..., ExportDialog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Path] = []
    monkeypatch.setattr(export, "show_in_folder", shown.append)
    dialog = opened([3, 4], [2, 3, 4])
    target = tmp_path / "a.csv"
    target.write_text("mine")
    dialog.target.setText(str(target))
    dialog.export.click()
    assert "never overwrites" in dialog._target_row.error.text() and dialog.form.isVisible()
    target.unlink()
    dialog.export.click()
    qtbot.waitUntil(lambda: dialog.path is not None)
    assert not dialog.form.isVisible() and dialog.show_in_folder.isVisible()
    shot(dialog, "features-export-done")
    dialog.show_in_folder.click()
    assert shown == [target]
    with target.open(encoding="utf-8", newline="") as file:
        assert [row["feature"] for row in csv.DictReader(file)] == ["3", "4"]


def test_a_closed_dialog_tells_the_end_all_the_same(
    qtbot: Any, opened: Callable[..., ExportDialog], tmp_path: Path
) -> None:
    dialog = opened([3], [2, 3, 4])
    toasts = dialog._services.toasts
    dialog.target.setText(str(tmp_path / "a.html"))
    dialog.format.set_value("html")
    dialog.export.click()
    dialog.close()
    qtbot.waitUntil(lambda: bool(toasts.toasts))
    assert "exported" in toasts.toasts[-1].message and (tmp_path / "a.html").exists()


def test_the_tools_menu_has_it() -> None:
    assert [tool.title for tool in TOOLS if tool.open.__name__ == "_export"] == ["Export…"]
