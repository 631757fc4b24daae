"""Counts what torch really does: the arithmetic of matrix products, and the bytes of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = {"mm", "addmm", "bmm", "linear", "scaled_dot_product_attention"}
GATHERS = {"_embedding_bag_forward_only", "_embedding_bag", "sparse_sampled_addmm"}
# Their work is counted in cells and keys, not in bytes.
SELECTIONS = {"topk", "gt", "nonzero", "sort", "bincount", "cumsum"}
# No data moves: views, allocations, and dropout outside of training.
FREE = {
    *("view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "alias", "_unsafe_view", "as_strided", "unbind", "split", "empty", "empty_like"),
    *("dropout", "lift_fresh", "sparse_compressed_tensor", "values", "_local_scalar_dense"),
}


@dataclass(frozen=True)
class Counted:
    """`flops` of matrix products; `moved`: bytes that all other operations but selections read and
    write, without the rows that were read by index: those are `gathered`; `operations` begun."""

    flops: int
    moved: int
    gathered: int
    operations: int


class _Bytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = self.gathered = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.operations += name not in FREE
        if name in GATHERS:
            self.gathered += _gathered(name, args)
            self.moved += sum(_size(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        elif name not in FREE | PRODUCTS | SELECTIONS:
            written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.moved += sum(map(_size, given)) + sum(map(_size, written))
            if not written:  # works in place on all it is given (fused Adam)
                self.moved += sum(map(_size, given))
        return out


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0


def _gathered(name: str, args: tuple) -> int:
    if name == "sparse_sampled_addmm":
        pattern, left = args[0], args[1]
        return pattern.values().numel() * left.shape[1] * left.element_size()
    table, indices = args[0], args[1]
    return indices.numel() * table.shape[1] * table.element_size()


def count_work(work: Callable[[], object]) -> Counted:
    """Run `work` twice and count it."""
    with FlopCounterMode(display=False) as flops:
        work()
    with _Bytes() as counter:
        work()
    return Counted(flops.get_total_flops(), counter.moved, counter.gathered, counter.operations)
