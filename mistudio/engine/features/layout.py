"""Places on a plane for features whose nearest neighbours are known: UMAP and t-SNE.

Works on arrays alone and imports no torch: it is what a process of its own runs (see
`jobs/map_process.py`), since both methods hold Python's lock for as long as a step takes.

UMAP: McInnes, Healy, Melville 2018 (umap-learn). t-SNE: van der Maaten, Hinton 2008, with the
interpolation of Linderman et al. 2019 (openTSNE).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array

from mistudio.engine.progress import SILENT, Progress

METHODS = ("umap", "tsne")
TSNE_EARLY, TSNE_LATE = 250, 500  # iterations with and without exaggeration
EXAGGERATION = 12.0
FFT_ABOVE = 5000  # points; below, the exact tree sums are quicker and need no grid


@dataclass(frozen=True)
class MapSettings:
    """How a map is made. `neighbours` and `min_dist` are UMAP's, `perplexity` is t-SNE's; each
    ignores what is the other's. `components`: directions are cut down to so many principal
    components first where there are more than `reduce_above` of them (0: never).
    `with_dense`: features that are active on more than a tenth of the tokens take part too.
    `min_cluster`: the smallest group that counts as one."""

    method: str = "umap"
    neighbours: int = 15
    min_dist: float = 0.05
    perplexity: float = 30.0
    components: int = 50
    reduce_above: int = 20_000
    with_dense: bool = False
    min_cluster: int = 10
    seed: int = 0

    def nearest(self, n: int) -> int:
        """How many neighbours of each of `n` points the method looks at, itself left out."""
        wanted = self.neighbours - 1 if self.method == "umap" else round(3 * self.perplexity)
        return max(1, min(wanted, n - 1))


def lay_out(
    neighbours: np.ndarray,
    distances: np.ndarray,
    start: np.ndarray,
    settings: MapSettings,
    progress: Progress = SILENT,
) -> np.ndarray:
    """float32 [n, 2]. `neighbours` int32 [n, k] and `distances` float32 [n, k] are each point's
    nearest others, nearest first; `start` [n, 2] is where the points begin.

    One thread, so that the same seed gives the same picture on the same machine and versions.
    """
    progress.check()
    progress.report(0, 1, phase="layout")  # what follows imports for seconds first
    if settings.method == "umap":
        return _umap(neighbours, distances, start, settings, progress)
    return _tsne(neighbours, distances, start, settings, progress)


# --- UMAP -----------------------------------------------------------------------------------------


def epochs(n: int) -> int:
    """umap-learn's own rule."""
    return 500 if n <= 10_000 else 200


def _umap(
    neighbours: np.ndarray,
    distances: np.ndarray,
    start: np.ndarray,
    settings: MapSettings,
    progress: Progress,
) -> np.ndarray:
    with warnings.catch_warnings():
        # Only its optional neural variant needs it.
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        from umap.umap_ import find_ab_params, simplicial_set_embedding

    n, turns = len(neighbours), epochs(len(neighbours))
    a, b = find_ab_params(1.0, settings.min_dist)
    progress.report(0, turns, phase="layout")
    positions, _ = simplicial_set_embedding(
        data=start,
        graph=memberships(neighbours, distances).tocoo(),
        n_components=2,
        initial_alpha=1.0,
        a=a,
        b=b,
        gamma=1.0,
        negative_sample_rate=5,
        n_epochs=turns,
        init=_spread(start, settings.seed),
        random_state=np.random.RandomState(settings.seed),
        metric="euclidean",  # only for a spectral start, which this is not
        metric_kwds={},
        densmap=False,
        densmap_kwds={},
        output_dens=False,
        # The only way to be told of an epoch, and to stop between two.
        tqdm_kwds={
            "disable": False,
            "file": _Epochs(turns, progress),
            "lock_args": _BeforeLock(progress),
            "bar_format": "{n}",
            "mininterval": 0.05,
            "miniters": 1,
        },
    )
    progress.report(turns, turns)
    return np.asarray(positions, np.float32).reshape(n, 2)


class _Epochs:
    """What umap-learn writes its progress to: the number of epochs done."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress

    def write(self, text: str) -> int:
        number = text.strip()
        if number.isdigit():
            self._progress.report(int(number), self._total)
        return len(text)

    def flush(self) -> None:
        pass


class _BeforeLock:
    """Where umap-learn's progress may be stopped. tqdm holds a lock while it writes, one for the
    whole process, and keeps it for good where writing raises: whoever loads a model next would
    wait for ever. Before it takes the lock it asks whether there are arguments for that."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __bool__(self) -> bool:
        self._progress.check()
        return False


def _spread(start: np.ndarray, seed: int) -> np.ndarray:
    """As umap-learn scales a start of its own: 10 across, and no two at the same place."""
    centred = start - start.mean(axis=0)
    widest = float(np.abs(centred).max()) or 1.0
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)
    return (centred * (10.0 / widest) + noise).astype(np.float32)


def memberships(neighbours: np.ndarray, distances: np.ndarray) -> csr_array:
    """UMAP's fuzzy graph, float32 [n, n] (section 3.1 of the paper, local connectivity 1).

    As umap-learn computes it; vectorised instead of compiled, which costs a first map five
    seconds. A point itself counts as one of its `k + 1` neighbours.
    """
    n, k = neighbours.shape
    far = distances.astype(np.float64)
    nearest = np.where(far > 0, far, np.inf).min(axis=1)
    nearest[~np.isfinite(nearest)] = 0.0
    beyond = np.maximum(far - nearest[:, None], 0.0)
    sigma = _bandwidths(beyond, np.log2(k + 1))
    # umap-learn's floors, as shares of the mean distance with the point itself among them.
    own, all_ = far.sum(axis=1) / (k + 1), far.sum() / (n * (k + 1))
    sigma = np.maximum(sigma, 1e-3 * np.where(nearest > 0, own, all_))
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = np.where(beyond > 0, np.exp(-beyond / sigma[:, None]), 1.0)
    rows = np.repeat(np.arange(n), k)
    table = csr_array(
        coo_array((strength.ravel().astype(np.float32), (rows, neighbours.ravel())), shape=(n, n))
    )
    turned = csr_array(table.T)
    found = csr_array(table + turned - table.multiply(turned))
    found.eliminate_zeros()
    return found


def _bandwidths(beyond: np.ndarray, target: float) -> np.ndarray:
    """float64 [n]: the sigma at which the sum of exp(-beyond / sigma) over a row is `target`."""
    low, high = np.zeros(len(beyond)), np.full(len(beyond), np.inf)
    middle = np.ones(len(beyond))
    for _ in range(64):
        with np.errstate(divide="ignore", over="ignore"):
            total = np.exp(-beyond / middle[:, None]).sum(axis=1)
        close = np.abs(total - target) < 1e-5
        above = (total > target) & ~close
        below = ~above & ~close
        high = np.where(above, middle, high)
        low = np.where(below, middle, low)
        halved = (low + high) / 2
        middle = np.where(close, middle, np.where(np.isinf(high), middle * 2, halved))
    return middle


# --- t-SNE ----------------------------------------------------------------------------------------


def _tsne(
    neighbours: np.ndarray,
    distances: np.ndarray,
    start: np.ndarray,
    settings: MapSettings,
    progress: Progress,
) -> np.ndarray:
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    n, k = neighbours.shape
    total = TSNE_EARLY + TSNE_LATE
    progress.report(0, total, phase="layout")
    affinities = PerplexityBasedNN(
        perplexity=min(settings.perplexity, k / 3),
        knn_index=PrecomputedNeighbors(
            np.ascontiguousarray(neighbours, np.int64), np.ascontiguousarray(distances, np.float64)
        ),
        n_jobs=1,
    )
    # A start of this size lets the early exaggeration arrange the whole (Kobak, Berens 2019).
    scaled = _spread(start, settings.seed).astype(np.float64)
    scaled *= 1e-4 / max(float(scaled[:, 0].std()), 1e-12)
    embedding = TSNEEmbedding(
        scaled,
        affinities,
        negative_gradient_method="fft" if n > FFT_ABOVE else "bh",
        n_jobs=1,
        random_state=settings.seed,
    )
    for done, turns, more in (
        (0, TSNE_EARLY, {"exaggeration": EXAGGERATION, "momentum": 0.5}),
        (TSNE_EARLY, TSNE_LATE, {"momentum": 0.8}),
    ):
        embedding = embedding.optimize(
            turns,
            callbacks=_Iterations(done, total, progress),
            callbacks_every_iters=5,
            **more,
        )
    progress.report(total, total)
    return np.asarray(embedding, np.float32)


class _Iterations:
    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = done, total, progress

    def __call__(self, iteration: int, error: float, embedding: np.ndarray) -> bool:
        self._progress.check()
        self._progress.report(self._done + iteration, self._total)
        return False
