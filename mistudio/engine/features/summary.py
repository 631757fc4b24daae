"""From what was gathered to what a store holds: statistics, deciles, negatives.

All work is in blocks of features over whole arrays; nothing is done feature by feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.accumulators import (
    BLOCK,
    Activity,
    Arrays,
    Collector,
    priority,
    runs_of,
)
from mistudio.engine.features.columns import bands
from mistudio.engine.features.store import (
    DECILES,
    ENTRY,
    NEGATIVES,
    NONE,
    PER_DECILE,
    PLACE,
    TOKEN,
    TOKENS,
)
from mistudio.engine.sae.dictionary import Dictionary

HARD_TOKENS = 5  # hard negatives contain one of so many of a feature's commonest tokens
OCCURRENCES = 256  # windows of each token that are looked at for hard negatives
TRIES = 192  # windows that are looked at for random negatives
SMALL_BLOCK = 512


@dataclass(frozen=True)
class Examined:
    """What the finished arrays are made of, beside what was gathered. `same` [vocabulary] maps a
    token to one that stands for all that differ from it by case and blanks only."""

    dictionary: Dictionary
    median: float
    tokens: TokenSplit
    same: np.ndarray


def same_tokens(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """int64 [vocabulary]: the first token id that reads the same but for case and the blanks
    around it. Tokens that are nothing else, or no text of their own, stand for themselves."""
    first: dict[str, int] = {}
    same = np.arange(vocabulary)
    for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(vocabulary)])):
        bare = text.strip().lower()
        if bare and "\ufffd" not in bare:
            same[token] = first.setdefault(bare, token)
    return same


def finished(collector: Collector, examined: Examined) -> tuple[Arrays, Arrays]:
    """(columns, arrays) of a store, the logit lens apart."""
    collector.tokens.count()
    everything = np.arange(collector.size.features)
    collector.top.compact(everything)
    arrays = _top(collector)
    arrays |= _deciles(collector)
    arrays |= _tokens(collector)
    arrays |= negatives(collector, examined.tokens)
    arrays["histogram"] = collector.histograms.stored()
    arrays["histogram_top"] = collector.histograms.arrays["top"]
    columns = _of_activations(collector)
    columns |= _of_dictionary(collector, examined)
    columns |= _of_tokens(collector, arrays, examined)
    return columns, arrays


def _entries(held: Arrays, rows: slice | np.ndarray, order: np.ndarray | slice) -> np.ndarray:
    """`ENTRY`s of a pool; empty places are all zeros."""
    value = held["value"][rows, order]
    found = np.zeros(value.shape, ENTRY)
    full = value > 0
    found["value"] = value
    for name in ("window", "position"):
        found[name] = np.where(full, held[name][rows, order], 0)
    return found


def _top(collector: Collector) -> Arrays:
    k = collector.size.top_k
    held = collector.top.arrays
    top = _entries(held, slice(None), slice(0, k))
    return {"top": top, "top_span": held["span"][:, :k]}


def _deciles(collector: Collector) -> Arrays:
    """`PER_DECILE` samples of each tenth of a feature's activations, and where the tenths begin."""
    n, totals, held = collector.size.features, collector.totals.arrays, collector.sample.arrays
    edges = np.empty((n, DECILES + 1))
    edges[:, 1:-1] = collector.histograms.quantiles(np.arange(1, DECILES) / DECILES)
    fired = totals["n_active"] > 0
    lowest = np.where(fired, totals["min"], np.nan)
    highest = np.where(fired, totals["max"], np.nan)
    edges = np.clip(edges, lowest[:, None], highest[:, None])
    edges[:, 0], edges[:, -1] = lowest, highest
    edges = edges.astype(np.float32)
    deciles = np.zeros((n, DECILES, PER_DECILE), ENTRY)
    for start in range(0, n, BLOCK):
        features = np.arange(start, min(start + BLOCK, n))
        ranks = collector.sample.ranks(features)
        # A pool holds a few more than the sample where it was not compacted last.
        order = np.argsort(ranks, axis=1, kind="stable")[:, : collector.sample.wanted()]
        entries = _entries(held, features[:, None], order)
        inner = edges[features, 1:-1]
        tenth = (entries["value"][:, :, None] >= inner[:, None, :]).sum(2)
        tenth[entries["value"] == 0] = DECILES
        row, _ = np.indices(tenth.shape)
        flat = np.argsort((row * (DECILES + 1) + tenth).reshape(-1), kind="stable")
        key = (row * (DECILES + 1) + tenth).reshape(-1)[flat]
        place = runs_of(key)
        chosen = (key % (DECILES + 1) < DECILES) & (place < PER_DECILE)
        deciles[
            start + key[chosen] // (DECILES + 1), key[chosen] % (DECILES + 1), place[chosen]
        ] = entries.reshape(-1)[flat[chosen]]
    return {"deciles": deciles, "decile_edges": edges}


def _tokens(collector: Collector) -> Arrays:
    held = collector.tokens.arrays
    tokens = np.zeros((collector.size.features, TOKENS), TOKEN)
    tokens["count"] = held["count"][:, :TOKENS]
    tokens["token"] = np.where(tokens["count"] > 0, held["token"][:, :TOKENS], NONE)
    occurrences = np.minimum(held["occurrences"], NONE).astype(np.uint32)
    return {"tokens": tokens, "token_error": held["error"], "token_counts": occurrences}


# --- statistics -----------------------------------------------------------------------------------


def _of_activations(collector: Collector) -> Arrays:
    totals, held = collector.totals, collector.totals.arrays
    n = held["n_active"]
    fired = n > 0
    safe = np.maximum(n, 1)
    mean = held["sum1"] / safe
    second, third, fourth = (held[f"sum{power}"] / safe for power in (2, 3, 4))
    variance = np.maximum(second - mean**2, 0.0)
    # Below this, what is left of the difference is rounding.
    spread = fired & (variance > 1e-12 * second)
    deviation = np.sqrt(np.where(spread, variance, 1.0))
    skew = (third - 3 * mean * second + 2 * mean**3) / deviation**3
    tails = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / deviation**4 - 3
    quantiles = collector.histograms.quantiles(np.array([0.5, 0.99]))
    quantiles = np.minimum(quantiles, np.where(fired, held["max"], np.nan)[:, None])
    return {
        "n_active": n,
        "density": n / max(totals.tokens, 1),
        "n_contexts": held["n_contexts"],
        "context_density": held["n_contexts"] / max(totals.contexts, 1),
        "band": bands(n, totals.tokens),
        "max_activation": held["max"],
        "median_activation": quantiles[:, 0],
        "p99_activation": quantiles[:, 1],
        "mean_activation": mean,
        "std_activation": np.sqrt(np.where(spread, variance, 0.0)),
        "skewness": np.where(spread, skew, np.nan),
        "kurtosis": np.where(spread, tails, np.nan),
        "burst_length": np.where(fired, n / np.maximum(held["runs"], 1), np.nan),
        "active_share": np.where(fired, n / np.maximum(held["context_tokens"], 1), np.nan),
    }


def _of_dictionary(collector: Collector, examined: Examined) -> Arrays:
    dictionary = examined.dictionary
    length = np.empty(dictionary.d_sae)
    cosine = np.full(dictionary.d_sae, np.nan)
    for start in range(0, dictionary.d_sae, BLOCK):
        encoder = dictionary.encoder[start : start + BLOCK].double().cpu()
        decoder = dictionary.decoder[start : start + BLOCK].double().cpu()
        length[start : start + BLOCK] = decoder.norm(dim=1).numpy()
        if encoder.shape == decoder.shape:
            norms = encoder.norm(dim=1) * decoder.norm(dim=1)
            cosine[start : start + BLOCK] = ((encoder * decoder).sum(1) / norms).numpy()
    highest = collector.totals.arrays["max"]
    return {
        "relative_norm": highest * length / examined.median,
        "encoder_cosine": cosine,
    }


def _of_tokens(collector: Collector, arrays: Arrays, examined: Examined) -> Arrays:
    n, context = collector.size.features, collector.size.context
    tokens, top, deciles = arrays["tokens"], arrays["top"], arrays["deciles"].reshape(n, -1)
    n_active = collector.totals.arrays["n_active"]
    fired = n_active > 0
    common = tokens["token"][:, 0].astype(np.int64)
    occurrences = arrays["token_counts"][np.where(fired, common, 0)]
    found: Arrays = {
        "n_examples": (top["value"] > 0).sum(1),
        "n_decile_examples": (deciles["value"] > 0).sum(1),
        "common_token": np.where(fired, common, -1),
        "common_token_share": np.where(
            fired, tokens["count"][:, 0] / np.maximum(n_active, 1), np.nan
        ),
        "token_recall": np.where(fired, tokens["count"][:, 0] / np.maximum(occurrences, 1), np.nan),
    }
    token, share, _ = _commonest(_ids_of(top, examined.tokens, context))
    found |= {"top_token": token, "top_token_share": share}
    ids = _ids_of(deciles, examined.tokens, context)
    _, share, entropy = _commonest(np.where(ids >= 0, examined.same[ids], -1))
    found["token_purity"] = np.where(fired, share, np.nan)
    found["token_entropy"] = np.where(fired, entropy, np.nan)
    return found


def _ids_of(entries: np.ndarray, tokens: TokenSplit, context: int) -> np.ndarray:
    """int64, of the same shape: the token of each entry, -1 for empty places."""
    ids = np.full(entries.shape, -1, np.int64)
    for start in range(0, len(entries), BLOCK):
        block = entries[start : start + BLOCK]
        full = block["value"] > 0
        windows, place = np.unique(block["window"][full], return_inverse=True)
        if len(windows):
            text = tokens.windows(windows.astype(np.int64), context).numpy()
            ids[start : start + BLOCK][full] = text[place, block["position"][full]]
    return ids


def input_scores(
    top: np.ndarray, promoted: np.ndarray, tokens: TokenSplit, context: int
) -> np.ndarray:
    """float64 [F]: the share of the top examples [F, k] whose strongest token is among the tokens
    `promoted` [F, n]; NaN where there are none."""
    shares = np.full(len(top), np.nan)
    for start in range(0, len(top), BLOCK):
        ids = _ids_of(top[start : start + BLOCK], tokens, context)
        among = (ids[:, :, None] == promoted[start : start + BLOCK, None, :]).any(2)
        n = (ids >= 0).sum(1)
        shares[start : start + BLOCK][n > 0] = (among.sum(1) / np.maximum(n, 1))[n > 0]
    return shares


def _commonest(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of ids [n, m], -1 meaning none: the commonest (of equally common ones the
    lowest; -1 where there is none), its share, and the entropy divided by that of all different."""
    token = np.full(len(ids), -1, np.int64)
    share, entropy = np.zeros(len(ids)), np.zeros(len(ids))
    for start in range(0, len(ids), BLOCK):
        block = np.sort(ids[start : start + BLOCK], axis=1)
        row, column = np.nonzero(block >= 0)
        if not len(row):
            continue
        keys = (row << 32) | block[row, column]
        first = np.flatnonzero(runs_of(keys) == 0)
        times = np.diff(np.append(first, len(keys)))
        owner, value = row[first], keys[first] & 0xFFFFFFFF
        total = np.bincount(row, minlength=len(block))
        order = np.lexsort((value, -times, owner))
        best = order[runs_of(owner[order]) == 0]
        token[start + owner[best]] = value[best]
        share[start + owner[best]] = times[best] / total[owner[best]]
        p = times / total[owner]
        bits = np.bincount(owner, weights=-p * np.log(p), minlength=len(block))
        entropy[start : start + len(block)] = np.where(
            total > 1, bits / np.log(np.maximum(total, 2)), 0.0
        )
    return token, share, entropy


# --- negatives ------------------------------------------------------------------------------------


def negatives(collector: Collector, tokens: TokenSplit) -> Arrays:
    """Windows without any activation: at random, and in spite of a token that the feature likes."""
    n, context, activity = collector.size.features, collector.size.context, collector.activity
    inactive = np.full((n, NEGATIVES), NONE, np.uint32)
    hard = np.zeros((n, NEGATIVES), PLACE)
    hard["window"] = NONE
    usable = np.flatnonzero(activity.arrays["counted"].any(1))
    if not len(usable):
        return {"inactive": inactive, "hard": hard}
    index = _Occurrences(activity, tokens, context, collector.seed)
    favourites = collector.tokens.arrays["token"][:, :HARD_TOKENS].astype(np.int64)
    favourites[collector.tokens.arrays["count"][:, :HARD_TOKENS] == 0] = -1
    for start in range(0, n, SMALL_BLOCK):
        features = np.arange(start, min(start + SMALL_BLOCK, n))
        place = _candidates(features, usable, collector.seed)
        silent = ~activity.fires(features[:, None], place)
        row, column = _first(silent, NEGATIVES)
        rank = runs_of(row)
        inactive[start + row, rank] = activity.pool[place[row, column]]
        entry = index.of(favourites[features])
        place = index.place[entry]
        silent = (entry >= 0) & ~activity.fires(features[:, None], place)
        order = np.where(
            silent,
            priority(collector.seed, features[:, None], activity.pool[place]),
            np.iinfo(np.uint64).max,
        ).argsort(axis=1, kind="stable")
        silent, entry = (np.take_along_axis(a, order, 1) for a in (silent, entry))
        place = index.place[entry]
        # Two of its tokens may stand in one window: their entries lie together, the first counts.
        silent[:, 1:] &= place[:, 1:] != place[:, :-1]
        row, column = _first(silent, NEGATIVES)
        rank, entry = runs_of(row), entry[row, column]
        hard["window"][start + row, rank] = activity.pool[index.place[entry]]
        hard["position"][start + row, rank] = index.position[entry]
    return {"inactive": inactive, "hard": hard}


def _candidates(features: np.ndarray, usable: np.ndarray, seed: int) -> np.ndarray:
    """Up to `TRIES` different places of the pool for each feature, [n, tries]."""
    n = len(usable)
    steps = np.arange(1, n + 1)
    steps = steps[np.gcd(steps, n) == 1]
    zeros = np.zeros(len(features), np.int64)
    first = (priority(seed, features, zeros, 1) % np.uint64(n)).astype(np.int64)
    step = steps[(priority(seed, features, zeros, 2) % np.uint64(len(steps))).astype(np.int64)]
    return usable[(first[:, None] + step[:, None] * np.arange(min(TRIES, n))) % n]


def _first(mask: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the first n true places of every row."""
    row, column = np.nonzero(mask & (np.cumsum(mask, axis=1) <= n))
    return row, column


class _Occurrences:
    """Where in the pool each token stands: at most `OCCURRENCES` windows a token, drawn at random,
    with its first counted position in each."""

    def __init__(self, activity: Activity, tokens: TokenSplit, context: int, seed: int) -> None:
        pool = activity.pool
        text = tokens.windows(pool, context).numpy()
        place, position = np.nonzero(activity.arrays["counted"])
        token = text[place, position]
        lot = np.argsort(np.argsort(priority(seed, 0, pool, 3), kind="stable"), kind="stable")
        order = np.lexsort((position, lot[place], token))
        token, place, position = token[order], place[order], position[order]
        # The pair's first position only.
        again = (token[1:] == token[:-1]) & (place[1:] == place[:-1])
        first = np.append(True, ~again)
        token, self.place, self.position = token[first], place[first], position[first]
        self._tokens, self._starts = np.unique(token, return_index=True)
        self._sizes = np.minimum(np.diff(np.append(self._starts, len(token))), OCCURRENCES)

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Entries of the tokens [n, m], at most `OCCURRENCES` each, -1 filling up: [n, m * o].
        A token of -1 has none."""
        found = np.minimum(np.searchsorted(self._tokens, tokens), len(self._tokens) - 1)
        known = self._tokens[found] == tokens
        sizes = np.where(known, self._sizes[found], 0)
        offset = np.arange(min(OCCURRENCES, int(self._sizes.max())))
        entry = self._starts[found][:, :, None] + offset
        entry = np.where(offset < sizes[:, :, None], entry, -1)
        flat: np.ndarray = entry.reshape(len(tokens), -1)
        return flat
