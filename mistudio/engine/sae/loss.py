"""What a dictionary costs the model: next-token loss with its reconstruction spliced in.

All statistics are over tokens that count (`engine/activations/positions.py`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.activations.positions import counted
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.models.hooks import Edit, HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.metrics import plain, ratio
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible, InvalidInput

# A batch's logits, of which two sets are held at a time, stay under this many numbers wherever
# one window's do: 256 MB in float32. A vocabulary of 256,000 needs smaller batches of windows.
LOGIT_CELLS = 64 * 1024**2
# Their logarithms are taken for at most this many at a time: 4 MB in float32.
CHUNK_CELLS = 1024**2

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossRecovered:
    """Next-token cross-entropy and divergence in nats, mean over `tokens` predictions made at
    counted positions of `ce_windows` windows.

    The site's output at counted positions is replaced: `ce_sae`, by the reconstruction; `ce_zero`,
    by zero; `ce_mean`, by its own mean over the `ce_mean_tokens` counted positions of the same
    windows. All other positions are left alone in all of them.

    ce_increase = ce_sae - ce_clean; ce_increase_error is its standard error, windows taken as
    independent (ratio estimator; NaN for one window).
    ce_loss_score = (ce_zero - ce_sae) / (ce_zero - ce_clean); ce_loss_score_mean has ce_mean for
    ce_zero. Zero ablation flatters a residual-stream SAE, so `ce_increase` is the number that
    tells SAEs apart.
    kl = E KL(p_clean || p_sae) over the vocabulary; kl_zero the same for zero;
    kl_score = (kl_zero - kl) / kl_zero. Scores are NaN where the ablation changes nothing.
    """

    tokens: int
    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    ce_increase: float
    ce_increase_error: float
    ce_loss_score: float
    ce_loss_score_mean: float
    kl: float
    kl_zero: float
    kl_score: float
    ce_windows: int
    ce_mean_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what is not finite becomes None."""
        return plain(asdict(self))


@torch.inference_mode()
def loss_recovered(
    model: HookedDecoder,
    tokens: TokenSplit,
    site: Site | HookPoint,
    dictionary: Dictionary,
    medians: Mapping[HookPoint, float] | float,
    *,
    context: int = 128,
    max_tokens: int = 8192,
    batch_windows: int = 8,
    progress: Progress = SILENT,
) -> LossRecovered:
    """Splice the dictionary into the model on evenly spread windows of `tokens`.

    A transcoder's site reads one point and replaces another. `medians` are the median norms that
    define outliers, of all the site's points; one number will do for a site of one point.
    Raises InvalidInput where the text is too short or nothing in it counts, Incompatible where
    the dictionary does not fit the site.
    """
    site = Site.at(site) if isinstance(site, HookPoint) else site
    medians = medians if isinstance(medians, Mapping) else {site.input: medians}
    check_fit(model, site, dictionary)
    tokens.require_windows(context, 1, "Measuring the loss")
    available = tokens.n_windows(context)
    wanted = max(1, min(available, max_tokens // context))
    chosen = torch.linspace(0, available - 1, wanted, dtype=torch.float64).long().unique()
    fitting = max(1, LOGIT_CELLS // (context * model.vocab_size))
    batches = [
        tokens.windows(windows.numpy(), context).to(model.device)
        for windows in chosen.split(min(batch_windows, fitting))
    ]
    masks, mean, mean_tokens = _survey(model, tokens, site, medians, batches, progress)
    zero = torch.zeros_like(mean)
    replacements: dict[str, Replacement] = {
        "sae": dictionary.reconstruct,
        "zero": lambda _: zero,
        "mean": lambda _: mean,
    }
    sums: dict[str, list[Tensor]] = defaultdict(list)
    predictions: list[Tensor] = []
    done = 0
    for ids, mask in zip(batches, masks, strict=True):
        progress.check()
        places = _Places(ids, mask)
        predictions.append(places.per_window)
        clean = model.model(ids, use_cache=False).logits
        sums["clean"].append(places.by_window(places.losses(clean)))
        for name, replacement in replacements.items():
            progress.check()
            with model.intervene(_splice(site, mask, replacement)):
                logits = model.model(ids, use_cache=False).logits
            sums[name].append(places.by_window(places.losses(logits)))
            if name != "mean":
                sums[f"kl_{name}"].append(places.by_window(places.divergences(clean, logits)))
            del logits  # before the next ones are made: two sets are the most that is held
        del clean
        done += len(ids)
        progress.report(done, len(chosen))
    return _summary(sums, predictions, mean_tokens)


def check_fit(model: HookedDecoder, site: Site, dictionary: Dictionary) -> None:
    if site.input > site.output:
        raise ValueError(f"{site.input} is reached only after {site.output}")
    widths = model.width(site.input), model.width(site.output)
    if widths != (dictionary.d_in, dictionary.d_out):
        raise Incompatible(
            "The dictionary does not fit the model",
            f"It maps {dictionary.d_in} channels to {dictionary.d_out}; {site.input} has "
            f"{widths[0]} and {site.output} has {widths[1]}.",
            "Choose the model and the layer it was trained on.",
        )


def _survey(
    model: HookedDecoder,
    tokens: TokenSplit,
    site: Site,
    medians: Mapping[HookPoint, float],
    batches: list[Tensor],
    progress: Progress,
) -> tuple[list[Tensor], Tensor, int]:
    """(counted positions of each batch [batch, seq], mean [d_out] of the site's output over them,
    their number), before anything is replaced."""
    masks: list[Tensor] = []
    total = torch.zeros(model.width(site.output), dtype=torch.float64)
    for ids in batches:
        progress.check()
        captured = model.capture(ids, site.points)
        masks.append(counted(ids, captured, medians, tokens.meta.special_ids))
        total += captured[site.output][masks[-1]].float().sum(0).cpu().double()
    n = sum(int(mask.sum()) for mask in masks)
    if not sum(int(mask[:, :-1].sum()) for mask in masks):
        raise InvalidInput(
            "Nothing to measure the loss on",
            "Not one position of the held-out text counts: they are all special tokens or "
            "outliers.",
            "Add more text to the dataset.",
        )
    return masks, (total / n).float().to(model.device), n


def _splice(site: Site, mask: Tensor, replacement: Replacement) -> dict[HookPoint, Edit]:
    """Edits that put `replacement` of the site's input in the place of its output, where `mask`
    says; both are of the same forward pass."""
    rows: list[Tensor] = []

    def read(x: Tensor) -> Tensor:
        rows[:] = [x[mask]]
        return x

    def write(y: Tensor) -> Tensor:
        out = y.clone()
        out[mask] = replacement(rows[0] if site.is_transcoder else y[mask]).to(y.dtype)
        return out

    return {site.input: read, site.output: write} if site.is_transcoder else {site.output: write}


class _Places:
    """The predictions of a batch that count: the logits at these places against the next token.

    Vocabularies are wide, so rows are taken a few at a time.
    """

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        predicting = mask.clone()
        predicting[:, -1] = False  # nothing follows the last position
        self._rows = predicting.flatten().nonzero()[:, 0]
        self._next = ids.flatten()[self._rows + 1]
        self._windows = (self._rows // ids.shape[1]).cpu()
        self._n_windows = len(ids)

    @property
    def per_window(self) -> Tensor:
        """How many there are in each window of the batch, float64 [batch]."""
        return self.by_window(torch.ones(len(self._rows), dtype=torch.float64))

    def losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy of each prediction, float64 [n] on the CPU."""
        parts = [
            -log_p.gather(1, self._next[at, None])[:, 0] for at, (log_p,) in self._log_p(logits)
        ]
        return torch.cat(parts).cpu().double()

    def divergences(self, clean: Tensor, logits: Tensor) -> Tensor:
        """KL(p_clean || p) of each prediction, float64 [n] on the CPU."""
        parts = [(p.exp() * (p - q)).sum(1) for _, (p, q) in self._log_p(clean, logits)]
        return torch.cat(parts).cpu().double()

    def by_window(self, values: Tensor) -> Tensor:
        """Sums of `values` [n] in each window of the batch, float64 [batch]."""
        return torch.bincount(self._windows, values, self._n_windows)

    def _log_p(self, *logits: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Log-probabilities in float32 of a few rows at a time, of each of `logits`."""
        step = max(1, CHUNK_CELLS // logits[0].shape[-1])
        for start in range(0, max(len(self._rows), 1), step):
            at = slice(start, start + step)
            yield at, [x.flatten(0, 1)[self._rows[at]].float().log_softmax(1) for x in logits]


def _summary(
    parts: Mapping[str, list[Tensor]], predictions: list[Tensor], mean_tokens: int
) -> LossRecovered:
    """From sums per window of what was measured, and how many predictions each window has."""
    n = torch.cat(predictions)
    windows = {name: torch.cat(sums) for name, sums in parts.items()}
    mean = {name: float(sums.sum() / n.sum()) for name, sums in windows.items()}
    clean, sae, zero = mean["clean"], mean["sae"], mean["zero"]
    return LossRecovered(
        tokens=int(n.sum()),
        ce_clean=clean,
        ce_sae=sae,
        ce_zero=zero,
        ce_mean=mean["mean"],
        ce_increase=sae - clean,
        ce_increase_error=_standard_error(windows["sae"] - windows["clean"], n),
        ce_loss_score=ratio(zero - sae, zero - clean),
        ce_loss_score_mean=ratio(mean["mean"] - sae, mean["mean"] - clean),
        kl=mean["kl_sae"],
        kl_zero=mean["kl_zero"],
        kl_score=ratio(mean["kl_zero"] - mean["kl_sae"], mean["kl_zero"]),
        ce_windows=len(n),
        ce_mean_tokens=mean_tokens,
    )


def _standard_error(sums: Tensor, counts: Tensor) -> float:
    """Of sum(sums) / sum(counts), the clusters being windows: tokens of one window are no
    independent draws (Cochran, Sampling Techniques, 6.4)."""
    n = len(sums)
    if n < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float((residuals.square().sum() * n / (n - 1)).sqrt() / counts.sum())
