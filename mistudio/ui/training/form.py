"""What the training form holds, what is wrong with it, and what it would cost; no widgets.

The fields, their limits, help and derived values come from `engine.training.config`; this module
adds what only the library knows (models, datasets, stored activations) and plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mistudio import formatting
from mistudio.engine.training.config import Plan, TrainingConfig, derive, option, parse
from mistudio.errors import InvalidInput
from mistudio.library.records import Dataset, Extraction, Model

SITES = {
    "resid_post": "Residual stream after the block",
    "resid_pre": "Residual stream before the block",
    "mlp_out": "MLP output",
    "attn_out": "Attention output",
}

# The names of engine.models.hooks.HookPoint, written out: that module imports torch.
_SUFFIXES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
_SITES_BY_SUFFIX = {suffix: site for site, suffix in _SUFFIXES.items()}

SPARSITY_NAMES = {"batchtopk": "BatchTopK", "topk": "TopK"}

ENCODERS = (
    ("sparse", "Sparse Autoencoder"),
    ("skip", "Skip Autoencoder"),
    ("transcoder", "Transcoder"),
    ("skip_transcoder", "Skip Transcoder"),
)
LATER = "Comes with the training engine; not in this version"

NAMES = tuple(entry.name for entry in fields(TrainingConfig))
ESSENTIAL = tuple(name for name in NAMES if option(name).get("essential"))
ADVANCED = tuple(name for name in NAMES if name not in ESSENTIAL)

BYTES_PER_PARAMETER = 16  # training in float32: the weight, its gradient, Adam's two moments


def point_name(site: str, layer: int) -> str:
    return f"blocks.{layer}.{_SUFFIXES[site]}"


def point_parts(name: str) -> tuple[str, int]:
    """(site, layer) of a hook point's name; the site is "" where the form does not offer it."""
    _, layer, suffix = name.split(".", 2)
    return _SITES_BY_SUFFIX.get(suffix, ""), int(layer)


def point_title(name: str) -> str:
    """`Layer 10 • Residual stream after the block`."""
    site, layer = point_parts(name)
    return f"Layer {layer} • {SITES.get(site, name.split('.', 2)[2])}"


def default_text(name: str) -> str | bool:
    """A field's default as the form shows it; "" where it is derived."""
    value = option(name)["default"]
    if value is None:
        return ""
    if isinstance(value, bool):
        return value
    return written(value)


def written(value: Any) -> str:
    """A number as a person types it: `2,000,000`, `0.05`, `8`."""
    if isinstance(value, int):
        return formatting.count(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def limits_text(name: str) -> str:
    """`1 to 4,096`, for a field's tooltip."""
    limits = option(name)
    if "minimum" not in limits:
        return ""
    low, high = (
        formatting.count(limits[key]) if limits[key] >= 1000 else f"{limits[key]:g}"
        for key in ("minimum", "maximum")
    )
    unit = f" {limits['unit']}" if "unit" in limits else ""
    return f"{low} to {high}{unit}"


@dataclass(frozen=True)
class Form:
    """The form as it stands. `values` holds a text (or a bool) for every field of the table; an
    empty text leaves the value to `derive`."""

    dataset: Dataset | None = None
    model: Model | None = None
    layers: tuple[int, ...] = ()
    site: str = "resid_post"
    extraction: Extraction | None = None
    values: dict[str, str | bool] = field(default_factory=dict)

    @property
    def points(self) -> list[str]:
        return [point_name(self.site, layer) for layer in self.layers]


@dataclass(frozen=True)
class Check:
    """`errors`: field -> sentence. `blocker`: why the training cannot start, "" where it can.
    `automatic`: what the fields left open become. `config`: what to submit, defaults written out,
    so that a row says what was trained even where a later version has other defaults."""

    errors: dict[str, str]
    blocker: str
    automatic: dict[str, str]
    config: dict[str, Any]
    plan: Plan | None
    summary: str


def check(form: Form, corpus_tokens: int | None = None, speed: float | None = None) -> Check:
    """Look at the whole form. `corpus_tokens`: length of the dataset in this model's tokens;
    `speed`: tokens per second of an earlier run with this model; both where known."""
    errors: dict[str, str] = {}
    given: dict[str, Any] = {}
    for name in NAMES:
        value = _read(name, form.values.get(name, default_text(name)), errors)
        if value is not None:
            given[name] = value
    config = parse(given)  # each was checked alone, and no limit depends on another field
    plan = None
    if form.extraction is not None:
        stored = form.extraction.settings.get("context")
        if stored:
            given["context"] = stored
            errors.pop("context", None)
            config = parse(given)
    if form.model is not None:
        longest = form.model.summary.get("context_length")
        if longest and config.context > longest and "context" not in errors:
            errors["context"] = (
                f"{form.model.name} reads at most {formatting.count(longest)} tokens at once."
            )
        try:
            plan = derive(config, form.model.d_model)
        except InvalidInput as exc:
            errors.setdefault(exc.field or "k", f"{exc.what} {exc.next_step}".strip())
    _check_extraction(form, errors)
    if errors:
        plan = None
    return Check(
        errors=errors,
        blocker=_blocker(form, errors),
        automatic=_automatic(config, form.model),
        config=given,
        plan=plan,
        summary=_summary(form, plan, corpus_tokens, speed) if plan and form.model else "",
    )


def _read(name: str, text: str | bool, errors: dict[str, str]) -> Any:
    """The value of one field, None where it is left open or wrong (then with an error)."""
    value = text if isinstance(text, bool) else text.strip().replace(",", "")
    if value == "":
        if option(name)["default"] is not None:
            errors[name] = f"{option(name)['label']} needs a value: {limits_text(name)}."
        return None
    try:
        return getattr(parse({name: value}), name)
    except InvalidInput as exc:
        unreadable = "cannot be read" in exc.title
        errors[name] = exc.next_step if unreadable else exc.what
    except OverflowError:
        errors[name] = "It takes a number."
    return None


def _check_extraction(form: Form, errors: dict[str, str]) -> None:
    if form.extraction is None:
        return
    missing = [name for name in form.points if name not in form.extraction.hook_points]
    if missing:
        held = ", ".join(point_title(name) for name in form.extraction.hook_points)
        errors["extraction"] = (
            f"These activations do not hold {', '.join(point_title(name) for name in missing)}. "
            f"They hold {held}."
        )


def _blocker(form: Form, errors: dict[str, str]) -> str:
    if form.dataset is None:
        return "Choose a dataset to learn from."
    if form.model is None:
        return "Choose a model."
    if not form.layers:
        return "Choose at least one layer."
    if errors:
        name, sentence = next(iter(errors.items()))
        label = option(name)["label"] if name in NAMES else ""
        return sentence if sentence.startswith(label) else f"{label}: {sentence}"
    return ""


def _automatic(config: TrainingConfig, model: Model | None) -> dict[str, str]:
    """What `derive` makes of the fields that are open; of width 1 for all that do not need one."""
    try:
        plan = derive(config, model.d_model if model else 1 << 20)
    except InvalidInput:
        return {}
    return {
        name: rate(value) if name == "learning_rate" else written(value)
        for name in NAMES
        if getattr(config, name) is None and (value := getattr(plan, name, None)) is not None
    }


def rate(value: float) -> str:
    """A learning rate: `3e-4`, `3.3e-4`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def sae_parameters(d_in: int, d_sae: int) -> int:
    """Encoder, decoder and their biases."""
    return 2 * d_in * d_sae + d_sae + d_in


def _summary(form: Form, plan: Plan, corpus_tokens: int | None, speed: float | None) -> str:
    assert form.model is not None
    sites = max(len(form.layers), 1)
    parameters = sae_parameters(plan.d_in, plan.d_sae)
    parts = [
        f"{formatting.count(plan.d_sae)} latents on {formatting.count(plan.d_in)} dimensions"
        + (f" at each of {sites} sites" if sites > 1 else ""),
        f"{formatting.count(plan.steps)} steps of {formatting.count(plan.batch_size)} tokens",
        f"learning rate {rate(plan.learning_rate)}",
        f"{formatting.size(rough(4 * parameters * sites))} on disk",
        f"about {formatting.size(rough(memory(form.model, plan, sites)))} of memory",
    ]
    if corpus_tokens:
        passes = plan.config.tokens / corpus_tokens
        parts.append(f"{passes:.1f} passes over the text" if passes > 1 else "less than one pass")
    if speed:
        parts.append(
            f"about {rough_duration(plan.config.tokens / speed)} of training at the speed of "
            "the last run with this model"
        )
    return " • ".join(parts)


def rough(n_bytes: float) -> float:
    """An estimate to two digits: more would claim to know."""
    unit = 1.0
    while n_bytes / unit >= 1024:
        unit *= 1024
    value = n_bytes / unit
    return unit * (round(value) if value >= 10 else round(value, 1))


def rough_duration(seconds: float) -> str:
    """An estimate: whole minutes from ten minutes on."""
    if seconds < 600:
        return formatting.duration(seconds)
    return formatting.duration(60 * round(seconds / 60)).removesuffix(" 00 s")


def memory(model: Model, plan: Plan, sites: int) -> int:
    """Bytes in use while training: the model in float32, what Adam keeps, and one batch of
    pre-activations with the copies that a step makes of it."""
    learning = BYTES_PER_PARAMETER * sae_parameters(plan.d_in, plan.d_sae) * sites
    batch = 4 * plan.batch_size * (plan.d_sae + 4 * plan.d_in)
    return 4 * model.parameters + learning + batch
