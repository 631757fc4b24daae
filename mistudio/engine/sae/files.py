"""The library's own SAE folders: SAELens' format, and `mistudio.json` for what it has no field for.

A saved dictionary is folded (works on raw activations), is read back and compared before it counts
as saved. No pickle is read or written. Other formats are in `formats`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.formats import saelens
from mistudio.engine.sae.formats.common import damaged, read_json
from mistudio.engine.sae.formats.compare import check_same_function
from mistudio.engine.sae.site import Site

OURS = "mistudio.json"


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


def wiring_of(dictionary: Dictionary, site: Site) -> str:
    """`sae`, `skip_sae`, `transcoder` or `skip_transcoder`."""
    kind = "transcoder" if site.is_transcoder else "sae"
    return kind if dictionary.skip is None else f"skip_{kind}"


def save_sae(
    dictionary: Dictionary,
    folder: Path,
    *,
    site: Site,
    model_name: str,
    hf_hook_name: str = "",
    hf_hook_name_out: str = "",
    context: int = 128,
    prepend_bos: bool = False,
    training_architecture: str = "",
    frequencies: torch.Tensor | None = None,
    record: dict[str, Any] | None = None,
    version: str = "",
    unit_decoder: bool = True,
) -> None:
    """Write a finished dictionary. `frequencies` [d_sae] is each latent's share of tokens.

    `hf_hook_name` and `hf_hook_name_out` are the paths of the modules that carry the site.
    Without `unit_decoder`, latents keep the unit they have, as those of an imported SAE must.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = dictionary.folded().to("cpu")
    final = final.with_unit_decoder() if unit_decoder else final
    config, tensors = saelens.to_saelens(final, site, ours_too=True)
    config["metadata"] = {
        "sae_lens_version": saelens.SAELENS_VERSION,
        "sae_lens_training_version": f"miStudio-{version}",
        "training_architecture": training_architecture or final.activation.name,
        "model_name": model_name,
        "hook_name": site.input.name,
        "hook_name_out": site.output.name,
        "hf_hook_name": hf_hook_name,
        "hf_hook_name_out": hf_hook_name_out if site.is_transcoder else hf_hook_name,
        "context_size": context,
        "prepend_bos": prepend_bos,
        "exclude_special_tokens": True,
        "model_from_pretrained_kwargs": {},
    }
    save_file(tensors, folder / saelens.WEIGHTS)
    (folder / saelens.CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    if frequencies is not None:
        logs = torch.log10(frequencies.float().cpu() + 1e-10)
        save_file({"sparsity": logs.contiguous()}, folder / saelens.SPARSITY)
    (folder / OURS).write_text(json.dumps(record or {}, indent=1), encoding="utf-8")
    check_same_function(final, load_sae(folder).dictionary, folder)


def load_sae(folder: Path, device: str = "cpu") -> SavedSae:
    """Read a folder that `save_sae` or SAELens wrote."""
    found = saelens.read(folder)
    if found.site is None:
        raise damaged(folder / saelens.CONFIG, "it does not say which activations it reads")
    ours = folder / OURS
    return SavedSae(
        dictionary=found.dictionary.to(device),
        site=found.site,
        metadata=found.details,
        record=read_json(ours) if ours.exists() else {},
    )
