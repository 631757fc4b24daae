"""Describing with a language model, as a person does it: a server of the test's own, and no
connection that was not asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QLabel, QWidget

from mistudio import credentials
from mistudio.jobs.features import open_features
from mistudio.library.library import Library
from mistudio.ui.features.describing import DescribeDialog, _Result
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services
from mistudio.ui.widgets import ConfirmDialog

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({"data": [{"id": "small"}, {"id": "large"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        judging = "Answer only 1" in body["messages"][0]["content"]
        n = len(self.server.asked)  # type: ignore[attr-defined]
        text = "1" if judging else json.dumps({"description": f"words about thing {n}"})
        self.answer({"choices": [{"message": {"content": text}}]})

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served() -> Any:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "keyring_for_secrets", lambda: None)


@pytest.fixture
def opened(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> Iterator[Callable[[list[int]], DescribeDialog]]:
    services = services_of(trained_library)
    window = QWidget()
    qtbot.addWidget(window)
    presenter = FeaturesPresenter(services, window)
    presenter.choose(presenter.choices()[0])

    def open_(features: list[int]) -> DescribeDialog:
        dialog = DescribeDialog(services, presenter, features, window)
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose, False)
        dialog.show()
        return dialog

    yield open_
    assert services.background.wait(30)


def frequent(library: Library, n: int) -> list[int]:
    columns = open_features(library, library.feature_runs.all()[0])[0].columns
    order = np.argsort(np.abs(np.asarray(columns["context_density"]) - 0.4), kind="stable")
    return [int(f) for f in order[:n]]


def all_words(dialog: QWidget) -> str:
    return " ".join(label.text() for label in dialog.findChildren(QLabel) if label.isVisible())


def fine(dialog: QWidget) -> bool:
    return [check(dialog) for check in (nameless, too_small, cut_off, squeezed)] == [[]] * 4


def test_a_server_describes_and_its_words_become_the_label(
    qtbot: Any,
    trained_library: Library,
    opened: Callable[[list[int]], DescribeDialog],
    served: Any,
) -> None:
    library, features = trained_library, frequent(trained_library, 2)
    dialog = opened(features)
    assert "less than a billion parameters" in all_words(dialog)
    assert dialog.job().model_id == library.models.all()[0].id
    assert fine(dialog)
    shot(dialog, "describe-own")
    dialog.who.set_value("server")
    assert not dialog.start.isEnabled()
    dialog.address.setText(served.address)
    dialog.key.setText("sk-12345678")
    assert served.asked == []
    qtbot.mouseClick(dialog.connect_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: dialog.server_model.count() == 2)
    assert dialog.key.text() == ""
    dialog.server_model.set_value("large")
    dialog.contexts.set_value(20)
    assert dialog.start.isEnabled() and fine(dialog)
    shot(dialog, "describe-server")
    qtbot.mouseClick(dialog.start, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: "2 of 2 described" in all_words(dialog))
    assert "2 of 2 scored" in all_words(dialog)
    assert set(served.asked) == {"Bearer sk-12345678"}
    assert fine(dialog)
    shot(dialog, "describe-results")
    first = dialog.findChildren(_Result)[0]
    qtbot.mouseClick(first.use, Qt.MouseButton.LeftButton)
    note = library.feature_notes.of_sae(1)[features[0]]
    assert note.label.startswith("words about thing")
    settings = dialog._services.settings
    assert settings.get("describer_address") == f"{served.address}/v1"
    assert settings.get("describer_model") == "large"
    assert "sk-12345678" not in settings.path.read_text(encoding="utf-8")
    again = opened(features)  # what was chosen is there, nobody was asked
    before = len(served.asked)
    assert (again.address.text(), again.server_model.value) == (f"{served.address}/v1", "large")
    assert len(served.asked) == before
    for one in (dialog, again):
        one.close()


def test_an_address_beyond_this_machine_is_agreed_to_each_time_it_changes(
    qtbot: Any,
    trained_library: Library,
    opened: Callable[[list[int]], DescribeDialog],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialog = opened(frequent(trained_library, 1))
    asked: list[str] = []
    monkeypatch.setattr(dialog, "_connect_to", asked.append)
    settings = dialog._services.settings
    dialog.who.set_value("server")

    def connect(address: str, agree: bool | None) -> None:
        """`agree` None: nothing is to be asked."""
        dialog.address.setText(address)
        qtbot.mouseClick(dialog.connect_button, Qt.MouseButton.LeftButton)
        found = [d for d in dialog.findChildren(ConfirmDialog) if d.isVisible()]
        assert len(found) == (0 if agree is None else 1)
        for question in found:
            assert "192.0.2" in all_words(question)
            button = question.action_button if agree else question.cancel_button
            qtbot.mouseClick(button, Qt.MouseButton.LeftButton)

    connect("http://192.0.2.7:80", False)
    assert asked == [] and settings.get("describer_confirmed") == ""
    connect("http://192.0.2.7:80", True)
    connect("http://192.0.2.7:80", None)  # the same: agreed to already
    assert asked == ["http://192.0.2.7:80/v1"] * 2
    connect("http://192.0.2.8:80", False)
    assert len(asked) == 2 and settings.get("describer_confirmed") == ""
    connect("http://192.0.2.7:80", True)  # agreed to once, and changed since
    connect("http://127.0.0.1:1", None)
    assert asked[2:] == ["http://192.0.2.7:80/v1", "http://127.0.0.1:1/v1"]
    assert settings.get("describer_confirmed") == ""
    dialog.close()


def test_what_goes_wrong_with_a_server_stands_at_its_address(
    qtbot: Any, trained_library: Library, opened: Callable[[list[int]], DescribeDialog], served: Any
) -> None:
    dialog = opened(frequent(trained_library, 1))
    dialog.who.set_value("server")
    dialog.address.setText("what is this")
    qtbot.mouseClick(dialog.connect_button, Qt.MouseButton.LeftButton)
    assert "cannot be read" in all_words(dialog)
    served.shutdown()
    served.server_close()
    dialog.address.setText(served.address)
    qtbot.mouseClick(dialog.connect_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: "does not answer" in all_words(dialog))
    assert dialog.connect_button.isEnabled() and not dialog.start.isEnabled()
    assert fine(dialog)
    dialog.close()


def test_too_many_features_are_told_before(
    trained_library: Library, opened: Callable[[list[int]], DescribeDialog]
) -> None:
    dialog = opened(list(range(256)) * 4)
    assert not dialog.start.isEnabled()
    assert "at most 1,000" in all_words(dialog)
    dialog.close()
