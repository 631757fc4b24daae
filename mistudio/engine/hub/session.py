"""Talking to the Hub so that a user can stop it at any moment.

huggingface_hub's own calls block in the socket, sleep between tries and report every 10 MB; so the
requests are made here, in a helper thread that the caller watches, with the routes and headers of
huggingface_hub. One session is one conversation about one repository.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from mistudio.engine.hub.access import Access, current_access
from mistudio.engine.hub.refusals import Refused, Subject, in_words, too_long, unreachable
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, UserError

T = TypeVar("T")

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
FIRST_PAUSE = 1.0  # after a failure; doubled after each further one
ATTEMPTS = 5  # failures in a row, without a single byte between them
LONGEST_WAIT = 330.0  # the Hub counts requests in windows of 300 s
WAITS = 6  # times that it may ask us to wait in one go
MAX_REDIRECTS = 8
MAX_ANSWER = 64 * 1024**2  # bytes of JSON
MAX_PAGES = 10_000
PIECE = 1024**2
POLL = 0.05  # s between two looks at whether the user wants to stop


class Cut(Exception):
    """The connection broke, or never came about."""


class Session:
    """Requests about one subject, with one access. Closing it frees the connection at once."""

    def __init__(
        self, subject: Subject, access: Access | None = None, progress: Progress = SILENT
    ) -> None:
        self.subject = subject
        self.access = access or current_access(subject.name or None)
        self.access.require()
        self.progress = _Remembering(progress)
        self._worker = _Worker()
        self._client: Any = None
        self._response: Any = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._shut_down(self._response)
        self._worker.end(self._close_client)

    # --- answers read at once -----------------------------------------------------------------

    def json(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """The answer of an API route (`/api/...`)."""
        return self._json(self.access.endpoint + path, params)[0]

    def pages(self, path: str, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The entries of a list that comes in pages (`Link: <...>; rel="next"`)."""
        url: str | None = self.access.endpoint + path
        seen = 0
        while url is not None:
            page, url = self._json(url, params)
            params = None  # the next page's address has them
            seen += 1
            if not isinstance(page, list) or seen > MAX_PAGES:
                raise self.nonsense("a list was expected")
            yield from page

    def bytes(self, url: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of a file that has `size` bytes."""
        patience = Patience(self)
        got = bytearray()
        while start + len(got) < end:
            at = start + len(got)
            try:
                with self.open(url, at, patience, end) as body:
                    body.require_size(size)
                    if body.start != at:
                        raise self.nonsense("it sent another part of the file than was asked for")
                    for piece in body:
                        got += piece
                        patience.progressed(len(got))
                        if len(got) > end - start:
                            raise self.nonsense("it sent more than was asked for")
                if start + len(got) < end:
                    raise Cut("the connection ended early")
            except Cut as exc:
                patience.failed(exc)
        return bytes(got)

    def _json(self, url: str, params: Mapping[str, Any] | None) -> tuple[Any, str | None]:
        patience = Patience(self)
        while True:
            try:
                with self.open(url, 0, patience, params=params) as body:
                    answer = bytearray()
                    for piece in body:
                        answer += piece
                        if len(answer) > MAX_ANSWER:
                            raise self.nonsense("the answer is far too long")
                    following = body.links.get("next", {}).get("url")
                break
            except Cut as exc:
                patience.failed(exc)
        try:
            return json.loads(answer), following
        except (ValueError, RecursionError) as exc:
            raise self.nonsense("it is not JSON") from exc

    def nonsense(self, why: str) -> UserError:
        return CorruptFile(
            "The Hub's answer cannot be used",
            f"{self.subject}: {why} (from {urlsplit(self.access.endpoint).netloc}).",
            "Try again; if HF_ENDPOINT names a mirror, check that it is one.",
        )

    # --- one request --------------------------------------------------------------------------

    def open(
        self,
        url: str,
        start: int = 0,
        patience: Patience | None = None,
        end: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Body:
        """Ask for a file from byte `start` on (to `end`, exclusive); waits and asks again as the
        Hub wishes. Raises the sentence where it refuses for good."""
        patience = patience or Patience(self)
        headers = {"Accept-Encoding": "identity"}  # sizes are those of the bytes on the wire
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        while True:
            try:
                return self.watched(lambda: self._ask(url, params, headers))
            except Refused as refused:
                if refused.status == 416:
                    raise
                wait = _asked_to_wait(refused)
                if wait is not None:
                    patience.wait_as_asked(wait)
                elif refused.status >= 500:
                    patience.failed(refused)
                else:
                    raise in_words(refused, self.subject, self.access) from None
            except Cut as exc:
                patience.failed(exc)

    def pause(self, seconds: float, text: str) -> None:
        """Wait; the user sees why and may stop it."""
        until = time.monotonic() + seconds
        self.progress.tell(text, note=text)
        while (left := until - time.monotonic()) > 0:
            self.progress.check()
            time.sleep(min(POLL, left))
        self.progress.tell("")

    def watched(self, function: Callable[[], T]) -> T:
        """`function()` in the helper thread, while the user may stop it here."""
        try:
            return self._worker.call(function, self.progress.check)
        except BaseException as exc:
            if not isinstance(exc, Cut | Refused | UserError):
                self.close()  # stopped: nothing may go on behind the user's back
            raise

    def _ask(self, url: str, params: Mapping[str, Any] | None, headers: Mapping[str, str]) -> Body:
        """In the helper thread: follow redirects by hand, so that the token stays on the Hub."""
        from huggingface_hub.utils import httpx

        if self._client is None:
            timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
            self._client = httpx.Client(timeout=timeout, follow_redirects=False)
        linked_size = None
        try:
            for _ in range(MAX_REDIRECTS):
                sent = {"User-Agent": "miStudio", **headers, **self._authorization(url)}
                request = self._client.build_request("GET", url, params=params, headers=sent)
                response = self._client.send(request, stream=True)
                if not response.has_redirect_location:
                    break
                linked_size = response.headers.get("x-linked-size") or linked_size
                target = urljoin(url, response.headers["location"])
                response.close()
                if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                    raise self.nonsense("it points to an address without encryption")
                url, params = target, None
            else:
                raise self.nonsense("it points from one address to the next without end")
            if response.status_code >= 400:
                with contextlib.closing(response):
                    raise Refused(
                        response.status_code,
                        response.headers,
                        self.access.hide(_message(response)),
                        urlsplit(url).netloc,
                    )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
            raise self.nonsense("its address cannot be used") from exc
        except httpx.TransportError as exc:
            raise Cut(self.access.hide(_reason(exc, urlsplit(url).netloc))) from None
        self._response = response
        return Body(self, response, linked_size)

    def _authorization(self, url: str) -> dict[str, str]:
        """The token is for the Hub alone: its files often lie on another host, which gets none."""
        if self.access.token is None or _origin(url) != _origin(self.access.endpoint):
            return {}
        return {"Authorization": f"Bearer {self.access.token.reveal()}"}

    def _shut_down(self, response: Any) -> None:
        """Wake a helper that waits in the socket of an answer."""
        if response is None:
            return
        stream = response.extensions.get("network_stream")
        raw = stream.get_extra_info("socket") if stream is not None else None
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Body:
    """The bytes of one answer, from `start` on; `total` is the file's size where it is told."""

    def __init__(self, session: Session, response: Any, linked_size: str | None) -> None:
        self._session, self._response = session, response
        self._raw: Iterator[bytes] = response.iter_raw()
        self.links: dict[str, Any] = response.links
        self.start, self.total = 0, _number(response.headers.get("content-length"))
        if response.status_code == 206:
            span, _, total = response.headers.get("content-range", "").rpartition("/")
            first = span.removeprefix("bytes").strip().partition("-")[0]
            self.start, self.total = _number(first) or 0, _number(total)
        self._linked = _number(linked_size)

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_size(self, size: int) -> None:
        """Refuse a server that does not mean to send what the repository lists."""
        for told in (self.total, self._linked):
            if told is not None and told != size:
                raise CorruptFile(
                    "The Hub sends another file than it lists",
                    f"{self._session.subject}: a file of {size} bytes is listed, {told} bytes are "
                    "offered.",
                    "Nothing of it was kept. Try again; if it stays so, tell the owner of the "
                    "repository (or check the mirror that HF_ENDPOINT names).",
                )

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._session.watched(self.next_piece):
            yield piece

    def next_piece(self) -> bytes:
        """What has come, at least a byte; nothing at the end. In the helper thread."""
        from huggingface_hub.utils import httpx

        stream = self._response.extensions.get("network_stream")
        got = bytearray()
        try:
            while len(got) < PIECE:
                chunk = next(self._raw, b"")
                got += chunk
                # More of it only where it is there already: what came is never held back.
                if not chunk or stream is None or not stream.get_extra_info("is_readable"):
                    break
            return bytes(got)
        except (httpx.TransportError, httpx.StreamError) as exc:
            if got:
                return bytes(got)  # the next call meets the broken connection
            raise Cut(_reason(exc, "the Hub")) from None

    def close(self) -> None:
        session = self._session
        if not self._response.is_closed and session._response is self._response:
            session._response = None
            with contextlib.suppress(Exception):  # the connection is given up either way
                session._worker.call(self._response.close, lambda: None)


class Patience:
    """How often one file may fail or be told to wait before we give up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._failures = self._waits = self._furthest = 0

    def progressed(self, position: int) -> None:
        """The file is there up to `position`. Only what is new counts: a server that breaks off at
        the same place again and again is given up."""
        if position > self._furthest:
            self._failures = self._waits = 0
            self._furthest = position

    def failed(self, exc: Exception) -> None:
        """Pause before the next try, or give up with the reason."""
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise unreachable(str(exc), self._session.subject, self._furthest > 0) from None
        pause = FIRST_PAUSE * 2 ** (self._failures - 1)
        self._session.pause(pause, f"The connection failed ({exc}); trying again")

    def wait_as_asked(self, seconds: float) -> None:
        self._waits += 1
        if seconds > LONGEST_WAIT or self._waits > WAITS:
            raise too_long(seconds, self._session.subject)
        self._session.pause(seconds, f"The Hub asks to wait {max(1, round(seconds))} s")


class _Worker:
    """One helper thread, begun when it is first needed. A daemon: a socket that does not answer
    must not keep the application from ending."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False

    def call(self, function: Callable[[], T], check: Callable[[], None]) -> T:
        check()
        if self._ended:
            raise RuntimeError("the session is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
            self._thread.start()
        finished = threading.Event()
        box: dict[str, Any] = {}

        def task() -> None:
            try:
                box["value"] = function()
            except BaseException as exc:
                box["error"] = exc
            finally:
                finished.set()

        self._tasks.put(task)
        while not finished.wait(POLL):
            check()
        if "error" in box:
            raise box.pop("error")
        value: T = box["value"]
        return value

    def end(self, last: Callable[[], None]) -> None:
        if self._thread is None or self._ended:
            return
        self._ended = True
        self._tasks.put(last)
        self._tasks.put(None)
        self._thread.join(0.05)  # at once, unless it waits for a server that does not answer

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            with contextlib.suppress(Exception):
                task()


class _Remembering:
    """Progress that can say something without knowing how far the work is."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer
        self._last: tuple[float, float | None, str | None] = (0.0, None, None)

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self._last = (done, total, phase)
        self._outer.report(done, total, phase, **metrics)

    def tell(self, waiting: str, note: str = "") -> None:
        done, total, phase = self._last
        self._outer.report(done, total, phase, waiting=waiting, **({"note": note} if note else {}))


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0),
    )


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _asked_to_wait(refused: Refused) -> float | None:
    """Seconds: `Retry-After` as a number or a date, else the Hub's own `RateLimit: "api";r=0;t=55`.
    None where it is no request to wait."""
    after = refused.headers.get("retry-after", "").strip()
    if refused.status not in (429, 503) or (refused.status == 503 and not after):
        return None
    if after.isascii() and after.isdigit():
        return float(after)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(refused.headers)
    return float(limit.reset_in_seconds) if limit else 10.0


def _message(response: Any) -> str:
    """What the Hub says itself, in one short line."""
    text = response.headers.get("x-error-message", "")
    if not text:
        body = bytearray()
        with contextlib.suppress(Exception):
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > 4096:
                    break
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            text = str(json.loads(body).get("error", ""))
    return " ".join(text.split())[:200]


def _reason(exc: Exception, host: str) -> str:
    """A broken connection in words; the libraries' own often say nothing."""
    name = type(exc).__name__
    if "Timeout" in name:
        return f"{host} did not answer in time"
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return f"{host} has a certificate that this computer does not trust"
    if name == "ConnectError":
        return f"no connection to {host} ({' '.join(str(exc).split())[:120]})"
    return f"the connection to {host} broke off"
