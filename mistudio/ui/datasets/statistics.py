"""The Statistics of a dataset: what its text and its tokens are like, each figure with its meaning.

Imports pyqtgraph: the dialog imports this module when the tab is first looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.jobs.statistics import AnalyseDataset, warnings_of
from mistudio.library.records import Tokenization
from mistudio.ui.datasets.charts import BarChart, ZipfChart
from mistudio.ui.datasets.detail import DatasetPresenter
from mistudio.ui.datasets.parts import count_or_dash
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    EmptyState,
    ErrorPanel,
    ProgressRow,
    StatTile,
    Surface,
    Text,
    clear,
    column,
    picture,
    row,
    tiles,
)

_LANGUAGES = 8
_CLASSES = 10
_LEAST = 0.0005  # a share that does not read 0.0 %
_BARS = 14


def definition(name: str) -> str:
    """What a figure means, its unit, and over how many documents it is counted."""
    from mistudio.engine.datasets.statistics import FIGURES, TOKEN_FIGURES

    figure = FIGURES.get(name) or TOKEN_FIGURES[name]
    return f"{figure.definition}\nUnit: {figure.unit}. Counted over {figure.sample}."


class StatisticsView(QWidget):
    """Counted once in the background, the first time that somebody looks."""

    def __init__(
        self, services: Services, presenter: DatasetPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._presenter = services, presenter
        self._job_id: int | None = None
        self._failed: dict[str, Any] = {}
        self.progress = ProgressRow("Looking at the text", tone="blue")
        self.cancel = Button("Cancel", "small", "x")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self._working = QWidget()
        working = row(self.progress, self.cancel)
        working.setStretch(0, 1)
        self._working.setLayout(working)
        self._which = Choice()
        self._which.setAccessibleName("Tokenization")
        self._which.currentIndexChanged.connect(self._on_which_changed)
        self._body = column(16)
        layout = column(16, 24)
        layout.addWidget(self._working)
        layout.addWidget(self._which)
        layout.addLayout(self._body)
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.dataset_changed.connect(self.refresh)
        presenter.tokenizations_changed.connect(self.refresh)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        running = presenter.analysing()
        if running is not None:
            self._job_id = running.id
        elif not presenter.dataset.statistics and not presenter.dataset.link:
            self.analyse()
        self.refresh()

    def analyse(self, again: bool = False) -> None:
        """Queue the job that counts."""
        if self._job_id is not None:
            return
        self._failed = {}
        try:
            job = AnalyseDataset(self._presenter.dataset.id, again)
            self._job_id = self._services.jobs.submit(job)
        except UserError as exc:
            self._services.toasts.error(exc)
        self._on_jobs_tick()

    def refresh(self) -> None:
        made = self._presenter.tokenizations()
        self._which.set_options(
            [(t.id, f"Tokens by {t.statistics.get('tokenizer', 'a tokenizer')}: "
              f"{formatting.count(t.tokens)} ({t.statistics.get('layout', 'packed')})")
             for t in made]
        )  # fmt: skip
        self._which.setVisible(len(made) > 1)
        self._working.setVisible(self._job_id is not None)
        self._show()

    def _show(self) -> None:
        clear(self._body)
        text = self._presenter.dataset.statistics
        chosen = next(
            (t for t in self._presenter.tokenizations() if t.id == self._which.value), None
        )
        found: Mapping[str, Any] = chosen.statistics if chosen else {}
        if self._failed:
            panel = ErrorPanel.of_row({**self._failed, "retryable": True})
            panel.retry.connect(self._on_retry)
            self._body.addWidget(panel)
        if not text and not chosen:
            self._show_nothing()
            return
        self._body.addLayout(tiles(self._tiles(text, found), 4))
        if text:
            self._show_warnings()
        if chosen:
            self._show_tokens(chosen)
        if text:
            self._show_text(text)
            self._show_again(text)
        elif self._job_id is None:
            self._show_nothing()

    def _show_nothing(self) -> None:
        if self._job_id is not None:
            return
        linked = bool(self._presenter.dataset.link)
        empty = EmptyState(
            "chart-line",
            "No statistics yet",
            "Count now",
            "The dataset is read where it lies, from beginning to end: this may take long."
            if linked
            else "The text is read once, in the background.",
        )
        empty.action.connect(self._on_retry)
        self._body.addWidget(empty)

    # --- what is shown --------------------------------------------------------------------------

    def _tiles(self, text: Mapping[str, Any], found: Mapping[str, Any]) -> list[QWidget]:
        documents = text.get("documents") or found.get("documents")
        how = "\n(Tokenize the dataset to know it.)" if not found else ""
        return [
            StatTile(
                "Total Samples", count_or_dash(documents), "emerald", definition("documents")
            ),
            StatTile(
                "Total Tokens", count_or_dash(found.get("tokens")), "blue",
                definition("tokens") + how,
            ),
            StatTile(
                "Avg Tokens/Sample", formatting.number(found.get("length_mean"), 1), "purple",
                "Tokens of all documents divided by their number." + how,
            ),
            StatTile(
                "Unique Tokens", count_or_dash(found.get("unique_tokens")), "yellow",
                definition("unique_tokens") + how,
                _covered(found.get("coverage")),
            ),
        ]  # fmt: skip

    def _show_warnings(self) -> None:
        said = warnings_of(self._services.library, self._presenter.dataset.id)
        card = Card("What to know before training")
        if not said:
            fine = Text("Nothing stands out in this text.", "body", "emerald")
            card.add(row(picture("circle-check", tokens.EMERALD, 20), fine, None))
        for warning in said:
            colour = tokens.RED if warning.serious else tokens.YELLOW
            note = Surface("note", "red" if warning.serious else "yellow", 14)
            note.setAccessibleName(f"{warning.title}. {warning.text}")
            texts = column(4)
            texts.addWidget(Text(warning.title, "label", wrap=True))
            texts.addWidget(Text(warning.text, "small", wrap=True, selectable=True))
            line = row(picture("triangle-alert", colour, 20), texts)
            line.setStretch(1, 1)
            note.add(line)
            card.add(note)
        self._body.addWidget(card)

    def _show_tokens(self, tokenization: Tokenization) -> None:
        found = tokenization.statistics
        edges, counts = found.get("length_edges"), found.get("length_histogram")
        if edges and counts:
            card = Card()
            card.add(
                BarChart(
                    "Sequence Length Distribution",
                    definition("length_median"),
                    list(zip(_buckets(edges), counts, strict=False)),
                    ("tokens", "documents"),
                ),
                Text(
                    f"Min: {count_or_dash(found.get('length_min'))} • "
                    f"Median: {count_or_dash(found.get('length_median'))} • "
                    f"Max: {count_or_dash(found.get('length_max'))} tokens",
                    "helper",
                ),
            )
            self._body.addWidget(card)
        if found.get("zipf"):
            card = Card()
            half, once = found.get("half_of_text"), found.get("once")
            card.add(
                ZipfChart("Token Frequency", definition("zipf"), found["zipf"]),
                Text(
                    f"{count_or_dash(half)} tokens make up half of the text • "
                    f"{count_or_dash(once)} occur once • "
                    f"{formatting.percent(found.get('coverage'))} of the vocabulary occurs",
                    "helper",
                    wrap=True,
                ),
            )
            self._body.addWidget(card)
        parts = found.get("split_tokens")
        if isinstance(parts, dict) and parts:
            names = {"train": "To learn from", "heldout": "To judge by"}
            named = {names[key]: int(parts[key]) for key in names if key in parts}
            named |= {str(key): int(n) for key, n in parts.items() if key not in names}
            card = Card("Learning and Judging")
            card.setToolTip(definition("split_tokens"))
            card.add(_share_tiles(named, "of the tokens"))
            self._body.addWidget(card)

    def _show_text(self, text: Mapping[str, Any]) -> None:
        lengths = text["lengths"]
        card = Card()
        card.add(
            BarChart(
                "Document Length",
                definition("lengths"),
                [(_range(low, high), number) for low, high, number in _fewer(lengths["bars"])],
                ("characters", "documents"),
            ),
            Text(
                f"Min: {formatting.count(lengths['min'])} • "
                f"Median: {formatting.count(lengths['median'])} • "
                f"95 % are below {formatting.count(lengths['p95'])} • "
                f"Max: {formatting.count(lengths['max'])} characters",
                "helper",
                wrap=True,
            ),
        )
        self._body.addWidget(card)
        self._body.addLayout(tiles([self._languages(text), self._classes(text)], 2))
        self._body.addWidget(self._duplicates(text))
        if text.get("splits"):
            card = Card("Split Distribution")
            card.setToolTip(definition("splits"))
            named = {name.capitalize(): number for name, number in text["splits"].items()}
            card.add(_share_tiles(named, "of total", text["documents"]))
            self._body.addWidget(card)

    def _languages(self, text: Mapping[str, Any]) -> Card:
        found = text["languages"]
        shares = [(_language(code), share) for code, share in found["shares"][:_LANGUAGES]]
        card = Card()
        card.add(
            BarChart(
                "Languages", definition("languages"), shares, ("language", "share of documents"),
                tokens.PURPLE, percent=True,
            ),
            Text(f"of {formatting.count(found['sample'])} sampled documents", "helper"),
        )  # fmt: skip
        card.body.addStretch(1)
        return card

    def _classes(self, text: Mapping[str, Any]) -> Card:
        classes = sorted(text["classes"], key=lambda entry: -entry[1])
        total = sum(number for _, number in classes) or 1
        card = Card()
        card.add(
            BarChart(
                "Kinds of Characters", definition("classes"),
                [
                    (name, number / total)
                    for name, number in classes[:_CLASSES]
                    if number / total >= _LEAST
                ],
                ("kind", "share of characters"), tokens.EMERALD, percent=True,
            ),
            Text(f"of {formatting.count(total)} characters", "helper"),
        )  # fmt: skip
        card.body.addStretch(1)
        return card

    def _duplicates(self, text: Mapping[str, Any]) -> Card:
        exact, near = text["duplicates"], text["near_duplicates"]
        documents = text["documents"] or 1
        card = Card("Duplicates")
        card.add(
            tiles(
                [
                    StatTile(
                        "Exact Copies", formatting.count(exact["copies"]), "yellow",
                        definition("duplicates"),
                        f"{formatting.percent(exact['copies'] / documents)} of all samples",
                    ),
                    StatTile(
                        "Near Copies", formatting.count(near["documents"]), "yellow",
                        definition("near_duplicates"),
                        f"of {formatting.count(near['sample'])} sampled",
                    ),
                    StatTile(
                        "Very Short", formatting.count(text["short_documents"]), "blue",
                        definition("short_documents"),
                        f"{formatting.percent(text['short_documents'] / documents)} of all samples",
                    ),
                ],
                3,
            )
        )  # fmt: skip
        for (number, _), beginning in zip(
            exact["largest"][:3], exact.get("texts", []), strict=False
        ):
            if beginning:
                short = " ".join(beginning.split())[:140]
                card.add(Text(f"{formatting.count(number)} times: {short}", "helper", wrap=True))
        return card

    def _show_again(self, text: Mapping[str, Any]) -> None:
        again = Button("Count again", "small", "refresh-cw")
        again.clicked.connect(self._on_again_clicked)
        again.setEnabled(self._job_id is None)
        said = (
            f"{formatting.count(text['documents'])} samples read in "
            f"{formatting.duration(text.get('seconds'))}. Rest the pointer on a figure for what it "
            "means and what it was counted over."
        )
        line = row(Text(said, "helper", wrap=True), again)
        line.setStretch(0, 1)
        self._body.addLayout(line)

    # --- the job --------------------------------------------------------------------------------

    def _on_jobs_tick(self) -> None:
        if self._job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self._job_id))

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self._job_id:
            return
        self._job_id = None
        if status == "failed":
            self._failed = self._services.library.jobs.get(job_id).error
        self.refresh()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if self._job_id is not None:
            self._services.jobs.cancel(self._job_id)

    def _on_retry(self) -> None:
        self.analyse()
        self.refresh()

    def _on_again_clicked(self, checked: bool = False) -> None:
        self.analyse(again=True)
        self.refresh()

    def _on_which_changed(self, index: int) -> None:
        self._show()


def _covered(coverage: float | None) -> str:
    return "" if coverage is None else f"{formatting.percent(coverage)} of the vocabulary"


def _buckets(edges: list[int]) -> list[str]:
    names = [f"{low:,}-{high:,}" for low, high in pairwise(edges)]
    return [*names, f"{edges[-1]:,}+"]


def _fewer(bars: list[list[int]]) -> list[list[int]]:
    """Without the empty ones at both ends, and joined in pairs until there are few enough."""
    full = [place for place, bar in enumerate(bars) if bar[2]]
    shown = bars[full[0] : full[-1] + 1] if full else []
    while len(shown) > _BARS:
        pairs = [shown[place : place + 2] for place in range(0, len(shown), 2)]
        shown = [[pair[0][0], pair[-1][1], sum(bar[2] for bar in pair)] for pair in pairs]
    return shown


def _range(low: int, high: int) -> str:
    """Lengths from `low` to below `high`."""
    if high - low == 1:
        return f"{low:,}"
    return f"{formatting.short_count(low)}-{formatting.short_count(high)}"


def _share_tiles(numbers: dict[str, int], of: str, total: int | None = None) -> Any:
    whole = total or sum(numbers.values()) or 1
    return tiles(
        [
            StatTile(
                name, formatting.count(number), "emerald",
                note=f"{formatting.percent(number / whole, 0)} {of}",
            )
            for name, number in numbers.items()
        ],
        3,
    )  # fmt: skip


# The languages that a dataset most often has, by name; others by their code.
_NAMES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian",
    "pt": "Portuguese", "nl": "Dutch", "pl": "Polish", "ru": "Russian", "uk": "Ukrainian",
    "cs": "Czech", "sv": "Swedish", "da": "Danish", "no": "Norwegian", "fi": "Finnish",
    "hu": "Hungarian", "ro": "Romanian", "el": "Greek", "tr": "Turkish", "ar": "Arabic",
    "fa": "Persian", "he": "Hebrew", "hi": "Hindi", "bn": "Bengali", "ta": "Tamil",
    "th": "Thai", "vi": "Vietnamese", "id": "Indonesian", "zh": "Chinese", "ja": "Japanese",
    "ko": "Korean", "la": "Latin", "eo": "Esperanto", "ca": "Catalan",
}  # fmt: skip


def _language(code: str) -> str:
    return _NAMES.get(code, code)
