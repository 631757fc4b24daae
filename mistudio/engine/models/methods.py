"""What Q8, Q4 and Q2 are, and bitsandbytes brought in quietly and without a network.

Q8 is bitsandbytes' LLM.int8 vectors, Q4 its nf4; Q2 is our own (`quantise` says why). Importing
this needs no torch: the window asks it which measurements still hold.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mistudio.errors import Incompatible

# What is kept with measurements and trained dictionaries: figures of one method say nothing about
# another of as many bits.
METHODS = {"q8": "LLM.int8 vectors", "q4": "nf4, blocks of 64", "q2": "least squares, groups of 32"}
_FORMER = METHODS["q2"]  # of records older than the entry, at all three precisions

_lock = threading.Lock()
_found: Any = None
_reason = ""


def method_of(precision: str) -> str:
    """The method of a quantised precision with its library's version, "" of others."""
    if precision not in METHODS:
        return ""
    if precision == "q2":
        return METHODS[precision]
    try:
        return f"{METHODS[precision]} (bitsandbytes {version('bitsandbytes')})"
    except PackageNotFoundError:
        return METHODS[precision]


def still_holds(record: Mapping[str, Any], precision: str) -> bool:
    """Whether what a record says of a precision was measured of its present method, whatever the
    version of the library."""
    return str(record.get("method") or _FORMER).startswith(METHODS[precision])


def bitsandbytes() -> Any:
    """The library, imported at the first call (0.1 s). Raises `Incompatible` with the reason where
    it is not installed or does not run here; nothing else takes its place."""
    global _found, _reason
    with _lock:
        if _found is None and not _reason:
            try:
                _found = _imported()
            except Exception as exc:  # whatever a library with programs of its own fails with
                _reason = " ".join(str(exc).split())[:300] or type(exc).__name__
        if _found is None:
            raise Incompatible(
                "bitsandbytes does not run here",
                f"Q8, Q4 and 8-bit Adam are parts of it, and this computer says: {_reason}",
                "Choose FP32, BF16 or FP16, or install bitsandbytes: it has packages for Linux, "
                "Windows and Macs with Apple chips.",
            )
        return _found


def _imported() -> Any:
    with _quiet_and_alone():
        import bitsandbytes as library
    extension: Any = sys.modules["bitsandbytes.cextension"]
    lacking = isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary)
    if lacking and sys.platform != "darwin":  # where its kernels are PyTorch's own
        extension.get_native_library()  # says why
    apple: Any = sys.modules.get("bitsandbytes.backends.mps.ops")
    if apple is not None:
        apple._kernel_load_failed = True  # else it asks the Hub for kernels at the first product
    return library


@contextmanager
def _quiet_and_alone() -> Iterator[None]:
    """While bitsandbytes is imported: no package `kernels`, through which it fetches programs from
    the Hub wherever that is installed; no complaint in the log that it is not; and no PyTorch
    compiler, which would be imported (1.2 s, 40 MB) to start a C++ compiler in the middle of a
    forward pass."""
    import torch

    log = logging.getLogger("bitsandbytes")
    level, compiler = log.level, torch.compile
    missing = object()
    kernels: Any = sys.modules.get("kernels", missing)
    log.setLevel(logging.CRITICAL)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    torch.compile = _uncompiled
    try:
        yield
    finally:
        torch.compile = compiler
        if kernels is missing:
            sys.modules.pop("kernels", None)
        else:
            sys.modules["kernels"] = kernels
        log.setLevel(level)


def _uncompiled(model: Any = None, **_options: Any) -> Any:
    """`torch.compile` that leaves functions as they are, called or as a decorator."""
    keep: Callable[[Any], Any] = lambda function: function  # noqa: E731
    return keep if model is None else model
