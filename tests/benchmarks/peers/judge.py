"""One evaluator for both sides: reloaded exports on held-out activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch

from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Codes, Dictionary
from mistudio.engine.sae.files import load_sae
from mistudio.engine.sae.metrics import ReconstructionMeter

TOKENS = 50_000
BATCH = 2048
CALIBRATION_ROWS = 65536


@dataclass(frozen=True)
class Verdict:
    """On `tokens` held-out tokens: fvu = sum ||x - x_hat||^2 / sum ||x - mean||^2, summed in
    float64; l0 = mean active latents; silent = share of latents that fired on none of them."""

    fvu: float
    l0: float
    silent: float
    tokens: int


Encode = Callable[[torch.Tensor], Codes]


@torch.no_grad()
def judge(dictionary: Dictionary, encode: Encode, activations: shared.Activations) -> Verdict:
    meter = ReconstructionMeter(activations.width, dictionary.d_sae)
    n = min(TOKENS, len(activations.heldout))
    for start in range(0, n, BATCH):
        x = activations.rows(activations.heldout, slice(start, min(start + BATCH, n)))
        codes = encode(x)
        meter.add(x, dictionary.decode(codes), codes)
    result = meter.result()
    return Verdict(result.fvu, result.l0, result.dead_share, result.tokens)


@torch.no_grad()
def batch_topk(dictionary: Dictionary, x: torch.Tensor, k: int) -> Codes:
    """The n * k largest positive pre-activations of a batch [n, d]: what BatchTopK trains with."""
    pre = dictionary.pre_activations(x)
    values, places = pre.flatten().topk(len(x) * k, sorted=False)
    places = places[values > 0].sort().values
    rows, latents = places // dictionary.d_sae, places % dictionary.d_sae
    return Codes(rows, latents, pre[rows, latents], len(x), dictionary.d_sae)


@torch.no_grad()
def with_l0(
    dictionary: Dictionary, activations: shared.Activations, order: Path, k: int
) -> Dictionary:
    """The same weights with the one threshold that gives L0 = k on training tokens."""
    rows = np.memmap(order, dtype=np.int32, mode="r")[:CALIBRATION_ROWS]
    floor, kept = 0.0, []
    for start in range(0, len(rows), BATCH):
        x = activations.rows(activations.train, rows[start : start + BATCH])
        pre = dictionary.pre_activations(x).flatten()
        if not kept:  # half of the first batch's threshold is well below that of all
            floor = max(0.5 * float(pre.topk(len(x) * k, sorted=False).values.min()), 0.0)
        kept.append(pre[pre > floor])
    values = torch.cat(kept)
    threshold = values.topk(min(len(values), len(rows) * k), sorted=False).values.min()
    return replace(dictionary, activation=JumpReLU(threshold.expand_as(dictionary.b_enc).clone()))


def judge_export(
    folder: Path, activations: shared.Activations, order: Path, k: int
) -> dict[str, Any]:
    """Verdicts on an export: `exported`, as anyone who loads it gets it; for a BatchTopK one,
    which is exported as JumpReLU, also `trained`, the same weights selecting as in training, and
    `calibrated`, the same weights with the threshold that gives L0 = k on training tokens."""
    dictionary = load_sae(folder).dictionary
    verdicts = {"exported": judge(dictionary, dictionary.encode, activations)}
    if isinstance(dictionary.activation, JumpReLU):
        verdicts["trained"] = judge(dictionary, lambda x: batch_topk(dictionary, x, k), activations)
        calibrated = with_l0(dictionary, activations, order, k)
        verdicts["calibrated"] = judge(calibrated, calibrated.encode, activations)
    return {name: asdict(verdict) for name, verdict in verdicts.items()}


@torch.no_grad()
def reconstruction(folder: Path, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Our own reading of an export: (reconstructions [n, d], active latents per row [n])."""
    dictionary = load_sae(folder).dictionary
    codes = dictionary.encode(x)
    active = torch.bincount(codes.rows, minlength=len(x))
    return dictionary.decode(codes).numpy(), active.numpy()
