"""Maps of features: planted groups stay together, quality is what others compute, maps are kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from tqdm import tqdm

from mistudio.engine.features import maps
from mistudio.engine.features.clustering import groups_of_map, side_by_side
from mistudio.engine.features.code_sample import CodeSample, load_sample, save_sample
from mistudio.engine.features.layout import MapSettings, lay_out, memberships
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput

GROUPS, EACH, WIDTH = 6, 20, 32


@pytest.fixture(scope="module")
def decoder() -> torch.Tensor:
    """[120, 32]: six groups of twenty directions each, of any length."""
    torch.manual_seed(0)
    centres = torch.randn(GROUPS, WIDTH).repeat_interleave(EACH, 0)
    rows = centres + 0.5 * torch.randn(GROUPS * EACH, WIDTH)
    return rows * torch.rand(GROUPS * EACH, 1).add(0.1)


class Told:
    """Progress that remembers, and stops after so many reports."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.reports: list[tuple[float, float | None]] = []
        self._left = stop_after

    def check(self) -> None:
        if len(self.reports) > self._left:
            raise Cancelled

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self.reports.append((done, total))


def laid_out(decoder: torch.Tensor, method: str, seed: int = 0) -> tuple[np.ndarray, Told]:
    settings = MapSettings(method=method, seed=seed)
    told = Told()
    made = maps.prepare(decoder, np.arange(len(decoder)), settings)
    return lay_out(made.neighbours, made.distances, made.start, settings, told), told


@pytest.fixture(scope="module")
def placed(decoder: torch.Tensor) -> dict[str, np.ndarray]:
    return {method: laid_out(decoder, method)[0] for method in ("umap", "tsne")}


def near_on_plane(positions: np.ndarray, k: int) -> np.ndarray:
    apart = ((positions[:, None] - positions[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    return np.argsort(apart, axis=1)[:, :k]


@pytest.mark.parametrize("method", ["umap", "tsne"])
def test_planted_groups_of_directions_stay_together(
    placed: dict[str, np.ndarray], method: str
) -> None:
    group = np.arange(GROUPS * EACH) // EACH
    purity = (group[near_on_plane(placed[method], 10)] == group[:, None]).mean()
    assert purity > 0.98
    found = groups_of_map(placed[method], 10)
    inside = found >= 0
    assert inside.mean() > 0.7
    for number in range(found.max() + 1):  # no found group mixes planted ones
        assert len(set(group[found == number].tolist())) == 1


@pytest.mark.parametrize("method", ["umap", "tsne"])
def test_the_same_seed_gives_the_same_picture(
    decoder: torch.Tensor, placed: dict[str, np.ndarray], method: str
) -> None:
    again, told = laid_out(decoder, method)
    np.testing.assert_array_equal(again, placed[method])
    other, _ = laid_out(decoder, method, seed=1)
    assert not np.array_equal(other, again)
    done, total = told.reports[-1]
    assert done == total and len(told.reports) > 5


@pytest.mark.parametrize("method", ["umap", "tsne"])
def test_laying_out_stops_when_told_to(decoder: torch.Tensor, method: str) -> None:
    settings = MapSettings(method=method)
    made = maps.prepare(decoder, np.arange(len(decoder)), settings)
    told = Told(stop_after=3)
    with pytest.raises(Cancelled):
        lay_out(made.neighbours, made.distances, made.start, settings, told)
    assert len(told.reports) < 8
    # umap-learn shows its progress with tqdm, as transformers does when it loads a model.
    with ThreadPoolExecutor() as other_thread:
        assert other_thread.submit(free, tqdm.get_lock()).result()


def free(lock: Any) -> bool:
    """Whether this thread can take both parts of tqdm's lock."""
    taken = [one for one in lock.locks if one.acquire(timeout=5)]
    for one in reversed(taken):
        one.release()
    return taken == lock.locks


def test_neighbours_are_the_nearest_by_cosine_among_those_that_take_part(
    decoder: torch.Tensor,
) -> None:
    chosen = np.arange(3, 120, 2)
    made = maps.prepare(decoder, chosen, MapSettings())
    rows = decoder[chosen].double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike = rows @ rows.T
    np.fill_diagonal(alike, -2)
    np.testing.assert_array_equal(made.neighbours, np.argsort(-alike, axis=1)[:, :14])
    np.testing.assert_allclose(made.distances, -np.sort(-alike, axis=1)[:, :14] * -1 + 1, atol=1e-6)
    assert made.components == 0
    reduced = maps.prepare(decoder, chosen, MapSettings(components=10, reduce_above=50))
    values = np.linalg.eigvalsh(np.cov((rows - rows.mean(0)).T))[::-1]
    assert reduced.components == 10
    assert reduced.variance == pytest.approx(values[:10].sum() / values.sum(), rel=1e-5)


def test_memberships_are_those_of_the_paper(decoder: torch.Tensor) -> None:
    """Each point's strengths sum to log2 k with its nearest at 1; the union is a + b - ab."""
    made = maps.prepare(decoder, np.arange(len(decoder)), MapSettings())
    n, k = made.neighbours.shape
    graph = memberships(made.neighbours, made.distances).toarray()
    np.testing.assert_allclose(graph, graph.T, atol=1e-6)
    own = np.zeros((n, n))
    for i in range(n):
        beyond = made.distances[i].astype(np.float64) - made.distances[i].min()
        low, high = 1e-9, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            if np.exp(-beyond / middle).sum() > np.log2(k + 1):
                high = middle
            else:
                low = middle
        own[i, made.neighbours[i]] = np.exp(-beyond / middle)
    np.testing.assert_allclose(graph, own + own.T - own * own.T, atol=1e-3)


def test_trust_is_what_scikit_learn_computes(
    decoder: torch.Tensor, placed: dict[str, np.ndarray]
) -> None:
    from sklearn.manifold import trustworthiness

    rows = decoder.numpy()
    everyone = np.arange(len(rows))
    shuffled = np.random.default_rng(0).permutation(placed["umap"])
    for positions in (placed["umap"], placed["tsne"], shuffled):
        theirs = trustworthiness(rows, positions, n_neighbors=15, metric="cosine")
        ours = maps.judge(decoder, everyone, positions)
        # Equal cosines may be ranked either way.
        assert ours.trust == pytest.approx(theirs, abs=1e-5)
        assert (ours.judged, ours.near) == (len(rows), 15)
    assert maps.judge(decoder, everyone, shuffled).trust < 0.6
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -2)
    near, shown = np.argsort(-alike, axis=1)[:, :15], near_on_plane(placed["umap"], 15)
    kept = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(near, shown, strict=True)])
    assert maps.judge(decoder, everyone, placed["umap"]).kept == pytest.approx(kept)
    part = maps.judge(decoder, everyone, placed["umap"], judged=80)
    assert part.judged == 80
    assert part.trust == pytest.approx(
        maps.judge(decoder, everyone, placed["umap"]).trust, abs=0.02
    )


def test_dead_dense_and_lengthless_features_take_no_part() -> None:
    density = np.full(20, 0.01)
    density[[1, 2]], density[3] = 0, 0.4
    lengths = np.ones(20)
    lengths[[2, 4]] = 0
    features, left_out = maps.taking_part(density, lengths, with_dense=False)
    assert set(range(20)) - set(features.tolist()) == {1, 2, 3, 4}
    assert left_out == {"dead": 2, "dense": 1, "no_direction": 1}
    assert 3 in maps.taking_part(density, lengths, with_dense=True)[0]
    with pytest.raises(InvalidInput, match="Too few"):
        maps.taking_part(np.zeros(20), lengths, with_dense=False)


def test_a_kept_map_is_the_one_that_was_made(tmp_path: Path) -> None:
    chosen, groups = np.array([0, 2, 5]), np.array([0, -1, 0])
    places = maps.places_of(6, chosen, np.arange(6.0).reshape(3, 2), groups)
    quality = maps.Quality(0.9, 0.5, 15, 3)
    made = maps.FeatureMap(
        MapSettings(seed=3), places, 3, 2, 1, 0, 0, 1.0, quality, 1.5, "2026-01-01", {"umap": "1"}
    )
    name = maps.map_name(made.settings)
    assert maps.load_map(tmp_path, name) is None
    maps.save_map(tmp_path, made)
    read = maps.load_map(tmp_path, name)
    assert read is not None
    assert read.places.tobytes() == places.tobytes()
    assert read.features.tolist() == [0, 2, 5]
    assert (read.settings, read.quality, read.n) == (made.settings, quality, 3)
    assert [found.settings for found in maps.kept_maps(tmp_path)] == [made.settings]
    (tmp_path / "maps" / f"{name}.npy").write_bytes(b"cut off")
    assert maps.load_map(tmp_path, name) is None and maps.kept_maps(tmp_path) == []
    # What does not matter to a method makes no other map of it.
    assert maps.map_name(MapSettings(seed=3, perplexity=5)) == name
    assert maps.map_name(MapSettings(seed=3, neighbours=5)) != name
    assert maps.map_name(MapSettings(method="tsne", perplexity=5)) != maps.map_name(
        MapSettings(method="tsne")
    )


def test_groups_are_numbered_by_size_and_what_lies_between_is_in_none() -> None:
    generator = np.random.default_rng(0)
    sizes, centres = (15, 40, 25), ((0, 0), (30, 0), (0, 30))
    blobs = [generator.normal(c, 0.5, (n, 2)) for n, c in zip(sizes, centres, strict=True)]
    found = groups_of_map(np.concatenate([*blobs, [[60.0, 60.0]]]), 10)
    common = [np.bincount(part[part >= 0]).argmax() for part in np.split(found[:80], [15, 55])]
    assert common == [2, 0, 1] and found[80] == -1
    assert groups_of_map(np.zeros((3, 2)), 10).tolist() == [-1] * 3


def test_alike_rows_stand_side_by_side_and_empty_ones_last() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.permutation(np.repeat([0, 1, 2], 5))
    rows = np.eye(3)[kinds] + 0.05 * generator.random((15, 3))
    rows[4] = 0
    order = side_by_side(rows)
    assert sorted(order.tolist()) == list(range(15)) and order[-1] == 4
    seen = kinds[order[:-1]]
    assert (seen[1:] != seen[:-1]).sum() == 2


# --- samples --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled() -> tuple[CodeSample, np.ndarray]:
    """Three windows of 4, 0 and 5 tokens that count, and the activations [9, 6] themselves."""
    generator = np.random.default_rng(1)
    codes = np.where(generator.random((9, 6)) < 0.4, generator.random((9, 6)), 0).astype(np.float32)
    codes[:, 5] = 0
    codes[2, 0] = codes[1, 0] = 0.75  # equal ones in one window: the earlier counts
    codes[[0, 3], 0] = 0
    table = csr_array(codes).tocsc()
    sample = CodeSample(
        8,
        np.array([2, 7, 9], np.int32),
        np.array([0, 4, 4, 9]),
        np.array([1, 2, 3, 7, 1, 2, 4, 5, 6], np.uint16),
        table.indptr.astype(np.int64),
        table.indices.astype(np.int32),
        table.data,
    )
    return sample, codes


def test_the_strongest_of_each_window_equals_brute_force(
    sampled: tuple[CodeSample, np.ndarray],
) -> None:
    sample, codes = sampled
    peaks, places = sample.strongest([3, 0, 5, 1])
    for i, feature in enumerate([3, 0, 5, 1]):
        for w in range(3):
            inside = codes[sample.first[w] : sample.first[w + 1], feature]
            best = inside.max(initial=0)
            assert peaks[i, w] == best
            at = sample.positions[sample.first[w] + int(inside.argmax())] if best > 0 else -1
            assert places[i, w] == at
    assert places[1, 0] == 2


@pytest.mark.parametrize("metric", ["phi", "jaccard", "pearson", "cosine"])
def test_a_heatmap_equals_brute_force(sampled: tuple[CodeSample, np.ndarray], metric: str) -> None:
    sample, codes = sampled
    chosen = [4, 0, 2, 5]
    directions = np.random.default_rng(2).normal(size=(4, 7)).astype(np.float32)
    found = sample.pairs(metric, chosen, directions if metric == "cosine" else None)
    assert found.features == tuple(chosen) and found.tokens == 9
    table = codes[:, chosen].astype(np.float64)
    fires = (table > 0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "phi":
            wanted = np.corrcoef(fires.T)
        elif metric == "pearson":
            wanted = np.corrcoef(table.T)
        elif metric == "jaccard":
            both = fires.T @ fires
            wanted = both / (fires.sum(0)[:, None] + fires.sum(0) - both)
            wanted[3], wanted[:, 3] = np.nan, np.nan
        else:
            unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
            wanted = unit @ unit.T
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    np.testing.assert_array_equal(found.together, fires.T @ fires)
    if metric != "cosine":
        assert np.isnan(found.values[3]).all()  # never fired: no number, not a zero


def test_a_sample_is_kept_whole_or_not_at_all(
    sampled: tuple[CodeSample, np.ndarray], tmp_path: Path
) -> None:
    sample, codes = sampled
    assert load_sample(tmp_path) is None
    save_sample(tmp_path, sample)
    read = load_sample(tmp_path)
    assert read is not None and (read.tokens, read.n_features) == (9, 6)
    np.testing.assert_array_equal(read.of([1, 5, 0]).toarray(), codes[:, [1, 5, 0]])
    np.save(tmp_path / "sample" / "rows.npy", np.zeros(2, np.int32))
    assert load_sample(tmp_path) is None
