"""The two pictures that are made of a sample of activations: which features fire together, and
which fire where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.ui.features.pictures import data, figures
from mistudio.ui.features.pictures.grid import Grid, GridPicture
from mistudio.ui.features.pictures.parts import ExportDialog, Legend, Place
from mistudio.ui.features.pictures.scales import Scale
from mistudio.ui.features.pictures.session import Session
from mistudio.ui.widgets import Button, Choice, IntBox, Text, column, row

if TYPE_CHECKING:
    from mistudio.engine.features.coactivation import PairMatrix

KIND = "sample_features"
MINUS = "−"
DEFINITIONS = {
    "phi": "Correlation of firing: 1 where two features are active on exactly the same tokens, 0 "
    "where they are independent.",
    "jaccard": "Tokens on which both are active, divided by those on which at least one is.",
    "pearson": "Correlation of the activations, zeros included.",
    "cosine": "Cosine of the two decoder directions. Of the SAE's weights; needs no text.",
}


class SampledView(QWidget):
    """Controls above, picture and legend, what it is of below. Of the features that it was opened
    with, until others are taken from the table."""

    limit: int
    title: str
    name: str
    marks: tuple[tuple[str, str], ...]

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.session = session
        self.features: list[int] = []
        self.result: Any = None
        self._asked = 0  # of what is being computed
        self._error: Exception | None = None
        self.picture = GridPicture(self.title)
        self.picture.tip = self.tip
        self.picture.clicked.connect(self._on_picture_clicked)
        self.picture.pointed.connect(self._on_picture_pointed)
        self.legend = Legend()
        self.take = Button(
            "Take from the table", "small", "refresh-cw",
            "The features selected in the table, or the first that it shows where fewer than two "
            f"are; at most {self.limit}",
        )  # fmt: skip
        self.take.clicked.connect(self._on_take_clicked)
        self.tokens = IntBox(200_000, 1_000, 10_000_000, 50_000, " tokens")
        self.tokens.setAccessibleName("Tokens to sample")
        self.tokens.setToolTip("Rare features need many to be seen at all")
        self.again = Button("Sample again", "small", "refresh-cw", "Run the model over the text")
        self.again.clicked.connect(self.take_sample)
        self.export = Button("Save picture…", "small", "download")
        self.export.clicked.connect(self.open_export)
        self.whole = whole = Button(
            "Show all", "small", "maximize-2", "The whole picture again (Home)"
        )
        whole.clicked.connect(self._on_whole_clicked)
        tools = row(*self.controls(), self.take, whole, None, self.export, spacing=8)
        both = QWidget()
        both.setProperty("surface", "clear")
        pair = row(self.picture, self.legend, spacing=12)
        pair.setStretch(0, 1)
        both.setLayout(pair)
        self.place = Place(both)
        self.place.wanted.connect(self.take_sample)
        self.place.cancelled.connect(self._on_place_cancelled)
        self.said = Text("", "helper", wrap=True, selectable=True)
        layout = column(10)
        layout.addLayout(tools)
        layout.addWidget(self.place, 1)
        layout.addWidget(self.said)
        layout.addLayout(row(Text("Sample", "label"), self.tokens, self.again, None, spacing=8))
        self.setLayout(layout)
        session.opened.connect(self._on_session_opened)
        session.job_changed.connect(self._show_state)
        session.progressed.connect(self._show_progress)
        session.names_arrived.connect(self._on_names_arrived)
        self._show_state()

    # What each picture is.

    def controls(self) -> list[QWidget]:
        return []

    def needs_sample(self) -> bool:
        return True

    def compute(self) -> Any:
        """What the picture is made of; in the background."""
        raise NotImplementedError

    def grid(self) -> Grid:
        raise NotImplementedError

    def method_text(self) -> str:
        raise NotImplementedError

    def tip(self, row_number: int, column_number: int) -> str:
        raise NotImplementedError

    def feature_at(self, row_number: int, column_number: int) -> int:
        raise NotImplementedError

    # --- which features -------------------------------------------------------------------------

    def set_features(self, features: list[int]) -> None:
        """At most as many as fit; the first ones then."""
        self.features = list(dict.fromkeys(features))[: self.limit]
        self.session.want_names(self.features)
        self.ask()

    def ask(self) -> None:
        """Compute the picture of these features anew."""
        self.result, self._error = None, None
        self._asked += 1
        session = self.session
        ready = session.run is not None and session.ready and session.columns is not None
        if ready and len(self.features) > 1 and (session.sample or not self.needs_sample()):
            number, compute = self._asked, self.compute()
            session.compute(lambda: (number, _tried(compute)), self._on_computed, self._on_failed)
        self._show_state()

    def _on_computed(self, answer: tuple[int, tuple[bool, Any]]) -> None:
        number, (good, result) = answer
        if number != self._asked:
            return
        self.result, self._error = (result, None) if good else (None, result)
        self._draw()
        self._show_state()

    def _on_failed(self, error: Exception) -> None:
        self._error = error
        self._show_state()

    def _draw(self) -> None:
        if self.result is not None:
            grid = self.grid()
            self.picture.set_grid(grid)
            self.legend.set_scale(grid.scale)
            self.legend.set_marks(self.marks if np.isnan(grid.values).any() else ())
            self.said.setText(self.method_text())

    # --- state ----------------------------------------------------------------------------------

    def _show_state(self) -> None:
        session = self.session
        job = session.job(KIND)
        if session.run is None:
            self.place.show_invitation(
                "microscope", "Choose an SAE whose features are discovered in the Features tab.",
                "", "", None,
            )  # fmt: skip
        elif job is not None:
            waits = "It waits for the job before it." if job.status == "queued" else ""
            self.place.show_progress(
                "Sampling activations…",
                waits or "The model reads the text of the discovery; the sample is kept.",
                session.services.jobs.owns(job.id),
            )
            self._show_progress()
        elif not session.ready:
            self.place.show_busy("Reading…")
        elif len(self.features) < 2:
            self.place.show_invitation(
                "grid-3x3", "Select two or more features in the table.", "",
                "Then choose “Take from the table” here.", None,
            )  # fmt: skip
        elif self.needs_sample() and session.sample is None:
            failed = session.failure(KIND)
            self.place.show_invitation(
                "grid-3x3",
                "No sample of activations yet",
                "Sample activations",
                "The model runs over windows spread evenly through the text of the discovery. "
                "Once is enough for all pictures of these features.",
                failed.error if failed is not None else None,
            )
        elif self._error is not None:
            self._show_error(self._error)
        elif self.result is None:
            self.place.show_busy("Computing…")
        else:
            self.place.show_picture()
        there = self.place.shows_picture
        self.export.setEnabled(there)
        self.whole.setEnabled(there)
        self.said.setVisible(there)
        can = session.run is not None and job is None
        self.again.setEnabled(can and session.ready)
        self.tokens.setEnabled(can)
        self.take.setEnabled(session.run is not None)

    def _show_error(self, error: Exception) -> None:
        if isinstance(error, UserError):
            self.place.show_error(error.title, error.what, error.next_step)
        else:
            what = f"{type(error).__name__}: {error}"
            self.place.show_error("The picture cannot be made", what, "Sample again, and try then.")

    def _show_progress(self) -> None:
        if self.place.progress is None or not self.isVisible():
            return
        job = self.session.job(KIND)
        if job is not None:
            self.place.progress.show_snapshot(self.session.services.jobs.snapshot(job.id))

    def take_sample(self, *_: object) -> None:
        from mistudio.jobs.kinds import SampleFeatures

        if self.session.run is not None:
            self.session.submit(SampleFeatures(self.session.run.id, self.tokens.value()))

    # --- slots ----------------------------------------------------------------------------------

    def _on_session_opened(self) -> None:
        if self.session.columns is not None:
            n = len(self.session.columns)
            self.features = [feature for feature in self.features if feature < n]
        self.ask()

    def _on_names_arrived(self) -> None:
        self._draw()
        if self.isVisible() and self.picture.underMouse():
            self.picture.show_tip()

    def _on_picture_clicked(self, row_number: int, column_number: int) -> None:
        self.session.open_feature(self.feature_at(row_number, column_number))

    def _on_picture_pointed(self, row_number: int, column_number: int) -> None:
        pass

    def _on_take_clicked(self, checked: bool = False) -> None:
        self.set_features(self.session.table_features()[: self.limit])

    def _on_whole_clicked(self, checked: bool = False) -> None:
        self.picture.show_all()

    def _on_place_cancelled(self) -> None:
        self.session.cancel(KIND)

    def figure(self, as_pixels: bool = False) -> figures.Figure:
        grid = self.grid()
        notes = (self.method_text(), figures.drawn(self.session.provenance))
        return figures.Figure(self.title, grid, grid.scale, notes)

    def open_export(self, *_: object) -> ExportDialog:
        dialog = ExportDialog(self.session, self.figure, self.name, self)
        dialog.open()
        return dialog


def _tried(function: Any) -> tuple[bool, Any]:
    try:
        return True, function()
    except Exception as exc:
        return False, exc


class HeatmapView(SampledView):
    """Every pair of features, ordered so that alike ones stand together."""

    limit = data.MOST_PAIRS
    title = "Correlations of features"
    name = "feature-correlations"
    marks = (("hatched", "No number: one of the two never fires in the sample (or always)"),)
    result: PairMatrix | None

    def controls(self) -> list[QWidget]:
        self.measure = Choice(list(data.METRICS))
        self.measure.setObjectName("metric")
        self.measure.setAccessibleName("Measure")
        self.measure.setMinimumContentsLength(16)
        self.measure.currentIndexChanged.connect(self._on_metric_changed)
        return [Text("Measure", "label"), self.measure]

    def _on_metric_changed(self, *_: object) -> None:
        self.ask()

    def needs_sample(self) -> bool:
        return bool(self.measure.value != "cosine")

    def compute(self) -> Any:
        session, metric, features = self.session, self.measure.value, list(self.features)
        library, run, sample = session.services.library, session.run, session.sample
        assert run is not None
        return lambda: data.pairs(library, run, sample, metric, features)

    def _scale(self) -> Scale:
        assert self.result is not None
        metric = self.result.metric
        title = dict(data.METRICS)[metric]
        unit = (
            "of decoder directions"
            if metric == "cosine"
            else f"of {formatting.count(self.result.tokens)} tokens"
        )
        if metric == "jaccard":
            return Scale(title, "cells", 0.0, 1.0, unit=unit, definition=DEFINITIONS[metric])
        return Scale(title, "diverging", -1.0, 1.0, unit=unit, definition=DEFINITIONS[metric])

    def grid(self) -> Grid:
        found = self.result
        assert found is not None
        order = list(found.order)
        names = tuple(self.session.name(found.features[i]) for i in order)
        values = found.values[np.ix_(order, order)]
        numbers = tuple(f"#{found.features[i]}" for i in order)
        return Grid(values, names, numbers, self._scale())

    def feature_at(self, row_number: int, column_number: int) -> int:
        assert self.result is not None
        return self.result.features[self.result.order[row_number]]

    def tip(self, row_number: int, column_number: int) -> str:
        found = self.result
        if found is None:
            return ""
        one, other = found.order[row_number], found.order[column_number]
        names = [self.session.name(found.features[i]) for i in dict.fromkeys((one, other))]
        value = float(found.values[one, other])
        title = dict(data.METRICS)[found.metric]
        if not np.isfinite(value):
            silent = [i for i in (one, other) if found.together[i, i] == 0]
            who = f"#{found.features[silent[0]]}" if silent else "One of them"
            why = "never fires in the sample" if silent else "does not vary in the sample"
            lines = [*names, f"{title}: — ({who} {why})"]
        else:
            lines = [*names, f"{title}: {value:.3f}".replace("-", MINUS)]
        if found.metric != "cosine":
            tokens = formatting.count(found.tokens)
            if one == other:
                lines.append(f"fires on {formatting.count(found.together[one, one])} of {tokens}")
            else:
                both = formatting.count(found.together[one, other])
                each = " and ".join(formatting.count(found.together[i, i]) for i in (one, other))
                lines.append(f"both fire on {both} of {tokens} tokens; alone counted on {each}")
        return "\n".join(lines)

    def method_text(self) -> str:
        found = self.result
        assert found is not None
        n = len(found.features)
        what = f"{formatting.count(n)} features, {dict(data.METRICS)[found.metric]}. "
        what += f"{DEFINITIONS[found.metric]} "
        order = "Order: average linkage on 1 − the measure, leaves ordered optimally"
        if found.metric == "cosine":
            return f"{what}{order}."
        silent = int((np.diag(found.together) == 0).sum())
        sample = self.session.sample
        windows = formatting.count(len(sample.windows)) if sample is not None else "—"
        none = (
            f" {formatting.count(silent)} never fire in it and have no numbers." if silent else ""
        )
        return (
            f"{what}Sample: {formatting.count(found.tokens)} tokens in {windows} windows spread "
            f"evenly over the text.{none} {order} (no number counts as 0 there)."
        )


class MatrixView(SampledView):
    """Features by windows of the text: how strongly each fires where."""

    limit = data.MOST_ROWS
    title = "Activations over samples"
    name = "feature-activations"
    marks = (("hatched", "No number: the feature has no maximum"),)
    result: data.Matrix | None

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        self._snippets: dict[tuple[int, int], str] = {}
        self._reading: tuple[int, int] | None = None
        self._next: tuple[int, int] | None = None
        super().__init__(session, parent)

    def compute(self) -> Any:
        sample, columns, features = self.session.sample, self.session.columns, list(self.features)
        assert sample is not None and columns is not None
        maxima = columns.values["max_activation"]
        self._snippets.clear()
        return lambda: data.matrix(sample, maxima, features)

    def grid(self) -> Grid:
        found = self.result
        assert found is not None
        scale = Scale(
            "Activation",
            "cells",
            0.0,
            1.0,
            percent=True,
            unit="of the feature's maximum over the whole text",
            definition="The feature's strongest activation on any token of the window, divided by "
            "its strongest of all. The darkest cells are windows without any.",
        )
        return Grid(
            found.values,
            tuple(self.session.name(feature) for feature in found.features),
            tuple(f"w{window}" for window in found.windows),
            scale,
            column_title=f"{formatting.count(len(found.windows))} windows (samples) of the text",
            square=False,
        )

    def feature_at(self, row_number: int, column_number: int) -> int:
        assert self.result is not None
        return self.result.features[row_number]

    def tip(self, row_number: int, column_number: int) -> str:
        found = self.result
        if found is None:
            return ""
        value = float(found.values[row_number, column_number])
        window, place = self._place(row_number, column_number)
        lines = [self.session.name(found.features[row_number])]
        if not np.isfinite(value):
            lines.append("—: it has no maximum")
        elif place < 0:
            lines.append("Inactive in this window")
        else:
            peak = found.peaks[row_number, column_number]
            lines.append(f"{formatting.percent(value)} of its maximum ({peak:.3g}), token {place}")
        text = self._snippets.get((window, place), "")
        lines.append(f"Window {formatting.count(window)}: {text or '…'}")
        return "\n".join(lines)

    def _place(self, row_number: int, column_number: int) -> tuple[int, int]:
        assert self.result is not None
        places = self.result.places
        return self.result.windows[column_number], int(places[row_number, column_number])

    def _on_picture_pointed(self, row_number: int, column_number: int) -> None:
        if row_number < 0 or self.result is None:
            return
        place = self._place(row_number, column_number)
        if place not in self._snippets:
            self._next = place
            self._read_snippet()

    def _read_snippet(self) -> None:
        """One at a time; only the newest wish waits."""
        reader = self.session.reader
        if self._reading is not None or self._next is None or reader is None:
            return
        place = self._reading = self._next
        self._next = None
        self.session.compute(
            lambda: (place, data.snippet(reader, *place)), self._on_snippet, self._on_no_snippet
        )

    def _on_snippet(self, answer: tuple[tuple[int, int], str]) -> None:
        place, text = answer
        self._reading = None
        if len(self._snippets) > 5000:
            self._snippets.clear()
        self._snippets[place] = text
        if self.isVisible() and self.picture.underMouse():
            self.picture.show_tip()
        self._read_snippet()

    def _on_no_snippet(self, error: Exception) -> None:
        self._reading = None

    def method_text(self) -> str:
        found = self.result
        assert found is not None
        shown = formatting.count(len(found.windows))
        of = formatting.count(found.candidates)
        which = f"{shown} windows" if found.candidates == len(found.windows) else (
            f"{shown} windows, spread evenly over {of}"
        )  # fmt: skip
        return (
            f"{formatting.count(len(found.features))} features by {which} in which at least one of "
            f"them is active, of {formatting.count(found.sampled)} sampled "
            f"({formatting.count(found.tokens)} tokens). A cell is the strongest activation in the "
            "window as a share of the feature's maximum over the whole text. Order of rows and "
            "columns: average linkage on 1 − cosine."
        )
