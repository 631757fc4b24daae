"""Steering presets in a library: which of its SAEs the features of a preset belong to.

A preset names model and SAE by what they are: names, shapes, place and hashes of the weights.

    bound       model and SAE are the very ones
    a warning   what is here has the same place and shapes, and is not known to be the same, or
                known to be another: the numbers may mean something else
    unbound     model, SAE or its features are not here: the preset is kept and binds once they are
    refused     what it names is here with other shapes: a feature's number would mean nothing. Such
                an entry of a file is not taken in; a preset that is here is not loaded.

What contradicts itself is refused where it is read (`template_files`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistudio.jobs.template_files import Config, Entry
from mistudio.jobs.templates import find_model, model_of_other_shape
from mistudio.library.library import Library
from mistudio.library.records import Model, Sae

IN_MULTIPLES = ("add", "clamp", "clamp_min", "cap")  # methods that read the largest activation
BOUND, WARNED, UNBOUND, REFUSED = "bound", "bound with a warning", "unbound", "refused"


@dataclass(frozen=True)
class Binding:
    """`sae_ids` has the SAE of each feature of the preset, in its order; empty where it is unbound
    or refused. `message` and `next_step` are sentences for the user: why, and what to do; empty
    where there is nothing to say."""

    result: str
    message: str = ""
    sae_ids: tuple[int, ...] = ()
    next_step: str = ""


def sae_reference(library: Library, sae: Sae) -> Config:
    """What names an SAE in any library."""
    return {
        "name": sae.name or sae.architecture,
        "hook_point": sae.hook_point,
        "hook_point_out": sae.hook_point_out,
        "layer": sae.layer,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "created": sae.created_at,
        "sha256": weights_hash(library, sae.id),
    }


def weights_hash(library: Library, sae_id: int) -> str:
    """What discovery noted of the SAE's weights; empty where none did."""
    run = library.feature_runs.newest_of_sae(sae_id)
    if run is None:
        return ""
    try:  # a kilobyte of JSON
        found = json.loads((library.path(run.folder) / "run.json").read_bytes())
        return str(found["provenance"]["sae"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def largest_activation(library: Library, sae_id: int, feature: int) -> float | None:
    """What strengths of the feature are multiples of; None where no discovery tells it."""
    run = library.feature_runs.newest_of_sae(sae_id)
    if run is None:
        return None
    import numpy as np

    try:
        found = np.load(library.path(run.folder) / "columns" / "max_activation.npy", mmap_mode="r")
        return float(found[feature])
    except (OSError, ValueError, IndexError):
        return None


def bind(library: Library, config: Config) -> Binding:
    """Find model and SAEs of a preset; a handful of small queries and files."""
    reference = config.get("model", {})
    if not reference:
        return Binding(
            UNBOUND,
            "It does not say which model and SAE its features belong to.",
            next_step="Choose the SAE in the Steering tab, then load it.",
        )
    model, remark = find_model(library, reference)
    if model is None:
        return _without_model(library, reference, remark)
    chosen = _Choice(library, model)
    remarks, found = [remark] if remark else [], []
    for feature in config.get("features", []):
        sae = chosen.of(feature.get("sae") or config.get("sae", {}))
        if isinstance(sae, Binding):
            return sae
        found.append(sae.id)
    if len({*zip(found, _numbers(config), strict=True)}) < len(found):
        return Binding(
            UNBOUND,
            "It has one feature of two SAEs, of which only one is in this library.",
            next_step="Train or import the other one.",
        )
    remarks += chosen.remarks or _other_units(library, config, found)
    return Binding(WARNED if remarks else BOUND, " ".join(remarks), tuple(found))


def _other_units(library: Library, config: Config, sae_ids: Sequence[int]) -> list[str]:
    """A remark where discovery found another largest activation than where it was saved: the same
    strength then is another push."""
    for feature, sae_id in zip(config.get("features", []), sae_ids, strict=True):
        number, was = feature["feature_id"], feature.get("max_activation")
        if not was or feature.get("method", "add") not in IN_MULTIPLES:
            continue
        now = largest_activation(library, sae_id, number)
        if now is not None and abs(now - was) > 0.01 * was:
            return [
                f"#{number} was saved where its largest activation was {was:.3g}; here it is "
                f"{now:.3g}, so that the same strength pushes {'more' if now > was else 'less'}."
            ]
    return []


def _numbers(config: Config) -> list[int]:
    return [feature["feature_id"] for feature in config.get("features", [])]


def _without_model(library: Library, reference: Config, remark: str) -> Binding:
    wanted = reference.get("repository") or reference.get("name") or "its model"
    other = model_of_other_shape(library, reference)
    if other is None:
        return Binding(UNBOUND, remark, next_step=f"Add {wanted} in the Models tab.")
    return Binding(
        REFUSED,
        f"{other.name} has {other.n_layers} layers of width {other.d_model:,} here, not "
        f"{reference.get('n_layers', '?')} of width {reference.get('d_model', '?')}.",
        next_step=f"Add the model that it was saved with ({wanted}) in the Models tab.",
    )


def with_bindings(library: Library, entries: Sequence[Entry]) -> list[Entry]:
    """Entries of a file, each usable preset with a note that says how it is bound here; one that
    is refused here with the reason as its problem."""
    return [_with_binding(library, entry) for entry in entries]


def _with_binding(library: Library, entry: Entry) -> Entry:
    if entry.kind != "steering" or entry.config is None or entry.problem:
        return entry
    binding = bind(library, entry.config)
    told = " ".join(part for part in (binding.message, binding.next_step) if part)
    if binding.result == REFUSED:
        return replace(entry, problem=f"{told} Then import the file again.")
    said = f"{binding.result.capitalize()}{': ' if told else '.'}{told}"
    return replace(entry, notes=(said, *entry.notes))


class _Choice:
    """The SAEs of a model that references mean; `remarks` on those that only stand for them."""

    def __init__(self, library: Library, model: Model) -> None:
        self._library, self._model = library, model
        self._there = [sae for sae in library.saes.all() if sae.model_id == model.id]
        self._discovered = {run.sae_id for run in library.feature_runs.all()}
        self._known: dict[str, Sae | Binding] = {}
        self.remarks: list[str] = []

    def of(self, reference: Mapping[str, Any]) -> Sae | Binding:
        """The SAE, or why there is none."""
        key = json.dumps(reference, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._find(reference)
        return self._known[key]

    def _find(self, reference: Mapping[str, Any]) -> Sae | Binding:
        place = reference.get("hook_point") or f"layer {reference.get('layer', '?')}"
        if reference.get("hook_point_out", place) != place:  # a transcoder
            place = f"{place} to {reference['hook_point_out']}"
        where = ("hook_point", "hook_point_out", "layer")
        at_place = [sae for sae in self._there if _agrees(sae, reference, *where)]
        if not at_place:
            return Binding(
                UNBOUND,
                f"No SAE at {place} of {self._model.name} is in this library.",
                next_step="Train or import one there and discover its features.",
            )
        fitting = [sae for sae in at_place if _agrees(sae, reference, "d_in", "d_sae")]
        if not fitting:
            return self._of_other_shape(at_place[0], reference, place)
        undiscovered = Binding(
            UNBOUND,
            f"The features of the SAE at {place} were not discovered yet.",
            next_step="Discover them in the Features tab.",
        )
        usable = [sae for sae in fitting if sae.id in self._discovered]
        same = [sae for sae in fitting if self._is(sae, reference)]
        for sae in same:
            if sae in usable:
                return sae
        if same or not usable:
            return undiscovered
        self._remark(usable[0], reference, place)
        return usable[0]

    def _of_other_shape(self, sae: Sae, reference: Mapping[str, Any], place: str) -> Binding:
        here, meant = f"{sae.d_sae:,} features", f"{reference.get('d_sae', 0):,}"
        if reference.get("d_sae") == sae.d_sae:
            here, meant = f"inputs of width {sae.d_in:,}", f"{reference.get('d_in', 0):,}"
        return Binding(
            REFUSED,
            f"The SAE at {place} of {self._model.name} has {here}, not {meant}.",
            next_step="Train or import one of that shape there and discover its features.",
        )

    def _is(self, sae: Sae, reference: Mapping[str, Any]) -> bool:
        """By its weights where both are known, else by when it was made in this library."""
        wanted, has = reference.get("sha256"), weights_hash(self._library, sae.id)
        if wanted and has:
            return bool(wanted == has)
        return bool(reference.get("created")) and reference["created"] == sae.created_at

    def _remark(self, sae: Sae, reference: Mapping[str, Any], place: str) -> None:
        known = reference.get("sha256") and weights_hash(self._library, sae.id)
        told = f"Another SAE at {place} stands for its own: " + (
            "the same numbers are other features there."
            if known
            else "whether the same numbers are the same features is not known."
        )
        if told not in self.remarks:
            self.remarks.append(told)


def _agrees(sae: Sae, reference: Mapping[str, Any], *names: str) -> bool:
    """Whether what was saved of these is what the SAE has."""
    return all(reference.get(name) in (None, "", getattr(sae, name)) for name in names)
