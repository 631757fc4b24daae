"""The directions of chosen features, for how long what they add is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mistudio.library.library import Library


@dataclass(frozen=True, eq=False)
class Directions:
    """Decoder rows [d_out] by feature. `normalised`: in units of a token's standard deviation."""

    sae_id: int
    rows: dict[int, np.ndarray]
    normalised: bool


def read_directions(library: Library, sae_id: int, features: Sequence[int]) -> Directions:
    """Reads these rows and nothing else of the SAE's file: for background threads."""
    import json

    from safetensors import safe_open

    folder = library.path(library.saes.get(sae_id).folder)
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    with safe_open(folder / "sae_weights.safetensors", framework="numpy") as file:
        decoder = file.get_slice("W_dec")
        rows = {feature: decoder[feature : feature + 1][0] for feature in features}
    return Directions(sae_id, rows, config.get("normalize_activations") == "layer_norm")


def length(vector: np.ndarray, normalised: bool, median_norm: float | None) -> float | None:
    """Of a sum of rows, in raw activations; None where that takes a norm that is not known. The
    median norm over sqrt(d) is the usual standard deviation."""
    found = float(np.linalg.norm(vector))
    if not normalised:
        return found
    return found * median_norm / vector.size**0.5 if median_norm else None
