"""The Models tab over a real library: adding, looking into, extracting, deleting."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QMimeData, QPointF, Qt, QUrl
from PySide6.QtGui import QDropEvent

from mistudio import formatting
from mistudio.engine.activations.store import estimate_bytes
from mistudio.engine.models.hooks import SITES, HookPoint
from mistudio.errors import InvalidInput
from mistudio.jobs.loaded import unload_model
from mistudio.library.library import Library
from mistudio.ui.models.architecture import ArchitectureDialog
from mistudio.ui.models.extract import ExtractDialog, fitted_layers, template_meta
from mistudio.ui.models.page import ModelsPage
from mistudio.ui.models.planning import ExtractionForm, plan_extraction
from mistudio.ui.models.presenter import (
    EXTRACTED_SITES,
    HOOK_POINTS,
    checked_source,
    point_name,
    points_text,
    verdict_of,
)
from mistudio.ui.models.stored import ExtractionDialog
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
    unload_model()  # what the making of the library left in memory
    return services_of(trained_library)


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    unload_model()  # what other tests left in memory would show on these tests' cards
    yield
    unload_model()


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
    qtbot.waitUntil(lambda: dialog.plan is not None)
    return dialog


def add_and_wait(qtbot: Any, page: ModelsPage, services: Services, source: object) -> str:
    """Through the form; returns how the job ended."""
    page.form.source.setText(str(source))
    with qtbot.waitSignal(services.jobs.job_finished) as ended:
        page.form.add_button.click()
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
    page.form.precision.set_value("fp32")
    assert add_and_wait(qtbot, page, empty, TINY_MODEL) == "finished"
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    model = library.models.all()[0]
    assert (model.name, model.precision, model.parameters) == ("tiny-llama-0.9m", "fp32", 857_216)
    card = page.cards()[0]
    qtbot.waitUntil(lambda: "—" not in card.about.text())
    assert re.fullmatch(
        r"857.2K params • FP32 • [\d.]+ MB memory • 1.69 MB on disk", card.about.text()
    )
    assert not card.quality.isVisible() and not card.unload.isVisible()
    assert not page._empty_card.isVisible()
    assert page.form.source.text() == ""
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
    with qtbot.waitSignal(empty.jobs.job_finished) as ended:
        page.dropEvent(drop)
    assert ended.args[1] == "finished"
    assert library.models.count() == 1


def test_browse_fills_the_field(
    qtbot: Any, empty: Services, answer_dialogs: Any, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    answer_dialogs("QFileDialog.getExistingDirectory", str(tmp_path))
    page.form.browse.click()
    assert page.form.source.text() == str(tmp_path)


def test_gguf_file_is_taken_by_its_own_button(
    qtbot: Any, empty: Services, library: Library, answer_dialogs: Any, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF is what it only says it is")
    answer_dialogs("QFileDialog.getOpenFileName", (str(file), ""))
    qtbot.mouseClick(page.form.browse_file, Qt.MouseButton.LeftButton)
    assert page.form.source.text() == str(file)
    assert page.form.add_button.text() == "Add Model from This Computer"
    qtbot.waitUntil(lambda: page.form._problem.count() == 1)
    assert "model.gguf" in page.form._problem.itemAt(0).widget().accessibleName()
    assert library.jobs.count() == 0


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/folder", "There is nothing at /no/such/folder."),
        ("~/no such folder", "There is nothing at ~/no such folder."),
        ("missing.gguf", "There is nothing at missing.gguf."),
        ("pythia", "A repository is written owner/name."),
        (str(TINY_MODEL / "config.json"), "Choose the folder that holds it"),
    ],
)
def test_what_cannot_be_a_model_is_said_at_the_field(
    qtbot: Any, empty: Services, library: Library, source: str, sentence: str
) -> None:
    page = open_page(qtbot, empty)
    page.form.source.setText(source)
    page.form.add_button.click()
    assert page.form.source_row.error.isVisible() and sentence in page.form.source_row.error.text()
    assert page.form.source.property("invalid") == "true"
    assert library.jobs.count() == 0
    page.form.source.setText("x")
    assert not page.form.source_row.error.isVisible()


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
    page.form.source.setText(str(broken(kind, tmp_path / "bad-model")))
    page.form.add_button.click()
    place = page.form._problem
    qtbot.waitUntil(lambda: place.count() == 1)
    panel = place.itemAt(0).widget()
    assert title in panel.accessibleName() and page.form.candidate is None
    assert page.cards() == [] and library.models.count() == 0 and library.jobs.count() == 0
    assert not any((library.root / "models").iterdir())
    assert not any((library.root / "work").iterdir())
    page.form.source.setText("another")
    assert place.count() == 0


def test_failed_job_keeps_its_words_until_dismissed(
    qtbot: Any, empty: Services, library: Library, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    folder = broken("no weights", tmp_path / "bad-model")
    with qtbot.waitSignal(empty.jobs.job_finished):
        page.presenter.add(str(folder))
    qtbot.waitUntil(lambda: [c.badge.status for c in page.job_cards().values()] == ["failed"])
    (card,) = page.job_cards().values()
    panel = card._error.itemAt(0).widget()
    assert "No weights in this folder" in panel.accessibleName()
    assert library.jobs.get(card.job.id).error["next_step"] in panel.accessibleName()
    card.dismiss.click()
    assert page.job_cards() == {}


def test_run_again_repeats_the_job_and_takes_the_old_one_away(
    qtbot: Any, empty: Services, library: Library, tmp_path: Path
) -> None:
    page = open_page(qtbot, empty)
    folder = broken("no weights", tmp_path / "mended")
    with qtbot.waitSignal(empty.jobs.job_finished):
        page.presenter.add(str(folder))
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1)
    shutil.copy(TINY_MODEL / "model.safetensors", folder)
    (card,) = page.job_cards().values()
    with qtbot.waitSignal(empty.jobs.job_finished) as ended:
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


def test_what_a_model_takes_is_shown_before_it_is_added(
    qtbot: Any, empty: Services, library: Library, answer_dialogs: Any
) -> None:
    page = open_page(qtbot, empty)
    form = page.form
    answer_dialogs("QFileDialog.getExistingDirectory", str(TINY_MODEL))
    form.browse.click()
    qtbot.waitUntil(lambda: form.plan_box.isVisible())
    assert library.jobs.count() == 0
    assert "857.2K parameters, 4 layers of 128" in form.plan_title.text()
    assert "1.69 MB on disk" in form.plan_facts.text() and "memory free" in form.plan_facts.text()
    lines = form._table.itemAt(0).widget().lines
    assert list(lines) == ["fp32", "bf16", "fp16", "q8", "q4", "q2"]
    assert lines["fp32"][1] == formatting.size(4 * 857_216)
    assert lines["bf16"][1] == formatting.size(2 * 857_216)
    assert all("✓ Fits" in line[3] for line in lines.values())
    assert form.precision.currentText().startswith("Auto (best that fits: ")
    assert form.add_button.text() == "Add Model from This Computer"
    for size in SIZES:
        page.resize(*size)
        assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
        shot(page, f"models-plan-{size[0]}")
    qtbot.mouseClick(form.look, Qt.MouseButton.LeftButton)
    dialog = page.findChild(ArchitectureDialog)
    qtbot.waitUntil(lambda: dialog.ready)
    assert dialog.tiles["layers"].value == "4"
    dialog.close()
    form.source.setText(str(TINY_MODEL.parent))  # another one: nothing is known of it
    assert form.candidate is None and not form.plan_box.isVisible()


def test_what_does_not_fit_is_disabled_with_the_reason_and_not_added_at_once(
    qtbot: Any, empty: Services, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistudio.jobs import loaded

    real = loaded.machine(library)
    small = replace(real, memory_total=150 * 2**20, memory_free=2**20)
    monkeypatch.setattr(loaded, "machine", lambda library: small)
    monkeypatch.setattr(
        "mistudio.ui.models.candidate.refused_precisions",
        lambda kind=None: {"q2": "PyTorch here cannot."},
    )
    page = open_page(qtbot, empty)
    form = page.form
    form.source.setText(str(TINY_MODEL))
    form.add_button.click()
    qtbot.waitUntil(lambda: form.plan_box.isVisible())
    assert library.jobs.count() == 0  # it waits for a second click
    assert "does not fit into memory now" in form.plan_warning.text()
    assert form.add_button.text().endswith("anyway")
    item = form.precision.model().item(form.precision.findData("q2"))
    assert not item.isEnabled() and item.toolTip() == "PyTorch here cannot."
    lines = form._table.itemAt(0).widget().lines
    assert "Does not run" in lines["q2"][3] and "Too little is free now" in lines["q8"][3]
    with qtbot.waitSignal(empty.jobs.job_finished):
        form.add_button.click()
    assert library.models.count() == 1


def test_more_than_the_device_has_cannot_be_chosen(
    qtbot: Any, empty: Services, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistudio.jobs import loaded

    tiny = replace(loaded.machine(library), memory_total=2**20, memory_free=2**20)
    monkeypatch.setattr(loaded, "machine", lambda library: tiny)
    page = open_page(qtbot, empty)
    page.form.precision.set_value("fp32")
    page.form.look_at(str(TINY_MODEL))
    qtbot.waitUntil(lambda: page.form.plan_box.isVisible())
    item = page.form.precision.model().item(page.form.precision.findData("fp32"))
    assert not item.isEnabled() and "1 MB in all" in item.toolTip()
    assert page.form.precision.value == "auto"


def test_verdict_tells_delta_sample_and_error(trained: Services) -> None:
    library = trained.library
    model = library.models.all()[0]
    assert verdict_of(model, "bf16") is None
    unknown = verdict_of(model, "q4")
    assert (
        unknown.text == "Q4 quality: —"
        and not unknown.measured
        and "not been measured" in unknown.about
    )
    found = {
        "precision": "q4", "reference": "fp32", "ce": 3.0, "ce_reference": 2.866, "delta": 0.134,
        "error": 0.0123, "tokens": 7321, "documents": 64, "verdict": "usable", "sentence": "Words.",
        "method": "nf4, blocks of 64 (bitsandbytes 0.50.2)",
    }  # fmt: skip
    model = replace(model, provenance={"quality": {"q4": found}})
    verdict = verdict_of(model, "q4")
    assert (verdict.text, verdict.tone) == (
        "Q4: a little worse than unquantised (ΔCE +0.134)", "blue")  # fmt: skip
    assert "Words." in verdict.about and "n = 7,321 tokens in 64 documents" in verdict.about
    assert "+0.1340 ± 0.0123 (standard error" in verdict.about and verdict.warning == ""
    assert "Q4 is nf4, blocks of 64 (bitsandbytes 0.50.2)." in verdict.about
    former = replace(model, provenance={"quality": {"q4": {**found, "method": ""}}})
    assert verdict_of(former, "q4") == unknown  # of another 4-bit method
    found.update(delta=None, error=None, ce=None, verdict="destroyed")  # as JSON keeps what is NaN
    model = replace(model, provenance={"quality": {"q4": found}})
    worst = verdict_of(model, "q4")
    assert (worst.text, worst.warning) == ("Q4: destroyed by quantising", "⚠ Words.")


def test_quantised_model_is_measured_loaded_and_unloaded(qtbot: Any, trained: Services) -> None:
    library = trained.library
    model = library.models.all()[0]
    library.models.update(model.id, precision="q8")
    page = open_page(qtbot, trained)
    card = page.cards()[0]
    assert card.quality.text() == "Q8 quality: —" and not card.loaded.isVisible()
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
        qtbot.mouseClick(card.measure, Qt.MouseButton.LeftButton)
        qtbot.waitUntil(lambda: bool(page.job_cards()))
    assert ended.args[1] == "finished"
    qtbot.waitUntil(lambda: "ΔCE" in page.cards()[0].quality.text())
    card = page.cards()[0]
    assert card.measure.text() == "Measure again" and "±" in card.quality.toolTip()
    qtbot.waitUntil(lambda: card.loaded.isVisible())
    assert card.loaded.text().startswith("Loaded: ")
    shot(page, "models-quantised")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    qtbot.mouseClick(card.unload, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not card.loaded.isVisible())
    assert page.presenter.loaded() == {}


def test_source_that_is_a_repository_is_taken_as_it_is() -> None:
    assert checked_source("  EleutherAI/pythia-70m ") == "EleutherAI/pythia-70m"
    assert checked_source(str(TINY_MODEL)) == str(TINY_MODEL)
    with pytest.raises(InvalidInput):
        checked_source("not/a/repository")


def test_state_survives(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    page.form.source.setText("owner/name")
    page.form.token_row.field.setText("hf_secret")
    page.form.precision.set_value("bf16")
    dialog = open_extract(qtbot, page)
    dialog.layers.set_selected([0])
    dialog.max_tokens.setValue(12_345)
    dialog._set_sites(["mlp_out", "mlp_in"])
    dialog.close()
    assert "hf_secret" not in json.dumps(page.save_state())
    again = open_page(qtbot, trained)
    again.restore_state(json.loads(json.dumps(page.save_state())))
    assert (again.form.source.text(), again.form.precision.value) == ("owner/name", "bf16")
    dialog = open_extract(qtbot, again)
    assert dialog.layers.selected() == [0]
    assert (dialog.max_tokens.value(), dialog.selected_sites()) == (12_345, ["mlp_out", "mlp_in"])
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
    qtbot.waitUntil(lambda: dialog.ready)
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
        "mlp": f"{mlp} ({mlp / width:.2f}×)",
        "head_dim": str(config["head_dim"]),
        "norm": "RMSNorm",
        "positions": "Rotary",
        "embeddings": "Tied",
        "architecture": "Decoder-only",
    }
    kinds = [module.kind for module in dialog.modules]
    blocks = [f"TransformerBlock_{i}" for i in range(config["num_hidden_layers"])]
    assert kinds == ["Embedding", *blocks, "RMSNorm", "Output"]
    assert dialog.modules[0].details == f"Shape {config['vocab_size']} × {width}"
    attention = 2 * width * config["head_dim"] * (heads + kv)
    block = attention + 3 * width * mlp + 2 * width
    assert dialog.modules[1].details == (
        f"Attention: {heads} ({kv} KV) heads × {config['head_dim']} dims | "
        f"MLP: {width} → {mlp} → {width}"
    )
    assert dialog.block_text.text() == (
        f"Each block: {block:,} parameters = {attention:,} attention + {3 * width * mlp:,} MLP + "
        f"{2 * width} norms"
    )
    assert [module.parameters for module in dialog.modules] == [
        config["vocab_size"] * width, *[block] * len(blocks), width, 0]  # fmt: skip
    assert sum(module.parameters for module in dialog.modules) == 857_216
    assert dialog.plans.lines["fp32"][1] == formatting.size(4 * 857_216)
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
        qtbot.waitUntil(lambda: dialog.plan is not None)
        return dialog.plan

    plan = plan_of([0, 3], 5_000)
    assert (plan.tokens, plan.exact) == (39 * 128, True)
    assert plan.bytes == estimate_bytes(39 * 128, [128, 128])
    assert dialog.tokens_text.text() == "5K" and dialog.disk_text.text() == "≤ 2.52 MB"
    assert dialog.memory_text.text() == formatting.size(sum(plan.parts.values()))
    plan = plan_of([0, 1, 2], 0)
    assert tokens - 2 * 128 < plan.tokens <= tokens
    assert plan.bytes == estimate_bytes(plan.tokens, [128] * 3)
    assert plan.seconds is None and dialog.time_text.text() == "—"
    dialog.sites["mlp_in"].click()
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert dialog.plan.bytes == estimate_bytes(plan.tokens, [128] * 6)
    dialog.max_samples.setValue(20)
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert 0 < dialog.plan.tokens < plan.tokens / 2
    for box in dialog.sites.values():
        box.setChecked(False)
    assert dialog.message.text() == "Select at least one activation type."
    dialog.sites["resid_post"].click()
    dialog.layers.set_selected([])
    assert not dialog.start.isEnabled()
    assert dialog.message.text() == "Select at least one layer."
    dialog.close()


def test_untokenized_dataset_gets_an_estimate(trained: Services) -> None:
    library = trained.library
    library.execute("DELETE FROM feature_runs")
    library.execute("DELETE FROM saes")
    library.execute("DELETE FROM trainings")
    library.execute("DELETE FROM tokenizations")
    dataset, model = library.datasets.all()[0], library.models.all()[0]
    form = ExtractionForm(dataset.id, (point_name("resid_post", 1),), max_tokens=10_000)
    plan = plan_extraction(library, model, form)
    assert (plan.tokens, plan.exact, plan.refusal) == (10_000 // 128 * 128, False, "")


def test_too_small_a_disk_is_refused_as_the_job_would(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = estimate_bytes(39 * 128, [128])
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
    assert "10000 tokens" in plan_extraction(library, model, form).refusal


def test_extraction_from_start_to_finish(qtbot: Any, trained: Services) -> None:
    library = trained.library
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.layers.set_selected([1, 3])
    dialog.max_tokens.setValue(8_000)
    dialog.context.setValue(64)
    qtbot.waitUntil(dialog.start.isEnabled)
    closed: list[int] = []
    dialog.finished.connect(closed.append)
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
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
    assert dialog.plan.seconds is None or dialog.time_text.text().startswith("≈ ")
    dialog.close()
    look_into(qtbot, page, extraction.id)


def look_into(qtbot: Any, page: ModelsPage, extraction_id: int) -> None:
    """Statistics and preview of a stored extraction, by clicks."""
    qtbot.mouseClick(page.cards()[0].rows[0].look, Qt.MouseButton.LeftButton)
    dialog = page.findChild(ExtractionDialog)
    qtbot.waitUntil(lambda: dialog.figures is not None)
    sites = dialog.extraction.statistics["sites"]
    for point, cells in dialog.cells.items():
        assert cells[1] == f"{sites[point]['mean_norm']:,.2f}"
        assert cells[2] == f"{100 * sites[point]['outlier_share']:.2f}%"
    drawn = dialog.chart.points("blocks.1.hook_resid_post")
    assert len(drawn) == 64 and all(norm > 0 for _, norm in drawn)
    shot(dialog, "extraction-statistics")
    dialog.tabs.setCurrentIndex(1)
    qtbot.waitUntil(lambda: dialog.stretch is not None)
    first = dialog.stretch
    assert len(first.tokens) == len(first.values) == 64
    stored = [value for value in first.values if value == value]
    assert 0 < len(stored) < 64 and first.values[0] != first.values[0]  # position 0 is not stored
    mean = sites[dialog.site.value]["mean_norm"]
    assert 0.5 * mean < sum(stored) / len(stored) < 2 * mean
    assert "not stored" in dialog.strip.describe(0) and "norm: " in dialog.strip.describe(5)
    shot(dialog, "extraction-preview")
    qtbot.mouseClick(dialog.next, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: dialog.stretch.number == 1)
    assert dialog.stretch.tokens != first.tokens
    dialog.shown.setCurrentIndex(1)
    dimension = dialog.figures.varied[dialog.site.value][0]
    qtbot.waitUntil(lambda: dialog.stretch.dimension == dimension)
    assert min(value for value in dialog.stretch.values if value == value) < 0
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    dialog.close()


def test_time_is_measured_before_the_start(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    assert dialog.time_text.text() == "—"
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
        qtbot.mouseClick(dialog.measure, Qt.MouseButton.LeftButton)
        assert dialog.start.text() == "Measuring…" and page.job_cards() == {}
    assert ended.args[1] == "finished" and trained.library.extractions.count() == 0
    qtbot.waitUntil(lambda: dialog.plan is not None)
    (batch,) = dialog.presenter._batch_seconds.values()
    assert dialog.plan.measured and dialog.plan.seconds == batch * dialog.plan.batches
    assert "tokens/s" in dialog.time_note.text() and not dialog.measure.isVisible()
    dialog.max_samples.setValue(50)  # another limit: the same batches
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert dialog.plan.measured
    dialog.layers.set_selected([3])  # other work: not measured
    qtbot.waitUntil(lambda: dialog.plan is not None)
    assert not dialog.plan.measured and dialog.measure.isVisible()
    dialog.close()


def test_extraction_is_paused_and_goes_on(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.batch.setValue(1)
    dialog.max_samples.setValue(40)
    qtbot.waitUntil(dialog.start.isEnabled)
    dialog.start.click()
    job_id = dialog.job_id
    jobs = trained.library.jobs
    qtbot.waitUntil(lambda: dialog.pause.isEnabled())
    dialog.pause.click()
    qtbot.waitUntil(lambda: jobs.get(job_id).status == "paused")
    qtbot.waitUntil(lambda: dialog.pause.text() == "Resume" and dialog.pause.isEnabled())
    (card,) = page.job_cards().values()
    qtbot.waitUntil(lambda: card.pause.text() == "Resume")
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
        card.pause.click()
    assert ended.args[1] == "finished"
    dialog.close()


def test_templates_are_saved_and_fit_the_model(qtbot: Any, trained: Services) -> None:
    library = trained.library
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.templates.set_expanded(True)
    rows = {row.template.name: row for row in dialog.templates.rows()}
    assert set(rows) == {"Quick Scan", "Full Analysis"}
    rows["Full Analysis"].load.click()
    assert dialog.layers.selected() == [0, 1, 2, 3]
    assert dialog.selected_sites() == ["resid_post", "mlp_out", "attn_out"]
    assert dialog.max_samples.value() == 0
    rows["Quick Scan"].load.click()
    assert dialog.layers.selected() == [0, 2, 3] and dialog.max_samples.value() == 5000
    dialog.layers.set_selected([1, 2])
    dialog._set_sites(["mlp_in"])
    dialog.max_tokens.setValue(7000)
    dialog.templates.save.click()
    assert re.fullmatch(r"mlp_in_layers1-2_5000samples_\d{4}", dialog.templates.name.text())
    dialog.templates.name.setText("Mine")
    dialog.templates.commit.click()
    saved = library.templates.named("extraction", "Mine")
    assert template_meta(saved.config) == "2 layers • mlp input • 5,000 samples • tiny-llama-0.9m"
    qtbot.waitUntil(lambda: len(dialog.templates.rows()) == 3)
    rows = {row.template.name: row for row in dialog.templates.rows()}
    rows["Quick Scan"].load.click()
    {row.template.name: row for row in dialog.templates.rows()}["Mine"].load.click()
    assert (dialog.layers.selected(), dialog.selected_sites()) == ([1, 2], ["mlp_in"])
    assert (dialog.max_samples.value(), dialog.max_tokens.value()) == (5000, 7000)
    assert fitted_layers([0, 6, 11], 30) == [0, 16, 29]
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    shot(dialog, "extract-templates")
    dialog.close()


def interrupted(library: Library) -> int:
    """The row of an extraction that was killed after its first block."""
    model, dataset = library.models.all()[0], library.datasets.all()[0]
    form = ExtractionForm(dataset.id, (point_name("resid_post", 1),), max_tokens=4000)
    params = asdict(form.job(model.id))
    job_id = library.jobs.submit("extract", "Extract", "compute", params)
    library.jobs.move(job_id, ("queued",), "interrupted")
    (library.checkpoint_folder(job_id) / "extraction" / "train" / "00000").mkdir(parents=True)
    return job_id


def test_interrupted_extraction_goes_on_under_its_own_number(qtbot: Any, trained: Services) -> None:
    library = trained.library
    job_id = interrupted(library)
    page = open_page(qtbot, trained)
    card = page.job_cards()[job_id]
    assert card.again.text() == "Go on" and "can go on" in card.note.text()
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
        qtbot.mouseClick(card.again, Qt.MouseButton.LeftButton)
    assert ended.args == [job_id, "finished"] and library.extractions.count() == 1
    qtbot.waitUntil(lambda: page.job_cards() == {})


def test_dismissing_frees_what_an_interrupted_extraction_kept(
    qtbot: Any, trained: Services
) -> None:
    library = trained.library
    job_id = interrupted(library)
    page = open_page(qtbot, trained)
    qtbot.mouseClick(page.job_cards()[job_id].dismiss, Qt.MouseButton.LeftButton)
    assert page.job_cards() == {} and not library.has_checkpoints(job_id)


def test_a_broken_model_is_not_extracted_unknowingly(qtbot: Any, trained: Services) -> None:
    library = trained.library
    model = library.models.all()[0]
    found = {"verdict": "destroyed", "sentence": "Q2 has destroyed this model.", "delta": None}
    quality = {**model.provenance, "quality": {"q2": found}}
    library.models.update(model.id, precision="q2", provenance=quality)
    page = open_page(qtbot, trained)
    card = page.cards()[0]
    assert card.warning.isVisible() and "destroyed" in card.warning.text()
    dialog = open_extract(qtbot, page)
    assert dialog.warning.isVisible() and "destroyed" in dialog.warning.text()
    assert dialog.memory_note.text().startswith("At Q2")
    shot(dialog, "extract-broken")
    assert cut_off(dialog) == [] and cut_off(page) == []
    shot(page, "models-broken")
    dialog.close()


def test_stopped_extraction_leaves_nothing(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_extract(qtbot, page)
    dialog.layers.select_all.click()
    dialog.batch.setValue(1)
    qtbot.waitUntil(dialog.start.isEnabled)
    with qtbot.waitSignal(trained.jobs.job_finished) as ended:
        dialog.start.click()
        dialog.stop.click()
    assert ended.args[1] == "cancelled"
    assert dialog.message.text() == "Stopped; nothing was stored."
    assert trained.library.extractions.count() == 0
    qtbot.waitUntil(dialog.start.isEnabled)
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
