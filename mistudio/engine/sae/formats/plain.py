"""One safetensors file per SAE and a README that says in eight lines how to compute with it.

For use without any SAE library. Everything is folded into one formula:
z = act(norm(x) @ W_enc + b_enc), y = z @ W_dec + b_dec + norm(x) @ W_skip^T.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mistudio.engine.sae.activation import Activation, Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    damaged,
    fit,
    point_named,
    read_header,
    read_safetensors,
    whole_number,
)
from mistudio.engine.sae.site import Site

NAME = "safetensors"
README = "README.txt"
_MARK = "mistudio sae 1"
_NORMS = ("none", "centre", "layer_norm")
_KINDS = ("topk", "standard", "jumprelu", "gated")

HOW_TO = '''\
Sparse autoencoders, one file each, written by miStudio.

Tensors (float32): W_enc [d_in, latents], b_enc [latents], W_dec [latents, d_out], b_dec [d_out];
threshold [latents] of a JumpReLU; gain and offset [latents] of a gated one; W_skip [d_out, d_in]
where the input also passes straight through. The file's metadata (all strings) says which
activation function it has, k, what it reads (`hook_name`), what it reconstructs (`hook_name_out`;
the same, except of transcoders), and of which model. Inputs are raw activations, as the model
computes them; nothing needs scaling.

The names of places are TransformerLens': blocks.3.hook_resid_post is the residual stream after
block 3, mlp.hook_in what enters a block's MLP, hook_mlp_out what the MLP adds to the stream.

import torch
from safetensors import safe_open

def load(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()

def normed(x, meta):
    mean = x.mean(-1, keepdim=True)
    if meta["norm"] == "none":
        return x, 0.0, 1.0
    if meta["norm"] == "centre":
        return x - mean, mean, 1.0
    spread = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (spread + 1e-5), mean, spread

def encode(x, sae, meta):
    """Latent activations [n, latents] of activations x [n, d_in]."""
    pre = normed(x, meta)[0] @ sae["W_enc"] + sae["b_enc"]
    if meta["activation"] == "topk":
        top = pre.topk(int(meta["k"]), dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    if meta["activation"] == "jumprelu":
        return pre.relu() * (pre > sae["threshold"])
    if meta["activation"] == "gated":
        return (pre > 0) * (pre * sae["gain"] + sae["offset"]).relu()
    return pre.relu()

def decode(z, x, sae, meta):
    """The reconstruction [n, d_out]; x is what z was made from."""
    u, mean, spread = normed(x, meta)
    y = z @ sae["W_dec"] + sae["b_dec"]
    if "W_skip" in sae:
        y = y + u @ sae["W_skip"].T
    return y * spread + mean
'''


def write(
    dictionary: Dictionary, folder: Path, *, site: Site, metadata: dict[str, Any] | None = None
) -> Path:
    """Write one file and the README; returns the file."""
    final = dictionary.folded().to("cpu").with_centre_in_bias()
    tensors = {
        "W_enc": final.W_enc,
        "b_enc": final.b_enc,
        "W_dec": final.W_dec,
        "b_dec": final.b_dec,
    }
    header = {
        "format": _MARK,
        "activation": final.activation.name,
        "norm": final.norm,
        "hook_name": site.input.name,
        "hook_name_out": site.output.name,
    }
    if isinstance(final.activation, TopK):
        header["k"] = str(final.activation.k)
    elif isinstance(final.activation, JumpReLU):
        tensors["threshold"] = final.activation.threshold
    elif isinstance(final.activation, Gated):
        tensors |= {"gain": final.activation.gain, "offset": final.activation.offset}
    if final.skip is not None:
        tensors["W_skip"] = final.skip
    for name, value in (metadata or {}).items():
        header.setdefault(name, value if isinstance(value, str) else json.dumps(value))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{site.name}.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, header)
    (folder / README).write_text(HOW_TO, encoding="utf-8")
    return path


def is_plain(path: Path) -> bool:
    return path.suffix == ".safetensors" and read_header(path).get("format") == _MARK


def read(path: Path) -> ImportedSae:
    """A file that `write` wrote."""
    header = read_header(path)
    kind, norm = header.get("activation"), header.get("norm")
    if header.get("format") != _MARK or norm not in _NORMS or kind not in _KINDS:
        raise damaged(path, "its header is not one of miStudio's")
    axes: dict[str, tuple[str, ...]] = {
        "W_enc": ("d", "m"),
        "b_enc": ("m",),
        "W_dec": ("m", "o"),
        "b_dec": ("o",),
        "W_skip": ("o", "d"),
    }
    if kind == "jumprelu":
        axes["threshold"] = ("m",)
    elif kind == "gated":
        axes |= {"gain": ("m",), "offset": ("m",)}
    weights, sizes = fit(path, read_safetensors(path), axes, optional=("W_skip",))
    activation: Activation
    if kind == "topk":
        k = header.get("k", "")
        activation = TopK(whole_number(path, "k", int(k) if k.isdigit() else k, 1, sizes["m"]))
    elif kind == "jumprelu":
        activation = JumpReLU(weights["threshold"])
    elif kind == "gated":
        activation = Gated(weights["gain"], weights["offset"])
    else:
        activation = ReLU()
    dictionary = Dictionary(
        weights["W_enc"].T.contiguous(),
        weights["b_enc"],
        weights["W_dec"],
        weights["b_dec"],
        activation,
        centre=torch.zeros(sizes["d"]),
        skip=weights.get("W_skip"),
        norm=norm,
    )
    site = Site(
        point_named(header.get("hook_name"), path), point_named(header.get("hook_name_out"), path)
    )
    return ImportedSae(
        dictionary=dictionary,
        site=site,
        format=NAME,
        path=path,
        layer=site.layer,
        model_name=header.get("model_name", ""),
        details=dict(header),
    )
