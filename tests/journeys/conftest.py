"""One built library a session, and processes of their own to run `mistudio` in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from journeys import road


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
