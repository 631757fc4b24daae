"""Pictures for print: the map and the grids on white paper, with title, legend and provenance, as
PNG of 300 dots an inch or as SVG.

Sizes inside a figure are in points of 1/96 inch, so a figure is laid out alike whatever it is
written to. Everything here runs in a background thread: it draws on pictures, not on widgets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from PySide6.QtCore import QBuffer, QIODevice, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QBrush, QColor, QFont, QFontMetricsF, QImage, QPainter, QPen
from PySide6.QtSvg import QSvgGenerator

import mistudio
from mistudio.ui.features.pictures.grid import Grid, picture_of, shown_every
from mistudio.ui.features.pictures.scales import PAPER, PAPER_FAINT, PAPER_INK, Scale
from mistudio.ui.theme import fonts

DPI, UNITS = 300, 96.0  # of a PNG; of a figure's own measure
MM = 25.4
NARROWEST, WIDEST, USUAL = 60, 600, 180  # mm
TEXT, SMALL, TITLE = 11, 10, 15  # in units: 8, 7.5 and 11 points
LEGEND = 150.0
POINT_BYTES = 62  # of a point in an SVG, measured


@dataclass(frozen=True)
class Points:
    """What the map shows: places [n] in its own units, a shade each, those that are faint, texts
    at places."""

    x: np.ndarray
    y: np.ndarray
    shades: np.ndarray
    kept: np.ndarray
    captions: tuple[tuple[str, float, float], ...] = ()
    axes: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Figure:
    """One picture with what it says of itself. `notes` are lines below it: method, sample,
    provenance."""

    title: str
    body: Points | Grid
    scale: Scale
    notes: tuple[str, ...]
    as_pixels: bool = False
    """Whether points are one picture in an SVG instead of a circle each."""


def drawn(provenance: str) -> str:
    """What a picture is of, and when which version drew it."""
    today = datetime.now().astimezone().date().isoformat()
    return f"{provenance} • drawn by miStudio {mistudio.__version__}, {today}"


def pixels(width_mm: float) -> int:
    return round(width_mm / MM * DPI)


def size_of(figure: Figure, width_mm: float) -> tuple[float, float]:
    """(width, height) in units."""
    width = width_mm / MM * UNITS
    inner = max(width - 32 - LEGEND, 60.0)
    if isinstance(figure.body, Grid):
        rows, columns = figure.body.values.shape
        left, bottom = _gutters(figure.body)
        cells = max(inner - left, 40.0)
        high = cells * rows / columns if figure.body.square else min(cells * 0.8, 14.0 * rows)
        body = max(high, 60.0) + bottom
    else:
        body = inner * 0.82
    lines = len(_wrapped(figure, width))
    return width, 16 + TITLE * 1.6 + body + 14 + lines * SMALL * 1.45 + 12


def save(figure: Figure, path: Path, width_mm: float) -> int:
    """Write it as PNG or SVG, by the name's ending; the bytes written. Raises OSError; what was
    there before then stays."""
    data = svg(figure, width_mm) if path.suffix.lower() == ".svg" else png(figure, width_mm)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return len(data)


def png(figure: Figure, width_mm: float) -> bytes:
    width, height = size_of(figure, width_mm)
    across = pixels(width_mm)
    scale = across / width
    image = QImage(across, round(height * scale), QImage.Format.Format_RGB32)
    image.setDotsPerMeterX(round(DPI / MM * 1000))
    image.setDotsPerMeterY(round(DPI / MM * 1000))
    image.fill(QColor(PAPER))
    painter = QPainter(image)
    painter.scale(scale, scale)
    paint(painter, figure, width, height)
    painter.end()
    buffer = QBuffer()
    buffer.open(QIODevice.OpenModeFlag.WriteOnly)
    image.save(buffer, "PNG")
    return bytes(buffer.data().data())


def svg(figure: Figure, width_mm: float) -> bytes:
    width, height = size_of(figure, width_mm)
    buffer = QBuffer()
    buffer.open(QIODevice.OpenModeFlag.WriteOnly)
    generator = QSvgGenerator()
    generator.setOutputDevice(buffer)
    generator.setResolution(round(UNITS))
    generator.setSize(QSize(round(width), round(height)))
    generator.setViewBox(QRectF(0, 0, round(width), round(height)))
    generator.setTitle(figure.title)
    generator.setDescription(" ".join(figure.notes))
    painter = QPainter(generator)
    painter.fillRect(QRectF(0, 0, round(width), round(height)), QColor(PAPER))
    paint(painter, figure, width, height)
    painter.end()
    return bytes(buffer.data().data())


# --- drawing --------------------------------------------------------------------------------------


def paint(painter: QPainter, figure: Figure, width: float, height: float) -> None:
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    lines = _wrapped(figure, width)
    notes = height - 12 - len(lines) * SMALL * 1.45
    _text(painter, QPointF(16, 16 + TITLE), figure.title, TITLE, PAPER_INK, bold=True)
    top = 16 + TITLE * 1.6
    area = QRectF(16, top, width - 32 - LEGEND, notes - 14 - top)
    if isinstance(figure.body, Grid):
        _paint_grid(painter, figure.body, figure.scale, area)
    else:
        _paint_points(painter, figure, area)
    _paint_legend(painter, figure.scale, QRectF(area.right() + 18, top, LEGEND - 18, area.height()))
    for number, line in enumerate(lines):
        place = QPointF(16, notes + (number + 1) * SMALL * 1.45 - 3)
        _text(painter, place, line, SMALL, PAPER_FAINT)


def _paint_points(painter: QPainter, figure: Figure, area: QRectF) -> None:
    points = figure.body
    assert isinstance(points, Points)
    frame = QRectF(area.left() + TEXT * 1.6, area.top(), area.width(), area.height())
    frame.setRight(area.right())
    frame.setBottom(area.bottom() - TEXT * 1.8)
    painter.setPen(QPen(QColor("#9CA3AF"), 0.75))
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.drawRect(frame)
    across, up = points.axes
    middle = QRectF(frame.left(), frame.bottom() + 3, frame.width(), TEXT * 1.6)
    _boxed(painter, middle, across, TEXT, PAPER_FAINT)
    painter.save()
    painter.translate(area.left() + TEXT, frame.center().y())
    painter.rotate(-90)
    width = frame.height()
    _boxed(painter, QRectF(-width / 2, -TEXT, width, TEXT * 1.6), up, TEXT, PAPER_FAINT)
    painter.restore()
    if not len(points.x):
        return
    x, y = _fitted(points, frame)
    r = float(np.clip(0.36 * (frame.width() * frame.height() / len(x)) ** 0.5, 0.35, 3.0))
    if figure.as_pixels:
        scale = DPI / UNITS
        image = QImage(
            round(frame.width() * scale), round(frame.height() * scale), QImage.Format.Format_RGB32
        )
        image.fill(QColor(PAPER))
        inner = QPainter(image)
        inner.setRenderHint(QPainter.RenderHint.Antialiasing)
        inner.scale(scale, scale)
        inner.translate(-frame.topLeft())
        _circles(inner, points, figure.scale, x, y, r)
        inner.end()
        painter.drawImage(frame.adjusted(0.5, 0.5, -0.5, -0.5), image)
    else:
        _circles(painter, points, figure.scale, x, y, r)
    for text, at_x, at_y in points.captions:
        low, scale_xy = _fit(points, frame)
        place = QPointF(low[0] + at_x * scale_xy, low[1] - at_y * scale_xy)
        _halo(painter, place, text)


def _circles(
    painter: QPainter, points: Points, scale: Scale, x: np.ndarray, y: np.ndarray, r: float
) -> None:
    """Colour by colour: an SVG names each once."""
    painter.setPen(Qt.PenStyle.NoPen)
    faint = np.flatnonzero(~points.kept)
    palette = scale.palette(paper=True)
    groups = [(QColor("#E5E7EB"), faint)]
    for shade in np.unique(points.shades[points.kept]).tolist():
        chosen = np.flatnonzero(points.kept & (points.shades == shade))
        groups.append((QColor(int(palette[shade]) & 0xFFFFFF), chosen))
    for colour, chosen in groups:
        painter.setBrush(colour)
        for px, py in zip(x[chosen].tolist(), y[chosen].tolist(), strict=True):
            painter.drawEllipse(QPointF(px, py), r, r)


def _fit(points: Points, frame: QRectF) -> tuple[tuple[float, float], float]:
    """(where the map's origin lies, units a unit of the map): both axes alike."""
    low_x, high_x = float(points.x.min()), float(points.x.max())
    low_y, high_y = float(points.y.min()), float(points.y.max())
    scale = min(
        (frame.width() - 16) / max(high_x - low_x, 1e-6),
        (frame.height() - 16) / max(high_y - low_y, 1e-6),
    )
    x = frame.center().x() - (low_x + high_x) / 2 * scale
    y = frame.center().y() + (low_y + high_y) / 2 * scale
    return (x, y), scale


def _fitted(points: Points, frame: QRectF) -> tuple[np.ndarray, np.ndarray]:
    # To a hundredth: an SVG is a third shorter for it.
    (x, y), scale = _fit(points, frame)
    return np.round(x + points.x * scale, 2), np.round(y - points.y * scale, 2)


def _gutters(grid: Grid) -> tuple[float, float]:
    metrics = QFontMetricsF(_font(SMALL))
    widest = max((metrics.horizontalAdvance(text) for text in grid.rows), default=0.0)
    names = max((metrics.horizontalAdvance(text) for text in grid.columns), default=0.0)
    return min(widest, 130.0) + 6, min(names, 90.0) + SMALL * 1.6 + 6


def _paint_grid(painter: QPainter, grid: Grid, scale: Scale, area: QRectF) -> None:
    rows, columns = grid.values.shape
    left, bottom = _gutters(grid)
    cells = QRectF(area.left() + left, area.top(), area.width() - left, area.height() - bottom)
    wide, high = cells.width() / columns, cells.height() / rows
    image = picture_of(scale.palette(paper=True)[scale.shades(grid.values)])
    # Whole pixels for each cell: readers of SVG would blur a small picture that they enlarge.
    factor = max(1, round(2000 / max(rows, columns)))
    large = image.scaled(columns * factor, rows * factor)
    painter.drawImage(cells, large)
    missing = np.argwhere(~np.isfinite(grid.values)).tolist()
    painter.setPen(QPen(QColor("#6B7280"), 0.4))
    for row, column in missing if min(wide, high) >= 3 else []:
        x, y = cells.left() + column * wide, cells.top() + row * high
        painter.drawLine(QPointF(x, y + high), QPointF(x + wide, y))
    painter.setPen(QPen(QColor("#9CA3AF"), 0.75))
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.drawRect(cells)
    metrics = QFontMetricsF(_font(SMALL))
    line, elide = metrics.height(), Qt.TextElideMode.ElideRight
    for row in range(0, rows, shown_every(high, line)):
        text = metrics.elidedText(grid.rows[row], elide, left - 6)
        middle = cells.top() + (row + 0.5) * high
        box = QRectF(area.left(), middle - line / 2, left - 5, line)
        _boxed(painter, box, text, SMALL, PAPER_INK, Qt.AlignmentFlag.AlignRight)
    room = bottom - SMALL * 1.6 - 6
    for column in range(0, columns, shown_every(wide, line)):
        painter.save()
        painter.translate(cells.left() + (column + 0.5) * wide, cells.bottom() + 4)
        painter.rotate(-90)
        text = metrics.elidedText(grid.columns[column], elide, room)
        box = QRectF(-room, -line / 2, room, line)
        _boxed(painter, box, text, SMALL, PAPER_INK, Qt.AlignmentFlag.AlignRight)
        painter.restore()
    place = QRectF(cells.left(), area.bottom() - SMALL * 1.5, cells.width(), SMALL * 1.6)
    _boxed(painter, place, grid.column_title, SMALL, PAPER_FAINT)


def _paint_legend(painter: QPainter, scale: Scale, area: QRectF) -> None:
    y = area.top() + TEXT
    for line in wrapped(scale.title, area.width(), TEXT):
        _text(painter, QPointF(area.left(), y), line, TEXT, PAPER_INK, bold=True)
        y += TEXT * 1.4
    if scale.unit:
        for line in wrapped(scale.unit, area.width(), SMALL):
            _text(painter, QPointF(area.left(), y), line, SMALL, PAPER_FAINT)
            y += SMALL * 1.4
    y += 4
    if scale.kind in ("kinds", "steps"):
        for number, name in enumerate(scale.names):
            if name:
                colour = QColor(scale.colour(number, paper=True))
                y = _swatch(painter, area.left(), y, colour, name)
    else:
        y = _bar(painter, scale, QRectF(area.left(), y, 12, 110))
    if scale.has_none:
        colour = QColor(int(scale.palette(paper=True)[255]) & 0xFFFFFF)
        _swatch(painter, area.left(), y + 4, colour, scale.none)


def _bar(painter: QPainter, scale: Scale, box: QRectF) -> float:
    palette = scale.palette(paper=True)
    n = 64
    for shade in range(n):
        high = box.height() / n
        place = QRectF(box.left(), box.bottom() - (shade + 1) * high, box.width(), high + 0.3)
        painter.fillRect(place, QColor(int(palette[shade]) & 0xFFFFFF))
    for share, text in scale.ticks():
        y = box.bottom() - share * box.height()
        painter.setPen(QPen(QColor(PAPER_FAINT), 0.75))
        painter.drawLine(QPointF(box.right(), y), QPointF(box.right() + 3, y))
        _text(painter, QPointF(box.right() + 6, y + SMALL * 0.36), text, SMALL, PAPER_INK)
    return box.bottom() + 10


def _swatch(painter: QPainter, x: float, y: float, colour: QColor, text: str) -> float:
    painter.setPen(Qt.PenStyle.NoPen)
    painter.setBrush(QBrush(colour))
    painter.drawRect(QRectF(x, y, 10, 10))
    _text(painter, QPointF(x + 15, y + 9), text, SMALL, PAPER_INK)
    return y + 15


# --- text -----------------------------------------------------------------------------------------


def _font(size: float, bold: bool = False) -> QFont:
    font = QFont([fonts.SANS, "DejaVu Sans", "Arial", "sans-serif"])
    font.setPixelSize(round(size))
    font.setWeight(QFont.Weight.DemiBold if bold else QFont.Weight.Normal)
    return font


def _text(
    painter: QPainter, place: QPointF, text: str, size: float, colour: str, bold: bool = False
) -> None:
    painter.setFont(_font(size, bold))
    painter.setPen(QColor(colour))
    painter.drawText(place, text)


def _boxed(
    painter: QPainter,
    box: QRectF,
    text: str,
    size: float,
    colour: str,
    side: Qt.AlignmentFlag = Qt.AlignmentFlag.AlignHCenter,
) -> None:
    painter.setFont(_font(size))
    painter.setPen(QColor(colour))
    painter.drawText(box, side | Qt.AlignmentFlag.AlignVCenter, text)


def _halo(painter: QPainter, middle: QPointF, text: str) -> None:
    metrics = QFontMetricsF(_font(SMALL, bold=True))
    box = QRectF(0, 0, metrics.horizontalAdvance(text) + 4, metrics.height())
    box.moveCenter(middle)
    painter.fillRect(box, QColor(255, 255, 255, 200))
    painter.setFont(_font(SMALL, bold=True))
    painter.setPen(QColor(PAPER_INK))
    painter.drawText(box, Qt.AlignmentFlag.AlignCenter, text)


def _wrapped(figure: Figure, width: float) -> list[str]:
    return [line for note in figure.notes for line in wrapped(note, width - 32, SMALL)]


def wrapped(text: str, width: float, size: float) -> list[str]:
    """The text in lines that are no wider, broken between words."""
    metrics = QFontMetricsF(_font(size))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and metrics.horizontalAdvance(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
