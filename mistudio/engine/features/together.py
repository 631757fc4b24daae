"""Which features fire together, as arrays of a discovery; reading them needs no torch.

`coactivation` computes them; `jobs.coactivation` adds them to a store, for the features of the
SAE itself ("own") and for each other SAE of its run (its number):

    together_<other>_<metric>_index   int32 [F, k], -1 where there are fewer
    together_<other>_<metric>_value   float32 [F, k], NaN there
    together_<other>_<metric>_count   int32 [F, k]: tokens on which both fire
    together_fired                    int64 [F]: tokens of the sample on which each fires
    together_sample                   int64 [3 + m]: tokens, contexts, least pairs, then the
                                      numbers of the m other SAEs; written last, so that a store
                                      without it has none of the others either

The arrays of directions of a discovery itself, `neighbour_ids` and `neighbour_cosines` [F, k],
are read here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.features.store import add_arrays, damaged

MEASURES = ("phi", "jaccard", "pearson")
OWN = "own"
SAMPLE, FIRED = "together_sample", "together_fired"


@dataclass(frozen=True)
class Sample:
    """What was looked at: `tokens` of `contexts` contexts; pairs that fire together on fewer than
    `min_pairs` of them are left out. `others` are the numbers of the other SAEs."""

    tokens: int
    contexts: int
    min_pairs: int
    others: tuple[int, ...]


@dataclass(frozen=True)
class Neighbour:
    """`feature` of the SAE `sae_id` (None: the same SAE). `together`: tokens on which both fire;
    None for directions."""

    feature: int
    value: float
    together: int | None
    sae_id: int | None = None


def write(
    folder: Path, found: dict[str, Any], contexts: int, min_pairs: int, others: Sequence[int]
) -> None:
    """Add `CoActivation`s by `OWN` and by the numbers of the other SAEs, whole or not at all."""
    (folder / f"{SAMPLE}.npy").unlink(missing_ok=True)
    own = found[OWN]
    for other, pairs in found.items():
        for measure in MEASURES:
            neighbours = getattr(pairs, measure)
            name = f"together_{other}_{measure}"
            add_arrays(
                folder,
                {
                    f"{name}_index": neighbours.index,
                    f"{name}_value": neighbours.value,
                    f"{name}_count": neighbours.together,
                },
            )
    add_arrays(folder, {FIRED: own.fired})
    sample = np.array([own.tokens, contexts, min_pairs, *others], np.int64)
    add_arrays(folder, {SAMPLE: sample})


def sample_of(folder: Path) -> Sample | None:
    """None where nothing was computed."""
    path = folder / f"{SAMPLE}.npy"
    if not path.exists():
        return None
    tokens, contexts, min_pairs, *others = (int(n) for n in np.load(path, allow_pickle=False))
    return Sample(tokens, contexts, min_pairs, tuple(others))


def fired(folder: Path, feature: int) -> int:
    """On how many tokens of the sample it fires."""
    return int(_row(folder, FIRED, feature))


def neighbours(
    folder: Path, feature: int, measure: str, other: int | None = None
) -> list[Neighbour]:
    """The features that fire most alike, most alike first; those of the SAE `other` if given."""
    name = f"together_{OWN if other is None else other}_{measure}"
    columns = (_row(folder, f"{name}_{part}", feature) for part in ("index", "value", "count"))
    return [
        Neighbour(int(index), float(value), int(count), other)
        for index, value, count in zip(*columns, strict=True)
        if index >= 0
    ]


def directions(folder: Path, feature: int) -> list[Neighbour] | None:
    """The features whose decoder directions are most alike; None where the discovery has none."""
    if not (folder / "neighbour_ids.npy").exists():
        return None
    ids = _row(folder, "neighbour_ids", feature)
    cosines = _row(folder, "neighbour_cosines", feature)
    return [
        Neighbour(int(index), float(cosine), None)
        for index, cosine in zip(ids, cosines, strict=True)
        if index >= 0
    ]


def _row(folder: Path, name: str, feature: int) -> np.ndarray:
    """A copy: a mapping that stays open would keep the file from being replaced on Windows."""
    path = folder / f"{name}.npy"
    try:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[feature])
    except (OSError, ValueError, EOFError, IndexError) as exc:
        raise damaged(path) from exc
