"""What the shared widgets show and how they are used without a mouse."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PySide6.QtCore import QPoint, QRect, Qt
from PySide6.QtGui import QImage, QPainter
from PySide6.QtWidgets import QApplication, QLineEdit, QPushButton, QVBoxLayout, QWidget

from mistudio.errors import OutOfMemory
from mistudio.jobs.control import Snapshot
from mistudio.ui.widgets import (
    Badge,
    CardGrid,
    Choice,
    Collapsible,
    ConfirmDialog,
    ElidedLabel,
    EmptyState,
    ErrorPanel,
    FlowLayout,
    FormRow,
    IntBox,
    LayerGrid,
    ProgressRow,
    StatTile,
    ToastArea,
    Toggle,
    TokenStrip,
    arrange_tokens,
    debounced,
    paint_tokens,
)
from mistudio.ui.widgets.metric_chart import MetricChart
from mistudio.ui.widgets.token_strip import heat, shown

from .checks import nameless, too_small

pytestmark = pytest.mark.usefixtures("themed")


def shown_widget(qtbot: Any, widget: QWidget) -> Any:
    qtbot.addWidget(widget)
    widget.show()
    return widget


def test_tile_shows_an_em_dash_until_there_is_a_number(qtbot: Any) -> None:
    tile = shown_widget(qtbot, StatTile("Loss", tooltip="Mean squared error over 1,024 tokens"))
    assert tile.value == "—"
    tile.set_value("0.3421", note="per token")
    assert tile.accessibleName() == "Loss: 0.3421 per token"
    assert "1,024" in tile.toolTip()


@pytest.mark.parametrize(
    "status", ["ready", "running", "paused", "failed", "queued", "interrupted"]
)
def test_badge_says_its_status_in_words(qtbot: Any, status: str) -> None:
    badge = shown_widget(qtbot, Badge(status))
    assert badge.text() == status.capitalize()
    assert badge.property("tone") in ("emerald", "yellow", "red", "slate", "blue")


def test_progress_shows_what_the_snapshot_says(qtbot: Any) -> None:
    line = shown_widget(qtbot, ProgressRow("Training"))
    assert line.percent_text == "—"
    line.show_snapshot(Snapshot(1, "train", 374, 1000, 0.374, 185.0, 310.0))
    assert line.percent_text == "37.4%"
    assert line.times_text == "3 min 05 s elapsed • about 5 min 10 s remaining"
    line.show_snapshot(Snapshot(1, "train", 1, 1000, 0.001, 1.0, None))
    assert "not known yet" in line.times_text


def test_collapsible_opens_by_keyboard_and_tells_its_state(qtbot: Any) -> None:
    section = shown_widget(qtbot, Collapsible("Training Templates", 3))
    assert not section.content.isVisible()
    with qtbot.waitSignal(section.expanded_changed):
        qtbot.keyClick(section.button, Qt.Key.Key_Space)
    assert section.content.isVisible()
    assert section.button.accessibleDescription() == "expanded"
    section.set_count(4)
    assert section.button.text() == "Training Templates (4)"


def test_layer_grid_selects_counts_and_tells(qtbot: Any) -> None:
    grid = shown_widget(qtbot, LayerGrid(8, 30, "Training Layers"))
    with qtbot.waitSignal(grid.changed) as told:
        grid.set_selected([6, 12, 99])
    assert told.args == [[6, 12]]
    assert grid.selected() == [6, 12]
    qtbot.mouseClick(grid.select_all, Qt.MouseButton.LeftButton)
    assert len(grid.selected()) == 30
    qtbot.mouseClick(grid.clear_all, Qt.MouseButton.LeftButton)
    assert grid.selected() == []
    with qtbot.assertNotEmitted(grid.changed):
        grid.set_selected([])
    assert nameless(grid) == []


def test_layer_grid_keeps_what_another_model_also_has(qtbot: Any) -> None:
    grid = shown_widget(qtbot, LayerGrid(8, 30))
    grid.set_selected([3, 20])
    grid.set_n_layers(12)
    assert grid.selected() == [3]
    grid.set_n_layers(0)
    assert grid.selected() == []


def test_arrow_keys_walk_over_the_layer_grid(qtbot: Any) -> None:
    window = QWidget()
    QVBoxLayout(window).addWidget(grid := LayerGrid(4, 10))
    shown_widget(qtbot, window)
    buttons = grid.findChildren(QPushButton)
    by_name = {button.accessibleName(): button for button in buttons}
    by_name["Layer 0"].setFocus()
    qtbot.keyClick(by_name["Layer 0"], Qt.Key.Key_Down)
    assert window.focusWidget() is by_name["Layer 4"]
    qtbot.keyClick(by_name["Layer 4"], Qt.Key.Key_Right)
    qtbot.keyClick(by_name["Layer 5"], Qt.Key.Key_Space)
    assert grid.selected() == [5]


def test_heat_follows_the_formula() -> None:
    assert heat(0.0, 2.0) == 0.0
    assert heat(-1.0, 2.0) == 0.0
    assert heat(1.0, 0.0) == 0.0
    assert heat(2.0, 2.0) == pytest.approx(1.0)
    assert heat(0.5, 2.0) == pytest.approx(0.05 + 0.95 * math.log10(1 + 9 * 0.25))
    assert heat(math.nan, 2.0) == 0.0


def test_whitespace_tokens_can_be_seen() -> None:
    assert shown("\n\n") == "↵↵"
    assert shown(" ") == "␣"
    assert shown(" the") == " the"
    assert shown("\t") == "⇥"


def test_tokens_wrap_and_an_over_long_one_is_elided(qtbot: Any) -> None:
    strip = shown_widget(qtbot, TokenStrip())
    strip.set_tokens(["word "] * 60)
    assert strip.heightForWidth(200) > strip.heightForWidth(800)
    arranged = arrange_tokens(["x" * 500, "y"], strip._font, 200)
    assert all(rect.right() <= 200 for rect in arranged.rects)
    assert "…" in arranged.texts[0]


def test_token_tooltip_tells_token_id_and_activation(qtbot: Any) -> None:
    strip = shown_widget(qtbot, TokenStrip())
    strip.set_tokens([" cat", "\n"], [1.25, 0.0], 2.5, [2368, 198])
    assert strip.describe(0) == "Token ' cat'\nToken ID: 2368\nactivation 1.250 (maximum 2.500)"
    qtbot.keyClick(strip, Qt.Key.Key_Right)
    qtbot.keyClick(strip, Qt.Key.Key_Right)
    assert "Token ID: 198" in strip.accessibleDescription()
    with qtbot.waitSignal(strip.token_activated) as told:
        qtbot.keyClick(strip, Qt.Key.Key_Return)
    assert told.args == [1]
    strip.resize(300, 60)
    strip.grab()
    assert strip.token_at(QPoint(6, 8)) == 0


def test_painter_function_paints_heat_inside_its_rectangle_only(qtbot: Any) -> None:
    image = QImage(200, 60, QImage.Format.Format_RGB32)
    image.fill(Qt.GlobalColor.black)
    painter = QPainter(image)
    paint_tokens(painter, QRect(20, 10, 100, 24), ["hot", "cold"], [1.0, 0.0], 1.0)
    painter.end()
    assert image.pixelColor(30, 12).green() > 150
    assert image.pixelColor(10, 20).green() == 0
    assert image.pixelColor(30, 50).green() == 0


def test_chart_keeps_every_finite_point_and_names_its_last(qtbot: Any) -> None:
    chart = shown_widget(qtbot, MetricChart("Loss", {"loss": "Loss", "fvu": "FVU"}))
    assert chart.is_empty
    assert chart.accessibleDescription() == "No data yet"
    chart.append([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan, "fvu": 0.5}, {"x": 1}])
    chart.append([{"step": 3, "loss": 1.0, "fvu": None}])
    assert chart.points("loss") == [(1.0, 2.0), (3.0, 1.0)]
    assert chart.latest("fvu") == 0.5
    assert chart.accessibleDescription() == "Loss 1 at step 3; FVU 0.5 at step 2"
    chart.set_log_y(True)
    chart.set_data("loss", [1, 2], [0.0, 5.0])
    assert chart.points("loss") == [(1.0, 0.0), (2.0, 5.0)]
    assert "FVU,2,0.5" in chart.csv().replace("\r", "")
    assert nameless(chart) == []


def test_chart_that_is_hidden_draws_when_it_is_shown(qtbot: Any) -> None:
    chart = MetricChart("Loss", {"loss": "Loss"})
    qtbot.addWidget(chart)
    chart.append({"step": i, "loss": 1.0 / (i + 1)} for i in range(1000))
    assert len(chart.points("loss")) == 1000
    chart.show()
    assert len(chart._series["loss"].curve.xData) == 1000


def test_chart_saves_pictures(qtbot: Any, tmp_path: Any) -> None:
    chart = shown_widget(qtbot, MetricChart("Loss", {"loss": "Loss"}))
    chart.append([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    for ending in ("png", "svg"):
        chart.save_picture(tmp_path / f"loss.{ending}")
        assert (tmp_path / f"loss.{ending}").stat().st_size > 500


def test_toasts_leave_by_themselves_but_errors_stay(qtbot: Any) -> None:
    window = shown_widget(qtbot, QWidget())
    window.resize(800, 600)
    area = ToastArea(window, seconds=0.1)
    area.success("Saved")
    stays = area.error(OutOfMemory("Out of memory", "It needs 3 GB.", "Use a smaller batch."))
    assert len(area.toasts) == 2
    qtbot.waitUntil(lambda: len(area.toasts) == 1)
    assert area.toasts == [stays]
    assert "smaller batch" in stays.accessibleName()
    qtbot.keyClick(stays, Qt.Key.Key_Escape)
    assert area.toasts == []


def test_toast_action_is_called_once(qtbot: Any) -> None:
    window = shown_widget(qtbot, QWidget())
    area = ToastArea(window)
    called: list[int] = []
    toast = area.info("Done", action=("Show", lambda: called.append(1)))
    button = next(b for b in toast.findChildren(QPushButton) if b.text() == "Show")
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)
    assert called == [1]
    assert area.toasts == []


def test_only_the_newest_toasts_stay(qtbot: Any) -> None:
    area = ToastArea(shown_widget(qtbot, QWidget()))
    for number in range(10):
        area.warning(f"{number}")
    assert [toast.message for toast in area.toasts] == ["6", "7", "8", "9"]
    for toast in area.toasts:
        toast.dismiss()


def test_error_panel_offers_retry_and_copies_its_report(qtbot: Any) -> None:
    panel = shown_widget(qtbot, ErrorPanel("Broken", "It broke.", "Try again.", True, "trace"))
    with qtbot.waitSignal(panel.retry):
        qtbot.mouseClick(panel.retry_button, Qt.MouseButton.LeftButton)
    qtbot.mouseClick(panel.copy_button, Qt.MouseButton.LeftButton)
    assert QApplication.clipboard().text() == "trace"


def test_empty_state_leads_on(qtbot: Any) -> None:
    empty = shown_widget(qtbot, EmptyState("database", "Nothing yet", "Add"))
    with qtbot.waitSignal(empty.action):
        qtbot.mouseClick(empty.button, Qt.MouseButton.LeftButton)


def test_form_row_names_its_editor_and_shows_the_error_there(qtbot: Any) -> None:
    form_row = shown_widget(qtbot, FormRow("Learning Rate", QLineEdit(), "1e-6 to 1e-2"))
    assert form_row.editor.accessibleName() == "Learning Rate"
    form_row.set_error("Must be positive.")
    assert form_row.error.isVisible()
    assert form_row.editor.property("invalid") == "true"
    form_row.set_error("")
    assert not form_row.error.isVisible()


def test_confirmation_starts_on_cancel(qtbot: Any, answer_dialogs: Any) -> None:
    answer_dialogs("ConfirmDialog.exec", lambda self: self.cancel_button.isDefault() and 1)
    assert ConfirmDialog.ask(None, "Delete?", "It goes to the trash.")
    answer_dialogs("ConfirmDialog.exec", 0)
    assert not ConfirmDialog.ask(None, "Delete?", "It goes to the trash.")


def test_choice_keeps_its_value_and_can_refuse_options(qtbot: Any) -> None:
    choice = shown_widget(qtbot, Choice([("fp32", "FP32"), ("q4", "Q4 (4-bit)")]))
    assert choice.value == "fp32"
    assert choice.set_value("q4")
    choice.set_options([("q4", "Q4"), ("q8", "Q8")])
    assert choice.value == "q4"
    assert not choice.set_value("nothing")
    choice.disable("q8", "Needs an NVIDIA GPU")
    assert choice.model().item(1).toolTip() == "Needs an NVIDIA GPU"


def test_wheel_over_a_form_changes_no_value(qtbot: Any) -> None:
    from PySide6.QtCore import QPointF
    from PySide6.QtGui import QWheelEvent

    box = shown_widget(qtbot, IntBox(256, 1, 4096))
    event = QWheelEvent(
        QPointF(5, 5),
        QPointF(5, 5),
        QPoint(0, 0),
        QPoint(0, 120),
        Qt.MouseButton.NoButton,
        Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    QApplication.sendEvent(box, event)
    assert box.value() == 256


def test_toggle_works_by_keyboard_and_keeps_its_size(qtbot: Any) -> None:
    toggle = shown_widget(qtbot, Toggle("Auto-save"))
    qtbot.keyClick(toggle, Qt.Key.Key_Space)
    assert toggle.isChecked()
    assert nameless_of(toggle) == "Auto-save"


def nameless_of(widget: QWidget) -> str:
    return widget.accessibleName()


def test_elided_label_tells_the_rest_in_its_tooltip(qtbot: Any) -> None:
    label = shown_widget(qtbot, ElidedLabel("A name that is far too long for this place"))
    label.resize(80, 20)
    assert label.toolTip() == label.text()
    label.resize(800, 20)
    assert label.toolTip() == ""


def test_flow_layout_wraps(qtbot: Any) -> None:
    holder = QWidget()
    flow = FlowLayout(parent=holder)
    for number in range(12):
        flow.addWidget(QPushButton(f"Button {number}"))
    shown_widget(qtbot, holder)
    assert flow.heightForWidth(200) > 2 * flow.heightForWidth(2000)


def test_card_grid_has_as_many_columns_as_fit(qtbot: Any) -> None:
    grid = CardGrid(card_width=300, most_columns=3)
    cards: list[QWidget] = [QWidget() for _ in range(6)]
    grid.set_cards(cards)
    shown_widget(qtbot, grid)
    grid.resize(1000, 600)
    qtbot.waitUntil(lambda: cards[2].y() == cards[0].y())
    grid.resize(400, 600)
    qtbot.waitUntil(lambda: cards[1].y() > cards[0].y())


def test_debounced_calls_once_after_the_last_request(qtbot: Any) -> None:
    owner = shown_widget(qtbot, QWidget())
    calls: list[int] = []
    later = debounced(owner, 30, lambda: calls.append(1))
    for _ in range(5):
        later()
    assert calls == []
    qtbot.waitUntil(lambda: calls == [1])
    later()
    later.flush()
    assert calls == [1, 1]


def test_no_widget_writes_below_fourteen_pixels(qtbot: Any) -> None:
    holder = QWidget()
    layout = QVBoxLayout(holder)
    for widget in (
        StatTile("Loss"),
        Badge("ready"),
        ProgressRow("Training"),
        LayerGrid(8, 8),
        FormRow("Name", QLineEdit(), "helper"),
        ErrorPanel("Broken", "It broke.", "Try again.", True, "trace"),
        EmptyState("database", "Nothing", "Add", "helper"),
        MetricChart("Loss", {"loss": "Loss"}),
    ):
        layout.addWidget(widget)
    shown_widget(qtbot, holder)
    assert too_small(holder) == []
