"""Every command of the window: one table drives menus, shortcuts and the command palette."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PySide6.QtCore import QObject
from PySide6.QtGui import QAction, QKeySequence

from mistudio.ui.theme import icons


@dataclass(frozen=True)
class Command:
    """`id` names the window's method `_on_<id>`; a separator stands before it where asked."""

    id: str
    text: str
    menu: str
    shortcut: str = ""
    icon: str = ""
    tip: str = ""
    separator: bool = False


MENUS = ("&File", "&View", "&Help")

COMMANDS: tuple[Command, ...] = (
    Command("add_file", "Add a text file…", "&File", "Ctrl+O", "file-plus",
            "Make a dataset from a txt, md, jsonl, json, csv or tsv file"),
    Command("add_sample", "Add the sample dataset", "&File", "", "flask-conical",
            "A small corpus that comes with miStudio"),
    Command("open_library_folder", "Open the library folder", "&File", "", "folder-open",
            "Where datasets, models and runs are kept", separator=True),
    Command("settings", "Settings…", "&File", "Ctrl+,", "settings",
            "Library, text size, colours, notifications"),
    Command("quit", "Quit", "&File", "Ctrl+Q", "x", "Close miStudio", separator=True),
    Command("show_datasets", "Datasets", "&View", "Ctrl+1", "database", "Show the Datasets tab"),
    Command("show_models", "Models", "&View", "Ctrl+2", "cpu", "Show the Models tab"),
    Command("show_training", "Training", "&View", "Ctrl+3", "activity", "Show the Training tab"),
    Command("show_features", "Features", "&View", "Ctrl+4", "sparkles", "Show the Features tab"),
    Command("show_steering", "Steering", "&View", "Ctrl+5", "sliders-horizontal",
            "Show the Steering tab"),
    Command("jobs", "Jobs", "&View", "Ctrl+J", "list-checks",
            "Show or hide the list of running and past jobs", separator=True),
    Command("palette", "Command palette…", "&View", "Ctrl+K", "command",
            "Find a command by typing a part of its name"),
    Command("full_screen", "Full screen", "&View", "F11", "maximize-2", "Use the whole screen"),
    Command("welcome", "Welcome", "&Help", "F1", "book-open",
            "First steps: from a text to a steered model"),
    Command("open_log_folder", "Open the log folder", "&Help", "", "file-text",
            "Where miStudio writes what it does", separator=True),
    Command("about", "About MechInterp Studio", "&Help", "", "info", "Version and licences"),
)  # fmt: skip


def make_actions(
    owner: QObject, handler: Callable[[str], Callable[[], None]]
) -> dict[str, QAction]:
    """A QAction for each command; `handler(id)` gives what it does."""
    made = {}
    for command in COMMANDS:
        action = QAction(command.text, owner)
        action.setObjectName(command.id)
        action.setStatusTip(command.tip)
        action.setToolTip(command.tip)
        if command.shortcut:
            action.setShortcut(QKeySequence(command.shortcut))
        if command.icon:
            action.setIcon(icons.icon(command.icon))
        action.triggered.connect(handler(command.id))
        made[command.id] = action
    return made
