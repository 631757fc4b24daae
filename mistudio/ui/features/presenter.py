"""What the Features tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from PySide6.QtCore import QObject, Signal

from mistudio.library.features import FeatureNote
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun
from mistudio.ui.features.choices import SaeChoice, choices
from mistudio.ui.features.notes import Notes
from mistudio.ui.features.query import FIELDS, Query
from mistudio.ui.features.reader import FeatureReader, RowText
from mistudio.ui.features.table import FeatureTable
from mistudio.ui.services import Services

__all__ = ["FeaturesPresenter", "SaeChoice"]

MOST_ROWS = 64  # read at a time
AT_ONCE = 100  # features whose stars are written while the window waits; more in the background


class FeaturesPresenter(QObject):
    """The chosen SAE, its discovery, its table. Reading happens in the background; what arrives
    for an SAE that is no longer chosen is dropped."""

    choices_changed = Signal()
    state_changed = Signal()
    """Another SAE was chosen, or its discovery began, moved on or ended."""
    opened = Signal()
    """The table has its columns."""
    failed = Signal(object)
    """Reading failed, with the exception."""
    searching_changed = Signal(bool)
    applied = Signal(object)
    """A whole query is shown from now on; its search and its list follow."""
    lists_changed = Signal()
    views_changed = Signal()

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.choice: SaeChoice | None = None
        self.run: FeatureRun | None = None
        self.reader: FeatureReader | None = None
        self.table = FeatureTable(self)
        self.error: Exception | None = None
        self._generation = 0  # of what is being opened
        self._seen = (0, 0)
        self._wanted: list[int] = []
        self._reading_rows = False
        self._search: tuple[str, tuple[str, ...]] = ("", FIELDS)
        self._searching = False
        self._asked: tuple[str, tuple[str, ...]] | None = None  # of the search that runs
        self._again = False
        self._reading_notes = False
        self._notes_changed = False
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        self.table.starred.connect(self.star)

    # --- what there is --------------------------------------------------------------------------

    def choices(self) -> list[SaeChoice]:
        return choices(self._services.library)

    def choose(self, choice: SaeChoice | None) -> None:
        """Look at another SAE; its newest discovery is opened in the background."""
        if choice == self.choice:
            return
        self.choice = choice
        self._open_newest()

    @property
    def sae_id(self) -> int | None:
        return self.choice.sae.id if self.choice is not None else None

    # --- discovery ------------------------------------------------------------------------------

    def corpus(self) -> tuple[int, int] | None:
        """(tokens, documents) of the split that a discovery of a run's SAE passes over."""
        if self.choice is None or self.choice.training is None:
            return None
        record = self._services.library.tokenizations.find(self.choice.training.tokenization_id)
        if record is None:
            return None
        tokens = record.statistics.get("split_tokens", {}).get("train")
        documents = record.statistics.get("split_documents", {}).get("train")
        return (int(tokens), int(documents or 0)) if tokens else None

    def discovery(self) -> JobRecord | None:
        """The chosen SAE's discovery that is queued or runs."""
        return next(
            (job for job in self._services.jobs.active() if self._is_own_discovery(job)), None
        )

    def failure(self) -> JobRecord | None:
        """The chosen SAE's newest discovery, where it failed or was interrupted."""
        for job in self._services.library.jobs.all("kind IN ('discover', 'discover_run')"):
            if self._is_own_discovery(job):
                return job if job.status in ("failed", "interrupted") else None
        return None

    def speed(self) -> float | None:
        """Tokens per second of the newest discovery of this SAE that finished; None: not known."""
        for job in self._services.library.jobs.all("kind = 'discover' AND status = 'finished'"):
            if self._is_own_discovery(job) and job.started_at and job.ended_at:
                run = self._services.library.feature_runs.find(job.result.get("feature_run_id", 0))
                began, ended = map(datetime.fromisoformat, (job.started_at, job.ended_at))
                seconds = (ended - began).total_seconds()
                return run.tokens / seconds if run and seconds > 0 else None
        return None

    def _is_own_discovery(self, job: JobRecord) -> bool:
        if self.choice is None:
            return False
        if job.kind == "discover":
            return job.params.get("sae_id") == self.choice.sae.id
        training = self.choice.training
        return (
            job.kind == "discover_run"
            and training is not None
            and job.params.get("training_id") == training.id
        )

    def discover(
        self,
        max_tokens: int,
        top_k: int,
        max_documents: int | None = None,
        dataset_id: int | None = None,
        whole_run: bool = False,
    ) -> int:
        """Discover the features of the chosen SAE, or of all SAEs of its run in one pass."""
        from mistudio.jobs.kinds import Discover, DiscoverRun

        assert self.choice
        if whole_run:
            assert self.choice.training
            return self._services.jobs.submit(
                DiscoverRun(self.choice.training.id, max_tokens, top_k, max_documents)
            )
        return self._services.jobs.submit(
            Discover(self.choice.sae.id, max_tokens, top_k, dataset_id, max_documents)
        )

    # --- opening --------------------------------------------------------------------------------

    @property
    def opening(self) -> bool:
        return self.run is not None and self.reader is None and self.error is None

    def _open_newest(self) -> None:
        self._generation += 1
        self.reader, self.error, self._wanted = None, None, []
        library = self._services.library
        self.run = library.feature_runs.newest_of_sae(self.choice.sae.id) if self.choice else None
        self.table.set_columns(None)
        self.state_changed.emit()
        if self.run is None or self.choice is None:
            return
        run, sae_id = self.run, self.choice.sae.id
        self._in_background(lambda: _opened(library, run, sae_id), self._on_opened, self._on_failed)

    def _on_opened(self, answer: tuple[int, tuple[FeatureReader, Notes]]) -> None:
        generation, (reader, notes) = answer
        if generation != self._generation or self.choice is None:
            return
        self.reader = reader
        self.table.set_columns(reader.columns, notes)
        if self._search[0]:
            self._start_search()
        self.state_changed.emit()
        self.opened.emit()

    # --- rows -----------------------------------------------------------------------------------

    def want_rows(self, first: int, last: int) -> None:
        """The rows that can be seen; what is missing of them is read, newest wish first."""
        self._seen = (first, last)
        self._wanted = self.table.missing(first, last)[:MOST_ROWS]
        self._read_rows()

    def _read_rows(self) -> None:
        if self._reading_rows or not self._wanted or self.reader is None:
            return
        reader, wanted = self.reader, self._wanted
        self._wanted, self._reading_rows = [], True
        self._in_background(lambda: reader.rows(wanted), self._on_rows_read, self._on_rows_failed)

    def _on_rows_read(self, answer: tuple[int, list[RowText]]) -> None:
        generation, rows = answer
        self._reading_rows = False
        if generation == self._generation:
            self.table.add_texts(rows)
        self._wanted = self.table.missing(*self._seen)[:MOST_ROWS]
        self._read_rows()

    def _on_rows_failed(self, answer: tuple[int, Exception]) -> None:
        self._reading_rows = False
        self._on_failed(answer)

    # --- search ---------------------------------------------------------------------------------

    def search(self, text: str, fields: Sequence[str] | None = None) -> None:
        """Features in whose `fields` every word of the text begins some word; "" shows all."""
        wanted = (text.strip(), tuple(fields) if fields is not None else self._search[1])
        if wanted == self._search:
            return
        self._search = wanted
        if wanted[0]:
            self._start_search()
        else:
            self._asked = None
            self.table.set_search(*wanted, None)
            self._set_searching(False)

    def _start_search(self) -> None:
        """One search at a time: the newest wish follows the one that runs."""
        reader = self.reader
        if reader is None:
            return
        self._set_searching(True)
        if self._asked is not None:
            self._again = True
            return
        (text, fields), notes = self._search, self.table.notes
        self._asked = self._search
        self._in_background(
            lambda: _found(reader, notes, text, fields), self._on_searched, self._on_search_failed
        )

    def _on_searched(self, answer: tuple[int, np.ndarray]) -> None:
        generation, found = answer
        asked, again, self._asked, self._again = self._asked, self._again, None, False
        if generation != self._generation:
            if self._search[0]:
                self._start_search()
        elif again and self._search[0]:
            self._start_search()
        elif asked == self._search:
            self._set_searching(False)
            self.table.set_search(*self._search, found)

    def _on_search_failed(self, answer: tuple[int, Exception]) -> None:
        self._asked, self._again = None, False
        self._on_failed(answer)

    def _set_searching(self, searching: bool) -> None:
        if searching != self._searching:
            self._searching = searching
            self.searching_changed.emit(searching)

    # --- the query as a whole -------------------------------------------------------------------

    def apply(self, query: Query) -> None:
        """Show what a saved view says; its search runs in the background, its list is read."""
        self.applied.emit(query)
        listed, search = query.list_id, (query.search, query.fields)
        self.table.show_subset(None)
        self.table.set_query(replace(query, list_id=self.table.query.list_id, search=""))
        self.show_list(listed)
        self._search = ("", FIELDS)
        self.table.set_search("", search[1], None)
        self.search(*search)

    def show_list(self, list_id: int) -> None:
        """Only the members of a list; 0 shows all."""
        if self.choice is None or not list_id:
            self.table.set_listed(0, [])
            return
        library, sae_id = self._services.library, self.choice.sae.id
        self._in_background(
            lambda: (list_id, library.feature_lists.of_sae(list_id, sae_id)),
            self._on_list_read,
            self._on_failed,
        )

    def _on_list_read(self, answer: tuple[int, tuple[int, list[int]]]) -> None:
        generation, (list_id, features) = answer
        if generation == self._generation:
            self.table.set_listed(list_id, features)

    # --- notes ----------------------------------------------------------------------------------

    def star(self, feature: int, starred: bool) -> None:
        self._write(feature, starred=starred)

    def label(self, feature: int, label: str) -> None:
        self._write(feature, label=label.strip())

    def annotate(self, feature: int, note: str) -> None:
        self._write(feature, note=note.strip())

    def _write(self, feature: int, **values: Any) -> None:
        if self.choice is not None:
            sae_id = self.choice.sae.id
            self._services.library.feature_notes.write(sae_id, feature, **values)
            note = self.table.note(feature) or FeatureNote(sae_id, feature, "", "", False)
            self.table.patch_note(replace(note, **values))

    def mark(self, features: Sequence[int], **values: bool) -> None:
        """Star (`starred`) or hide (`hidden`) many features, or none of them where it fails."""
        if self.choice is None or not len(features):
            return
        library, sae_id = self._services.library, self.choice.sae.id
        if len(features) <= AT_ONCE:
            library.feature_notes.write_many(sae_id, features, **values)
        else:
            self._in_background(
                lambda: library.feature_notes.write_many(sae_id, features, **values),
                self._on_written,
                self._on_failed,
            )

    def _on_written(self, answer: tuple[int, None]) -> None:
        pass  # the change that it made is what the table hears of

    def _read_notes(self) -> None:
        """Once at a time; what changes meanwhile is read after."""
        if self._reading_notes:
            self._notes_changed = True
            return
        if self.choice is None or self.table.columns is None:
            return
        self._reading_notes, self._notes_changed = True, False
        library, sae_id, n = self._services.library, self.choice.sae.id, len(self.table.columns)
        self._in_background(
            lambda: Notes.gathered(library.feature_notes.of_sae(sae_id), n),
            self._on_notes_read,
            self._on_notes_failed,
        )

    def _on_notes_read(self, answer: tuple[int, Notes]) -> None:
        generation, notes = answer
        self._reading_notes = False
        if self._notes_changed:
            self._read_notes()
        elif generation == self._generation:
            self.table.set_notes(notes)
            if self._search[0]:
                self._start_search()

    def _on_notes_failed(self, answer: tuple[int, Exception]) -> None:
        self._reading_notes = False
        self._on_failed(answer)

    # --- background -----------------------------------------------------------------------------

    def _in_background(
        self, function: Callable[[], Any], then: Callable[[Any], None],
        or_else: Callable[[Any], None],
    ) -> None:  # fmt: skip
        """Call `then((generation, result))`, so that it can tell what came too late. A failure is
        an answer too: `or_else((generation, exception))`."""
        generation = self._generation
        call = _Answer(self, generation, then, or_else)
        self._services.background.run(lambda: call.make(function), call.deliver)

    def _on_failed(self, answer: tuple[int, Exception]) -> None:
        generation, error = answer
        if generation != self._generation:
            return
        self._set_searching(False)
        if self.reader is None:
            self.error = error
            self.state_changed.emit()
        self.failed.emit(error)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("saes", "trainings", "models", "datasets"):
            self.choices_changed.emit()
        elif table == "feature_views":
            self.views_changed.emit()
        elif table == "feature_lists":
            self.lists_changed.emit()
            shown = self.table.query.list_id
            if shown and shown in ids:
                there = self._services.library.feature_lists.find(shown) is not None
                self.show_list(shown if there else 0)
        elif self.choice is None:
            return
        elif table == "feature_runs":
            newest = self._services.library.feature_runs.newest_of_sae(self.choice.sae.id)
            if newest != self.run:
                self._open_newest()
        elif table == "feature_notes" and self.choice.sae.id in ids:
            self._read_notes()

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if self.choice is None:
            return
        job = self._services.library.jobs.find(job_id)
        if job is not None and self._is_own_discovery(job):
            self.state_changed.emit()


def _opened(library: Library, run: FeatureRun, sae_id: int) -> tuple[FeatureReader, Notes]:
    reader = FeatureReader.open(library, run)
    return reader, Notes.gathered(library.feature_notes.of_sae(sae_id), len(reader.columns))


def _found(reader: FeatureReader, notes: Notes, text: str, fields: tuple[str, ...]) -> np.ndarray:
    """Bool [n_features]"""
    mask = np.zeros(len(reader.columns), bool)
    mask[reader.search(text, fields)] = True
    own = np.array(notes.containing(text, fields), np.int64)
    mask[own[(own >= 0) & (own < len(mask))]] = True
    return mask


class _Answer(QObject):
    """Carries one background result with the generation it was asked in."""

    def __init__(
        self,
        parent: QObject,
        generation: int,
        then: Callable[[Any], None],
        or_else: Callable[[Any], None],
    ) -> None:
        super().__init__(parent)
        self._generation, self._then, self._or_else = generation, then, or_else

    def make(self, function: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, function()
        except Exception as exc:
            return False, exc

    def deliver(self, answer: tuple[bool, Any]) -> None:
        good, result = answer
        receiver = self._then if good else self._or_else
        receiver((self._generation, result))
        self.deleteLater()
