"""Search by example: which features fire on a text that was typed, on which of its tokens, and in
which order they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PySide6.QtCore import Signal
from PySide6.QtWidgets import QLineEdit

from mistudio import formatting
from mistudio.errors import explain
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.reader import Columns
from mistudio.ui.features.shown import SUBSET, Shown
from mistudio.ui.features.table import Subset
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Choice,
    IconButton,
    Surface,
    Text,
    TokenStrip,
    row,
)

if TYPE_CHECKING:
    from mistudio.jobs.probing import Probe


@dataclass(frozen=True)
class Rank:
    """One order of the features that fire. `percent`: its numbers are shares."""

    name: str
    title: str
    column: str
    definition: str
    percent: bool = False


RANKS = (
    Rank(
        "relative",
        "Relative to own maximum",
        "Of own maximum",
        "Strongest activation on the text divided by the feature's maximum in the discovery: "
        "max a / max a_discovery. A feature that never fired there counts as 1.",
        percent=True,
    ),
    Rank(
        "strongest",
        "Strongest activation",
        "On this text",
        "Strongest activation on the text: max a.",
    ),
    Rank(
        "rare",
        "Relative × rarity",
        "Relative × rarity",
        "Strongest activation divided by the feature's maximum in the discovery, times the rarity "
        "of the feature: (max a / max a_discovery) × −log10(density). Features that fire often "
        "everywhere come later. A density of 0 counts as one token of the discovery.",
    ),
)


def strengths(probe: Probe, n: int, token: int = -1) -> np.ndarray:
    """float32 [n_features]: each feature's strongest activation on the text, or its activation on
    one token; 0 where it does not fire."""
    chosen = slice(None) if token < 0 else probe.tokens == token
    found = np.zeros(n, np.float32)
    features = probe.features[chosen]
    inside = features < n
    np.maximum.at(found, features[inside], probe.values[chosen][inside])
    return found


def ranking(found: np.ndarray, columns: Columns, rank: str) -> np.ndarray:
    """float32 [n_features]: what features are ranked by; NaN for those that do not fire."""
    if rank == "strongest":
        values = found.astype(np.float32)
    else:
        values = relative(found, columns)
        if rank == "rare":
            density = np.maximum(columns.values["density"], 1 / max(columns.meta.tokens, 1))
            values = values * -np.log10(density)
    return np.where(found > 0, values, np.float32("nan")).astype(np.float32)


def relative(found: np.ndarray, columns: Columns) -> np.ndarray:
    """float32: as shares of each feature's own maximum."""
    most = columns.values["max_activation"].astype(np.float32)
    return np.where(most > 0, found / np.where(most > 0, most, 1), (found > 0).astype(np.float32))


def subset_of(probe: Probe, columns: Columns, rank: Rank, token: int = -1) -> Subset:
    """The features that fire, in the order of the rank, as the table shows them."""
    values = ranking(strengths(probe, len(columns), token), columns, rank.name)
    features = np.flatnonzero(~np.isnan(values))
    order = features[np.argsort(-values[features], kind="stable")].astype(np.int32)
    what = "this text" if token < 0 else f"“{probe.pieces[token].strip() or '␣'}”"
    return Subset(
        order,
        f"Fires on {what}",
        ranked=True,
        values=values,
        column=Shown(
            SUBSET,
            rank.column,
            "",
            rank.definition,
            percent=rank.percent,
            tone="blue",
            width=160,
            sortable=False,
            ranged=False,
        ),
    )


def heat_of(probe: Probe, columns: Columns, feature: int = -1) -> np.ndarray:
    """float32 [tokens], 0 to 1: one feature's activation as a share of its maximum, or the largest
    such share of all features."""
    most = columns.values["max_activation"].astype(np.float32)
    inside = probe.features < len(most)
    if feature >= 0:
        inside &= probe.features == feature
    features, values = probe.features[inside], probe.values[inside]
    own = most[features]
    shares = np.where(own > 0, values / np.where(own > 0, own, 1), 1)
    found = np.zeros(len(probe.pieces), np.float32)
    np.maximum.at(found, probe.tokens[inside], np.minimum(shares, 1).astype(np.float32))
    return found


class TextSearch(Surface):
    """Type a text, see which features fire on it. `subset_wanted` brings what is to be shown."""

    subset_wanted = Signal(object)
    closed = Signal()

    def __init__(self, services: Services, presenter: FeaturesPresenter) -> None:
        super().__init__("row", None, 12)
        self._services, self._presenter = services, presenter
        self.probe: Probe | None = None
        self.token = -1
        self._feature = -1
        self._asked: tuple[int, str] | None = None
        self.text = QLineEdit()
        self.text.setPlaceholderText("Which features fire on this text?")
        self.text.setAccessibleName("Text to find features for")
        self.text.setMaxLength(20_000)
        self.text.returnPressed.connect(self.find)
        self.find_button = Button("Find features", "secondary", "zap", "Enter in the text")
        self.find_button.clicked.connect(self._on_find_clicked)
        self.rank = Choice([(rank.name, rank.title) for rank in RANKS])
        self.rank.setAccessibleName("Order of the features that fire")
        self.rank.setMinimumContentsLength(18)
        self.rank.currentIndexChanged.connect(self._on_rank_changed)
        close = IconButton("x", "Close the search by text")
        close.clicked.connect(self._on_close_clicked)
        line = row(self.text, self.find_button, self.rank, close, spacing=10)
        line.setStretch(0, 1)
        self.strip = TokenStrip(tokens.LIST_ROW, services.settings.get("token_colours"), chips=True)
        self.strip.token_activated.connect(self._on_token_activated)
        self.strip.hide()
        self.said = Text("", "helper", wrap=True)
        self.said.hide()
        self.problem = Text("", "error", wrap=True)
        self.problem.hide()
        self.add(line, self.strip, self.said, self.problem)
        self._on_rank_changed()

    # --- finding --------------------------------------------------------------------------------

    def find(self) -> None:
        """Run the text through the model and the SAE, in the background."""
        sae_id, text = self._presenter.sae_id, self.text.text()
        if sae_id is None or self._presenter.reader is None or not text.strip():
            return
        library = self._services.library
        self._asked = (sae_id, text)
        self.problem.hide()
        self.said.setText("Running the text through the model…")
        self.said.show()
        self.find_button.setEnabled(False)
        self._services.background.run(
            lambda: (sae_id, text, _probe(library, sae_id, text)),
            self._on_probed,
            self._on_probe_failed,
        )

    def _on_probed(self, answer: tuple[int, str, Probe]) -> None:
        sae_id, text, probe = answer
        self.find_button.setEnabled(True)
        columns = self._presenter.table.columns
        if (sae_id, text) != self._asked or sae_id != self._presenter.sae_id or columns is None:
            return
        self.probe, self.token, self._feature = probe, -1, -1
        self._show_tokens()
        self._show_subset()

    def _on_probe_failed(self, error: Exception) -> None:
        self.find_button.setEnabled(True)
        self.said.hide()
        known = explain(error)
        said = f"{known.title}. {known.what} {known.next_step}" if known else f"{error}"
        self.problem.setText(said.strip())
        self.problem.show()

    def forget(self) -> None:
        """What was found belongs to another SAE."""
        self.probe, self._asked, self.token, self._feature = None, None, -1, -1
        self.find_button.setEnabled(True)
        for part in (self.strip, self.said, self.problem):
            part.hide()

    # --- showing --------------------------------------------------------------------------------

    def show_feature(self, feature: int) -> None:
        """The heat of one feature; -1 for the strongest of all."""
        if self.probe is not None and feature != self._feature:
            self._feature = feature
            self._show_tokens()

    def _show_tokens(self) -> None:
        columns, probe = self._presenter.table.columns, self.probe
        if columns is None or probe is None:
            return
        heat = heat_of(probe, columns, self._feature)
        # The first stands for no text: a token that texts begin with.
        self.strip.set_tokens(probe.pieces[1:], heat[1:].tolist(), 1.0, probe.ids[1:])
        self.strip.show()

    def _show_subset(self) -> None:
        columns, probe = self._presenter.table.columns, self.probe
        if columns is None or probe is None:
            return
        subset = subset_of(probe, columns, self._rank(), self.token)
        counted = int(probe.counted[1:].sum())
        left_out = len(probe.pieces) - 1 - counted
        said = (
            f"{formatting.count(len(subset.features))} features fire on {counted} tokens"
            if self.token < 0
            else f"{formatting.count(len(subset.features))} features fire on this token"
        )
        if left_out:
            said += f"; {left_out} do not count (special, or of an outlying norm)"
        hint = (
            "Click a token for the features on it."
            if self.token < 0
            else "Click it again for the whole text."
        )
        heat = "the selected feature" if self._feature >= 0 else "the strongest feature"
        self.said.setText(f"{said}. {hint} Colour: {heat}, as a share of its own maximum.")
        self.said.show()
        self.subset_wanted.emit(subset)

    def _rank(self) -> Rank:
        return next(rank for rank in RANKS if rank.name == self.rank.value)

    def _on_token_activated(self, index: int) -> None:
        self.token = -1 if index + 1 == self.token else index + 1
        self._feature = -1
        self._show_tokens()
        self._show_subset()

    def _on_rank_changed(self, *_: object) -> None:
        self.rank.setToolTip(self._rank().definition)
        if self.probe is not None:
            self._show_subset()

    def _on_find_clicked(self, checked: bool = False) -> None:
        self.find()

    def _on_close_clicked(self, checked: bool = False) -> None:
        self.closed.emit()


def _probe(library: Any, sae_id: int, text: str) -> Probe:
    from mistudio.jobs.probing import probe

    return probe(library, sae_id, text)
