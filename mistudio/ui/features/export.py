"""The dialog that exports features: which, as what, where to, how large it will be; then its
progress, and the way to what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PySide6.QtCore import QStandardPaths, Qt, QUrl
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import (
    QCheckBox,
    QDialog,
    QFileDialog,
    QGridLayout,
    QLayout,
    QLineEdit,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.jobs.feature_exports import (
    FORMATS,
    ExportFeatures,
    ExportWholeContexts,
    estimated_bytes,
    write_features,
)
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts
from mistudio.ui.widgets import (
    Button,
    Choice,
    ErrorPanel,
    FormRow,
    ProgressRow,
    Text,
    clear,
    column,
    debounced,
    row,
)

MANY_ON_A_PAGE = 300
WIDTH = 680
WHOLE = (
    "Without it, top examples have the activations that the discovery kept around their strongest "
    "token, and examples of the tenths that of their own token alone."
)


class ExportDialog(QDialog):
    """Of one SAE's features. It may be closed while its job runs: a message then tells the end."""

    def __init__(
        self,
        services: Services,
        sae_id: int,
        chosen: Sequence[int],
        shown: Sequence[int],
        n_features: int,
        parent: QWidget | None = None,
    ) -> None:
        """`chosen` are the features that the tool was opened for, `shown` those of the table."""
        super().__init__(parent)
        self._services, self._sae_id, self._n_features = services, sae_id, n_features
        self._job_id: int | None = None
        self._asked = 0
        self.path: Path | None = None
        self.setObjectName("export_features_dialog")
        self.setWindowTitle("Export features")
        self.setMinimumWidth(WIDTH)
        self._selections = self._choices(chosen, shown)
        self._make_fields()
        self._build()
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        self._on_format_changed()

    # --- what it is made of ---------------------------------------------------------------------

    def _choices(
        self, chosen: Sequence[int], shown: Sequence[int]
    ) -> list[tuple[str, list[int] | None]]:
        """(title, features; None: all)."""
        library = self._services.library
        found: list[tuple[str, list[int] | None]] = []
        if 0 < len(chosen) < len(shown):
            found.append(("Selected", list(chosen)))
        if 0 < len(shown) < self._n_features:
            found.append(("Shown in the table", list(shown)))
        notes = library.feature_notes.of_sae(self._sae_id).values()
        starred = [n.feature for n in notes if n.starred and n.feature < self._n_features]
        if starred:
            found.append(("Starred", starred))
        for one in sorted(library.feature_lists.all(), key=lambda entry: entry.name.casefold()):
            members = library.feature_lists.of_sae(one.id, self._sae_id)
            if members:
                found.append((f"List “{one.name}”", members))
        return [*found, ("All", None)]

    def _make_fields(self) -> None:
        self.which = Choice(
            [
                (str(place), f"{title} ({formatting.count(self._count(features))})")
                for place, (title, features) in enumerate(self._selections)
            ]
        )
        self.format = Choice([(name, format.title) for name, format in FORMATS.items()])
        self.whole = QCheckBox("Whole contexts (needs the model)")
        self.whole.setToolTip(
            "The model runs once more over the text of the examples, so that every token of their "
            "contexts has its activation"
        )
        self.title_text = QLineEdit()
        self.title_text.setPlaceholderText("Features")
        self.set_name = QLineEdit()
        self.set_name.setPlaceholderText("By the site and the width")
        self.set_name.setToolTip("Neuronpedia's name for a group of SAEs")
        self.suffix = QLineEdit()
        self.suffix.setPlaceholderText("None")
        self.suffix.setToolTip("Tells the SAEs of one set and layer apart, where there are several")
        self.creator = QLineEdit()
        self.creator.setPlaceholderText("Nobody")
        self.creator.setToolTip("Whom the release names")
        self.vectors = QCheckBox("With decoder directions, to steer by")
        self.target = QLineEdit()
        self.choose = Button("Choose…", "secondary", "folder-open")
        self.choose.setAccessibleName("Choose where to export to")
        self.which.currentIndexChanged.connect(self._on_changed)
        self.format.currentIndexChanged.connect(self._on_format_changed)
        for check in (self.whole, self.vectors):
            check.toggled.connect(self._on_changed)
        self.target.textChanged.connect(self._on_target_changed)
        self.choose.clicked.connect(self._on_choose_clicked)
        self._estimate_soon = debounced(self, 150, self._estimate)

    def _build(self) -> None:
        self._which_row = FormRow("Features", self.which)
        self._format_row = FormRow("Format", self.format, " ")
        self._whole_note = Text(WHOLE, "helper", wrap=True)
        self._title_row = FormRow("Title of the page", self.title_text)
        names = QGridLayout()
        names.setHorizontalSpacing(16)
        names.setVerticalSpacing(6)
        self._creator_label = Text("Creator", "label")
        labels = (Text("Source set", "label"), Text("Suffix", "label"), self._creator_label)
        fields = (self.set_name, self.suffix, self.creator)
        for place, (label, field, stretch) in enumerate(
            zip(labels, fields, (3, 2, 2), strict=True)
        ):
            label.setBuddy(field)
            field.setAccessibleName(label.text())
            names.addWidget(label, 0, place)
            names.addWidget(field, 1, place)
            names.setColumnStretch(place, stretch)
        self._neuronpedia = QWidget()
        inside = column(12)
        inside.addLayout(names)
        inside.addWidget(self.vectors)
        inside.addWidget(
            Text(
                "Correlated neurons and features are left empty: they would need all activations "
                "at once.",
                "helper",
                wrap=True,
            )
        )
        self._neuronpedia.setLayout(inside)
        # A layout inside of one whose lines wrap is given less than it needs.
        self._neuronpedia.setMinimumHeight(fonts.px(152))
        self._target_row = FormRow("Where to", self.target, beside=self.choose)
        self.estimate = Text("", "helper", wrap=True)
        self.warning = Text("", "helper", wrap=True)

        self.form = QWidget()
        form = column(12)
        first = row(self._which_row, self._format_row, spacing=16)
        for place in range(2):
            first.setStretch(place, 1)
        form.addLayout(first)
        for part in (
            self.whole,
            self._whole_note,
            self._title_row,
            self._neuronpedia,
            self._target_row,
            self.estimate,
            self.warning,
        ):
            form.addWidget(part)
        self.form.setLayout(form)

        self.progress = ProgressRow("Exporting")
        self.done_text = Text("", "body", wrap=True, selectable=True)
        self._failure = column(8)
        self.cancel = Button("Cancel", "secondary")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self.show_in_folder = Button("Show in folder", "secondary", "folder-open")
        self.show_in_folder.clicked.connect(self._on_show_clicked)
        self.export = Button("Export", "primary", "download")
        self.export.clicked.connect(self._on_export_clicked)
        self.export.setDefault(True)

        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(16)
        layout.addWidget(self.form)
        layout.addWidget(self.progress)
        layout.addWidget(self.done_text)
        layout.addLayout(self._failure)
        layout.addStretch(1)
        layout.addLayout(row(None, self.cancel, self.show_in_folder, self.export))
        self._show_state()

    # --- what is asked for ----------------------------------------------------------------------

    def _count(self, features: list[int] | None) -> int:
        return self._n_features if features is None else len(features)

    @property
    def features(self) -> list[int] | None:
        """Those that will be exported; None: all."""
        return self._selections[max(self.which.currentIndex(), 0)][1]

    def job(self) -> ExportFeatures:
        format = FORMATS[self.format.value]
        kind = ExportWholeContexts if format.contexts and self.whole.isChecked() else ExportFeatures
        features = self.features
        return kind(
            self._sae_id,
            self.target.text().strip(),
            self.format.value,
            "" if features is None else write_features(features),
            title_text=self.title_text.text().strip(),
            set_name=self.set_name.text().strip(),
            suffix=self.suffix.text().strip(),
            creator=self.creator.text().strip(),
            vectors=self.vectors.isChecked(),
        )

    def _suggested(self, suffix: str) -> Path:
        """A free place among the user's documents."""
        from mistudio.jobs.saes import sae_title

        place = QStandardPaths.StandardLocation.DocumentsLocation
        folder = Path(QStandardPaths.writableLocation(place) or Path.home())
        name = sae_title(self._services.library, self._services.library.saes.get(self._sae_id))
        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.")
        stem = f"{slug or f'sae-{self._sae_id}'}-features"
        path, number = folder / f"{stem}{suffix}", 2
        while path.exists():
            path = folder / f"{stem}-{number}{suffix}"
            number += 1
        return path

    # --- slots ----------------------------------------------------------------------------------

    def _on_format_changed(self, *_: object) -> None:
        format = FORMATS[self.format.value]
        self._format_row.set_helper(format.text)
        self.whole.setVisible(format.contexts)
        self._whole_note.setVisible(format.contexts)
        self._title_row.setVisible(self.format.value == "html")
        self._neuronpedia.setVisible(format.neuronpedia)
        for part in (self._creator_label, self.creator):
            part.setVisible(self.format.value == "neuronpedia_b")
        old = self.target.text().strip()
        self.target.setText(
            _stem(old) + format.suffix if old else str(self._suggested(format.suffix))
        )
        self._on_changed()

    def _on_changed(self, *_: object) -> None:
        self.estimate.setText("Size: …")
        n = self._count(self.features)
        many = self.format.value == "html" and n > MANY_ON_A_PAGE
        told = f"A page of {formatting.count(n)} features opens slowly; some hundreds are easy."
        self.warning.setText(told if many else "")
        self.warning.setVisible(many)
        self._fit()
        self._estimate_soon()

    def _on_target_changed(self, text: str) -> None:
        self._target_row.set_error("")
        self.export.setEnabled(bool(text.strip()))

    def _on_choose_clicked(self, checked: bool = False) -> None:
        format, start = FORMATS[self.format.value], self.target.text().strip()
        if format.suffix:
            kinds = f"{format.title} (*{format.suffix})"
            chosen, _ = QFileDialog.getSaveFileName(self, "Export features", start, kinds)
        else:
            folder = QFileDialog.getExistingDirectory(self, "Export features into a folder")
            chosen = str(Path(folder) / Path(start).name) if folder else ""
        if chosen:
            self.target.setText(_stem(chosen) + format.suffix)

    # --- its size -------------------------------------------------------------------------------

    def _estimate(self) -> None:
        self._asked += 1
        self._services.background.run(
            _Estimate(self._services.library, self.job(), self._asked), self._on_estimated
        )

    def _on_estimated(self, answer: tuple[int, int | str]) -> None:
        number, told = answer
        if number == self._asked:
            text = told if isinstance(told, str) else f"About {formatting.size(told)}, by a sample."
            self.estimate.setText(f"Size: {text}")

    # --- the job --------------------------------------------------------------------------------

    def _on_export_clicked(self, checked: bool = False) -> None:
        from mistudio.engine.features.exports.writing import check_target

        job = self.job()
        try:
            check_target(Path(job.target).expanduser(), not FORMATS[job.format].suffix)
            self._job_id = self._services.jobs.submit(job)
        except UserError as exc:
            self._target_row.set_error(f"{exc.what} {exc.next_step}".strip())
            self.target.setFocus(Qt.FocusReason.OtherFocusReason)
            return
        self._show_state()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        job = self._running()
        if job and self._job_id is not None:
            self._services.jobs.cancel(self._job_id)
        else:
            self.close()

    def _on_show_clicked(self, checked: bool = False) -> None:
        if self.path is not None:
            show_in_folder(self.path)

    def _running(self) -> bool:
        job = self._services.library.jobs.find(self._job_id) if self._job_id is not None else None
        return job is not None and job.active

    def _show_state(self) -> None:
        running = self._running()
        self.form.setVisible(not running and self.path is None)
        self.progress.setVisible(running)
        self.done_text.setVisible(self.path is not None)
        self.show_in_folder.setVisible(self.path is not None)
        self.export.setVisible(not running and self.path is None)
        self.cancel.setText("Cancel" if running or self.path is None else "Close")
        self._fit()

    def _fit(self) -> None:
        """As high as what it shows at its width: wrapped lines do not say so by themselves."""
        layout, width = self.layout(), max(self.width(), WIDTH)
        for part in self.findChildren(QWidget):  # what was hidden has no style's size yet
            part.ensurePolished()
        for inner in reversed(self.findChildren(QLayout)):  # the innermost first
            inner.invalidate()
        layout.activate()
        self.resize(width, max(layout.totalHeightForWidth(width), layout.minimumSize().height()))

    def _on_jobs_tick(self) -> None:
        if self._job_id is None or not self.isVisible():
            return
        snapshot = self._services.jobs.snapshot(self._job_id)
        if snapshot is not None:
            self.progress.show_snapshot(snapshot)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if job_id != self._job_id:
            return
        job = self._services.library.jobs.find(job_id)
        if job is None or job.active:
            return
        clear(self._failure)
        if job.status == "finished":
            self.path = Path(job.result["path"])
            self.done_text.setText(f"Written to {self.path}")
            if not self.isVisible():
                self._tell(self.path)
        elif job.status == "failed":
            self._failure.addWidget(ErrorPanel.of_row(job.error))
        self._job_id = None
        self._show_state()
        if not self.isVisible():
            self.deleteLater()

    def _tell(self, path: Path) -> None:
        def shown() -> None:
            show_in_folder(path)

        self._services.toasts.success(
            "The features are exported", str(path), ("Show in folder", shown)
        )

    def done(self, result: int) -> None:
        """Closed, by whatever: it stays until its job has ended."""
        super().done(result)
        if not self._running():
            self.deleteLater()


class _Estimate:
    """What a size costs to find out is done in a thread; it answers with the question's number."""

    def __init__(self, library: Library, job: ExportFeatures, number: int) -> None:
        self._library, self._job, self._number = library, job, number

    def __call__(self) -> tuple[int, int | str]:
        try:
            return self._number, estimated_bytes(self._library, self._job)
        except Exception as exc:
            found = explain(exc)
            told = (found.what or found.title) if found else f"{type(exc).__name__}: {exc}"
            return self._number, told


def _stem(path: str) -> str:
    """Without the ending of any format."""
    for format in FORMATS.values():
        if format.suffix:
            path = path.removesuffix(format.suffix)
    return path


def show_in_folder(path: Path) -> None:
    """Open the folder that holds it in the system's file manager."""
    QDesktopServices.openUrl(QUrl.fromLocalFile(str(path.parent)))


def open_export(page: Any, features: list[int]) -> ExportDialog | None:
    """What the Tools menu does."""
    presenter = page.presenter
    if presenter.run is None or presenter.sae_id is None:
        return None
    dialog = ExportDialog(
        page._services,
        presenter.sae_id,
        features,
        [int(feature) for feature in presenter.table.visible],
        presenter.run.n_features,
        page,
    )
    dialog.open()
    return dialog
