"""The bar at the bottom: device, memory, and the job that runs with its progress and Stop."""

from __future__ import annotations

import psutil
from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QProgressBar, QStatusBar, QWidget

from mistudio import formatting
from mistudio.ui.device import DeviceInfo, gpu_memory
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Button, ElidedLabel, Text, picture, row

MEMORY_MS = 2000


class StatusBar(QStatusBar):
    """Shows what this process and its jobs use; asks for the GPU's memory off the GUI thread."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self._process = psutil.Process()
        self._device: DeviceInfo | None = None
        self._gpu_text = ""
        self.setSizeGripEnabled(False)

        self.device = Text("Finding the device…", "small")
        self.memory = Text("", "small")
        self.memory.setToolTip("Memory that miStudio uses, and the machine's")
        left = QWidget()
        line = row(
            picture("cpu", tokens.HELPER, 16),
            self.device,
            8,
            picture("memory-stick", tokens.HELPER, 16),
            self.memory,
            spacing=8,
        )
        line.setContentsMargins(16, 4, 0, 4)
        left.setLayout(line)
        self.addWidget(left)

        self.job = QWidget()
        self.job_title = ElidedLabel("", "small")
        self.job_title.setMaximumWidth(320)
        self.job_bar = QProgressBar()
        self.job_bar.setRange(0, 1000)
        self.job_bar.setTextVisible(False)
        self.job_bar.setFixedWidth(140)
        self.job_bar.setAccessibleName("Progress of the running job")
        self.job_percent = Text("", "small", "emerald")
        self.stop = Button("Stop", "small", "square", "Stop the running job")
        self.stop.setAccessibleName("Stop the running job")
        self.stop.clicked.connect(self._on_stop_clicked)
        line = row(self.job_title, self.job_bar, self.job_percent, self.stop, spacing=10)
        line.setContentsMargins(0, 4, 16, 4)
        self.job.setLayout(line)
        self.addPermanentWidget(self.job)
        self._shown: tuple[int, str] | None = None

        self._timer = QTimer(self)
        self._timer.setInterval(MEMORY_MS)
        self._timer.timeout.connect(self.show_memory)
        services.jobs.tick.connect(self.show_job)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.idle.connect(self.show_job)
        self.show_job()
        self.show_memory()

    def start(self) -> None:
        self._timer.start()

    def close_down(self) -> None:
        self._timer.stop()

    def set_device(self, device: DeviceInfo) -> None:
        self._device = device
        self.device.setText(device.name)
        self.device.setToolTip(device.detail)
        self.show_memory()

    def show_memory(self) -> None:
        own = self._process.memory_info().rss
        machine = psutil.virtual_memory()
        text = (
            f"{formatting.size(own)} used • {formatting.size(machine.available)} of "
            f"{formatting.size(machine.total)} free"
        )
        if self._device and self._device.kind == "cuda":
            self._services.background.run(gpu_memory, self._on_gpu_memory)
            text += self._gpu_text
        if text != self.memory.text():
            self.memory.setText(text)

    def _on_gpu_memory(self, memory: tuple[int, int] | None) -> None:
        if memory:
            free, total = memory
            self._gpu_text = f" • GPU {formatting.size(total - free)} of {formatting.size(total)}"

    def show_job(self) -> None:
        """Called at every tick: touches only what changed."""
        running = self._services.jobs.running()
        self.job.setVisible(bool(running))
        if not running:
            self._shown = None
            return
        job_id = running[0]
        if self._shown is None or self._shown[0] != job_id:
            record = self._services.library.jobs.get(job_id)
            self._shown = (job_id, record.title)
            more = f" (+{len(running) - 1})" if len(running) > 1 else ""
            self.job_title.setText(record.title + more)
        snapshot = self._services.jobs.snapshot(job_id)
        fraction = snapshot.fraction if snapshot else 0.0
        # In whole percents: a bar that moves at every tick is painted anew at every tick, which
        # takes the processor from the work it shows.
        self.job_bar.setValue(10 * round(fraction * 100))
        percent = formatting.percent(fraction if snapshot else None, 0)
        if percent != self.job_percent.text():
            self.job_percent.setText(percent)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        self.show_job()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        if self._shown:
            self._services.jobs.cancel(self._shown[0])
