"""Add a model: find it on the Hub, or name a folder or a GGUF file; see what it takes; get it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import Qt, QUrl, Signal
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import QFileDialog, QGridLayout, QLineEdit, QWidget

from mistudio import formatting
from mistudio.errors import InvalidInput, UserError
from mistudio.ui.hub.asking import Answer, ask
from mistudio.ui.hub.results import Results
from mistudio.ui.hub.token import TokenRow
from mistudio.ui.models.candidate import Candidate, consider, refused_precisions, why_not
from mistudio.ui.models.consent import ConsentDialog
from mistudio.ui.models.plan_table import NAMES, PlanTable
from mistudio.ui.models.presenter import (
    SAMPLE_ABOUT,
    ModelsPresenter,
    checked_source,
    is_local,
    problem_of,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    ErrorPanel,
    FormRow,
    Surface,
    Text,
    clear,
    column,
    row,
)

if TYPE_CHECKING:
    from mistudio.engine.hub import Found

AUTO = "Auto (best that fits)"
_DOWNLOAD = "Download Model from HuggingFace"
_TAKE = "Add Model from This Computer"
_OWN_PROGRAM = (
    "⚠ This model brings its own program, which transformers does not have. The program is shown "
    "to you before anything is fetched; nothing of it runs unless you agree."
)


class AddCard(Card):
    """The form. Nothing is asked of the network before the user asks, and nothing is fetched
    before it was compared with the memory and the disk that are free."""

    architecture_wanted = Signal(object)
    """A `Candidate` whose architecture is to be shown."""

    def __init__(
        self, services: Services, presenter: ModelsPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__("Add a Model", "download", tokens.PURPLE, parent=parent)
        self._services, self._presenter = services, presenter
        self._asked = 0
        self._device_asked = False
        self._refused: dict[str, str] = {}
        self._adding = False  # the answer that is awaited decides whether it is added
        self._consenting: Candidate | None = None
        self.candidate: Candidate | None = None
        self._named = ""  # the text that the candidate was looked up by
        self.source = QLineEdit()
        self.source.setPlaceholderText("e.g., TinyLlama/TinyLlama-1.1B, or a folder or .gguf file")
        self.source.setClearButtonEnabled(True)
        self.source.textChanged.connect(self._on_source_text_changed)
        self.source.returnPressed.connect(self._on_source_return_pressed)
        self.search = Button("Search", "secondary", "search")
        self.search.setToolTip("Look for language models on the Hub whose name holds this text")
        self.search.clicked.connect(self._on_search_clicked)
        self.precision = Choice([("auto", AUTO), *NAMES.items()])
        self.precision.currentIndexChanged.connect(self._on_precision_changed)
        self.results = Results("Models found on the Hub")
        self.results.chosen.connect(self._on_result_chosen)
        self.results.hide()
        self.said = Text("", "helper", wrap=True)
        self.said.hide()
        self._problem = column(0)
        self.token_row = TokenRow(
            services, "Access Token (optional, for gated models)",
            "Required for gated models like Llama, Gemma, or other restricted access models",
            "hf_xxxxxxxxxxxxxxxxxxxx",
        )  # fmt: skip
        self.add_button = Button(_DOWNLOAD, "primary", "download")
        self.add_button.clicked.connect(self._on_add_clicked)
        self.browse = Button("Add a folder…", "secondary", "folder-open")
        self.browse.clicked.connect(self._on_browse_clicked)
        self.browse_file = Button("Add a GGUF file…", "secondary", "file-plus")
        self.browse_file.clicked.connect(self._on_browse_file_clicked)
        self.sample_button = Button("Add the sample model", "secondary", "flask-conical")
        self.sample_button.clicked.connect(self._on_sample_clicked)
        self.sample_about = Text(SAMPLE_ABOUT, "helper", wrap=True)
        self._make_plan()
        self._build()
        self._on_source_text_changed("")

    def _make_plan(self) -> None:
        self.plan_box = Surface("tile", None, 16)
        self.plan_title = Text("", "label", wrap=True)
        self.plan_facts = Text("", "helper", wrap=True)
        self._table = column(0)
        self.plan_warning = Text("", "small", "yellow", wrap=True)
        self.look = Button("View architecture", "link", "layers")
        self.look.clicked.connect(self._on_look_clicked)
        self.page_link = Button("Open its page", "link", "external-link")
        self.page_link.clicked.connect(self._on_page_clicked)
        self.code_note = Text("", "small", "yellow", wrap=True)
        links = row(self.look, self.page_link, None, spacing=16)
        self.plan_box.add(
            self.plan_title, self.plan_facts, self._table, self.plan_warning, self.code_note, links
        )
        self.plan_box.hide()

    def _build(self) -> None:
        self.source_row = FormRow("HuggingFace Model Repository", self.source, beside=self.search)
        precision_row = FormRow("Quantization Format", self.precision)
        grid = QGridLayout()
        grid.setHorizontalSpacing(16)
        grid.setVerticalSpacing(14)
        grid.addWidget(self.source_row, 0, 0)
        grid.addWidget(precision_row, 0, 1)
        grid.addWidget(self.results, 1, 0, 1, 2)
        grid.addWidget(self.said, 2, 0, 1, 2)
        grid.addLayout(self._problem, 3, 0, 1, 2)
        grid.addWidget(self.plan_box, 4, 0, 1, 2)
        grid.addWidget(self.token_row, 5, 0, 1, 2)
        grid.setColumnStretch(0, 3)
        grid.setColumnStretch(1, 2)
        others = row(self.browse, self.browse_file, self.sample_button, self.sample_about)
        others.setStretch(3, 1)
        note = Text(
            "Only safetensors and GGUF weights are read. Code that comes with a model is never run "
            "unless you have seen it and agreed. You can also drop a folder or a .gguf file here.",
            "helper",
            wrap=True,
        )
        self.add(grid, self.add_button, others, note)

    # --- looking at it --------------------------------------------------------------------------

    def _ask(self, what: str, function: Any) -> None:
        """`function(access)` in the background; an older question's answer is not shown."""
        self._asked += 1
        clear(self._problem)
        self._say(what)
        name = self.source.text().strip()
        work = functools.partial(
            _answer, self._asked, name, self.token_row.text, is_local(name), function
        )
        self._services.background.run(work, self._on_answer, self._on_failed)

    def _on_source_return_pressed(self) -> None:
        """A whole name is looked at, a part of one is searched for."""
        text = self.source.text().strip()
        if text and (is_local(text) or "/" in text):
            self.look_at(text)
        elif text:
            self._on_search_clicked()

    def _on_search_clicked(self, checked: bool = False) -> None:
        if text := self.source.text().strip():
            self._hide_candidate()
            self._adding = False
            self._ask("Searching…", functools.partial(_search, text))

    def _on_result_chosen(self, found: Found) -> None:
        self.source.setText(found.repository)
        self.results.hide()
        self.look_at(found.repository)

    def look_at(self, text: str, adding: bool = False) -> None:
        """Say what this model is and what it takes here; with `adding`, get it where it fits."""
        self._adding = False
        try:
            source = checked_source(text)
        except InvalidInput as exc:
            self.source_row.set_error(" ".join(part for part in (exc.what, exc.next_step) if part))
            return
        self.results.hide()
        self._adding, self._named = adding, text
        library = self._services.library
        self._ask("Looking what it takes…", functools.partial(_consider, library, source))

    def _on_answer(self, answer: Answer) -> None:
        if answer.number != self._asked:
            return
        if isinstance(answer.value, list):
            self._show_found(answer.value)
        else:
            self._show_candidate(answer.value)
            if self._adding:
                self._adding = False
                self._add_candidate()

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        self._adding = False
        self._say("")
        clear(self._problem)
        self._problem.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))

    def _show_found(self, found: list[Found]) -> None:
        self.results.offer(found)
        if not found:
            self._say("No language model with safetensors weights has this in its name.")
            return
        noun = "model" if len(found) == 1 else "models"
        self._say(f"{len(found)} {noun}, the most downloaded first. Choose one.")

    def _show_candidate(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._say("")
        fit = candidate.fit
        made = fit.architecture
        self.plan_title.setText(
            f"{candidate.name}: {formatting.short_count(made.parameters)} parameters, "
            f"{made.n_layers} layers of {formatting.count(made.d_model)}"
        )
        verb = "to download" if candidate.page else "on disk"
        facts = [
            made.architecture,
            f"{formatting.size(candidate.fetch)} {verb} "
            f"({formatting.size(candidate.disk_free)} free)",
            f"{formatting.size(fit.free)} of memory free on {fit.device}",
            *candidate.facts,
        ]
        self.plan_facts.setText(" • ".join(facts))
        clear(self._table)
        self._table.addWidget(PlanTable(fit))
        self.code_note.setText(_OWN_PROGRAM if candidate.code else "")
        self.code_note.setVisible(candidate.code is not None)
        self.page_link.setVisible(bool(candidate.page))
        self.page_link.setText(
            "Open its page to accept the terms" if candidate.gated else "Open its page"
        )
        self.plan_box.show()
        self._show_precisions()
        self._show_warning()

    def _hide_candidate(self) -> None:
        self.candidate = None
        self.plan_box.hide()
        self._show_precisions()

    def _say(self, text: str) -> None:
        self.said.setText(text)
        self.said.setVisible(bool(text))

    def _on_look_clicked(self, checked: bool = False) -> None:
        if self.candidate is not None:
            self.architecture_wanted.emit(self.candidate)

    def _on_page_clicked(self, checked: bool = False) -> None:
        if self.candidate is not None:
            QDesktopServices.openUrl(QUrl(self.candidate.page))

    # --- precisions -----------------------------------------------------------------------------

    def learn_device(self) -> None:
        """What this computer cannot run at all, asked once, off the window's thread."""
        if not self._device_asked:
            self._device_asked = True
            self._services.background.run(refused_precisions, self._on_device, self._on_no_device)

    def _on_device(self, refused: dict[str, str]) -> None:
        self._refused = refused
        self._show_precisions()

    def _on_no_device(self, error: Exception) -> None:
        self._device_asked = False  # asked again the next time the tab is shown

    def _show_precisions(self) -> None:
        """The options; what this computer cannot run is disabled, with the reason."""
        fit = self.candidate.fit if self.candidate else None
        chosen = self.precision.value
        auto = f"Auto (best that fits: {fit.best.upper()})" if fit and fit.plan("auto").fits else ""
        self.precision.set_options([("auto", auto or AUTO), *NAMES.items()])
        for precision in NAMES:
            reason = fit.cannot_run(precision) if fit else self._refused.get(precision, "")
            if reason:
                self.precision.disable(precision, reason)
                if precision == chosen:
                    self.precision.set_value("auto")

    def _on_precision_changed(self, index: int) -> None:
        self._show_warning()

    def _show_warning(self) -> None:
        problem = why_not(self.candidate, self.precision.value) if self.candidate else None
        text = f"⚠ {problem.title}. {problem.what} {problem.next_step}" if problem else ""
        self.plan_warning.setText(text)
        self.plan_warning.setVisible(bool(text))
        self._show_button()

    # --- getting it -----------------------------------------------------------------------------

    def _on_source_text_changed(self, text: str) -> None:
        text = text.strip()
        self.source_row.set_error("")
        clear(self._problem)
        if self.candidate is not None and self._named != text:
            self._hide_candidate()
        self._asked += 1  # what is being looked at is another one
        self._adding = False
        self._say("")
        self.search.setEnabled(bool(text) and not is_local(text))
        self._show_button()

    def _show_button(self) -> None:
        text = self.source.text().strip()
        self.add_button.setEnabled(bool(text))
        anyway = self.plan_warning.text() and self.candidate and not self.candidate.disk_short
        wanted = _TAKE if is_local(text) else _DOWNLOAD
        self.add_button.setText(f"{wanted} anyway" if anyway else wanted)
        self.add_button.setToolTip("" if text else "Name a repository, a folder or a .gguf file")

    def _on_add_clicked(self, checked: bool = False) -> None:
        """What has not been looked at yet is looked at first, and added where it fits."""
        text = self.source.text().strip()
        if self.candidate is None or self._named != text:
            self.look_at(text, adding=True)
        else:
            self._submit()

    def _add_candidate(self) -> None:
        assert self.candidate is not None
        if why_not(self.candidate, self.precision.value) is None:
            self._submit()

    def _submit(self) -> None:
        """A model that brings its own program is asked about first."""
        assert self.candidate is not None
        if self.candidate.code is None:
            self._get(self.candidate)
            return
        self._consenting = self.candidate
        dialog = ConsentDialog(self.candidate.name, self.candidate.code, self)
        dialog.accepted.connect(self._on_consented)
        dialog.open()

    def _on_consented(self) -> None:
        """What was shown is what is fetched, whatever the form says by now."""
        if self._consenting is not None:
            self._get(self._consenting)
        self._consenting = None

    def _get(self, candidate: Candidate) -> None:
        source, code = candidate.source, candidate.code
        if candidate.page and not self.token_row.apply(source):
            return
        try:
            self._presenter.add(
                source, self.precision.value, code.consent().as_dict() if code else None
            )
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        self.token_row.field.clear()
        self.source.clear()

    def _on_browse_clicked(self, checked: bool = False) -> None:
        self._take(QFileDialog.getExistingDirectory(self, "Choose a model's folder"))

    def _on_browse_file_clicked(self, checked: bool = False) -> None:
        found = QFileDialog.getOpenFileName(self, "Choose a GGUF file", "", "GGUF models (*.gguf)")
        self._take(found[0])

    def _take(self, path: str) -> None:
        if path:
            self.source.setText(path)
            self.look_at(path)
            self.source.setFocus(Qt.FocusReason.OtherFocusReason)

    def _on_sample_clicked(self, checked: bool = False) -> None:
        self.add_sample()

    def add_sample(self) -> None:
        if self._presenter.has_sample():
            self._services.toasts.info("The sample model is in your library already")
            return
        try:
            self._presenter.add_sample()
        except UserError as exc:
            self._services.toasts.error(exc)

    def refresh(self) -> None:
        there = self._presenter.has_sample()
        self.sample_button.setEnabled(not there)
        self.sample_about.setText("The sample model is in your library." if there else SAMPLE_ABOUT)

    # --- state ----------------------------------------------------------------------------------

    def save_state(self) -> dict[str, Any]:
        """The token is no part of it."""
        return {"source": self.source.text(), "precision": self.precision.value}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.source.setText(str(state.get("source", "")))
        self.precision.set_value(state.get("precision", "auto"))


def _answer(number: int, name: str, token: str, local: bool, function: Any) -> Answer:
    """A model on this computer needs nobody's leave."""
    return Answer(number, function(None)) if local else ask(number, name, token, function)


def _search(text: str, access: Any) -> list[Found]:
    from mistudio.engine.hub import search_models

    return search_models(text, access=access)


def _consider(library: Any, source: str, access: Any) -> Candidate:
    return consider(library, source, access)
