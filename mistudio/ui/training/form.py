"""What the training form holds, what is wrong with it, and what to submit; no widgets.

The fields, their limits, help, and which of them apply come from `engine.training.config`; this
module adds what only the library knows (models, datasets, stored activations) and the words that
people read. What a training would need is in `estimate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mistudio import formatting
from mistudio.engine.training.advice import Advice, Mend, advise, advise_memory, mend_of, size
from mistudio.engine.training.config import Plan, TrainingConfig, derive, option, parse
from mistudio.engine.training.planning import RunPlan, fits
from mistudio.errors import InvalidInput
from mistudio.library.records import Dataset, Extraction, Model
from mistudio.ui.training.estimate import NOTHING, Computer, Corpus, Estimate, Pace, estimate, rate

SITES = {
    "resid_post": "Residual stream after block",
    "resid_pre": "Residual stream before block",
    "mlp_in": "MLP input",
    "mlp_out": "MLP output",
    "attn_out": "Attention output",
}
ACROSS_MLP = "MLP input to MLP output"

# The names of engine.models.hooks.HookPoint, written out: that module imports torch.
_SUFFIXES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
_SITES_BY_SUFFIX = {suffix: site for site, suffix in _SUFFIXES.items()}

# What people call the values that the table and the records hold.
SPARSITY_NAMES = {
    "batchtopk": "BatchTopK",
    "topk": "TopK",
    "matryoshka": "Matryoshka",
    "jumprelu": "JumpReLU",
    "standard": "ReLU + L1",
    "relu": "ReLU",  # of imported dictionaries
    "gated": "Gated",
}
ENCODER_NAMES = {
    "sae": "Sparse Autoencoder",
    "skip_sae": "Skip Autoencoder",
    "transcoder": "Transcoder",
    "skip_transcoder": "Skip Transcoder",
}
CHOICE_NAMES = {
    "sparsity": SPARSITY_NAMES,
    "wiring": ENCODER_NAMES,
    "skip": {"principal": "Principal directions", "fixed": "Fixed share"},
    "optimizer": {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "adam8bit": "8-bit Adam"},
    "schedule": {
        "constant": "Constant",
        "linear": "Linear",
        "cosine": "Cosine",
        "exponential": "Exponential",
    },
}
# Where activations come from, as `mistudio.jobs.sources` knows it, written out for the same reason.
SOURCES = {
    "auto": "Stream from the model",
    "extract": "Store first, then train",
    "hybrid": "Store in portions",
}
TRANSCODERS = ("transcoder", "skip_transcoder")

NAMES = tuple(entry.name for entry in fields(TrainingConfig))
ESSENTIAL = ("wiring", *(name for name in NAMES if option(name).get("essential")))
ADVANCED = tuple(name for name in NAMES if name not in ESSENTIAL)
_CHOSEN = (
    ("Dictionary and text", ("width", "skip", "skip_rank", "skip_share", "context", "seed")),
    ("Sparsity and dead latents", ("l1_coefficient", "auxk", "revive", "dead_window")),
    ("Learning", ("learning_rate", "batch_size", "steps", "optimizer", "weight_decay", "schedule",
                  "warmup_share", "decay_share", "anneal_share")),
    ("Computing and saving", ("gradient_accumulation", "mixed_precision", "autosave_minutes",
                              "autosave_steps")),
)  # fmt: skip

# Where one field is given, another has no say: field -> the field that decides.
DECIDED_BY = {"expansion": "width", "tokens": "steps"}

# What fields left open become where no number can be told.
OPEN = {"l1_coefficient": "auto: steered to target", "autosave_steps": "never"}


def groups() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The sections of Advanced Hyperparameters; a field that nobody has sorted comes last."""
    sorted_in = {name for _, names in _CHOSEN for name in names}
    rest = tuple(name for name in ADVANCED if name not in sorted_in)
    known = tuple(
        (title, tuple(name for name in names if name in ADVANCED)) for title, names in _CHOSEN
    )
    return (*known, ("More", rest)) if rest else known


# -------------------------------------------------------------------- names


def point_name(site: str, layer: int) -> str:
    return f"blocks.{layer}.{_SUFFIXES[site]}"


def point_parts(name: str) -> tuple[str, int]:
    """(site, layer) of a hook point's name; the site is "" where the form does not offer it."""
    _, layer, suffix = name.split(".", 2)
    return _SITES_BY_SUFFIX.get(suffix, ""), int(layer)


def site_text(name: str, wiring: str = "sae") -> str:
    """`Residual stream after the block`; of a transcoder that reads there, both its ends."""
    site, _ = point_parts(name)
    if wiring in TRANSCODERS and site == "mlp_in":
        return ACROSS_MLP
    return SITES.get(site, name.split(".", 2)[2])


def point_title(name: str, wiring: str = "sae") -> str:
    """`Layer 10 • Residual stream after the block`."""
    return f"Layer {point_parts(name)[1]} • {site_text(name, wiring)}"


def points_text(names: Iterable[str]) -> str:
    """`MLP input (layers 1, 2), MLP output (layer 1)`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layers.setdefault(site_text(name), []).append(point_parts(name)[1])
    return ", ".join(
        f"{site} (layer{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))})"
        for site, found in layers.items()
    )


def encoder_title(sparsity: str, wiring: str = "sae") -> str:
    """What kind of dictionary: `BatchTopK SAE`, `TopK Skip SAE`, `JumpReLU Transcoder SAE`."""
    name = SPARSITY_NAMES.get(sparsity, sparsity)
    kind = {"skip_sae": "Skip", "transcoder": "Transcoder", "skip_transcoder": "Skip Transcoder"}
    return " ".join(filter(None, (name, kind.get(wiring, ""), "SAE")))


def encoder_of(config: Mapping[str, Any]) -> str:
    """The same of a training's configuration, also of one that was written before there was a
    choice."""
    return encoder_title(*(str(config.get(name) or default_value(name)) for name in _KIND))


_KIND = ("sparsity", "wiring")


def choice_text(name: str, value: Any) -> str:
    return CHOICE_NAMES.get(name, {}).get(value, str(value))


# -------------------------------------------------------------------- fields as text


def default_value(name: str) -> Any:
    return option(name)["default"]


def default_text(name: str) -> str | bool:
    """A field's default as the form shows it; "" where it is derived."""
    return value_text(name, default_value(name))


def value_text(name: str, value: Any) -> str | bool:
    """A value as its field shows it; None leaves the field open."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return value
    return times(value) if "choices_hint" in option(name) else written(value)


def written(value: Any) -> str:
    """A number as a person types it: `2,000,000`, `0.05`, `8`."""
    if isinstance(value, int):
        return formatting.count(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def times(factor: float) -> str:
    """A factor: `8x`."""
    return f"{factor:g}x"


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


# -------------------------------------------------------------------- the form


@dataclass(frozen=True)
class Form:
    """The form as it stands. `values` holds a text (or a bool) for every field of the table; an
    empty text leaves the value to `derive`. `site` is where an autoencoder reads; a transcoder
    has no choice. `source` counts where no stored activations are chosen."""

    dataset: Dataset | None = None
    model: Model | None = None
    layers: tuple[int, ...] = ()
    site: str = "resid_post"
    extraction: Extraction | None = None
    source: str = "auto"
    values: dict[str, str | bool] = field(default_factory=dict)

    @property
    def is_transcoder(self) -> bool:
        return self.values.get("wiring", default_text("wiring")) in TRANSCODERS

    @property
    def stored_context(self) -> int | None:
        """The length of the stored activations' windows."""
        return self.extraction.settings.get("context") if self.extraction else None

    @property
    def points(self) -> list[str]:
        """Where the dictionaries read: these name the sites of the job."""
        site = "mlp_in" if self.is_transcoder else self.site
        return [point_name(site, layer) for layer in self.layers]

    @property
    def needed(self) -> list[str]:
        """What stored activations must hold: for transcoders also what they reconstruct."""
        outputs = self.layers if self.is_transcoder else ()
        return [*self.points, *(point_name("mlp_out", layer) for layer in outputs)]


@dataclass(frozen=True)
class Check:
    """`errors`: field -> sentence, of values that are refused. `advice`: of values that are taken
    but likely to end badly (also of "layers"); it blocks nothing. `mends`: what one click would
    put right, by the field of the error or advice. `blocker`: why the training cannot start, ""
    where it can; `doubt`: why it should not (it does not fit), where the user may know better.
    `shown`: the fields that these choices use; `fixed`: those of them that something else decides.
    `notes`: what to say under a field; `automatic`: what the fields left open become. `config`:
    what to submit, defaults written out, so that a row says what was trained even where a later
    version has other defaults."""

    errors: dict[str, str]
    advice: dict[str, str]
    mends: dict[str, Mend]
    blocker: str
    doubt: str
    shown: frozenset[str]
    fixed: frozenset[str]
    notes: dict[str, str]
    automatic: dict[str, str]
    config: dict[str, Any]
    plan: Plan | None
    estimate: Estimate


def applies(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the other choices use a field; a missing value counts as its default."""
    conditions = option(name).get("only", {})
    return all(
        values.get(other, default_value(other)) in wanted for other, wanted in conditions.items()
    )


def check(
    form: Form,
    corpus: Corpus | None = None,
    pace_of: Callable[[Plan], Pace | None] = lambda plan: None,
    computer: Computer | None = None,
) -> Check:
    """Look at the whole form. `corpus`: how long the dataset is; `pace_of`: how fast a training
    of these sizes goes; `computer`: what it trains on; all where known."""
    corpus = corpus or Corpus()
    wrong: dict[str, str] = {}
    read = {name: _read(name, form.values.get(name, default_text(name)), wrong) for name in NAMES}
    chosen = {name: value for name, value in read.items() if value is not None}
    shown = frozenset(name for name in NAMES if applies(name, chosen))
    decided = {
        name: by for name, by in DECIDED_BY.items() if by in shown and chosen.get(by) is not None
    }
    used = [name for name in NAMES if name in shown and name not in decided]
    errors = {name: wrong[name] for name in used if name in wrong}
    given = {name: chosen[name] for name in used if name in chosen}
    _take_stored_context(form, given, errors)
    config = parse(given)  # each was checked alone, and no limit depends on another field
    derived = _plan(form, config, errors)
    _check_extraction(form, errors)
    _check_optimizer(config, computer, errors)
    plan = None if errors else derived
    needs = NOTHING
    if plan and form.model and form.layers:
        needs = estimate(form, plan, corpus, pace_of(plan), computer)
    advice = _advice(form, derived, corpus, needs.run, errors, shown)
    mends = {
        **{name: item.mend for name, item in advice.items() if item.mend},
        **_mends(form, config, errors),
    }
    return Check(
        errors=errors,
        advice={name: item.sentence for name, item in advice.items()},
        mends={name: _named(mend) for name, mend in mends.items()},
        blocker=_blocker(form, errors),
        doubt=_doubt(form, needs.run),
        shown=shown,
        fixed=frozenset({*decided, *(["context"] if form.stored_context else [])}),
        notes=_notes(form, decided, derived),
        automatic=_automatic(config, derived),
        config=given,
        plan=plan,
        estimate=needs,
    )


def _read(name: str, text: str | bool, errors: dict[str, str]) -> Any:
    """The value of one field, None where it is left open or wrong (then with an error)."""
    value = _cleaned(name, text)
    if value == "":
        if default_value(name) is not None:
            errors[name] = f"{option(name)['label']} needs a value: {limits_text(name)}."
        return None
    try:
        return getattr(parse({name: value}), name)
    except InvalidInput as exc:
        unreadable = "cannot be read" in exc.title
        errors[name] = exc.next_step if unreadable else exc.what
    return None


def _cleaned(name: str, text: str | bool) -> str | bool:
    """A value as `parse` reads it: without the commas and signs that people write."""
    if isinstance(text, bool):
        return text
    value = text.strip().replace(",", "")
    return value.rstrip("x×X ") if "choices_hint" in option(name) else value


def _take_stored_context(form: Form, given: dict[str, Any], errors: dict[str, str]) -> None:
    """Stored activations bring the length of their windows."""
    if form.stored_context:
        given["context"] = form.stored_context
        errors.pop("context", None)


def _plan(form: Form, config: TrainingConfig, errors: dict[str, str]) -> Plan | None:
    if form.model is None:
        return None
    longest = form.model.summary.get("context_length")
    if longest and config.context > longest:
        sentence = f"{form.model.name} reads at most {formatting.count(longest)} tokens at once."
        errors.setdefault("context", sentence)
    try:
        return derive(config, form.model.d_model)
    except InvalidInput as exc:
        errors.setdefault(exc.field or "k", f"{exc.what} {exc.next_step}".strip())
        return None


def _check_extraction(form: Form, errors: dict[str, str]) -> None:
    if form.extraction is None:
        return
    missing = [name for name in form.needed if name not in form.extraction.hook_points]
    if missing:
        why = "A transcoder learns from both ends of the MLP. " if form.is_transcoder else ""
        errors["extraction"] = (
            f"{why}These activations lack {points_text(missing)}. They hold "
            f"{points_text(form.extraction.hook_points)}. Stream from the model instead."
        )


def _check_optimizer(
    config: TrainingConfig, computer: Computer | None, errors: dict[str, str]
) -> None:
    if config.optimizer == "adam8bit" and computer and computer.no_8bit:
        errors["optimizer"] = computer.no_8bit


def _advice(
    form: Form,
    plan: Plan | None,
    corpus: Corpus,
    run: RunPlan | None,
    errors: Mapping[str, str],
    shown: Collection[str],
) -> dict[str, Advice]:
    """By field; the first of each field counts, and none where the value is refused."""
    found = advise(plan, corpus.train) if plan and form.model else []
    if run is not None:
        hints = option("expansion")["choices_hint"]
        found += advise_memory(run, form.layers, [*hints, *(1, 2)])
    by_field: dict[str, Advice] = {}
    for item in found:
        if item.field not in errors and (item.field in shown or item.field not in NAMES):
            by_field.setdefault(item.field, item)
    return by_field


def _mends(form: Form, config: TrainingConfig, errors: Mapping[str, str]) -> dict[str, Mend]:
    """For every refused value the one that would be taken."""
    found: dict[str, Mend] = {}
    width = form.model.d_model if form.model else None
    longest = form.model.summary.get("context_length") if form.model else None
    for name in errors:
        if name == "extraction":
            found[name] = Mend("source", "auto", "Stream from the model")
        elif name == "context" and longest and config.context > longest:
            found[name] = Mend(name, longest, f"Use {formatting.count(longest)}")
        elif name in NAMES:
            value = _cleaned(name, form.values.get(name, default_text(name)))
            mend = mend_of(name, value, config, width)
            if mend is not None:
                found[name] = mend
    return found


def _named(mend: Mend) -> Mend:
    """Choices by the names that people read."""
    if isinstance(mend.value, str) and mend.field in CHOICE_NAMES:
        return Mend(mend.field, mend.value, f"Use {choice_text(mend.field, mend.value)}")
    return mend


def mended_text(mend: Mend) -> str | bool:
    """What a mend of a field of the table writes into it."""
    return value_text(mend.field, mend.value)


def _doubt(form: Form, run: RunPlan | None) -> str:
    """Why a run will not get through, as far as figures can tell. The engine itself finds a way
    where it can: it takes turns with the model where both do not fit together."""
    if run is None:
        return ""
    machine = run.machine
    if not run.disk_fits:
        return (
            f"It needs {size(run.disk)} of disk and {size(machine.disk_free)} are free. Free some, "
            "or mend what is marked."
        )
    if run.fits or (form.source == "auto" and form.extraction is None and _fits_in_turns(run)):
        return ""
    return (
        f"It needs {size(run.memory)} of memory and {size(machine.memory_free)} are free. Choose "
        "fewer layers or a smaller dictionary, or close other programs."
    )


def _fits_in_turns(run: RunPlan) -> bool:
    return fits(replace(run.run, source="extract"), run.machine)


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


def _notes(form: Form, decided: Mapping[str, str], plan: Plan | None) -> dict[str, str]:
    found = {name: f"“{option(by)['label']}” decides" for name, by in decided.items()}
    if plan is not None:
        becomes = {
            "expansion": f"{formatting.count(plan.d_sae)} latents",
            "tokens": f"{formatting.count(plan.steps * plan.batch_size)} tokens",
        }
        found = {name: f"{text}: {becomes[name]}" for name, text in found.items()}
        found.setdefault("expansion", becomes["expansion"])
    if form.stored_context:
        found["context"] = f"The stored activations have {form.stored_context}."
    return found


def _automatic(config: TrainingConfig, plan: Plan | None) -> dict[str, str]:
    """What `derive` made of the fields that are open, as the fields' placeholders."""
    found = dict.fromkeys((name for name in NAMES if getattr(config, name) is None), "auto")
    if plan is not None:
        for name in found:
            value = plan.d_sae if name == "width" else getattr(plan, name, None)
            if value is not None:
                text = rate(value) if name == "learning_rate" else written(value)
                found[name] = f"auto: {text}"
    return {name: OPEN.get(name, text) for name, text in found.items()}
