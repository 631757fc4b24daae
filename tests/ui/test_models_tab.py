"""The Models tab over a real library: adding, looking into, extracting, deleting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QMimeData, QPointF, Qt, QUrl
from PySide6.QtGui import QDropEvent

from mistudio.engine.activations.store import estimate_bytes
from mistudio.engine.models.hooks import SITES, HookPoint
from mistudio.errors import InvalidInput
from mistudio.library.library import Library
from mistudio.ui.models.dialogs import ArchitectureDialog, ExtractDialog
from mistudio.ui.models.page import ModelsPage
from mistudio.ui.models.presenter import (
    EXTRACTED_SITES,
    HOOK_POINTS,
    QUANTISED,
    ExtractionForm,
    checked_source,
    plan_extraction,
    point_name,
    points_text,
)
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .conftest import TINY_MODEL
from .screens import shot

SIZES = [(1280, 720), (1920, 1080)]


@pytest.fixture
def empty(services_of: Callable[[Library], Services], library: Library) -> Services:
    return services_of(library)


@pytest.fixture
def trained(services_of: Callable[[Library], Services], trained_library: Library) -> Services:
    return services_of(trained_library)


def open_page(qtbot: Any, services: Services, size: tuple[int, int] = (1280, 720)) -> ModelsPage:
    page = ModelsPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    return page


def open_extract(qtbot: Any, page: ModelsPage) -> ExtractDialog:
    """The dialog, once its first plan is there."""
    page.cards()[0].extract.click()
    dialog = page.findChild(ExtractDialog)
    assert dialog is not None
    qtbot.waitUntil(lambda: dialog.plan is not None, timeout=30_000)
    return dialog


def add_and_wait(qtbot: Any, page: ModelsPage, services: Services, source: object) -> str:
    """Through the form; returns how the job ended."""
    page.source.setText(str(source))
    with qtbot.waitSignal(services.jobs.job_finished, timeout=60_000) as ended:
        page.add_button.click()
    return str(ended.args[1])


# --- adding ---------------------------------------------------------------------------------------


def test_empty_tab_says_how_to_begin(qtbot: Any, empty: Services) -> None:
    page = open_page(qtbot, empty)
    assert page._empty_card.isVisible() and page.cards() == []
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_folder_given_in_the_form_becomes_a_card(
    qtbot: Any, empty: Services, library: Library
) -> None:
    page = open_page(qtbot, empty)
    page.precision.set_value("fp32")
    assert add_and_wait(qtbot, page, empty, TINY_MODEL) == "finished"
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    model = library.models.all()[0]
    assert (model.name, model.precision, model.parameters) == ("tiny-llama-0.9m", "fp32", 857_216)
    assert page.cards()[0].about.text() == "857.2K params • FP32 • 1.69 MB on disk"
    assert not page._empty_card.isVisible()
    assert page.source.text() == ""
    qtbot.waitUntil(lambda: page.job_cards() == {})


def test_dropped_folder_is_added(qtbot: Any, empty: Services, library: Library) -> None:
    page = open_page(qtbot, empty)
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(TINY_MODEL / "config.json"))])
    drop = QDropEvent(
        QPointF(50, 50),
        Qt.DropAction.CopyAction,
        data,
        Qt.MouseButton.LeftButton,
        Qt.KeyboardModifier.NoModifier,
    )
    with qtbot.waitSignal(empty.jobs.job_finished, timeout=60_000) as ended:
        page.dropEvent(drop)
    assert ended.args[1] == "finished"
    assert library.models.count() == 1


def test_browse_fills_the_field(
    qtbot: Any, empty: Services, answer_dialogs: Any, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    answer_dialogs("QFileDialog.getExistingDirectory", str(tmp_path))
    page.browse.click()
    assert page.source.text() == str(tmp_path)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", "Type a repository or choose a folder."),
        ("/no/such/folder", "There is no folder /no/such/folder."),
        ("~/no such folder", "There is no folder ~/no such folder."),
        ("pythia", "A repository is written owner/name."),
        (str(TINY_MODEL / "config.json"), "Choose the folder that holds it"),
    ],
)
def test_what_cannot_be_a_model_is_said_at_the_field(
    qtbot: Any, empty: Services, library: Library, source: str, sentence: str
) -> None:
    page = open_page(qtbot, empty)
    page.source.setText(source)
    page.add_button.click()
    assert page.source_error.isVisible() and sentence in page.source_error.text()
    assert page.source.property("invalid") == "true"
    assert library.jobs.count() == 0
    page.source.setText("x")
    assert not page.source_error.isVisible()


def broken(kind: str, folder: Path) -> Path:
    shutil.copytree(TINY_MODEL, folder)
    weights = folder / "model.safetensors"
    if kind == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "encoder":
        config = json.loads((folder / "config.json").read_text())
        config.update(architectures=["BertForMaskedLM"], model_type="bert")
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("empty", "The folder is empty"),
        ("no weights", "No weights in this folder"),
        ("cut off", "The model's weights are damaged"),
        ("no tokenizer", "No tokenizer in this folder"),
        ("encoder", "Not a decoder-only model"),
    ],
)
def test_bad_folder_ends_in_a_sentence_and_an_unchanged_library(
    qtbot: Any, empty: Services, library: Library, tmp_path: Path, kind: str, title: str
) -> None:
    page = open_page(qtbot, empty)
    assert add_and_wait(qtbot, page, empty, broken(kind, tmp_path / "bad-model")) == "failed"
    qtbot.waitUntil(lambda: [c.badge.status for c in page.job_cards().values()] == ["failed"])
    (card,) = page.job_cards().values()
    panel = card._error.itemAt(0).widget()
    assert title in panel.accessibleName()
    assert library.jobs.get(card.job.id).error["next_step"] in panel.accessibleName()
    assert page.cards() == [] and library.models.count() == 0
    assert not any((library.root / "models").iterdir())
    assert not any((library.root / "work").iterdir())
    card.dismiss.click()
    assert page.job_cards() == {}


def test_run_again_repeats_the_job_and_takes_the_old_one_away(
    qtbot: Any, empty: Services, library: Library, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    folder = broken("no weights", tmp_path / "mended")
    assert add_and_wait(qtbot, page, empty, folder) == "failed"
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1)
    shutil.copy(TINY_MODEL / "model.safetensors", folder)
    (card,) = page.job_cards().values()
    with qtbot.waitSignal(empty.jobs.job_finished, timeout=60_000) as ended:
        card.again.click()
    assert ended.args[1] == "finished"
    qtbot.waitUntil(lambda: len(page.cards()) == 1 and page.job_cards() == {})


def test_failure_is_not_shown_beside_the_same_work_done_later(
    qtbot: Any, empty: Services, library: Library
) -> None:
    page = open_page(qtbot, empty)
    job_id = library.jobs.submit(
        "add_model", "Add", "disk", {"source": str(TINY_MODEL), "precision": "auto"}
    )
    library.jobs.move(job_id, ("queued",), "interrupted")
    qtbot.waitUntil(lambda: list(page.job_cards()) == [job_id])
    assert add_and_wait(qtbot, page, empty, TINY_MODEL) == "finished"
    qtbot.waitUntil(lambda: page.job_cards() == {})


def test_interrupted_job_is_shown_until_dismissed_also_after_a_restart(
    qtbot: Any, empty: Services, library: Library
) -> None:
    job_id = library.jobs.submit(
        "add_model", "Add the model x", "disk", {"source": str(TINY_MODEL)}
    )
    library.jobs.move(job_id, ("queued",), "interrupted")
    page = open_page(qtbot, empty)
    assert page.job_cards()[job_id].again.isVisible()
    page.job_cards()[job_id].dismiss.click()
    assert page.job_cards() == {}
    second = open_page(qtbot, empty)
    assert list(second.job_cards()) == [job_id]
    second.restore_state(json.loads(json.dumps(page.save_state())))
    assert second.job_cards() == {}


def test_quantised_precisions_are_shown_but_cannot_be_chosen(qtbot: Any, empty: Services) -> None:
    page = open_page(qtbot, empty)
    precision = page.precision
    for value in QUANTISED:
        item = precision.model().item(precision.findData(value))
        assert not item.isEnabled()
        assert "not in this version" in item.toolTip()
    assert precision.value == "auto"


def test_source_that_is_a_repository_is_taken_as_it_is() -> None:
    assert checked_source("  EleutherAI/pythia-70m ") == "EleutherAI/pythia-70m"
    assert checked_source(str(TINY_MODEL)) == str(TINY_MODEL)
    with pytest.raises(InvalidInput):
        checked_source("not/a/repository")


def test_state_survives(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    page.source.setText("owner/name")
    page.precision.set_value("bf16")
    dialog = open_extract(qtbot, page)
    dialog.layers.set_selected([0])
    dialog.max_tokens.setValue(12_345)
    dialog.site.set_value("mlp_out")
    dialog.close()
    again = open_page(qtbot, trained)
    again.restore_state(json.loads(json.dumps(page.save_state())))
    assert (again.source.text(), again.precision.value) == ("owner/name", "bf16")
    dialog = open_extract(qtbot, again)
    assert dialog.layers.selected() == [0]
    assert (dialog.max_tokens.value(), dialog.site.value) == (12_345, "mlp_out")
    dialog.close()
    again.restore_state({})


# --- architecture ---------------------------------------------------------------------------------


def test_sites_are_the_ones_of_the_engine() -> None:
    names = {HookPoint(site, 3).name for site in SITES}
    assert {f"blocks.3.{suffix}" for suffix, _ in HOOK_POINTS} == names
    for site, _ in EXTRACTED_SITES:
        assert point_name(site, 3) == HookPoint(site, 3).name
    assert points_text([point_name("resid_post", 3), point_name("resid_post", 1)]) == (
        "Layers 1, 3 • Residual Stream"
    )


@pytest.mark.parametrize("size", SIZES)
def test_architecture_tells_what_the_configuration_says(
    qtbot: Any, trained: Services, size: tuple[int, int]
) -> None:
    config = json.loads((TINY_MODEL / "config.json").read_text())
    page = open_page(qtbot, trained, size)
    qtbot.mouseClick(
        page.cards()[0], Qt.MouseButton.LeftButton, pos=page.cards()[0].rect().center()
    )
    dialog = page.findChild(ArchitectureDialog)
    assert dialog is not None and dialog.isVisible()
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width, mlp = config["hidden_size"], config["intermediate_size"]
    assert {name: tile.value for name, tile in dialog.tiles.items()} == {
        "layers": str(config["num_hidden_layers"]),
        "width": str(width),
        "heads": f"{heads} ({kv} KV)",
        "parameters": "857.2K",
    }
    assert {name: tile.value for name, tile in dialog.facts.items()} == {
        "vocabulary": f"{config['vocab_size']:,}",
        "context": str(config["max_position_embeddings"]),
        "ratio": f"{mlp / width:.2f}×",
        "architecture": config["architectures"][0],
        "head_dim": str(config["head_dim"]),
        "weights": "1.69 MB",
    }
    kinds = [module.kind for module in dialog.modules]
    blocks = [f"TransformerBlock_{i}" for i in range(config["num_hidden_layers"])]
    assert kinds == ["Embedding", *blocks, "FinalNorm", "Output"]
    assert dialog.modules[0].details == f"Shape {config['vocab_size']} × {width}"
    assert dialog.modules[1].details == (
        f"Attention: {heads} heads, {kv} key/value heads × {config['head_dim']} dims | "
        f"MLP: {width} → {mlp} → {width}"
    )
    assert "tied to the embedding" in dialog.modules[-1].details
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    shot(dialog, f"architecture-{size[0]}")
    dialog.close()


# --- extraction -----------------------------------------------------------------------------------


def test_plan_equals_arithmetic(qtbot: Any, trained: Services) -> None:
    library = trained.library
    tokens = library.tokenizations.all()[0].tokens
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)

    def plan_of(layers: list[int], most: int) -> Any:
        dialog.layers.set_selected(layers)
        dialog.max_tokens.setValue(most)
        qtbot.waitUntil(lambda: dialog.plan is not None, timeout=10_000)
        return dialog.plan

    plan = plan_of([0, 3], 5_000)
    assert (plan.tokens, plan.exact) == (5_000, True)
    assert plan.bytes == estimate_bytes(5_000, [128, 128]) == 5_000 * (2 * 256 + 18)
    assert dialog.tokens_text.text() == "5,000"
    assert dialog.disk_text.text() == "2.47 MB"
    plan = plan_of([0, 1, 2], 1_000_000)
    assert plan.tokens == tokens
    assert plan.bytes == estimate_bytes(tokens, [128] * 3)
    assert plan.seconds is None and dialog.time_text.text() == "—"
    dialog.layers.set_selected([])
    assert not dialog.start.isEnabled()
    assert dialog.message.text() == "Select at least one layer."
    dialog.close()


def test_untokenized_dataset_gets_an_upper_bound(trained: Services) -> None:
    library = trained.library
    library.execute("DELETE FROM feature_runs")
    library.execute("DELETE FROM saes")
    library.execute("DELETE FROM trainings")
    library.execute("DELETE FROM tokenizations")
    dataset, model = library.datasets.all()[0], library.models.all()[0]
    form = ExtractionForm(dataset.id, (point_name("resid_post", 1),), max_tokens=10_000)
    plan = plan_extraction(library, model, form)
    assert (plan.tokens, plan.exact, plan.refusal) == (10_000, False, "")


def test_too_small_a_disk_is_refused_as_the_job_would(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = estimate_bytes(5_000, [128])
    usage = shutil.disk_usage(trained.library.root)
    free = {"bytes": round(needed * 1.1) - 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free["bytes"]))
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.layers.set_selected([1])
    dialog.max_tokens.setValue(5_000)
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert dialog.refusal.isVisible() and "Not enough disk space" in dialog.refusal_text.text()
    assert not dialog.start.isEnabled()
    free["bytes"] += 2
    dialog.max_tokens.setValue(4_999)
    dialog.max_tokens.setValue(5_000)
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert not dialog.refusal.isVisible() and dialog.start.isEnabled()
    dialog.close()


def test_too_little_text_for_the_context_is_refused(qtbot: Any, trained: Services) -> None:
    library = trained.library
    model, dataset = library.models.all()[0], library.datasets.all()[0]
    form = ExtractionForm(dataset.id, (point_name("resid_post", 1),), context=10_000)
    assert "windows of 10000 tokens" in plan_extraction(library, model, form).refusal


def test_extraction_from_start_to_finish(qtbot: Any, trained: Services) -> None:
    library = trained.library
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.layers.set_selected([1, 3])
    dialog.max_tokens.setValue(4_000)
    dialog.context.setValue(64)
    qtbot.waitUntil(dialog.start.isEnabled, timeout=10_000)
    closed: list[int] = []
    dialog.finished.connect(closed.append)
    with qtbot.waitSignal(trained.jobs.job_finished, timeout=60_000) as ended:
        dialog.start.click()
        assert dialog.progress_box.isVisible() and not dialog.start.isEnabled()
        assert not dialog.layers.isEnabled()
    assert ended.args[1] == "finished"
    assert closed == []  # a second to read what it says
    assert "tokens stored" in dialog.message.text()
    qtbot.waitUntil(lambda: closed == [1], timeout=3000)
    (extraction,) = library.extractions.all()
    assert extraction.hook_points == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    assert extraction.settings["context"] == 64
    qtbot.waitUntil(lambda: len(page.cards()[0].rows) == 1)
    card = page.cards()[0]
    card.history.set_expanded(True)
    (line,) = card.rows
    sites = extraction.statistics["sites"]
    assert f"{extraction.tokens:,} tokens of intros" in line.facts.text()
    assert f"outliers dropped: {extraction.statistics['dropped_outliers']}" in line.facts.text()
    assert line.norms.text() == "Mean norm: " + ", ".join(
        f"L{layer} {sites[f'blocks.{layer}.hook_resid_post']['mean_norm']:.2f}" for layer in (1, 3)
    )
    for size in SIZES:
        page.resize(*size)
        assert too_small(page) == [] and cut_off(page) == [] and nameless(page) == []
        shot(page, f"models-{size[0]}")
    dialog = open_extract(qtbot, page)  # now the time is known
    assert dialog.plan.seconds is None or dialog.time_text.text().startswith("about ")
    dialog.close()


def test_stopped_extraction_leaves_nothing(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.layers.select_all.click()
    dialog.batch.setValue(1)
    qtbot.waitUntil(dialog.start.isEnabled, timeout=10_000)
    with qtbot.waitSignal(trained.jobs.job_finished, timeout=60_000) as ended:
        dialog.start.click()
        dialog.stop.click()
    assert ended.args[1] == "cancelled"
    assert dialog.message.text() == "Stopped; nothing was stored."
    assert trained.library.extractions.count() == 0
    qtbot.waitUntil(dialog.start.isEnabled, timeout=10_000)
    dialog.close()


@pytest.mark.parametrize("size", SIZES)
def test_extract_dialog_can_be_read(qtbot: Any, trained: Services, size: tuple[int, int]) -> None:
    page = open_page(qtbot, trained, size)
    dialog = open_extract(qtbot, page)
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    shot(dialog, f"extract_dialog-{size[0]}")
    dialog.close()


# --- deleting -------------------------------------------------------------------------------------


def add_extraction(library: Library, folder: str = "activations/x") -> int:
    library.path(folder).mkdir(parents=True)
    return library.extractions.add(
        model_id=library.models.all()[0].id,
        tokenization_id=library.tokenizations.all()[0].id,
        hook_points=["blocks.1.hook_resid_post"],
        settings={},
        folder=folder,
        tokens=1000,
        bytes=256_000,
        statistics={},
    )


def test_extraction_in_use_is_kept_with_the_reason(qtbot: Any, trained: Services) -> None:
    library = trained.library
    extraction_id = add_extraction(library)
    library.trainings.update(library.trainings.all()[0].id, extraction_id=extraction_id)
    page = open_page(qtbot, trained)
    page.ask_delete_extraction(extraction_id)
    assert library.extractions.count() == 1
    assert "1 training run learnt from it" in page.presenter.extraction_refusal(extraction_id)


def test_deleted_extraction_goes_to_the_trash_after_a_question(
    qtbot: Any, trained: Services, answer_dialogs: Any
) -> None:
    library = trained.library
    extraction_id = add_extraction(library)
    page = open_page(qtbot, trained)
    answer_dialogs("ConfirmDialog.exec", 0)
    page.ask_delete_extraction(extraction_id)
    assert library.extractions.count() == 1
    answer_dialogs("ConfirmDialog.exec", 1)
    page.ask_delete_extraction(extraction_id)
    assert library.extractions.count() == 0
    assert not library.path("activations/x").exists()
    qtbot.waitUntil(lambda: page.cards()[0].rows == [])


def test_model_in_use_is_kept_and_an_unused_one_goes(
    qtbot: Any, trained: Services, answer_dialogs: Any
) -> None:
    library = trained.library
    page = open_page(qtbot, trained)
    model_id = library.models.all()[0].id
    page.ask_delete(model_id)
    refusal = page.presenter.delete_refusal(model_id)
    assert refusal == "It is used by 1 training run and 1 SAE. Delete those first."
    with pytest.raises(InvalidInput):
        page.presenter.delete(model_id)
    assert library.models.count() == 1
    assert add_and_wait(qtbot, page, trained, TINY_MODEL) == "finished"
    unused = library.models.all()[0].id
    answer_dialogs("ConfirmDialog.exec", 1)
    page.ask_delete(unused)
    assert [model.id for model in library.models.all()] == [model_id]
    qtbot.waitUntil(lambda: [card.model_id for card in page.cards()] == [model_id])
