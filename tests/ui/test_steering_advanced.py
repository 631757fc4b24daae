"""The Steering tab's second look: methods, layers, scopes, strengths side by side, calibration."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import Qt
from PySide6.QtGui import QTextCursor

from mistudio.engine.sae.files import load_sae
from mistudio.engine.steering import calibration
from mistudio.jobs.control import Snapshot
from mistudio.jobs.features import newest_run
from mistudio.library.library import Library
from mistudio.library.records import Generation
from mistudio.library.steering import Calibration
from mistudio.ui.services import Services
from mistudio.ui.steering.advanced import SPREAD
from mistudio.ui.steering.calibrating import Calibrating, calibrating, range_text, recommended
from mistudio.ui.steering.comparison import token_spans
from mistudio.ui.steering.directions import length
from mistudio.ui.steering.feature_card import NOT_CALIBRATED
from mistudio.ui.steering.feature_index import OLD_DISCOVERY
from mistudio.ui.steering.layer_strengths import shares
from mistudio.ui.steering.measures import repetition_warning
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.prompt_tokens import PART
from mistudio.ui.steering.request import Chosen, Form, from_request, names, to_job
from mistudio.ui.steering.units import significant

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot
from .small_jobs import Stubborn

PROMPT = "The history of the"
SIZES = [(1280, 720), (1920, 1080)]


@pytest.fixture
def services(services_of: Callable[[Library], Services], trained_library: Library) -> Services:
    return services_of(trained_library)


@pytest.fixture
def page(qtbot: Any, services: Services) -> SteeringPage:
    made = SteeringPage(services)
    qtbot.addWidget(made)
    made.resize(*SIZES[0])
    made.show()
    made.activate()
    qtbot.waitUntil(lambda: made.presenter.index is not None)
    return made


def strongest(page: SteeringPage) -> int:
    assert page.presenter.index is not None
    values = page.presenter.index.max_activations
    return values.index(max(values))


def generate(qtbot: Any, page: SteeringPage, max_tokens: int = 12) -> Generation:
    page.configuration.prompt.setPlainText(PROMPT)
    page.configuration.max_tokens.setValue(max_tokens)
    jobs, library = page._services.jobs, page._services.library
    assert page.configuration.generate.isEnabled(), page.configuration.reason.text()
    with qtbot.waitSignal(jobs.job_finished) as ended:
        page.configuration.generate.click()
    record = library.jobs.get(ended.args[0])
    assert record.status == "finished", record.error
    return library.generations.get(record.result["generation_id"])


def copy_row(
    library: Library, table: str, row_id: int, folder: str, values: dict[str, str]
) -> None:
    """A row again, with some values of its own, and its folder."""
    shutil.copytree(library.path(folder), library.path(f"{folder}-again"))
    columns = [row["name"] for row in library.rows(f"PRAGMA table_info({table})")]
    values = {**values, "folder": f"'{folder}-again'"}
    chosen = ", ".join(values.get(name, name) for name in columns)
    library.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {chosen} FROM {table} WHERE id = ?",
        (row_id,),
    )


def second_sae(library: Library) -> int:
    """Another run's SAE of the same model, discovered too."""
    first = library.saes.all()[0]
    run = newest_run(library, first.id)
    copied = {"hook_point": "'blocks.1.hook_resid_post'", "layer": "1", "id": "NULL"}
    copied["hook_point_out"] = copied["hook_point"]
    copy_row(library, "saes", first.id, first.folder, copied)
    other = max(sae.id for sae in library.saes.all())
    copy_row(library, "feature_runs", run.id, run.folder, {"sae_id": str(other), "id": "NULL"})
    return other


# --- methods and layers ---------------------------------------------------------------------------


def test_a_method_changes_what_the_card_says_and_what_is_asked(
    qtbot: Any, page: SteeringPage
) -> None:
    feature = strongest(page)
    page.presenter.add(feature, 2.0)
    (card,) = page.features.cards()
    assert not card.details.isVisibleTo(card)
    card.more.click()
    assert card.details.isVisibleTo(card)
    card.method.set_value("ablate")
    assert "taken away" in card.units.text() and not card.slider.isEnabled()
    assert not card.calibrate.isEnabled()
    card.method.set_value("scale")
    assert "1 changes nothing" in card.units.text() and card.box.suffix() == " ×"
    assert card.range.text() == NOT_CALIBRATED
    for button, value in zip(card.quick, (0.0, 1.0, 2.0), strict=True):  # Reset changes nothing
        button.click()
        assert card.strength == value and f"{value:.1f}" in button.toolTip()
    card.method.set_value("clamp")
    assert "raw" in card.units.text() and card.calibrate.isEnabled()
    generation = generate(qtbot, page)
    assert generation.request["features"] == [[feature, 2.0, "clamp"]]
    assert f"#{feature} clamp × +2" in page.output.measures.details.text()
    for method in range(card.method.count()):
        assert card.method.itemData(method, Qt.ItemDataRole.ToolTipRole)


def test_features_of_another_layer_steer_together(
    qtbot: Any, services_of: Callable[[Library], Services], trained_library: Library
) -> None:
    other = second_sae(trained_library)
    page = SteeringPage(services_of(trained_library))
    qtbot.addWidget(page)
    page.show()
    page.activate(sae_id=1)
    qtbot.waitUntil(lambda: page.presenter.index is not None)
    feature = strongest(page)
    page.presenter.add(feature, 1.0)
    page.configuration.source.set_value(other)
    qtbot.waitUntil(lambda: page.presenter.index is not None)
    page.presenter.add(feature, -1.0)
    assert [c.key for c in page.presenter.selected] == [(1, feature), (other, feature)]
    first, second = page.features.cards()
    qtbot.waitUntil(lambda: first._text.text().startswith("Layer 2 • "))
    assert not second._text.text().startswith("Layer")
    request = to_job(Form(prompt="x"), page.presenter.selected, other)
    assert (request.sae_id, request.others) == (other, ([1, feature, 1.0, "add"],))
    assert from_request({**request.__dict__})[0] == [
        Chosen(other, feature, -1.0),
        Chosen(1, feature, 1.0),
    ]
    first.remove.click()
    assert [c.key for c in page.presenter.selected] == [(other, feature)]


def test_one_vector_at_chosen_layers(qtbot: Any, page: SteeringPage) -> None:
    advanced = page.configuration.advanced
    advanced.set_expanded(True)
    page.presenter.add(strongest(page), 1.0)
    page.configuration.prompt.setPlainText(PROMPT)
    assert not advanced.layers.isVisible() and not advanced.bars.isVisible()
    advanced.place.set_value(SPREAD)
    assert advanced.layers.isVisible() and advanced.bars.isVisible()
    assert advanced.layers.selected() == [2]  # where the SAE is
    advanced.layers.set_selected([1, 2])
    qtbot.waitUntil(lambda: page.presenter.percent() is not None)
    percent = page.presenter.percent()
    norm = page._services.library.saes.all()[0].metrics["median_norm"]
    here, there = advanced.bars.shown
    assert (here.layer, here.raw) == (1, None)  # no run measured that layer's norm
    assert there.raw == pytest.approx(percent / 100 * norm / 2**0.5)
    assert "layer 1: —" in advanced.bars.accessibleName()
    generation = generate(qtbot, page)
    assert generation.request["layers"] == [1, 2]
    norms = generation.result["layer_norms"]
    here, there = advanced.bars.shown  # now that layer's norm is known
    assert here.raw == pytest.approx(percent / 100 * norms["1"] / 2**0.5)
    page.features.cards()[0].method.set_value("ablate")
    assert "needs added features of one SAE" in page.configuration.reason.text()
    page.features.cards()[0].method.set_value("add")
    advanced.layers.set_selected([])
    assert "Choose at least one intervention layer" in page.configuration.reason.text()


def test_several_features_add_up_to_the_length_of_their_sum(qtbot: Any, page: SteeringPage) -> None:
    sae = page._services.library.saes.all()[0]
    first, second = strongest(page), 3 if strongest(page) != 3 else 4
    page.presenter.add(first, 1.0)
    page.presenter.add(second, -2.0)
    qtbot.waitUntil(lambda: page.presenter.percent() is not None)
    rows = load_sae(page._services.library.path(sae.folder)).dictionary.decoder
    largest = page.presenter.index.max_activations
    total = largest[first] * rows[first] - 2 * largest[second] * rows[second]
    expected = 100 * float(total.norm()) / sae.metrics["median_norm"]
    assert page.presenter.percent() == pytest.approx(expected, rel=1e-5)
    page.features.cards()[0].method.set_value("clamp")  # whose size depends on the text
    assert page.presenter.percent() is None


def test_length_of_a_direction_in_normalised_activations() -> None:
    vector = np.array([0.0, 3.0, 4.0, 0.0])
    assert length(vector, False, None) == 5.0
    assert length(vector, True, 8.0) == pytest.approx(5.0 * 8.0 / 2)
    assert length(vector, True, None) is None


def test_shares_of_layers() -> None:
    found = shares([0, 3], 50.0, {0: 10.0, 3: 40.0})
    assert [s.raw for s in found] == pytest.approx([5 / 2**0.5, 20 / 2**0.5])
    assert [s.raw for s in shares([0], None, {0: 10.0})] == [None]


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_of_the_prompt_are_picked(qtbot: Any, page: SteeringPage) -> None:
    advanced = page.configuration.advanced
    advanced.set_expanded(True)
    page.presenter.add(strongest(page), 2.0)
    page.configuration.prompt.setPlainText(PROMPT)
    advanced.scope.set_value("chosen")
    picker = advanced.picker
    qtbot.waitUntil(lambda: bool(picker.read.ids))
    assert "Choose the prompt tokens" in page.configuration.reason.text()
    picker.strip.token_activated.emit(0)
    assert picker.positions == () and "never steered" in picker.note.text()
    picker.strip.setFocus()
    for key in (Qt.Key.Key_Right, Qt.Key.Key_Right, Qt.Key.Key_Right, Qt.Key.Key_Space):
        qtbot.keyClick(picker.strip, key)
    assert picker.positions == (2,)
    assert "not chosen" in picker.strip.describe(1) and "chosen" in picker.strip.describe(2)
    shot(page._page.widget(), "steering_tokens-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    qtbot.waitUntil(lambda: squeezed(page) == [])
    assert generate(qtbot, page).request["positions"] == [2]
    read = picker.read
    page.configuration.prompt.setPlainText("The histories of " + PROMPT)
    qtbot.waitUntil(lambda: picker.read is not read)
    assert all(  # what was chosen after the change is not the same token any more
        picker.read.ids[place] == read.ids[place] for place in picker.positions
    )


def test_characters_of_several_tokens_stand_at_the_last(qtbot: Any, page: SteeringPage) -> None:
    prompt = "Tea 🙂, 漢字!"
    page.presenter.add(strongest(page), 2.0)
    page.configuration.prompt.setPlainText(prompt)
    page.configuration.advanced.scope.set_value("chosen")
    picker = page.configuration.advanced.picker
    qtbot.waitUntil(lambda: bool(picker.read.ids))
    texts = picker.read.texts
    assert PART in texts and "".join(t for t in texts if t != PART).endswith(prompt)
    assert len(texts) == len(picker.read.ids)


# --- strengths side by side -----------------------------------------------------------------------


def test_strengths_and_control_side_by_side(qtbot: Any, page: SteeringPage) -> None:
    advanced = page.configuration.advanced
    advanced.set_expanded(True)
    page.presenter.add(strongest(page), 2.0)
    for _ in range(3):
        advanced.scales.add.click()
    assert not advanced.scales.add.isVisible()
    assert advanced.scales.values == (1.0, 0.5, 2.0, 1.5)
    advanced.scales.set_values((0.25, 0.5, 1.0, 3.0))
    advanced.control.setChecked(True)
    page.output.shade.setChecked(True)
    generation = generate(qtbot, page, 16)
    panes = page.output.grid.panes
    assert [pane.title for pane in panes] == [
        "Unsteered (Baseline)", "Steered × 0.25", "Steered × 0.5", "Steered × 1", "Steered × 3",
        "Random direction (control)",
    ]  # fmt: skip
    variants = generation.result["variants"]
    assert [pane.text for pane in panes[1:]] == [variant["text"] for variant in variants]
    measures = page.output.measures
    assert measures.table.isVisible() and measures.which.isVisible()
    assert measures.tiles["kl"].value == significant(variants[0]["kl_per_token"])
    measures.which.set_value(3)
    assert measures.tiles["kl"].value == significant(variants[3]["kl_per_token"])
    most = max(max(variant["kl_by_token"]) for variant in variants)
    assert page.output.heat.isVisible() and page.output.heat.most == most
    # The first token that differs is marked, in both texts.
    for variant, pane, pieces in (
        (variants[3], panes[4], variants[3]["pieces"]),
        (variants[3], panes[0], generation.result["unsteered_pieces"]),
    ):
        end = token_spans(pane.text, pieces)[variant["first_difference"]][1]
        cursor = QTextCursor(pane.view.document())
        cursor.setPosition(end)
        assert cursor.charFormat().fontOverline()
        assert "first token that differs" in cursor.charFormat().toolTip()
    assert [t for t in [page.history.rows()[0]] if "Shown" in t.button.text()]
    for size in SIZES:
        page.resize(*size)
        shot(page._page.widget(), f"steering_side-by-side-{size[0]}")
        assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
        assert page._page.horizontalScrollBar().maximum() == 0
    # One strength again: two panes.
    advanced.scales.set_values((1.0,))
    advanced.control.setChecked(False)
    generate(qtbot, page, 2)
    assert [pane.title for pane in page.output.grid.panes] == ["Unsteered (Baseline)", "Steered"]
    page.history.rows()[1].button.click()
    assert len(page.output.grid.panes) == 6
    assert advanced.scales.values == (0.25, 0.5, 1.0, 3.0) and advanced.control.isChecked()


def test_rows_are_named_by_what_they_are() -> None:
    assert names({}) == ["Steered"] == names({"scales": [1.0]})
    assert names({"scales": [1.0, -2.0], "control": True}) == [
        "Steered × 1", "Steered × -2", "Random direction (control)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("now", "before", "run", "told"),
    [
        (0.95, 0.96, 1, ""),
        (0.80, 0.96, 1, "somewhat"),
        (0.50, 0.96, 1, "It repeats itself:"),
        (0.95, 0.96, 12, "12 times in a row"),
        (None, 0.96, 1, ""),
    ],
)
def test_repetition_is_called_out(now: float, before: float, run: int, told: str) -> None:
    found = repetition_warning(
        {"distinct_2": now, "distinct_2_unsteered": before, "longest_run": run}
    )
    assert (told in found) if told else found == ""


# --- how strong -----------------------------------------------------------------------------------

TRIED = [(0.5, "green"), (1.0, "green"), (2.0, "amber"), (3.0, "red")]


def calibrate(library: Library, sae_id: int, feature: int, recommended: float = 1.0) -> None:
    rows = [
        {
            "strength": s,
            "zone": zone,
            "kl": s / 4,
            "own_probability": 0.02 * s,
            "own_probability_unsteered": 0.01,
        }
        for s, zone in TRIED
    ]
    library.calibrations.write(
        sae_id,
        feature,
        "add",
        site={"hook_point": "blocks.2.hook_resid_post", "layer": 2},
        recommended=recommended,
        s_max=3.0,
        curve={"tried": rows, "prompts": ["a", "b"], "new_tokens": 32},
    )


def test_zones_are_words_and_bands_once_they_are_measured(qtbot: Any, page: SteeringPage) -> None:
    feature, sae_id = strongest(page), page.presenter.sae_id
    page.presenter.add(feature, 0.75)
    (card,) = page.features.cards()
    card.more.click()
    qtbot.waitUntil(card.isVisible)
    assert not card.badge.isVisible() and card.range.text() == "Safe strength: — (not measured)"
    assert card.score.text() == "Output score: —"
    assert card.best.text() == "Calibrate"
    calibrate(page._services.library, sae_id or 0, feature)
    qtbot.waitUntil(card.badge.isVisible)
    for strength, word in ((0.75, "Safe"), (1.5, "Strong"), (2.5, "Breaks"), (4.0, "Breaks")):
        card.box.setValue(strength)
        assert card.badge.text() == word
    card.box.setValue(-1.0)
    assert not card.badge.isVisible()  # suppression was not measured
    told = "Recommended: +1 × max (its own tokens 2.0 times as likely) • breaks from +3 on"
    assert card.range.text() == told
    assert "2 neutral prompts, 32 tokens each" in card.range.toolTip()
    assert (
        "+2 × max: Strong • KL 0.500 • own tokens 4.0 % (unsteered 1.0 %)" in card.range.toolTip()
    )
    assert card.best.text() == "Recommended" and "+1" in card.best.toolTip()
    card.best.click()
    assert page.presenter.selected[0].strength == card.strength == 1.0
    calibrate(page._services.library, sae_id or 0, feature, 0.0)
    qtbot.waitUntil(lambda: not card.best.isEnabled())
    assert card.best.toolTip().startswith("No strength that was tried is safe")
    card.box.setValue(1.5)
    qtbot.waitUntil(lambda: cut_off(page) == squeezed(page) == [])
    assert nameless(page) == []
    shot(page, "steering_calibrated-1280")
    card.method.set_value("clamp")  # which has a calibration of its own
    assert not card.badge.isVisible()


def test_calibrate_measures_the_feature(
    qtbot: Any, page: SteeringPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "STRENGTHS", (1.0, 3.0))
    monkeypatch.setattr(calibration, "PROMPTS", ("Yesterday I", "In this", "From the first of"))
    feature, calibrations = strongest(page), page._services.library.calibrations
    page.presenter.add(feature, 1.0)
    (card,) = page.features.cards()
    card.more.click()
    seen = []

    def look() -> None:
        if calibrations.of_feature(card.key[0], feature) is None:
            seen.append((card.range.text(), card.slider.zones))

    page._services.jobs.tick.connect(look)
    with qtbot.waitSignal(page._services.jobs.job_finished):
        card.calibrate.click()
        assert card.calibrate.text() == "Stop" and card.badge.text() == "Calibrating 0 %"
        assert card.slider.zones == []
    text, zones = next((text, zones) for text, zones in seen if "so far" in text)
    assert text.startswith("Calibrating: ") and zones  # drawn before it ended
    qtbot.waitUntil(lambda: card.calibrate.text() == "Calibrate again")
    assert "not measured" not in card.range.text() and "—" not in card.score.text()


def test_a_calibration_says_what_it_waits_for_and_can_be_stopped(
    qtbot: Any, page: SteeringPage
) -> None:
    page.presenter.add(strongest(page), 1.0)
    (card,) = page.features.cards()
    card.more.click()
    Stubborn.release.clear()
    page._services.jobs.submit(Stubborn())
    try:
        card.best.click()
        assert not card.best.isVisible()
        qtbot.waitUntil(lambda: "Waits for “Stubborn”" in card.range.text())
        card.calibrate.click()
        assert not page.presenter.is_calibrating
        assert card.calibrate.text() == "Calibrate" and not card.badge.isVisible()
    finally:
        Stubborn.release.set()


def test_what_a_calibration_that_runs_knows() -> None:
    chosen, known = Chosen(1, 7, -1.0), {}
    row = {"strength": 0.5, "zone": "green"}

    def at(fraction: float, rows: list[dict[str, Any]]) -> Calibrating:
        snapshot = Snapshot(1, "calibrate", 0, 1, fraction, 1.0, 22.0, {"tried": rows})
        return calibrating(chosen, snapshot, known, "")

    assert calibrating(chosen, None, known, "").text == "Calibrating: loading the model…"
    first = at(0.2, [row, row | {"strength": 1.0, "zone": "red"}])
    assert first.text == (
        "Calibrating: 20 %, about 20 s left • so far safe up to +0.5 × max, breaks from +1 on"
    )
    second = at(0.6, [row | {"strength": -0.5, "zone": "amber"}])  # the other sign comes after it
    assert second.so_far.zones() == [
        (-0.5, 0.0, "amber"), (0.0, 0.5, "green"), (0.5, 5.0, "red"),
    ]  # fmt: skip


def test_what_is_recommended_and_why_not() -> None:
    def told(up: float, safe: float, suppress: dict[str, Any] | None = None) -> Calibration:
        curve = {"tried": [{"strength": up}], "safe": safe, "suppress": suppress}
        return Calibration(1, 7, "add", {}, up, None, curve, "")

    end = " • breaks at none that was tried"
    assert range_text(told(0.5, 0.5)) == f"Recommended: +0.5 × max{end}"  # an old one's row
    still = f"Safe up to +2 × max, but its own tokens do not become likelier{end}"
    assert range_text(told(0.0, 2.0)) == still
    assert range_text(told(0.0, 0.0)) == f"No strength that was tried is safe{end}"
    down = {
        "tried": [{"strength": -1.0, "own_probability": 0.1, "own_probability_unsteered": 0.2}],
        "recommended": -1.0,
        "s_max": -3.0,
    }
    both = told(0.0, 2.0, down)
    assert range_text(both) == (
        f"Amplified • {still}\nSuppressed • Recommended: -1 × max (its own tokens 0.50 times as "
        "likely) • breaks from -3 on"
    )
    assert recommended(both, 1.0) == recommended(both, -1.0) == -1.0
    assert recommended(told(0.5, 0.5, down), 1.0) == 0.5
    assert recommended(told(0.5, 0.5), -1.0) == 0.5 and recommended(None, 1.0) == 0.0


def test_output_scores_lead_to_features_that_steer(qtbot: Any, page: SteeringPage) -> None:
    library = page._services.library
    assert page.presenter.score(5) is None
    qtbot.waitUntil(lambda: bool(page.features.suggestion_rows()))
    run = newest_run(library, page.presenter.sae_id or 0)
    for feature, score in ((5, 0.2), (9, 0.9)):
        result = {"score": score, "probability": score, "rank": 0}
        library.feature_analyses.put(run.id, feature, "output_score", {}, result)
    qtbot.waitUntil(lambda: [row.feature for row in page.features.suggestion_rows()] == [9, 5])
    assert page.features.suggestion_rows()[0].score.text() == "score 0.90"
    assert not page.features.best.isVisible()


# --- search, history ------------------------------------------------------------------------------


def test_descriptions_are_searched_and_an_old_discovery_says_that_it_has_none(
    qtbot: Any, page: SteeringPage
) -> None:
    library = page._services.library
    page.features.search.setText("spelling")  # a word that only rules use
    qtbot.waitUntil(lambda: bool(page.features.found_rows()))
    qtbot.waitUntil(lambda: "spelling" in page.features.found_rows()[0].text.text())
    folder = library.path(newest_run(library, page.presenter.sae_id or 0).folder)
    (index,) = folder.glob("*.sqlite*") if any(folder.glob("*.sqlite*")) else folder.glob("*.db")
    index.unlink()
    page.features.search.setText("the")
    qtbot.waitUntil(lambda: OLD_DISCOVERY in page.features.note.text())
    assert page.features.found_rows()


def test_history_is_taken_along(qtbot: Any, page: SteeringPage, tmp_path: Path) -> None:
    page.presenter.add(strongest(page), 2.0)
    generation = generate(qtbot, page)
    for name in ("all.json", "all.csv"):
        page.history.export_to(tmp_path / name)
        toasts = page._services.toasts
        qtbot.waitUntil(lambda: (tmp_path / name).exists())  # noqa: B023
    (entry,) = json.loads((tmp_path / "all.json").read_text())["generations"]
    assert entry["request"] == generation.request and entry["result"] == generation.result
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as file:
        unsteered, steered = csv.DictReader(file)
    assert unsteered["text"] == generation.result["unsteered"]
    variant = generation.result["variants"][0]
    assert (steered["variant"], steered["text"]) == ("x 1", variant["text"])
    assert float(steered["kl_per_token"]) == variant["kl_per_token"]
    qtbot.waitUntil(lambda: len(toasts.toasts) >= 1)


def test_the_selection_is_exported_for_other_programs(
    qtbot: Any, page: SteeringPage, tmp_path: Path, answer_dialogs: Any
) -> None:
    assert not page.export.isEnabled()
    page.presenter.add(strongest(page), 2.0)
    page.configuration.prompt.setPlainText(PROMPT)
    actions = page.export.menu().actions()
    assert [action.text().split(" ")[0] for action in actions] == [
        "Control", "Tensors", "Neuronpedia", "Python",
    ]  # fmt: skip
    for action, name in zip(actions[1:], ("a.safetensors", "a.json", "b.py"), strict=True):
        answer_dialogs("QFileDialog.getSaveFileName", (str(tmp_path / name), ""))
        with qtbot.waitSignal(page.presenter.exported) as told:
            action.trigger()
        assert told.args[0][0] == str(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    page.features.cards()[0].method.set_value("ablate")  # is no vector
    answer_dialogs("QFileDialog.getSaveFileName", (str(tmp_path / "c.gguf"), ""))
    with qtbot.waitSignal(page.presenter.job_failed):
        actions[0].trigger()
    assert not (tmp_path / "c.gguf").exists()
    assert "more than a vector" in page._error_place.itemAt(0).widget().accessibleName()
