"""The jobs behind the pictures of features: the map of their directions, and the sample of
activations that the correlation heatmap and the activation matrix are made of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.errors import Incompatible, InvalidInput
from mistudio.formatting import count
from mistudio.jobs.control import Phase
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

if TYPE_CHECKING:
    from mistudio.engine.features.layout import MapSettings
    from mistudio.engine.features.maps import FeatureMap

TITLES = {"umap": "UMAP", "tsne": "t-SNE"}
LIBRARIES = {"umap": "umap-learn", "tsne": "openTSNE"}
SAMPLE_TOKENS = 200_000
LIMITS = {
    "neighbours": (2, 200),
    "min_dist": (0.0, 0.99),
    "perplexity": (2.0, 100.0),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class MapFeatures:
    """Lay out the decoder directions of a discovery's features on a plane, by `method` "umap" or
    "tsne". A map of the same settings that is kept already is not made again. Needs no model and
    no accelerator, so it may run beside a training."""

    feature_run_id: int
    method: str = "umap"
    neighbours: int = 15
    min_dist: float = 0.05
    perplexity: float = 30.0
    with_dense: bool = False
    seed: int = 0

    kind: ClassVar[str] = "map_features"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("find neighbours", 25),
        Phase("lay out", 100),
        Phase("judge", 5),
    )

    def title(self, library: Library) -> str:
        run = library.feature_runs.get(self.feature_run_id)
        point = library.saes.get(run.sae_id).hook_point
        name = TITLES.get(self.method, self.method)
        return f"Map {count(run.n_features)} features of {point} ({name})"

    def settings(self) -> MapSettings:
        """Raises InvalidInput for what no map can be made with."""
        from mistudio.engine.features.layout import METHODS, MapSettings

        if self.method not in METHODS:
            raise InvalidInput(
                "Unknown kind of map",
                f'"{self.method}" is not one.',
                f"Choose one of {', '.join(METHODS)}.",
                field="method",
            )
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise InvalidInput(
                    "A setting of the map is out of range",
                    f"{name.replace('_', ' ')} must be from {low:g} to {high:,}; "
                    f"it is {getattr(self, name):g}.",
                    field=name,
                )
        return MapSettings(
            method=self.method,
            neighbours=self.neighbours,
            min_dist=self.min_dist,
            perplexity=self.perplexity,
            with_dense=self.with_dense,
            seed=self.seed,
        )

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.features.maps import load_map, map_name, save_map

        library = context.library
        run = library.feature_runs.get(self.feature_run_id)
        settings = self.settings()
        name = map_name(settings)
        folder = library.path(run.folder)
        made = load_map(folder, name)
        if made is None:
            made = _make(context, run, settings)
            context.check()
            library.feature_runs.get(run.id)  # it may have been deleted meanwhile
            save_map(folder, made)
            library.note_change("feature_runs", run.id)
        return {
            "feature_run_id": run.id,
            "map": name,
            "features": made.n,
            "trust": made.quality.trust,
        }


def _make(context: JobContext, run: FeatureRun, settings: MapSettings) -> FeatureMap:
    import numpy as np

    from mistudio.engine.features import maps
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.sae.files import load_sae
    from mistudio.jobs.map_process import PARTS, lay_out_apart

    began = time.monotonic()
    library = context.library
    stage = Stage(context, "find neighbours", {"directions": (0.0, 1.0)})
    store = FeatureStore(library.path(run.folder))
    decoder = load_sae(library.path(library.saes.get(run.sae_id).folder)).dictionary.decoder
    if len(decoder) != len(store):
        raise Incompatible(
            "These features are not this SAE's",
            f"{count(len(store))} features were discovered; the SAE has {count(len(decoder))}.",
            "Discover the features of this SAE again.",
        )
    lengths = decoder.float().norm(dim=1).cpu().numpy()
    density = np.asarray(store.columns["density"])
    features, left_out = maps.taking_part(density, lengths, settings.with_dense)
    prepared = maps.prepare(decoder, features, settings, stage)
    positions, groups = lay_out_apart(
        prepared.neighbours,
        prepared.distances,
        prepared.start,
        settings,
        context.work_folder,
        Stage(context, "lay out", PARTS),
    )
    quality = maps.judge(
        decoder,
        features,
        positions,
        seed=settings.seed,
        progress=Stage(context, "judge", {"judge": (0.0, 1.0)}),
    )
    return maps.FeatureMap(
        settings=settings,
        places=maps.places_of(len(store), features, positions, groups),
        n=len(features),
        **left_out,
        components=prepared.components,
        variance=prepared.variance,
        quality=quality,
        seconds=time.monotonic() - began,
        made_at=maps.now(),
        versions={name: version(name) for name in (LIBRARIES[settings.method], "scikit-learn")},
    )


@dataclass(frozen=True)
class SampleFeatures:
    """Keep the activations of all of a discovery's features on `max_tokens` tokens, in windows
    spread evenly over its text; an older sample is replaced."""

    feature_run_id: int
    max_tokens: int = SAMPLE_TOKENS

    kind: ClassVar[str] = "sample_features"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("sample", 100))

    def title(self, library: Library) -> str:
        run = library.feature_runs.get(self.feature_run_id)
        point = library.saes.get(run.sae_id).hook_point
        return f"Sample activations of {point} for pictures"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.features.code_sample import ENTRY_BYTES, save_sample, take_sample
        from mistudio.engine.sae.files import load_sae
        from mistudio.jobs.coactivation import medians_of

        if not 1000 <= self.max_tokens <= 10_000_000:
            raise InvalidInput(
                "The size of the sample is out of range",
                f"{self.max_tokens:,} tokens were asked for.",
                "Ask for 1,000 to 10,000,000 tokens.",
                field="max_tokens",
            )
        library = context.library
        run = library.feature_runs.get(self.feature_run_id)
        sae = library.saes.get(run.sae_id)
        active = float(run.summary.get("l0") or sae.k or 64)
        needed = round(self.max_tokens * active * ENTRY_BYTES)
        library.require_space(needed, "The sample of activations")
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        store, tokens = open_features(library, run)
        saved = load_sae(library.path(sae.folder))
        sample = take_sample(
            model,
            tokens,
            saved.dictionary.to(model.device),
            saved.site,
            medians_of(model, tokens, [saved.site], store.meta),
            store.meta.context,
            max_tokens=self.max_tokens,
            progress=Stage(context, "sample", {"sample": (0.0, 1.0)}),
        )
        context.check()
        library.feature_runs.get(run.id)  # it may have been deleted meanwhile
        save_sample(library.path(run.folder), sample)
        library.note_change("feature_runs", run.id)
        return {"feature_run_id": run.id, "tokens": sample.tokens, "windows": len(sample.windows)}
