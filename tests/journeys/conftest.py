"""One built library a session, and processes of their own to run `mistudio` in."""

from __future__ import annotations

from pathlib import Path

import pytest

from journeys import road


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with one of everything. Read it; copy it to change it."""
    return road.built_once(tmp_path_factory)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy of the built library."""
    return road.copy_of(built, tmp_path)


@pytest.fixture(scope="session")
def mistudio(tmp_path_factory: pytest.TempPathFactory) -> road.Children:
    return road.children_once(tmp_path_factory)
