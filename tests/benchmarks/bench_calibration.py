"""Whether a recommended strength keeps its promise: features of the sample model are calibrated as
the app does it, then steered at their recommended strength on prompts and with seeds that the
calibration has not seen.

    python3 run.py bench calibration --library FOLDER [--features 20] [--of 384]

The library needs an SAE of the sample model with a discovery (`bench_feature_scores.py --keep`
makes one); it is not changed. Of `--of` features spread evenly over all that fired, those with the
highest output score (Arad et al. 2025) are taken, until `--features` of them have a recommended
strength: features that do not steer get none. Promised of the recommended strength: distinct-2 at
least 0.85 of the unsteered texts', KL at most 0.5 nats per token, and more of the feature's own
tokens. Those are counted in the text, and as the probability that the model gives to the 20 of
them, on the same steered text.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mistudio.engine.models.loading import load_tokenizer, special_ids  # noqa: E402
from mistudio.engine.models.logits import last_logits  # noqa: E402
from mistudio.engine.steering.calibration import (  # noqa: E402
    LEAST_DISTINCT,
    MOST_KL,
    calibrate,
)
from mistudio.engine.steering.generation import Sampling, generate  # noqa: E402
from mistudio.engine.steering.interventions import Steering, Variant  # noqa: E402
from mistudio.engine.steering.metrics import distinct, divergences  # noqa: E402
from mistudio.jobs.calibrating import output_scores_of  # noqa: E402
from mistudio.jobs.models import loaded_model  # noqa: E402
from mistudio.jobs.steering import open_part  # noqa: E402
from mistudio.library.library import Library  # noqa: E402

PROMPTS = (
    "My grandmother always told me that",
    "The results of the study show",
    "When they arrived at the station",
    "One of the best ways to learn",
    "The city council decided on Monday",
    "It is often said that music",
    "Before the war, the family",
    "A good teacher knows how",
)
NEW_TOKENS, SEED = 32, 1000


class Bench:
    """One SAE of a library and its model."""

    def __init__(self, library: Library) -> None:
        run = max(library.feature_runs.all(), key=lambda found: found.id)
        self.sae = library.saes.get(run.sae_id)
        record = library.models.get(self.sae.model_id)
        self.model = loaded_model(library, record.id)
        self.part = open_part(library, self.sae.id, self.model)
        self.tokenizer = load_tokenizer(library.path(record.folder))
        self.special = sorted(special_ids(self.tokenizer))
        print(
            f"{record.name} in {next(self.model.model.parameters()).dtype}, "
            f"{self.sae.hook_point}, {self.sae.d_sae:,} features, {torch.get_num_threads()} threads"
        )

    def ranked(self, of: int) -> list[tuple[int, Any]]:
        """(feature, output score), the highest first."""
        alive = np.flatnonzero(self.part.store.alive)
        some = alive[np.linspace(0, len(alive) - 1, min(of, len(alive))).astype(int)].tolist()
        scores = output_scores_of(self.part, some, self.model, self.tokenizer, self.special)
        known = [(f, s) for f, s in zip(some, scores, strict=True) if s is not None]
        return sorted(known, key=lambda item: -item[1].score)

    def variant(self, feature: int, strength: float) -> Variant:
        return Variant((self.part.steering_of(self.part.edit(feature, strength, "add")),))

    def calibrated(self, feature: int) -> Any:
        return calibrate(
            self.model,
            self.tokenizer,
            lambda strength: self.variant(feature, strength),
            special_ids=self.special,
            own=self.part.own_tokens(feature),
        )

    def tried(self, feature: int, strength: float) -> dict[str, float]:
        """What the strength does to prompts that the calibration has not seen."""
        variant, own = self.variant(feature, strength), self.part.own_tokens(feature)
        sums: dict[str, list[float]] = {}
        for number, prompt in enumerate(PROMPTS):
            ids = list(self.tokenizer(prompt)["input_ids"])
            sampling = Sampling(0.7, max_new_tokens=NEW_TOKENS, seed=SEED + number)
            plain, steered = generate(
                self.model, self.tokenizer, ids, [variant], sampling,
                special_ids=self.special, stop_ids=(),
            ).rows  # fmt: skip
            (found,) = divergences(self.model, [variant], ids, [steered.ids], self.special)
            before, after = self.mass(variant, ids, steered.ids, own)
            for name, value in (
                ("kl", sum(found.kl) / len(found.kl)),
                ("distinct", distinct(steered.ids, 2)),
                ("plain distinct", distinct(plain.ids, 2)),
                ("own", sum(t in own for t in steered.ids) / len(steered.ids)),
                ("plain own", sum(t in own for t in plain.ids) / len(plain.ids)),
                ("mass", after),
                ("plain mass", before),
            ):
                sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    @torch.inference_mode()
    def mass(
        self, variant: Variant, prompt: list[int], text: list[int], own: list[int]
    ) -> tuple[float, float]:
        """Mean probability of the feature's own tokens along a text: unsteered, steered."""
        ids = torch.tensor([[*prompt, *text]] * 2)
        steering = Steering(self.model, [None, variant], self.special, len(prompt))
        steering.expect(ids, 0)
        with self.model.intervene(steering.edits()):
            logits = last_logits(self.model, ids, len(text) + 1)
        found = logits[:, :-1].float().softmax(-1)[:, :, own].sum(-1).mean(1)
        return float(found[0]), float(found[1])


def row(bench: Bench, feature: int, score: Any) -> bool | None:
    """Calibrate one feature and try it, and print its line of the table: whether the promise is
    kept, None where no strength is recommended."""
    began = time.monotonic()
    found = bench.calibrated(feature)
    seconds = time.monotonic() - began
    word = bench.tokenizer.decode(bench.part.own_tokens(feature)[:1]).strip().replace("|", "¦")
    head = f"| {feature} {word} | {score.score:.3f} | {found.recommended:g} | "
    head += f"{'—' if found.breaks is None else f'{found.breaks:g}'} | "
    if not found.recommended:
        print(f"{head}— | — | — | — | {seconds:.0f} | none recommended |", flush=True)
        return None
    tried = bench.tried(feature, found.recommended)
    ratio = tried["distinct"] / tried["plain distinct"]
    raised = tried["mass"] / max(tried["plain mass"], 1e-12)
    kept = ratio >= LEAST_DISTINCT and tried["kl"] <= MOST_KL and raised > 1
    print(
        f"{head}{tried['kl']:.3f} | {ratio:.2f} | {100 * tried['plain own']:.1f} -> "
        f"{100 * tried['own']:.1f} % | {100 * tried['plain mass']:.2f} -> "
        f"{100 * tried['mass']:.2f} % | {seconds:.0f} | {'yes' if kept else 'NO'} |",
        flush=True,
    )
    return bool(kept and math.isfinite(raised))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--library", type=Path, help="with a discovery of the sample model's SAE")
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--of", type=int, default=384)
    options = parser.parse_args()
    if options.library is None:
        print("not measured: --library names no library")
        return 0
    bench = Bench(Library(options.library))
    print(
        f"the features of {options.of} with the highest output scores; "
        f"{len(PROMPTS)} prompts x {NEW_TOKENS} tokens that the calibration has not seen\n"
    )
    print("| feature | output score | recommended | breaks at | KL | distinct-2 ratio | own tokens "
          "in text | their probability | calibration s | kept |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    found: list[bool] = []
    none = 0
    for feature, score in bench.ranked(options.of):
        kept = row(bench, feature, score)
        none += kept is None
        found += [] if kept is None else [kept]
        if len(found) == options.features:
            break
    verdict = "yes" if found and all(found) else "NO"
    print(
        f"\nkept for {sum(found)} of {len(found)} features with a recommended strength: {verdict}"
    )
    print(f"none recommended for {none} others")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
