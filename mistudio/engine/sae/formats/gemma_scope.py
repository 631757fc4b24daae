"""Gemma Scope: `params.npz` of the first release, `params.safetensors` of the second.

JumpReLU, without the decoder's bias on the input. What they read is not in the files but in the
names of the folders around them, so those are needed:
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    cannot_read,
    fit,
    read_json,
    read_names,
    read_npz,
    read_safetensors,
    spelled_out,
    unknown_place,
)
from mistudio.engine.sae.site import Site

NAME = "gemma_scope"
NAME_2 = "gemma_scope_2"
_AXES: dict[str, tuple[str, ...]] = {
    "W_enc": ("d", "m"),
    "b_enc": ("m",),
    "W_dec": ("m", "o"),
    "b_dec": ("o",),
    "threshold": ("m",),
}
_RELEASE = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b")
_RELEASE_2 = re.compile(r"gemma-scope-2-(\d+[bm](?:-\w+)?)\b")


# --- the first release --------------------------------------------------------------------------


def is_gemma_scope(path: Path) -> bool:
    return path.suffix == ".npz"


def read(path: Path) -> ImportedSae:
    """A `params.npz`."""
    arrays = {_name(name): torch.from_numpy(array) for name, array in read_npz(path).items()}
    dictionary = _dictionary(path, arrays)
    release = _RELEASE.search(str(spelled_out(path)))
    folders = spelled_out(path).parent.parts
    layer = _layer(folders)
    notes: list[str] = []
    site = None
    if "embedding" in folders:
        # Trained on embeddings before Gemma multiplies them by sqrt(d).
        dictionary = replace(dictionary, scale=1 / math.sqrt(dictionary.d_in)).folded()
        notes.append("An SAE of embeddings: their scale, sqrt(d), is folded into its weights.")
        site, layer = Site.at(HookPoint("resid_pre", 0)), 0
    elif release is not None and layer is not None:
        site = _site(path, release[3], layer)
    return ImportedSae(
        dictionary=dictionary,
        site=site,
        format=NAME,
        path=path,
        layer=layer,
        model_name=_model_name(release) if release else "",
        notes=tuple(notes),
        details={"variant": "/".join(folders[-3:])},
    )


def _model_name(release: re.Match[str]) -> str:
    return f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"


def _name(stored: str) -> str:
    return f"W_{stored[2:]}" if stored.startswith("w_") else stored


def _site(path: Path, kind: str, layer: int) -> Site:
    if kind == "res":
        return Site.at(HookPoint("resid_post", layer))
    if kind == "mlp":
        return Site.at(HookPoint("mlp_out", layer))
    if kind == "att":
        raise unknown_place(path, f"blocks.{layer}.attn.hook_z, inside attention")
    raise cannot_read(
        path,
        f"it is a transcoder of blocks.{layer}.ln2.hook_normalized, what enters the MLP before "
        "its norm's weights, which miStudio does not read.",
        "Choose an SAE of the residual stream or of the MLP's output.",
    )


# --- the second release -------------------------------------------------------------------------


def is_gemma_scope_2(path: Path) -> bool:
    return path.suffix == ".safetensors" and "w_enc" in read_names(path)


def read_2(path: Path) -> ImportedSae:
    """A `params.safetensors`, beside its `config.json` where there is one."""
    tensors = {_name(name): tensor for name, tensor in read_safetensors(path).items()}
    if "W_dec" in tensors and tensors["W_dec"].ndim == 3:
        raise cannot_read(path, "it is a cross-layer transcoder, which writes to many layers.")
    skip = tensors.pop("affine_skip_connection", None)
    if skip is not None:
        tensors["W_skip"] = skip.T  # stored [d_in, d_out]
    dictionary = _dictionary(path, tensors)
    folders = spelled_out(path).parent.parts
    layer = _layer(folders)
    beside = path.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    release = _RELEASE_2.search(str(spelled_out(path)))
    model = str(config.get("model_name") or (f"gemma-3-{release[1]}" if release else ""))
    return ImportedSae(
        dictionary=dictionary,
        site=_site_2(path, folders, layer) if layer is not None else None,
        format=NAME_2,
        path=path,
        layer=layer,
        model_name=model if "/" in model or not model else f"google/{model}",
        details={"variant": "/".join(folders[-2:])},
    )


def _site_2(path: Path, folders: tuple[str, ...], layer: int) -> Site | None:
    for kind in reversed(folders):
        if kind.startswith("resid_post"):
            return Site.at(HookPoint("resid_post", layer))
        if kind.startswith("mlp_out"):
            return Site.at(HookPoint("mlp_out", layer))
        if kind.startswith("transcoder"):
            return Site.across_mlp(HookPoint("mlp_in", layer))
        if kind.startswith("attn_out"):
            raise unknown_place(path, f"layer {layer}'s attention heads, before their projection")
    return None


# --- both ---------------------------------------------------------------------------------------


def _dictionary(path: Path, tensors: Mapping[str, Any]) -> Dictionary:
    axes = _AXES | {"W_skip": ("o", "d")}
    weights, sizes = fit(path, tensors, axes, optional=("W_skip",))
    return Dictionary(
        weights["W_enc"].T.contiguous(),
        weights["b_enc"],
        weights["W_dec"],
        weights["b_dec"],
        JumpReLU(weights["threshold"]),
        centre=torch.zeros(sizes["d"]),
        skip=weights.get("W_skip"),
    )


def _layer(folders: tuple[str, ...]) -> int | None:
    """The layer in the nearest folder that names one (`layer_12`, `layer_12_width_16k_l0_big`)."""
    for folder in reversed(folders):
        match = re.match(r"layer_(\d+)", folder)
        if match:
            return int(match[1])
    return None
