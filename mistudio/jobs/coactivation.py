"""The job that counts which features of a discovery fire together, in all layers of its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.formatting import count, size
from mistudio.jobs.control import Phase
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.stages import Stage, Within
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun, Sae

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.features.store import FeatureMeta
    from mistudio.engine.models.hooks import HookedDecoder, HookPoint
    from mistudio.engine.sae.dictionary import Dictionary
    from mistudio.engine.sae.site import Site

TOKENS = 200_000
LEAST_TOKENS = 1000
MEMORY_SHARE = 0.5  # of what is free
CODE_BYTES = 8  # of an activation in the sample
PAIR_BYTES = 60  # of one while pairs are counted: by latent and by token, and a block's products
PARTS = {"sample": (0.0, 0.8)}


@dataclass(frozen=True)
class CoActivate:
    """Count for every feature of a discovery which others fire together with it, on `max_tokens`
    tokens spread over the text of the discovery: those of its own SAE and, where the run has
    several, those of the SAEs of its other layers that have features too. The neighbours are
    added to the discovery; older ones are replaced."""

    feature_run_id: int
    max_tokens: int = TOKENS
    min_pairs: int = 10

    kind: ClassVar[str] = "co_activate"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("load model", 5),
        Phase("sample", 100),
        Phase("count pairs", 40),
    )

    def title(self, library: Library) -> str:
        run = library.feature_runs.get(self.feature_run_id)
        return f"Find features that fire together ({library.saes.get(run.sae_id).hook_point})"

    def run(self, context: JobContext) -> dict[str, Any]:
        if self.max_tokens < LEAST_TOKENS or self.min_pairs < 1:
            raise InvalidInput(
                "This is too little to compare features on",
                f"{self.max_tokens:,} tokens and pairs on {self.min_pairs} of them were asked for.",
                f"Ask for {LEAST_TOKENS:,} tokens and pairs on 1 of them at least.",
                field="max_tokens" if self.max_tokens < LEAST_TOKENS else "min_pairs",
            )
        library = context.library
        run = library.feature_runs.get(self.feature_run_id)
        sae = library.saes.get(run.sae_id)
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        sample = co_activate(library, run, self, model, context)
        return {"feature_run_id": run.id, **sample}


def others_of(library: Library, run: FeatureRun) -> list[Sae]:
    """The SAEs at the other sites of the same training run that have features, shallowest layer
    first."""
    sae = library.saes.get(run.sae_id)
    if sae.training_id is None:
        return []
    found = {sae.hook_point: sae}
    for other in library.saes.of_training(sae.training_id):
        if library.feature_runs.newest_of_sae(other.id) is not None:
            found.setdefault(other.hook_point, other)
    return [other for other in found.values() if other.id != sae.id]


def co_activate(
    library: Library, run: FeatureRun, job: CoActivate, model: HookedDecoder, context: JobContext
) -> dict[str, Any]:
    """Sample, count, write; what was sampled."""
    from mistudio.engine.features import together
    from mistudio.engine.features.coactivation import co_activation, sample_codes

    store, tokens = open_features(library, run)
    own = library.saes.get(run.sae_id)
    others = others_of(library, run)
    needed = len(store) * 20 * 12 * 3 * (1 + len(others))
    library.require_space(needed, "Keeping which features fire together")
    limit = _affordable(library, [own, *others], job.max_tokens, context)
    sites = _dictionaries(library, [own, *others], model)
    codes = sample_codes(
        model,
        tokens,
        dict(sites.values()),
        medians_of(model, tokens, [site for site, _ in sites.values()], store.meta),
        store.meta.context,
        max_tokens=limit,
        progress=Stage(context, "sample", {"sample": (0.0, 1.0)}),
    )
    pairs: Progress = Stage(context, "count pairs", None)
    mine = codes[sites[own.id][0]]
    found = {}
    for number, other in enumerate([own, *others]):
        within = Within(pairs, number, 1 + len(others))
        if other.id == own.id:
            name, table = together.OWN, None
        else:
            name, table = str(other.id), codes[sites[other.id][0]]
        found[name] = co_activation(mine, table, min_pairs=job.min_pairs, progress=within)
    contexts = _contexts(tokens, store.meta, limit)
    folder = library.path(run.folder)
    together.write(folder, found, contexts, job.min_pairs, [other.id for other in others])
    library.note_change("feature_runs", run.id)
    return {"tokens": int(mine.shape[0]), "contexts": contexts, "saes": 1 + len(others)}


def medians_of(
    model: HookedDecoder, tokens: TokenSplit, sites: list[Site], meta: FeatureMeta
) -> dict[HookPoint, float]:
    """The median norm of every point of the sites: the discovery's own where it has it, so that
    the same positions count, else from a calibration sample."""
    from mistudio.engine.activations.source import calibrate_medians
    from mistudio.engine.models.hooks import HookPoint

    points = {point for site in sites for point in site.points}
    known = {}
    if meta.median_norm > 0:
        own = HookPoint.parse(meta.hook_point)
        known = {own: meta.median_norm} if own in points else {}
    rest = tuple(sorted(points - set(known)))
    if rest:
        known |= calibrate_medians(model, tokens, rest, meta.context)
    return known


def _contexts(tokens: TokenSplit, meta: FeatureMeta, limit: int) -> int:
    """How many windows `sample_codes` reads."""
    return max(1, min(tokens.n_windows(meta.context), limit // meta.context))


def _dictionaries(
    library: Library, saes: list[Sae], model: HookedDecoder
) -> dict[int, tuple[Site, Dictionary]]:
    from mistudio.engine.sae.files import load_sae

    loaded = {sae.id: load_sae(library.path(sae.folder)) for sae in saes}
    return {
        number: (saved.site, saved.dictionary.to(model.device)) for number, saved in loaded.items()
    }


def _affordable(library: Library, saes: list[Sae], wanted: int, context: JobContext) -> int:
    """`wanted` tokens, or as many as memory allows; which is said."""
    import psutil

    active = []
    for sae in saes:
        run = library.feature_runs.newest_of_sae(sae.id)
        active.append(float((run.summary if run else {}).get("l0") or sae.k or 64))
    per_token = sum(active) * CODE_BYTES + (active[0] + max(active)) * PAIR_BYTES
    free = int(psutil.virtual_memory().available * MEMORY_SHARE)
    limit = max(LEAST_TOKENS, min(wanted, int(free / per_token)))
    if limit < wanted:
        context.tell(
            f"{count(limit)} tokens are compared instead of {count(wanted)}: more would not fit "
            f"into {size(free)} of memory."
        )
    return limit
