"""The Examples tab: where the feature fires, and where one might expect it to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication, QHBoxLayout, QScrollArea, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import Busy
from mistudio.ui.features.dialog.charts import BarList, BarRow, HistogramCard
from mistudio.ui.features.dialog.own_text import OwnText
from mistudio.ui.features.dialog.reading import Overview, Shown, Tenth
from mistudio.ui.features.dialog.strips import ExampleView, strength
from mistudio.ui.features.dialog.tab import FeatureTab, problem, sentence
from mistudio.ui.widgets import (
    Button,
    Choice,
    EmptyState,
    IconButton,
    Text,
    clear,
    column,
    row,
    scrolling,
)
from mistudio.ui.widgets.token_strip import shown as written

if TYPE_CHECKING:
    from mistudio.ui.features.dialog.dialog import FeatureDialog

ZOOMS = ((5, "± 5 tokens"), (16, "± 16 tokens"), (0, "Whole context"))
TOP, TENTHS, SILENT = "top", "tenths", "silent"
GROUPS = (
    (TOP, "Top examples"),
    (TENTHS, "By tenth of activation"),
    (SILENT, "Where one might expect it"),
)
VIEW_HEIGHT = 96  # of an example, the least; those that can be seen are built before the first
PER_TURN = 4  # painting, the others so many at a time
LATER_MS = 20  # after the first painting
FIRST = 5  # examples read before it
MORE = 20
PER_TENTH = 3
SIDE_WIDTH = 336


@dataclass(frozen=True)
class Section:
    title: str
    examples: tuple[Shown, ...]


class ExamplesTab(FeatureTab):
    def __init__(self, dialog: FeatureDialog) -> None:
        super().__init__(dialog)
        self._colours = self.services.settings.get("token_colours")
        self._overview: Overview | None = None
        self._sections: list[Section] = []
        self._pending: list[tuple[int, Shown] | Section] = []
        self._measuring = False
        self._views: list[ExampleView] = []

    # --- building -------------------------------------------------------------------------------

    def build(self) -> None:
        self.group = Choice(GROUPS)
        self.group.setAccessibleName("Which examples")
        self.group.setMinimumContentsLength(16)
        self.group.currentIndexChanged.connect(self._on_group_changed)
        self.zoom = Choice(ZOOMS)
        self.zoom.setAccessibleName("Tokens shown on each side of the strongest one")
        self.zoom.setToolTip("Tokens shown on each side of the strongest one")
        self.zoom.set_value(16)
        self.zoom.setMinimumContentsLength(13)
        self.zoom.currentIndexChanged.connect(self._on_zoom_changed)
        self.measure = Button("Read activations", "small", "activity")
        self.measure.setToolTip(
            "Those that are not stored: runs the model over these contexts, in the background"
        )
        self.measure.clicked.connect(self._on_measure_clicked)
        self.measure.hide()
        self.copy_all = Button("Copy all", "small", "copy")
        self.copy_all.setToolTip("Activation, source and text of each, one a line")
        self.copy_all.clicked.connect(self._on_copy_all_clicked)
        self.note = Text("", "helper", wrap=True)
        self._list = column(8)
        self.more = Button("Show more", "small", "chevron-down")
        self.more.clicked.connect(self._on_more_clicked)
        inner = QWidget()
        body = QVBoxLayout(inner)
        body.setContentsMargins(24, 14, 12, 24)
        body.setSpacing(10)
        body.addLayout(row(self.group, self.zoom, self.measure, None, self.copy_all, spacing=8))
        body.addWidget(self.note)
        body.addLayout(self._list)
        body.addWidget(self.more)
        body.addStretch(1)
        self._left: QScrollArea = scrolling(inner)
        self._right = QVBoxLayout()
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self._left, 1)
        layout.addLayout(self._right)
        self.own: OwnText | None = None
        # A column that is not there yet keeps its room: nothing moves when it comes.
        self._right.addSpacing(1)
        self._place = QWidget()
        self._place.setFixedWidth(SIDE_WIDTH)
        self._right.addWidget(self._place)

    def build_side(self) -> None:
        """The column at the right, after the examples have been painted."""
        if self.own is not None:
            return
        self.own = OwnText(self.services, self.dialog, self._colours)
        self.own.chosen.connect(self.dialog.go_to)
        self.histogram = HistogramCard("Activations")
        log = IconButton("chart-line", "Count axis: logarithmic or linear", on_colour="#34D399")
        log.setToolTip("Logarithmic count axis")
        log.toggled.connect(self.histogram.bars.set_log_counts)
        self.histogram.head.insertWidget(2, log)
        self.common = BarList("Commonest tokens", "blue", label_share=0.5)
        self._common_note = Text("", "helper", wrap=True)
        inner = QWidget()
        body = QVBoxLayout(inner)
        body.setContentsMargins(12, 14, 24, 24)
        body.setSpacing(18)
        body.addWidget(self.own)
        body.addWidget(self.histogram)
        common = column(6)
        common.addWidget(Text("Commonest tokens", "label"))
        common.addWidget(self.common)
        common.addWidget(self._common_note)
        body.addLayout(common)
        body.addStretch(1)
        side = scrolling(inner)
        side.setFixedWidth(SIDE_WIDTH)
        self._right.removeWidget(self._place)
        self._place.deleteLater()
        self._right.addWidget(side)

    # --- reading --------------------------------------------------------------------------------

    def read(self) -> None:
        feature, reading = self.feature, self.dialog.reading
        self.in_background(
            lambda: reading.overview(feature, FIRST), self._on_overview, self._on_failed
        )

    def show_feature(self) -> None:
        self._overview = None
        self._sections, self._pending, self._views = [], [], []
        self._measuring = False
        clear(self._list)
        self.more.hide()
        self.measure.hide()
        self.note.setText("Reading…")

    def _on_overview(self, found: Overview) -> None:
        self._overview = found
        if self.group.value == TOP:
            self._show_top(found.examples)
        else:
            self._read_group()
        self.dialog.is_read()
        QTimer.singleShot(LATER_MS, self, self._show_side)

    def _show_side(self) -> None:
        if self._overview is None:
            return
        self._read_more(MORE)
        self.build_side()
        assert self.own is not None
        self.own.show_feature(self.feature)
        self._show_histogram(self._overview)
        self._show_common(self._overview)

    def _read_group(self) -> None:
        feature, reading, group = self.feature, self.dialog.reading, self.group.value
        self._set_sections([], "Reading…")
        if group == TOP and self._overview is not None:
            self._show_top(self._overview.examples)
        elif group == TENTHS:
            self.in_background(lambda: reading.tenths(feature), self._on_tenths, self._on_failed)
        elif group == SILENT:
            self.in_background(lambda: reading.silent(feature), self._on_silent, self._on_failed)

    def _show_top(self, examples: tuple[Shown, ...]) -> None:
        if not examples:
            self._set_sections([], "")
            self._list.addWidget(
                EmptyState("circle", f"This feature fired on none of the {self.sample()}.")
            )
            return
        self._set_sections([Section("", examples)], "")
        self._tell_top()

    def _tell_top(self) -> None:
        total = self.dialog.reading.store.n_examples(self.feature)
        shown = max(len(self._sections[0].examples), min(total, MORE))  # the rest is on its way
        meta = self.dialog.columns.meta
        each = "one per context" if meta.one_per_context else "several per context possible"
        unit = "example" if total == 1 else "examples"
        self.note.setText(
            f"Showing {formatting.count(shown)} of {formatting.count(total)} {unit}: the strongest "
            f"of {self.sample()}, {each}. Activations are kept for {meta.radius} tokens to each "
            "side."
        )
        self.more.setVisible(shown < total)

    def _on_more_clicked(self, checked: bool = False) -> None:
        assert self._overview is not None
        self._read_more(len(self._overview.examples) + MORE)

    def _read_more(self, wanted: int) -> None:
        """Top examples until there are so many."""
        assert self._overview is not None
        feature, reading, have = self.feature, self.dialog.reading, len(self._overview.examples)
        if have < min(wanted, reading.store.n_examples(feature)):
            self.more.setEnabled(False)
            self.in_background(
                lambda: reading.top(feature, have, wanted), self._on_more_read, self._on_failed
            )

    def _on_more_read(self, examples: tuple[Shown, ...]) -> None:
        self.more.setEnabled(True)
        if self._overview is None:
            return
        every = (*self._overview.examples, *examples)
        self._overview = replace(self._overview, examples=every)
        if self.group.value == TOP:
            number = len(self._sections[0].examples)
            self._sections = [Section("", every)]
            self._pending += list(enumerate(examples, number + 1))
            self._tell_top()
            self._build_views()

    def _on_tenths(self, tenths: tuple[Tenth, ...]) -> None:
        if self.group.value != TENTHS:
            return
        n = sum(len(tenth.examples) for tenth in tenths)
        sections = [
            Section(
                f"{_tenth_name(t.number)}: {formatting.number(t.low, 3)} to "
                f"{formatting.number(t.high, 3)}",
                t.examples[:PER_TENTH],
            )
            for t in tenths
        ]
        shown = sum(len(section.examples) for section in sections)
        self._set_sections(
            sections,
            f"{shown} of {n} examples drawn at random from the tenths of its "
            f"{formatting.count(self.value('n_active') or 0)} activations. Only each example's "
            "own activation is stored; the others come from the model.",
        )
        if not n:
            self._list.addWidget(EmptyState("circle", "There are no activations to divide."))
        elif self.dialog.reading.can_measure():
            self._measure_next()

    def _on_silent(self, found: tuple[tuple[Shown, ...], tuple[Shown, ...]]) -> None:
        if self.group.value != SILENT:
            return
        hard, random = found
        self._set_sections(
            [
                Section("One of its five commonest tokens stands in the dashed frame", hard[:10]),
                Section("Random text", random[:10]),
            ],
            "Contexts in which it is active on no token at all, drawn at random: what a "
            "description of the feature must not fit.",
        )

    def _on_failed(self, error: Exception) -> None:
        self.dialog.is_read()
        self._set_sections([], "")
        self.more.setEnabled(True)
        self._list.addWidget(problem(error))

    # --- the list -------------------------------------------------------------------------------

    @property
    def views(self) -> list[ExampleView]:
        return list(self._views)

    def _set_sections(self, sections: Sequence[Section], note: str) -> None:
        clear(self._list)
        self.more.hide()
        self._views, self._measuring = [], False
        self._sections = list(sections)
        self.note.setText(note)
        self.copy_all.setText("Copy all")
        self._pending = []
        number = 0
        for section in sections:
            if section.title and section.examples:
                self._pending.append(section)
            for example in section.examples:
                number += 1
                self._pending.append((number, example))
        self._build_views(max(2, self.height() // VIEW_HEIGHT))
        self._offer_measuring()

    def _build_views(self, n: int = PER_TURN) -> None:
        maximum = self.value("max_activation") or 0.0
        for entry in self._pending[:n]:
            if isinstance(entry, Section):
                self._list.addWidget(Text(entry.title, "label"))
                continue
            view = ExampleView(*entry, maximum, self.zoom.value, self._colours, strength)
            view.wants_test.connect(self._on_view_wants_test)
            view.moved.connect(self._on_view_moved)
            self._views.append(view)
            self._list.addWidget(view)
        del self._pending[:n]
        QTimer.singleShot(LATER_MS, self, self._build_more)

    def _build_more(self) -> None:
        for view in self._views:
            view.add_tools()
        if self._pending:
            self._build_views()
        self._offer_measuring()

    def _on_zoom_changed(self, *_: object) -> None:
        for view in self._views:
            view.show_zoom(self.zoom.value)
        self._offer_measuring()

    def _on_group_changed(self, *_: object) -> None:
        if self.feature >= 0 and self._overview is not None:
            self._read_group()

    def _on_view_moved(self, by: int) -> None:
        view = self.sender()
        assert isinstance(view, ExampleView)
        number = self._views.index(view) + by
        if 0 <= number < len(self._views):
            self._views[number].strip.setFocus()
            self._left.ensureWidgetVisible(self._views[number], 0, 12)

    def _on_view_wants_test(self, text: str) -> None:
        self.build_side()
        assert self.own is not None
        self.own.set_text(text)

    def _on_copy_all_clicked(self, checked: bool = False) -> None:
        lines = []
        for section in self._sections:
            for example in section.examples:
                value = "" if example.activation is None else f"{example.activation:.6g}"
                text = example.line.text(self.zoom.value, mark=True).replace("\n", "\\n")
                lines.append(f"{value}\t{example.source}\t{text}")
        QApplication.clipboard().setText("\n".join(lines))
        self.copy_all.setText(f"{len(lines)} copied")

    # --- activations that are not stored --------------------------------------------------------

    def _missing(self) -> list[ExampleView]:
        """Of what is shown at this zoom."""
        found = []
        for view in self._views:
            line = view.example.line
            first, last = line.around(self.zoom.value)
            if any(value != value for value in line.activations[first:last]):
                found.append(view)
        return found

    def _offer_measuring(self) -> None:
        self.measure.setVisible(bool(self._missing()) and not self._measuring)

    def _on_measure_clicked(self, checked: bool = False) -> None:
        self._measure_next()

    def _measure_next(self) -> None:
        """A few windows at a time, first shown first, so that heat comes where one looks."""
        missing = self._missing()[:PER_TURN]
        self._measuring = bool(missing)
        self._offer_measuring()
        if not missing:
            return
        feature, reading = self.feature, self.dialog.reading
        asked = [view.example for view in missing]
        self.in_background(
            lambda: reading.measured(feature, asked), self._on_measured, self._on_measure_failed
        )

    def _on_measured(self, found: tuple[Shown, ...]) -> None:
        known = {(one.window, one.position): one for one in found}
        for view in self._views:
            key = (view.example.window, view.example.position)
            if key in known:
                view.show_example(known[key])
        if self._measuring:
            self._measure_next()

    def _on_measure_failed(self, error: Exception) -> None:
        self._measuring = False
        self._offer_measuring()
        if isinstance(error, Busy):
            self.note.setText(
                f"{self.note.text()} A job is using the model now: read them when it is done."
            )
        else:
            self.note.setText(f"{self.note.text()} {sentence(error)}")

    # --- the side -------------------------------------------------------------------------------

    def _show_histogram(self, found: Overview) -> None:
        histogram = found.histogram
        self.histogram.setVisible(histogram is not None and bool(histogram.counts.sum()))
        if histogram is None or not histogram.counts.any():
            return
        used = np.flatnonzero(histogram.counts)
        first, last = int(used[0]), int(used[-1]) + 1
        self.histogram.set_bars(
            histogram.edges[first : last + 1],
            histogram.counts[first:last],
            "tokens",
            _short,
            unit="activation",
            note=f"Activation of its {formatting.count(int(histogram.counts.sum()))} active "
            "tokens, 4 bins to a doubling.",
            log_values=True,
        )

    def _show_common(self, found: Overview) -> None:
        n = self.value("n_active") or 0
        rows = [
            BarRow(
                f"“{written(t.text)}”",
                f"{formatting.count(t.count)} · {formatting.percent(t.count / n, 0)}"
                if n
                else formatting.count(t.count),
                t.count / n if n else 0.0,
                f"Token “{written(t.text)}” (ID {t.id})\nActive on {formatting.count(t.count)}"
                f"{f' to {formatting.count(t.count + t.error)}' if t.error else ''} of its "
                f"{formatting.count(t.occurrences)} occurrences"
                + (f" ({formatting.percent(t.count / t.occurrences)})" if t.occurrences else ""),
            )
            for t in found.tokens or ()
        ]
        self.common.set_rows(rows)
        self.common.setVisible(bool(rows))
        self._common_note.setText(
            f"Count, and share of its {formatting.count(n)} active tokens."
            if rows
            else "—" if found.tokens is None else "It fired on no token."
        )  # fmt: skip


def _tenth_name(number: int) -> str:
    return {10: "Strongest tenth", 1: "Weakest tenth"}.get(number, f"Tenth {number} of 10")


def _short(value: float) -> str:
    return f"{value:.3g}"
