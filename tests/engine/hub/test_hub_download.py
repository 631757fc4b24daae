"""Downloads from the Hub: resumed, verified, stopped, and refused in plain words."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, offline_port, wait_until

from mistudio.engine.hub import Access, RemoteFile, Session, Subject, download_files, session
from mistudio.engine.hub.repository import list_files
from mistudio.engine.progress import Cancelled
from mistudio.errors import AccessDenied, Busy, CorruptFile, NotFound, Offline, UserError

NAME = "owner/texts"
DATA = bytes(range(256)) * 4000  # 1 MB
SMALL = b"small enough for git\n"


class Watch:
    """Progress that keeps what it was told and stops when it is asked to."""

    def __init__(self, stop: Callable[[Watch], bool] = lambda watch: False) -> None:
        self.stop = stop
        self.reports: list[tuple[float, float | None]] = []
        self.waiting: list[str] = []
        self.notes: list[str] = []
        self.stopped_at = 0.0

    def check(self) -> None:
        if self.stop(self):
            self.stopped_at = self.stopped_at or time.monotonic()
            raise Cancelled

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: Any
    ) -> None:
        self.reports.append((done, total))
        self.waiting.append(str(metrics.get("waiting", "")))
        self.notes += [str(metrics["note"])] if "note" in metrics else []


def fetch(
    folder: Path, watch: Watch | None = None, access: Access | None = None, name: str = NAME
) -> dict[str, bytes]:
    """Everything of a repository, as a job would."""
    with Session(Subject("dataset", name), access, watch or Watch()) as talk:
        record = talk.json(f"/api/datasets/{name}")
        files = list_files(talk, record["sha"])
        fetched = download_files(talk, record["sha"], files, folder)
        for file in fetched:
            assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        return {file.name: file.path.read_bytes() for file in fetched}


def nothing_kept(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.is_file()]


def test_every_file_arrives_as_it_is_listed(hub: HubServer, tmp_path: Path) -> None:
    files = {"data/a.bin": DATA, "ünï côdé/#1 %20.txt": SMALL, "README.md": b"", "z": b"z" * 2000}
    hub.add(NAME, files)
    watch = Watch()
    assert fetch(tmp_path, watch) == files
    total = sum(len(content) for content in files.values())
    assert watch.reports[-1] == (total, total)
    assert [done for done, _ in watch.reports] == sorted(done for done, _ in watch.reports)
    before = len(hub.requests)
    assert fetch(tmp_path) == files  # nothing is fetched twice
    assert not [r for r in hub.requests[before:] if "/resolve/" in r.path]


def test_a_cut_connection_is_taken_up_where_it_broke(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.cut["a.bin"] = 0.4
    assert fetch(tmp_path) == {"a.bin": DATA}
    first, second = hub.ranges("a.bin")
    assert (first, second) == ("", f"bytes={int(len(DATA) * 0.4)}-")


def test_a_server_without_ranges_is_asked_for_all_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.cut["a.bin"] = 0.4
    hub.no_ranges = True
    assert fetch(tmp_path) == {"a.bin": DATA}


def test_an_interrupted_download_goes_on_in_another_process(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA, "b.bin": DATA[::-1]})
    hub.bytes_per_second = 1_500_000
    source = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_hub_download import fetch\n"
        "fetch(Path(sys.argv[1]))\n"
    )
    here = Path(__file__).parent
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path), str(here), str(here.parents[1]),
         str(here.parents[2])],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
    )  # fmt: skip
    parts = tmp_path / "parts"

    def second_has_begun() -> bool:
        assert child.poll() is None
        found = [p.stat().st_size for p in parts.glob("*.part")] if parts.exists() else []
        return (tmp_path / "files" / "a.bin").exists() and any(size > 200_000 for size in found)

    wait_until(second_has_begun, 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = next(parts.glob("*.part")).stat().st_size
    hub.requests.clear()
    hub.bytes_per_second = None
    assert fetch(tmp_path) == {"a.bin": DATA, "b.bin": DATA[::-1]}
    assert hub.ranges("a.bin") == []
    assert hub.ranges("b.bin") == [f"bytes={kept}-"]


def test_a_part_that_was_damaged_meanwhile_is_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.bytes_per_second = 2_000_000
    with pytest.raises(Cancelled):
        fetch(tmp_path, Watch(lambda watch: any(done > 100_000 for done, _ in watch.reports)))
    hub.bytes_per_second = None
    part = next((tmp_path / "parts").glob("*.part"))
    part.write_bytes(b"x" * part.stat().st_size)
    assert fetch(tmp_path) == {"a.bin": DATA}


@pytest.mark.parametrize("listed", [len(DATA) - 1, len(DATA) + 1, 10, 10 * len(DATA)])
def test_a_server_that_lies_about_the_size_is_refused(
    hub: HubServer, tmp_path: Path, listed: int
) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.listed_size["a.bin"] = listed
    with pytest.raises(CorruptFile, match=f"{listed} bytes is listed, {len(DATA)} bytes are"):
        fetch(tmp_path)
    assert nothing_kept(tmp_path)


def test_more_bytes_than_listed_are_not_taken(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.sent["a.bin"] = DATA * 20
    hub.no_length.add("a.bin")
    with pytest.raises(CorruptFile, match=r"listed with 1024000 bytes, and more came"):
        fetch(tmp_path)
    assert nothing_kept(tmp_path)


def test_fewer_bytes_than_listed_are_no_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.sent["a.bin"] = DATA[:5000]
    hub.no_length.add("a.bin")
    with pytest.raises(UserError):
        fetch(tmp_path)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("name", ["large.bin", "small.txt"])
def test_changed_content_is_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    content = {"large.bin": DATA, "small.txt": SMALL}[name]
    hub.add(NAME, {name: content})
    hub.sent[name] = content[:-1] + b"!"
    with pytest.raises(CorruptFile, match="hash"):
        fetch(tmp_path)
    assert nothing_kept(tmp_path)


def test_the_token_stays_on_the_hub(
    hub: HubServer, tmp_path: Path, signed_in: Callable[[str], Access]
) -> None:
    """Files of the Hub lie on other hosts; these are sent no Authorization."""
    hub.add(NAME, {"a.bin": DATA}, gated="auto")
    access = signed_in("ann")
    hub.accepted.add(("ann", NAME))
    with HubServer() as elsewhere:
        store = elsewhere.add("cdn/store", {"blob": DATA}, kind="model")
        hub.moved_to["a.bin"] = f"{elsewhere.endpoint}/cdn/store/resolve/{store.sha}/blob?signed=1"
        elsewhere.cut["blob"] = 0.5
        assert fetch(tmp_path, access=access) == {"a.bin": DATA}
        assert elsewhere.ranges("blob?signed=1") == ["", f"bytes={len(DATA) // 2}-"]
        assert all("authorization" not in request.headers for request in elsewhere.requests)
    assert all(request.headers["authorization"].startswith("Bearer ") for request in hub.requests)


def test_a_moved_file_of_another_size_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    with HubServer() as elsewhere:
        store = elsewhere.add("cdn/store", {"blob": DATA + b"more"}, kind="model")
        hub.moved_to["a.bin"] = f"{elsewhere.endpoint}/cdn/store/resolve/{store.sha}/blob"
        with pytest.raises(CorruptFile, match="another file than it lists"):
            fetch(tmp_path)


def test_redirects_in_a_circle_end(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add(NAME, {"a.bin": DATA})
    hub.moved_to["a.bin"] = f"/datasets/{NAME}/resolve/{repo.sha}/a.bin"
    with pytest.raises(CorruptFile, match="without end"):
        fetch(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.txt", "a/../../outside.txt", "/etc/outside.txt", "..\\outside.txt",
     "C:outside.txt", "a//b.txt", "./a.txt", "a/.", "nul\0.txt", "line\nbreak.txt",
     "x" * 300, "ä" * 200],
)  # fmt: skip
def test_a_name_that_leaves_the_folder_is_refused(
    hub: HubServer, tmp_path: Path, name: str
) -> None:
    hub.add(NAME, {"good.txt": SMALL, name: SMALL})
    with pytest.raises(CorruptFile, match="not safe"):
        fetch(tmp_path / "in")
    assert not list(tmp_path.iterdir())
    assert hub.asked("/resolve/") == []


@pytest.mark.parametrize("names", [("a.txt", "A.txt"), ("a", "a/b.txt")])
def test_names_that_cannot_lie_side_by_side_are_refused(
    hub: HubServer, tmp_path: Path, names: tuple[str, str]
) -> None:
    hub.add(NAME, dict.fromkeys(names, SMALL))
    with pytest.raises(CorruptFile, match="not safe"):
        fetch(tmp_path)


# --- waiting and giving up ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": "x"}],
    ids=["retry-after", "ratelimit"],
)
def test_a_rate_limit_is_waited_for(
    hub: HubServer, tmp_path: Path, headers: dict[str, str]
) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.throttled.append(("/resolve/", headers))
    watch = Watch()
    began = time.monotonic()
    assert fetch(tmp_path, watch) == {"a.bin": DATA}
    assert time.monotonic() - began >= 1.0
    assert watch.notes == ["The Hub asks to wait 1 s"]
    assert "The Hub asks to wait 1 s" in watch.waiting
    assert watch.waiting[-1] == ""


def test_a_wait_can_be_stopped(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.throttled.append(("/resolve/", {"Retry-After": "300"}))
    watch = Watch(lambda watch: bool(watch.notes))
    with pytest.raises(Cancelled):
        fetch(tmp_path, watch)
    assert time.monotonic() - watch.stopped_at < 5
    assert watch.notes == ["The Hub asks to wait 300 s"]


def test_nobody_waits_for_hours(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.throttled.append(("/resolve/", {"Retry-After": "86400"}))
    with pytest.raises(Busy, match="86400 s more"):
        fetch(tmp_path)


def test_endless_requests_to_wait_end(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.throttled += [("/resolve/", {"Retry-After": "0"})] * 100
    with pytest.raises(Busy):
        fetch(tmp_path)
    assert len(hub.ranges("a.bin")) == session.WAITS + 1


def test_a_server_in_trouble_is_asked_again_a_few_times(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.broken += [("/resolve/", 502), ("/resolve/", 500), ("/tree/", 503)]
    assert fetch(tmp_path) == {"a.bin": DATA}
    hub.broken += [("/api/", 500)] * 100
    before = len(hub.requests)
    with pytest.raises(Offline, match="HTTP 500"):
        fetch(tmp_path / "b")
    assert len(hub.requests) - before == session.ATTEMPTS


def test_where_nobody_answers_it_says_so(tmp_path: Path) -> None:
    with offline_port() as endpoint, pytest.raises(Offline, match="no connection to 127"):
        fetch(tmp_path, access=Access(endpoint))


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "slow"])
def test_a_stop_waits_for_no_server(hub: HubServer, tmp_path: Path, silent: bool) -> None:
    hub.add(NAME, {"a.bin": DATA})
    hub.silent |= {"a.bin"} if silent else set()
    hub.bytes_per_second = 100_000
    came: list[float] = []

    def a_little_later(watch: Watch) -> bool:
        """A while after the first bytes: the silent server is being waited for then."""
        if any(done > 0 for done, _ in watch.reports):
            came.append(time.monotonic())
        return bool(came) and time.monotonic() - came[0] > 0.15

    watch = Watch(a_little_later)
    with pytest.raises(Cancelled):
        fetch(tmp_path, watch)
    assert time.monotonic() - watch.stopped_at < 5  # the server would take 10 or 20 s
    size = next((tmp_path / "parts").glob("*.part")).stat().st_size
    assert 0 < size < len(DATA)  # kept, to go on from


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_not_there_is_not_found(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No such dataset on the Hub") as refusal:
        fetch(tmp_path)
    assert "Sign in" in refusal.value.next_step  # it may be a private one


def test_a_private_one_is_not_found_by_others_and_given_to_its_owner(
    hub: HubServer, tmp_path: Path, signed_in: Callable[[str], Access]
) -> None:
    hub.add(NAME, {"a.bin": DATA}, private=True)
    with pytest.raises(NotFound, match="closed to this account"):
        fetch(tmp_path, access=signed_in("ann"))
    assert fetch(tmp_path, access=signed_in("owner")) == {"a.bin": DATA}


@pytest.mark.parametrize("known", [True, False], ids=["403", "401"])
def test_gated_ones_say_where_the_terms_are(
    hub: HubServer, tmp_path: Path, signed_in: Callable[[str], Access], known: bool
) -> None:
    hub.add(NAME, {"a.bin": DATA}, gated="auto")
    access = signed_in("ann") if known else None
    with pytest.raises(AccessDenied, match="gated") as refusal:
        fetch(tmp_path, access=access)
    assert f"{hub.endpoint}/datasets/{NAME}" in refusal.value.next_step
    assert ("sign in" in refusal.value.next_step) is not known
    hub.accepted.add(("ann", NAME))
    assert fetch(tmp_path, access=signed_in("ann")) == {"a.bin": DATA}


def test_a_token_that_is_not_accepted_is_never_repeated(
    hub: HubServer, tmp_path: Path, signed_in: Callable[[str], Access]
) -> None:
    hub.add(NAME, {"a.bin": DATA}, gated="auto")
    access = signed_in("ann")
    assert access.token is not None
    secret = access.token.reveal()
    hub.echo_token = True
    with pytest.raises(AccessDenied) as gated:
        fetch(tmp_path, access=access)
    hub.accounts.clear()
    with pytest.raises(AccessDenied, match="not accepted") as refusal:
        fetch(tmp_path, access=access)
    for error in (gated.value, refusal.value):
        assert secret not in str(error)
        assert "[hidden]" in str(error)
        assert error.__cause__ is None
    assert secret not in repr(access)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables_are_honoured(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub.add(NAME, {"a.bin": DATA})
    monkeypatch.setenv(name, "1")
    with pytest.raises(Offline, match=name):
        fetch(tmp_path)
    assert hub.requests == []


def test_a_file_without_listed_size_or_hash_is_taken_as_it_comes(
    hub: HubServer, tmp_path: Path
) -> None:
    repo = hub.add(NAME, {"a.bin": DATA})
    hub.cut["a.bin"] = 0.3
    with Session(Subject("dataset", NAME)) as talk:
        [file] = download_files(talk, repo.sha, [RemoteFile("a.bin")], tmp_path)
    assert file.path.read_bytes() == DATA
    assert file.verified_by == "size"
