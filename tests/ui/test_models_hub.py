"""The card that adds models, against a Hub on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hub_server import HubServer
from PySide6.QtCore import Qt

from mistudio import credentials
from mistudio.engine.hub import access, session
from mistudio.library.library import Library
from mistudio.ui.models.add import AddCard
from mistudio.ui.models.architecture import ArchitectureDialog
from mistudio.ui.models.page import ModelsPage
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .conftest import TINY_MODEL
from .screens import shot

TOKEN = "hf_ada0123456789"
FILES = {file.name: file.read_bytes() for file in TINY_MODEL.iterdir() if file.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(access, "_provider", credentials.access_for)
    monkeypatch.setattr(credentials, "_typed", {})
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        card = {"license": "apache-2.0"}
        server.add("ada/tiny-lm", FILES, "model", card=card, downloads=12_345, likes=67)
        server.add("bob/tiny-lm-gated", FILES, "model", card=card, gated="auto")
        server.add("eve/tiny-lm-pickled", {"config.json": b"{}", "model.bin": b"x"}, "model")
        foreign = json.dumps({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "m.M"}})
        server.add("eve/own-lm", {**FILES, "config.json": foreign.encode()}, "model")
        server.accounts[TOKEN] = "ada"
        server.accepted.add(("ada", "bob/tiny-lm-gated"))
        yield server


@pytest.fixture
def page(
    qtbot: Any, hub: HubServer, library: Library, services_of: Callable[[Library], Services]
) -> ModelsPage:
    page = ModelsPage(services_of(library))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    return page


def click(qtbot: Any, button: Any) -> None:
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def problem(form: AddCard) -> str:
    item = form._problem.itemAt(0)
    return item.widget().accessibleName() if item else ""


def test_nothing_is_asked_before_the_user_asks(
    qtbot: Any, page: ModelsPage, hub: HubServer
) -> None:
    assert not page.form.add_button.isEnabled() and not page.form.search.isEnabled()
    qtbot.keyClicks(page.form.source, "tiny-lm")
    qtbot.wait(50)
    assert hub.requests == [] and page.form.search.isEnabled()


def test_a_model_is_found_planned_looked_into_and_downloaded(
    qtbot: Any, page: ModelsPage, library: Library, hub: HubServer
) -> None:
    form = page.form
    qtbot.keyClicks(form.source, "tiny-lm")
    click(qtbot, form.search)
    qtbot.waitUntil(lambda: form.results.isVisible())
    model = form.results.found
    cells = [[model.index(r, c).data() for c in range(6)] for r in range(model.rowCount())]
    assert cells[0][:3] == ["ada/tiny-lm", "12.3K", "67"]
    assert cells[0][4:] == ["Open", "apache-2.0"] and cells[1][4] == "Gated"
    shot(page, "models-results")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    qtbot.keyClick(form.results, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: form.plan_box.isVisible())
    assert form.source.text() == "ada/tiny-lm" and not form.results.isVisible()
    assert "857.2K parameters" in form.plan_title.text()
    assert "to download" in form.plan_facts.text()
    assert "stored as F16 • licence: apache-2.0" in form.plan_facts.text()
    fetched = sum(len(FILES["model.safetensors"]) for r in hub.ranges("model.safetensors") if not r)
    assert fetched == 0  # only pieces of the header
    click(qtbot, form.look)
    dialog = page.findChild(ArchitectureDialog)
    qtbot.waitUntil(lambda: dialog.ready)
    assert dialog.tiles["heads"].value == "4 (2 KV)"
    dialog.close()
    shot(page, "models-hub-plan")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    form.precision.set_value("q8")
    click(qtbot, form.add_button)
    assert form.source.text() == ""
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    added = library.models.all()[0]
    assert (added.source, added.origin, added.precision) == ("hub", "ada/tiny-lm", "q8")
    assert added.provenance["licence"] == "apache-2.0"


def test_a_gated_model_needs_the_token_of_the_form(
    qtbot: Any, page: ModelsPage, library: Library
) -> None:
    form = page.form
    form.source.setText("bob/tiny-lm-gated")
    qtbot.keyClick(form.source, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: "gated" in problem(form))
    assert library.jobs.count() == 0
    form.token_row.field.setText(TOKEN)
    click(qtbot, form.add_button)  # looks, sees that it fits, and downloads
    qtbot.waitUntil(lambda: library.models.count() == 1)
    assert form.token_row.text == "" and TOKEN not in json.dumps(page.save_state())
    assert all(TOKEN not in json.dumps(job.params) for job in library.jobs.all())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eve/tiny-lm-pickled", "only formats that can run code"),
        ("eve/own-lm", "m.py is not there"),
        ("eve/nothing", "eve/nothing"),
    ],
)
def test_what_cannot_be_used_is_refused_before_it_is_fetched(
    qtbot: Any, page: ModelsPage, library: Library, name: str, words: str
) -> None:
    page.form.source.setText(name)
    click(qtbot, page.form.add_button)
    qtbot.waitUntil(lambda: words in problem(page.form))
    assert library.jobs.count() == 0 and not page.form.plan_box.isVisible()
