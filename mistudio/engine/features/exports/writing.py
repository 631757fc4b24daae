"""Files and folders that appear whole or not at all: written beside their place, flushed, renamed.

Never overwrites: what is there stays and is refused. An interrupted export leaves nothing.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mistudio.errors import InvalidInput


def check_target(target: Path, folder: bool) -> None:
    """InvalidInput where something is in the way: for a folder an empty one may be there."""
    if folder and target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise InvalidInput(
            "There is something at this place already",
            f"{target} exists, and an export never overwrites.",
            "Choose another name or folder.",
            field="target",
        )


@contextmanager
def appearing(target: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `target` at the end; a folder is made already.

    Raises what `check_target` does. Where the block fails or is interrupted, nothing remains.
    """
    check_target(target, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_dead_partials(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        if folder:
            partial.mkdir()
        yield partial
        _flush(partial)
        check_target(target, folder)  # somebody may have made one meanwhile
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def clear_dead_partials(target: Path) -> None:
    """What exports to the same place left when their process was killed."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
