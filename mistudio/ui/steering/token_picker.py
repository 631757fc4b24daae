"""Choosing the tokens of the prompt at which steering acts."""

from __future__ import annotations

from collections.abc import Collection

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QWidget

from mistudio.errors import UserError
from mistudio.ui.steering.prompt_tokens import PromptTokens
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Text, TokenStrip, column
from mistudio.ui.widgets.token_strip import shown

_NEVER = "The first token and special tokens are never steered."


class _Strip(TokenStrip):
    """Chosen tokens are filled and underlined."""

    never: Collection[int] = ()

    def mark(self, chosen: Collection[int]) -> None:
        self._activations = [float(place in chosen) for place in range(len(self._tokens))]
        self._maximum = 1.0
        self.update()

    def describe(self, index: int) -> str:
        state = "chosen" if self._activations[index] else "not chosen"
        if index in self.never:
            state = "never steered: the first token and special ones are left alone"
        return f"Token {index + 1}: {shown(self._tokens[index])!r}, {state}"


class TokenPicker(QWidget):
    """Click a token, or walk with the arrows and press Space. `changed` after every choice."""

    changed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._tokens = PromptTokens("", False, 0)
        self._chosen: set[int] = set()
        self.strip = _Strip(tokens.CARD, chips=True)
        self.strip.token_activated.connect(self.toggle)
        self.note = Text("", "helper", wrap=True)
        layout = column(6)
        layout.addWidget(Text("Prompt tokens to steer", "label"))
        layout.addWidget(self.strip)
        layout.addWidget(self.note)
        self.setLayout(layout)
        self.show_tokens(self._tokens)

    @property
    def read(self) -> PromptTokens:
        """The tokens that are shown."""
        return self._tokens

    @property
    def positions(self) -> tuple[int, ...]:
        """Chosen positions of the prompt; of one that is still read, those that were chosen."""
        return tuple(sorted(self._chosen))

    def set_positions(self, positions: Collection[int]) -> None:
        self._chosen = set(positions)
        self._show()

    def show_tokens(self, read: PromptTokens) -> None:
        """Take a prompt's tokens; choices stay while the tokens up to them are the same."""
        before, self._tokens = self._tokens, read
        if before.ids and read.ids:
            same = 0
            while same < min(len(before.ids), len(read.ids)) and (
                before.ids[same] == read.ids[same]
            ):
                same += 1
            self._chosen = {place for place in self._chosen if place < same}
        if read.ids:
            usable = set(range(len(read.ids))) - read.special
            self._chosen &= usable
        self.strip.never = read.special
        self.strip.set_tokens(read.texts)
        self._show()
        self.changed.emit()

    def show_problem(self, problem: UserError) -> None:
        self.note.setText(" ".join(part for part in (problem.title, problem.what) if part))

    def toggle(self, place: int) -> None:
        if place in self._tokens.special:
            self.note.setText(_NEVER)
            return
        self._chosen ^= {place}
        self._show()
        self.changed.emit()

    def _show(self) -> None:
        self.strip.mark(self._chosen)
        self.strip.setVisible(bool(self._tokens.texts))
        if not self._tokens.texts:
            self.note.setText("Enter a prompt to see its tokens.")
        else:
            count = len(self._chosen)
            self.note.setText(
                f"{count} of {len(self._tokens.texts)} chosen. Click a token, or use the arrow "
                f"keys and Space. {_NEVER}"
            )
