"""A sparse dictionary: an encoder, an activation function, a decoder, and perhaps a linear skip.
Works on raw activations.

`encode` is the only place that scales inputs. Files are in `files.py`, measures in `metrics.py`,
learning in `engine/training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mistudio.engine.sae.activation import Activation

# Pre-activations are computed for at most this many (row, latent) pairs at a time: 64 MB.
CHUNK_CELLS = 16 * 1024**2
# From this share of active entries on, a dense product beats the sparse one (measured: sparse
# gathers reach a tenth of a matrix product's arithmetic speed on CPU).
DENSE_SHARE = 0.08


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

    def with_values(self, values: Tensor) -> Codes:
        """The same entries with other values [nnz]."""
        return Codes(self.rows, self.latents, values, self.n_rows, self.d_sae)

    def dense(self) -> Tensor:
        """[n_rows, d_sae]"""
        out = torch.zeros(
            self.n_rows, self.d_sae, dtype=self.values.dtype, device=self.values.device
        )
        out[self.rows, self.latents] = self.values
        return out


@dataclass(frozen=True)
class Dictionary:
    """Parameters of one dictionary, whatever its sparsity and its wiring.

    `W_enc` is kept transposed as `encoder` [d_sae, d_in], one row a latent, as its gradients are
    row-sparse; `decoder` is W_dec [d_sae, d_out]. With u = scale * norm(x):

        z = act((u - centre) @ W_enc + b_enc)
        reconstruction = (z @ W_dec + b_dec + u @ skip^T) / out_scale

    `centre` [d_in] is b_dec where None is given (the usual autoencoder); transcoders have their
    own or zeros. `skip` [d_out, d_in] is the linear bypass, None without. `norm` is the identity,
    or what an imported SAE was trained on: "centre" takes the token's mean over d_in away and
    adds it to the reconstruction again; "layer_norm" also divides by its standard deviation.
    A finished dictionary is folded: scale = out_scale = 1.
    """

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor
    activation: Activation
    scale: float = 1.0
    out_scale: float | None = None  # None: as `scale`
    centre: Tensor | None = None
    skip: Tensor | None = None
    norm: str = "none"

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
        centre = self.b_dec if self.centre is None else self.centre
        u = self._normalised(x.float())[0] * self.scale
        return torch.addmm(self.b_enc, u - centre, self.encoder.T)

    def encode(self, x: Tensor) -> Codes:
        """Active latents of raw activations [n, d_in]; memory stays flat in n * d_sae."""
        rows, latents, values = [], [], []
        for start, chunk in _chunks(x, self.d_sae):
            r, c, v = self.activation.select(self.pre_activations(chunk))
            rows.append(r + start)
            latents.append(c)
            values.append(v)
        return Codes(torch.cat(rows), torch.cat(latents), torch.cat(values), len(x), self.d_sae)

    def activations(self, x: Tensor, latents: Tensor) -> Tensor:
        """[n, m] float32: how much each of `latents` [m] is active on raw activations [n, d_in].
        Costs m dot products a row where the activation acts on every latent by itself."""
        activation = self.activation.of(latents)
        if activation is None:
            codes, columns = self.encode(x), latents
        else:
            encoder, bias = self.encoder[latents], self.b_enc[latents]
            some = replace(self, encoder=encoder, b_enc=bias, activation=activation)
            codes, columns = some.encode(x), torch.arange(len(latents), device=x.device)
        found = torch.zeros(len(x), len(latents), device=x.device)
        for column, latent in enumerate(columns):
            here = codes.latents == latent
            found[codes.rows[here], column] = codes.values[here].float()
        return found

    def decode(self, codes: Codes, x: Tensor | None = None) -> Tensor:
        """Reconstruction [n, d_out] of the raw target.

        `x` [n, d_in], the raw input, is needed where there is a skip or a norm: they pass some of
        it on. Raises ValueError without it.
        """
        out = weighted_rows(self.decoder, codes) + self.b_dec
        out_scale = self.scale if self.out_scale is None else self.out_scale
        if self.skip is None and self.norm == "none":
            return out / out_scale
        if x is None:
            raise ValueError("This dictionary passes part of its input on: decode needs it")
        normalised, mean, spread = self._normalised(x.float())
        if self.skip is not None:
            out = out + (normalised * self.scale) @ self.skip.T
        return out / out_scale * spread + mean

    def spread(self, x: Tensor) -> Tensor:
        """[n]: what decoding multiplies a row of raw inputs [n, d_in] by, beside `out_scale`."""
        size = self._normalised(x.float())[2]
        return size[:, 0] if isinstance(size, Tensor) else torch.ones(len(x), device=x.device)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    def folded(self) -> Dictionary:
        """The same function with scale 1: `W_enc *= s, W_dec /= s, b_dec /= s`.

        Latent activations keep their (scaled) unit, thresholds too.
        """
        out_scale = self.scale if self.out_scale is None else self.out_scale
        return replace(
            self,
            encoder=self.encoder * self.scale,
            decoder=self.decoder / out_scale,
            b_dec=self.b_dec / out_scale,
            centre=None if self.centre is None else self.centre / self.scale,
            skip=None if self.skip is None else self.skip * (self.scale / out_scale),
            scale=1.0,
            out_scale=1.0,
        )

    def with_centre_in_bias(self) -> Dictionary:
        """The same function with a centre of zeros: `b_enc -= centre @ W_enc`."""
        centre = self.b_dec if self.centre is None else self.centre
        return replace(
            self,
            b_enc=self.b_enc - self.encoder @ centre,
            centre=torch.zeros_like(centre),
        )

    def with_unit_decoder(self) -> Dictionary:
        """Decoder rows of norm 1; latent activations then are in units of the activation's norm.

        Exact for every activation but TopK, which is left alone where its rows differ in norm.
        Rows of zeros stay.
        """
        norms = self.decoder.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        activation = self.activation.rescaled(norms)
        if activation is None:
            return self
        return replace(
            self,
            encoder=self.encoder * norms[:, None],
            b_enc=self.b_enc * norms,
            decoder=self.decoder / norms[:, None],
            activation=activation,
        )

    def to(self, device: str | torch.device) -> Dictionary:
        return replace(
            self,
            encoder=self.encoder.to(device),
            b_enc=self.b_enc.to(device),
            decoder=self.decoder.to(device),
            b_dec=self.b_dec.to(device),
            activation=self.activation.to(device),
            centre=None if self.centre is None else self.centre.to(device),
            skip=None if self.skip is None else self.skip.to(device),
        )

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(x as the encoder wants it, what to add to and what to multiply the output with)."""
        if self.norm == "none":
            return x, 0.0, 1.0
        mean = x.mean(dim=1, keepdim=True)
        if self.norm == "centre":
            return x - mean, mean, 1.0
        # As OpenAI's LN and SAELens' "layer_norm" (unbiased standard deviation, eps 1e-5).
        spread = (x - mean).std(dim=1, keepdim=True)
        return (x - mean) / (spread + 1e-5), mean, spread


def weighted_rows(table: Tensor, codes: Codes) -> Tensor:
    """sum_j values_ij * table[latents_ij], [n_rows, d]: the sparse product z @ W_dec.

    `embedding_bag` is the fastest public primitive for it on CPU and CUDA.
    """
    if len(codes.values) > DENSE_SHARE * codes.n_rows * codes.d_sae:
        return codes.dense() @ table
    return F.embedding_bag(
        codes.latents, table, codes.offsets[:-1], per_sample_weights=codes.values, mode="sum"
    )


def _chunks(x: Tensor, d_sae: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, CHUNK_CELLS // max(d_sae, 1))
    for start in range(0, max(len(x), 1), step):
        yield start, x[start : start + step]
