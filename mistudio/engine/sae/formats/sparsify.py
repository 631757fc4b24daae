"""EleutherAI's sparsify: a folder per hookpoint with `cfg.json` and `sae.safetensors`.

A hookpoint is a module's path below the base model (`layers.5`, `h.5.mlp`): an SAE reads its
output, a transcoder maps its input to its output. TopK only. `W_dec` is stored [latents, d]; the
bias is taken off the input of SAEs always, of transcoders never; a skip reads the raw input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    cannot_read,
    damaged,
    fit,
    not_here,
    plain,
    read_json,
    read_safetensors,
    spelled_out,
    unknown_place,
    whole_number,
)
from mistudio.engine.sae.formats.saelens import without_centring
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible

NAME = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_BLOCK = re.compile(r"(?:^|[._])(?:layers|h|blocks)[._](\d+)(?:[._]([\w.]+))?$")
_PARTS = {
    "mlp": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",  # where a norm stands between the MLP and the stream
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
}


# --- reading ------------------------------------------------------------------------------------


def is_sparsify(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> ImportedSae:
    """One hookpoint's folder; its name says where it belongs."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise not_here(folder, name)
    config = read_json(folder / CONFIG)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        kind = "signed TopK" if config.get("signed") else repr(config.get("activation"))
        raise cannot_read(folder, f"its activation function is {kind}.")
    transcodes = bool(config.get("transcode"))
    axes: dict[str, tuple[str, ...]] = {
        "encoder.weight": ("m", "d"),
        "encoder.bias": ("m",),
        "W_dec": ("m", "d"),
        "b_dec": ("d",),
    }
    if config.get("skip_connection"):
        axes["W_skip"] = ("d", "d")
    weights, sizes = fit(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), axes)
    _check_sizes(folder, config, sizes)
    k = whole_number(folder / CONFIG, "k", config.get("k"), 1, sizes["m"])
    dictionary = Dictionary(
        weights["encoder.weight"],
        weights["encoder.bias"],
        weights["W_dec"],
        weights["b_dec"],
        TopK(k),
        centre=torch.zeros(sizes["d"]) if transcodes else None,
        skip=weights.get("W_skip"),
    )
    hookpoint = _hookpoint(folder)
    site = site_of(hookpoint, transcodes, folder) if hookpoint else None
    return ImportedSae(
        dictionary=dictionary,
        site=site,
        format=NAME,
        path=folder,
        layer=site.layer if site else None,
        model_name=_model_name(folder),
        details={**plain(config), "hookpoint": hookpoint or ""},
    )


def _check_sizes(folder: Path, config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    d_in = config.get("d_in", sizes["d"])
    latents = config.get("num_latents")
    if not latents:  # sparsify's 0: as many as `expansion_factor` says
        factor = whole_number(folder / CONFIG, "expansion_factor", config.get("expansion_factor"))
        latents = factor * sizes["d"]
    if d_in != sizes["d"] or latents != sizes["m"]:
        raise damaged(
            folder,
            f"{CONFIG} says {latents} latents on {d_in} channels, the weights have {sizes['m']} on "
            f"{sizes['d']}",
        )


def _hookpoint(folder: Path) -> str | None:
    """The folder's name, or that of the folder around it (`layers.5/seed1`, `best/layers.5`)."""
    path = spelled_out(folder)
    for name in (path.name, path.parent.name):
        if _BLOCK.search(name) or name in ("embed_tokens", "wte", "embed_in"):
            return name
        if not re.fullmatch(r"seed\d+|best|checkpoint", name):
            return None
    return None


def site_of(hookpoint: str, transcodes: bool, folder: Path) -> Site:
    """Where a hookpoint lies. Incompatible where miStudio cannot read there."""
    match = _BLOCK.search(hookpoint)
    if match is None:
        raise unknown_place(folder, hookpoint)
    layer, part = int(match[1]), match[2]
    if part is None:
        after = HookPoint("resid_post", layer)
        return Site(HookPoint("resid_pre", layer), after) if transcodes else Site.at(after)
    if part not in _PARTS:
        raise unknown_place(folder, hookpoint)
    if not transcodes:
        return Site.at(HookPoint(_PARTS[part], layer))
    if part != "mlp":
        raise unknown_place(folder, f"{hookpoint}, from its input to its output")
    return Site.across_mlp(HookPoint("mlp_in", layer))


def _model_name(folder: Path) -> str:
    for parent in list(spelled_out(folder).parents)[:2]:
        config = parent / "config.json"
        if config.is_file():
            return str(read_json(config).get("model") or "")
    return ""


# --- writing ------------------------------------------------------------------------------------


def write(
    dictionary: Dictionary, folder: Path, *, site: Site, module_path: str, module_path_out: str = ""
) -> Path:
    """Write a dictionary below `folder`; returns its hookpoint's folder.

    `module_path` and `module_path_out` are the paths, as in `named_modules`, of the modules that
    carry the site's input and output. Raises Incompatible for what sparsify cannot hold.
    """
    final = representable(dictionary, site)
    place = folder / hookpoint_of(site, module_path, module_path_out)
    place.mkdir(parents=True, exist_ok=True)
    assert isinstance(final.activation, TopK)
    tensors = {
        "encoder.weight": final.encoder,
        "encoder.bias": final.b_enc,
        "W_dec": final.decoder,
        "b_dec": final.b_dec,
    }
    if final.skip is not None:
        tensors["W_skip"] = final.skip
    norms = final.decoder.norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, final.d_sae // final.d_in),
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-3)),
        "num_latents": final.d_sae,
        "k": final.activation.k,
        "multi_topk": False,
        "skip_connection": final.skip is not None,
        "transcode": site.is_transcoder,
        "d_in": final.d_in,
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, place / WEIGHTS)
    (place / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return place


def representable(dictionary: Dictionary, site: Site) -> Dictionary:
    """The same function with the centre that sparsify gives it. Incompatible for what it cannot
    hold, whatever its place."""
    final = without_centring(dictionary.folded().to("cpu"))
    if not isinstance(final.activation, TopK):
        raise Incompatible(
            "sparsify knows only TopK",
            f"This dictionary's activation function is {final.activation.name}.",
            "Export it as `saelens` or `safetensors`, or train one with TopK.",
        )
    if final.norm != "none":
        raise _no_place("it normalises its input")
    if final.d_in != final.d_out:
        raise _no_place(f"it maps {final.d_in} channels to {final.d_out}")
    bare = final.with_centre_in_bias()
    if site.is_transcoder:
        return bare
    return replace(bare, b_enc=bare.b_enc + bare.encoder @ bare.b_dec, centre=None)


def hookpoint_of(site: Site, module_path: str, module_path_out: str) -> str:
    """sparsify's name of a site: the module whose output it is, below the base model."""
    path = module_path
    if site.is_transcoder:
        if module_path != module_path_out:
            raise _no_place(f"it goes from {module_path} to {module_path_out or 'nowhere known'}")
    elif site.input.site == "resid_pre":
        path = _block_before(module_path)
    elif site.input.site == "mlp_in":
        raise _no_place("it reads a module's input, and its SAEs read outputs")
    # The first name is the base model's attribute (`model`, `transformer`, `gpt_neox`).
    return path.partition(".")[2] or path


def _block_before(module_path: str) -> str:
    stem, _, number = module_path.rpartition(".")
    if not number.isdigit() or int(number) == 0:
        raise _no_place("it reads what enters the first block, which is no module's output")
    return f"{stem}.{int(number) - 1}"


def _no_place(why: str) -> Incompatible:
    return Incompatible(
        "This SAE has no place in sparsify's format",
        f"In sparsify's terms {why}.",
        "Export it as `saelens` or `safetensors`.",
    )
