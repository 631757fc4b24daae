"""The blind test: five excerpts at a time, the feature active in four. Who finds the fifth has seen
what the feature is about; nothing else about it is shown."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from PySide6.QtCore import QSize, Qt
from PySide6.QtGui import QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QGridLayout,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QStackedWidget,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import explain
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import (
    Button,
    ErrorPanel,
    StatTile,
    Surface,
    Text,
    clear,
    column,
    picture,
    row,
    scrolling,
)

if TYPE_CHECKING:
    from mistudio.jobs.scoring import BlindResult, BlindTrial
    from mistudio.ui.features.presenter import FeaturesPresenter

WIDTH, HEIGHT = 920, 640
LEAST_HEIGHT = 72  # two lines of text
SEEDS = 2**31
RULES = (
    "You see five excerpts at a time. The feature is active somewhere in four of them, about "
    "equally strongly, and nowhere in the fifth.",
    "Choose the one that does not belong: with a click, or with the keys 1 to 5. Nothing tells you "
    "on the way whether you were right.",
    "Labels, descriptions and colours of the feature stay hidden. Whoever guesses finds one in "
    "five.",
)


class ExcerptButton(QPushButton):
    """An excerpt that can be chosen; its number is its key."""

    def __init__(self, number: int, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("variant", "secondary")
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.number = number
        self.setAccessibleName(f"Excerpt {number}")
        self.badge = Text(str(number), "label")
        self.badge.setFixedWidth(fonts.px(24))
        self.badge.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.words = Text("", "body", wrap=True)
        for label in (self.badge, self.words):
            label.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        inside = row(self.badge, self.words, spacing=12)
        inside.setStretch(1, 1)
        inside.setContentsMargins(12, 10, 16, 10)
        self.setLayout(inside)
        # All alike whatever their text: what is chosen from does not jump from trial to trial.
        self.setMinimumHeight(fonts.px(LEAST_HEIGHT))
        policy = QSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)

    def show_text(self, text: str) -> None:
        self.words.setText(f"… {text} …")
        self.setAccessibleName(f"Excerpt {self.number}: {text}")
        self.updateGeometry()

    def hasHeightForWidth(self) -> bool:
        return True

    def heightForWidth(self, width: int) -> int:
        return max(self.layout().heightForWidth(width), self.minimumHeight())

    def sizeHint(self) -> QSize:
        return self.layout().sizeHint()

    def minimumSizeHint(self) -> QSize:
        return QSize(200, self.layout().minimumSize().height())


class BlindTestDialog(QDialog):
    """A person's score of one feature. It is kept when the last trial is answered; a test that is
    closed before leaves everything as it was."""

    def __init__(
        self,
        services: Services,
        presenter: FeaturesPresenter,
        feature: int,
        parent: QWidget | None = None,
        seed: int | None = None,
    ) -> None:
        """`seed` decides which excerpts are shown, and in which order: another each time where it
        is None."""
        super().__init__(parent)
        self.setObjectName("blind_test_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle(f"Blind test of feature #{feature}")
        room = QApplication.primaryScreen().availableSize()
        self.resize(min(WIDTH, room.width() - 32), min(HEIGHT, room.height() - 48))
        assert presenter.choice is not None and presenter.run is not None
        self._services, self.feature = services, feature
        self._sae_id, self._run = presenter.choice.sae.id, presenter.run
        self._seed = secrets.randbelow(SEEDS) if seed is None else seed
        self.trials: list[BlindTrial] = []
        self.answers: list[int] = []
        self.found: BlindResult | None = None
        self._pages = QStackedWidget()
        self._pages.addWidget(self._make_rules())
        self._pages.addWidget(self._make_trial())
        self._pages.addWidget(self._make_result())
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 20, 24, 20)
        layout.setSpacing(16)
        layout.addWidget(Text(f"Blind test of feature #{feature}", "h1"))
        layout.addWidget(self._pages, 1)
        for number in range(1, 6):
            key = QShortcut(QKeySequence(str(number)), self)
            key.activated.connect(self.excerpts[number - 1].click)
        self._read()

    # --- its pages ------------------------------------------------------------------------------

    def _make_rules(self) -> QWidget:
        page = QWidget()
        body = column(16)
        card = Surface("row", None, 20)
        card.add(Text("Find the one that does not belong", "card"))
        for number, rule in enumerate(RULES, 1):
            figure = Text(f"{number}.", "body")
            figure.setFixedWidth(fonts.px(20))
            line = row(figure, Text(rule, "body", wrap=True), spacing=4)
            line.setStretch(1, 1)
            line.setAlignment(line.itemAt(0).widget(), Qt.AlignmentFlag.AlignTop)
            card.add(line)
        self.state = Text("Reading excerpts…", "helper", wrap=True)
        self._failure = column(8)
        self.start = Button("Start", "primary", "play")
        self.start.setEnabled(False)
        self.start.clicked.connect(self._on_start_clicked)
        close = Button("Cancel")
        close.setAutoDefault(False)
        close.clicked.connect(self.reject)
        body.addWidget(card)
        body.addWidget(self.state)
        body.addLayout(self._failure)
        body.addStretch(1)
        body.addLayout(row(None, close, self.start))
        page.setLayout(body)
        return page

    def _make_trial(self) -> QWidget:
        page = QWidget()
        body = column(10)
        self.count = Text("", "label")
        self._bar = QProgressBar()
        self._bar.setTextVisible(False)
        self._bar.setAccessibleName("Trials answered")
        question = Text("In which excerpt is the feature not active?", "card")
        body.addLayout(row(question, None, self.count))
        body.addWidget(self._bar)
        self.excerpts = [ExcerptButton(number) for number in range(1, 6)]
        inner = QWidget()
        stack = column(10)
        for excerpt in self.excerpts:
            excerpt.setAutoDefault(False)
            excerpt.clicked.connect(self._on_excerpt_clicked)
            stack.addWidget(excerpt, 1)
        inner.setLayout(stack)
        body.addWidget(scrolling(inner), 1)
        self.back = Button("Back", "secondary", "chevron-left")
        self.back.setToolTip("Answer the one before again (Backspace)")
        self.back.setAutoDefault(False)
        self.back.clicked.connect(self._on_back_clicked)
        key = QShortcut(QKeySequence(Qt.Key.Key_Backspace), self)
        key.activated.connect(self.back.click)
        hint = Text("Keys 1 to 5 choose.", "helper")
        stop = Button("Stop without a result")
        stop.setAutoDefault(False)
        stop.clicked.connect(self.reject)
        body.addLayout(row(self.back, hint, None, stop))
        page.setLayout(body)
        return page

    def _make_result(self) -> QWidget:
        page = QWidget()
        body = column(16)
        self.verdict = Text("", "body", wrap=True)
        self.tiles = {
            "right": StatTile("Intruders found", role="emerald"),
            "interval": StatTile("95 % interval", role="blue"),
            "chance": StatTile("By guessing", role="yellow"),
            "score": StatTile("Score", role="purple"),
        }
        line = row(*self.tiles.values(), spacing=12)
        for place in range(len(self.tiles)):
            line.setStretch(place, 1)
        self._rows = QGridLayout()
        self._rows.setHorizontalSpacing(24)
        self._rows.setVerticalSpacing(8)
        self._rows.setColumnStretch(3, 1)
        table = QWidget()
        inside = column(8)
        inside.addLayout(self._rows)
        inside.addStretch(1)
        table.setLayout(inside)
        self.again = Button("Again with other excerpts", "secondary", "rotate-ccw")
        self.again.setAutoDefault(False)
        self.again.clicked.connect(self._on_again_clicked)
        self.close_button = Button("Close", "primary")
        self.close_button.clicked.connect(self.accept)
        body.addWidget(self.verdict)
        body.addLayout(line)
        body.addWidget(scrolling(table), 1)
        body.addLayout(row(self.again, None, self.close_button))
        page.setLayout(body)
        return page

    # --- reading --------------------------------------------------------------------------------

    def _read(self) -> None:
        library, run, feature, seed = self._services.library, self._run, self.feature, self._seed

        def trials() -> list[BlindTrial]:
            from mistudio.jobs.scoring import blind_trials

            return blind_trials(library, run, feature, seed)

        self._services.background.run(trials, self._on_trials_read, self._on_failed)

    def _on_trials_read(self, trials: list[BlindTrial]) -> None:
        self.trials, self.answers = trials, []
        self._bar.setRange(0, len(trials))
        n = len(trials)
        minutes = max(1, round(n * 12 / 60))
        self.state.setText(
            f"{n} trials, about {minutes} {'minute' if minutes == 1 else 'minutes'}. The result is "
            "kept with the feature."
        )
        self.start.setEnabled(True)
        self.start.setDefault(True)
        self.start.setFocus(Qt.FocusReason.OtherFocusReason)

    def _on_failed(self, error: Exception) -> None:
        self.state.setText("")
        clear(self._failure)
        told = explain(error)
        self._failure.addWidget(
            ErrorPanel.of_error(told)
            if told
            else ErrorPanel("The excerpts cannot be read", f"{type(error).__name__}: {error}")
        )

    # --- the trials -----------------------------------------------------------------------------

    def _on_start_clicked(self, checked: bool = False) -> None:
        self._pages.setCurrentIndex(1)
        self._show_trial()

    def _show_trial(self) -> None:
        at = len(self.answers)
        self.count.setText(f"Trial {at + 1} of {len(self.trials)}")
        self._bar.setValue(at)
        self._bar.setAccessibleDescription(f"{at} of {len(self.trials)}")
        for excerpt, text in zip(self.excerpts, self.trials[at].texts, strict=True):
            excerpt.show_text(text)
        self.back.setEnabled(at > 0)
        # A ring around one of them would look like a hint.
        if (focused := self.focusWidget()) is not None:
            focused.clearFocus()

    def _on_excerpt_clicked(self, checked: bool = False) -> None:
        excerpt = self.sender()
        if self._pages.currentIndex() != 1 or not isinstance(excerpt, ExcerptButton):
            return
        self.answers.append(excerpt.number - 1)
        if len(self.answers) < len(self.trials):
            self._show_trial()
        else:
            self._finish()

    def _on_back_clicked(self, checked: bool = False) -> None:
        if self._pages.currentIndex() == 1 and self.answers:
            self.answers.pop()
            self._show_trial()

    # --- the result -----------------------------------------------------------------------------

    def _finish(self) -> None:
        from mistudio.jobs.scoring import keep_blind

        found = keep_blind(
            self._services.library,
            self._sae_id,
            self.feature,
            self.trials,
            self.answers,
            self._seed,
        )
        self.found = found
        told = (
            "More than guessing would find."
            if found.low > 0.2
            else "This could be guessing: the interval reaches down to one in five."
        )
        self.verdict.setText(
            f"You found {found.right} of {found.trials} intruders. {told} The result is kept with "
            "the feature."
        )
        exact = "Exact 95 % interval of the share of intruders found (Clopper and Pearson)"
        self.tiles["right"].set_value(f"{found.right} of {found.trials}", "guessing: 1 in 5")
        self.tiles["interval"].set_value(
            f"{formatting.number(found.low, 2)} to {formatting.number(found.high, 2)}",
            f"n = {found.trials}",
            exact,
        )
        chance = found.by_chance
        self.tiles["chance"].set_value(
            "< 0.1 %" if chance < 0.001 else formatting.percent(chance),
            "as many or more",
            "How probable as many or more are for somebody who guesses",
        )
        self.tiles["score"].set_value(
            formatting.number(found.score, 1),
            "0: chance, 1: all",
            "(share found - 0.2) / 0.8, never below 0",
        )
        self._show_answers()
        self._pages.setCurrentIndex(2)
        self.close_button.setDefault(True)
        self.close_button.setFocus(Qt.FocusReason.OtherFocusReason)

    def _show_answers(self) -> None:
        clear(self._rows)
        for place, title in enumerate(("Trial", "Strength of the four", "Your answer", "")):
            self._rows.addWidget(Text(title, "helper"), 0, place)
        pairs = zip(self.trials, self.answers, strict=True)
        for number, (trial, answer) in enumerate(pairs, 1):
            right = answer == trial.intruder
            mark = picture(
                "circle-check" if right else "x", tokens.EMERALD if right else tokens.RED, 18
            )
            said = f"{answer + 1}: right" if right else f"{answer + 1}: it was {trial.intruder + 1}"
            told = QWidget()
            told.setLayout(row(mark, Text(said, "small"), None, spacing=8))
            strength = f"tenth {trial.decile + 1} of 10"
            self._rows.addWidget(Text(str(number), "small"), number, 0)
            self._rows.addWidget(Text(strength, "small"), number, 1)
            self._rows.addWidget(told, number, 2)

    def _on_again_clicked(self, checked: bool = False) -> None:
        self._seed = secrets.randbelow(SEEDS)
        self.start.setEnabled(False)
        self.state.setText("Reading excerpts…")
        self._pages.setCurrentIndex(0)
        self._read()
