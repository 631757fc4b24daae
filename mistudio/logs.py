"""One rotating log file, quiet third parties, and no token ever in it."""

from __future__ import annotations

import logging
import logging.handlers
import re

from mistudio.paths import log_folder

_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


class _Redact(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "hf_" in message:
            record.msg, record.args = _SECRET.sub("hf_[hidden]", message), ()
        return True


def set_up(verbose: bool = False) -> None:
    """Log to `mistudio.log` in the log folder; warnings also to stderr when `verbose`."""
    folder = log_folder()
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        folder / "mistudio.log", maxBytes=2_000_000, backupCount=3, encoding="utf-8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_Redact())
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    if verbose:
        root.addHandler(logging.StreamHandler())
    for noisy in ("transformers", "urllib3", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
