"""Steering presets: what is chosen and asked as a configuration that can travel, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.jobs.presets import UNBOUND, Binding, bind, sae_reference
from mistudio.jobs.templates import model_reference
from mistudio.library.library import Library
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
        if c.sae_id != first.sae.id:
            entry["sae"] = sae_reference(sources[c.sae_id].sae)
        features.append(entry)
    own_layers = {sources[c.sae_id].sae.layer for c in known}
    return {
        "features": features,
        "layers": sorted(own_layers if form.layers is None else form.layers),
        "temperature": form.temperature,
        "model": model_reference(library.models.get(first.sae.model_id)),
        "sae": sae_reference(first.sae),
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
    values = dict(config.get("settings", {}))
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [_number(part) for part in values[name].split(",") if part]
    return Form.read({**values, "temperature": config.get("temperature", 0.7)})


def _number(text: str) -> Any:
    """A number of a list; what is none stays text, and the list is then left out."""
    try:
        found = float(text)
    except ValueError:
        return text
    return int(found) if found == int(found) else found


def chosen_of(library: Library, config: Config, sae_id: int | None) -> tuple[list[Chosen], Binding]:
    """The features in this library's SAEs. A preset that names none takes `sae_id`, the SAE that
    is shown, where its features exist there; else an unbound one has no features."""
    entries = config.get("features", [])
    binding = bind(library, config)
    sae_ids: Sequence[int] = binding.sae_ids
    if binding.result == UNBOUND:
        shown = library.saes.find(sae_id) if sae_id is not None else None
        nameless = not config.get("model") and not config.get("sae")
        if shown is None or not nameless:
            return [], binding
        if any(entry["feature_id"] >= shown.d_sae for entry in entries):
            what = f"The SAE that is shown has only {shown.d_sae:,} features."
            return [], Binding(UNBOUND, f"{binding.message} {what}")
        sae_ids = [shown.id] * len(entries)
    chosen = [
        Chosen(
            bound,
            entry["feature_id"],
            min(max(entry["coefficient"], -STRONGEST), STRONGEST),
            entry.get("method", "add"),
        )
        for bound, entry in zip(sae_ids, entries, strict=True)
    ]
    return chosen, binding


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
