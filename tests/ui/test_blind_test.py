"""The blind test as a person takes it: nothing gives the intruder away, the result is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QLabel, QWidget

from mistudio.jobs.features import open_features
from mistudio.jobs.scoring import blind_trials
from mistudio.library.library import Library
from mistudio.ui.features.blind_test import BlindTestDialog
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot


@pytest.fixture
def opened(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> Iterator[Callable[[int], BlindTestDialog]]:
    services = services_of(trained_library)
    window = QWidget()
    qtbot.addWidget(window)
    presenter = FeaturesPresenter(services, window)
    presenter.choose(presenter.choices()[0])

    def open_(feature: int) -> BlindTestDialog:
        dialog = BlindTestDialog(services, presenter, feature, window, seed=4)
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose, False)
        dialog.show()
        done = lambda: dialog.trials or dialog._failure.count()  # noqa: E731
        qtbot.waitUntil(lambda: bool(done()))
        return dialog

    yield open_
    assert services.background.wait(30)


def frequent(library: Library) -> int:
    columns = open_features(library, library.feature_runs.all()[0])[0].columns
    return int(np.argmin(np.abs(np.asarray(columns["context_density"]) - 0.4)))


def all_words(dialog: QWidget) -> str:
    return " ".join(label.text() for label in dialog.findChildren(QLabel) if label.isVisible())


def test_a_blind_test_from_start_to_result(
    qtbot: Any, trained_library: Library, opened: Callable[[int], BlindTestDialog]
) -> None:
    library, feature = trained_library, frequent(trained_library)
    library.feature_labels.write_human(1, feature, "secret label")
    trials = blind_trials(library, library.feature_runs.all()[0], feature, 4)
    dialog = opened(feature)
    checks = (nameless, too_small, cut_off, squeezed)
    assert [check(dialog) for check in checks] == [[]] * 4
    shot(dialog, "blind-test-rules")
    assert dialog.trials == trials
    qtbot.keyClick(dialog.start, Qt.Key.Key_Return)
    for number, trial in enumerate(trials):
        assert dialog.count.text() == f"Trial {number + 1} of {len(trials)}"
        words = all_words(dialog)
        assert all(text in words for text in trial.texts)
        assert "secret label" not in words and "intruders" not in words
        if number == 0:
            shot(dialog, "blind-test-trial")
            assert [check(dialog) for check in checks] == [[]] * 4
            # A slip is taken back.
            qtbot.keyClick(dialog, str((trial.intruder + 1) % 5 + 1))
            qtbot.keyClick(dialog, Qt.Key.Key_Backspace)
            assert dialog.count.text().startswith("Trial 1 ")
        assert library.feature_scores.of_feature(1, feature) == []
        answer = trial.intruder if number else (trial.intruder + 1) % 5
        if number % 2:
            qtbot.mouseClick(dialog.excerpts[answer], Qt.MouseButton.LeftButton)
        else:
            qtbot.keyClick(dialog, str(answer + 1))
    (kept,) = library.feature_scores.of_feature(1, feature)
    assert kept.scorer == "human"
    assert kept.accuracy == (len(trials) - 1) / len(trials)
    assert [a["answer"] for a in kept.details["answers"]] == dialog.answers
    words = all_words(dialog)
    assert f"You found {len(trials) - 1} of {len(trials)} intruders." in words
    assert f"it was {trials[0].intruder + 1}" in words
    shot(dialog, "blind-test-result")
    assert [check(dialog) for check in checks] == [[]] * 4
    qtbot.mouseClick(dialog.again, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: dialog.trials != trials)
    assert library.feature_scores.of_feature(1, feature) == [kept]
    dialog.close()
    assert library.feature_scores.of_feature(1, feature) == [kept]


def test_a_feature_with_too_few_examples_is_told(
    trained_library: Library, opened: Callable[[int], BlindTestDialog]
) -> None:
    columns = open_features(trained_library, trained_library.feature_runs.all()[0])[0].columns
    dialog = opened(int(np.argmin(columns["n_contexts"])))
    assert "Too few examples for this test" in all_words(dialog)
    assert not dialog.start.isEnabled()
    dialog.close()
