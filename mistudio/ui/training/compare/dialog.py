"""Runs beside each other: curves, settings that differ, final metrics, FVU against L0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Qt, Signal
from PySide6.QtWidgets import QApplication, QCheckBox, QDialog, QTabWidget, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.compare import INCOMPARABLE, History, unfair
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.training.charts import site_label
from mistudio.ui.training.compare.gather import Compared, gather
from mistudio.ui.training.compare.tables import ComparisonTable, metrics_table, settings_table
from mistudio.ui.training.presenter import read_metrics
from mistudio.ui.widgets import (
    Choice,
    FlowLayout,
    IconButton,
    Surface,
    Text,
    column,
    picture,
    row,
)

if TYPE_CHECKING:
    from mistudio.ui.training.compare.curves import OverlayChart
    from mistudio.ui.training.compare.pareto import ParetoChart

MOST_CURVES = 8  # shown at first; the sites below choose others
LIVE_SECONDS = 1.0


class Histories(QObject):
    """The full histories of what is compared: files read in the background, trainings under way
    followed."""

    changed = Signal()

    def __init__(
        self, services: Services, compared: Sequence[Compared], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._compared = services, list(compared)
        self.histories: list[History | None] = [None] * len(compared)
        self.problem = ""
        self._looked = 0.0
        self._generations: dict[int, int] = {}
        self.reading = any(one.history for one in compared)
        if self.reading:
            files = [(i, one.history, one.latents) for i, one in enumerate(compared) if one.history]
            services.background.run(lambda: _read(files), self._on_read, self._on_failed)
        for place, one in enumerate(compared):
            if one.job_id is not None:
                self.histories[place] = History(one.latents)
        services.jobs.tick.connect(self._on_tick)
        self._follow()

    def _on_read(self, found: dict[int, History]) -> None:
        for place, history in found.items():
            self.histories[place] = history
        self.reading = False
        self.changed.emit()

    def _on_failed(self, error: Exception) -> None:
        self.reading, self.problem = False, f"The histories cannot be read: {error}"
        self.changed.emit()

    def _on_tick(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LIVE_SECONDS:
            self._looked = now
            if self._follow():
                self.changed.emit()

    def _follow(self) -> bool:
        """Take what trainings under way have measured since; whether there was any."""
        grew = False
        for place, one in enumerate(self._compared):
            history = self.histories[place]
            if one.job_id is None or history is None:
                continue
            generation = self._services.jobs.generation(one.job_id)
            if generation != self._generations.get(one.job_id, generation):
                history = self.histories[place] = History(one.latents)  # it was taken back
            self._generations[one.job_id] = generation
            rows = self._services.jobs.metrics(one.job_id, history.n_rows)
            history.add(rows)
            grew = grew or bool(rows)
        return grew


def _read(files: Sequence[tuple[int, Path, Mapping[str, int]]]) -> dict[int, History]:
    found = {}
    for place, path, latents in files:
        history = found[place] = History(latents)
        history.add(read_metrics(path))
    return found


class CurvesView(QWidget):
    """The overlay chart with its selectors: metric, axis, sites."""

    def __init__(
        self, compared: Sequence[Compared], histories: Histories, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        from mistudio.ui.training.compare.curves import AXES, METRICS, OverlayChart

        self._compared, self._histories = compared, histories
        self.drawn = Choice([(key, name) for key, (name, _) in METRICS.items()])
        self.drawn.setAccessibleName("What is drawn")
        self.over = Choice([(key, name) for key, (name, _) in AXES.items()])
        self.over.setAccessibleName("Over what it is drawn")
        for choice in (self.drawn, self.over):
            choice.setMinimumWidth(fonts.px(240))
            choice.currentIndexChanged.connect(self._on_choice_changed)
        self.sites = self._site_boxes()
        self.chart: OverlayChart = OverlayChart()
        layout = column(12)
        layout.setContentsMargins(24, 16, 24, 20)
        layout.addLayout(
            row(
                Text("Draw", "label"),
                self.drawn,
                Text("over", "label"),
                self.over,
                None,
                self.chart.tools,
            )
        )
        if len(self.sites) > 1:
            place = QWidget()
            flow = FlowLayout(12)
            flow.addWidget(Text("Sites", "label"))
            for box in self.sites.values():
                flow.addWidget(box)
            place.setLayout(flow)
            layout.addWidget(place)
        layout.addWidget(self.chart, 1)
        self.setLayout(layout)
        histories.changed.connect(self.show_curves)
        self.show_curves()

    def _site_boxes(self) -> dict[str, QCheckBox]:
        """A box for each site; of many, at first only the one that most of the runs have."""
        sites = [subject.site for one in self._compared for subject in one.subjects
                 if one.history or one.job_id is not None]  # fmt: skip
        names = list(dict.fromkeys(sites))
        first = max(names, key=sites.count, default="")
        boxes = {}
        for name in names:
            box = boxes[name] = QCheckBox(site_label(name))
            box.setAccessibleName(f"Draw {site_label(name)}")
            box.setChecked(len(sites) <= MOST_CURVES or name == first)
            box.toggled.connect(self._on_box_toggled)
        return boxes

    def show_curves(self) -> None:
        from mistudio.ui.training.compare.curves import CurveKey

        wanted = {name for name, box in self.sites.items() if box.isChecked()}
        keys = [
            CurveKey(place, subject.site, subject.name)
            for place, one in enumerate(self._compared)
            for subject in one.subjects
            if subject.site in wanted
        ]
        why = "Reading the histories…" if self._histories.reading else self._histories.problem
        if not wanted and self.sites:
            why = "Choose at least one site."
        if not self.sites:
            why = "Imported SAEs have no history of a training."
        self.chart.show_curves(
            self._histories.histories, keys, self.drawn.value, self.over.value, why
        )

    def _on_choice_changed(self, index: int) -> None:
        self.show_curves()

    def _on_box_toggled(self, checked: bool) -> None:
        self.show_curves()


class CompareDialog(QDialog):
    """A window beside the main one, so that trainings go on being watched. What it shows is as of
    when it was opened, but for the curves of trainings under way."""

    def __init__(
        self,
        services: Services,
        keys: Sequence[tuple[str, int]],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        from mistudio.ui.training.compare.pareto import ParetoChart

        self.setObjectName("compare_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setModal(False)
        self.setSizeGripEnabled(True)
        self.compared = gather(services.library, keys)
        subjects = [subject for one in self.compared for subject in one.subjects]
        room = parent.window().size() if parent else QApplication.primaryScreen().size()
        self.resize(min(1240, room.width() - 40), round(room.height() * 0.92))
        self.setMinimumSize(720, 560)
        title = f"Compare {len(self.compared)} runs"
        self.setWindowTitle(title)
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        names = Text(" • ".join(one.name for one in self.compared), "helper", wrap=True)
        texts = column(4)
        texts.addWidget(Text(title, "h1"))
        texts.addWidget(names)
        head = row(texts, close)
        head.setStretch(0, 1)
        head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        head.setContentsMargins(24, 20, 20, 8)
        self.warning = fairness_note(self.compared)
        self._histories = Histories(services, self.compared, self)
        self.curves = CurvesView(self.compared, self._histories)
        self.settings = ComparisonTable(
            "Settings that differ", "Setting", "All of their settings are the same."
        )
        differing = settings_table(self.compared)
        self.settings.show_table(differing, self._settings_about(len(differing.lines)))
        self.metrics = ComparisonTable(
            "Final metrics", "On held-out text", "None of them has been measured."
        )
        self.metrics.show_table(metrics_table(subjects), METRICS_ABOUT)
        self.pareto: ParetoChart = ParetoChart()
        self.pareto.show_subjects(subjects)
        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Views of the comparison")
        for name, view in (
            ("Curves", self.curves),
            (f"Settings that differ ({len(differing.lines)})", _padded(self.settings)),
            ("Final metrics", _padded(self.metrics)),
            ("FVU against L0", _padded(self.pareto)),
        ):  # fmt: skip
            self.tabs.addTab(view, name)
        body = QVBoxLayout(self)
        body.setContentsMargins(0, 0, 0, 0)
        body.setSpacing(0)
        body.addLayout(head)
        around = column(0)
        around.setContentsMargins(24, 4, 24, 12)
        around.addWidget(self.warning)
        body.addLayout(around)
        body.addWidget(self.tabs, 1)
        self.tabs.tabBar().setFocus()

    def _settings_about(self, differ: int) -> str:
        told = len({name for one in self.compared for name in one.settings})
        return (
            f"{formatting.count(differ)} differ; the other {formatting.count(told - differ)} are "
            "the same. “auto” is what a setting that was left open became."
        )


METRICS_ABOUT = (
    "★ best marks the best of the SAEs of one model and hook point, where a direction is better. "
    "Definitions and sample sizes are in the tooltips."
)


def fairness_note(compared: Sequence[Compared]) -> Surface:
    """What makes the comparison unfair in a sentence, why in its tooltip; hidden where nothing
    does."""
    note = Surface("note", "yellow", 10)
    sentence, reasons = fairness(compared)
    text = Text(sentence, "small", wrap=True)
    line = row(picture("triangle-alert", tokens.YELLOW, 20), text, spacing=10)
    line.setStretch(1, 1)
    note.add(line)
    note.setToolTip("\n".join(reasons))
    note.setAccessibleName(f"Warning. {sentence}")
    note.setAccessibleDescription(" ".join(reasons))
    note.setVisible(bool(sentence))
    return note


def fairness(compared: Sequence[Compared]) -> tuple[str, list[str]]:
    """(which conditions differ, why each matters); an empty sentence where all are the same. Runs
    with the same sites of the same model are compared site by site."""
    subjects = [subject for one in compared for subject in one.subjects]
    found = unfair([subject.conditions for subject in subjects])
    if len({_places(one) for one in compared}) == 1:
        found = [condition for condition in found if condition.name not in INCOMPARABLE]
    if any(condition.name == "reads" for condition in found):  # said once of autoencoders
        writes = [s.conditions for s in subjects if s.conditions.get("writes") is not None]
        if all(conditions["reads"] == conditions["writes"] for conditions in writes):
            found = [condition for condition in found if condition.name != "writes"]
    if not found:
        return "", []
    strict = any(condition.name in INCOMPARABLE for condition in found)
    parts = []
    for condition in found:
        shown = list(dict.fromkeys(
            subject.told.get(condition.name, "")
            for subject in subjects
            if subject.conditions.get(condition.name) is not None
        ))  # fmt: skip
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        parts.append(f"other {condition.label} ({', '.join(shown[:4])}{more})")
    start = "Not all of these can be compared" if strict else "This comparison is not quite fair"
    reasons = [f"{condition.label.capitalize()}: {condition.why}." for condition in found]
    return f"{start}: {'; '.join(parts)}.", reasons


def _places(one: Compared) -> frozenset[str]:
    """Where a run's dictionaries stand, for comparing."""
    return frozenset(
        repr([subject.conditions.get(name) for name in ("model", "reads")])
        for subject in one.subjects
    )


def _padded(view: QWidget) -> QWidget:
    place = QWidget()
    layout = column(0)
    layout.setContentsMargins(24, 16, 24, 24)
    layout.addWidget(view)
    place.setLayout(layout)
    return place
