"""Steering presets: what is chosen and asked as a configuration that can travel, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.jobs.presets import (
    BOUND,
    UNBOUND,
    WARNED,
    Binding,
    bind,
    largest_activation,
    sae_reference,
)
from mistudio.jobs.template_files import sound_settings
from mistudio.jobs.templates import model_reference
from mistudio.library.library import Library
from mistudio.library.records import Sae
from mistudio.ui.steering.request import Chosen, Form
from mistudio.ui.steering.sources import Source
from mistudio.ui.steering.units import STRONGEST

Config = dict[str, Any]
_LISTS = ("scales", "positions", "layers")


def to_config(
    library: Library, form: Form, chosen: Sequence[Chosen], sources: Mapping[int, Source]
) -> Config:
    """Raises InvalidInput where no feature is chosen."""
    known = [c for c in chosen if c.sae_id in sources]
    if not known:
        raise InvalidInput(
            "There is nothing to save", "No feature is selected.", "Add at least one feature."
        )
    first = sources[known[0].sae_id]
    notes = {sae_id: library.feature_notes.of_sae(sae_id) for sae_id in {c.sae_id for c in known}}
    features = []
    for c in known:
        note = notes[c.sae_id].get(c.feature)
        entry: Config = {
            "feature_id": c.feature,
            "coefficient": c.strength,
            "method": c.method,
            "layer": sources[c.sae_id].sae.layer,
            "label": note.label[:500] if note else "",
        }
        largest = largest_activation(library, c.sae_id, c.feature)
        if largest is not None:
            entry["max_activation"] = largest
        if c.sae_id != first.sae.id:
            entry["sae"] = sae_reference(library, sources[c.sae_id].sae)
        features.append(entry)
    own_layers = {sources[c.sae_id].sae.layer for c in known}
    return {
        "features": features,
        "layers": sorted(own_layers if form.layers is None else form.layers),
        "temperature": form.temperature,
        "model": model_reference(library.models.get(first.sae.model_id)),
        "sae": sae_reference(library, first.sae),
        "title": first.title,
        "settings": _settings(form),
    }


def _settings(form: Form) -> Config:
    """Flat, as files of presets hold it: lists become texts."""
    values = form.as_dict()
    del values["temperature"]
    for name in _LISTS:
        if values[name] is not None:
            values[name] = ",".join(f"{number:g}" for number in values[name])
    return values


def form_of(config: Config) -> Form:
    """What of a preset's form can be understood; the rest is as in a new one."""
    values = sound_settings(config)
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [_number(part) for part in values[name].split(",") if part]
    return Form.read({**values, "temperature": config.get("temperature", 0.7)})


def _number(text: str) -> Any:
    found = float(text)
    return int(found) if found == int(found) else found


def chosen_of(library: Library, config: Config, sae_id: int | None) -> tuple[list[Chosen], Binding]:
    """The features in this library's SAEs. A preset that names none takes `sae_id`, the SAE that
    is shown, where its features exist there; else an unbound or refused one has no features."""
    entries = config.get("features", [])
    binding = bind(library, config)
    sae_ids: Sequence[int] = binding.sae_ids
    if not sae_ids:
        shown = library.saes.find(sae_id) if sae_id is not None else None
        nameless = not config.get("model") and not config.get("sae")
        if shown is None or not nameless:
            return [], binding
        binding = _onto_shown(binding, config, shown)
        if not binding.sae_ids:
            return [], binding
        sae_ids, binding = binding.sae_ids, replace(binding, sae_ids=())
    if any(abs(entry["coefficient"]) > STRONGEST for entry in entries):
        told = f"Strengths beyond {STRONGEST:g} × the largest activation are limited to that."
        result = WARNED if binding.result == BOUND else binding.result
        binding = replace(binding, result=result, message=f"{binding.message} {told}".strip())
    chosen = [
        Chosen(bound, entry["feature_id"], 0.0, entry.get("method", "add")).at(entry["coefficient"])
        for bound, entry in zip(sae_ids, entries, strict=True)
    ]
    return chosen, binding


def _onto_shown(binding: Binding, config: Config, shown: Sae) -> Binding:
    """Of a preset that names no SAE: `sae_ids` are the one that is shown, where it fits."""
    entries = config.get("features", [])
    if any(entry["feature_id"] >= shown.d_sae for entry in entries):
        what = f"The SAE that is shown has only {shown.d_sae:,} features."
        return replace(binding, message=f"{binding.message} {what}")
    told, layers = binding.message, config.get("layers", [])
    if layers and layers != [shown.layer]:
        told += f" Its layers are left out: the features act at layer {shown.layer}."
    return Binding(UNBOUND, told, (shown.id,) * len(entries))


def meta(config: Config) -> str:
    """`2 features • Layers 8-12 • T: 0.8 • BatchTopK SAE • SmolLM2-135M • wiki`."""
    count = len(config["features"])
    parts = [f"{count} feature{'' if count == 1 else 's'}"]
    layers = config.get("layers", [])
    if layers:
        one = len(layers) == 1
        parts.append(f"Layer {layers[0]}" if one else f"Layers {min(layers)}-{max(layers)}")
    parts.append(f"T: {config['temperature']:g}")
    if config.get("title"):
        parts.append(str(config["title"]))
    return " • ".join(parts)
