"""What every page is given; the only thing a page knows of the window around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.widgets.toast import ToastArea


class Navigate(Protocol):
    def __call__(self, tab_name: str, **context: Any) -> None: ...


@dataclass(frozen=True)
class Services:
    """`navigate("training", training_id=3)` shows a tab and calls its page's `activate`."""

    library: Library
    jobs: JobManager
    changes: ChangeNotifier
    background: Background
    settings: Settings
    toasts: ToastArea
    navigate: Navigate


class Page(Protocol):
    """One tab: `mistudio/ui/<tab>/page.py` offers `<Tab>Page(services)`, a QWidget with these."""

    def activate(self, **context: Any) -> None:
        """The tab was shown; `context` says what to open (ids), empty for a plain visit."""

    def save_state(self) -> dict[str, Any]:
        """What to bring back at the next start, as JSON-able values."""

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back what `save_state` gave; must accept an empty or an older one."""
