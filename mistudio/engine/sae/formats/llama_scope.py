"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

JumpReLU with one threshold for all latents, on activations scaled to norm sqrt(d), without the
decoder's bias on the input; threshold and scale are folded as SAELens folds them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    cannot_read,
    damaged,
    fit,
    not_here,
    plain,
    point_named,
    read_json,
    read_safetensors,
    spelled_out,
)
from mistudio.engine.sae.site import Site

NAME = "llama_scope"
CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"


def is_llama_scope(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> ImportedSae:
    """One SAE's folder (`Llama3_1-8B-Base-L15R-8x`)."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise not_here(folder, name)
    config = read_json(folder / CONFIG)
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise cannot_read(folder, "it is a transcoder.")
    site = Site.at(point_named(config.get("hook_point_in"), folder))
    axes = {
        "encoder.weight": ("m", "d"),
        "encoder.bias": ("m",),
        "decoder.weight": ("d", "m"),
        "decoder.bias": ("d",),
    }
    weights, sizes = fit(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), axes)
    norms = config.get("dataset_average_activation_norm")
    norm = _positive(folder, "its average norm", norms.get("in") if isinstance(norms, dict) else "")
    threshold = _positive(folder, "jump_relu_threshold", config.get("jump_relu_threshold"))
    scale = math.sqrt(sizes["d"]) / norm
    is_8b = spelled_out(folder).name.startswith("Llama3_1-8B")
    dictionary = Dictionary(
        weights["encoder.weight"],
        weights["encoder.bias"],
        weights["decoder.weight"].T.contiguous(),
        weights["decoder.bias"],
        JumpReLU(torch.full((sizes["m"],), threshold * scale)),
        scale=scale,
        centre=torch.zeros(sizes["d"]),
    )
    return ImportedSae(
        dictionary=dictionary.folded(),
        site=site,
        format=NAME,
        path=folder,
        layer=site.layer,
        model_name="meta-llama/Llama-3.1-8B" if is_8b else "",
        notes=(f"The scale of its inputs ({scale:.4g}) is folded into its weights.",),
        details=plain(config),
    )


def _positive(folder: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise damaged(folder / CONFIG, f"{name} is {value!r}")
    return float(value)
