"""What every chart can be taken along as: its values as CSV, its picture as PNG or SVG."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QBuffer, QIODevice, QPoint
from PySide6.QtGui import QPainter
from PySide6.QtSvg import QSvgGenerator
from PySide6.QtWidgets import (
    QApplication,
    QFileDialog,
    QGraphicsView,
    QMenu,
    QMessageBox,
    QWidget,
)

from mistudio.errors import explain


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
        """PNG or SVG by the name's ending. Raises OSError; what was there before then stays."""
        _replace(path, self._svg() if path.suffix.lower() == ".svg" else self._png())

    def save_csv(self, path: Path) -> None:
        """Raises OSError; what was there before then stays."""
        _replace(path, self.csv().encode())

    def _png(self) -> bytes:
        buffer = QBuffer()
        buffer.open(QIODevice.OpenModeFlag.WriteOnly)
        self.drawing().grab().save(buffer, "PNG")
        return bytes(buffer.data().data())

    def _svg(self) -> bytes:
        drawing, buffer = self.drawing(), QBuffer()
        buffer.open(QIODevice.OpenModeFlag.WriteOnly)
        generator = QSvgGenerator()
        generator.setOutputDevice(buffer)
        generator.setSize(drawing.size())
        generator.setViewBox(drawing.rect())
        generator.setTitle(self._title)
        painter = QPainter(generator)
        if isinstance(drawing, QGraphicsView):
            drawing.render(painter)
        else:
            drawing.render(painter, QPoint())
        painter.end()
        return bytes(buffer.data().data())

    def _save(self, ending: str, save: Callable[[Path], None]) -> None:
        """Ask where, save there; where that cannot be, say so in a sentence."""
        name = self._title.lower().replace(" ", "-")
        path, _ = QFileDialog.getSaveFileName(self, f"Save {self._title}", f"{name}.{ending}")
        if not path:
            return
        try:
            save(Path(path))
        except OSError as exc:
            known = explain(exc)
            why = known.title if known else exc.strerror or str(exc)
            text = f"{path} could not be written ({why}). Choose another place."
            QMessageBox.warning(self, "The chart was not saved", text)

    def _on_save_csv(self) -> None:
        self._save("csv", self.save_csv)

    def _on_save_png(self) -> None:
        self._save("png", self.save_picture)

    def _on_save_svg(self) -> None:
        self._save("svg", self.save_picture)


def _replace(path: Path, data: bytes) -> None:
    """Write beside, then rename: a full disk leaves no half file in place of a whole one."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
