"""What two tabs share. `MetricChart` has its own import path: pyqtgraph is slow to import."""

from mistudio.ui.widgets.buttons import Button, IconButton, Toggle
from mistudio.ui.widgets.containers import (
    Card,
    CardGrid,
    Collapsible,
    ColumnPage,
    FlowLayout,
    PageTitle,
    Surface,
    add,
    clear,
    column,
    picture,
    row,
    scrolling,
    settle_layouts,
    tiles,
)
from mistudio.ui.widgets.form import FormRow
from mistudio.ui.widgets.inputs import Choice, FloatBox, IntBox
from mistudio.ui.widgets.layer_grid import LayerGrid
from mistudio.ui.widgets.messages import ConfirmDialog, EmptyState, ErrorPanel
from mistudio.ui.widgets.stats import ProgressRow, StatTile
from mistudio.ui.widgets.text import Badge, ElidedLabel, Text, status_tone
from mistudio.ui.widgets.timing import Debounced, debounced
from mistudio.ui.widgets.toast import ToastArea
from mistudio.ui.widgets.token_strip import TokenStrip, arrange_tokens, paint_tokens

__all__ = [
    "Badge",
    "Button",
    "Card",
    "CardGrid",
    "Choice",
    "Collapsible",
    "ColumnPage",
    "ConfirmDialog",
    "Debounced",
    "ElidedLabel",
    "EmptyState",
    "ErrorPanel",
    "FloatBox",
    "FlowLayout",
    "FormRow",
    "IconButton",
    "IntBox",
    "LayerGrid",
    "PageTitle",
    "ProgressRow",
    "StatTile",
    "Surface",
    "Text",
    "ToastArea",
    "Toggle",
    "TokenStrip",
    "add",
    "arrange_tokens",
    "clear",
    "column",
    "debounced",
    "paint_tokens",
    "picture",
    "row",
    "scrolling",
    "settle_layouts",
    "status_tone",
    "tiles",
]
