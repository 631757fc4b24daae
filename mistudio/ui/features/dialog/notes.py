"""The Notes tab: what was said about the feature, by whom, and how well it fits."""

from __future__ import annotations

from PySide6.QtWidgets import QCheckBox, QPlainTextEdit, QWidget

from mistudio import formatting
from mistudio.library.features import FeatureLabel, FeatureScore
from mistudio.ui.features.dialog.tab import FeatureTab, scrolled
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Badge,
    Button,
    IconButton,
    Surface,
    Text,
    clear,
    column,
    debounced,
    row,
)

SOURCES = {
    "human": ("You", "emerald"),
    "rule": ("Rule", "blue"),
    "model": ("Model", "purple"),
    "imported": ("Imported", "yellow"),
}
SCORERS = {
    "embedding": "Embedding (weak evidence)",
    "model": "Local model",
    "human": "Blind human test",
}


class NotesTab(FeatureTab):
    def build(self) -> None:
        self._labels = column(8)
        self.note = QPlainTextEdit()
        self.note.setObjectName("feature_note")
        self.note.setAccessibleName("Note")
        self.note.setPlaceholderText("Add a note…")
        self.note.setTabChangesFocus(True)
        self.note.setFixedHeight(110)
        self._save = debounced(self, 500, self._write)
        self.note.textChanged.connect(self._on_note_changed)
        self._lists = column(4)
        self._scores = column(6)
        self.describe = Button("Describe with a local model…", "secondary", "brain")
        self.describe.clicked.connect(self._on_describe_clicked)
        self.blind = Button("Blind test…", "secondary", "eye")
        self.blind.setToolTip("See whether you can tell its examples from other text")
        self.blind.clicked.connect(self._on_blind_clicked)
        self._list_title = row(Text("Lists", "card"), None)
        left, right = column(14), column(14)
        left.addWidget(Text("Note", "card"))
        left.addWidget(self.note)
        left.addLayout(row(Text("Labels", "card"), None, self.describe))
        left.addLayout(self._labels)
        left.addStretch(1)
        right.addLayout(row(Text("Scores", "card"), None, self.blind))
        right.addLayout(self._scores)
        right.addLayout(self._list_title)
        right.addLayout(self._lists)
        right.addStretch(1)
        both = row(spacing=32)
        both.addLayout(left, 3)
        both.addLayout(right, 2)
        layout = column(0)
        layout.addWidget(scrolled(both))
        self.setLayout(layout)
        self._loading = False
        self.services.changes.changed.connect(self._on_changes_changed)
        self.dialog.described.connect(self._show_labels)

    def show_feature(self) -> None:
        self._loading = True
        note = self.dialog.note_of(self.feature)
        self.note.setPlainText(note.note if note else "")
        self._loading = False
        self._show_labels()
        self._show_lists()
        self._show_scores()

    def flush(self) -> None:
        if self._is_built:
            self._save.flush()

    # --- labels ---------------------------------------------------------------------------------

    def _show_labels(self) -> None:
        clear(self._labels)
        library = self.services.library
        note = self.dialog.note_of(self.feature)
        used = note.label if note else ""
        labels = library.feature_labels.of_feature(self.dialog.sae_id, self.feature)
        for label in labels:
            self._labels.addWidget(self._label_box(label, label.text == used))
        rule = self.dialog.description
        if rule and not any(label.text == rule for label in labels):
            self._labels.addWidget(self._rule_box(rule))
        elif not labels:
            self._labels.addWidget(
                Text("No labels yet. Type one above, or let a local model describe it.", "helper",
                     wrap=True)
            )  # fmt: skip

    def _label_box(self, label: FeatureLabel, used: bool) -> QWidget:
        box = Surface("row", None, 12)
        word, tone = SOURCES.get(label.source, (label.source.capitalize(), "slate"))
        use = Button("In use" if used else "Use", "small", "check" if used else None)
        use.setEnabled(not used)
        use.setAccessibleName(f"Use the label {label.text}")
        use.setProperty("label_id", label.id)
        use.clicked.connect(self._on_use_clicked)
        delete = IconButton("trash-2", f"Delete the label {label.text}", size=18)
        delete.setProperty("label_id", label.id)
        delete.clicked.connect(self._on_delete_clicked)
        text = Text(label.text, "body", wrap=True, selectable=True)
        head = row(text, use, delete, spacing=8)
        head.setStretch(0, 1)
        facts = [label.origin] if label.origin else []
        if label.score is not None:
            measure = label.details.get("measure", "score")
            bounds = _bounds(label.low, label.high)
            facts.append(f"{measure} {formatting.number(label.score, 2)}{bounds}")
        facts.append(clock_time(label.created_at))
        about = row(Badge(label.source, word, tone), Text(" • ".join(facts), "helper", wrap=True))
        about.setStretch(1, 1)
        box.add(head, about)
        return box

    def _rule_box(self, text: str) -> QWidget:
        """What the rule says, which is kept as a label only when somebody uses it."""
        box = Surface("row", None, 12)
        use = Button("Use", "small")
        use.setAccessibleName(f"Use the label {text}")
        use.clicked.connect(self._on_use_rule_clicked)
        head = row(Text(text, "body", wrap=True, selectable=True), use, spacing=8)
        head.setStretch(0, 1)
        accuracy = self.value("score_accuracy")
        told = "not scored"
        if accuracy is not None:
            bounds = _bounds(self.value("score_low"), self.value("score_high"))
            told = f"balanced accuracy {formatting.number(accuracy, 2)}{bounds}"
        word, tone = SOURCES["rule"]
        box.add(head, row(Badge("rule", word, tone), Text(told, "helper"), None))
        return box

    def _on_use_rule_clicked(self, checked: bool = False) -> None:
        labels = self.services.library.feature_labels
        number = labels.add(
            sae_id=self.dialog.sae_id,
            feature=self.feature,
            text=self.dialog.description,
            source="rule",
            score=self.value("score_accuracy"),
            low=self.value("score_low"),
            high=self.value("score_high"),
            details={"measure": "balanced accuracy"},
        )
        labels.use(number)

    def _on_use_clicked(self, checked: bool = False) -> None:
        self.services.library.feature_labels.use(int(self.sender().property("label_id")))

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.services.library.feature_labels.remove(int(self.sender().property("label_id")))
        self._show_labels()

    # --- note, lists, scores --------------------------------------------------------------------

    def _on_note_changed(self) -> None:
        if not self._loading:
            self._save()

    def _write(self) -> None:
        self.services.library.feature_notes.write(
            self.dialog.sae_id, self.feature, note=self.note.toPlainText().strip()
        )

    def _show_lists(self) -> None:
        clear(self._lists)
        lists = self.services.library.feature_lists
        mine = {one.id for one in lists.containing(self.dialog.sae_id, self.feature)}
        for one in lists.all():
            box = QCheckBox(one.name)
            box.setChecked(one.id in mine)
            box.setToolTip(one.description)
            box.setProperty("list_id", one.id)
            box.toggled.connect(self._on_list_toggled)
            self._lists.addWidget(box)
        if not lists.all():
            self._lists.addWidget(
                Text("No lists yet: “Add to list” above makes one.", "helper", wrap=True)
            )

    def _on_list_toggled(self, checked: bool) -> None:
        number = int(self.sender().property("list_id"))
        lists = self.services.library.feature_lists
        (lists.put if checked else lists.take)(number, self.dialog.sae_id, [self.feature])

    def _show_scores(self) -> None:
        clear(self._scores)
        accuracy = self.value("score_accuracy")
        tried = int(self.value("score_contexts") or 0)
        self._scores.addWidget(
            self._score_box(
                "Rule", accuracy, self.value("score_low"), self.value("score_high"),
                f"n = {formatting.count(tried)} contexts" if accuracy is not None else
                self.dialog.why_no_score(),
            )
        )  # fmt: skip
        found = self.services.library.feature_scores.of_feature(self.dialog.sae_id, self.feature)
        for score in found:
            self._scores.addWidget(self._other_score(score))
        self._scores.addWidget(
            Text(
                "Rule, embedding, model: balanced accuracy of telling contexts where it fires from "
                "others (chance 0.50). Blind test: share of odd ones out that you found. In "
                "brackets the 95 % interval.",
                "helper",
                wrap=True,
            )
        )

    def _other_score(self, score: FeatureScore) -> QWidget:
        details = score.details
        if "trials" in details:
            n = f"{details['right']} of {details['trials']} odd ones out found"
        else:
            n = f"n = {score.active} active + {score.inactive} inactive"
        parts = [n]
        if details.get("chance") is not None:
            parts.append(f"chance {formatting.number(details['chance'], 2)}")
        if details.get("null") is not None and details.get("nulls"):
            parts.append(f"other features' {formatting.number(details['null'], 2)}")
        parts += [str(details.get("model", "")), clock_time(score.created_at)]
        about = " • ".join(part for part in parts if part)
        name = SCORERS.get(score.scorer, score.scorer)
        return self._score_box(name, score.accuracy, score.low, score.high, about)

    def _score_box(
        self,
        name: str,
        accuracy: float | None,
        low: float | None,
        high: float | None,
        about: str,
    ) -> QWidget:
        box = Surface("row", None, 12)
        value = Text(formatting.number(accuracy, 2), "mono", "blue")
        bounds = Text(_bounds(low, high).strip(), "mono")
        box.add(row(Text(name, "label"), None, value, bounds), Text(about, "helper", wrap=True))
        return box

    # --- other windows --------------------------------------------------------------------------

    def _on_describe_clicked(self, checked: bool = False) -> None:
        from mistudio.ui.features.describing import DescribeDialog

        DescribeDialog(self.services, self.dialog.presenter, [self.feature], self.dialog).open()

    def _on_blind_clicked(self, checked: bool = False) -> None:
        from mistudio.ui.features.blind_test import BlindTestDialog

        BlindTestDialog(self.services, self.dialog.presenter, self.feature, self.dialog).open()

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if self.feature < 0:
            return
        if table in ("feature_notes", "feature_labels"):
            self._show_labels()
        elif table == "feature_lists":
            self._show_lists()
        elif table == "feature_scores":
            self._show_scores()


def _bounds(low: float | None, high: float | None) -> str:
    if low is None or high is None or low != low or high != high:
        return ""
    return f" ({formatting.number(low, 2)}–{formatting.number(high, 2)})"
