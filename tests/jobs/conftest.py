"""The built library and copies of it; torch on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from journeys import road

from mistudio.jobs.models import unload_model
from mistudio.library.library import Library


@pytest.fixture(scope="package", autouse=True)
def nothing_left_loaded() -> Iterator[None]:
    yield
    unload_model()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road.built_once(tmp_path_factory)


@pytest.fixture
def library(built: Path, tmp_path: Path) -> Iterator[Library]:
    """A copy of the built library: dataset 1, model 1, run 1 with SAE 1, its features."""
    opened = Library(road.copy_of(built, tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Library]:
    opened = Library(tmp_path / "empty")
    yield opened
    opened.close()
