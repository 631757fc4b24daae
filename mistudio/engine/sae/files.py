"""SAE folders: SAELens' own format, plus `mistudio.json` with what SAELens has no field for.

A saved dictionary is folded (`normalize_activations: none`), has a unit-norm decoder, and is read
back and compared before it counts as saved. No pickle is read or written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Activation, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import CorruptFile, NotFound

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
OURS = "mistudio.json"
# Readers older than SAELens 6 drop nested metadata; this asks for the current format.
SAELENS_VERSION = "6.18.0"


@dataclass(frozen=True)
class SavedSae:
    """A dictionary with where it belongs. `record` is our own metadata (training, metrics)."""

    dictionary: Dictionary
    site: Site
    metadata: dict[str, Any]
    record: dict[str, Any]

    @property
    def hook_point(self) -> HookPoint:
        """Where it reads."""
        return self.site.input


def save_sae(
    dictionary: Dictionary,
    folder: Path,
    *,
    site: Site,
    model_name: str,
    hf_hook_name: str = "",
    context: int = 128,
    prepend_bos: bool = False,
    training_architecture: str = "",
    frequencies: torch.Tensor | None = None,
    record: dict[str, Any] | None = None,
    version: str = "",
) -> None:
    """Write a finished dictionary. `frequencies` [d_sae] is each latent's share of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    final = dictionary.folded().with_unit_decoder().to("cpu")
    tensors = {
        "W_enc": final.W_enc.contiguous(),
        "b_enc": final.b_enc.contiguous(),
        "W_dec": final.W_dec.contiguous(),
        "b_dec": final.b_dec.contiguous(),
    }
    config: dict[str, Any] = {
        "architecture": final.activation.name,
        "d_in": final.d_in,
        "d_sae": final.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": f"miStudio-{version}",
            "training_architecture": training_architecture or final.activation.name,
            "model_name": model_name,
            "hook_name": site.input.name,
            "hook_name_out": site.output.name,
            "hf_hook_name": hf_hook_name,
            "context_size": context,
            "prepend_bos": prepend_bos,
            "exclude_special_tokens": True,
            "model_from_pretrained_kwargs": {},
        },
    }
    if isinstance(final.activation, TopK):
        config |= {"k": final.activation.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(final.activation, JumpReLU):
        tensors["threshold"] = final.activation.threshold.contiguous()
    save_file({name: value.float() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    if frequencies is not None:
        logs = torch.log10(frequencies.float().cpu() + 1e-10)
        save_file({"sparsity": logs.contiguous()}, folder / SPARSITY)
    (folder / OURS).write_text(json.dumps(record or {}, indent=1), encoding="utf-8")
    _check_round_trip(final, folder)


def load_sae(folder: Path, device: str = "cpu") -> SavedSae:
    """Read a folder that `save_sae` or SAELens wrote (architectures topk, jumprelu, standard)."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS, device=device)
    except FileNotFoundError as exc:
        raise NotFound(
            "This is not an SAE folder",
            f"{folder} has no {Path(str(exc.filename or WEIGHTS)).name}.",
            f"Choose a folder that holds {CONFIG} and {WEIGHTS}.",
        ) from exc
    except (json.JSONDecodeError, SafetensorError) as exc:
        raise CorruptFile(
            "The SAE's files are damaged", f"{folder}: {exc}.", "Export or download it again."
        ) from exc
    dictionary = _build(folder, config, tensors)
    ours = folder / OURS
    reads = config["metadata"]["hook_name"]
    writes = config["metadata"].get("hook_name_out") or reads
    return SavedSae(
        dictionary=dictionary,
        site=Site(HookPoint.parse(reads), HookPoint.parse(writes)),
        metadata=config["metadata"],
        record=json.loads(ours.read_text(encoding="utf-8")) if ours.exists() else {},
    )


def _build(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Dictionary:
    architecture = config["architecture"]
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise CorruptFile(
                "The SAE's weights do not fit its description",
                f"{folder}: {name} should be {shape}, found {found}.",
                "Export or download it again.",
            )
    if config.get("normalize_activations", "none") != "none":
        raise CorruptFile(
            "This SAE expects scaled activations",
            f"normalize_activations is {config['normalize_activations']!r}.",
            "Fold the scaling into the weights (SAELens: fold_activation_norm_scaling_factor).",
        )
    b_dec = tensors["b_dec"].float()
    encoder = tensors["W_enc"].float().T.contiguous()
    b_enc = tensors["b_enc"].float()
    centre = None if config.get("apply_b_dec_to_input", True) else torch.zeros(d_in)
    if architecture == "topk":
        activation: Activation = TopK(int(config["k"]))
    elif architecture == "jumprelu":
        activation = JumpReLU(tensors["threshold"].float())
    elif architecture == "standard":
        activation = ReLU()
    else:
        raise CorruptFile(
            "This kind of SAE cannot be read yet",
            f"Its architecture is {architecture!r}.",
            "miStudio reads topk, jumprelu and standard.",
        )
    return Dictionary(encoder, b_enc, tensors["W_dec"].float(), b_dec, activation, centre=centre)


def _check_round_trip(saved: Dictionary, folder: Path) -> None:
    """A dictionary that reads back differently must never be called saved."""
    x = torch.randn(16, saved.d_in, generator=torch.Generator().manual_seed(0))
    x = x * saved.b_dec.abs().mean().clamp_min(1.0) + saved.b_dec
    again = load_sae(folder).dictionary
    want, got = saved.encode(x).dense(), again.encode(x).dense()
    if not torch.allclose(want, got, rtol=1e-5, atol=1e-5 * float(want.abs().max().clamp_min(1.0))):
        raise RuntimeError(f"The SAE in {folder} reads back differently from what was written")
