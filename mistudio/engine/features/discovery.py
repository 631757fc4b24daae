"""Discovery: one pass over text that finds, for every latent of every dictionary of a run, its
exact strongest examples, samples of every tenth of its activations, how often and how strongly it
fires, on which tokens, in which windows it does not; and what it promotes.

Memory does not grow with the text (`plan`). With a folder to keep its state in, a pass that was
interrupted goes on where that was last written, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mistudio.engine.features import store
from mistudio.engine.features.accumulators import (
    POOL,
    Collector,
    Size,
    collector_bytes,
    priority,
)
from mistudio.engine.features.logit_lens import full_logit_lens, written_directions
from mistudio.engine.features.passing import BATCH_WINDOWS, SLICE, Passage, exclusions
from mistudio.engine.features.store import FeatureMeta, write_store
from mistudio.engine.features.summary import Examined, finished, input_scores, same_tokens
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.progress import SILENT, Interrupted, Progress
from mistudio.engine.sae.dictionary import CHUNK_CELLS, Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import UnsupportedModel

RADIUS = 24  # tokens kept on each side of an example's strongest token
TOP_K = 20
LOGIT_TOKENS = 20  # of each side
SAVE_EVERY = 64  # chunks between two savings, at least
SAVING_SHARE = 0.02  # of the time at most goes into saving
STATE, PART = "state.json", ".part"


@dataclass(frozen=True)
class Subject:
    """A dictionary to look into, its site, and the folder that gets its store. `name` tells it
    from the others of the pass; `provenance` goes into the store's description."""

    name: str
    site: Site
    dictionary: Dictionary
    folder: Path
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """`one_per_context`: a window gives at most its strongest token to a feature's top examples."""

    top_k: int = TOP_K
    one_per_context: bool = True
    seed: int = 0
    radius: int = RADIUS


@dataclass(frozen=True)
class DiscoveryPlan:
    """What a pass will take on top of the loaded model, in bytes by part."""

    memory: dict[str, int]
    disk: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def plan(
    shapes: Sequence[tuple[int, int, int]],
    *,
    context: int,
    windows: int,
    vocabulary: int,
    options: Options | None = None,
    active: float = 64,
) -> DiscoveryPlan:
    """Memory and disk for dictionaries of (d_sae, d_in, d_out); `active` is how many latents a
    token activates. Neither grows with the text: windows beyond `POOL` change nothing."""
    options = options or Options()
    batch_tokens = max(SLICE, BATCH_WINDOWS * context)
    sizes = [
        Size(n, context, options.top_k, options.radius, min(windows, POOL), vocabulary)
        for n, _, _ in shapes
    ]
    largest = max((size.features for size in sizes), default=0)
    memory = {
        "dictionaries": sum(4 * n * (d_in + d_out + 2) for n, d_in, d_out in shapes),
        "gathered": sum(map(collector_bytes, sizes)),
        # Activations of a chunk at all sites; pre-activations and what choosing from them takes.
        "activations": sum(4 * batch_tokens * d_in for _, d_in, _ in shapes),
        "encoding": 3 * 4 * min(CHUNK_CELLS, batch_tokens * largest),
        "sorting": round(15 * 8 * batch_tokens * active),
        # Of one dictionary at a time: its finished arrays, and blocks of work.
        "finishing": _stored_bytes(largest, options, vocabulary) + 96 * 1024**2,
    }
    disk = sum(_stored_bytes(size.features, options, vocabulary) for size in sizes)
    return DiscoveryPlan(memory, disk)


def _stored_bytes(features: int, options: Options, vocabulary: int) -> int:
    """Upper bound of a store."""
    entry, span = store.ENTRY.itemsize, 2 * (2 * options.radius + 1)
    each = options.top_k * (entry + span)
    each += store.DECILES * store.PER_DECILE * entry + 4 * (store.DECILES + 1)
    each += store.NEGATIVES * (4 + store.PLACE.itemsize)
    each += 4 * store.BINS + store.TOKENS * store.TOKEN.itemsize + 8
    each += 2 * LOGIT_TOKENS * 8 + 4 * 50 + 8 + 8 * len(store.BY_NAME)
    return features * each + 4 * vocabulary


def discover(
    passage: Passage,
    subjects: Sequence[Subject],
    *,
    model: HookedDecoder,
    tokenizer: Any,
    options: Options | None = None,
    keep: Path | None = None,
    progress: Progress = SILENT,
) -> list[FeatureMeta]:
    """Look at every latent of the subjects' dictionaries over `passage` and write their stores.

    In `keep` the pass saves what it has gathered, now and then and when it is interrupted; a state
    that lies there and belongs to the same pass is gone on from.
    """
    options = options or Options()
    work = _Pass(passage, subjects, options, keep, len(tokenizer), progress)
    work.run()
    same = same_tokens(tokenizer, work.vocabulary)
    return [work.write(subject, model, same) for subject in subjects]


class _Pass:
    """The collectors of a pass, and how far it is."""

    def __init__(
        self,
        passage: Passage,
        subjects: Sequence[Subject],
        options: Options,
        keep: Path | None,
        vocabulary: int,
        progress: Progress,
    ) -> None:
        self._passage, self._subjects, self._options = passage, subjects, options
        self._keep, self._progress = keep, progress
        self.vocabulary = max(vocabulary, passage.tokens.meta.vocab_size)
        self._begin()
        self._identity: dict[str, Any] = {}
        if keep is not None:
            self._identity = json.loads(json.dumps(self._identified()))

    def _begin(self) -> None:
        passage, options = self._passage, self._options
        pool = pool_of(passage.windows, options.seed)
        self._collectors = {
            subject.name: Collector(
                Size(
                    subject.dictionary.d_sae,
                    passage.context,
                    options.top_k,
                    options.radius,
                    len(pool),
                    self.vocabulary,
                ),
                pool=pool,
                seed=options.seed,
                one_per_context=options.one_per_context,
            )
            for subject in self._subjects
        }
        self._done = 0

    def run(self) -> None:
        if self._keep is not None:
            self._take_up(self._keep)
        saved_at, last, cost = self._done, time.monotonic(), 0.0
        try:
            for chunk in self._passage.chunks(self._done, self._progress):
                self._add(chunk)
                self._done += 1
                self._report()
                due = self._done - saved_at >= SAVE_EVERY
                if self._keep and due and time.monotonic() - last >= cost / SAVING_SHARE:
                    began = time.monotonic()
                    self._save(self._keep)
                    saved_at, last = self._done, time.monotonic()
                    cost = last - began
        except Interrupted:
            if self._keep and self._done > saved_at:
                self._save(self._keep)
            raise
        if self._keep and self._done > saved_at:
            self._save(self._keep)

    @torch.inference_mode()
    def _add(self, chunk: Any) -> None:
        for subject in self._subjects:
            self._progress.check()
            site = chunk[subject.site.input]
            if len(site.rows.windows):
                x = site.activations.to(subject.dictionary.device).float()
                self._collectors[subject.name].add(subject.dictionary.encode(x), site.rows)

    def _report(self) -> None:
        tokens = max(held.totals.tokens for held in self._collectors.values())
        self._progress.report(self._done, len(self._passage), phase="examples", tokens=tokens)

    # --- what is kept ---------------------------------------------------------------------------

    def _identified(self) -> dict[str, Any]:
        """All that the gathered figures depend on, the model apart."""
        return {
            "format": store.FORMAT,
            "passage": self._passage.identity(),
            "options": asdict(self._options),
            "subjects": {
                subject.name: [subject.site.input.name, digest(subject.dictionary)]
                for subject in self._subjects
            },
        }

    def _save(self, keep: Path) -> None:
        """The state as a folder that is whole once it has its name; earlier ones then go."""
        keep.mkdir(parents=True, exist_ok=True)
        target = keep / f"{self._done:08d}"
        part = keep / (target.name + PART)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for number, collector in enumerate(self._collectors.values()):
            for name, array in collector.state().items():
                with _flushed(part / f"{number}.{name}.npy") as file:
                    np.save(file, array)
        with _flushed(part / STATE) as file:
            file.write(json.dumps({"identity": self._identity, "done": self._done}).encode())
        _flush(part)
        os.replace(part, target)
        _flush(keep)
        for other in keep.iterdir():
            if other != target and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)

    def _take_up(self, keep: Path) -> None:
        """Go on from the newest state of this pass; what lies there else is of no use."""
        found = [path for path in keep.glob("*") if path.is_dir()]
        for folder in sorted(found, reverse=True):
            if not folder.name.endswith(PART) and self._restored(folder):
                break
        for folder in found:
            if folder.name != f"{self._done:08d}":
                shutil.rmtree(folder, ignore_errors=True)

    def _restored(self, folder: Path) -> bool:
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if state["identity"] != self._identity:
                return False
            for number, collector in enumerate(self._collectors.values()):
                names = collector.state()
                paths = {name: folder / f"{number}.{name}.npy" for name in names}
                collector.restore(
                    {
                        name: np.load(path, mmap_mode="r", allow_pickle=False)
                        for name, path in paths.items()
                    }
                )
            self._done = int(state["done"])
        except (OSError, ValueError, KeyError, EOFError):
            self._begin()
            self._progress.report(
                0,
                len(self._passage),
                phase="examples",
                note="What was kept of the interrupted discovery is damaged: it begins anew.",
            )
            return False
        self._report()
        return True

    # --- the end --------------------------------------------------------------------------------

    def write(self, subject: Subject, model: HookedDecoder, same: np.ndarray) -> FeatureMeta:
        passage, collector = self._passage, self._collectors[subject.name]
        median = passage.medians[subject.site.input]
        examined = Examined(subject.dictionary, median, passage.tokens, same)
        columns, arrays = finished(collector, examined)
        more_columns, more_arrays = _logits(model, subject, self._progress)
        columns |= more_columns
        arrays |= more_arrays
        if more_columns:
            columns["input_score"] = input_scores(
                arrays["top"], arrays["logit_ids"][:, 0], passage.tokens, passage.context
            )
        totals = collector.totals
        meta = FeatureMeta(
            n_features=subject.dictionary.d_sae,
            tokens=totals.tokens,
            contexts=totals.contexts,
            context=passage.context,
            split=passage.tokens.name,
            top_k=self._options.top_k,
            radius=self._options.radius,
            hook_point=subject.site.input.name,
            statistics=_totals(collector),
            format=store.FORMAT,
            one_per_context=self._options.one_per_context,
            seed=self._options.seed,
            median_norm=median,
            exclusions=exclusions(passage),
            provenance={
                "tokenizer": passage.tokens.meta.tokenizer_hash,
                "documents": passage.tokens.meta.documents_sha256,
                **subject.provenance,
            },
        )
        write_store(subject.folder, meta, columns, arrays)
        return meta


def _logits(
    model: HookedDecoder, subject: Subject, progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(columns, arrays) of the logit lens; no columns and no tokens where it does not apply."""
    try:
        directions = written_directions(subject.dictionary, subject.site.output)
    except UnsupportedModel:
        nothing = np.empty((subject.dictionary.d_sae, 2, 0))
        return {}, {
            "logit_ids": nothing.astype(np.int32),
            "logit_values": nothing.astype(np.float32),
        }
    lens = full_logit_lens(model, directions, top=LOGIT_TOKENS, progress=progress)
    columns = {
        "logit_std": lens.std.numpy(),
        "logit_skewness": lens.skew.numpy(),
        "logit_kurtosis": lens.kurtosis.numpy() - 3,
        "logit_top_gap": lens.top_gap.numpy(),
    }
    arrays = {
        "logit_ids": lens.ids.numpy(),
        "logit_values": lens.values.numpy(),
        "logit_histogram": lens.histogram.numpy(),
        "logit_range": np.stack([lens.low.numpy(), lens.high.numpy()], axis=1),
    }
    return columns, arrays


def _totals(collector: Collector) -> dict[str, Any]:
    n_active, tokens = collector.totals.arrays["n_active"], max(collector.totals.tokens, 1)
    alive = n_active > 0
    return {
        "alive": int(alive.sum()),
        "l0": float(n_active.sum() / tokens),
        "median_density_alive": float(np.median(n_active[alive] / tokens)) if alive.any() else 0.0,
    }


def pool_of(windows: np.ndarray, seed: int) -> np.ndarray:
    """The windows that negatives are drawn from, ascending: all, or `POOL` of them at random."""
    order = np.argsort(priority(seed, 0, windows, 4), kind="stable")[:POOL]
    return np.sort(windows[order])


def digest(dictionary: Dictionary) -> str:
    """SHA-256 of what `encode` depends on, and of the decoder."""
    found = hashlib.sha256()
    activation = asdict(dictionary.activation)  # type: ignore[call-overload]
    tensors = [dictionary.encoder, dictionary.b_enc, dictionary.decoder, dictionary.b_dec]
    tensors += [] if dictionary.centre is None else [dictionary.centre]
    plain = [dictionary.scale, dictionary.norm]
    for name, value in sorted(activation.items()):
        plain.append(name)
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        else:
            plain.append(value)
    found.update(json.dumps(plain).encode())
    for tensor in tensors:
        found.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
    return found.hexdigest()


@contextmanager
def _flushed(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    if os.name == "nt":  # Windows flushes folders by itself and does not open them
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
