"""The card that downloads from the Hub, against a Hub on the loopback interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hub_server import HubServer
from PySide6.QtCore import Qt

from mistudio import credentials
from mistudio.engine.hub import access, session
from mistudio.library.library import Library
from mistudio.ui.datasets.page import DatasetsPage
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .screens import shot

TOKEN = "hf_ada0123456789"
ROWS = b"".join(b'{"text": "A sentence number %d of the set."}\n' % n for n in range(40))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(access, "_provider", credentials.access_for)
    monkeypatch.setattr(credentials, "_typed", {})
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        about = {"license": "mit"}
        server.add(
            "ada/stories", {"train.jsonl": ROWS, "test.jsonl": ROWS}, card=about,
            downloads=12_345, likes=67, description="Short stories.",
        )  # fmt: skip
        server.add("bob/stories-gated", {"train.jsonl": ROWS}, card=about, gated="auto")
        server.accounts[TOKEN] = "ada"
        server.accepted.add(("ada", "bob/stories-gated"))
        yield server


@pytest.fixture
def page(
    qtbot: Any, hub: HubServer, library: Library, services_of: Callable[[Library], Services]
) -> DatasetsPage:
    page = DatasetsPage(services_of(library))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    return page


def click(qtbot: Any, button: Any) -> None:
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def test_nothing_is_asked_before_the_user_asks(
    qtbot: Any, page: DatasetsPage, hub: HubServer
) -> None:
    assert not page.hub.download.isEnabled() and not page.hub.search.isEnabled()
    qtbot.keyClicks(page.hub.repository, "stories")
    assert page.hub.search.isEnabled() and not page.hub.download.isEnabled()
    qtbot.wait(50)
    assert hub.requests == []


def test_a_dataset_is_found_chosen_and_downloaded(
    qtbot: Any, page: DatasetsPage, library: Library
) -> None:
    card = page.hub
    qtbot.keyClicks(card.repository, "stories")
    click(qtbot, card.search)
    qtbot.waitUntil(lambda: card.results.isVisible())
    model = card.results.found
    cells = [[model.index(r, c).data() for c in range(6)] for r in range(model.rowCount())]
    assert [row[0] for row in cells] == ["ada/stories", "bob/stories-gated"]
    assert cells[0][1:3] == ["12.3K", "67"] and cells[0][4:] == ["Open", "mit"]
    assert cells[1][4] == "Gated"
    shot(page, "hub-results")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    qtbot.keyClick(card.results, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: "licence: mit" in card.said.text())
    assert card.repository.text() == "ada/stories" and not card.results.isVisible()
    assert "train" in card.said.text()
    assert card.split.completer().model().rowCount() == 2
    card.split.setText("train")  # typed letters would open a list that grabs the keyboard
    click(qtbot, card.download)
    assert card.repository.text() == "" and card.split.text() == ""
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    dataset = library.datasets.all()[0]
    assert (dataset.source, dataset.origin, dataset.documents) == ("hub", "ada/stories", 40)
    assert dataset.provenance["licence"] == "mit" and len(dataset.provenance["revision"]) == 40


def test_a_limit_and_a_link_are_asked_for(qtbot: Any, page: DatasetsPage, library: Library) -> None:
    card = page.hub
    card.repository.setText("ada/stories")
    card.limits.set_expanded(True)
    card.max_documents.setValue(7)
    click(qtbot, card.download)
    qtbot.waitUntil(lambda: library.datasets.count() == 1)
    assert library.datasets.all()[0].documents == 7
    card.repository.setText("ada/stories")
    card.store.set_value(False)
    click(qtbot, card.download)
    qtbot.waitUntil(lambda: library.datasets.count() == 2)
    assert library.datasets.all()[0].link["repository"] == "ada/stories"


def test_a_gated_dataset_says_where_to_accept_and_is_tried_again_with_a_token(
    qtbot: Any, page: DatasetsPage, library: Library, hub: HubServer
) -> None:
    card = page.hub
    card.repository.setText("bob/stories-gated")
    click(qtbot, card.download)
    qtbot.waitUntil(lambda: any(c.panel for c in page._adding.values()))
    adding = next(iter(page._adding.values()))
    assert adding.panel is not None
    assert "bob/stories-gated" in adding.panel.accessibleName()
    card.repository.setText("bob/stories-gated")
    card.token.setText(TOKEN)
    click(qtbot, card.download)
    qtbot.waitUntil(lambda: library.datasets.count() == 1)
    assert card.token.text() == ""


def test_the_token_is_in_no_row_and_no_state(
    qtbot: Any, page: DatasetsPage, library: Library
) -> None:
    card = page.hub
    card.repository.setText("bob/stories-gated")
    card.token.setText(TOKEN)
    assert card.token.echoMode() == card.token.EchoMode.Password
    assert TOKEN not in str(page.save_state())
    click(qtbot, card.download)
    qtbot.waitUntil(lambda: library.datasets.count() == 1)
    for row in library.rows("SELECT * FROM jobs") + library.rows("SELECT * FROM datasets"):
        assert TOKEN not in str(tuple(row))


def test_what_is_no_token_is_said_at_its_field(
    qtbot: Any, page: DatasetsPage, library: Library
) -> None:
    page.hub.repository.setText("ada/stories")
    page.hub.token.setText("no")
    click(qtbot, page.hub.download)
    assert "no access token" in page.hub._token_row.error.text()
    assert library.jobs.count() == 0 and page.hub.repository.text() == "ada/stories"


def test_no_match_and_offline_are_said(
    qtbot: Any, page: DatasetsPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = page.hub
    card.repository.setText("nothing-has-this-name")
    click(qtbot, card.search)
    qtbot.waitUntil(lambda: "No dataset" in card.said.text())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    click(qtbot, card.search)
    qtbot.waitUntil(lambda: card._problem.count() == 1)
    panel = card._problem.itemAt(0).widget()
    assert "Offline" in panel.accessibleName()
    shot(page, "hub-offline")


def test_the_text_column_can_be_given(
    qtbot: Any, page: DatasetsPage, library: Library, hub: HubServer
) -> None:
    rows = b'{"text": "one", "story": "Once upon a time"}\n{"text": "two"}\n'
    hub.add("ada/two-columns", {"train.jsonl": rows})
    page.hub.repository.setText("ada/two-columns")
    page.hub.limits.set_expanded(True)
    page.hub.text_column.setText("story")
    page.hub.bad_rows.set_value(True)
    shot(page, "hub-limits")
    assert nameless(page) == [] and cut_off(page) == []
    click(qtbot, page.hub.download)
    qtbot.waitUntil(lambda: library.datasets.count() == 1)
    dataset = library.datasets.all()[0]
    assert (dataset.documents, dataset.characters) == (1, len("Once upon a time"))
    assert dataset.provenance["skipped_rows"] == 1 and page.hub.text_column.text() == ""


def test_the_form_comes_back(page: DatasetsPage) -> None:
    page.hub.repository.setText("ada/stories")
    page.hub.max_documents.setValue(500)
    state = page.save_state()
    page.hub._clear_fields()
    page.restore_state(state)
    assert page.hub.repository.text() == "ada/stories" and page.hub.max_documents.value() == 500
    page.restore_state({"hub": None})
    page.restore_state({"hub": {"max_documents": "many"}})
