"""The dialog in which a language model describes features and is judged by its descriptions: one
of the library, or a server on this machine; another only where the user agrees to its address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import Qt
from PySide6.QtGui import QShowEvent
from PySide6.QtWidgets import QApplication, QCheckBox, QDialog, QLineEdit, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.engine.features.server_address import Address
from mistudio.errors import UserError, explain
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts
from mistudio.ui.widgets import (
    Button,
    Choice,
    ConfirmDialog,
    ErrorPanel,
    FormRow,
    ProgressRow,
    Surface,
    Text,
    clear,
    column,
    row,
    scrolling,
)

if TYPE_CHECKING:
    from mistudio.jobs.describing import DescribeFeatures
    from mistudio.ui.features.page import FeaturesPage
    from mistudio.ui.features.presenter import FeaturesPresenter

WIDTH = 720
SMALL = 1_000_000_000  # parameters below which a model describes badly
MOST_FEATURES = 1000  # as the job
SHOWN = 200  # results listed
OWN, SERVER = "own", "server"
HELP = (
    "Excerpts of half of the documents are shown to the model; whether its description tells where "
    "the feature is active is tried on the other half."
)


class DescribeDialog(QDialog):
    """Of some features. It may be closed while its job runs: the labels come all the same."""

    def __init__(
        self,
        services: Services,
        presenter: FeaturesPresenter,
        features: Sequence[int],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("describe_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle("Describe with a language model")
        room = QApplication.primaryScreen().availableSize()
        self.setMinimumWidth(min(WIDTH, room.width() - 32))
        assert presenter.choice is not None and presenter.run is not None
        self._services, self.features = services, list(features)
        self._sae_id, self._run_id = presenter.choice.sae.id, presenter.run.id
        self._job_id: int | None = None
        self._finished = False
        self._make_fields()
        self._build()
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        self._show_who()
        self._show_state()

    # --- what it is made of ---------------------------------------------------------------------

    def _make_fields(self) -> None:
        settings, library = self._services.settings, self._services.library
        models = sorted(library.models.all(), key=lambda record: -record.parameters)
        self._parameters = {record.id: record.parameters for record in models}
        self.who = Choice([(OWN, "A model of the library"), (SERVER, "A server on this machine")])
        self.who.setAccessibleName("Who describes")
        self.model = Choice(
            [
                (r.id, f"{r.name} ({formatting.short_count(r.parameters)} parameters)")
                for r in models
            ]
        )
        self.address = QLineEdit(settings.get("describer_address"))
        self.address.setPlaceholderText("http://127.0.0.1:11434")
        self.key = QLineEdit()
        self.key.setEchoMode(QLineEdit.EchoMode.Password)
        self.key.setPlaceholderText("None, or as remembered")
        self.connect_button = Button("Connect")
        self.connect_button.setAutoDefault(False)
        known = settings.get("describer_model")
        self.server_model = Choice([(known, known)] if known else [])
        self.what = Choice(
            [("write", "Write new descriptions"), ("judge", "Judge the labels there are")]
        )
        self.contexts = Choice([(20, "20"), (40, "40"), (100, "100")])
        self.contexts.set_value(40)
        self.judge = QCheckBox("Try the descriptions")
        self.judge.setChecked(True)
        self.judge.setToolTip(
            "The model tells from each description in which contexts the feature is active, one "
            "context a prompt; the balanced accuracy becomes the label's score"
        )
        if not models:
            self.who.set_value(SERVER)
        for choice in (self.who, self.model, self.what, self.contexts, self.server_model):
            choice.currentIndexChanged.connect(self._on_changed)
        self.judge.toggled.connect(self._on_changed)
        self.address.textChanged.connect(self._on_address_changed)
        self.address.returnPressed.connect(self._on_connect_clicked)
        self.connect_button.clicked.connect(self._on_connect_clicked)

    def _build(self) -> None:
        n = len(self.features)
        title = f"Describe feature #{self.features[0]}" if n == 1 else f"Describe {n:,} features"
        self.title = Text(title, "h1")
        self._who_row = FormRow("Who describes", self.who)
        self._model_row = FormRow("Model", self.model, " ")
        self._address_row = FormRow("Address", self.address, " ", self.connect_button)
        self._key_row = FormRow("Key", self.key, "Only if the server wants one; kept in your "
                                "system's keyring.")  # fmt: skip
        self._server_row = FormRow("Model of the server", self.server_model, " ")
        self._server = QWidget()
        server = column(12)
        server.addWidget(self._address_row)
        pair = row(self._server_row, self._key_row, spacing=16)
        for place in range(2):
            pair.setStretch(place, 1)
        server.addLayout(pair)
        self._server.setLayout(server)
        self._what_row = FormRow("What to do", self.what)
        self._contexts_row = FormRow("Contexts tried a feature", self.contexts)
        pair = row(self._what_row, self._contexts_row, spacing=16)
        for place in range(2):
            pair.setStretch(place, 1)
        self.hint = Text("", "small", "yellow", wrap=True)
        self.form = QWidget()
        form = column(14)
        for part in (self._who_row, self._model_row, self._server):
            form.addWidget(part)
        form.addLayout(pair)
        form.addWidget(self.judge)
        form.addWidget(self.hint)
        form.addWidget(Text(HELP, "helper", wrap=True))
        self.form.setLayout(form)
        self.progress = ProgressRow("Describing")
        self._failure = column(8)
        self.outcome = Text("", "body", wrap=True)
        self._results = column(8)
        inner = QWidget()
        inner.setLayout(self._results)
        self._list = scrolling(inner)
        self._list.setMinimumHeight(240)
        self.cancel = Button("Cancel")
        self.cancel.setAutoDefault(False)
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self.start = Button("Describe", "primary", "sparkles")
        self.start.clicked.connect(self._on_start_clicked)
        self.start.setDefault(True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 20, 24, 20)
        layout.setSpacing(16)
        layout.addWidget(self.title)
        layout.addWidget(self.form)
        layout.addWidget(self.progress)
        layout.addWidget(self.outcome)
        layout.addWidget(self._list, 1)
        layout.addLayout(self._failure)
        layout.addStretch(0)
        layout.addLayout(row(None, self.cancel, self.start))

    # --- the form -------------------------------------------------------------------------------

    def _on_changed(self, *_: object) -> None:
        self._show_who()

    def _show_who(self) -> None:
        own, write = self.who.value == OWN, self.what.value == "write"
        self._model_row.setVisible(own)
        self._server.setVisible(not own)
        self.judge.setVisible(write)
        self._contexts_row.setEnabled(self._contexts() > 0)
        self.start.setText("Describe" if write else "Judge")
        small = own and self._parameters.get(self.model.value, SMALL) < SMALL
        self._model_row.set_helper(
            "Models trained to follow instructions describe; others hardly do."
        )
        self._address_row.set_helper(
            "llama.cpp, Ollama, LM Studio and others that speak OpenAI's chat completions. It is "
            "asked only when you connect or describe."
        )
        self._server_row.set_helper("Connect, then choose one.")
        hints = []
        if small:
            hints.append(
                "This model has less than a billion parameters: many of its descriptions will be "
                "wrong, and its score will say so."
            )
        if len(self.features) > MOST_FEATURES:
            hints.append(
                f"{len(self.features):,} features are chosen; at most {MOST_FEATURES:,} can be at "
                "a time."
            )
        self.hint.setText(" ".join(hints))
        self.hint.setVisible(bool(hints))
        chosen = self.model.value is not None if own else bool(self.server_model.value)
        self.start.setEnabled(chosen and 0 < len(self.features) <= MOST_FEATURES)
        self._fit()

    def _contexts(self) -> int:
        """How many are tried a feature; 0: none."""
        tried = self.what.value == "judge" or self.judge.isChecked()
        return int(self.contexts.value) if tried else 0

    def job(self) -> DescribeFeatures:
        from mistudio.jobs.describing import DescribeFeatures

        own = self.who.value == OWN
        return DescribeFeatures(
            self._run_id,
            self.features,
            model_id=self.model.value if own else None,
            address="" if own else self.address.text().strip(),
            server_model="" if own else self.server_model.value,
            contexts=self._contexts(),
            write=self.what.value == "write",
        )

    # --- the server -----------------------------------------------------------------------------

    def _on_address_changed(self, text: str) -> None:
        self._address_row.set_error("")
        self.server_model.set_options([])
        self._show_who()

    def _on_connect_clicked(self, checked: bool = False) -> None:
        try:
            address = Address.parse(self.address.text())
        except UserError as exc:
            self._address_row.set_error(f"{exc.what} {exc.next_step}")
            return
        settings = self._services.settings
        if settings.get("describer_address") != str(address):
            settings.set("describer_address", str(address))
            settings.set("describer_confirmed", "")  # each address is agreed to by itself
        if address.is_loopback or settings.get("describer_confirmed") == str(address):
            self._connect_to(str(address))
            return
        question = ConfirmDialog(
            self,
            f"Send text to {address.host}?",
            f"{address} is not on this machine. Excerpts of your dataset, and what the model "
            "writes about them, will be sent there whenever features are described with it. "
            "Nothing else is sent, and nothing by itself.",
            "Allow this address",
            "warning",
        )
        question.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        question.accepted.connect(self._on_question_accepted)
        question.open()

    def _on_question_accepted(self) -> None:
        address = self._services.settings.get("describer_address")
        self._services.settings.set("describer_confirmed", address)
        self._connect_to(address)

    def _connect_to(self, address: str) -> None:
        self.connect_button.setEnabled(False)
        self.connect_button.setText("Connecting…")
        key = self.key.text()
        self._services.background.run(
            _Connecting(address, key), self._on_connected, self._on_connect_failed
        )

    def _on_connected(self, models: list[str]) -> None:
        self._connect_ended()
        self.server_model.set_options([(name, name) for name in models])
        known = self._services.settings.get("describer_model")
        if known in models:
            self.server_model.set_value(known)
        if not models:
            self._address_row.set_error("The server answers, but offers no model.")
        self._show_who()

    def _on_connect_failed(self, error: Exception) -> None:
        self._connect_ended()
        told = explain(error)
        self._address_row.set_error(
            f"{told.title}. {told.what} {told.next_step}".strip() if told else str(error)
        )
        self._fit()

    def _connect_ended(self) -> None:
        self.connect_button.setEnabled(True)
        self.connect_button.setText("Connect")
        self.key.clear()

    # --- the job --------------------------------------------------------------------------------

    def _on_start_clicked(self, checked: bool = False) -> None:
        clear(self._failure)
        if self.who.value == SERVER:
            self._services.settings.set("describer_model", self.server_model.value)
        self._job_id = self._services.jobs.submit(self.job())
        self._show_state()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if self._running() and self._job_id is not None:
            self._services.jobs.cancel(self._job_id)
        else:
            self.close()

    def _running(self) -> bool:
        job = self._services.library.jobs.find(self._job_id) if self._job_id is not None else None
        return job is not None and job.active

    def _show_state(self) -> None:
        running = self._running()
        self.form.setVisible(not running and not self._finished)
        self.progress.setVisible(running)
        self.outcome.setVisible(self._finished)
        self._list.setVisible(self._finished and self._results.count() > 0)
        self.start.setVisible(not running and not self._finished)
        self.cancel.setText("Stop" if running else "Close" if self._finished else "Cancel")
        self._fit()

    def _on_jobs_tick(self) -> None:
        if self._job_id is not None and self.isVisible():
            snapshot = self._services.jobs.snapshot(self._job_id)
            if snapshot is not None:
                self.progress.show_snapshot(snapshot)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if job_id != self._job_id:
            return
        job = self._services.library.jobs.find(job_id)
        if job is None or job.active:
            return
        if job.status == "finished":
            self._finished = True
            self._show_results(job.result)
        elif job.status == "failed":
            self._failure.addWidget(ErrorPanel.of_row(job.error))
        self._job_id = None
        self._show_state()

    def _show_results(self, result: dict[str, Any]) -> None:
        n, unparsed = result["features"], result["unparsed"]
        told = []
        if self.what.value == "write":
            told.append(f"{result['described']} of {n} described.")
        if unparsed:
            told.append(f"{len(unparsed)} could not be parsed: {_numbers(unparsed)}.")
        if self._contexts():
            told.append(
                f"{result['scored']} of {n} scored: balanced accuracy with its 95 % interval, 0.5 "
                "is chance."
            )
        if self.what.value == "write":
            told.append("The descriptions are kept with the features; choose which are shown.")
        self.outcome.setText(" ".join(told))
        clear(self._results)
        for feature in self.features[:SHOWN]:
            if (line := self._result(feature)) is not None:
                self._results.addWidget(line)
        self._results.addStretch(1)

    def _result(self, feature: int) -> QWidget | None:
        library = self._services.library
        if self.what.value == "write":
            found = [
                label
                for label in library.feature_labels.of_feature(self._sae_id, feature)
                if label.source == "model"
            ]
            if not found:
                return None
            newest = found[0]
            return _Result(
                self._services, feature, newest.text, (newest.score, newest.low, newest.high),
                newest.id,
            )  # fmt: skip
        for score in library.feature_scores.of_feature(self._sae_id, feature):
            if score.scorer == "model":
                numbers = (score.accuracy, score.low, score.high)
                return _Result(self._services, feature, score.details["description"], numbers)
        return None

    # --- its size -------------------------------------------------------------------------------

    def _fit(self) -> None:
        layout = self.layout()
        if layout is None or not self.isVisible():
            return
        layout.activate()
        wanted = layout.totalHeightForWidth(self.width())
        room = QApplication.primaryScreen().availableSize().height() - 48
        self.resize(self.width(), min(max(wanted, layout.minimumSize().height()), room))

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        self._fit()


class _Result(Surface):
    """A description with its score, and a button that makes it the shown label."""

    def __init__(
        self,
        services: Services,
        feature: int,
        text: str,
        numbers: tuple[float | None, float | None, float | None],
        label_id: int | None = None,
    ) -> None:
        super().__init__("row", None, 12)
        self._services, self._label_id = services, label_id
        accuracy, low, high = numbers
        score = Text(formatting.number(accuracy, 2), "mono")
        if accuracy is not None:
            score.setText(
                f"{formatting.number(accuracy, 2)} "
                f"[{formatting.number(low, 2)}, {formatting.number(high, 2)}]"
            )
        score.setToolTip(
            "Balanced accuracy with its 95 % interval: 0.5 is chance. An em dash: not tried, or "
            "too few contexts or usable answers"
        )
        words = Text(text, "body", wrap=True, selectable=True)
        number = Text(f"#{feature}", "label")
        number.setMinimumWidth(fonts.px(64))
        line = row(number, words, score, spacing=16)
        line.setStretch(1, 1)
        self.use = Button("Use as label", "small")
        self.use.setAccessibleName(f"Use as label of feature {feature}")
        self.use.setAutoDefault(False)
        self.use.clicked.connect(self._on_use_clicked)
        if label_id is not None:
            line.addWidget(self.use)
        else:
            self.use.setParent(self)
            self.use.hide()
        self.add(line)

    def _on_use_clicked(self, checked: bool = False) -> None:
        assert self._label_id is not None
        self._services.library.feature_labels.use(self._label_id)
        self.use.setText("Used")
        self.use.setEnabled(False)


class _Connecting:
    """Keeps the key that was typed, then asks the server for its models."""

    def __init__(self, address: str, key: str) -> None:
        self._address, self._key = address, key

    def __call__(self) -> list[str]:
        from mistudio.jobs.describing import models_of, remember_key

        if self._key.strip():
            remember_key(self._address, self._key)
        return models_of(self._address)


def _numbers(features: Sequence[int]) -> str:
    shown = ", ".join(f"#{feature}" for feature in features[:10])
    return f"{shown} and {len(features) - 10} more" if len(features) > 10 else shown


# --- the Tools menu -------------------------------------------------------------------------------


def open_describe(page: FeaturesPage, features: list[int]) -> None:
    """Describe some features."""
    if page.presenter.run is not None and features:
        DescribeDialog(page._services, page.presenter, features, page).open()


def score_by_activations(page: FeaturesPage, features: list[int]) -> None:
    """Queue the embedding scorer for some features."""
    from mistudio.jobs.scoring import ScoreFeatures

    if page.presenter.run is None or not features:
        return
    if len(features) > MOST_FEATURES:
        page._services.toasts.error(
            "Too many features at a time",
            f"{len(features):,} are chosen; select at most {MOST_FEATURES:,} in the table.",
        )
        return
    page._services.jobs.submit(ScoreFeatures(page.presenter.run.id, features))
    page._services.toasts.info(
        f"Scoring {len(features):,} {'feature' if len(features) == 1 else 'features'}",
        "The scores appear with each feature's notes.",
    )


def open_blind(page: FeaturesPage, features: list[int]) -> None:
    """Test one feature blind: the first of those chosen."""
    from mistudio.ui.features.blind_test import BlindTestDialog

    if page.presenter.run is not None and features:
        BlindTestDialog(page._services, page.presenter, features[0], page).open()
