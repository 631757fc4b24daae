"""A discovery of a dictionary whose features' causes are known, over real text."""

from __future__ import annotations

import numpy as np
import torch

from mistudio.engine.features.accumulators import Rows
from mistudio.engine.features.discovery import Subject, discover
from mistudio.engine.features.passing import SiteRows
from mistudio.engine.features.rules import Vocabulary
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site

POINT, CONTEXT = HookPoint("resid_post", 2), 64
TOKEN, PAIR, TOPIC, NOISE, NEVER, RARE = range(6)
MEANT, LATENTS = 6, 66  # the rest fires at random, too


class PlantedPassage:
    """Real text with made-up activations: channel i is what latent i is to show."""

    def __init__(self, tokens, activations):
        self.tokens, self.context, self.medians = tokens, CONTEXT, {POINT: 1.0}
        self.windows, self.total = np.arange(len(activations)), activations.shape[0] * CONTEXT
        self._activations = activations
        self.ids = tokens.windows(self.windows, CONTEXT).numpy()
        self.counts = ~np.isin(self.ids, tokens.meta.special_ids)
        self.counts[:, 0] = False

    def __len__(self):
        return -(-len(self.windows) // 16)

    def chunks(self, first, progress=SILENT):
        for start in range(first * 16, len(self.windows), 16):
            mask = self.counts[start : start + 16]
            window, position = np.nonzero(mask)
            rows = Rows(window + start, position, self.ids[start : start + 16][mask])
            x = torch.from_numpy(self._activations[start : start + 16][mask]).float()
            yield {POINT: SiteRows(rows, x)}

    def identity(self):
        return {}


def planted_store(model, tokenizer, tokens, folder):
    """(store, activations [windows, CONTEXT, latents], the vocabulary, what was planted)."""
    split = tokens.train
    vocabulary = Vocabulary.of(tokenizer, 1024)
    ids = split.windows(np.arange(split.n_windows(CONTEXT)), CONTEXT).numpy()
    generator = np.random.default_rng(2)
    here, before = ids[:, 1:], ids[:, :-1]
    letters = np.array([len(t.strip()) > 3 and t.strip().isalpha() for t in vocabulary.texts])
    windows_with = np.array([(ids == t).any(1).sum() for t in range(1024)])
    word = int(np.argmax(np.where(letters & (windows_with < 0.1 * len(ids)), windows_with, 0)))
    token = int(np.argmin(np.abs(windows_with - 0.2 * len(ids))))
    # The commonest pair whose second token stands behind others at least as often.
    pairs, times = np.unique(before * 1024 + here, return_counts=True)
    total = np.bincount(ids.ravel(), minlength=1024)
    plain = [bool(t.strip()) for t in vocabulary.texts]
    fitting = [
        (n, int(p))
        for p, n in zip(pairs, times, strict=True)
        if total[p % 1024] > 2 * n and plain[p // 1024] and plain[p % 1024] and p % 1024 != token
    ]
    pair = max(fitting)[1]
    fires = np.zeros((*ids.shape, 128), bool)
    fires[..., TOKEN] = ids == token
    fires[:, 1:, PAIR] = before * 1024 + here == pair
    near = np.zeros(ids.shape, bool)
    for window, position in np.argwhere(ids == word):
        near[window, max(position - 8, 0) : position + 9] = True
    fires[..., TOPIC] = near & (generator.random(ids.shape) < 0.6) & (ids != word)
    fires[..., NOISE] = generator.random(ids.shape) < 0.01
    fires[np.arange(10) * 7, 30, RARE] = True
    fires[..., MEANT:LATENTS] = generator.random((*ids.shape, LATENTS - MEANT)) < 0.01
    counts = ~np.isin(ids, split.meta.special_ids)
    counts[:, 0] = False
    x = fires * counts[..., None] * generator.lognormal(0, 1, (*ids.shape, 1))
    w, zeros = torch.eye(128)[:LATENTS], torch.zeros(LATENTS)
    sae = Dictionary(w, zeros, w, torch.zeros(128), JumpReLU(zeros))
    discover(
        PlantedPassage(split, x),
        [Subject("planted", Site.at(POINT), sae, folder)],
        model=model,
        tokenizer=tokenizer,
    )
    return FeatureStore(folder), x[..., :MEANT], vocabulary, (token, pair, word)
