"""OpenAI's sparse autoencoders of GPT-2: one torch file per layer.

TopK ones read layer-normed inputs, as their loader decides by the activation's name; the ReLU ones
of the first version do not. The file's folder says what it reads:
`gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Activation, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    cannot_read,
    fit,
    read_torch,
    spelled_out,
    unknown_place,
    whole_number,
)
from mistudio.engine.sae.site import Site

NAME = "openai"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_ACTIVATION = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")
_SITES = {
    "resid_post_mlp": "resid_post",
    "resid_delta_mlp": "mlp_out",
    "resid_delta_attn": "attn_out",
}
_ELSEWHERE = {
    "resid_post_attn": "the residual stream between attention and MLP",
    "mlp_post_act": "the hidden layer of an MLP",
}


def is_openai(state: Mapping[str, Any]) -> bool:
    return {"pre_bias", "latent_bias"} <= set(state)


def read(path: Path) -> ImportedSae:
    """One `N.pt`."""
    state = read_torch(path)
    axes = {
        "pre_bias": ("d",),
        "encoder.weight": ("m", "d"),
        "latent_bias": ("m",),
        "decoder.weight": ("d", "m"),
    }
    if "decoder.linear.weight" in state and "decoder.weight" not in state:  # tied to the encoder
        state["decoder.weight"] = state.pop("decoder.linear.weight").T
    ignored = (*_STATISTICS, *_ACTIVATION)
    weights, sizes = fit(path, state, axes, ignored=ignored)
    activation = _activation(path, state, sizes["m"])
    location, layer = _place(path)
    if location in _ELSEWHERE:
        raise unknown_place(path, _ELSEWHERE[location])
    site = None
    if location is not None and layer is not None:
        site = Site.at(HookPoint(_SITES[location], layer))
    return ImportedSae(
        dictionary=Dictionary(
            weights["encoder.weight"],
            weights["latent_bias"],
            weights["decoder.weight"].T.contiguous(),
            weights["pre_bias"],
            activation,
            norm="layer_norm" if isinstance(activation, TopK) else "none",
        ),
        site=site,
        format=NAME,
        path=path,
        layer=layer,
        model_name="openai-community/gpt2" if "gpt2-small" in spelled_out(path).parts else "",
        details={"location": location or "", "context_size": 64},
    )


def _activation(path: Path, state: Mapping[str, Any], d_sae: int) -> Activation:
    name = state.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU()
    options = state.get("activation_state_dict")
    if name != "TopK" or not isinstance(options, Mapping):
        raise cannot_read(path, f"its activation function is {name!r}.")
    if options.get("postact_fn", "ReLU") != "ReLU":
        raise cannot_read(path, f"its TopK keeps negative values ({options['postact_fn']}).")
    return TopK(whole_number(path, "k", options.get("k"), 1, d_sae))


def _place(path: Path) -> tuple[str | None, int | None]:
    """(location, layer) from the folders' and the file's name."""
    layer = int(path.stem) if path.stem.isdigit() else None
    for folder in reversed(spelled_out(path).parent.parts):
        for location in (*_SITES, *_ELSEWHERE):
            if folder.startswith(location):
                return location, layer
    return None, layer
