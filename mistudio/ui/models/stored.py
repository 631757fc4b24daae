"""A stored extraction: its statistics site by site, and its activations over the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QDialog, QTabWidget, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.library import Library
from mistudio.library.records import Extraction
from mistudio.ui.models.parts import Column, FactsTable, head_of, room_of
from mistudio.ui.models.presenter import layer_of, points_text, problem_of, site_title
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Button,
    Choice,
    ErrorPanel,
    FormRow,
    Surface,
    Text,
    TokenStrip,
    clear,
    column,
    row,
    scrolling,
)

if TYPE_CHECKING:
    import numpy as np

_NORM = -1  # what is shown of a token where no dimension is chosen
_CURVES = 8


@dataclass(frozen=True)
class Figures:
    """The statistics of every site, and mean norms by position where the store has them."""

    summaries: dict[str, dict[str, Any]]
    by_position: dict[str, np.ndarray]
    varied: dict[str, tuple[int, ...]]  # dimensions, those that vary most first


@dataclass(frozen=True)
class Stretch:
    """One window of text with a value for every token; NaN where none is stored."""

    number: int
    point: str
    dimension: int
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    values: tuple[float, ...]
    document: int


def read_figures(library: Library, extraction: Extraction) -> Figures:
    """From the extraction's files; imports torch."""
    import numpy as np

    from mistudio.engine.activations import statistics

    summaries = dict(extraction.statistics.get("sites", {}))
    try:
        found = statistics.read(library.path(extraction.folder), summaries)
    except FileNotFoundError:  # one of an earlier version
        return Figures(summaries, {}, {})
    return Figures(
        summaries,
        {point: site.norm_by_position for point, site in found.items()},
        {
            point: tuple(int(i) for i in np.argsort(-site.variance, kind="stable")[:32])
            for point, site in found.items()
        },
    )


def read_stretch(
    library: Library, extraction: Extraction, number: int, point: str, dimension: int
) -> Stretch:
    """The `number`-th window of the held-out split, which lies there in the order of the text."""
    import numpy as np

    from mistudio.engine.activations.store import StoredActivations
    from mistudio.engine.activations.tracing import heat_map
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.hooks import HookPoint

    stored = StoredActivations(library.path(extraction.folder))
    text = TokenStore(library.path(library.tokenizations.get(extraction.tokenization_id).folder))
    found = heat_map(
        stored,
        "heldout",
        number,
        HookPoint.parse(point),
        None if dimension == _NORM else [dimension],
        text.split("heldout"),
    )
    ids = tuple(int(i) for i in found.ids)
    known = found.documents[found.documents >= 0]
    return Stretch(
        number,
        point,
        dimension,
        _texts(library.path(library.models.get(extraction.model_id).folder), ids),
        ids,
        tuple(float(value) for value in np.ravel(found.values)),
        int(known[0]) if len(known) else -1,
    )


def _texts(folder: Path, ids: Sequence[int]) -> tuple[str, ...]:
    from mistudio.engine.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return tuple(str(tokenizer.decode([i])) if i >= 0 else "" for i in ids)


class HeatStrip(TokenStrip):
    """Tokens with a measured value each; the heat goes from the smallest to the largest magnitude
    that is shown, the tooltip tells the value itself."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(chips=True, parent=parent)
        self._values: tuple[float, ...] = ()
        self._named = ""

    def show_stretch(self, stretch: Stretch) -> None:
        self._values = stretch.values
        norms = stretch.dimension == _NORM
        self._named = "norm" if norms else f"dimension {stretch.dimension}"
        sizes = [abs(value) for value in stretch.values if math.isfinite(value)]
        # Norms of tokens lie close together: their differences are what can be seen.
        low = min(sizes, default=0.0) if norms else 0.0
        heats = [abs(v) - low if math.isfinite(v) else 0.0 for v in stretch.values]
        self.set_tokens(stretch.tokens, heats, token_ids=stretch.ids)
        self.setAccessibleName(f"Activations over text: {''.join(stretch.tokens)[:200]}")

    def describe(self, index: int) -> str:
        lines = super().describe(index).splitlines()
        value = self._values[index]
        told = f"{value:.4g}" if math.isfinite(value) else "not stored"
        return "\n".join([*(line for line in lines if "activation" not in line),
                          f"{self._named}: {told}"])  # fmt: skip


class ExtractionDialog(QDialog):
    """Two views: figures by site, and activations over text."""

    def __init__(
        self,
        services: Services,
        extraction: Extraction,
        dataset: str,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("extraction_dialog")
        self.setWindowTitle("Stored Activations")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = room_of(parent)
        self.resize(min(1000, room.width() - 64), round(room.height() * 0.88))
        self._services, self.extraction = services, extraction
        self.figures: Figures | None = None
        self.stretch: Stretch | None = None
        self._asked = 0
        self.tabs = QTabWidget()
        self.tabs.addTab(self._make_statistics(), "Statistics")
        self.tabs.addTab(self._make_preview(), "Activations over text")
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        settings = extraction.settings
        about = [
            f"{formatting.count(extraction.tokens)} tokens of {dataset or 'a deleted dataset'}",
            f"{formatting.size(extraction.bytes)} on disk",
            f"stored as {str(extraction.statistics.get('storage', 'fp16')).upper()}",
            f"model at {str(settings.get('precision', '—')).upper()}",
            f"context {settings.get('context', '—')}",
        ]
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        title = points_text(extraction.hook_points)
        layout.addLayout(head_of(self, title, Text(" • ".join(about), "helper", wrap=True)))
        inner = column(0)
        inner.setContentsMargins(24, 0, 24, 20)
        inner.addWidget(self.tabs)
        layout.addLayout(inner, 1)
        self.tabs.tabBar().setFocus()
        library = services.library
        services.background.run(
            lambda: read_figures(library, extraction), self._on_figures, self._on_failed
        )

    # --- statistics -----------------------------------------------------------------------------

    def _make_statistics(self) -> QWidget:
        view = QWidget()
        self._statistics = column(16)
        self._statistics.setContentsMargins(4, 16, 12, 12)
        self._statistics.addWidget(Text("Reading…", "helper"))
        self._statistics.addStretch(1)
        view.setLayout(self._statistics)
        return scrolling(view)

    def _on_figures(self, figures: Figures) -> None:
        from mistudio.ui.widgets.metric_chart import MetricChart

        self.figures = figures
        clear(self._statistics)
        self._statistics.addWidget(self._table(figures))
        self.chart: MetricChart | None = None
        if figures.by_position:
            shown = list(figures.by_position)[:_CURVES]
            self.chart = MetricChart(
                "Mean norm by position", {point: _short(point) for point in shown}, "L2 norm",
                "position", "Position in the context", log_y=_wide(figures, shown), height=240,
            )  # fmt: skip
            for point in shown:
                norms = figures.by_position[point]
                self.chart.set_data(point, range(len(norms)), norms.tolist())
            self._statistics.addWidget(self.chart, 1)
            note = (
                "All tokens that were read, position 0, special tokens and outliers included; "
                "those are not stored."
            )
            if len(figures.by_position) > _CURVES:
                note += f" The first {_CURVES} of {len(figures.by_position)} sites are drawn."
            self._statistics.addWidget(Text(note, "helper", wrap=True))
        else:
            self._statistics.addWidget(
                Text("Norms by position were not kept by the version that made this.", "helper")
            )
            self._statistics.addStretch(1)
        self._show_dimensions()
        self._ask_stretch()

    def _table(self, figures: Figures) -> QWidget:
        columns = (
            Column("Site"),
            Column("Mean norm", 110, True,
                   tip="Mean L2 norm of the stored rows of the training split"),
            Column("Outlier share", 130, True,
                   tip="Tokens of a norm over ten times the median; they are not stored"),
            Column("Total variance", 130, True, tip="Sum of the variances of all dimensions"),
            Column("Largest dimension", 160, True,
                   tip="Share of the total variance that the most varied dimension has"),
            Column("Outlier dims", 120, True,
                   tip="Dimensions whose root mean square is over six times the median's"),
        )  # fmt: skip
        self.cells: dict[str, tuple[str, ...]] = {}
        tips = []
        for point, one in figures.summaries.items():
            dimensions = one.get("outlier_dimensions")
            self.cells[point] = (
                _short(point),
                formatting.number(one.get("mean_norm")),
                formatting.percent(one.get("outlier_share"), 2),
                formatting.number(one.get("total_variance")),
                formatting.percent(one.get("largest_dimension_share")),
                "—" if dimensions is None else str(len(dimensions)),
            )
            beyond = (f"dimension {d}: {ratio:.1f} times" for d, ratio in dimensions or ())
            tips.append("\n".join([point, *beyond]))
        name = f"Statistics of {len(self.cells)} sites"
        return FactsTable(name, columns, list(self.cells.values()), tips)

    # --- activations over text ------------------------------------------------------------------

    def _make_preview(self) -> QWidget:
        view = QWidget()
        body = column(14)
        body.setContentsMargins(4, 16, 12, 12)
        self.site = Choice([(point, _short(point)) for point in self.extraction.hook_points])
        self.site.currentIndexChanged.connect(self._on_site_changed)
        self.shown = Choice([(_NORM, "Norm of the activation")])
        self.shown.currentIndexChanged.connect(self._on_shown_changed)
        self.previous = Button("Previous", "secondary", "chevron-left")
        self.previous.clicked.connect(self._on_previous_clicked)
        self.next = Button("Next", "secondary", "chevron-right")
        self.next.clicked.connect(self._on_next_clicked)
        self.where = Text("", "helper", wrap=True)
        self.strip = HeatStrip()
        self._problem = column(0)
        choices = row(FormRow("Site", self.site), FormRow("Shown", self.shown), spacing=16)
        for place in range(2):
            choices.setStretch(place, 1)
        body.addLayout(choices)
        turning = row(self.where, self.previous, self.next)
        turning.setStretch(0, 1)
        body.addLayout(turning)
        body.addLayout(self._problem)
        text = Surface("well", None, 16)
        text.add(self.strip)
        body.addWidget(text)
        self._legend = Text("", "helper", wrap=True)
        body.addWidget(self._legend)
        body.addStretch(1)
        view.setLayout(body)
        self._number = 0
        self._show_turning()
        return scrolling(view)

    def _show_dimensions(self) -> None:
        varied = self.figures.varied.get(self.site.value, ()) if self.figures else ()
        self.shown.set_options(
            [(_NORM, "Norm of the activation"), *((d, f"Dimension {d}") for d in varied)]
        )

    def _on_tabs_current_changed(self, index: int) -> None:
        if self.stretch is None:
            self._ask_stretch()

    def _on_site_changed(self, index: int) -> None:
        self._show_dimensions()
        self._ask_stretch()

    def _on_shown_changed(self, index: int) -> None:
        self._ask_stretch()

    def _on_previous_clicked(self, checked: bool = False) -> None:
        self._number -= 1
        self._ask_stretch()

    def _on_next_clicked(self, checked: bool = False) -> None:
        self._number += 1
        self._ask_stretch()

    @property
    def windows(self) -> int:
        """How many windows of held-out text there can be: each gives at most its context."""
        held = int(self.extraction.statistics.get("tokens", {}).get("heldout", 0))
        return max(1, held // max(1, int(self.extraction.settings.get("context", 128))))

    def _show_turning(self) -> None:
        self.previous.setEnabled(self._number > 0)
        self.next.setEnabled(self._number + 1 < self.windows)

    def _ask_stretch(self) -> None:
        """Only once the preview is looked at."""
        if self.tabs.currentIndex() != 1:
            self.stretch = None
            return
        self._asked += 1
        self._show_turning()
        asked, library, extraction = self._asked, self._services.library, self.extraction
        number, point, dimension = self._number, self.site.value, self.shown.value
        self._services.background.run(
            lambda: (asked, read_stretch(library, extraction, number, point, dimension)),
            self._on_stretch,
            self._on_stretch_failed,
        )

    def _on_stretch(self, result: tuple[int, Stretch]) -> None:
        asked, stretch = result
        if asked != self._asked:
            return
        self.stretch = stretch
        clear(self._problem)
        self.strip.show_stretch(stretch)
        stored = [value for value in stretch.values if math.isfinite(value)]
        whose = f", document {stretch.document + 1}" if stretch.document >= 0 else ""
        self.where.setText(
            f"Held-out text, window {stretch.number + 1}{whose}: {len(stored)} of "
            f"{len(stretch.values)} tokens stored"
        )
        if not stored:
            self._legend.setText("")
        elif stretch.dimension == _NORM:
            self._legend.setText(
                f"Heat: norm from {min(stored):.4g} (none) to {max(stored):.4g} (full). Tokens "
                "without heat may also be ones that are not stored: hover over them."
            )
        else:
            most = max(map(abs, stored))
            self._legend.setText(
                f"Heat: magnitude from 0 to {most:.4g}; hover over a token for its signed value."
            )

    def _on_stretch_failed(self, error: Exception) -> None:
        self._show_problem(problem_of(error))

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._statistics)
        self._statistics.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self._statistics.addStretch(1)

    def _show_problem(self, problem: UserError) -> None:
        clear(self._problem)
        self._problem.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))


def _wide(figures: Figures, points: Sequence[str]) -> bool:
    """Whether the norms span so much (a first token many times the others) that only a log scale
    shows them all."""
    norms = [n for point in points for n in figures.by_position[point].tolist() if n > 0]
    return bool(norms) and max(norms) > 10 * min(norms)


def _short(point: str) -> str:
    """`L3 Residual Stream`."""
    return f"L{layer_of(point)} {site_title(point)}"
