"""Downloads told in bytes, speed and time left, on the cards of both tabs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hub_server import HubServer

from mistudio import formatting
from mistudio.engine.hub import access, session
from mistudio.jobs.kinds import AddModel, DownloadDataset
from mistudio.library.library import Library
from mistudio.ui.datasets.page import DatasetsPage
from mistudio.ui.hub.transfer import Transfer
from mistudio.ui.models.page import ModelsPage
from mistudio.ui.services import Services

from .checks import cut_off, too_small
from .conftest import TINY_MODEL
from .screens import shot

MB = 1024**2
LINE = re.compile(r"Download: [\d.]+ [KM]B of [\d.]+ [KM]B, [\d.]+ [KM]?B/s, \d+ s left")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((412 * MB, 1.2 * 1024 * MB, 38 * MB), "412 MB of 1.2 GB, 38 MB/s, 21 s left"),
        ((412 * MB, 1.2 * 1024 * MB, None), "412 MB of 1.2 GB"),
        ((412 * MB, None, 38 * MB), "412 MB, 38 MB/s"),
        ((0, 999, 0), "0 B of 999 B, 0 B/s"),
        ((0, 1000, 500), "0 B of 1 KB, 500 B/s, 2 s left"),
        ((1023 * MB, 1024 * MB, 999.4 * MB), "1 GB of 1 GB, 999 MB/s, 1 s left"),
        ((0, 9.96 * MB, MB / 60), "0 B of 10 MB, 17 KB/s, 9 min 58 s left"),
    ],
)
def test_what_is_fetched_is_told_shortly(arguments: tuple[Any, ...], text: str) -> None:
    assert formatting.transfer(*arguments) == text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(transfer: Transfer, clock: Clock, seconds: float, done: float, received: float,
         **more: Any) -> str:  # fmt: skip
    clock.now += seconds
    running = more.pop("running", True)
    metrics = {"bytes_done": done, "bytes_total": 100 * MB, "bytes_received": received, **more}
    text = transfer.text(metrics, running)
    assert text.startswith("Download: ")
    return text.removeprefix("Download: ")


def test_the_speed_is_that_of_the_last_seconds_and_of_what_really_came() -> None:
    clock = Clock()
    transfer = Transfer(clock)
    # 40 MB lay there from an earlier try: they are no speed.
    assert told(transfer, clock, 0, 40 * MB, 0) == "40 MB of 100 MB"
    told(transfer, clock, 1, 41 * MB, 1 * MB)
    assert told(transfer, clock, 1, 44 * MB, 4 * MB) == "44 MB of 100 MB, 2 MB/s, 28 s left"
    for step in range(10):  # slower from here on: the old speed is forgotten
        last = told(transfer, clock, 1, (44.5 + step / 2) * MB, (4.5 + step / 2) * MB)
    assert last == "49 MB of 100 MB, 512 KB/s, 1 min 42 s left"
    for _ in range(8):  # nothing comes any more
        last = told(transfer, clock, 1, 49 * MB, 9 * MB)
    assert last == "49 MB of 100 MB, 0 B/s"


def test_a_pause_and_a_wait_have_no_speed_and_are_not_counted() -> None:
    clock = Clock()
    transfer = Transfer(clock)
    told(transfer, clock, 0, 0, 0)
    assert "MB/s" in told(transfer, clock, 1, 5 * MB, 5 * MB)
    assert told(transfer, clock, 1, 5 * MB, 5 * MB, running=False) == "5 MB of 100 MB"
    told(transfer, clock, 60, 5 * MB, 5 * MB)
    assert told(transfer, clock, 1, 10 * MB, 10 * MB) == "10 MB of 100 MB, 5 MB/s, 18 s left"
    waiting = told(transfer, clock, 1, 10 * MB, 10 * MB, waiting="The Hub asks to wait 9 s")
    assert waiting == "10 MB of 100 MB • The Hub asks to wait 9 s"
    assert told(transfer, clock, 1, 100 * MB, 100 * MB) == "100 MB of 100 MB"
    assert transfer.text({}) == ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.bytes_per_second = 800_000
        yield server


@pytest.mark.parametrize("tab", ["models", "datasets"])
def test_the_card_of_a_download_tells_bytes_speed_and_time_left(
    qtbot: Any, library: Library, services_of: Callable[[Library], Services], hub: HubServer,
    tab: str,
) -> None:  # fmt: skip
    services = services_of(library)
    page: Any = ModelsPage(services) if tab == "models" else DatasetsPage(services)
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    if tab == "models":
        files = {file.name: file.read_bytes() for file in TINY_MODEL.iterdir() if file.is_file()}
        hub.add("ada/tiny-lm", files, "model")
        job_id = services.jobs.submit(AddModel("ada/tiny-lm", "fp32"))
    else:
        hub.add("ada/texts", {"train.jsonl": b'{"text": "A document."}\n' * 90_000})
        job_id = services.jobs.submit(DownloadDataset("ada/texts"))

    def cards() -> dict[int, Any]:
        return dict(page.job_cards() if tab == "models" else page._adding)

    qtbot.waitUntil(lambda: job_id in cards())
    card = cards()[job_id]
    qtbot.waitUntil(lambda: LINE.fullmatch(card.amount.text()) is not None)
    shot(page, f"{tab}-downloading")
    assert card.amount.isVisible() and too_small(card) == [] and cut_off(card) == []
    hub.bytes_per_second = None
    services.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: library.jobs.get(job_id).status == "cancelled")
