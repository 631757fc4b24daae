"""Jobs on finished dictionaries: export them, import others'."""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput, NotFound
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library, flush_tree


@dataclass(frozen=True)
class Export:
    """The SAEs of a run are written to a folder outside the library."""

    training_id: int
    folder: str
    format: str = "saelens"

    kind: ClassVar[str] = "export"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("export"),)

    def title(self, library: Library) -> str:
        return f"Export {library.trainings.get(self.training_id).name} as {self.format}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return {
            "folders": export(
                context.library,
                self.training_id,
                self.format,
                Path(self.folder).expanduser(),
                context,
            )
        }


def export(
    library: Library,
    training_id: int,
    format: str,
    folder: Path,
    progress: Progress = SILENT,
) -> list[str]:
    """Copy the run's SAE folders (SAELens' format is our own), complete or not at all, and read
    each back. Returns the folders."""
    from mistudio.engine.sae.files import load_sae

    if format != "saelens":
        raise InvalidInput(
            "Unknown export format", f"{format!r} is not known.", "Use `saelens`.", field="format"
        )
    saes = library.saes.of_training(training_id)
    if not saes:
        raise NotFound("This run has no SAEs", next_step="Choose another run.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(
            "The target is not an empty folder",
            f"{folder} already holds something.",
            "Choose a new or empty folder.",
            field="folder",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_dead_partials(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        for number, sae in enumerate(saes):
            progress.report(number, len(saes))
            load_sae(library.path(sae.folder))  # a refusal should name this place, not the copy
            _copy_tree(library.path(sae.folder), partial / sae.hook_point, progress)
            load_sae(partial / sae.hook_point)
        flush_tree(partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [str(folder / sae.hook_point) for sae in saes]


def _clear_dead_partials(folder: Path) -> None:
    """What exports to the same place left when their process was killed."""
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            shutil.rmtree(partial, ignore_errors=True)


def _copy_tree(source: Path, target: Path, progress: Progress) -> None:
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, place.open("wb") as writer:
            while block := reader.read(8 * 1024**2):
                progress.check()
                writer.write(block)
