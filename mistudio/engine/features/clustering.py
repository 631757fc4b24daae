"""Which rows of a table belong side by side, and which groups a map shows. No torch."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist

OPTIMAL_UP_TO = 300  # rows; ordering the leaves optimally takes cubic time


def side_by_side(rows: np.ndarray) -> np.ndarray:
    """int64 [n]: an order of the rows of `rows` [n, m] in which alike ones are neighbours.

    Average linkage on 1 - cosine; leaves ordered optimally up to `OPTIMAL_UP_TO` rows (Bar-Joseph
    et al. 2001). Rows of zeros, which are like nothing, come last.
    """
    table = np.nan_to_num(np.asarray(rows, np.float64))
    filled = np.flatnonzero(table.any(axis=1))
    empty = np.flatnonzero(~table.any(axis=1))
    if len(filled) > 2:
        distances = np.maximum(pdist(table[filled], "cosine"), 0.0)
        tree = linkage(distances, "average", optimal_ordering=len(filled) <= OPTIMAL_UP_TO)
        filled = filled[leaves_list(tree)]
    return np.concatenate([filled, empty]).astype(np.int64)


def groups_of_map(positions: np.ndarray, smallest: int) -> np.ndarray:
    """int32 [n]: the group of each point of a map [n, 2], numbered from 0 by size, largest first;
    -1 for points between groups.

    HDBSCAN's leaves (Campello et al. 2013): of what can be seen on the plane, not of the
    directions themselves, so a group is a place to look at, no finding.
    """
    from sklearn.cluster import HDBSCAN

    if len(positions) < max(smallest, 2):
        return np.full(len(positions), -1, np.int32)
    labels = HDBSCAN(
        min_cluster_size=smallest, cluster_selection_method="leaf", copy=True
    ).fit_predict(np.asarray(positions, np.float64))
    sizes = np.bincount(labels[labels >= 0])
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    found = np.full(len(labels), -1, np.int64)
    found[labels >= 0] = rank[labels[labels >= 0]]
    return found.astype(np.int32)
