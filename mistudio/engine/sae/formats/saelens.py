"""SAELens folders: `cfg.json` and `sae_weights.safetensors`.

Written for SAELens 6 and later; read back to the first versions. The library's own folders are of
this kind too: what SAELens has no architecture for has one here, under a name that SAELens does
not know and therefore refuses, and never under a name that it would misread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mistudio.engine.sae.activation import Activation, Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats.common import (
    ImportedSae,
    Tensors,
    cannot_read,
    damaged,
    finite,
    fit,
    not_here,
    plain,
    point_named,
    read_json,
    read_safetensors,
    whole_number,
)
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible

NAME = "saelens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
# Readers older than SAELens 6 drop nested metadata; this asks for the current format.
SAELENS_VERSION = "6.18.0"

# SAELens' architectures and, under the same scheme, those that only miStudio has.
_ARCHITECTURES = {
    ("standard", False, False): "standard",
    ("jumprelu", False, False): "jumprelu",
    ("topk", False, False): "topk",
    ("gated", False, False): "gated",
    ("standard", True, False): "transcoder",
    ("jumprelu", True, False): "jumprelu_transcoder",
    ("topk", True, False): "topk_transcoder",
    ("gated", True, False): "gated_transcoder",
    ("standard", True, True): "skip_transcoder",
    ("jumprelu", True, True): "jumprelu_skip_transcoder",
    ("topk", True, True): "topk_skip_transcoder",
    ("gated", True, True): "gated_skip_transcoder",
}
_FORMS = {name: form for form, name in _ARCHITECTURES.items()}
_OURS_ALONE = {
    "topk_transcoder",
    "gated_transcoder",
    "topk_skip_transcoder",
    "gated_skip_transcoder",
}
# SAELens' names of what is being trained; saved as the inference architecture on the right.
_IN_TRAINING = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}
_TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "standard": {"b_enc": ("m",)},
    "topk": {"b_enc": ("m",)},
    "jumprelu": {"b_enc": ("m",), "threshold": ("m",)},
    "gated": {"b_gate": ("m",), "b_mag": ("m",), "r_mag": ("m",)},
}
# Families whose models have no LayerNorm: TransformerLens cannot centre what writes to their
# residual stream.
_RMS_NORM = re.compile(r"llama|gemma|mistral|mixtral|qwen|phi-?3|olmo|apertus|smollm|yi-", re.I)


# --- writing ------------------------------------------------------------------------------------


def to_saelens(
    dictionary: Dictionary, site: Site, *, ours_too: bool = False
) -> tuple[dict[str, Any], Tensors]:
    """(configuration, tensors) of a folded dictionary, without metadata.

    Raises Incompatible for what SAELens has no architecture for, except with `ours_too`: then
    under a name or setting that SAELens refuses to load.
    """
    final = dictionary if ours_too else without_centring(dictionary)
    crosses = site.is_transcoder or final.d_in != final.d_out
    name, applies_bias = _architecture(final, crosses)
    if final.norm == "layer_norm" and name not in _TENSORS:
        raise Incompatible(
            "This SAE has no place in SAELens' format",
            "It normalises its input, and SAELens' transcoders and skips know no such thing.",
            "Use it in miStudio, or export it as `safetensors`.",
        )
    if name in _OURS_ALONE and not ours_too:
        kind = {"topk": "TopK", "gated": "Gated"}[final.activation.name]
        what = "with a skip" if final.skip is not None else "between two widths"
        raise Incompatible(
            "SAELens has no such SAE",
            f"It knows no {kind} dictionary {what}.",
            "Export it as `safetensors`, or train it with BatchTopK, which SAELens has in every "
            "wiring.",
        )
    if not applies_bias:
        final = final.with_centre_in_bias()
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": final.d_in,
        "d_sae": final.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": applies_bias,
        "normalize_activations": final.norm,
        "reshape_activations": "none",
    }
    if name not in _TENSORS:
        config["d_out"] = final.d_out
    if isinstance(final.activation, TopK):
        config |= {"k": final.activation.k, "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": final.W_enc, "W_dec": final.W_dec, "b_dec": final.b_dec}
    tensors |= _biases(final)
    if final.skip is not None:
        tensors["W_skip"] = final.skip
    return config, {name: value.float().contiguous() for name, value in tensors.items()}


def _architecture(final: Dictionary, crosses: bool) -> tuple[str, bool]:
    """(name, whether b_dec is taken off the input)."""
    kind = final.activation.name
    has_skip = final.skip is not None
    if has_skip:
        return _ARCHITECTURES[kind, True, True], False
    if not crosses:
        return kind, final.centre is None
    if kind in ("topk", "gated") and final.d_in == final.d_out:
        # SAELens has no such transcoder, but an autoencoder computes the same from x to y.
        return kind, False
    return _ARCHITECTURES[kind, True, False], False


def _biases(final: Dictionary) -> Tensors:
    if isinstance(final.activation, Gated):
        gain, offset = final.activation.gain, final.activation.offset
        return {
            "b_gate": final.b_enc,
            "b_mag": torch.addcmul(offset, gain, final.b_enc),
            "r_mag": gain.log(),
        }
    if isinstance(final.activation, JumpReLU):
        return {"b_enc": final.b_enc, "threshold": final.activation.threshold}
    return {"b_enc": final.b_enc}


def without_centring(dictionary: Dictionary) -> Dictionary:
    """The same function with the norm "centre" as weights.

    Taking the mean over channels away is a projection P, so it goes into the encoder; giving it
    back is a skip of 1/d everywhere: x_hat = f(xP) + x(I - P).
    """
    if dictionary.norm != "centre":
        return dictionary
    bare = dictionary.folded().with_centre_in_bias()
    mean = torch.full((bare.d_in, bare.d_in), 1.0 / bare.d_in, device=bare.device)
    skip = mean if bare.skip is None else bare.skip - bare.skip @ mean + mean
    encoder = bare.encoder - bare.encoder.mean(1, keepdim=True)
    return replace(bare, encoder=encoder, skip=skip, norm="none")


# --- reading ------------------------------------------------------------------------------------


def is_saelens(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> ImportedSae:
    """A folder that SAELens (any version) or `save_sae` wrote.

    Also a checkpoint of a run in progress: its input scaling lies in a file beside the weights and
    is folded in. Refused where that file is needed and missing.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise not_here(folder, name)
    config, metadata, notes = _configuration(folder, read_json(folder / CONFIG))
    tensors = read_safetensors(folder / WEIGHTS)
    dictionary = _dictionary(folder, config, tensors, notes)
    dictionary = _unscaled(folder, config, dictionary, notes)
    site = _site(folder, metadata)
    if _is_centred(config, metadata, site):
        dictionary = replace(dictionary, norm="centre")
        notes.append(
            "It was trained on activations without their mean over channels, as TransformerLens "
            "gives them; the mean is taken away before and given back after."
        )
    return ImportedSae(
        dictionary=dictionary,
        site=site,
        format=NAME,
        path=folder,
        layer=site.layer if site else None,
        model_name=str(metadata.get("model_name") or ""),
        notes=tuple(notes),
        details=plain(metadata),
    )


def _configuration(
    folder: Path, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(configuration, metadata, notes) in today's terms."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version")
    if isinstance(metadata, dict):
        version = version or metadata.get("sae_lens_version")
    if isinstance(metadata, dict) and not re.match(r"[0-5]\.", str(version or "6")):
        return config, metadata, []
    flat = dict(config)
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    for old, new in renamed.items():
        if old in flat:
            flat.setdefault(new, flat.pop(old))
    flat.setdefault("architecture", "standard")
    flat.setdefault("apply_b_dec_to_input", True)
    _read_old_activation(folder, flat)
    scaling = flat.get("normalize_activations")
    if scaling is None or isinstance(scaling, bool):
        flat["normalize_activations"] = "expected_average_only_in" if scaling else "none"
    flat["before_6"] = True
    return flat, flat, ["Its configuration is older than SAELens 6."]


def _read_old_activation(folder: Path, flat: dict[str, Any]) -> None:
    name = flat.get("activation_fn") or "relu"
    options = flat.get("activation_fn_kwargs")
    if name == "topk":
        flat["architecture"] = "topk"
        flat["k"] = options.get("k") if isinstance(options, dict) else None
    elif name != "relu":
        raise cannot_read(folder, f"its activation function is {name!r}.")


def _dictionary(
    folder: Path, config: dict[str, Any], tensors: Tensors, notes: list[str]
) -> Dictionary:
    """The dictionary as stored, before what lies beside the weights is folded in."""
    stored = str(config.get("architecture"))
    architecture = _IN_TRAINING.get(stored, stored)
    if architecture not in _FORMS:
        raise cannot_read(
            folder,
            f"its architecture is {stored!r}.",
            f"miStudio reads {', '.join([*_FORMS, *_IN_TRAINING])}.",
        )
    _refuse_other_shapes(folder, config)
    path = folder / WEIGHTS
    kind, is_transcoder, has_skip = _FORMS[architecture]
    tensors = _older_tensors(path, config, dict(tensors), stored, notes)
    shapes: dict[str, tuple[str, ...]] = {"W_enc": ("d", "m"), "W_dec": ("m", "o"), "b_dec": ("o",)}
    shapes |= _TENSORS[kind] | ({"W_skip": ("o", "d")} if has_skip else {})
    if not is_transcoder:
        shapes |= {"W_dec": ("m", "d"), "b_dec": ("d",)}
    weights, sizes = fit(path, tensors, shapes)
    _check_sizes(folder, config, sizes)
    applies_bias = bool(config.get("apply_b_dec_to_input", True)) and not is_transcoder
    dictionary = Dictionary(
        weights["W_enc"].T.contiguous(),
        weights.get("b_enc", weights.get("b_gate", torch.empty(0))),
        weights["W_dec"],
        weights["b_dec"],
        _activation(folder, kind, config, weights, sizes["m"]),
        centre=None if applies_bias else torch.zeros(sizes["d"]),
        skip=weights.get("W_skip"),
    )
    if stored in ("topk", *_IN_TRAINING) and config.get("rescale_acts_by_decoder_norm"):
        dictionary = _with_rescaled_rows(dictionary)
        notes.append("The norms of its decoder's rows are folded into its encoder.")
    return dictionary


def _refuse_other_shapes(folder: Path, config: dict[str, Any]) -> None:
    if (config.get("reshape_activations") or "none") != "none":
        raise cannot_read(folder, "it reads the heads of an attention layer, side by side.")
    if config.get("hook_head_index") is not None:
        raise cannot_read(folder, "it reads a single attention head.")


def _older_tensors(
    path: Path, config: dict[str, Any], tensors: Tensors, stored: str, notes: list[str]
) -> Tensors:
    """Tensors of earlier versions and of checkpoints, under today's names."""
    if "log_threshold" in tensors:
        tensors["threshold"] = finite(path, "log_threshold", tensors.pop("log_threshold")).exp()
    if stored in _IN_TRAINING and "topk_threshold" in tensors and "b_enc" in tensors:
        threshold = finite(path, "topk_threshold", tensors.pop("topk_threshold")).flatten()[0]
        tensors["threshold"] = torch.ones_like(tensors["b_enc"]) * threshold
        notes.append("A checkpoint of a run: its threshold is as far as training had moved it.")
    if "scaling_factor" in tensors:
        factor = finite(path, "scaling_factor", tensors.pop("scaling_factor"))
        if not torch.allclose(factor, torch.ones_like(factor)):
            if not config.get("finetuning_scaling_factor"):
                raise cannot_read(
                    path,
                    "it has a scaling factor, and its configuration does not say whether it "
                    "applies.",
                )
            tensors["W_dec"] = finite(path, "W_dec", tensors["W_dec"]) * factor[:, None]
            notes.append("Its finetuned scaling factors are folded into its decoder.")
    return tensors


def _check_sizes(folder: Path, config: dict[str, Any], sizes: Mapping[str, int]) -> None:
    for name, axis in (("d_in", "d"), ("d_sae", "m"), ("d_out", "o")):
        if axis in sizes and config.get(name) not in (None, sizes[axis]):
            raise damaged(
                folder, f"{CONFIG} says {name} {config[name]!r}, the weights have {sizes[axis]}"
            )


def _activation(
    folder: Path, kind: str, config: dict[str, Any], weights: Tensors, d_sae: int
) -> Activation:
    if kind == "topk":
        return TopK(whole_number(folder / CONFIG, "k", config.get("k"), 1, d_sae))
    if kind == "jumprelu":
        return JumpReLU(weights["threshold"])
    if kind == "gated":
        gain = weights["r_mag"].exp()
        return Gated(gain, weights["b_mag"] - gain * weights["b_gate"])
    return ReLU()


def _with_rescaled_rows(dictionary: Dictionary) -> Dictionary:
    """SAELens' `rescale_acts_by_decoder_norm`: latents are chosen, and a BatchTopK threshold is
    meant, in units of pre-activation times the norm of the decoder's row."""
    norms = dictionary.decoder.norm(dim=1)
    return replace(
        dictionary,
        encoder=dictionary.encoder * norms[:, None],
        b_enc=dictionary.b_enc * norms,
        decoder=dictionary.decoder / norms.clamp_min(1e-30)[:, None],
    )


def _unscaled(
    folder: Path, config: dict[str, Any], dictionary: Dictionary, notes: list[str]
) -> Dictionary:
    """The dictionary on raw activations, whatever scaling its configuration asks for."""
    scaling = str(config.get("normalize_activations") or "none")
    if scaling in ("none", "centre"):
        return replace(dictionary, norm=scaling)
    if scaling == "layer_norm":
        if (
            str(config["architecture"]) not in _TENSORS
            and config["architecture"] not in _IN_TRAINING
        ):
            raise cannot_read(folder, "it is a transcoder of normalised inputs.")
        return replace(dictionary, norm="layer_norm")
    if scaling == "expected_average_only_in":
        return _with_factor(folder, config, dictionary, notes)
    if scaling == "covariance_whitening":
        return _unwhitened(folder, dictionary, notes)
    raise cannot_read(folder, f"it scales its inputs by {scaling!r}.")


def _with_factor(
    folder: Path, config: dict[str, Any], dictionary: Dictionary, notes: list[str]
) -> Dictionary:
    scaler = folder / SCALER
    if not scaler.is_file():
        raise cannot_read(
            folder,
            "it was trained on scaled activations, and by what factor is nowhere in its folder: on "
            "plain activations its features would be wrong.",
            f"Add the run's {SCALER}, or save it again after SAELens' "
            "fold_activation_norm_scaling_factor.",
        )
    factor = read_json(scaler).get("scaling_factor")
    if not isinstance(factor, int | float) or not 0 < factor < 1e12:
        raise damaged(scaler, f"scaling_factor is {factor!r}")
    notes.append(f"The scale of its inputs ({factor:.4g}) is folded into its weights.")
    return replace(dictionary, scale=float(factor)).folded()


def _unwhitened(folder: Path, dictionary: Dictionary, notes: list[str]) -> Dictionary:
    """z = (x - mean) @ M into the encoder, its inverse into the decoder (arXiv 2511.13981)."""
    path = folder / WHITENING
    if not path.is_file():
        raise cannot_read(
            folder,
            f"it was trained on whitened activations, and {WHITENING} is missing.",
            "Add that file, or let SAELens finish the run: it folds the whitening in.",
        )
    axes = {"mean": ("d",), "matrix": ("d", "d"), "inverse_matrix": ("d", "d")}
    found, sizes = fit(path, read_safetensors(path), axes)
    if not sizes["d"] == dictionary.d_in == dictionary.d_out or dictionary.skip is not None:
        raise damaged(path, f"it whitens {sizes['d']} channels, which does not fit the SAE")
    matrix, inverse = found["matrix"].double(), found["inverse_matrix"].double()
    mean = found["mean"].double()
    centre = dictionary.centre
    notes.append("The whitening of its inputs is folded into its weights.")
    return replace(
        dictionary,
        encoder=(dictionary.encoder.double() @ matrix.T).float(),
        decoder=(dictionary.decoder.double() @ inverse).float(),
        b_dec=(dictionary.b_dec.double() @ inverse + mean).float(),
        centre=None if centre is None else (centre.double() @ inverse + mean).float(),
    )


def _site(folder: Path, metadata: Mapping[str, Any]) -> Site | None:
    reads = metadata.get("hook_name")
    if not reads:
        return None
    before_norm = re.fullmatch(r"blocks\.(\d+)\.hook_mlp_in", str(reads))
    if before_norm and str(metadata.get("hf_hook_name")).endswith("layernorm.output"):
        # What SAELens calls the input of Gemma Scope 2's transcoders; the module says the truth.
        reads = f"blocks.{before_norm[1]}.mlp.hook_in"
    point = point_named(reads, folder)
    writes = metadata.get("hook_name_out")
    return Site(point, point_named(writes, folder) if writes else point)


def _is_centred(config: Mapping[str, Any], metadata: Mapping[str, Any], site: Site | None) -> bool:
    """Whether it was trained on activations that TransformerLens had centred.

    It centres what writes to the residual stream of models with LayerNorm unless it is told not
    to; SAELens did not tell it until September 2024, nor record the choice (gpt2-small-res-jb).
    """
    if config.get("normalize_activations") in ("layer_norm", "centre"):
        return False  # these take the mean away themselves
    if site is not None and site.input.site == "mlp_in":
        return False  # behind a norm
    options = metadata.get("model_from_pretrained_kwargs")
    if isinstance(options, Mapping) and "center_writing_weights" in options:
        return bool(options["center_writing_weights"])
    if not config.get("before_6") or isinstance(options, Mapping):
        return False
    return not _RMS_NORM.search(str(metadata.get("model_name") or ""))
