"""SAEs of others come in by the Training tab's dialog and stand in its list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from PySide6.QtCore import QMimeData, QPoint, Qt, QUrl
from PySide6.QtGui import QDropEvent
from safetensors.torch import save_file

from mistudio import credentials
from mistudio.engine.hub import access, session
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import load_sae, save_sae
from mistudio.engine.sae.site import Site
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddDataset, AddModel
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.training.import_saes import ImportDialog
from mistudio.ui.training.page import TrainingPage

from .checks import cut_off, nameless, too_small
from .conftest import SAMPLE_TEXT, TINY_MODEL
from .screens import shot

D, M = 128, 64
POINT = "blocks.1.hook_resid_post"
TOKEN = "hf_ada0123456789"


def a_folder(folder: Path, d: int = D, layer: int = 1, model: str = "tiny-llama-0.9m") -> Path:
    generator = torch.Generator().manual_seed(d + layer)
    encoder, decoder = (torch.randn(M, d, generator=generator) for _ in range(2))
    dictionary = Dictionary(encoder, torch.zeros(M), decoder, torch.zeros(d), TopK(4))
    site = Site.at(HookPoint("resid_post", layer))
    save_sae(dictionary, folder, site=site, model_name=model, unit_decoder=False)
    (folder / "mistudio.json").unlink()
    return folder


def a_state(path: Path) -> Path:
    """A dictionary_learning file without its config: it does not say where it belongs."""
    torch.save({"encoder.weight": torch.randn(M, D), "encoder.bias": torch.zeros(M),
                "decoder.weight": torch.randn(D, M), "bias": torch.zeros(D)}, path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the tiny model and some text; copied for each test."""
    folder = tmp_path_factory.mktemp("shelf")
    text = folder / "intros.jsonl"
    lines = SAMPLE_TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:120]), encoding="utf-8")
    made = Library(folder / "library")
    for job in (AddModel(str(TINY_MODEL), "fp32"), AddDataset(str(text))):
        record = run_job(made, job, submit(made, job))
        assert record.status == "finished", record.error
    made.close()
    return folder / "library"


@pytest.fixture
def stocked(shelf: Path, tmp_path: Path) -> Iterator[Library]:
    import shutil

    shutil.copytree(shelf, tmp_path / "stocked")
    opened = Library(tmp_path / "stocked")
    yield opened
    opened.close()


@pytest.fixture
def page(qtbot: Any, stocked: Library, services_of: Callable[[Library], Services]) -> TrainingPage:
    page = TrainingPage(services_of(stocked))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    return page


def open_dialog(qtbot: Any, page: TrainingPage) -> ImportDialog:
    click(qtbot, page.import_saes)
    return page.findChild(ImportDialog)


def click(qtbot: Any, button: Any) -> None:
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def seen(qtbot: Any, dialog: ImportDialog) -> None:
    qtbot.waitUntil(lambda: bool(dialog.seen))


def problem(dialog: ImportDialog) -> str:
    item = dialog._problem.itemAt(0)
    return item.widget().accessibleName() if item else ""


def cells(dialog: ImportDialog, line: int = 0) -> dict[str, str]:
    table = dialog.found.lines.table
    return dict(zip(table.columns, table.lines[line].cells, strict=True))


def arrived(qtbot: Any, page: TrainingPage, number: int = 1) -> None:
    qtbot.waitUntil(lambda: len(page.imported_cards()) == number)


# --- from this computer -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1240, 660), (1880, 990)])
def test_a_folder_is_seen_then_imported_and_stands_in_the_list(
    qtbot: Any, page: TrainingPage, stocked: Library, tmp_path: Path, answer_dialogs: Any,
    size: tuple[int, int],
) -> None:  # fmt: skip
    source = a_folder(tmp_path / "theirs")
    dialog = open_dialog(qtbot, page)
    dialog.resize(*size)
    assert not dialog.accept_button.isEnabled() and not dialog.found.isVisible()
    shot(dialog, f"import-empty-{size[0]}")
    answer_dialogs("QFileDialog.getExistingDirectory", str(source))
    click(qtbot, dialog.browse)
    seen(qtbot, dialog)
    told = cells(dialog)
    assert told["Format"] == "SAELens" and told["Reads"] == "128 channels"
    assert told["Latents"] == "64" and told["Activation"] == "topk, k 4"
    assert told["Where it belongs"] == "Layer 1 • Residual stream after block"
    assert "Problem" not in told and told["Model it names"] == "tiny-llama-0.9m"
    assert dialog.site.currentText() == "As the files say"
    assert dialog.model.currentText() == "tiny-llama-0.9m"
    assert not dialog.site.isEnabled() and not dialog.layer.isEnabled()
    shot(dialog, f"import-seen-{size[0]}")
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    assert stocked.saes.imported() == []  # nothing before Import is pressed
    qtbot.keyClicks(dialog.name, "Mine")
    click(qtbot, dialog.accept_button)
    arrived(qtbot, page)
    (card,) = page.imported_cards()
    assert card.badge.text() == "Imported" and card.imported.sae.name == "Mine"
    assert all(tile.value == "—" for tile in card.tiles.values())
    assert "Not measured yet" in card._measured.text()
    page.activate(sae_id=card.imported.sae.id)
    shot(page, f"import-card-{size[0]}")
    assert nameless(page) == [] and too_small(page) == []


def test_several_in_a_folder_come_all_or_none(
    qtbot: Any, page: TrainingPage, tmp_path: Path
) -> None:
    for layer in (0, 2):
        a_folder(tmp_path / "run" / f"layer_{layer}", layer=layer)
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(tmp_path / "run"))
    seen(qtbot, dialog)
    assert dialog.accept_button.text() == "Import 2 SAEs" and dialog.accept_button.isEnabled()
    weights = tmp_path / "run" / "layer_2" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    dialog.look_at(str(tmp_path / "run"))
    seen(qtbot, dialog)
    assert not dialog.accept_button.isEnabled()
    assert "layer_2: The SAE's files are damaged." in dialog.why.text()
    assert cells(dialog, 1)["Problem"].startswith("⚠ The SAE's files are damaged.")
    shot(dialog, "import-damaged")
    dialog.reject()


def test_what_the_files_do_not_say_is_asked(
    qtbot: Any, page: TrainingPage, stocked: Library, tmp_path: Path, answer_dialogs: Any
) -> None:
    path = a_state(tmp_path / "ae.pt")
    dialog = open_dialog(qtbot, page)
    answer_dialogs("QFileDialog.getOpenFileName", (str(path), ""))
    click(qtbot, dialog.browse_file)
    seen(qtbot, dialog)
    assert dialog.model.currentText() == "tiny-llama-0.9m"  # the only one that fits
    assert "choose the hook point" in dialog.why.text() and not dialog.accept_button.isEnabled()
    dialog.site.set_value("mlp_out")
    assert "choose it" in dialog.why.text()
    dialog.layer.set_value(3)
    assert dialog.why.text() == ""
    shot(dialog, "import-asked")
    click(qtbot, dialog.accept_button)
    arrived(qtbot, page)
    (sae,) = stocked.saes.imported()
    assert sae.hook_point == "blocks.3.hook_mlp_out"
    assert sae.provenance["format"] == "dictionary_learning"


def test_an_sae_of_another_width_is_refused_before_it_is_read_in(
    qtbot: Any, page: TrainingPage, tmp_path: Path
) -> None:
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(a_folder(tmp_path / "wide", d=96, model="other")))
    seen(qtbot, dialog)
    assert dialog.model.value is None and "Choose the model" in dialog.why.text()
    dialog.model.set_value(1)
    assert "96 channels (other); tiny-llama-0.9m has 128" in dialog.why.text()
    assert not dialog.accept_button.isEnabled()
    dialog.reject()


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "There is no such file or folder"), ("empty", "No SAE was found")],
)
def test_a_place_without_saes_says_so(
    qtbot: Any, page: TrainingPage, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    dialog = open_dialog(qtbot, page)
    qtbot.keyClicks(dialog.path, str(tmp_path / name))
    qtbot.keyClick(dialog.path, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: words in problem(dialog))
    assert not dialog.accept_button.isEnabled() and dialog.isVisible()
    dialog.reject()


def test_a_file_that_holds_code_is_not_run(qtbot: Any, page: TrainingPage, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, tmp_path / "ae.pt")
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(tmp_path / "ae.pt"))
    seen(qtbot, dialog)
    assert "holds code" in dialog.why.text() and not (tmp_path / "ran").exists()
    dialog.reject()


def test_a_folder_can_be_dropped(qtbot: Any, page: TrainingPage, tmp_path: Path) -> None:
    dialog = open_dialog(qtbot, page)
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(a_folder(tmp_path / "theirs")))])
    dialog.dropEvent(
        QDropEvent(QPoint(5, 5), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton,
                   Qt.KeyboardModifier.NoModifier)
    )  # fmt: skip
    seen(qtbot, dialog)
    assert dialog.path.text() == str(tmp_path / "theirs")
    dialog.reject()


def test_another_path_forgets_what_was_seen(qtbot: Any, page: TrainingPage, tmp_path: Path) -> None:
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(a_folder(tmp_path / "theirs")))
    seen(qtbot, dialog)
    qtbot.keyClicks(dialog.path, "x")
    assert dialog.seen == [] and not dialog.accept_button.isEnabled()
    dialog.reject()


# --- the card -----------------------------------------------------------------------------------


@pytest.fixture
def card(qtbot: Any, page: TrainingPage, tmp_path: Path) -> Any:
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(a_folder(tmp_path / "theirs")))
    seen(qtbot, dialog)
    click(qtbot, dialog.accept_button)
    arrived(qtbot, page)
    return page.imported_cards()[0]


def test_an_imported_sae_is_measured_on_a_dataset(
    qtbot: Any, page: TrainingPage, card: Any, stocked: Library
) -> None:
    assert card.dataset.currentText() == "intros"
    click(qtbot, card.measure)
    qtbot.waitUntil(lambda: card.tiles["fvu"].value != "—")
    sae = stocked.saes.get(card.imported.sae.id)
    assert card.tiles["l0"].value == "4.0" and sae.metrics["l0"] == pytest.approx(4.0, abs=0.05)
    assert "held-out part of intros" in card._measured.text()
    assert "held-out tokens" in card.tiles["fvu"].toolTip()
    qtbot.waitUntil(card.measure.isEnabled)
    page.activate(sae_id=sae.id)
    shot(page, "import-measured")
    assert ("sae", sae.id) in page.selection.boxes


def test_an_imported_sae_is_exported(
    qtbot: Any, page: TrainingPage, card: Any, tmp_path: Path, answer_dialogs: Any
) -> None:
    (tmp_path / "out").mkdir()
    answer_dialogs("QFileDialog.getExistingDirectory", str(tmp_path / "out"))
    click(qtbot, card.export)
    target = tmp_path / "out" / "theirs"
    qtbot.waitUntil(target.exists)
    (written,) = target.iterdir()
    assert load_sae(written).dictionary.d_sae == M


def test_delete_asks_and_moves_it_to_the_trash(
    qtbot: Any, page: TrainingPage, card: Any, stocked: Library, answer_dialogs: Any
) -> None:
    answer_dialogs("ConfirmDialog.exec", 0)
    click(qtbot, card.delete)
    assert len(stocked.saes.imported()) == 1
    answer_dialogs("ConfirmDialog.exec", 1)
    click(qtbot, card.delete)
    qtbot.waitUntil(lambda: page.imported_cards() == [])
    assert stocked.saes.imported() == [] and list((stocked.root / "trash").iterdir())


def test_without_text_nothing_can_be_looked_through(
    qtbot: Any, page: TrainingPage, card: Any, stocked: Library
) -> None:
    stocked.discard("datasets", 1)
    qtbot.waitUntil(lambda: not card.measure.isEnabled())
    assert not card.discover.isEnabled() and "Add a dataset first" in card.measure.toolTip()


def test_only_what_the_files_leave_open_is_handed_to_the_job() -> None:
    from mistudio.jobs.sae_preview import SeenSae
    from mistudio.ui.training.intake import Choices, placing

    said = SeenSae("a", "saelens", 1, reads=POINT, layer=1)
    open_one = SeenSae("a", "dictionary_learning", 1)
    layered = SeenSae("a", "gemma_scope", 1, layer=7)
    chosen = Choices(None, 3, "mlp_out")
    assert placing([said], chosen, False) == placing([said], chosen, True) == (None, None)
    assert placing([open_one], chosen, False) == (3, "mlp_out")
    assert placing([layered], chosen, False) == (None, "mlp_out")
    assert placing([layered], Choices(None, None, "mlp_out"), True) == (7, "mlp_out")
    assert placing([layered], Choices(), True) == (None, None)


# --- from the Hub -------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(access, "_provider", credentials.access_for)
    monkeypatch.setattr(credentials, "_typed", {})
    files = {
        f"layer_{layer}/width_64/{file.name}": file.read_bytes()
        for layer in (0, 1)
        for file in a_folder(tmp_path / f"hub-{layer}", layer=layer).iterdir()
    }
    files["README.md"] = b"# SAEs"
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.add("ada/tiny-saes", files, "model", card={"license": "mit"}, downloads=7)
        server.add("bob/tiny-gated-saes", files, "model", gated="auto")
        server.add("eve/no-saes", {"README.md": b"x"}, "model")
        server.accounts[TOKEN] = "ada"
        server.accepted.add(("ada", "bob/tiny-gated-saes"))
        yield server


def look_on_hub(qtbot: Any, dialog: ImportDialog, text: str) -> None:
    dialog.sources.setCurrentIndex(1)
    dialog.repository.clear()
    qtbot.keyClicks(dialog.repository, text)
    qtbot.keyClick(dialog.repository, Qt.Key.Key_Return)


def test_an_sae_of_the_hub_is_found_chosen_and_imported(
    qtbot: Any, page: TrainingPage, stocked: Library, hub: HubServer
) -> None:
    dialog = open_dialog(qtbot, page)
    dialog.resize(1240, 900)
    assert hub.requests == []
    look_on_hub(qtbot, dialog, "tiny-saes")
    qtbot.waitUntil(lambda: dialog.results.isVisible())
    shot(dialog, "import-hub-search")
    qtbot.keyClick(dialog.results, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: dialog.files.isVisible())
    assert [line.label for line in dialog.files.lines.table.lines] == [
        "layer_0/width_64", "layer_1/width_64"]  # fmt: skip
    assert "2 SAEs" in dialog.said.text() and "licence mit" in dialog.said.text()
    dialog.files.selectRow(1)
    seen(qtbot, dialog)
    told = cells(dialog)
    assert told["Latents"] == "64" and told["Where it belongs"].startswith("Layer 1")
    assert dialog.accept_button.text().startswith("Download and import (")
    shot(dialog, "import-hub-seen")
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    assert not any(r == "" for r in hub.ranges("layer_1/width_64/sae_weights.safetensors"))
    click(qtbot, dialog.accept_button)
    arrived(qtbot, page)
    (sae,) = stocked.saes.imported()
    assert sae.name == "width_64" and sae.hook_point == POINT
    assert sae.provenance["repository"] == "ada/tiny-saes"


def test_a_repository_without_saes_says_so(qtbot: Any, page: TrainingPage, hub: HubServer) -> None:
    dialog = open_dialog(qtbot, page)
    look_on_hub(qtbot, dialog, "eve/no-saes")
    qtbot.waitUntil(lambda: "none of its files is an SAE" in dialog.said.text())
    look_on_hub(qtbot, dialog, "eve/nowhere")
    qtbot.waitUntil(lambda: problem(dialog) != "")
    dialog.reject()


def test_a_gated_repository_takes_the_token_of_the_form(
    qtbot: Any, page: TrainingPage, stocked: Library, hub: HubServer
) -> None:
    dialog = open_dialog(qtbot, page)
    look_on_hub(qtbot, dialog, "bob/tiny-gated-saes")
    qtbot.waitUntil(lambda: dialog.files.isVisible() or problem(dialog) != "")
    dialog.token_row.field.setText(TOKEN)
    look_on_hub(qtbot, dialog, "bob/tiny-gated-saes")
    qtbot.waitUntil(lambda: dialog.files.isVisible())
    dialog.files.selectRow(0)
    seen(qtbot, dialog)
    click(qtbot, dialog.accept_button)
    arrived(qtbot, page)
    assert TOKEN not in str(stocked.jobs.all()) and TOKEN not in str(stocked.saes.all())


def test_plain_numbers_that_are_no_sae_are_not_taken_for_one(
    qtbot: Any, page: TrainingPage, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    dialog = open_dialog(qtbot, page)
    dialog.look_at(str(tmp_path / "model.safetensors"))
    qtbot.waitUntil(lambda: "No SAE was found" in problem(dialog))
    dialog.reject()
