"""What an experiment is asked for, and the job that does it; no widgets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mistudio.library.steering import Experiment
from mistudio.ui.steering.request import Chosen, Form, from_request

SWEEP, BY_LAYER, PROMPTS, STUDY = "sweep", "by_layer", "prompts", "study"
KINDS = (
    (SWEEP, "Strengths: how far can it go?"),
    (BY_LAYER, "Strengths at single layers"),
    (PROMPTS, "A list of prompts"),
    (STUDY, "Which layers matter?"),
)
ABOUT = {
    SWEEP: "Continues every prompt at every strength (a factor of all coefficients), and with the "
    "random control where it is on.",
    BY_LAYER: "The same vector after each of the chosen layers alone, at every strength, and with "
    "the random control where it is on.",
    PROMPTS: "Continues every prompt with the strengths of the form side by side, and with the "
    "random control where it is on.",
    STUDY: "All chosen layers together, each of them alone, and all but each.",
}
ABOUT_OWN = (
    "Each feature where its SAE acts: all layers together, each of them alone, and all but each."
)
STRENGTHS = "0.25, 0.5, 1, 1.5, 2, 3"
MOST_STRENGTHS = 16
MOST_SEEDS = 20


@dataclass(frozen=True)
class Plan:
    """`strengths` None: what was typed is no list of numbers. `layers` are those that were chosen;
    of a study of features of several SAEs, the ones of these."""

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


def write_prompts(prompts: Sequence[str]) -> str:
    return "\n".join(prompts)


def texts(plan: Plan, form: Form) -> int:
    """How many steered texts it writes."""
    strengths = len(plan.strengths or ()) * (1 + form.control)
    cells = {
        SWEEP: strengths,
        BY_LAYER: strengths * len(plan.layers),
        PROMPTS: len(form.scales) + form.control,
        STUDY: 1 + 2 * len(plan.layers),
    }[plan.kind]
    return cells * len(plan.prompts) * plan.seeds


def reason(plan: Plan, form: Form, chosen: Sequence[Chosen]) -> str:
    """Why it cannot begin; empty where it can."""
    if not chosen:
        return "Add at least one feature."
    if not plan.prompts:
        return "Enter at least one prompt."
    if plan.kind in (SWEEP, BY_LAYER) and plan.strengths is None:
        return f"Strengths must be 1 to {MOST_STRENGTHS} numbers, such as 0.5, 1, 2."
    if form.scope == "chosen" and not form.positions:
        return "Choose the prompt tokens to steer, under Advanced."
    if form.scope == "chosen" and len(plan.prompts) > 1:
        return "Chosen tokens are those of one prompt: take one, or another scope under Advanced."
    return _reason_against_layers(plan, form, chosen)


def at_own_layers(kind: str, chosen: Sequence[Chosen]) -> bool:
    """Whether it is a study in which each feature stays where its SAE acts."""
    return kind == STUDY and len({c.sae_id for c in chosen}) > 1


def _reason_against_layers(plan: Plan, form: Form, chosen: Sequence[Chosen]) -> str:
    if at_own_layers(plan.kind, chosen):
        several = len(plan.layers) > 1
        return "" if several else "Add features of SAEs of two or more layers, or of one SAE only."
    if plan.kind in (BY_LAYER, STUDY):
        layers = plan.layers
        if len(layers) < (2 if plan.kind == STUDY else 1):
            return f"Choose {'two or more layers' if plan.kind == STUDY else 'at least one layer'}."
    elif form.layers is None:
        return ""
    elif not form.layers:
        return "Choose at least one intervention layer, under Advanced."
    one_sae = len({c.sae_id for c in chosen}) == 1
    if not one_sae or any(c.method != "add" for c in chosen):
        return "One vector at several layers needs added features of one SAE."
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
    steering = {**_features(chosen, own), "keep_norm": form.keep_norm}
    if plan.kind == PROMPTS:
        steering |= {"layers": form.layers or ()}
        return PromptBatch(variants=_variants(form, steering), **common)
    if plan.kind == STUDY:
        layers = () if at_own_layers(plan.kind, chosen) else plan.layers
        return LayerStudy(layers=layers, **steering, **common)
    layers = (form.layers or ()) if plan.kind == SWEEP else plan.layers
    return Sweep(
        strengths=plan.strengths or (),
        layers=layers,
        together=plan.kind == SWEEP and bool(layers),
        control=form.control,
        **steering,
        **common,
    )


def _features(chosen: Sequence[Chosen], own: int) -> dict[str, Any]:
    return {
        "features": [[c.feature, c.strength, c.method] for c in chosen if c.sae_id == own],
        "others": tuple(c.as_list() for c in chosen if c.sae_id != own),
    }


def _variants(form: Form, steering: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [(f"Steered × {scale:g}", scale, False) for scale in form.scales]
    if form.control:
        rows.append(("Random control", form.scales[-1], True))
    return [
        {"name": name, **steering, "scale": scale, "control": control}
        for name, scale, control in rows
    ]


# --- and back -------------------------------------------------------------------------------------


def steering_of(experiment: Experiment) -> Mapping[str, Any]:
    """Its features (of a list of prompts those of its first steering), as a request of one
    generation has them."""
    request = experiment.request
    return {**request, **request.get("variants", [{}])[0]}


Asked = tuple[Plan, Form, list[Chosen]]


def read_back(experiment: Experiment) -> Asked | None:
    """What asks for this experiment again; None where the screen cannot, as one that was made
    elsewhere may be of another kind."""
    from mistudio.jobs.kinds import job_from_row

    request = experiment.request
    plan, form, chosen = _read(experiment)
    several = len(plan.prompts) > 1
    typed = read_prompts(write_prompts(plan.prompts)) if several else (plan.prompts[0].strip(),)
    if not chosen or typed != plan.prompts:
        return None
    again = to_job(plan, form, chosen, request["sae_id"])
    asked = job_from_row(experiment.kind, {**request, "name": ""})
    return (plan, form, chosen) if _plain(again) == _plain(asked) else None


def _plain(job: Any) -> str:
    return json.dumps(asdict(job), sort_keys=True)


def _read(experiment: Experiment) -> Asked:
    request = experiment.request
    kind = {"prompt_batch": PROMPTS, "layer_study": STUDY}.get(experiment.kind, SWEEP)
    layers = tuple(request.get("layers", ()))
    if kind == SWEEP and layers and not request.get("together"):
        kind = BY_LAYER
    chosen, form = from_request(steering_of(experiment))
    form = replace(
        form,
        prompt=request["prompts"][0],
        seed=request["seeds"][0],
        layers=form.layers if kind in (SWEEP, PROMPTS) else None,
    )
    if kind == PROMPTS:
        variants = request["variants"]
        form = replace(
            form,
            scales=tuple(v.get("scale", 1.0) for v in variants if not v.get("control")) or (1.0,),
            control=any(v.get("control") for v in variants),
        )
    if kind == SWEEP:
        layers = ()
    strengths = tuple(request.get("strengths", ())) or None
    plan = Plan(kind, tuple(request["prompts"]), strengths, layers, len(request["seeds"]))
    return plan, form, chosen
