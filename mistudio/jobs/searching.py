"""The job that makes a large dataset searchable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library


@dataclass(frozen=True)
class IndexDataset:
    """A dataset gets an index for its search, in its own folder. Once is enough."""

    dataset_id: int

    kind: ClassVar[str] = "index_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("index"),)

    def title(self, library: Library) -> str:
        return f"Index {library.datasets.get(self.dataset_id).name} for its search"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.datasets.search import build_index

        dataset = context.library.datasets.get(self.dataset_id)
        context.library.require_space(dataset.bytes // 3, f"The index of {dataset.name}")
        build_index(context.library.path(dataset.folder), context)
        return {}
