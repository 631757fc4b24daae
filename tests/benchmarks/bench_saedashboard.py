"""miStudio against SAEDashboard: from tokens to finished dashboard data, same SAE, same tokens.

Ours is discovery, one more pass for the whole contexts of all examples, and the export in
SAEDashboard's own format; theirs is `NeuronpediaRunner.run`. Both read a model that is loaded, an
SAE on disk and tokens as arrays; loading is timed on neither side. The two run one after the other
on the same processor. Then the numbers are compared, and what differs is printed with why.

    python3 run.py bench saedashboard [--tokens 16384] [--latents 2048,24576] [--k 32]
                                      [--batches N] [--threads 2] [--install]

SAEDashboard makes dashboards in batches of 128 features, each of which encodes all of the text
again: --batches N times N of its batches (after a first one, which also runs the model and keeps
its activations) and takes the rest to last as long. 0 runs all of them. MISTUDIO_SAMPLE_MODEL
names another model folder than the tests' tiny one.

It wants older libraries than SAELens and the app do, so it has an environment of its own,
.venv-dashboard, which --install makes; peers/dashboard_requirements.txt says with what.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mistudio.engine.datasets.sources import read_documents  # noqa: E402
from mistudio.engine.datasets.token_writer import write_token_store  # noqa: E402
from mistudio.engine.datasets.tokens import TokenStore  # noqa: E402
from mistudio.engine.features.discovery import Subject, discover  # noqa: E402
from mistudio.engine.features.exports import neuronpedia_a  # noqa: E402
from mistudio.engine.features.exports.material import Material, Origin  # noqa: E402
from mistudio.engine.features.exports.texts import TokenTexts  # noqa: E402
from mistudio.engine.features.exports.whole import GatheredWindows, Wanted  # noqa: E402
from mistudio.engine.features.passing import LivePassage  # noqa: E402
from mistudio.engine.features.store import FeatureStore  # noqa: E402
from mistudio.engine.models import loading  # noqa: E402
from mistudio.engine.models.hooks import HookPoint  # noqa: E402
from mistudio.engine.sae.activation import JumpReLU, TopK  # noqa: E402
from mistudio.engine.sae.dictionary import Dictionary  # noqa: E402
from mistudio.engine.sae.files import save_sae  # noqa: E402
from mistudio.engine.sae.formats.writing import export_sae  # noqa: E402
from mistudio.engine.sae.site import Site  # noqa: E402

HERE = Path(__file__).resolve().parent
VENV = ROOT / ".venv-dashboard"
THEIRS = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TINY = ROOT / "tests" / "data" / "tiny-llama-0.9m"
CORPUS = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
CONTEXT = 128
MB = 1024**2


def install() -> None:
    """Make the environment. Without torchvision and torchaudio, which nothing here uses and whose
    builds do not fit a CPU torch."""
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(THEIRS), "-m", "pip"]
    wanted = HERE / "peers" / "dashboard_requirements.txt"
    subprocess.run([*pip, "install", "-r", str(wanted)], check=True)
    subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)


class Clock:
    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Case:
    """A model, text and an SAE that both sides get."""

    def __init__(self, folder: Path, model: Path, tokens: int, latents: int, k: int) -> None:
        self.folder, self.model_folder = folder, model
        self.tokenizer = loading.load_tokenizer(model)
        write_token_store(
            list(islice(read_documents(CORPUS), 1500)),
            self.tokenizer,
            folder / "text",
            bos_id=loading.adds_bos(self.tokenizer),
            separator_id=loading.separator_id(self.tokenizer),
            special_ids=sorted(loading.special_ids(self.tokenizer)),
            tokenizer_hash="benchmark",
        )
        self.text = TokenStore(folder / "text").train
        self.model = loading.load_model(model, "fp32")
        self.point = HookPoint("resid_post", self.model.n_layers // 2)
        self.windows = np.arange(tokens // CONTEXT)
        np.save(folder / "tokens.npy", self.text.windows(self.windows, CONTEXT).numpy())
        self.dictionary = self._dictionary(latents, k)
        save_sae(
            self.dictionary,
            folder / "sae",
            site=Site.at(self.point),
            model_name=model.name,
            context=CONTEXT,
        )
        self.saelens = export_sae(folder / "sae", folder / "saelens", "saelens")

    @torch.inference_mode()
    def _dictionary(self, latents: int, k: int) -> Dictionary:
        """Random unit directions around the text's mean activation; JumpReLU with one threshold
        for all, such that a token activates k latents on average."""
        d = self.model.width(self.point)
        g = torch.Generator().manual_seed(0)
        encoder = torch.randn(latents, d, generator=g)
        encoder /= encoder.norm(dim=1, keepdim=True)
        passage = self.passage(self.windows[:16])
        x = torch.cat([chunk[self.point].activations for chunk in passage.chunks(0)])
        centre = x.mean(0)
        pre = (x[:256] - centre) @ encoder.T
        threshold = pre.flatten().topk(len(pre) * k).values[-1].clamp_min(1e-3)
        zeros = torch.zeros(latents)
        return (
            Dictionary(
                encoder,
                -(encoder @ centre),
                encoder.clone(),
                torch.zeros(d),
                JumpReLU(zeros + threshold),
            )
            if k
            else Dictionary(encoder, zeros, encoder.clone(), torch.zeros(d), TopK(32))
        )

    def passage(self, windows: np.ndarray, medians: Any = None) -> LivePassage:
        points = (self.point,)
        return LivePassage(self.model, self.text, points, windows, CONTEXT, medians=medians)


def ours(case: Case, limit: int | None = None) -> tuple[dict[str, tuple[float, float]], Path]:
    """Seconds of each part, (clock, processor), and the folder of batch files."""
    parts: dict[str, tuple[float, float]] = {}
    clock = Clock()
    passage = case.passage(case.windows)
    subject = Subject("ours", Site.at(case.point), case.dictionary, case.folder / "store")
    discover(passage, [subject], model=case.model, tokenizer=case.tokenizer)
    parts["discovery"] = clock.read()
    clock = Clock()
    store = FeatureStore(case.folder / "store")
    features = np.arange(len(store))
    wanted = Wanted(store, features, 5)
    whole = GatheredWindows(case.folder / "whole", features, CONTEXT)
    again = case.passage(wanted.windows, passage.medians)
    whole.gather(again, case.point, case.dictionary, wanted)
    parts["whole contexts"] = clock.read()
    clock = Clock()
    decoder = case.dictionary.decoder.numpy()
    material = Material(
        store,
        case.text,
        TokenTexts(case.tokenizer),
        Origin(case.model_folder.name, "random", case.point.layer, case.point.name, "text"),
        features,
        directions=decoder.__getitem__,
        whole=whole,
    )
    target = neuronpedia_a.write(material, case.folder / "ours", neuronpedia_a.Naming("set"))
    parts["export"] = clock.read()
    return parts, target


def theirs(case: Case, threads: int, end_batch: int | None, name: str) -> dict[str, Any]:
    job = {
        "model": str(case.model_folder),
        "sae": str(case.saelens),
        "tokens": str(case.folder / "tokens.npy"),
        "out": str(case.folder / name),
        "threads": threads,
        "end_batch": end_batch,
    }
    path = case.folder / f"{name}.json"
    path.write_text(json.dumps(job))
    script = HERE / "peers" / "dashboard_side.py"
    done = subprocess.run(
        [str(THEIRS), str(script), str(path)], capture_output=True, text=True, cwd=case.folder
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# --- speed ----------------------------------------------------------------------------------------


def speed(case: Case, batches: int, threads: int) -> tuple[Path, Path]:
    """Print both sides' times; returns the folders of their batch files."""
    latents, tokens = case.dictionary.d_sae, len(case.windows) * CONTEXT
    total = -(-latents // 128)
    parts, our_folder = ours(case)
    wall = sum(seconds for seconds, _ in parts.values())
    cpu = sum(seconds for _, seconds in parts.values())
    told = ", ".join(f"{name} {seconds:.1f} s" for name, (seconds, _) in parts.items())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{case.model_folder.name}: {tokens:,} tokens, {latents:,} latents, {total} batches of 128"
    )
    print(f"  ours: {wall:.1f} s by the clock, {cpu:.1f} s of processor ({told}); load {load:.1f}")
    measured = total if batches == 0 else min(batches + 1, total)
    answer = theirs(case, threads, None if measured == total else measured - 1, "theirs")
    done = np.array(answer["batches"])
    seconds, processor = done[-1]
    how = f"all {total} batches"
    if measured < total:
        extra, each = total - measured, (done[-1] - done[0]) / (measured - 1)
        seconds, processor = done[-1] + extra * each
        how = (
            f"{measured} of {total} batches in {done[-1][0]:.1f} s, of these {done[0][0]:.1f} s "
            f"the first, which also runs the model; the other {extra} at {each[0]:.2f} s each"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"  SAEDashboard: {seconds:.0f} s by the clock, {processor:.0f} s of processor ({how}); "
        f"peak memory {answer['peak'] / MB:,.0f} MB; load {load:.1f}"
    )
    print(
        f"  SAEDashboard takes {seconds / wall:.1f} times as long by the clock, "
        f"{processor / cpu:.1f} times by the processor; of the discovery alone, which leaves all "
        f"that the browser shows, {seconds / parts['discovery'][0]:.1f} and "
        f"{processor / parts['discovery'][1]:.1f} times"
    )
    return our_folder, Path(answer["folder"])


# --- values ---------------------------------------------------------------------------------------


def features_of(folder: Path, below: int | None = None) -> dict[int, dict[str, Any]]:
    """The features of batch files, in the order of their numbers, up to one of them."""
    found = {}
    for path in sorted(folder.glob("batch-*.json"), key=lambda p: int(p.stem.split("-")[1])):
        for feature in json.loads(path.read_text(encoding="utf-8"))["features"]:
            found[feature["feature_index"]] = feature
        if below is not None and max(found, default=0) >= below:
            break
    return found


def top_values(feature: dict[str, Any]) -> list[float]:
    """The activations that its top examples are of, strongest first."""
    rows = [a for a in feature["activations"] if a["bin_min"] == -1]
    return [row["values"][row["qualifying_token_index"]] for row in rows]


def compare(ours: Path, theirs: Path, case: Case) -> None:
    """Print how far both agree, on every feature that both have."""
    b = features_of(theirs)
    a = features_of(ours, max(b))  # those of all batches would not fit into memory
    both = sorted(set(a) & set(b))
    tokens = len(case.windows) * CONTEXT
    store = FeatureStore(case.folder / "store")
    counts = store.columns["n_active"]
    print(f"  compared: {len(both):,} features that fired and are in both")
    silent = [i for i in b if i not in a]
    alive = sum(b[i]["frac_nonzero"] > 0 for i in silent)
    print(
        f"  in their batches and not in ours, as they never fired: {len(silent)}; {alive} of these "
        "have a density there"
    )
    # Density: ours is of tokens that count, theirs of all positions, read from a title.
    mine = np.array([counts[i] / tokens for i in both])
    other = np.array([b[i]["frac_nonzero"] for i in both])
    print(
        f"  active tokens over all positions: largest difference {np.abs(mine - other).max():.1e} "
        f"(theirs is printed to 1e-5); ours divides by the {store.meta.tokens:,} that count of "
        f"{tokens:,}"
    )
    special = {case.tokenizer.decode([token]) for token in case.text.meta.special_ids}
    alike = [i for i in both if not special & set(_strongest(b[i]))]
    maxima = np.array([(top_values(a[i])[0], max(map(max, _values(b[i])))) for i in alike])
    relative = np.abs(maxima[:, 0] - maxima[:, 1]) / np.maximum(maxima[:, 0], 1e-6)
    print(
        f"  max activation: differs by {relative.max():.1e} of it at most (theirs has 3 decimals), "
        f"the {len(both) - len(alike)} features apart whose top examples there are of special "
        "tokens (it leaves out three of them; here none count)"
    )
    tops = shared = repeated = 0
    for i in both:
        their = [_context_of(row, special) for row in b[i]["activations"] if row["bin_min"] == -1]
        repeated += len(their) - len(set(their))
        mine_too = {
            _context_of(row, special) for row in a[i]["activations"] if row["bin_min"] == -1
        }
        live = {
            t
            for t, row in zip(their, b[i]["activations"], strict=False)
            if row["values"][row["qualifying_token_index"]] > 0
        }
        tops += len(live)
        shared += len(live & mine_too)
    print(
        f"  top examples: {shared:,} of their {tops:,} different contexts are among ours; "
        f"{repeated:,} of their rows repeat a context"
    )
    spelt = [len(set(a[i]["pos_str"]) & {_bare(t) for t in b[i]["pos_str"]}) for i in both]
    sides = ("pos_values", "neg_values")
    logits = [np.abs(np.array(a[i][s]) - np.array(b[i][s])).max() for i in both for s in sides]
    print(
        f"  logits of the 10 most promoted and suppressed tokens: differ by {max(logits):.1e} at "
        f"most; {np.mean(spelt):.1f} of 10 tokens are spelt alike (theirs leaves parts of "
        "characters in the alphabet of bytes)"
    )
    heights = [
        sum(a[i]["freq_hist_data_bar_heights"]) - sum(b[i]["freq_hist_data_bar_heights"])
        for i in both
    ]
    moved = [
        np.abs(
            np.array(a[i]["freq_hist_data_bar_heights"])
            - np.array(b[i]["freq_hist_data_bar_heights"])
        ).sum()
        / 2
        / max(counts[i], 1)
        for i in both
        if len(b[i]["freq_hist_data_bar_heights"]) == 50
    ]
    print(
        f"  histogram of activations: totals differ by {np.abs(heights).max():.0f} at most; "
        f"{100 * np.mean(moved):.1f} % of the activations lie in another of the 50 bars (ours come "
        "from 4 bins an octave and the deciles)"
    )
    shown = [
        np.abs(
            np.array(a[i]["logits_hist_data_bar_heights"])
            - np.array(b[i]["logits_hist_data_bar_heights"])
        ).sum()
        / 2
        / sum(b[i]["logits_hist_data_bar_heights"])
        for i in both
    ]
    print(f"  histogram of logits: {100 * np.mean(shown):.2f} % of the tokens lie in another bar")
    intervals = [
        sum(max(row["values"]) == 0 for row in b[i]["activations"] if row["bin_min"] != -1)
        for i in both
    ]
    print(
        f"  interval examples without any activation: {np.mean(intervals):.1f} of 25 there (their "
        "lowest interval holds the zeros), 0 in ours"
    )


def _strongest(feature: dict[str, Any]) -> list[str]:
    """The tokens that its top examples are of."""
    rows = [row for row in feature["activations"] if row["bin_min"] == -1]
    return [row["tokens"][row["qualifying_token_index"]] for row in rows]


def _values(feature: dict[str, Any]) -> list[list[float]]:
    return [row["values"] for row in feature["activations"]]


def _context_of(row: dict[str, Any], special: set[str]) -> tuple[int, ...]:
    """A context, told from others by where the feature is active, special tokens apart: spellings
    of tokens differ."""
    return tuple(
        place
        for place, (value, token) in enumerate(zip(row["values"], row["tokens"], strict=True))
        if value > 0.002 and token not in special
    )


def _bare(text: str) -> str:
    return text.replace("Ġ", " ").replace("Ċ", "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench saedashboard")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--latents", default="2048,24576")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true")
    given = parser.parse_args()
    if given.install:
        install()
    if not THEIRS.exists():
        print(
            "There is no .venv-dashboard: `python3 run.py bench saedashboard --install` makes it."
        )
        return 0
    torch.set_num_threads(given.threads)
    model = Path(os.environ.get("MISTUDIO_SAMPLE_MODEL") or TINY)
    for latents in map(int, given.latents.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder), model, given.tokens, latents, given.k)
            compare(*speed(case, given.batches, given.threads), case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
