"""The chart of a run: whole history, several axes, and what it says when it cannot be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QPoint, QPointF, Qt
from PySide6.QtGui import QWheelEvent
from PySide6.QtWidgets import QApplication, QMessageBox, QWidget

from mistudio.ui.widgets.metric_chart import Axis, MetricChart, clock, short

AXES = (Axis("step", "Step"), Axis("seconds", "Time", is_time=True))


def a_chart(qtbot: Any, n: int, spike: int = -1, **options: Any) -> MetricChart:
    chart = MetricChart("Loss", {"a": "A", "b": "B"}, axes=AXES, **options)
    qtbot.addWidget(chart)
    chart.resize(600, 260)
    chart.show()
    chart.append(
        {"step": i, "seconds": i / 4, "a": 9.0 if i == spike else i % 7 / 7, "b": 0.5 + i % 2}
        for i in range(n)
    )
    QApplication.processEvents()
    return chart


def drawn(chart: MetricChart, key: str) -> list[float]:
    return chart._series[key].curve.yData.tolist()


def test_one_point_that_stands_out_is_drawn_at_any_zoom(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 20_000, spike=12_345)
    for start, stop in ((0, 20_000), (5_000, 15_000), (12_000, 12_700), (12_340, 12_350)):
        chart._view.setXRange(start, stop, padding=0)
        QApplication.processEvents()
        assert 9.0 in drawn(chart, "a")
        assert len(drawn(chart, "a")) < 4_000
    chart._view.setXRange(0, 10_000, padding=0)
    QApplication.processEvents()
    assert 9.0 not in drawn(chart, "a"), "only what is looked at is drawn"
    assert chart._view.viewRange()[1][1] > 9.0, "the scale stays while one pans"
    chart.show_all()
    QApplication.processEvents()
    assert 9.0 in drawn(chart, "a")
    assert chart._view.viewRange()[1][1] > 9.0, "and it fits into the picture"


def test_the_first_step_stays_in_the_picture_as_the_history_grows(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 500)
    chart.append({"step": i, "seconds": i / 4, "a": 0.1, "b": 0.2} for i in range(500, 30_000))
    QApplication.processEvents()
    (left, right), _ = chart._view.viewRange()
    assert left <= 0 and right >= 29_999
    x = chart._series["a"].curve.xData
    assert x[0] == 0 and x[-1] == 29_999


def test_curves_run_over_steps_or_time(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 100)
    assert chart.points("a")[4] == (4.0, 4 / 7)
    chart.set_axis("seconds")
    QApplication.processEvents()
    assert chart.points("a")[4] == (1.0, 4 / 7)
    assert chart._view.viewRange()[0][1] < 30
    assert chart.csv().splitlines()[0] == "series,time,value"
    assert "A 0.1429 at time 25" in chart.accessibleDescription()


def test_one_curve_can_be_looked_at_alone(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 100, spike=50)
    chart.show_only(["b"])
    QApplication.processEvents()
    assert chart._view.viewRange()[1][1] < 2
    assert chart.accessibleDescription() == "B 1.5 at step 99"
    assert not chart._legend.isVisible()
    chart.append([{"step": 100, "seconds": 25.0, "a": 1.0, "b": 1.0}])
    chart.show_only(None)
    QApplication.processEvents()
    assert chart._view.viewRange()[1][1] > 9 and chart._legend.isVisible()
    assert len(chart.points("a")) == 101, "hidden curves keep growing"


def test_a_row_without_a_place_on_every_axis_is_left_out(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 3)
    chart.append([{"step": 3, "a": 1.0}, {"step": 4, "seconds": 1.0, "a": 2.0}])
    assert [y for _, y in chart.points("a")][3:] == [2.0]


def test_the_wheel_scrolls_the_page_unless_ctrl_is_held(themed: Any, qtbot: Any) -> None:
    chart = a_chart(qtbot, 100)

    def wheel(modifiers: Qt.KeyboardModifier) -> None:
        viewport = chart._plot.viewport()
        middle = QPointF(viewport.rect().center())
        event = QWheelEvent(middle, QPointF(viewport.mapToGlobal(middle.toPoint())), QPoint(),
                            QPoint(0, 240), Qt.MouseButton.NoButton, modifiers,
                            Qt.ScrollPhase.NoScrollPhase, False)  # fmt: skip
        QApplication.sendEvent(viewport, event)
        QApplication.processEvents()

    before = chart._view.viewRange()[0]
    wheel(Qt.KeyboardModifier.NoModifier)
    assert chart._view.viewRange()[0] == before
    wheel(Qt.KeyboardModifier.ControlModifier)
    assert chart._view.viewRange()[0] != before


@pytest.mark.parametrize(
    ("value", "spacing", "text"),
    [
        (0, 1000, "0"), (800, 200, "800"), (9_000, 1000, "9,000"), (20_000, 10_000, "20K"),
        (1_250_000, 250_000, "1.25M"), (0.05, 0.05, "0.05"), (1.0, 0.5, "1.0"),
        (0.0005, 0.0005, "0.0005"),
    ],
)  # fmt: skip
def test_ticks_have_the_digits_that_tell_them_apart(
    value: float, spacing: float, text: str
) -> None:
    assert short(value, spacing) == text


def test_times_read_as_clocks() -> None:
    assert [clock(s, 10) for s in (0, 90, 3600, 3_725)] == ["0:00", "1:30", "1:00:00", "1:02:05"]
    assert clock(1.25, 0.25) == "0:01.25"


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "png", "svg"])
def test_a_chart_that_cannot_be_saved_says_so_in_a_sentence(
    themed: Any, qtbot: Any, tmp_path: Path, answer_dialogs: Any, ending: str
) -> None:
    chart = a_chart(qtbot, 10)
    said: list[str] = []

    def warning(parent: QWidget, title: str, text: str) -> Any:
        said.append(f"{title}: {text}")
        return QMessageBox.StandardButton.Ok

    target = tmp_path / "taken" / f"loss.{ending}"
    (tmp_path / "taken").write_text("a file where the folder should be")
    answer_dialogs("QFileDialog.getSaveFileName", (str(target), ""))
    answer_dialogs("QMessageBox.warning", warning)
    getattr(chart, f"_on_save_{ending}")()
    (sentence,) = said
    assert str(target) in sentence and "could not be written" in sentence
    assert "Errno" not in sentence

    good = tmp_path / f"loss.{ending}"
    answer_dialogs("QFileDialog.getSaveFileName", (str(good), ""))
    getattr(chart, f"_on_save_{ending}")()
    assert good.stat().st_size > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == [good.name, "taken"]


def test_a_save_that_fails_leaves_what_was_there(
    themed: Any, qtbot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chart = a_chart(qtbot, 10)
    target = tmp_path / "loss.csv"
    target.write_text("before")

    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        chart.save_csv(target)
    assert target.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
