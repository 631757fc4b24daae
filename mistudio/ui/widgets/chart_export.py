"""What every chart can be taken along as: its values as CSV, its picture as PNG or SVG."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtGui import QPainter
from PySide6.QtSvg import QSvgGenerator
from PySide6.QtWidgets import QApplication, QFileDialog, QMenu, QWidget


class ExportedChart(QWidget):
    """A chart names itself, gives its values (`csv`) and the widget that draws them (`drawing`)."""

    _title: str

    def csv(self) -> str:
        raise NotImplementedError

    def drawing(self) -> QWidget:
        raise NotImplementedError

    def export_menu(self) -> QMenu:
        menu = QMenu(self)
        menu.addAction("Copy values as CSV", self.copy_csv)
        menu.addAction("Save values as CSV…", self._on_save_csv)
        menu.addAction("Save picture as PNG…", self._on_save_png)
        menu.addAction("Save picture as SVG…", self._on_save_svg)
        return menu

    def copy_csv(self) -> None:
        QApplication.clipboard().setText(self.csv())

    def save_picture(self, path: Path) -> None:
        """PNG or SVG by the name's ending."""
        drawing = self.drawing()
        if path.suffix.lower() != ".svg":
            drawing.grab().save(str(path))
            return
        generator = QSvgGenerator()
        generator.setFileName(str(path))
        generator.setSize(drawing.size())
        generator.setViewBox(drawing.rect())
        generator.setTitle(self._title)
        painter = QPainter(generator)
        drawing.render(painter)
        painter.end()

    def _ask_path(self, ending: str) -> Path | None:
        name = self._title.lower().replace(" ", "-")
        path, _ = QFileDialog.getSaveFileName(self, f"Save {self._title}", f"{name}.{ending}")
        return Path(path) if path else None

    def _on_save_csv(self) -> None:
        if path := self._ask_path("csv"):
            path.write_text(self.csv(), encoding="utf-8")

    def _on_save_png(self) -> None:
        if path := self._ask_path("png"):
            self.save_picture(path)

    def _on_save_svg(self) -> None:
        if path := self._ask_path("svg"):
            self.save_picture(path)
