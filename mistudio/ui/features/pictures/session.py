"""What the three pictures share: the discovery they are of, the table they are linked with, the
names of features, and the jobs that make what is missing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PySide6.QtCore import QObject, Signal

from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import FeatureRun
from mistudio.ui.features.pictures import data
from mistudio.ui.features.reader import Columns, FeatureReader, RowText
from mistudio.ui.services import Services

if TYPE_CHECKING:
    from mistudio.engine.features.code_sample import CodeSample
    from mistudio.engine.features.maps import FeatureMap
    from mistudio.ui.features.page import FeaturesPage

KEPT_NAMES = 5000
NAMES_AT_ONCE = 40


class Session(QObject):
    """One discovery at a time: that which the table shows. What arrives of another is dropped."""

    opened = Signal()
    """Maps and sample were read, also when one was added."""
    failed = Signal(object)
    names_arrived = Signal()
    linked = Signal()
    """What the table shows, or what is selected or starred in it, changed."""
    job_changed = Signal()
    progressed = Signal()

    def __init__(self, services: Services, page: FeaturesPage, parent: QObject) -> None:
        super().__init__(parent)
        self.services, self.page = services, page
        self.presenter = page.presenter
        self.run: FeatureRun | None = None
        self.maps: tuple[FeatureMap, ...] = ()
        self.sample: CodeSample | None = None
        self.provenance = ""
        self.ready = False
        self._names: OrderedDict[int, RowText] = OrderedDict()
        self._wanted: list[int] = []
        self._naming = False
        table = self.presenter.table
        table.order_changed.connect(self.linked)
        table.dataChanged.connect(self._on_table_data_changed)
        page.browser.view.selection_changed.connect(self.linked)
        self.presenter.state_changed.connect(self._on_presenter_state_changed)
        self.presenter.opened.connect(self.opened)  # the table has its columns
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.tick.connect(self.progressed)
        self._on_presenter_state_changed()

    # --- the discovery --------------------------------------------------------------------------

    @property
    def reader(self) -> FeatureReader | None:
        return self.presenter.reader

    @property
    def columns(self) -> Columns | None:
        return self.presenter.table.columns

    def newest_map(self, method: str) -> FeatureMap | None:
        return next((made for made in self.maps if made.settings.method == method), None)

    def _on_presenter_state_changed(self) -> None:
        if self.presenter.run != self.run:
            self.run = self.presenter.run
            self.maps, self.sample, self.provenance, self.ready = (), None, "", False
            self._names.clear()
            self._wanted = []
            self.opened.emit()
            self.read()

    def read(self) -> None:
        """Look for maps and sample (again); `opened` tells."""
        run, library = self.run, self.services.library
        if run is not None:
            self.services.background.run(
                lambda: data.read(library, run), self._on_read, self._on_read_failed
            )

    def _on_read(self, found: data.Opened) -> None:
        if self.run is None or found.run.id != self.run.id:
            return
        self.maps, self.sample, self.provenance = found.maps, found.sample, found.provenance
        self.ready = True
        self.opened.emit()

    def _on_read_failed(self, error: Exception) -> None:
        self.failed.emit(error)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "feature_runs" and self.run is not None and self.run.id in ids:
            self.read()

    # --- the table ------------------------------------------------------------------------------

    def mask(self, features: Iterable[int] | np.ndarray) -> np.ndarray:
        """Bool [n_features]"""
        found = np.zeros(len(self.columns) if self.columns is not None else 0, bool)
        numbers = np.asarray(features, np.int64)
        found[numbers[(numbers >= 0) & (numbers < len(found))]] = True
        return found

    def shown(self) -> np.ndarray:
        """Bool [n_features]: what the table shows."""
        return self.mask(self.presenter.table.visible)

    def starred(self) -> np.ndarray:
        starred = self.presenter.table.notes.starred
        return self.mask(()) if starred is None else starred

    def selected(self) -> np.ndarray:
        """int32: selected in the table."""
        return self.page.browser.view.selected_features()

    def table_features(self) -> list[int]:
        """Those selected in the table, or all that it shows where fewer than two are."""
        selected = self.selected()
        chosen = selected if len(selected) > 1 else self.presenter.table.visible
        return [int(feature) for feature in chosen]

    def _on_table_data_changed(self, *_: object) -> None:
        self.linked.emit()

    def open_feature(self, feature: int) -> None:
        """The dialog of one feature, in front of the pictures."""
        self.page.open_feature(feature)
        if self.page.dialog is not None:
            self.page.dialog.raise_()
            self.page.dialog.activateWindow()

    # --- names ----------------------------------------------------------------------------------

    def label(self, feature: int) -> str:
        """The user's label, else the description by rule, as far as it was read."""
        note = self.presenter.table.note(feature)
        if note is not None and note.label:
            return note.label
        text = self.presenter.table.text(feature) or self._names.get(feature)
        return (text.description or "") if text is not None else ""

    def name(self, feature: int) -> str:
        """`#12 label`."""
        label = self.label(feature)
        return f"#{feature} {label}" if label else f"#{feature}"

    def want_names(self, features: Sequence[int]) -> None:
        """Read descriptions that are missing, newest wish first; `names_arrived` tells."""
        missing = [f for f in features if not self.label(f) and f not in self._names]
        if missing:
            self._wanted = missing[:400]
            self._read_names()

    def _read_names(self) -> None:
        reader, run = self.reader, self.run
        if self._naming or not self._wanted or reader is None or run is None:
            return
        part, self._wanted = self._wanted[:NAMES_AT_ONCE], self._wanted[NAMES_AT_ONCE:]
        self._naming = True

        self.services.background.run(
            lambda: (run.id, reader.rows(part)), self._on_names, self._on_names_failed
        )

    def _on_names(self, found: tuple[int, list[RowText]]) -> None:
        self._naming = False
        run_id, rows = found
        if self.run is not None and run_id == self.run.id:
            for text in rows:
                self._names[text.feature] = text
            while len(self._names) > KEPT_NAMES:
                self._names.popitem(last=False)
            self.names_arrived.emit()
        self._read_names()

    def _on_names_failed(self, error: Exception) -> None:
        self._naming, self._wanted = False, []
        self.failed.emit(error)

    # --- jobs -----------------------------------------------------------------------------------

    def job(self, kind: str) -> JobRecord | None:
        """This discovery's job of a kind that is queued or runs."""
        return next((job for job in self.services.jobs.active() if self._is_own(job, kind)), None)

    def failure(self, kind: str) -> JobRecord | None:
        """Its newest job of a kind, where that failed."""
        for job in self.services.library.jobs.all("kind = ?", (kind,)):
            if self._is_own(job, kind):
                return job if job.status == "failed" else None
        return None

    def _is_own(self, job: JobRecord, kind: str) -> bool:
        own = self.run is not None and job.params.get("feature_run_id") == self.run.id
        return own and job.kind == kind

    def submit(self, job: Any) -> None:
        try:
            self.services.jobs.submit(job)
        except UserError as error:
            self.services.toasts.error(error)
        self.job_changed.emit()

    def cancel(self, kind: str) -> None:
        if (job := self.job(kind)) is not None:
            self.services.jobs.cancel(job.id)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        self.job_changed.emit()

    # --- background -----------------------------------------------------------------------------

    def compute(
        self,
        function: Callable[[], Any],
        then: Callable[[Any], None],
        or_else: Callable[[Exception], None],
    ) -> None:
        self.services.background.run(function, then, or_else)
