"""The dialog that brings SAEs in: from this computer or from the Hub, seen before anything is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QItemSelection, Qt, QTimer
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import (
    QAbstractItemView,
    QApplication,
    QDialog,
    QFileDialog,
    QFrame,
    QGridLayout,
    QHeaderView,
    QLineEdit,
    QPushButton,
    QScrollArea,
    QTabBar,
    QTableView,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.ui.hub.asking import Answer
from mistudio.ui.hub.results import Results
from mistudio.ui.hub.token import TokenRow
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts
from mistudio.ui.training.compare.tables import Line, Table, TableModel
from mistudio.ui.training.form import SITES, point_title
from mistudio.ui.training.imported import FORMATS
from mistudio.ui.training.intake import (
    MOST_PEEKED,
    Choices,
    Intake,
    Place,
    answered,
    blocker,
    look_at_repository,
    look_here,
    peek_at,
    search_hub,
)
from mistudio.ui.widgets import (
    Button,
    Choice,
    ErrorPanel,
    FormRow,
    IconButton,
    Text,
    clear,
    column,
    debounced,
    row,
)

if TYPE_CHECKING:
    from mistudio.engine.hub import Found
    from mistudio.engine.hub.saes import HubSae, HubSaes
    from mistudio.jobs.sae_preview import SeenSae

ENDINGS = "SAE files (*.safetensors *.npz *.pt *.pth)"
AS_FILES_SAY = "As the files say"
SAFE = (
    "SAELens, sparsify, Gemma Scope, Llama Scope, dictionary_learning, OpenAI and miStudio's own "
    "files are read; only numbers are, never code. The files themselves are left as they are."
)
_SEEN = ("Problem", "Format", "Size", "Reads", "Latents", "Activation", "Where it belongs",
         "Model it names")  # fmt: skip


class Lines(QTableView):
    """A table of lines that cannot be edited, as high as its lines within limits."""

    def __init__(self, name: str, corner: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.lines = TableModel(corner, self)
        self.setModel(self.lines)
        self.setAccessibleName(name)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setTabKeyNavigation(False)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(fonts.px(34))
        header = self.horizontalHeader()
        header.setHighlightSections(False)
        header.setStretchLastSection(True)
        header.setSectionResizeMode(QHeaderView.ResizeMode.Interactive)

    def show_table(self, table: Table, most: int) -> None:
        self.lines.show_table(table)
        shown = min(max(len(table.lines), 1), most)
        bar = self.horizontalScrollBar().sizeHint().height()
        self.setFixedHeight(
            fonts.px(34) * shown + self.horizontalHeader().sizeHint().height() + bar + 4
        )
        self.resizeColumnsToContents()
        for section in range(self.lines.columnCount() - 1):
            self.setColumnWidth(section, min(self.columnWidth(section) + 12, fonts.px(300)))


class ImportDialog(QDialog):
    """Nothing enters the library before Import is pressed."""

    def __init__(self, services: Services, intake: Intake, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._services, self._intake = services, intake
        self.setObjectName("import_saes_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle("Import SAEs")
        self.setAcceptDrops(True)
        self.setSizeGripEnabled(True)
        room = parent.window().size() if parent else QApplication.primaryScreen().size()
        self.resize(min(1040, room.width() - 40), round(room.height() * 0.92))
        self.setMinimumSize(720, 520)
        self._asked = 0
        self._stop = threading.Event()
        self._repository: HubSaes | None = None
        self._shown: list[HubSae] = []
        self.place = Place()
        self.seen: list[SeenSae] = []
        self._make_sources()
        self._make_choices()
        self._build()
        self._show_seen([], Place())

    # --- what it is made of ---------------------------------------------------------------------

    def _make_sources(self) -> None:
        self.path = QLineEdit()
        self.path.setPlaceholderText("A folder or a file; you can also drop one here")
        self.path.setClearButtonEnabled(True)
        self.path.returnPressed.connect(self._on_path_return_pressed)
        self.path.textChanged.connect(self._on_source_changed)
        self.browse = Button("Choose a folder…", "secondary", "folder-open")
        self.browse.clicked.connect(self._on_browse_clicked)
        self.browse_file = Button("Choose a file…", "secondary", "file-plus")
        self.browse_file.clicked.connect(self._on_browse_file_clicked)
        self.repository = QLineEdit()
        self.repository.setPlaceholderText("e.g., google/gemma-scope-2b-pt-res, or a word")
        self.repository.setClearButtonEnabled(True)
        self.repository.returnPressed.connect(self._on_look_clicked)
        self.repository.textChanged.connect(self._on_source_changed)
        self.look = Button("Look or search", "secondary", "search")
        self.look.setToolTip("A whole name (owner/name) is looked into, a part of one searched for")
        self.look.clicked.connect(self._on_look_clicked)
        self.results = Results("Repositories found on the Hub")
        self.results.chosen.connect(self._on_result_chosen)
        self.results.hide()
        self.filter = QLineEdit()
        self.filter.setPlaceholderText("Show only those whose place holds this text")
        self.filter.setClearButtonEnabled(True)
        self.filter.setAccessibleName("Filter of the repository's SAEs")
        self._filter_soon = debounced(self, 150, self._show_files)
        self.filter.textChanged.connect(self._filter_soon)
        self.files = Lines("SAEs of the repository", "Place")
        self.files.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.files.selectionModel().selectionChanged.connect(self._on_files_selected)
        self._peek_soon = debounced(self, 250, self._peek)
        self.token_row = TokenRow(
            self._services, "Access Token (optional, for gated repositories)", "", "hf_xxxxxxxx"
        )

    def _make_choices(self) -> None:
        self.said = Text("", "helper", wrap=True)
        self._problem = column(0)
        self.found = Lines("What was found", "Place")
        self.notes = Text("", "helper", wrap=True)
        self.model = Choice([])
        self.layer = Choice([])
        self.site = Choice([])
        self.name = QLineEdit()
        self.name.setPlaceholderText("As the folder is called")
        for choice in (self.model, self.layer, self.site):
            choice.currentIndexChanged.connect(self._on_choice_changed)
        self.model_row = FormRow("Model it belongs to", self.model)
        self.layer_row = FormRow("Layer", self.layer)
        self.site_row = FormRow("Hook point", self.site)
        self.name_row = FormRow("Name (optional)", self.name)
        self.why = Text("", "small", "yellow", wrap=True)
        self.cancel = Button("Cancel")
        self.cancel.clicked.connect(self.reject)
        self.accept_button = Button("Import", "primary", "check")
        self.accept_button.clicked.connect(self._on_accept_clicked)

    def _build(self) -> None:
        here = column(12)
        here.addWidget(FormRow("File or folder", self.path))
        here.addLayout(row(self.browse, self.browse_file, None, spacing=8))
        hub = column(12)
        hub.addWidget(FormRow("Hub repository", self.repository, beside=self.look))
        hub.addWidget(self.results)
        hub.addWidget(self.filter)
        hub.addWidget(self.files)
        hub.addWidget(self.token_row)
        # Not a tab widget: that is as high as its highest page.
        self.sources = QTabBar()
        self.sources.setAccessibleName("Where the SAEs are")
        self.sources.setExpanding(False)
        self.sources.setDrawBase(False)
        self._pages = []
        for title, layout in (("From this computer", here), ("From the Hub", hub)):
            page = QWidget()
            page.setProperty("surface", "clear")
            page.setLayout(layout)
            self.sources.addTab(title)
            self._pages.append(page)
        self.sources.currentChanged.connect(self._on_sources_changed)
        self._show_page(0)
        close = IconButton("x", "Close")
        close.clicked.connect(self.reject)
        head = row(Text("Import SAEs", "h1"), None, close)
        grid = QGridLayout()
        grid.setHorizontalSpacing(16)
        for place, part in enumerate((self.model_row, self.layer_row, self.site_row)):
            grid.addWidget(part, 0, place)
            grid.setColumnStretch(place, (3, 1, 2)[place])
        grid.addWidget(self.name_row, 1, 0, 1, 3)
        inner = QWidget()
        inner.setProperty("surface", "clear")
        body = column(12)
        body.setContentsMargins(24, 4, 24, 8)
        body.addWidget(Text(SAFE, "helper", wrap=True))
        body.addWidget(self.sources)
        for page in self._pages:
            body.addWidget(page)
        body.addWidget(self.said)
        body.addLayout(self._problem)
        body.addWidget(self.found)
        body.addWidget(self.notes)
        body.addLayout(grid)
        body.addStretch(1)
        inner.setLayout(body)
        area = self._area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setProperty("surface", "clear")
        area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        area.setWidget(inner)
        head.setContentsMargins(24, 20, 20, 8)
        foot = row(self.why, self.cancel, self.accept_button, spacing=12)
        foot.setStretch(0, 1)
        foot.setContentsMargins(24, 12, 24, 20)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        outer.setSpacing(0)
        outer.addLayout(head)
        outer.addWidget(area, 1)
        outer.addLayout(foot)
        for button in self.findChildren(QPushButton):  # Enter in a field means that field
            button.setAutoDefault(False)
        self.path.setFocus()

    # --- asking ---------------------------------------------------------------------------------

    def _ask(self, what: str, function: Any) -> None:
        """`function()` in the background; an older question's answer is not shown."""
        self._say(what)
        work = functools.partial(answered, self._asked, function)
        self._services.background.run(work, self._on_answer, self._on_lost)

    def _forget(self) -> None:
        """What was found is of another source now; what still looks, stops."""
        self._asked += 1
        self._stop.set()
        self._stop = threading.Event()
        clear(self._problem)
        self._say("")
        if self.seen:
            self._show_seen([], Place())

    def _say(self, text: str) -> None:
        self.said.setText(text)
        self.said.setVisible(bool(text))

    def _on_answer(self, answer: Answer) -> None:
        if answer.number != self._asked:
            return
        self._say("")
        value = answer.value
        if isinstance(value, Exception):
            self._show_problem(value)
        elif isinstance(value, tuple):
            self._show_seen(*value)
        elif isinstance(value, list):
            self._show_results(value)
        else:
            self._show_repository(value)

    def _on_lost(self, error: Exception) -> None:
        self._show_problem(error)

    def _show_problem(self, error: Exception) -> None:
        known = explain(error) or UserError(
            "This could not be looked at", f"{type(error).__name__}: {error}", "Try again."
        )
        self._problem.addWidget(ErrorPanel(known.title, known.what, known.next_step))

    # --- from this computer ---------------------------------------------------------------------

    def look_at(self, path: str) -> None:
        """Say what this file or folder holds."""
        self.sources.setCurrentIndex(0)
        self.path.setText(path)
        self._forget()
        self._ask("Reading…", functools.partial(_look, path, self._stop.is_set))

    def _on_path_return_pressed(self) -> None:
        if text := self.path.text().strip():
            self.look_at(text)

    def _on_browse_clicked(self, checked: bool = False) -> None:
        if path := QFileDialog.getExistingDirectory(self, "Choose a folder with SAEs"):
            self.look_at(path)

    def _on_browse_file_clicked(self, checked: bool = False) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Choose an SAE's file", "", ENDINGS)
        if path:
            self.look_at(path)

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if any(url.isLocalFile() for url in event.mimeData().urls()):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = [url.toLocalFile() for url in event.mimeData().urls() if url.isLocalFile()]
        if paths:
            event.acceptProposedAction()
            self.look_at(paths[0])

    # --- from the Hub ---------------------------------------------------------------------------

    def _on_look_clicked(self, checked: bool = False) -> None:
        """A whole name is looked into, a part of one is searched for."""
        text = self.repository.text().strip()
        if not text:
            return
        self._forget()
        self._show_files_of(None)
        token = self.token_row.text
        if "/" in text:
            self.results.hide()
            self._ask("Looking what it holds…", functools.partial(look_at_repository, text, token))
        else:
            self._ask("Searching…", functools.partial(search_hub, text, token))

    def _show_results(self, found: list[Found]) -> None:
        self.results.offer(found)
        noun = "repository" if len(found) == 1 else "repositories"
        self._say(
            f"{len(found)} {noun}, the most downloaded first; which hold SAEs shows when one is "
            "looked into."
            if found
            else "No repository has this in its name."
        )

    def _on_result_chosen(self, found: Found) -> None:
        self.repository.setText(found.repository)
        self._on_look_clicked()

    def _show_repository(self, found: HubSaes) -> None:
        self._show_files_of(found)
        gated = " It is gated: accept its terms on its page first." if found.gated else ""
        if found.problem:
            self._say(f"{found.repository}: {found.problem}{gated}")
            return
        total = sum(sae.bytes for sae in found.saes)
        noun = "SAE" if len(found.saes) == 1 else "SAEs"
        licence = f", licence {found.licence}" if found.licence else ""
        self._say(
            f"{formatting.count(len(found.saes))} {noun} ({formatting.size(total)} together"
            f"{licence}). Choose one, or several with Ctrl or Shift.{gated}"
        )
        self.files.setFocus()
        if len(found.saes) == 1:
            self.files.selectRow(0)

    def _show_files_of(self, repository: HubSaes | None) -> None:
        self._repository = repository
        self._show_files()

    def _show_files(self) -> None:
        saes = self._repository.saes if self._repository else ()
        wanted = self.filter.text().strip().lower()
        self._shown = [sae for sae in saes if wanted in sae.place.lower()]
        lines = tuple(
            Line(sae.place or sae.weights.name, "", (FORMATS.get(sae.format, sae.format),
                 formatting.size(sae.bytes)))
            for sae in self._shown
        )  # fmt: skip
        self.files.show_table(Table(("Format", "Size"), lines), 6)
        self.files.setVisible(bool(saes))
        self.filter.setVisible(len(saes) > 6)

    def _on_files_selected(self, chosen: QItemSelection, dropped: QItemSelection) -> None:
        self._peek_soon()

    def _chosen(self) -> list[HubSae]:
        rows = sorted(index.row() for index in self.files.selectionModel().selectedRows())
        return [self._shown[row] for row in rows if row < len(self._shown)]

    def _peek(self) -> None:
        chosen, repository = self._chosen(), self._repository
        if not chosen or repository is None:
            return
        if len(chosen) > MOST_PEEKED:
            self._say(f"At most {MOST_PEEKED} at a time, so that each can be looked at.")
            return
        self._forget()
        token = self.token_row.text
        self._ask("Looking…", functools.partial(_peek_all, repository, chosen, token))

    # --- what was found -------------------------------------------------------------------------

    def _show_seen(self, seen: list[SeenSae], place: Place) -> None:
        self.seen, self.place = seen, place
        lines = tuple(_line(one) for one in seen)
        shown = Table(_SEEN, lines)
        if not any(one.problem for one in seen):
            shown = Table(_SEEN[1:], tuple(replace(line, cells=line.cells[1:]) for line in lines))
        self.found.show_table(shown, 5)
        self.found.setVisible(bool(seen))
        notes = dict.fromkeys(note for one in seen for note in one.notes)
        self.notes.setText("\n".join(notes))
        self.notes.setVisible(bool(notes))
        self._show_choices()
        if seen:
            QTimer.singleShot(0, self, self._scroll_to_found)

    def _scroll_to_found(self) -> None:
        """What was found has no place before the layout has run."""
        self._area.widget().layout().activate()
        self._area.ensureWidgetVisible(self.name_row, 0, 8)

    def _show_choices(self) -> None:
        """The guess stands in the field; what the files say cannot be said otherwise."""
        for part in (self.model_row, self.layer_row, self.site_row, self.name_row):
            part.setVisible(bool(self.seen))
        if self.seen:
            from mistudio.jobs.sae_preview import guess_model

            models = self._intake.models()
            guess = guess_model(self.seen, models)
            self.model.set_options([(None, "Choose…"), *((m.id, m.name) for m in models)])
            self.model.set_value(guess.id if guess else None)
            self.model_row.set_helper(self._guessed(guess is not None, bool(models)))
            says = [one for one in self.seen if one.reads]
            self.site.set_options([(None, self._unsaid(bool(says))), *SITES.items()])
            self.site.setEnabled(not says)
            self.site_row.set_helper(_placed(says) if says else "Its files do not say.")
            self._show_layers()
        self._show_why()

    def _guessed(self, guessed: bool, any_model: bool) -> str:
        names = list(dict.fromkeys(one.model_name for one in self.seen if one.model_name))
        told = f"Its files name {', '.join(names)}. " if names else "Its files name no model. "
        if not any_model:
            return f"{told}The library has no model yet: add it in the Models tab first."
        return told + ("" if guessed else "Which one it is cannot be told.")

    def _unsaid(self, said: bool) -> str:
        return AS_FILES_SAY if said or self.place.on_hub else "Choose…"

    def _show_layers(self) -> None:
        model = self._model()
        guessed = self.place.on_hub  # by the folder's name
        known = any(one.reads or (one.layer is not None and not guessed) for one in self.seen)
        options: list[tuple[int | None, str]] = [(None, self._unsaid(known))]
        if model and not known:
            options += [(number, str(number)) for number in range(model.n_layers)]
        self.layer.set_options(options)
        self.layer.setEnabled(not known)

    def _model(self) -> Any:
        return next((m for m in self._intake.models() if m.id == self.model.value), None)

    def choices(self) -> Choices:
        return Choices(self._model(), self.layer.value, self.site.value, self.name.text().strip())

    def _on_choice_changed(self, index: int) -> None:
        if self.sender() is self.model:
            self._show_layers()
        self._show_why()

    def _show_why(self) -> None:
        why = blocker(self.seen, self.choices(), self.place.on_hub) if self.seen else ""
        self.why.setText(f"⚠ {why}" if why else "")
        self.accept_button.setEnabled(bool(self.seen) and not why)
        number = f"{len(self.seen)} SAEs" if len(self.seen) > 1 else "SAE"
        size = formatting.size(sum(one.bytes for one in self.seen))
        text = f"Download and import ({size})" if self.place.on_hub else f"Import {number}"
        self.accept_button.setText(text)

    # --- leaving --------------------------------------------------------------------------------

    def _on_source_changed(self, text: str) -> None:
        self._forget()

    def _show_page(self, index: int) -> None:
        for place, page in enumerate(self._pages):
            page.setVisible(place == index)

    def _on_sources_changed(self, index: int) -> None:
        self._forget()
        self._show_page(index)
        if index == 1:
            self._show_files()

    def _on_accept_clicked(self, checked: bool = False) -> None:
        if self.place.on_hub and not self.token_row.apply(self.place.repository):
            return
        try:
            self._intake.bring_in(self.place, self.seen, self.choices())
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        what = f"{len(self.seen)} SAEs" if len(self.seen) > 1 else self.seen[0].place
        self._services.toasts.info("Importing", f"{what}: it shows in the list when it is there.")
        self.accept()

    def done(self, result: int) -> None:
        """However it is closed."""
        self._asked += 1
        self._stop.set()
        super().done(result)


def _look(path: str, stopped: Any) -> tuple[list[SeenSae], Place]:
    full = Path(path).expanduser().resolve()
    return look_here(str(full), stopped), Place(path=str(full))


def _peek_all(
    repository: HubSaes, chosen: Sequence[HubSae], token: str
) -> tuple[list[SeenSae], Place]:
    files = dict.fromkeys(file.name for sae in chosen for file in sae.files)
    label = chosen[0].place.split("/")[-1] if len(chosen) == 1 else ""
    place = Place("", repository.repository, repository.revision, tuple(files), label)
    return peek_at(repository, chosen, token), place


def _line(seen: SeenSae) -> Line:
    width = formatting.count(seen.d_in) if seen.d_in else "—"
    if seen.d_out and seen.d_out != seen.d_in:
        width = f"{width} → {formatting.count(seen.d_out)}"
    cells = (
        f"⚠ {seen.problem}" if seen.problem else "none",
        FORMATS.get(seen.format, seen.format),
        formatting.size(seen.bytes),
        f"{width} channels" if seen.d_in else "—",
        formatting.count(seen.d_sae) if seen.d_sae else "—",
        seen.architecture + (f", k {seen.k:g}" if seen.k else "") or "—",
        _where(seen),
        seen.model_name or "—",
    )
    return Line(seen.place, seen.problem or "\n".join(seen.notes), cells)


def _where(seen: SeenSae) -> str:
    if seen.reads:
        wiring = "transcoder" if seen.writes != seen.reads else "sae"
        return point_title(seen.reads, wiring)
    return f"Layer {seen.layer}" if seen.layer is not None else "—"


def _placed(says: Sequence[SeenSae]) -> str:
    places = list(dict.fromkeys(_where(one) for one in says))
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f"Its files say: {', '.join(places[:3])}{more}."
