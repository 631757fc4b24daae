"""How many features of a dictionary can be told from a short description: the default training of
the sample model on the sample corpus, one layer, its discovery, and the scores of its rules.

    MISTUDIO_SAMPLE_MODEL=FOLDER python3 run.py bench feature_scores [--layer N] [--top N]
    python3 run.py bench feature_scores --library FOLDER

The first trains in a library of its own (about a quarter of an hour on two cores) and throws it
away, or keeps it in `--keep FOLDER`; the second looks at the newest run of an existing library,
which it does not change. Nothing but the layer is chosen: every option of the training and of the
discovery has its default.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import numpy as np  # noqa: E402

from mistudio.engine.features.columns import why_no_score  # noqa: E402
from mistudio.engine.features.rules import FAMILIES, Vocabulary  # noqa: E402
from mistudio.engine.features.score import (  # noqa: E402
    INTERPRETABLE,
    Scores,
    rule_descriptions,
    score_store,
)
from mistudio.engine.features.store import FeatureStore  # noqa: E402
from mistudio.engine.models.loading import load_tokenizer  # noqa: E402
from mistudio.jobs.control import Control  # noqa: E402
from mistudio.jobs.features import open_features  # noqa: E402
from mistudio.jobs.job import run_job, submit  # noqa: E402
from mistudio.jobs.kinds import AddModel, AddSampleDataset, Discover, Extract, Train  # noqa: E402
from mistudio.library.library import Library  # noqa: E402

WANTED, DEAD = 50, 0.20  # features with the lower bound; share of dead ones


def done(library: Library, job: Any) -> dict[str, Any]:
    """Run a job and give its result; its error ends the benchmark."""
    record = run_job(library, job, submit(library, job), Control())
    if record.status != "finished":
        raise SystemExit(f"{job.kind} {record.status}: {record.error}")
    return record.result


def train(library: Library, model: str, layer: int) -> None:
    """The road of somebody who changes nothing. Activations are stored first, because the
    training reads the text several times."""
    began = time.monotonic()
    model_id = done(library, AddModel(model))["model_id"]
    dataset_id = done(library, AddSampleDataset())["dataset_id"]
    points = [f"blocks.{layer}.hook_resid_post"]
    stored = done(library, Extract(model_id, dataset_id, points, max_tokens=None))
    done(library, Train(model_id, dataset_id, points, extraction_id=stored["extraction_id"]))
    sae = library.saes.all()[0]
    done(library, Discover(sae.id))
    print(f"model to discovery: {time.monotonic() - began:.0f} s")


def report(library: Library, top: int) -> bool:
    """Print the tables; whether both lines of the promise are kept."""
    run = max(library.feature_runs.all(), key=lambda found: found.id)
    sae = library.saes.get(run.sae_id)
    model = library.models.get(sae.model_id)
    store, tokens = open_features(library, run)
    tokenizer = load_tokenizer(library.path(model.folder))
    vocabulary = Vocabulary.of(tokenizer, max(len(tokenizer), tokens.meta.vocab_size))
    began = time.monotonic()
    scores = score_store(store, tokens, vocabulary)
    scored = time.monotonic() - began
    began = time.monotonic()
    texts = list(rule_descriptions(store, scores, vocabulary))
    described = time.monotonic() - began
    metrics = sae.metrics
    print(
        f"{model.name}, {sae.hook_point}: {len(store):,} latents, L0 {metrics['l0']:.1f}, "
        f"explained variance {metrics['explained_variance']:.3f} and dead share "
        f"{100 * metrics['dead_share']:.2f} % over {metrics['tokens']:,} held-out tokens"
    )
    dead = float((~store.alive).mean())
    print(
        f"discovery over {store.meta.tokens:,} tokens: {100 * dead:.2f} % never fired; "
        f"rules fitted and tried in {scored:.1f} s, put into words in {described:.2f} s"
    )
    kept = int(scores.interpretable.sum())
    known = ~np.isnan(scores.accuracy)
    print(
        f"{kept:,} features with a lower bound of {INTERPRETABLE:.2f} or more, of {known.sum():,} "
        f"scored; null {scores.null:.3f} ({scores.nulls:,} rules on another feature's contexts, "
        f"taken off where above 0.5)"
    )
    _quantiles(scores, known)
    _families(scores, known)
    _unscored(store, known)
    _table(scores, texts, store, top)
    fine = kept >= WANTED and max(dead, metrics["dead_share"]) < DEAD
    print(
        f"\nat least {WANTED} with a lower bound of {INTERPRETABLE:.2f}, dead share below "
        f"{100 * DEAD:.0f} %: {'yes' if fine else 'NO'}"
    )
    return fine


def _quantiles(scores: Scores, known: np.ndarray) -> None:
    shares = (5, 25, 50, 75, 95)
    for name, values in (("accuracy", scores.accuracy), ("lower bound", scores.low)):
        found = np.percentile(values[known], shares)
        parts = ", ".join(f"{s} %: {v:.2f}" for s, v in zip(shares, found, strict=True))
        print(f"  {name} by quantile: {parts}")
    tenths = np.nanmean(scores.by_decile, axis=0)
    print(f"  accuracy by tenth, weakest first: {', '.join(f'{t:.2f}' for t in tenths)}")
    print(f"  contexts tried a feature: median {np.median(scores.tried[known]):.0f}")


def _families(scores: Scores, known: np.ndarray) -> None:
    print("\n  kind of rule   features   lower bound reached   mean accuracy")
    for number, family in enumerate(FAMILIES):
        of = known & (scores.rules.family == number)
        if of.any():
            print(
                f"  {family.name:12}   {of.sum():8,}   {(of & scores.interpretable).sum():19,}"
                f"   {scores.accuracy[of].mean():13.2f}"
            )


def _unscored(store: FeatureStore, known: np.ndarray) -> None:
    """How many have no score, by the sentence that is shown instead (its figures aside)."""
    contexts, shares = store.columns["n_contexts"], store.columns["context_density"]
    why: dict[str, int] = {}
    for i in np.flatnonzero(~known):
        words = why_no_score(int(contexts[i]), float(shares[i])).split()
        sentence = " ".join("n" if any(c.isdigit() for c in w) else w for w in words)
        why[sentence] = why.get(sentence, 0) + 1
    for sentence, n in sorted(why.items(), key=lambda item: -item[1]):
        print(f"  no score, {n}: {sentence}")


def _table(scores: Scores, texts: list[str], store: FeatureStore, top: int) -> None:
    print(f"\nthe {top} with the highest lower bound (accuracy [95 % interval], contexts tried)")
    for i in np.argsort(-np.nan_to_num(scores.low, nan=-1), kind="stable")[:top]:
        print(
            f"  {i:6}  {scores.accuracy[i]:.2f} [{scores.low[i]:.2f}, {scores.high[i]:.2f}]  "
            f"{scores.active[i]:3} + {scores.inactive[i]:3}  {texts[i]}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--top", type=int, default=60)
    options = parser.parse_args()
    if options.library:
        library = Library(options.library)
        fine = report(library, options.top)
        library.close()
        return 0 if fine else 1
    model = os.environ.get("MISTUDIO_SAMPLE_MODEL", "")
    if not model:
        print("not measured: MISTUDIO_SAMPLE_MODEL names no folder")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = Library(options.keep or Path(folder) / "library")
        train(library, model, options.layer)
        fine = report(library, options.top)
        library.close()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
