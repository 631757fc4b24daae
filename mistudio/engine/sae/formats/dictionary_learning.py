"""The dictionary_learning library: `ae.pt` (a state dict) beside `config.json`.

Its seven classes. Weights of finished runs are for raw activations; the file of an interrupted run
is for scaled ones and says by how much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    cannot_read,
    damaged,
    finite,
    fit,
    plain,
    read_json,
    read_torch,
    whole_number,
)
from mistudio.engine.sae.site import Site

NAME = "dictionary_learning"
WEIGHTS = "ae.pt"
CONFIG = "config.json"

_LINEAR = {"encoder.weight": ("m", "d"), "decoder.weight": ("d", "m")}
_AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoEncoder": _LINEAR | {"encoder.bias": ("m",), "bias": ("d",)},
    "AutoEncoderNew": _LINEAR | {"encoder.bias": ("m",), "decoder.bias": ("d",)},
    "GatedAutoEncoder": _LINEAR
    | {"decoder_bias": ("d",), "r_mag": ("m",), "gate_bias": ("m",), "mag_bias": ("m",)},
    "AutoEncoderTopK": _LINEAR | {"encoder.bias": ("m",), "b_dec": ("d",)},
    "BatchTopKSAE": _LINEAR | {"encoder.bias": ("m",), "b_dec": ("d",)},
    "MatryoshkaBatchTopKSAE": {
        "W_enc": ("d", "m"),
        "b_enc": ("m",),
        "W_dec": ("m", "d"),
        "b_dec": ("d",),
    },
    "JumpReluAutoEncoder": {
        "W_enc": ("d", "m"),
        "b_enc": ("m",),
        "W_dec": ("m", "d"),
        "b_dec": ("d",),
        "threshold": ("m",),
    },
}
_BUFFERS = ("k", "threshold", "group_sizes")
# Biases and thresholds: what grows with the activations' scale while the weights do not.
_SCALED = {
    "encoder.bias", "decoder.bias", "bias", "b_enc", "b_dec", "decoder_bias", "gate_bias",
    "mag_bias", "threshold",
}  # fmt: skip
_SITES = (
    ("resid_post", "resid_post"),
    ("resid_pre", "resid_pre"),
    ("mlp_out", "mlp_out"),
    ("attn_out", "attn_out"),
    ("attention_out", "attn_out"),
)


def is_dictionary_learning(state: Mapping[str, Any]) -> bool:
    names = set(state)
    return "ae" in names or "encoder.weight" in names or {"W_enc", "W_dec"} <= names


def read(path: Path) -> ImportedSae:
    """An `ae.pt`, with the `config.json` beside it or in the folder above (`checkpoints/`)."""
    notes: list[str] = []
    state = read_torch(path)
    if isinstance(state.get("ae"), dict):
        state = _interrupted(path, state, notes)
    config = _config(path)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = _class_of(path, state, trainer)
    dictionary = _dictionary(path, kind, state, trainer, notes)
    layer = trainer.get("layer")
    layer = layer if isinstance(layer, int) and not isinstance(layer, bool) else None
    buffer = config.get("buffer")
    return ImportedSae(
        dictionary=dictionary,
        site=_site(trainer, layer),
        format=NAME,
        path=path,
        layer=layer,
        model_name=str(trainer.get("lm_name") or ""),
        notes=tuple(notes),
        details={
            **plain(trainer),
            **({"context_size": buffer.get("ctx_len")} if isinstance(buffer, dict) else {}),
            "dict_class": kind,
        },
    )


def _interrupted(path: Path, backup: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The state dict in the backup that training writes over `ae.pt` until it ends, brought from
    the scaled activations it was training on to raw ones."""
    state = dict(backup["ae"])
    factor = backup.get("norm_factor")
    if factor is not None:
        value = float(finite(path, "norm_factor", torch.as_tensor(factor)).flatten()[0])
        if value <= 0:
            raise damaged(path, f"norm_factor is {value!r}")
        for name in _SCALED & set(state):
            # -1 marks a threshold that was never set.
            if name != "threshold" or float(torch.as_tensor(state[name]).min()) >= 0:
                state[name] = finite(path, name, state[name]) * value
    step = backup.get("step")
    notes.append(
        f"The backup of an interrupted run{f', at step {step}' if isinstance(step, int) else ''}, "
        "not of a finished one."
    )
    return state


def _config(path: Path) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            return read_json(folder / CONFIG)
    return {}


def _class_of(path: Path, state: Mapping[str, Any], trainer: Mapping[str, Any]) -> str:
    """From the configuration, else from the names of the tensors where they tell."""
    named = trainer.get("dict_class")
    if named is not None:
        if named not in _AXES:
            raise cannot_read(
                path, f"its class is {named!r}.", f"miStudio reads {', '.join(_AXES)}."
            )
        return str(named)
    names = set(state)
    if "b_dec" in names and "encoder.weight" in names:
        raise cannot_read(
            path,
            f"a TopK and a BatchTopK dictionary look alike, and {CONFIG} is not beside it to tell "
            "them apart.",
            f"Put the run's {CONFIG} into the same folder.",
        )
    for kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        if set(_AXES[kind]) <= names and ("group_sizes" in names) == (kind[0] == "M"):
            return kind
    for kind in ("GatedAutoEncoder", "AutoEncoder", "AutoEncoderNew"):
        if set(_AXES[kind]) <= names:
            return kind
    raise cannot_read(path, "its tensors are those of no class that miStudio knows.")


def _dictionary(
    path: Path,
    kind: str,
    state: Mapping[str, Any],
    trainer: Mapping[str, Any],
    notes: list[str],
) -> Dictionary:
    ignored = [name for name in _BUFFERS if name not in _AXES[kind]]
    w, sizes = fit(path, state, _AXES[kind], ignored=ignored)
    encoder = w["encoder.weight"] if "encoder.weight" in w else w["W_enc"].T.contiguous()
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T.contiguous()
    zeros = torch.zeros(sizes["d"])
    if kind == "AutoEncoder":
        # Its own loader gives decoders of unit norm, so latents in that unit.
        stored = Dictionary(encoder, w["encoder.bias"], decoder, w["bias"], ReLU())
        return stored.with_unit_decoder()
    if kind == "AutoEncoderNew":
        bias = w["decoder.bias"]
        return Dictionary(encoder, w["encoder.bias"], decoder, bias, ReLU(), centre=zeros)
    if kind == "GatedAutoEncoder":
        gain = w["r_mag"].exp()
        gate = Gated(gain, w["mag_bias"] - gain * w["gate_bias"])
        return Dictionary(encoder, w["gate_bias"], decoder, w["decoder_bias"], gate)
    if kind == "AutoEncoderTopK":
        k = whole_number(path, "k", state.get("k", trainer.get("k")), 1, sizes["m"])
        return Dictionary(encoder, w["encoder.bias"], decoder, w["b_dec"], TopK(k))
    if kind == "JumpReluAutoEncoder":
        jump = JumpReLU(w["threshold"])
        return Dictionary(encoder, w["b_enc"], decoder, w["b_dec"], jump, centre=zeros)
    bias = w["encoder.bias"] if "encoder.bias" in w else w["b_enc"]
    threshold = _threshold(path, state, sizes["m"], notes)
    return Dictionary(encoder, bias, decoder, w["b_dec"], JumpReLU(threshold))


def _threshold(path: Path, state: Mapping[str, Any], d_sae: int, notes: list[str]) -> Any:
    """BatchTopK's one threshold, for every latent."""
    if "threshold" not in state:
        raise damaged(path, "threshold is missing")
    value = float(finite(path, "threshold", torch.as_tensor(state["threshold"])).flatten()[0])
    if value < 0:
        notes.append(
            "Its threshold was never set (runs of up to 1,000 steps leave it out): it is used as "
            "a plain ReLU, with far more active latents than the k it was trained with."
        )
    return torch.full((d_sae,), value)


def _site(trainer: Mapping[str, Any], layer: int | None) -> Site | None:
    """From the submodule's name (`resid_post_layer_8`), where that says it."""
    name = str(trainer.get("submodule_name") or "")
    number = re.search(r"(\d+)$", name)
    if layer is None or (number and int(number[1]) != layer):
        return None
    for mark, site in _SITES:
        if mark in name:
            return Site.at(HookPoint(site, layer))
    return None
