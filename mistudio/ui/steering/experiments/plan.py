"""What an experiment is asked for, and the job that does it; no widgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistudio.ui.steering.request import Chosen, Form

SWEEP, BY_LAYER, PROMPTS, STUDY = "sweep", "by_layer", "prompts", "study"
KINDS = (
    (SWEEP, "Strengths: how far can it go?"),
    (BY_LAYER, "Strengths at single layers"),
    (PROMPTS, "A list of prompts"),
    (STUDY, "Which layers matter?"),
)
ABOUT = {
    SWEEP: "Continues every prompt at every strength. Strengths multiply all coefficients.",
    BY_LAYER: "The same vector after each of the chosen layers alone, at every strength.",
    PROMPTS: "Continues every prompt with the strengths of the form side by side, and with the "
    "random control where it is on.",
    STUDY: "All chosen layers together, each of them alone, and all but each.",
}
STRENGTHS = "0.25, 0.5, 1, 1.5, 2, 3"
MOST_STRENGTHS = 16


@dataclass(frozen=True)
class Plan:
    """`strengths` None: what was typed is no list of numbers."""

    kind: str
    prompts: tuple[str, ...]
    strengths: tuple[float, ...] | None
    layers: tuple[int, ...]
    seeds: int = 3


def read_strengths(text: str) -> tuple[float, ...] | None:
    """Numbers between commas or spaces; None where there is something else, or too many."""
    found = []
    for part in text.replace(",", " ").replace(";", " ").split():
        try:
            value = float(part)
        except ValueError:
            return None
        if not math.isfinite(value) or abs(value) > 100:
            return None
        found.append(value)
    unique = tuple(dict.fromkeys(found))
    return unique if 1 <= len(unique) <= MOST_STRENGTHS else None


def read_prompts(text: str) -> tuple[str, ...]:
    """One a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def texts(plan: Plan, form: Form) -> int:
    """How many steered texts it writes."""
    cells = {
        SWEEP: len(plan.strengths or ()),
        BY_LAYER: len(plan.strengths or ()) * len(plan.layers),
        PROMPTS: len(form.scales) + form.control,
        STUDY: 1 + 2 * len(plan.layers),
    }[plan.kind]
    return cells * len(plan.prompts) * plan.seeds


def reason(plan: Plan, chosen: Sequence[Chosen]) -> str:
    """Why it cannot begin; empty where it can."""
    if not chosen:
        return "Add at least one feature."
    if not plan.prompts:
        return "Enter at least one prompt."
    if plan.kind in (SWEEP, BY_LAYER) and plan.strengths is None:
        return f"Strengths must be 1 to {MOST_STRENGTHS} numbers, such as 0.5, 1, 2."
    if plan.kind == BY_LAYER and not plan.layers:
        return "Choose at least one layer."
    if plan.kind == STUDY and len(plan.layers) < 2:
        return "Choose two or more layers."
    if plan.kind in (BY_LAYER, STUDY):
        one_sae = len({c.sae_id for c in chosen}) == 1
        if not one_sae or any(c.method != "add" for c in chosen):
            return "This needs added features of one SAE."
    return ""


def to_job(plan: Plan, form: Form, chosen: Sequence[Chosen], sae_id: int) -> Any:
    """A `Sweep`, `PromptBatch` or `LayerStudy`."""
    from mistudio.jobs.kinds import LayerStudy, PromptBatch, Sweep

    own = sae_id if any(c.sae_id == sae_id for c in chosen) else chosen[0].sae_id
    common: dict[str, Any] = {
        "sae_id": own,
        "prompts": plan.prompts,
        "seeds": tuple(range(form.seed, form.seed + plan.seeds)),
        "temperature": form.temperature,
        "top_p": form.top_p,
        "top_k": form.top_k,
        "repetition_penalty": form.repetition_penalty,
        "max_new_tokens": form.max_tokens,
        "chat": form.chat,
        "scope": form.scope,
        "positions": form.positions if form.scope == "chosen" else (),
    }
    if plan.kind == PROMPTS:
        return PromptBatch(variants=_variants(form, chosen, own), **common)
    common |= _features(chosen, own, 1.0) | {"keep_norm": form.keep_norm}
    if plan.kind == STUDY:
        return LayerStudy(layers=plan.layers, **common)
    layers = plan.layers if plan.kind == BY_LAYER else ()
    return Sweep(strengths=plan.strengths or (), layers=layers, **common)


def _features(chosen: Sequence[Chosen], own: int, scale: float) -> dict[str, Any]:
    return {
        "features": [[c.feature, c.strength * scale, c.method] for c in chosen if c.sae_id == own],
        "others": tuple(
            [c.sae_id, c.feature, c.strength * scale, c.method] for c in chosen if c.sae_id != own
        ),
    }


def _variants(form: Form, chosen: Sequence[Chosen], own: int) -> list[dict[str, Any]]:
    rows = [(f"Steered × {scale:g}", scale, False) for scale in form.scales]
    if form.control:
        rows.append(("Random control", form.scales[-1], True))
    return [
        {
            "name": name,
            **_features(chosen, own, scale),
            "layers": form.layers or (),
            "keep_norm": form.keep_norm,
            "control": control,
        }
        for name, scale, control in rows
    ]
