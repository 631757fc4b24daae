"""One rotating log file, quiet third parties, and no token ever in it."""

from __future__ import annotations

import logging
import logging.handlers
import re

from mistudio.paths import log_folder

_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Never write this text, whatever it looks like."""
    if len(secret) >= 8:
        _hidden.add(secret)


def redacted(text: str) -> str:
    for secret in _hidden:
        text = text.replace(secret, "[hidden]")
    return _SECRET.sub("hf_[hidden]", text)


class _Redacting(logging.Formatter):
    """The whole line, a traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def set_up(verbose: bool = False) -> None:
    """Log to `mistudio.log` in the log folder; warnings also to stderr when `verbose`."""
    folder = log_folder()
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        folder / "mistudio.log", maxBytes=2_000_000, backupCount=3, encoding="utf-8", delay=True
    )
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    if verbose:
        terminal = logging.StreamHandler()
        terminal.setFormatter(_Redacting())
        root.addHandler(terminal)
    # The HTTP clients would write every address, with the signatures of the Hub's storage.
    clients = ("urllib3", "httpx", "httpcore", "httpx2", "httpcore2")
    for noisy in ("transformers", "huggingface_hub", "filelock", *clients):
        logging.getLogger(noisy).setLevel(logging.WARNING)
