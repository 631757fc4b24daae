"""Maps of features: decoder directions that point alike stand close together on a plane.

A map has three steps. `prepare` (here): which features, their nearest neighbours by cosine, exact.
`layout.lay_out`: places on the plane. `judge` (here): how far the plane can be trusted. What came
of them is kept beside the discovery (`save_map`), one map for each choice of settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.features.layout import MapSettings
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

FOLDER = "maps"  # in a discovery's folder
FEWEST = 10
DENSE = 0.1  # density above which a feature is called dense
PLACE = np.dtype([("x", "<f4"), ("y", "<f4"), ("group", "<i4")])
JUDGED = 1000  # features that trustworthiness is computed of
NEAR = 15  # neighbours that it looks at
CELLS = 4 * 1024**2


@dataclass(frozen=True)
class Prepared:
    """`features` int32 [n] take part; `neighbours` int32 [n, k] and `distances` float32 [n, k]
    (1 - cosine) are each one's nearest others, nearest first; `start` float32 [n, 2] are the
    first two principal components; `components` says how many were kept before neighbours were
    looked for (0: all), with which share of the variance."""

    features: np.ndarray
    neighbours: np.ndarray
    distances: np.ndarray
    start: np.ndarray
    components: int
    variance: float


@dataclass(frozen=True)
class Quality:
    """How well the plane keeps who is near whom, by cosine in the full width.

    `trust` is trustworthiness T(k) (Venna, Kaski 2001), 1 where every neighbour on the plane is
    one of the directions', 0.5 by chance; `kept` is the share of a feature's `near` nearest
    directions that are among its `near` nearest on the plane. Of `judged` features drawn at
    random, each against all.
    """

    trust: float
    kept: float
    near: int
    judged: int


@dataclass(frozen=True)
class FeatureMap:
    """A map that is kept. `places` `PLACE` [n_features], NaN where a feature took no part;
    `group` -1 where it is in none."""

    settings: MapSettings
    places: np.ndarray
    n: int
    dead: int
    dense: int
    no_direction: int
    components: int
    variance: float
    quality: Quality
    seconds: float
    made_at: str
    versions: dict[str, str]

    @property
    def features(self) -> np.ndarray:
        """int64 [n]: those that took part."""
        return np.flatnonzero(np.isfinite(self.places["x"]))


# --- preparing ------------------------------------------------------------------------------------


def taking_part(
    density: np.ndarray, lengths: np.ndarray, with_dense: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """(features int64 [n], how many were left out and why). `density` [F], `lengths` [F] of the
    decoder directions. Raises InvalidInput where too few are left to make a map of."""
    dead = ~(density > 0)
    dense = (density > DENSE) & ~dead if not with_dense else np.zeros(len(density), bool)
    nowhere = ~(lengths > 0) & ~dead & ~dense
    features = np.flatnonzero(~(dead | dense | nowhere))
    if len(features) < FEWEST:
        raise InvalidInput(
            "Too few features for a map",
            f"{len(features)} features are left once dead and dense ones are taken out.",
            f"A map needs {FEWEST}. Discover with more text, or train longer.",
        )
    left_out = {
        "dead": int(dead.sum()),
        "dense": int(dense.sum()),
        "no_direction": int(nowhere.sum()),
    }
    return features, left_out


def prepare(
    decoder: Any, features: np.ndarray, settings: MapSettings, progress: Progress = SILENT
) -> Prepared:
    """Neighbours of the rows `features` of `decoder` (a tensor [F, d]): exact, among all of
    them."""
    import torch

    from mistudio.engine.features.coactivation import decoder_neighbours

    rows = _unit_rows(decoder, features)
    progress.check()
    centred = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # A principal component has no sign; the same one each time.
    largest = vectors.abs().argmax(dim=0)
    vectors = vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()
    start = centred @ vectors[:, :2]
    if start.shape[1] < 2:
        start = torch.nn.functional.pad(start, (0, 2 - start.shape[1]))
    components, variance = 0, 1.0
    if 0 < settings.components < rows.shape[1] and len(rows) > settings.reduce_above:
        components = settings.components
        variance = float(values[:components].sum() / values.sum())
        rows = centred @ vectors[:, :components]
    progress.check()
    found = decoder_neighbours(rows, top=settings.nearest(len(features)), progress=progress)
    return Prepared(
        features.astype(np.int32),
        found.index,
        np.maximum(1.0 - found.value, 0.0).astype(np.float32),
        start.numpy(),
        components,
        variance,
    )


def _unit_rows(decoder: Any, features: np.ndarray) -> Any:
    import torch

    rows = decoder[torch.from_numpy(np.asarray(features, np.int64))].float().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


# --- judging --------------------------------------------------------------------------------------


def judge(
    decoder: Any,
    features: np.ndarray,
    positions: np.ndarray,
    *,
    near: int = NEAR,
    judged: int = JUDGED,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Quality:
    """How far the places [n, 2] of `features` [n] can be trusted (see `Quality`).

    T(k) = 1 - 2 / (m k (2 n - 3 k - 1)) * sum over m features of, for each of its k neighbours on
    the plane, how far that one's rank among the directions is beyond k.
    """
    from scipy.spatial import KDTree

    rows = _unit_rows(decoder, features)
    n = len(rows)
    k = max(1, min(near, (n - 1) // 2))
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(n, min(judged, n), replace=False))
    beyond, shared = 0, 0
    for part in _parts(chosen, max(1, CELLS // n)):
        progress.check()
        on_plane = _nearest_on_plane(KDTree, positions, part, k)
        alike = rows[part] @ rows.T
        alike[np.arange(len(part)), part] = float("inf")  # itself has rank 0
        theirs = alike.gather(1, _tensor(on_plane))
        ranks = np.stack(
            [(alike > theirs[:, j : j + 1]).sum(dim=1).numpy() for j in range(k)], axis=1
        )
        beyond += int(np.maximum(ranks - k, 0).sum())
        shared += int((ranks <= k).sum())
        progress.report(int(np.searchsorted(chosen, part[-1])) + 1, len(chosen), phase="judge")
    m = len(chosen)
    trust = 1.0 - 2.0 * beyond / (m * k * (2 * n - 3 * k - 1))
    return Quality(trust, shared / (m * k), k, m)


def _nearest_on_plane(tree: Any, positions: np.ndarray, part: np.ndarray, k: int) -> np.ndarray:
    """int64 [len(part), k], itself left out, also where others stand at the same place."""
    found = tree(positions).query(positions[part], k + 1)[1]
    others = found != part[:, None]
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(part), k)


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.int64))


def _parts(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


# --- keeping --------------------------------------------------------------------------------------


def map_name(settings: MapSettings) -> str:
    """The name of the map of these settings: another for each choice that matters to it."""
    values = asdict(settings)
    for other in ("perplexity",) if settings.method == "umap" else ("neighbours", "min_dist"):
        values.pop(other)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{settings.method}-{digest[:12]}"


def save_map(folder: Path, made: FeatureMap) -> None:
    """Keep a map in a discovery's folder, in place of one of the same settings; its description
    comes last, so that there is none without its places."""
    from mistudio.engine.features.store import add_arrays

    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    name = map_name(made.settings)
    description = {key: value for key, value in asdict(made).items() if key != "places"}
    path = place / f"{name}.json"
    path.unlink(missing_ok=True)
    add_arrays(place, {name: made.places})
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(description, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_map(folder: Path, name: str) -> FeatureMap | None:
    """A map that `save_map` kept under its `map_name`; None where there is none, or none that can
    be read (it is made again then)."""
    place = folder / FOLDER
    try:
        values = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        places = np.load(place / f"{name}.npy", allow_pickle=False)
        known = {entry.name for entry in fields(MapSettings)}
        settings = {key: value for key, value in values["settings"].items() if key in known}
        made = FeatureMap(
            **{
                **values,
                "settings": MapSettings(**settings),
                "quality": Quality(**values["quality"]),
                "places": places,
            }
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return made if places.dtype == PLACE else None


def kept_maps(folder: Path) -> list[FeatureMap]:
    """All maps of a discovery, newest first."""
    found = [load_map(folder, path.stem) for path in (folder / FOLDER).glob("*.json")]
    return sorted(
        (made for made in found if made is not None), key=lambda made: made.made_at, reverse=True
    )


def places_of(
    n_features: int, features: np.ndarray, positions: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """`PLACE` [n_features] of the n features that took part."""
    places = np.zeros(n_features, PLACE)
    places["x"] = places["y"] = np.nan
    places["group"] = -1
    places["x"][features], places["y"][features] = positions[:, 0], positions[:, 1]
    places["group"][features] = groups
    return places


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
