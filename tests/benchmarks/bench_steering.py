"""What steering costs: a token steered over the same batch unsteered, both texts together over one
alone, and the time to the first token.

    MISTUDIO_SAMPLE_MODEL=FOLDER python3 run.py bench steering [--tokens N]

All sides write at once, a token each in turn and in a new random order every time, so that a busy
machine disturbs them alike; the figures are medians of the differences and ratios within a turn,
with the 95 % interval of the difference. "Edit alone" is what a step of steering computes more,
timed without the model. The dictionary is
random, of the default training's size (8 x the model's width at one layer, a threshold that leaves
some thirty latents active): what an intervention costs does not depend on what features mean.
Promised: less than 2 ms or 3 % a token (whichever is larger), both texts at most 1.9 x one on a CPU
(1.2 x on an NVIDIA GPU), the first token within 500 ms on two cores with the model loaded (times
are read on a quiet machine only).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import torch  # noqa: E402

from mistudio.engine.models.hooks import HookedDecoder, HookPoint  # noqa: E402
from mistudio.engine.models.loading import load_model, load_tokenizer, special_ids  # noqa: E402
from mistudio.engine.progress import SILENT, Progress  # noqa: E402
from mistudio.engine.sae.activation import JumpReLU  # noqa: E402
from mistudio.engine.sae.dictionary import Dictionary  # noqa: E402
from mistudio.engine.sae.site import Site  # noqa: E402
from mistudio.engine.steering.generation import Sampling, generate  # noqa: E402
from mistudio.engine.steering.interventions import (  # noqa: E402
    FeatureEdit,
    SiteSteering,
    Steering,
    Variant,
)

PROMPT = "The most important thing about the sea is that it"
NOTHING = Variant(())  # a row more, and no hook
FIRST_TOKENS = 15


def random_dictionary(model: HookedDecoder, point: HookPoint, ids: torch.Tensor) -> Dictionary:
    x = model.capture(ids, [point])[point][0, 1:].float().cpu()
    d, g = model.d_model, torch.Generator().manual_seed(0)
    rows = torch.randn(8 * d, d, generator=g)
    rows /= rows.norm(dim=1, keepdim=True)
    pre = x @ rows.T
    threshold = pre.flatten().kthvalue(int(pre.numel() * (1 - 32 / len(rows)))).values
    activation = JumpReLU(torch.full((len(rows),), float(threshold)))
    decoder = rows * float(x.norm(dim=1).median())
    return Dictionary(rows, torch.zeros(len(rows)), decoder, torch.zeros(d), activation)


class _Turn:
    """The progress of one side: before every token it waits until it is its turn."""

    def __init__(self) -> None:
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self._first = True

    def check(self) -> None:
        if not self._first:
            self.back.release()
        self._first = False
        self.go.acquire()

    def report(self, *_: object, **__: object) -> None:
        pass


def in_turns(sides: dict[str, Callable[[Progress], None]], tokens: int) -> dict[str, list[float]]:
    """Seconds of each side's tokens but the first, which reads the prompt."""
    turns = {name: _Turn() for name in sides}

    def run(name: str) -> None:
        sides[name](turns[name])
        turns[name].back.release()

    threads = [threading.Thread(target=run, args=(name,)) for name in sides]
    for thread in threads:
        thread.start()
    order, found = random.Random(0), {name: [] for name in sides}
    for _ in range(tokens):
        for name in order.sample(list(sides), len(sides)):
            began = time.perf_counter()
            turns[name].go.release()
            turns[name].back.acquire()
            found[name].append(time.perf_counter() - began)
    for thread in threads:
        thread.join()
    return {name: times[1:] for name, times in found.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median, by resampling."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    folder = os.environ.get("MISTUDIO_SAMPLE_MODEL", "")
    if not folder:
        print("not measured: MISTUDIO_SAMPLE_MODEL names no folder")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(Path(folder), "auto", device), load_tokenizer(Path(folder))
    special = sorted(special_ids(tokenizer))
    prompt = list(tokenizer(PROMPT)["input_ids"])
    point = HookPoint("resid_post", model.n_layers // 3)
    dictionary = random_dictionary(model, point, torch.tensor([prompt], device=model.device))
    dictionary = dictionary.to(model.device)

    def variant(method: str, number: int = 1) -> Variant:
        edits = tuple(FeatureEdit(3 + i, 0.1, 1.0, method) for i in range(number))
        return Variant((SiteSteering(Site.at(point), dictionary, edits),))

    def write(variants: list[Variant], tokens: int, progress: Progress = SILENT) -> None:
        generate(
            model, tokenizer, prompt, variants, Sampling(max_new_tokens=tokens),
            special_ids=special, stop_ids=(), progress=progress,
        )  # fmt: skip

    def edit_alone(chosen: Variant) -> float:
        """Milliseconds of one step's edit of two rows, of which one is steered."""
        steering = Steering(model, [None, chosen], special, len(prompt))
        change, x = steering.edits()[point], torch.randn(2, 1, model.d_model, device=model.device)
        x = x.to(next(model.model.parameters()).dtype)
        ids, times = torch.tensor([prompt[1:2]] * 2, device=model.device), []
        for _ in range(300):
            began = time.perf_counter()
            steering.expect(ids, len(prompt))
            change(x)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return 1000 * median(times)

    steered = {
        "two, add": variant("add"), "two, add 5": variant("add", 5), "two, clamp": variant("clamp")
    }  # fmt: skip
    sides: dict[str, list[Variant]] = {"one": [], "two, none steered": [NOTHING]}
    sides |= {name: [one] for name, one in steered.items()}
    found = in_turns(
        {
            name: lambda progress, variants=variants: write(variants, options.tokens, progress)
            for name, variants in sides.items()
        },
        options.tokens,
    )
    print(
        f"{Path(folder).name} in {next(model.model.parameters()).dtype} on {device}, "
        f"{torch.get_num_threads()} threads; {options.tokens} tokens each\n"
    )
    fine = True
    print("| steered | ms a token | over the batch unsteered | edit alone, ms | both over one |")
    print("|---|---|---|---|---|")
    plain = found["two, none steered"]
    for name in list(sides)[1:]:
        token, usual = 1000 * median(found[name]), 1000 * median(plain)
        more = [1000 * (a - b) for a, b in zip(found[name], plain, strict=True)]
        low, high = interval(more)
        both = median([a / b for a, b in zip(found[name], found["one"], strict=True)])
        alone = f"{edit_alone(steered[name]):.2f}" if name in steered else "—"
        fine &= median(more) < max(2.0, 0.03 * usual) and both <= (1.2 if device == "cuda" else 1.9)
        print(
            f"| {name} | {token:.1f} | {median(more):+.2f} [{low:+.2f} to {high:+.2f}] ms "
            f"| {alone} | {both:.2f} x |"
        )
    first = []
    for _ in range(FIRST_TOKENS):
        began = time.perf_counter()
        write([variant("add")], 1)
        first.append(time.perf_counter() - began)
    print(
        f"\nfirst token of both texts, prompt of {len(prompt)} tokens: median "
        f"{1000 * median(first):.0f} ms, least {1000 * min(first):.0f} ms of {len(first)}"
    )
    fine &= min(first) < 0.5
    print(f"all kept: {'yes' if fine else 'NO'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
