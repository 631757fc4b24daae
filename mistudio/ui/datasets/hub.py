"""Download from Hugging Face: find a dataset, see what it holds, take all, a part, or a link."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import Qt, QUrl
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import (
    QCompleter,
    QGridLayout,
    QLineEdit,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.ui.datasets.detail import problem_of
from mistudio.ui.hub.asking import Answer, ask
from mistudio.ui.hub.results import Results
from mistudio.ui.hub.token import TokenRow
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    Collapsible,
    ErrorPanel,
    FormRow,
    IntBox,
    Text,
    clear,
    column,
    row,
)

if TYPE_CHECKING:
    from mistudio.engine.hub import Found, HubDataset

_MEGABYTE = 1024**2
_GUESSED = "guessed from the rows"


class HubCard(Card):
    """The form. Nothing is asked of the network before the user asks."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__("Download from HuggingFace", "download", parent=parent)
        self._services = services
        self._asked = 0
        self._info: HubDataset | None = None
        self.repository = QLineEdit()
        self.repository.setPlaceholderText("username/dataset-name")
        self.repository.setClearButtonEnabled(True)
        self.repository.textChanged.connect(self._on_repository_changed)
        self.repository.returnPressed.connect(self._on_search_clicked)
        self.search = Button("Search", "secondary", "search")
        self.search.setToolTip("Look for datasets on the Hub whose name holds this text")
        self.search.clicked.connect(self._on_search_clicked)
        self.results = Results("Datasets found on the Hub")
        self.results.chosen.connect(self._on_result_chosen)
        self.results.hide()
        self.said = Text("", "helper", wrap=True)
        self.said.hide()
        self.terms = Button("Open its page", "link", "external-link")
        self.terms.clicked.connect(self._on_terms_clicked)
        self.terms.hide()
        self._problem = column(0)
        self._token_row = TokenRow(
            services, "Access Token (optional)", "Required for private or gated datasets", "hf_..."
        )
        self.token, self.remember = self._token_row.field, self._token_row.remember
        self.split = QLineEdit()
        self.split.setPlaceholderText("train, validation, test")
        self.config = QLineEdit()
        self.config.setPlaceholderText("en, zh, etc.")
        self.max_documents = IntBox(0, 0, 2_000_000_000, 1000)
        self.max_documents.setSpecialValueText("All")
        self.max_megabytes = IntBox(0, 0, 10_000_000, 100, " MB")
        self.max_megabytes.setSpecialValueText("All")
        self.store = Choice(
            [(True, "Store it in the library"), (False, "Do not store, stream it each time")]
        )
        self.text_column = QLineEdit()
        self.text_column.setPlaceholderText(_GUESSED)
        self.bad_rows = Choice(
            [(False, "Stop and name the row"), (True, "Leave it out and count it")]
        )
        self.download = Button("Download Dataset", "primary", "download")
        self.download.clicked.connect(self._on_download_clicked)
        self._build()
        self._on_repository_changed("")

    def _build(self) -> None:
        grid = QGridLayout()
        grid.setHorizontalSpacing(16)
        grid.setVerticalSpacing(14)
        grid.addWidget(FormRow("Repository ID", self.repository, beside=self.search), 0, 0, 1, 6)
        grid.addWidget(self.results, 1, 0, 1, 6)
        about = row(self.said, self.terms)
        about.setStretch(0, 1)
        grid.addLayout(about, 2, 0, 1, 6)
        grid.addLayout(self._problem, 3, 0, 1, 6)
        grid.addWidget(self._token_row, 4, 0, 1, 6)
        split = FormRow("Split (optional)", self.split, "Dataset split to download")
        config = FormRow("Config (optional)", self.config, "Dataset configuration")
        grid.addWidget(split, 5, 0, 1, 3)
        grid.addWidget(config, 5, 3, 1, 3)
        for place in range(6):
            grid.setColumnStretch(place, 1)
        limits = QWidget()
        line = row(
            FormRow("At most so many samples", self.max_documents),
            FormRow("At most so much text", self.max_megabytes),
            FormRow("Where it is kept", self.store),
            spacing=16,
        )
        for place in range(3):
            line.setStretch(place, 1)
        limits.setLayout(line)
        reading = QWidget()
        second = row(
            FormRow("Text column (optional)", self.text_column),
            FormRow("A row that cannot be read", self.bad_rows),
            spacing=16,
        )
        for place in range(2):
            second.setStretch(place, 1)
        reading.setLayout(second)
        self.limits = Collapsible("Limits, streaming and text column")
        self.limits.add(limits, reading)
        self.add(grid, self.limits, self.download)

    # --- asking the Hub -------------------------------------------------------------------------

    def _ask(self, what: str, function: Any) -> None:
        """`function(access)` in the background; an older question's answer is not shown."""
        self._asked += 1
        clear(self._problem)
        self._say(what)
        name = self.repository.text().strip()
        work = functools.partial(ask, self._asked, name, self._token_row.text, function)
        self._services.background.run(work, self._on_answer, self._on_failed)

    def _on_search_clicked(self, checked: bool = False) -> None:
        text = self.repository.text().strip()
        if text:
            self._ask("Searching…", functools.partial(_search, text))

    def _on_result_chosen(self, found: Found) -> None:
        self.repository.setText(found.repository)
        self.results.hide()
        self._look_up(found.repository)

    def _look_up(self, repository: str) -> None:
        self._ask("Looking what it holds…", functools.partial(_look, repository))

    def _on_answer(self, answer: Answer) -> None:
        if answer.number != self._asked:
            return
        if isinstance(answer.value, list):
            self._show_found(answer.value)
        else:
            self._show_info(answer.value)

    def _show_found(self, found: list[Found]) -> None:
        self.results.offer(found)
        if not found:
            self._say("No dataset on the Hub has this in its name.")
            return
        noun = "dataset" if len(found) == 1 else "datasets"
        self._say(f"{len(found)} {noun}, the most downloaded first. Choose one.")

    def _show_info(self, info: HubDataset) -> None:
        self._info = info
        self._say(" • ".join(_about(info)))
        self.terms.setText("Open its page to accept the terms" if info.gated else "Open its page")
        self.terms.show()
        self._suggest(self.config, [config.name for config in info.configs])
        chosen = next((c for c in info.configs if c.name == info.default_config), None)
        chosen = chosen or (info.configs[0] if info.configs else None)
        self._suggest(self.split, [split.name for split in chosen.splits] if chosen else [])
        self._suggest(self.text_column, [name for name, _ in chosen.columns] if chosen else [])
        self.text_column.setPlaceholderText(_GUESSED)
        if info.problem:
            self._problem.addWidget(ErrorPanel("Nothing here can be read", info.problem))

    @staticmethod
    def _suggest(field: QLineEdit, names: list[str]) -> None:
        completer = QCompleter(names, field)
        completer.setCompletionMode(QCompleter.CompletionMode.PopupCompletion)
        completer.setFilterMode(Qt.MatchFlag.MatchContains)
        completer.setCaseSensitivity(Qt.CaseSensitivity.CaseInsensitive)
        field.setCompleter(completer)
        if names:
            field.setPlaceholderText(", ".join(names[:6]) + ("…" if len(names) > 6 else ""))

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        self._say("")
        clear(self._problem)
        self._problem.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))

    def _say(self, text: str) -> None:
        self.said.setText(text)
        self.said.setVisible(bool(text))
        if not text:
            self.terms.hide()

    def _on_terms_clicked(self, checked: bool = False) -> None:
        if self._info is not None:
            QDesktopServices.openUrl(QUrl(self._info.page))

    # --- the download ---------------------------------------------------------------------------

    def _on_repository_changed(self, text: str) -> None:
        name = text.strip()
        self.search.setEnabled(bool(name))
        self.download.setEnabled("/" in name.strip("/"))
        self.download.setToolTip(
            "" if self.download.isEnabled() else "Give a repository such as username/dataset-name"
        )
        if self._info is not None and self._info.repository != name:
            self._forget()

    def _forget(self) -> None:
        """What was known of another repository."""
        self._info = None
        self._asked += 1
        self._say("")
        clear(self._problem)
        hints = (
            (self.split, "train, validation, test"),
            (self.config, "en, zh, etc."),
            (self.text_column, _GUESSED),
        )
        for field, hint in hints:
            field.setPlaceholderText(hint)
            field.setCompleter(None)

    def _on_download_clicked(self, checked: bool = False) -> None:
        from mistudio.jobs.hub_datasets import DownloadDataset

        name = self.repository.text().strip().strip("/")
        megabytes = self.max_megabytes.value()
        job = DownloadDataset(
            name,
            config=self.config.text().strip() or None,
            split=self.split.text().strip() or None,
            max_documents=self.max_documents.value() or None,
            max_bytes=megabytes * _MEGABYTE if megabytes else None,
            store=bool(self.store.value),
            text_column=self.text_column.text().strip() or None,
            skip_bad_rows=bool(self.bad_rows.value),
        )
        if not self._token_row.apply(name):
            return
        try:
            self._services.jobs.submit(job)
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        self._clear_fields()

    def _clear_fields(self) -> None:
        for field in (self.repository, self.token, self.split, self.config, self.text_column):
            field.clear()
        self.bad_rows.set_value(False)
        self.max_documents.setValue(0)
        self.max_megabytes.setValue(0)
        self.store.set_value(True)
        self.results.hide()
        self._forget()

    # --- state ----------------------------------------------------------------------------------

    def save_state(self) -> dict[str, Any]:
        """The token is no part of it."""
        return {
            "repository": self.repository.text(),
            "split": self.split.text(),
            "config": self.config.text(),
            "max_documents": self.max_documents.value(),
            "max_megabytes": self.max_megabytes.value(),
            "store": bool(self.store.value),
            "limits": self.limits.expanded,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        self.repository.setText(str(state.get("repository", "")))
        self.split.setText(str(state.get("split", "")))
        self.config.setText(str(state.get("config", "")))
        for box, key in (
            (self.max_documents, "max_documents"),
            (self.max_megabytes, "max_megabytes"),
        ):
            value = state.get(key, 0)
            box.setValue(value if isinstance(value, int) else 0)
        self.store.set_value(bool(state.get("store", True)))
        self.limits.set_expanded(bool(state.get("limits", False)))


def _search(text: str, access: Any) -> list[Found]:
    from mistudio.engine.hub import search_datasets

    return search_datasets(text, access=access)


def _look(repository: str, access: Any) -> HubDataset:
    from mistudio.engine.hub import dataset_info

    return dataset_info(repository, access=access)


def _about(info: HubDataset) -> list[str]:
    """What a dataset holds, in a line."""
    chosen = next((c for c in info.configs if c.name == info.default_config), None)
    chosen = chosen or (info.configs[0] if info.configs else None)
    said = []
    if len(info.configs) > 1:
        said.append(f"{len(info.configs)} configurations")
    if chosen:
        size = sum(split.bytes for split in chosen.splits)
        rows = [split.rows for split in chosen.splits]
        said.append(f"splits: {', '.join(split.name for split in chosen.splits)}")
        said += [formatting.size(size)] if size else []
        known = [number for number in rows if number is not None]
        said += (
            [f"{formatting.count(sum(known))} rows"] if known and len(known) == len(rows) else []
        )
    said.append(f"licence: {info.licence or 'not stated'}")
    if info.gated:
        said.append("gated: accept its terms on its page, then give your access token")
    return said
