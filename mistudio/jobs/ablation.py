"""The job that takes single features away and measures what the model loses."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.coactivation import medians_of
from mistudio.jobs.control import Phase
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage, Within
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

if TYPE_CHECKING:
    from mistudio.engine.features.ablation import Ablation
    from mistudio.engine.models.hooks import HookedDecoder

KIND = "ablation"  # of what is kept in `library.feature_analyses`
CONTEXTS, CONTROLS = 64, 5
SILENT_CONTEXTS = 16  # for a feature that never fired
PLACES = 12  # single predictions that are kept
MOST_FEATURES, MOST_CONTEXTS, MOST_CONTROLS = 200, 1024, 50


@dataclass(frozen=True)
class Ablate:
    """Take each of `features` away (`mode`: see `engine/features/ablation.py`) on `contexts`
    contexts that hold its examples, and along `controls` random directions of the same size; keep
    what that does to the predictions. What was kept for the same settings is replaced."""

    feature_run_id: int
    features: list[int]
    mode: str = "zero"
    contexts: int = CONTEXTS
    controls: int = CONTROLS
    seed: int = 0

    kind: ClassVar[str] = "ablate"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("ablate", 100))

    def title(self, library: Library) -> str:
        run = library.feature_runs.get(self.feature_run_id)
        point = library.saes.get(run.sae_id).hook_point
        if len(self.features) == 1:
            return f"Ablate feature #{self.features[0]} of {point}"
        return f"Ablate {len(self.features)} features of {point}"

    def run(self, context: JobContext) -> dict[str, Any]:
        _check(self)
        library = context.library
        run = library.feature_runs.get(self.feature_run_id)
        sae = library.saes.get(run.sae_id)
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        stage = Stage(context, "ablate", None)
        for number, feature in enumerate(self.features):
            within = Within(stage, number, len(self.features))
            result = ablate_feature(library, run, feature, self, model, within)
            params = ablation_params(self.mode, self.contexts, self.controls, self.seed)
            library.feature_analyses.put(run.id, feature, KIND, params, result)
        return {"feature_run_id": run.id, "features": len(self.features)}


def ablation_params(
    mode: str = "zero", contexts: int = CONTEXTS, controls: int = CONTROLS, seed: int = 0
) -> dict[str, Any]:
    """Under which a result is kept in `library.feature_analyses`."""
    return {"mode": mode, "contexts": contexts, "controls": controls, "seed": seed}


def _check(job: Ablate) -> None:
    for value, name, low, high in (
        (len(job.features), "features", 1, MOST_FEATURES),
        (job.contexts, "contexts", 1, MOST_CONTEXTS),
        (job.controls, "controls", 0, MOST_CONTROLS),
    ):
        if not low <= value <= high:
            raise InvalidInput(
                "An ablation setting is out of range",
                f"{name} must be between {low} and {high:,}; it is {value:,}.",
                field=name,
            )


def ablate_feature(
    library: Library,
    run: FeatureRun,
    feature: int,
    job: Ablate,
    model: HookedDecoder,
    progress: Progress,
) -> dict[str, Any]:
    """`ablate` on the feature's own examples, as plain JSON (`_as_dict`). A feature that never
    fired is looked for on contexts spread over the text, where it changes nothing."""
    from mistudio.engine.features.ablation import ablate, example_windows
    from mistudio.engine.sae.files import load_sae

    store, tokens = open_features(library, run)
    saved = load_sae(library.path(library.saes.get(run.sae_id).folder))
    dictionary = saved.dictionary.to(model.device)
    if not 0 <= feature < len(store):
        windows = np.zeros(1, np.int64)  # `ablate` refuses the feature in its words
        silent = False
    else:
        windows = example_windows(store, feature, job.contexts)
        silent = not len(windows)
        if silent:
            n = tokens.n_windows(store.meta.context)
            wanted = min(n, job.contexts, SILENT_CONTEXTS)
            windows = np.unique(np.linspace(0, n - 1, wanted).astype(np.int64))
    began = time.monotonic()
    mean = None
    if job.mode == "mean" and not silent:
        density = float(store.columns["density"][feature])
        mean = float(store.columns["mean_activation"][feature]) * density
    elif job.mode == "mean":
        mean = 0.0
    found = ablate(
        model,
        dictionary,
        saved.site,
        feature,
        tokens.windows(windows, store.meta.context),
        medians=medians_of(model, tokens, [saved.site], store.meta),
        special_ids=tokens.meta.special_ids,
        mode=job.mode,
        mean_activation=mean,
        controls=job.controls,
        seed=job.seed,
        progress=progress,
    )
    return {
        **_as_dict(found, windows, tokens.windows(windows, store.meta.context).numpy()),
        "silent": silent,
        "context": store.meta.context,
        "mean_activation": mean,
        "seconds": time.monotonic() - began,
        "precision": precision_of(model),
    }


def _as_dict(found: Ablation, windows: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """An `Ablation` without its tables [contexts, tokens], of which the predictions that move
    most stay (`places`): where they are, what followed, what was most likely before and after."""
    whole = {
        name: _plain(asdict(part)) if (part := getattr(found, name)) is not None else None
        for name in ("active", "following", "everywhere")
    }
    return {
        "feature": found.feature,
        "mode": found.mode,
        "controls": found.controls,
        "contexts": found.contexts,
        **whole,
        "raised": [[int(i), float(v)] for i, v in found.raised],
        "lowered": [[int(i), float(v)] for i, v in found.lowered],
        "places": _places(found, windows, ids),
    }


def _places(found: Ablation, windows: np.ndarray, ids: np.ndarray) -> list[dict[str, Any]]:
    """Of the predictions made where the feature is active: those whose KL is largest."""
    per_token = found.per_token
    kl = np.where(per_token.activations > 0, np.nan_to_num(per_token.kl, nan=-1.0), -1.0)
    order = np.argsort(-kl, axis=None, kind="stable")[:PLACES]
    places = []
    for row, column in zip(*np.unravel_index(order, kl.shape), strict=True):
        if kl[row, column] <= 0:
            break
        places.append(
            {
                "window": int(windows[row]),
                "position": int(column),
                "activation": float(per_token.activations[row, column]),
                "ce": float(per_token.ce[row, column]),
                "delta_ce": float(per_token.delta_ce[row, column]),
                "kl": float(per_token.kl[row, column]),
                "next": int(ids[row, column + 1]),
                "before": int(per_token.before[row, column]),
                "after": int(per_token.after[row, column]),
            }
        )
    return places


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """None for what is not a number: JSON has no word for it."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(part) for name, part in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return {name: clean(value) for name, value in values.items()}
