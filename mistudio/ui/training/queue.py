"""Where a waiting job stands: its place, what it starts after, earlier and later."""

from __future__ import annotations

from PySide6.QtWidgets import QWidget

from mistudio.ui.services import Services
from mistudio.ui.widgets import ElidedLabel, IconButton, row

_ENDINGS = {1: "st", 2: "nd", 3: "rd"}


class QueueNote(QWidget):
    """`2nd in the queue, starts after <title>` with Earlier and Later; hidden where it does not
    wait in this process."""

    def __init__(
        self, services: Services, job_id: int, title: str, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._job_id = services, job_id
        self.text = ElidedLabel("", "small")
        self.earlier = IconButton("chevron-up", f"Start earlier: {title}")
        self.later = IconButton("chevron-down", f"Start later: {title}")
        self.earlier.clicked.connect(self._on_earlier_clicked)
        self.later.clicked.connect(self._on_later_clicked)
        line = row(self.text, self.earlier, self.later, spacing=8)
        line.setStretch(0, 1)
        self.setLayout(line)
        services.jobs.queue_changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        place = self._services.jobs.place(self._job_id)
        self.setVisible(place is not None)
        if place is None:
            return
        before = self._services.library.jobs.find(place.after) if place.after else None
        after = f", starts after “{before.title}”" if before else ""
        self.text.setText(f"{ordinal(place.number)} in the queue{after}")
        self.earlier.setEnabled(place.number > 1)
        self.later.setEnabled(place.number < place.of)
        for button in (self.earlier, self.later):
            button.setVisible(place.of > 1)

    def _on_earlier_clicked(self, checked: bool = False) -> None:
        self._services.jobs.move_in_queue(self._job_id, -1)

    def _on_later_clicked(self, checked: bool = False) -> None:
        self._services.jobs.move_in_queue(self._job_id, 1)


def ordinal(n: int) -> str:
    """`1st`, `2nd`, `11th`, `22nd`."""
    if 10 < n % 100 < 14:
        return f"{n}th"
    return f"{n}{_ENDINGS.get(n % 10, 'th')}"
