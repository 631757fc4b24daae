"""The whole road on the embedded sample, as one job: model, tokens, activations, SAE, features,
steering. The command line and the window's "Try the sample" run this same job."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.jobs import datasets, extraction, features, models, steering, tokenizing, training
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.stages import Stage, Within
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.features.showcase import Shown
    from mistudio.engine.models.hooks import HookedDecoder

LAYER = 10
EXTRACT_TOKENS = 200_000
TRAIN_TOKENS = 600_000
LOSS_TOKENS = 4096
PROMPT = "I think that"
CANDIDATES, SHOWN = 24, 8
WORDED = ("topic", "word", "token", "prefix 5")  # kinds of rules that name words
TRIED_STRENGTH = 1.5
NEW_TOKENS = 40
STRENGTHS = (0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Demo:
    """From nothing to a steered model. What is there already (sample model, corpus, tokens) is
    used, so that a second demo, or one after an interruption, is shorter."""

    seed: int = 0

    kind: ClassVar[str] = "demo"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("convert", 30),
        Phase("tokenize", 3),
        Phase("extract", 90),
        Phase("train", 90),
        Phase("evaluate", 25),
        Phase("discover", 40),
        Phase("steer", 20),
    )

    def title(self, library: Library) -> str:
        return "Try the sample"

    def run(self, context: JobContext) -> dict[str, Any]:
        return _Road(context, self).walk()


class _Road:
    """The steps in order, each timed, each committed before the next begins."""

    def __init__(self, context: JobContext, job: Demo) -> None:
        self._context, self._job = context, job
        self._library, self._work = context.library, context.work_folder
        self._seconds: dict[str, float] = {}

    def walk(self) -> dict[str, Any]:
        began = time.monotonic()
        model_id = self._timed("convert", self._model)
        tokens = self._timed("tokenize", lambda: self._tokens(model_id))
        extraction, model = self._timed("extract", lambda: self._extraction(model_id, tokens))
        run = self._timed("train", lambda: self._training(model_id, tokens, extraction))
        sae = self._library.saes.of_training(run.id)[0]
        feature_run = self._timed("discover", lambda: self._features(sae.id, model))
        steered = self._timed("steer", lambda: self._steering(model_id, sae.id, feature_run, model))
        self._seconds["total"] = time.monotonic() - began
        store, split = features.open_features(self._library, feature_run)
        with_examples = sum(store.n_examples(i) > 0 for i in range(len(store)))
        return {
            "model": self._library.models.get(model_id).name,
            "tokens": tokens.tokens,
            "seconds": self._seconds,
            "training": {
                "tokens_per_second": run.record["tokens_per_second"],
                **{
                    name: sae.metrics[name]
                    for name in (
                        "l0",
                        "explained_variance",
                        "dead_share",
                        "ce_clean",
                        "ce_sae",
                        "ce_zero",
                        "ce_loss_score",
                    )
                },
                "k": sae.k,
                "heldout_tokens": sae.metrics["tokens"],
                "ce_tokens": sae.metrics["loss_tokens"],
            },
            "features": {
                "total": feature_run.n_features,
                "alive": feature_run.summary["alive"],
                "with_examples": with_examples,
            },
            "steering": steered,
            "run": run.name,
            "training_id": run.id,
            "sae_id": sae.id,
            "feature_run_id": feature_run.id,
            "precision": models.precision_of(model),
            "showcase": self._showcase(model_id, store, split),
        }

    def _timed(self, name: str, step: Any) -> Any:
        began = time.monotonic()
        result = step()
        self._seconds[name] = time.monotonic() - began
        return result

    def _model(self) -> int:
        stage = Stage(self._context, "convert", models.IMPORT_PARTS)
        return models.add_model(self._library, self._work, models.SAMPLE, "auto", stage)

    def _tokens(self, model_id: int) -> Any:
        stage = Stage(self._context, "tokenize")
        self._dataset_id = datasets.add_sample_dataset(self._library, self._work, stage)
        return tokenizing.tokenize(self._library, self._work, self._dataset_id, model_id, stage)

    def _extraction(self, model_id: int, tokens: Any) -> Any:
        stage = Stage(self._context, "extract")
        model = models.loaded_model(self._library, model_id)
        job = extraction.Extract(
            model_id,
            self._dataset_id,
            [f"blocks.{LAYER}.hook_resid_post"],
            max_tokens=EXTRACT_TOKENS,
            seed=self._job.seed,
        )
        for found in self._library.extractions.of_model(model_id):
            wanted = {**job.__dict__, "precision": models.precision_of(model)}
            if found.tokenization_id == tokens.id and found.settings == wanted:
                return found, model
        return extraction.extract(self._library, self._work, model, job, tokens, stage), model

    def _training(self, model_id: int, tokens: Any, extraction: Any) -> Any:
        job = training.Train(
            model_id,
            self._dataset_id,
            list(extraction.hook_points),
            config={"tokens": TRAIN_TOKENS, "batch_size": 1024, "seed": self._job.seed},
            extraction_id=extraction.id,
            loss_tokens=LOSS_TOKENS,
            name=f"Sample run {time.strftime('%Y-%m-%d %H:%M')}",
        )
        stages = {
            "load": Stage(self._context, "train"),
            "train": Stage(self._context, "train", training.TRAIN_PARTS),
        }
        return training.train(self._library, self._work, job, tokens, self._context, stages)

    def _features(self, sae_id: int, model: HookedDecoder) -> Any:
        stage = Stage(self._context, "discover", features.DISCOVER_PARTS)
        job = features.Discover(sae_id, max_tokens=EXTRACT_TOKENS)
        return features.discover(self._library, self._work, job, model, stage)

    def _steering(
        self, model_id: int, sae_id: int, feature_run: Any, model: HookedDecoder
    ) -> dict[str, Any]:
        """Steer with a feature of those on show, and keep the strongest readable variant."""
        store, _ = features.open_features(self._library, feature_run)
        stage = Stage(self._context, "steer")
        tokenizer = self._tokenizer(model_id)
        self._shown = self._on_show(store, tokenizer)
        saved_sae = self._saved(sae_id)
        feature = self._feature_that_speaks(model, saved_sae, store, tokenizer, Within(stage, 0, 2))
        self._shown.sort(key=lambda item: item[0] != feature)  # the report shows it first
        job = steering.Steer(
            sae_id,
            [[feature, 1.0]],
            PROMPT,
            max_new_tokens=NEW_TOKENS,
            seed=self._job.seed,
            scales=STRENGTHS,
        )
        result = steering.steer(self._library, job, model, Within(stage, 1, 2))
        chosen = _readable(result["variants"])
        # Kept as if it alone had been asked for, so that the window shows its true strength.
        strength = chosen["scale"]
        kept = replace(job, features=[[feature, strength]], scales=(1.0,))
        result["variants"] = [{**chosen, "scale": 1.0}]
        self._library.generations.add(sae_id=sae_id, request=asdict(kept), result=result)
        return {
            "feature": feature,
            "strength": strength,
            "shared": dict(self._shown)[feature].text,
            "prompt": PROMPT,
            "unsteered": result["unsteered"],
            "steered": chosen["text"],
            "kl_per_token": chosen["kl_per_token"],
            "perplexity_ratio": chosen["perplexity_ratio"],
            "percent_of_norm": chosen["percent_of_norm"],
        }

    def _on_show(self, store: Any, tokenizer: Any) -> list[tuple[int, Shown]]:
        """Features whose rule names words, which a steered text can use."""
        from mistudio.engine.features.rules import Vocabulary
        from mistudio.engine.features.showcase import showcase

        vocabulary = Vocabulary.of(tokenizer, len(tokenizer))
        found = showcase(store, vocabulary, len(store))
        worded = [item for item in found if item[1].family in WORDED]
        return (worded or found)[:CANDIDATES]

    def _feature_that_speaks(
        self, model: HookedDecoder, saved: Any, store: Any, tokenizer: Any, progress: Progress
    ) -> int:
        """All features on show continue the prompt in one batch; the one whose own words its text
        uses most, beyond what the unsteered text does, is taken."""
        import torch

        from mistudio.engine.features.showcase import uses_of_words
        from mistudio.engine.models.loading import special_ids
        from mistudio.engine.steering.generation import Sampling, generate
        from mistudio.engine.steering.interventions import adding

        shown = [feature for feature, _ in self._shown]
        largest = torch.tensor([float(store.columns["max_activation"][f]) for f in shown])
        vectors = saved.dictionary.decoder[torch.tensor(shown)] * largest[:, None]
        made = generate(
            model,
            tokenizer,
            tokenizer(PROMPT)["input_ids"],
            [adding(saved.hook_point, vector * TRIED_STRENGTH) for vector in vectors],
            Sampling(max_new_tokens=NEW_TOKENS, seed=self._job.seed),
            special_ids=sorted(special_ids(tokenizer)),
            stop_ids=(),
            progress=progress,
        )
        uses = [
            uses_of_words(row.text, found.words) - uses_of_words(made.rows[0].text, found.words)
            for (_, found), row in zip(self._shown, made.rows[1:], strict=True)
        ]
        return shown[uses.index(max(uses))]

    def _saved(self, sae_id: int) -> Any:
        from mistudio.engine.sae.files import load_sae

        return load_sae(self._library.path(self._library.saes.get(sae_id).folder))

    def _tokenizer(self, model_id: int) -> Any:
        from mistudio.engine.models import loading

        return loading.load_tokenizer(self._library.path(self._library.models.get(model_id).folder))

    def _showcase(self, model_id: int, store: Any, split: Any) -> list[dict[str, Any]]:
        """A few features with their rules and how well these tell them, for the report."""
        tokenizer = self._tokenizer(model_id)
        rows = []
        for feature, shown in self._shown[:SHOWN]:
            examples = store.examples(feature, split, 3)
            rows.append(
                {
                    "feature": feature,
                    "shared": shown.text,
                    "accuracy": shown.accuracy,
                    "low": shown.low,
                    "tried": shown.contexts,
                    "density": float(store.columns["density"][feature]),
                    "contexts": [_context(example, split, tokenizer) for example in examples],
                }
            )
        return rows


def _context(example: Any, split: Any, tokenizer: Any) -> list[str]:
    """The text before, at and after an example's strongest token, of its own document only."""
    before = example.ids[max(0, example.peak - 12) : example.peak].tolist()
    after = example.ids[example.peak + 1 : example.peak + 9].tolist()
    separator = split.meta.separator_id
    if separator in before:
        before = before[len(before) - before[::-1].index(separator) :]
    if separator in after:
        after = after[: after.index(separator)]
    return [tokenizer.decode(ids) for ids in (before, [int(example.ids[example.peak])], after)]


def _readable(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """The strongest variant that neither repeats itself nor falls apart; the weakest if all do."""
    good = [
        row
        for row in variants
        if None not in (row["distinct_2"], row["distinct_2_unsteered"], row["perplexity_ratio"])
        and row["distinct_2"] >= 0.85 * row["distinct_2_unsteered"]
        and row["perplexity_ratio"] <= 6
    ]
    return good[-1] if good else variants[0]
