"""The Steering tab over a real run: search, strengths, a generation that streams, its measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QEvent, QObject, Qt
from PySide6.QtGui import QTextCursor
from PySide6.QtWidgets import QApplication

from mistudio.engine.features.store import FeatureStore
from mistudio.jobs.features import newest_run
from mistudio.library.features import FeatureNote
from mistudio.library.library import Library
from mistudio.library.records import Generation
from mistudio.ui.services import Services
from mistudio.ui.steering.comparison import only_in, runs, token_spans
from mistudio.ui.steering.feature_index import FeatureIndex, search_index
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.request import Chosen
from mistudio.ui.steering.units import share, signed, significant
from mistudio.ui.theme import tokens
from mistudio.ui.widgets.token_strip import heat, heat_colour

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Stubborn

SIZES = [(1280, 720), (1920, 1080)]
PROMPT = "The history of the"


@pytest.fixture
def services(services_of: Callable[[Library], Services], trained_library: Library) -> Services:
    return services_of(trained_library)


def open_page(
    qtbot: Any, services: Services, size: tuple[int, int] = (1280, 720), **context: Any
) -> SteeringPage:
    """The page, once it knows the features."""
    page = SteeringPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    page.activate(**context)
    qtbot.waitUntil(lambda: page.presenter.index is not None)
    return page


def generate(qtbot: Any, services: Services, page: SteeringPage, **settings: Any) -> Generation:
    """Through the form; returns what the library keeps of it."""
    page.configuration.prompt.setPlainText(settings.get("prompt", PROMPT))
    page.configuration.max_tokens.setValue(settings.get("max_tokens", 12))
    with qtbot.waitSignal(services.jobs.job_finished) as ended:
        page.configuration.generate.click()
    record = services.library.jobs.get(ended.args[0])
    assert record.status == "finished", record.error
    return services.library.generations.get(record.result["generation_id"])


def strengths(page: SteeringPage) -> dict[int, float]:
    return {chosen.feature: chosen.strength for chosen in page.presenter.selected}


def strongest(services: Services, page: SteeringPage) -> int:
    """The feature with the largest activation."""
    values = page.presenter.index.max_activations
    return values.index(max(values))


# --- nothing yet ----------------------------------------------------------------------------------


def test_without_a_run_it_says_what_to_do(
    qtbot: Any, services_of: Callable[[Library], Services], library: Library
) -> None:
    page = SteeringPage(services_of(library))
    qtbot.addWidget(page)
    page.show()
    page.activate()
    assert page._empty_card.isVisible() and not page._work.isVisible()
    assert "No completed training jobs available" in page._empty[False].sentence.text()
    page.restore_state(json.loads(json.dumps(page.save_state())))


def test_run_without_features_is_sent_to_discovery(qtbot: Any, services: Services) -> None:
    services.library.execute("DELETE FROM feature_runs")
    page = SteeringPage(services)
    qtbot.addWidget(page)
    page.show()
    assert page._empty_card.isVisible()
    assert page._empty[True].button.text() == "Go to Features"


def test_before_the_first_generation(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    assert [tile.value for tile in page.output.measures.tiles.values()] == ["—"] * 4
    assert page.output.unsteered.text == page.output.steered.text == ""
    assert (
        not page.configuration.generate.isEnabled()
        and page.configuration.reason.text() == "Add at least one feature."
    )
    page.presenter.add(5)
    assert (
        not page.configuration.generate.isEnabled()
        and page.configuration.reason.text() == "Enter a prompt."
    )
    page.configuration.prompt.setPlainText(PROMPT)
    assert page.configuration.generate.isEnabled() and page.configuration.reason.text() == ""
    page.features.cards()[0].box.setValue(0.0)
    assert page.configuration.generate.isEnabled()
    assert "both texts will be the same" in page.configuration.reason.text()


def test_features_that_cannot_be_read_can_be_tried_again(
    qtbot: Any, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "features.npy")

    with monkeypatch.context() as broken:
        broken.setattr("mistudio.ui.steering.presenter.build_index", fail)
        page = SteeringPage(services)
        qtbot.addWidget(page)
        page.show()
        page.activate()
        qtbot.waitUntil(lambda: page._error_place.count() == 1)
    panel = page._error_place.itemAt(0).widget()
    assert "No permission" in panel.accessibleName()
    panel.retry_button.click()
    qtbot.waitUntil(lambda: page.presenter.index is not None)
    assert page._error_place.count() == 0


def test_source_is_named_by_what_it_was_trained_on(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    title = page.configuration.source.currentText()
    assert title.startswith("BatchTopK SAE • tiny-llama-0.9m • intros • Started ")
    assert page.configuration.model.text() == "tiny-llama-0.9m"
    assert page.configuration.layer.text() == "Layer 2 of 0 to 3 • residual stream after the block"
    assert (
        not page.configuration.advanced.chat.isEnabled()
        and "no chat template" in page.configuration.advanced.chat_note.text()
    )


# --- search ---------------------------------------------------------------------------------------


def index_of(*features: tuple[str, tuple[str, ...], float]) -> FeatureIndex:
    tops, promoted, most = zip(*features, strict=True)
    texts = sorted({"", *tops, *(text for some in promoted for text in some)})
    places = [[texts.index(text) for text in (*some, "")[:2]] for some in promoted]
    top = np.array([texts.index(text) for text in tops])
    return FeatureIndex(1, 1, tuple(texts), top, np.array(places), most, False)


def test_search_ranks_number_label_top_token_promoted() -> None:
    index = index_of(
        (" war", (" ships",), 1.0),
        (" the", (" war", " peace"), 2.0),
        (" warm", ("x",), 3.0),
        (" sea", ("y",), 4.0),
        (" dead war", ("z",), 0.0),
    )
    notes = {3: FeatureNote(1, 3, "Civil War battles", "", False)}

    def found(text: str) -> list[int]:
        return list(search_index(index, notes, text).features)

    assert found("war") == [3, 0, 1, 2]
    assert found("#2") == [2] and found("2") == [2]
    assert found("#4") == []  # never fired
    assert found("PEACE") == [1]
    assert found("nothing like it") == []
    deeper = search_index(index, notes, "battles of old", [2])
    assert deeper.features == (2,) and deeper.inside == {2: "in its examples"}
    noted = {1: FeatureNote(1, 1, "", "About battles", False)}
    assert search_index(index, noted, "about", [1]).inside == {1: "in its note"}
    promotes = {1: "promotes “war”", 0: "promotes “ships”"}
    assert search_index(index, notes, "war", [1, 2]).inside == {1: promotes[1]}
    assert search_index(index, notes, "hip").inside == {0: promotes[0]}
    assert index.item(3, notes).text == "Civil War battles"
    assert index.item(1, notes).text == ("fires on “the” • promotes “war”, “peace”")


def test_search_and_add(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    feature = strongest(services, page)
    qtbot.keyClicks(page.features.search, f"#{feature}")
    qtbot.waitUntil(lambda: bool(page.features.found_rows()))
    first = page.features.found_rows()[0]
    assert first.feature == feature
    first.button.click()
    assert strengths(page) == {feature: 0.0}
    assert page.features.title_of_selected.text() == "Selected Features (1)"
    assert not page.features.nothing.isVisible()
    assert page.features.found_rows()[0].button.text() == "Added"
    assert not page.features.found_rows()[0].button.isEnabled()
    page.features.search.clear()
    qtbot.waitUntil(lambda: page.features.found_rows() == [])
    page.features.search.setText("no such token anywhere")
    qtbot.waitUntil(lambda: "No feature matches" in page.features.note.text())


def test_features_worth_a_try_are_offered_while_none_is_selected(
    qtbot: Any, services: Services
) -> None:
    page = open_page(qtbot, services)
    qtbot.waitUntil(lambda: bool(page.features.suggestion_rows()))
    assert page.features.suggestions.isVisible()
    offered = page.features.suggestion_rows()[0].feature
    page.features.search.setText("zzz")
    qtbot.waitUntil(lambda: not page.features.suggestions.isVisible())
    page.features.search.clear()
    qtbot.waitUntil(page.features.suggestions.isVisible)
    page.features.suggestion_rows()[0].button.click()
    assert strengths(page) == {offered: 2.0}
    assert not page.features.suggestions.isVisible()


def test_return_adds_the_first_match(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.features.search.setText("#7")
    qtbot.waitUntil(lambda: bool(page.features.found_rows()))
    qtbot.keyClick(page.features.search, Qt.Key.Key_Return)
    assert list(strengths(page)) == [7]


def test_label_of_a_feature_is_found_as_soon_as_it_is_written(
    qtbot: Any, services: Services
) -> None:
    page = open_page(qtbot, services)
    sae_id = page.presenter.sae_id
    page.presenter.add(9)
    services.library.feature_notes.write(sae_id, 9, label="Kings and queens")
    qtbot.waitUntil(lambda: page.features.cards()[0]._text.text() == "Kings and queens")
    page.features.search.setText("queens")
    qtbot.waitUntil(lambda: [r.feature for r in page.features.found_rows()] == [9])


# --- strength -------------------------------------------------------------------------------------


def test_slider_number_and_units_agree(qtbot: Any, services: Services) -> None:
    library = services.library
    page = open_page(qtbot, services)
    feature = strongest(services, page)
    page.presenter.add(feature, 0.0)
    (card,) = page.features.cards()
    sae = library.saes.all()[0]
    store = FeatureStore(library.path(newest_run(library, sae.id).folder))
    most = float(store.columns["max_activation"][feature])
    median = sae.metrics["median_norm"]
    qtbot.waitUntil(lambda: "—" not in card.units.text())  # its direction is read

    def expect(strength: float) -> None:
        assert card.strength == pytest.approx(strength)
        assert card.slider.value() == round(strength * 100)
        assert strengths(page) == {feature: pytest.approx(strength)}
        raw = strength * most
        sign = "+" if raw > 0 else ""
        percent = abs(raw) / median * 100
        assert card.units.text() == (
            f"= {sign}{significant(raw)} raw • {significant(percent)} % of the norm"
        )

    expect(0.0)
    card.slider.setValue(150)
    expect(1.5)
    card.slider.setValue(-217)  # a drag ends on a tenth
    expect(-2.2)
    card.box.setValue(1.25)  # a number may be finer
    expect(1.25)
    buttons = {
        button.text(): button for button in card.findChildren(type(page.configuration.generate))
    }
    for name, strength in (("Suppress", -2.0), ("Amplify", 2.0), ("Reset", 0.0)):
        buttons[name].click()
        expect(strength)
    qtbot.keyClick(card.slider, Qt.Key.Key_Right)
    expect(0.1)
    card.remove.click()
    assert strengths(page) == {} and page.features.cards() == []


def test_another_tab_sends_a_feature(qtbot: Any, services: Services) -> None:
    sae_id = services.library.saes.all()[0].id
    page = open_page(qtbot, services, sae_id=sae_id, feature=11)
    assert strengths(page) == {11: 2.0}
    page.features.cards()[0].box.setValue(-1.0)
    page.activate(sae_id=sae_id, feature=11)
    assert strengths(page) == {11: -1.0}  # what was chosen is not overwritten


# --- generation -----------------------------------------------------------------------------------


def test_generation_streams_and_ends_with_what_is_stored(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    seen: set[str] = set()
    services.jobs.tick.connect(lambda: seen.add(page.output.steered.text))
    generation = generate(qtbot, services, page, max_tokens=60)
    result, variant = generation.result, generation.result["variants"][0]
    grown = [text for text in seen if text and text != variant["text"]]
    assert grown, "nothing was shown before the end"
    assert (
        page.output.unsteered.text
        == page.output.unsteered.view.toPlainText()
        == result["unsteered"]
    )
    assert page.output.steered.text == page.output.steered.view.toPlainText() == variant["text"]
    assert page.output.steered.text != page.output.unsteered.text
    delta = variant["perplexity"] - variant["perplexity_unsteered"]
    assert {name: tile.value for name, tile in page.output.measures.tiles.items()} == {
        "kl": significant(variant["kl_per_token"]),
        "perplexity": signed(delta),
        "similarity": share(variant["similarity"]),
        "overlap": share(variant["word_overlap"]),
    }
    assert variant["kl_per_token"] > 0
    caption = "Higher uncertainty" if delta > 0 else "Lower uncertainty"
    assert page.output.measures.tiles["perplexity"]._note.text() == caption
    assert page.output.measures.tiles["perplexity"]._value.property("tone") == (
        "red" if delta > 0 else "emerald"
    )
    assert (
        f"over {variant['tokens']} generated tokens" in page.output.measures.tiles["kl"].toolTip()
    )
    assert (
        f"ratio {significant(variant['perplexity_ratio'])}" in page.output.measures.details.text()
    )
    assert (
        not page.busy
        and page.configuration.generate.isEnabled()
        and not page.configuration.stop.isVisible()
    )
    for size in SIZES:
        page.resize(*size)
        assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
        shot(page._page.widget(), f"steering_result-{size[0]}")


def test_strength_zero_changes_nothing(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(3, 0.0)
    generation = generate(qtbot, services, page, max_tokens=20)
    assert page.output.steered.text == page.output.unsteered.text != ""
    assert generation.result["variants"][0]["first_difference"] is None
    assert page.output.measures.tiles["kl"].value in (
        "0",
        "<0.0001",
    )  # two equal rows may differ in the last bit
    assert page.output.measures.tiles["perplexity"].value == "+0.00"
    assert (
        page.output.measures.tiles["similarity"].value
        == page.output.measures.tiles["overlap"].value
        == "100.0%"
    )
    assert page.output.steered.caption.text() == "The same text in both."
    page.output.shade.setChecked(True)  # nothing to shade, nothing to divide by


def test_words_of_one_text_are_underlined_and_common_ones_quiet(
    qtbot: Any, services: Services
) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    generation = generate(qtbot, services, page, max_tokens=40)
    text, other = generation.result["variants"][0]["text"], generation.result["unsteered"]
    cursor = QTextCursor(page.output.steered.view.document())
    places = only_in(text, other)
    assert places
    for start, end in places:
        for place in (start + 1, end):  # a format is that of the character before the cursor
            cursor.setPosition(place)
            assert cursor.charFormat().fontUnderline()
    page.output.shade.setChecked(True)
    kl = generation.result["variants"][0]["kl_by_token"]
    assert page.output.heat._high.text() == f"{significant(max(kl))} nats"
    spans = token_spans(text, generation.result["variants"][0]["pieces"])
    cursor.setPosition(spans[-1][1])
    assert cursor.charFormat().toolTip() == f"Token {len(kl)}: KL {significant(kl[-1])} nats"
    assert cursor.charFormat().background().style() != Qt.BrushStyle.NoBrush
    page.output.shade.setChecked(False)
    services.settings.set("token_colours", "safe")  # the map of all token heat
    page.output.shade.setChecked(True)
    behind = heat_colour(heat(kl[-1], max(kl)), tokens.CARD, "safe")
    cursor = QTextCursor(page.output.steered.view.document())
    cursor.setPosition(spans[-1][1])
    assert cursor.charFormat().background().color().name() == behind.lower()
    page.output.shade.setChecked(False)
    cursor = QTextCursor(page.output.steered.view.document())
    cursor.setPosition(spans[-1][1])
    assert cursor.charFormat().background().style() == Qt.BrushStyle.NoBrush


def test_stop_ends_a_generation_and_keeps_what_is_shown(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 2.0)
    page.configuration.prompt.setPlainText(PROMPT)
    page.configuration.max_tokens.setValue(480)
    page.activateWindow()
    page.configuration.generate.setFocus()
    page.configuration.generate.click()
    assert (
        page.configuration.generate.text() == "Generating…"
        and not page.configuration.generate.isEnabled()
    )
    assert page.focusWidget() is page.configuration.stop
    qtbot.waitUntil(lambda: bool(page.output.steered.text))
    assert not page.output.steered.visibleRegion().isEmpty()  # scrolled to where it is written
    with qtbot.waitSignal(services.jobs.job_finished, timeout=10_000) as ended:
        page.configuration.stop.click()
    assert ended.args[1] == "cancelled"
    assert page.focusWidget() is page.configuration.generate
    assert services.library.generations.count() == 0
    assert (
        page.configuration.generate.isEnabled()
        and page.configuration.generate.text() == "Generate Comparison"
    )
    assert page.output.steered.text != ""
    assert "Stopped" in page.output.measures.details.text()
    assert [tile.value for tile in page.output.measures.tiles.values()] == ["—"] * 4


def test_generation_that_waits_says_for_what(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(3)
    page.configuration.prompt.setPlainText(PROMPT)
    page.configuration.max_tokens.setValue(4)
    Stubborn.release.clear()
    services.jobs.submit(Stubborn())
    try:
        page.configuration.generate.setFocus()
        page.configuration.generate.click()
        assert page.focusWidget() is page.configuration.stop
        page.features.search.setFocus()
        qtbot.waitUntil(
            lambda: "Waits for “Stubborn”" in page.output.steered.view.placeholderText(),
        )
    finally:
        Stubborn.release.set()
    qtbot.waitUntil(lambda: services.library.generations.count() == 1)
    qtbot.waitUntil(lambda: not page.busy)
    assert page.focusWidget() is page.features.search  # the end does not take the focus away


def test_failure_is_said_with_its_next_step(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(3)
    services.library.execute("UPDATE saes SET folder = 'trainings/gone'")
    page.configuration.prompt.setPlainText(PROMPT)
    with qtbot.waitSignal(services.jobs.job_finished) as ended:
        page.configuration.generate.click()
    record = services.library.jobs.get(ended.args[0])
    assert record.status == "failed"
    panel = page._error_place.itemAt(0).widget()
    assert record.error["title"] in panel.accessibleName()
    assert record.error["next_step"] in panel.accessibleName()
    assert page.configuration.generate.isEnabled()


def test_copy_takes_the_text(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    assert not page.output.steered.copy.isEnabled()
    page.presenter.add(strongest(services, page), 3.0)
    generate(qtbot, services, page)
    page.output.steered.copy.click()
    assert QApplication.clipboard().text() == page.output.steered.text
    page.output.unsteered.copy.click()
    assert QApplication.clipboard().text() == page.output.unsteered.text


def test_earlier_generation_comes_back_whole(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    feature = strongest(services, page)
    page.presenter.add(feature, 3.0)
    page.configuration.temperature.setValue(1.1)
    page.configuration.advanced.seed.setValue(5)
    first = generate(qtbot, services, page)
    page.presenter.set_selected([Chosen(page.presenter.sae_id, 3, -1.0)])
    page.configuration.temperature.setValue(0.2)
    page.configuration.advanced.seed.setValue(6)
    generate(qtbot, services, page, prompt="Another prompt")
    assert [row.button.text() for row in page.history.rows()] == ["Shown", "Load again"]
    assert page.history.isVisible()
    page.history.rows()[1].button.click()
    assert page.configuration.prompt.toPlainText() == PROMPT
    assert (page.configuration.temperature.value(), page.configuration.advanced.seed.value()) == (
        1.1,
        5,
    )
    assert strengths(page) == {feature: 3.0}
    assert page.output.steered.text == first.result["variants"][0]["text"]
    assert page.output.measures.tiles["kl"].value == significant(
        first.result["variants"][0]["kl_per_token"]
    )
    assert [row.button.text() for row in page.history.rows()] == ["Load again", "Shown"]


def test_list_of_earlier_generations_grows_without_being_made_anew(
    qtbot: Any, services: Services
) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    first = generate(qtbot, services, page)
    (old,) = page.history.rows()
    broken = {"variants": [{"kl_per_token": float("nan")}]}  # of a library from elsewhere
    services.library.generations.add(sae_id=first.sae_id, request=first.request, result=broken)
    generate(qtbot, services, page)
    assert page.history.rows()[2] is old and len(page.history.rows()) == 3
    kl = significant(first.result["variants"][0]["kl_per_token"])
    assert f"KL {kl} nats per token" in old._facts.text()
    assert "KL — nats per token" in page.history.rows()[1]._facts.text()
    services.library.generations.remove(first.id)
    qtbot.waitUntil(lambda: len(page.history.rows()) == 2)
    assert old not in page.history.rows()


def test_cells_of_the_table_are_made_once(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    page.configuration.advanced.scales.set_values((1.0, 2.0, 3.0))
    generate(qtbot, services, page)
    measures = page.output.measures
    cells = dict(measures._cells)
    page.configuration.advanced.scales.set_values((1.0, 2.0))
    generation = generate(qtbot, services, page)
    assert measures._cells == cells
    shown = {line for (line, _), cell in cells.items() if not cell.isHidden()}
    assert shown == {0, 1, 2}
    kl = significant(generation.result["variants"][1]["kl_per_token"])
    assert cells[2, 1].text() == kl


def test_result_of_other_settings_says_so(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    feature = strongest(services, page)
    page.presenter.add(feature, 3.0)
    said = page.output.outdated
    assert said.isHidden()
    generate(qtbot, services, page)
    assert said.isHidden()
    (card,) = page.features.cards()
    card.box.setValue(1.0)
    assert said.isVisible() and f"#{feature} × +3" in said.text()
    card.box.setValue(3.0)
    assert said.isHidden()
    for change in (
        lambda: page.configuration.prompt.setPlainText("Else"),
        lambda: page.configuration.max_tokens.setValue(13),
        lambda: page.configuration.advanced.seed.setValue(9),
        lambda: page.presenter.add(3),
        lambda: page.features.cards()[0].method.set_value("clamp"),
    ):
        change()
        assert said.isVisible()
        page.history.rows()[0].opened.emit(page.output.shown.id)
        assert said.isHidden()
    page.features.cards()[0].box.setValue(2.0)
    generate(qtbot, services, page)
    assert said.isHidden()


class Frames(QObject):
    """What a value was in each frame that was painted; between frames layouts may be half done."""

    def __init__(self, value: Callable[[], int]) -> None:
        super().__init__()
        self.value, self.seen = value, set[int]()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Paint:
            self.seen.add(self.value())
        return False


def test_nothing_moves_when_a_generation_begins_or_ends(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    page.configuration.prompt.setPlainText(PROMPT)
    page.configuration.max_tokens.setValue(60)
    qtbot.wait(50)
    before = page.views.y()
    assert before > 0
    frames = Frames(page.views.y)
    QApplication.instance().installEventFilter(frames)
    page.configuration.generate.click()
    qtbot.waitUntil(lambda: page.configuration.progress.times_text != "")
    qtbot.waitUntil(lambda: not page.busy)
    qtbot.wait(50)
    QApplication.instance().removeEventFilter(frames)
    assert frames.seen == {before} and page.views.y() == before


def test_a_result_is_laid_out_at_once(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    generation = generate(qtbot, services, page)
    page._show_result(None)
    qtbot.wait(50)
    page.reopen(generation.id)  # higher than what was shown: a frame could follow now
    at_once = page.views.y(), page._page.widget().height()
    qtbot.wait(50)
    assert (page.views.y(), page._page.widget().height()) == at_once


def test_state_survives(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.presenter.add(strongest(services, page), 3.0)
    page.configuration.temperature.setValue(0.9)
    page.configuration.advanced.top_p.setValue(0.95)
    page.output.shade.setChecked(True)
    generation = generate(qtbot, services, page)
    page.presenter.add(7, -1.5)
    page.configuration.prompt.setPlainText("Changed since")
    state = json.loads(json.dumps(page.save_state()))
    again = open_page(qtbot, services)
    again.restore_state(state)
    assert again.form() == page.form()
    assert again.presenter.selected == page.presenter.selected
    assert [card.key for card in again.features.cards()] == [c.key for c in page.presenter.selected]
    assert again.output.steered.text == generation.result["variants"][0]["text"]
    assert again.save_state() == state
    qtbot.waitUntil(lambda: again.presenter.index is not None)
    for broken in ({}, {"selections": {"x": 1}, "sae_id": 99, "generation_id": 99}):
        again.restore_state(broken)


def test_tab_goes_through_what_was_added_later_in_its_place(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    page.configuration.advanced.set_expanded(True)
    page.configuration.advanced.place.set_value("spread")
    page.configuration.advanced.scales.add.click()
    page.presenter.add(strongest(services, page), 2.0)
    page.presenter.add(7, -1.5)
    page.configuration.prompt.setPlainText(PROMPT)
    first, second = page.features.cards()
    qtbot.waitUntil(second.isVisible)
    page.features.search.setFocus()
    walked = [page.focusWidget()]
    while walked[-1] is not page.output.steered.view and len(walked) < 60:
        qtbot.keyClick(walked[-1], Qt.Key.Key_Tab)
        walked.append(page.focusWidget())
    form, advanced = page.configuration, page.configuration.advanced
    expected = [
        first.remove, first.box, first.slider, first.more, second.box, second.more, form.source,
        form.prompt, form.generate, advanced.seed, *advanced.scales.boxes, advanced.control,
        advanced.place, advanced.layers.buttons[2], advanced.scope, page.views,
        page.output.steered.view,
    ]  # fmt: skip
    assert [widget for widget in walked if widget in expected] == expected


@pytest.mark.parametrize("size", SIZES)
def test_form_can_be_read(qtbot: Any, services: Services, size: tuple[int, int]) -> None:
    page = open_page(qtbot, services, size)
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    shot(page, f"steering_empty-{size[0]}")
    page.presenter.add(strongest(services, page), 2.0)
    page.presenter.add(7, -1.5)
    page.features.search.setText("the")
    qtbot.waitUntil(lambda: bool(page.features.found_rows()))
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    assert page._page.horizontalScrollBar().maximum() == 0
    shot(page, f"steering_form-{size[0]}")


# --- comparing texts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("ab cd", ["ab", " cd"], [(0, 2), (2, 5)]),
        ("a b", ["a", "b"], [(0, 1), (2, 3)]),  # the space was lost in decoding
        ("x é y", ["x", " \ufffd", "\ufffd", " y"], [(0, 1), (1, 3), (3, 3), (3, 5)]),
        ("é", ["\ufffd", "\ufffd"], [(0, 1), (1, 1)]),
        ("", [], []),
    ],
)
def test_tokens_are_found_in_the_text(
    text: str, pieces: list[str], expected: list[tuple[int, int]]
) -> None:
    assert token_spans(text, pieces) == expected


def test_runs_make_up_the_text_and_mark_what_differs() -> None:
    pieces = [" one", " two", " red", " fish"]
    found = runs(" one two red fish", " one two blue fish", pieces, 2)
    assert "".join(run.text for run in found) == " one two red fish"
    assert [run.text for run in found if run.only_here] == ["red"]
    assert "".join(run.text for run in found if run.common) == " one two"
    assert {run.text.strip(): run.token for run in found if run.text.strip()} == {
        "one": 0, "two": 1, "red": 2, "fish": 3,
    }  # fmt: skip
    assert all(run.common and not run.only_here for run in runs("a b", "a b", ["a", " b"], None))
    assert runs("", "", [], None) == []


def test_numbers_carry_three_digits_and_no_more() -> None:
    values = (0.0, 0.02346, 0.1234, 1.2345, 12.345, 123.45, 1234.5, -7.528, float("nan"), None)
    assert [significant(value) for value in values] == [
        "0", "0.0235", "0.123", "1.23", "12.3", "123", "1,234", "-7.53", "—", "—",
    ]  # fmt: skip
    assert [signed(v) for v in (2.3, -0.414, 0.0, 15_234.1, float("inf"))] == [
        "+2.30", "-0.41", "+0.00", "+15,234", "—",
    ]  # fmt: skip
    assert share(0.8666) == "86.7%" and share(float("nan")) == "—"
