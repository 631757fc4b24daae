"""What holds other widgets: cards, rows, collapsible sections, wrapping rows, scrolling columns."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QCoreApplication, QEvent, QMargins, QPoint, QRect, QSize, Qt, Signal
from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import (
    QFrame,
    QGridLayout,
    QHBoxLayout,
    QLabel,
    QLayout,
    QLayoutItem,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from mistudio.ui.theme import fonts, icons, tokens
from mistudio.ui.widgets.text import Text


def picture(name: str, colour: str = tokens.HELPER, size: int = 32) -> QLabel:
    """An icon as a label of its own; grows with the text size."""
    size = fonts.px(size)
    label = QLabel()
    label.setPixmap(icons.pixmap(name, colour, size, 2.0))
    label.setScaledContents(True)
    label.setFixedSize(size, size)
    return label


def column(spacing: int = tokens.GAP, margins: int = 0) -> QVBoxLayout:
    """An empty vertical layout with the house's spacing."""
    layout = QVBoxLayout()
    layout.setSpacing(spacing)
    layout.setContentsMargins(margins, margins, margins, margins)
    return layout


def row(*items: QWidget | QLayout | int | None, spacing: int = 12) -> QHBoxLayout:
    """Side by side: widgets, layouts, a number for fixed space, None for what is left over."""
    layout = QHBoxLayout()
    layout.setSpacing(spacing)
    layout.setContentsMargins(0, 0, 0, 0)
    for item in items:
        if item is None:
            layout.addStretch(1)
        elif isinstance(item, int):
            layout.addSpacing(item)
        elif isinstance(item, QLayout):
            layout.addLayout(item)
        else:
            layout.addWidget(item)
    return layout


def add(layout: QVBoxLayout | QHBoxLayout, *items: QWidget | QLayout) -> None:
    for item in items:
        if isinstance(item, QLayout):
            layout.addLayout(item)
        else:
            layout.addWidget(item)


def clear(layout: QLayout) -> None:
    """Remove and delete everything in a layout."""
    while layout.count():
        item = layout.takeAt(0)
        if item.widget():
            item.widget().hide()
            item.widget().deleteLater()
        elif item.layout():
            clear(item.layout())


def scrolling(content: QWidget, sideways: bool = False) -> QScrollArea:
    """`content` as wide as there is room, scrolled up and down, `sideways` too if it is wider."""
    content.setProperty("surface", "clear")
    area = QScrollArea()
    area.setProperty("surface", "clear")
    area.setWidgetResizable(True)
    area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    if not sideways:
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setWidget(content)
    return area


def tiles(widgets: Sequence[QWidget], columns: int) -> QGridLayout:
    """Side by side, `columns` in a line, all of one width."""
    grid = QGridLayout()
    grid.setSpacing(12)
    for place, widget in enumerate(widgets):
        grid.addWidget(widget, place // columns, place % columns)
    for place in range(columns):
        grid.setColumnStretch(place, 1)
    return grid


class Surface(QFrame):
    """A frame of one of the surfaces: card, tile, row, well, note, clear."""

    def __init__(
        self,
        surface: str = "row",
        tone: str | None = None,
        padding: int = 12,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setProperty("surface", surface)
        if tone:
            self.setProperty("tone", tone)
        self.body = column(8, padding)
        self.setLayout(self.body)

    def add(self, *items: QWidget | QLayout) -> None:
        add(self.body, *items)


class Card(QFrame):
    """A card with an optional title, icon and a slot for controls at the right of the title."""

    def __init__(
        self,
        title: str = "",
        icon: str | None = None,
        icon_colour: str = tokens.EMERALD,
        subtitle: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setProperty("surface", "card")
        layout = column(tokens.GAP, tokens.CARD_PADDING)
        self.setLayout(layout)
        self.header = row()
        if icon:
            self.header.addWidget(picture(icon, icon_colour, 22))
        self.title = Text(title, "card")
        self.header.addWidget(self.title)
        self.header.addStretch(1)
        if title or icon:
            self.setAccessibleName(title)
            layout.addLayout(self.header)
        else:
            self.title.setParent(self)
            self.title.hide()
        if subtitle:
            layout.addWidget(Text(subtitle, "helper", wrap=True))
        self.body = column(tokens.GAP)
        layout.addLayout(self.body)

    def add_to_header(self, *widgets: QWidget) -> None:
        for widget in widgets:
            self.header.addWidget(widget)

    def add(self, *items: QWidget | QLayout) -> None:
        add(self.body, *items)


class Collapsible(QWidget):
    """A section that opens and closes: a header button with a chevron and a count."""

    expanded_changed = Signal(bool)

    def __init__(
        self,
        title: str,
        count: int | None = None,
        expanded: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._title, self._count = title, count
        self.button = QPushButton()
        self.button.setProperty("variant", "section")
        self.button.setCheckable(True)
        self.button.setIconSize(QSize(18, 18))
        self.button.setCursor(Qt.CursorShape.PointingHandCursor)
        self.button.toggled.connect(self._on_button_toggled)
        self.header = row(self.button, spacing=8)
        self.header.setStretch(0, 1)
        self.content = QWidget()
        self.content.setProperty("surface", "clear")
        self.body = column(tokens.GAP)
        self.content.setLayout(self.body)
        layout = column(8)
        layout.addLayout(self.header)
        layout.addWidget(self.content)
        self.setLayout(layout)
        self.content.setVisible(expanded)
        self.button.setChecked(expanded)
        self._show_title()

    @property
    def expanded(self) -> bool:
        return self.button.isChecked()

    def set_expanded(self, expanded: bool) -> None:
        self.button.setChecked(expanded)

    def set_count(self, count: int | None) -> None:
        self._count = count
        self._show_title()

    def set_title(self, title: str) -> None:
        self._title = title
        self._show_title()

    def add_to_header(self, *widgets: QWidget) -> None:
        for widget in widgets:
            self.header.addWidget(widget)

    def add(self, *items: QWidget | QLayout) -> None:
        add(self.body, *items)

    def _on_button_toggled(self, expanded: bool) -> None:
        self.content.setVisible(expanded)
        self._show_title()
        self.expanded_changed.emit(expanded)

    def _show_title(self) -> None:
        text = self._title if self._count is None else f"{self._title} ({self._count})"
        self.button.setText(text)
        self.button.setIcon(icons.icon("chevron-down" if self.expanded else "chevron-right"))
        self.button.setAccessibleName(text)
        self.button.setAccessibleDescription("expanded" if self.expanded else "collapsed")


class ColumnPage(QScrollArea):
    """A page that scrolls; its content is a column of at most 1280 px in the middle."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("surface", "page")
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAsNeeded)
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        outer = QWidget()
        outer.setProperty("surface", "page")
        content = QWidget()
        content.setMaximumWidth(tokens.COLUMN_WIDTH)
        content.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.body = column(24)
        content.setLayout(self.body)
        around = QHBoxLayout(outer)
        around.setContentsMargins(24, 24, 24, 32)
        around.addStretch(1)
        around.addWidget(content, 1000)
        around.addStretch(1)
        self.setWidget(outer)

    def add(self, *items: QWidget | QLayout) -> None:
        add(self.body, *items)


def settle_layouts() -> None:
    """Lay out now what waits for it. What becomes visible squeezes its neighbours until the page
    around it has grown, and a frame may be painted in between."""
    QCoreApplication.sendPostedEvents(None, QEvent.Type.LayoutRequest.value)


class PageTitle(QWidget):
    """The heading of a page with its subtitle and, at the right, its actions."""

    def __init__(self, title: str, subtitle: str = "", parent: QWidget | None = None) -> None:
        super().__init__(parent)
        texts = column(4)
        self.title = Text(title, "h1")
        texts.addWidget(self.title)
        self.subtitle = Text(subtitle, "helper", wrap=True)
        self.subtitle.setVisible(bool(subtitle))
        texts.addWidget(self.subtitle)
        self.header = row()
        self.header.addLayout(texts, 1)
        self.setLayout(self.header)

    def add_action(self, *widgets: QWidget) -> None:
        for widget in widgets:
            self.header.addWidget(widget, 0, Qt.AlignmentFlag.AlignVCenter)


class CardGrid(QWidget):
    """Cards in as many columns as fit, each at least `card_width` wide."""

    def __init__(
        self, card_width: int = 520, most_columns: int = 2, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._card_width, self._most = card_width, most_columns
        self._cards: list[QWidget] = []
        self._columns = most_columns
        self._grid = QGridLayout(self)
        self._grid.setContentsMargins(0, 0, 0, 0)
        self._grid.setSpacing(tokens.GAP)

    @property
    def cards(self) -> list[QWidget]:
        return list(self._cards)

    def set_cards(self, cards: list[QWidget]) -> None:
        """Show these; those that are not among them any more are deleted."""
        for card in self._cards:
            self._grid.removeWidget(card)
            if card not in cards:
                card.hide()
                card.deleteLater()
        self._cards = list(cards)
        self._arrange()

    def _arrange(self) -> None:
        for place, card in enumerate(self._cards):
            self._grid.addWidget(card, place // self._columns, place % self._columns)
        for place in range(self._most):
            self._grid.setColumnStretch(place, 1 if place < self._columns else 0)

    def minimumSizeHint(self) -> QSize:
        """As narrow as one card: the grid gives way before its page scrolls sideways."""
        narrow = max((card.minimumSizeHint().width() for card in self._cards), default=0)
        return QSize(narrow, super().minimumSizeHint().height())

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        fitting = (self.width() + tokens.GAP) // (self._card_width + tokens.GAP)
        columns = min(max(fitting, 1), self._most)
        if columns != self._columns:
            self._columns = columns
            self._arrange()


class FlowLayout(QLayout):
    """Lays widgets side by side and goes on in the next line where the width ends."""

    def __init__(self, spacing: int = 8, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._items: list[QLayoutItem] = []
        self.setSpacing(spacing)
        self.setContentsMargins(QMargins(0, 0, 0, 0))

    def addItem(self, item: QLayoutItem) -> None:
        self._items.append(item)

    def count(self) -> int:
        return len(self._items)

    def itemAt(self, index: int) -> QLayoutItem | None:
        return self._items[index] if 0 <= index < len(self._items) else None

    def takeAt(self, index: int) -> QLayoutItem | None:
        return self._items.pop(index) if 0 <= index < len(self._items) else None

    def expandingDirections(self) -> Qt.Orientation:
        return Qt.Orientation(0)

    def hasHeightForWidth(self) -> bool:
        return True

    def heightForWidth(self, width: int) -> int:
        return self._arrange(QRect(0, 0, width, 0), move=False)

    def setGeometry(self, rect: QRect) -> None:
        super().setGeometry(rect)
        self._arrange(rect, move=True)

    def sizeHint(self) -> QSize:
        return self.minimumSize()

    def minimumSize(self) -> QSize:
        size = QSize()
        for item in self._items:
            size = size.expandedTo(item.minimumSize())
        margins = self.contentsMargins()
        return size + QSize(margins.left() + margins.right(), margins.top() + margins.bottom())

    def _arrange(self, rect: QRect, move: bool) -> int:
        margins = self.contentsMargins()
        area = rect.marginsRemoved(margins)
        x, y, line = area.x(), area.y(), 0
        for item in self._items:
            if item.widget() and item.widget().isHidden():
                continue
            size = item.sizeHint()
            if x > area.x() and x + size.width() > area.right() + 1:
                x, y, line = area.x(), y + line + self.spacing(), 0
            if move:
                item.setGeometry(QRect(QPoint(x, y), size))
            x += size.width() + self.spacing()
            line = max(line, size.height())
        return y + line - rect.y() + margins.bottom()
