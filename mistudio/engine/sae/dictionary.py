"""A sparse dictionary: an encoder, an activation function, a decoder. Works on raw activations.

`encode` is the only place that scales inputs. Files are in `files.py`, measures in `metrics.py`,
learning in `engine/training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Pre-activations are computed for at most this many (row, latent) pairs at a time: 64 MB.
CHUNK_CELLS = 16 * 1024**2


@dataclass(frozen=True)
class Codes:
    """Sparse latent activations of `n_rows` inputs, sorted by row.

    `rows`, `latents` int64 [nnz]; `values` float [nnz]; every value is > 0.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    n_rows: int
    d_sae: int

    @property
    def offsets(self) -> Tensor:
        """Where each row begins, int64 [n_rows + 1] (CSR row pointers)."""
        counts = torch.bincount(self.rows, minlength=self.n_rows)
        return F.pad(counts.cumsum(0), (1, 0))

    @property
    def l0(self) -> float:
        """Mean active latents per row."""
        return len(self.values) / max(self.n_rows, 1)

    def dense(self) -> Tensor:
        """[n_rows, d_sae]"""
        out = torch.zeros(
            self.n_rows, self.d_sae, dtype=self.values.dtype, device=self.values.device
        )
        out[self.rows, self.latents] = self.values
        return out


class Activation(Protocol):
    """Which pre-activations survive. `name` is SAELens' architecture name."""

    @property
    def name(self) -> str: ...

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, values) of the active entries of `pre` [n, d_sae], sorted by row."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k largest of every row, and only where positive (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    name: str = "topk"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, latents = pre.topk(self.k, dim=1, sorted=False)
        rows = torch.arange(len(pre), device=pre.device)[:, None].expand_as(latents)
        kept = values > 0
        return rows[kept], latents[kept], values[kept]


@dataclass(frozen=True)
class JumpReLU:
    """Everything above its latent's threshold [d_sae] (Rajamanoharan et al. 2024, 2407.14435).

    Also how a BatchTopK dictionary is used after training: one threshold for all latents.
    """

    threshold: Tensor
    name: str = "jumprelu"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents = ((pre > self.threshold) & (pre > 0)).nonzero(as_tuple=True)
        return rows, latents, pre[rows, latents]


@dataclass(frozen=True)
class Dictionary:
    """Parameters of one SAE.

    `W_enc` is kept transposed as `encoder` [d_sae, d_in], one row a latent, as its gradients are
    row-sparse; `decoder` is W_dec [d_sae, d_out]. Latents are
    `act((scale * x - b_dec) @ W_enc + b_enc)`, the reconstruction is
    `(z @ W_dec + b_dec) / scale`. A finished dictionary is folded: scale = 1.
    """

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor
    activation: Activation
    scale: float = 1.0

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae]"""
        return self.encoder.T

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_out]"""
        return self.decoder

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def pre_activations(self, x: Tensor) -> Tensor:
        """[n, d_sae] from raw activations [n, d_in]."""
        return torch.addmm(self.b_enc, x.float() * self.scale - self.b_dec, self.encoder.T)

    def encode(self, x: Tensor) -> Codes:
        """Active latents of raw activations [n, d_in]; memory stays flat in n * d_sae."""
        rows, latents, values = [], [], []
        for start, chunk in _chunks(x, self.d_sae):
            r, c, v = self.activation.select(self.pre_activations(chunk))
            rows.append(r + start)
            latents.append(c)
            values.append(v)
        return Codes(torch.cat(rows), torch.cat(latents), torch.cat(values), len(x), self.d_sae)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction of raw activations [n, d_out]."""
        return (weighted_rows(self.decoder, codes) + self.b_dec) / self.scale

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def folded(self) -> Dictionary:
        """The same function with scale 1: `W_enc *= s, W_dec /= s, b_dec /= s`.

        Latent activations keep their (scaled) unit, thresholds too.
        """
        return replace(
            self,
            encoder=self.encoder * self.scale,
            decoder=self.decoder / self.scale,
            b_dec=self.b_dec / self.scale,
            scale=1.0,
        )

    def with_unit_decoder(self) -> Dictionary:
        """Decoder rows of norm 1; latent activations then are in units of the activation's norm.

        Exact for thresholded dictionaries, and for TopK where all rows have the same norm.
        """
        norms = self.decoder.norm(dim=1)
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold * norms)
        elif norms.numel() and float(norms.max() / norms.min()) > 1 + 1e-4:
            return self
        return replace(
            self,
            encoder=self.encoder * norms[:, None],
            b_enc=self.b_enc * norms,
            decoder=self.decoder / norms[:, None],
            activation=activation,
        )

    def to(self, device: str | torch.device) -> Dictionary:
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold.to(device))
        return replace(
            self,
            encoder=self.encoder.to(device),
            b_enc=self.b_enc.to(device),
            decoder=self.decoder.to(device),
            b_dec=self.b_dec.to(device),
            activation=activation,
        )


def weighted_rows(table: Tensor, codes: Codes) -> Tensor:
    """sum_j values_ij * table[latents_ij], [n_rows, d]: the sparse product z @ W_dec.

    `embedding_bag` is the fastest public primitive for it on CPU and CUDA.
    """
    return F.embedding_bag(
        codes.latents, table, codes.offsets[:-1], per_sample_weights=codes.values, mode="sum"
    )


def _chunks(x: Tensor, d_sae: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, CHUNK_CELLS // max(d_sae, 1))
    for start in range(0, max(len(x), 1), step):
        yield start, x[start : start + step]
