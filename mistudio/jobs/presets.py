"""Steering presets in a library: which of its SAEs the features of a preset belong to.

A preset names model and SAE by what they are. Bound: it is the very SAE. With a warning: one of
the same model, place and size, whose numbers may mean something else. Unbound: none of the kind is
here; the preset is kept and binds as soon as there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistudio.jobs.template_files import Config, Entry
from mistudio.jobs.templates import find_model
from mistudio.library.library import Library
from mistudio.library.records import Sae

BOUND, WARNED, UNBOUND = "bound", "bound with a warning", "unbound"


@dataclass(frozen=True)
class Binding:
    """`sae_ids` has the SAE of each feature of the preset, in its order; empty where unbound.
    `message` is a sentence for the user, empty where there is nothing to say."""

    result: str
    message: str = ""
    sae_ids: tuple[int, ...] = ()


def sae_reference(sae: Sae) -> Config:
    """What names an SAE in any library."""
    return {
        "name": sae.name or sae.architecture,
        "hook_point": sae.hook_point,
        "layer": sae.layer,
        "d_sae": sae.d_sae,
        "created": sae.created_at,
        "sha256": str(sae.provenance.get("sha256", "")),
    }


def bind(library: Library, config: Config) -> Binding:
    """Find model and SAEs of a preset; a handful of small queries."""
    model, remark = find_model(library, config.get("model", {}))
    if model is None:
        what = remark or "It does not say which model and SAE its features belong to."
        return Binding(UNBOUND, what)
    discovered = {run.sae_id for run in library.feature_runs.all()}
    there = [sae for sae in library.saes.all() if sae.model_id == model.id]
    remarks = [remark] if remark else []
    found = []
    for feature in config.get("features", []):
        reference = feature.get("sae") or config.get("sae", {})
        sae, what = _best(reference, there, discovered)
        if sae is None:
            return Binding(UNBOUND, what.format(model=model.name))
        if what and what not in remarks:
            remarks.append(what)
        found.append(sae.id)
    return Binding(WARNED if remarks else BOUND, " ".join(remarks), tuple(found))


def with_bindings(library: Library, entries: Sequence[Entry]) -> list[Entry]:
    """Entries of a file, each usable preset with a note that says how it is bound here."""
    return [_with_binding(library, entry) for entry in entries]


def _with_binding(library: Library, entry: Entry) -> Entry:
    if entry.kind != "steering" or entry.config is None or entry.problem:
        return entry
    binding = bind(library, entry.config)
    told = f"{binding.result.capitalize()}{': ' if binding.message else '.'}{binding.message}"
    return replace(entry, notes=(told, *entry.notes))


def _best(
    reference: Mapping[str, Any], there: Sequence[Sae], discovered: Collection[int]
) -> tuple[Sae | None, str]:
    """The SAE that is meant, or one that could stand for it with a sentence that says so."""
    if not reference:
        return None, "It does not say which SAE its features belong to."
    place = reference.get("hook_point") or f"layer {reference.get('layer', '?')}"
    alike = [sae for sae in there if _fits(sae, reference)]
    if not alike:
        size = reference.get("d_sae")
        of = f" with {size:,} features" if size else ""
        return None, f"No SAE at {place}{of} of {{model}} is in this library."
    usable = [sae for sae in alike if sae.id in discovered]
    if not usable:
        return None, f"The features of the SAE at {place} were not discovered yet."
    same = next((sae for sae in usable if _is(sae, reference)), None)
    if same is not None:
        return same, ""
    return usable[0], f"Another SAE at {place} stands for its own: the numbers may differ."


def _fits(sae: Sae, reference: Mapping[str, Any]) -> bool:
    """Whether place and size are those that were saved."""
    return all(
        reference.get(name) in (None, "", getattr(sae, name))
        for name in ("hook_point", "layer", "d_sae")
    )


def _is(sae: Sae, reference: Mapping[str, Any]) -> bool:
    weights = reference.get("sha256")
    if weights and weights == sae.provenance.get("sha256"):
        return True
    return bool(reference.get("created")) and reference["created"] == sae.created_at
