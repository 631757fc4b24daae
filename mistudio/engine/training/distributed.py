"""Several processes, one run: each works through its rows of every batch and gradients are added.

Processes are started by `torchrun` or `accelerate launch`; torch.distributed does the talking.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class World(Protocol):
    """The processes of a run. Every method is called by all of them, in the same order."""

    rank: int
    size: int

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, written into `tensor`."""
        ...

    def gathered(self, rows: Tensor) -> Tensor:
        """The processes' rows (as many on each) under one another, in order of rank."""
        ...


class _Alone:
    rank = 0
    size = 1

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self, rows: Tensor) -> Tensor:
        return rows


ALONE: World = _Alone()
