"""Sparse products of a training step. Only active entries carry gradient, so everything after the
encoder's matrix product costs nnz * d instead of batch * d_sae * d.

Where many entries are active (early L1 training) the dense product is faster and is taken.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.sae.dictionary import DENSE_SHARE, Codes

# torch says so once per process; sampled_addmm on CSR is all that is used of it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def is_dense(codes: Codes) -> bool:
    return len(codes.values) > DENSE_SHARE * codes.n_rows * codes.d_sae


def entry_dots(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """left[row] . right[latent] at every entry, [nnz]; `left` [n_rows, d], `right` [d_sae, d]."""
    if is_dense(codes):
        return (left @ right.T)[codes.rows, codes.latents]
    pattern = torch.sparse_csr_tensor(
        codes.offsets,
        codes.latents,
        torch.zeros_like(codes.values),
        (codes.n_rows, codes.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


class ByLatent:
    """The entries of `codes` regrouped by latent: sums over the batch, one row a latent."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._dense = is_dense(codes)
        if not self._dense:
            self._order = torch.sort(codes.latents, stable=True).indices
            counts = torch.bincount(codes.latents, minlength=codes.d_sae)
            self._offsets = counts.cumsum(0) - counts
            self._rows = codes.rows[self._order]

    def sum(self, values: Tensor) -> Tensor:
        """sum_i values_ij, [d_sae]"""
        out = torch.zeros(self._codes.d_sae, dtype=values.dtype, device=values.device)
        return out.index_add_(0, self._codes.latents, values)

    def rows(self, table: Tensor, values: Tensor) -> Tensor:
        """sum_i values_ij * table[i], [d_sae, d]; `table` is [n_rows, d]."""
        if self._dense:
            return self._codes.with_values(values).dense().T @ table
        return torch.nn.functional.embedding_bag(
            self._rows, table, self._offsets, per_sample_weights=values[self._order], mode="sum"
        )


@dataclass
class Gradients:
    """What one part of a batch adds to the gradient, by parameter name; summed over parts."""

    values: dict[str, Tensor]

    def add(self, other: dict[str, Tensor]) -> None:
        for name, value in other.items():
            if name in self.values:
                self.values[name] += value
            else:
                self.values[name] = value
