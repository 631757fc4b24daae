"""Adding feature directions to the residual stream: how much, in which rows, at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.sae.dictionary import Dictionary
from mistudio.errors import InvalidInput


@dataclass(frozen=True)
class FeatureEdit:
    """One feature and its strength in multiples of `max_activation`, the largest activation that
    discovery saw; the raw coefficient is their product."""

    feature: int
    strength: float
    max_activation: float

    @property
    def coefficient(self) -> float:
        return self.strength * self.max_activation


def steering_vector(dictionary: Dictionary, edits: Sequence[FeatureEdit]) -> Tensor:
    """sum_f coefficient_f * W_dec[f], float32 [d]: what is added to raw activations.

    Each feature counts once whatever the order; the error term of the SAE is kept, as nothing is
    decoded.
    """
    vector = torch.zeros(dictionary.d_out, device=dictionary.device)
    for edit in edits:
        if not 0 <= edit.feature < dictionary.d_sae:
            raise InvalidInput(
                "No such feature",
                f"Feature {edit.feature} was asked for; this SAE has 0 to {dictionary.d_sae - 1}.",
                "Choose one from the feature list.",
                field="feature",
            )
        if edit.max_activation <= 0 and edit.strength:
            raise InvalidInput(
                "This feature never fired",
                f"Feature {edit.feature} has no activation to take multiples of.",
                "Choose a feature with examples.",
                field="feature",
            )
        vector += edit.coefficient * dictionary.decoder[edit.feature]
    return vector


class RowSteering:
    """The edit to register at a hook point: row r gets `vectors[r]` at the positions that count.

    A forward pass with a KV cache sees only the new positions, so the mask for absolute positions
    is set before each pass; position 0 and special tokens are never touched.
    """

    def __init__(self, vectors: Tensor, special_ids: Sequence[int]) -> None:
        self._vectors = vectors  # [rows, d]
        self._special = torch.as_tensor(sorted(special_ids), device=vectors.device)
        self._mask: Tensor | None = None

    def expect(self, ids: Tensor, first_position: int) -> None:
        """Announce the tokens [rows, seq] of the next forward pass and where they start."""
        mask = ~torch.isin(ids, self._special)
        if first_position == 0:
            mask[:, 0] = False
        self._mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        if self._mask is None or self._mask.shape != x.shape[:2]:
            raise RuntimeError("RowSteering was not told which tokens this forward pass holds")
        delta = self._mask[:, :, None] * self._vectors[:, None, :]
        return (x.float() + delta).to(x.dtype)
