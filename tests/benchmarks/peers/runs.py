"""Running both sides: one process a run, and a row of JSON for each that is never run twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judge
import numpy as np
import our_side
import shared
from corpora import POINT

HERE = Path(__file__).resolve().parent
OURS, PEER = "miStudio", "SAELens"
CHECKED_ROWS = 512

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is compared. `peers_python` is the interpreter of .venv-peers."""

    folder: Path
    peers_python: str
    steps: int
    seeds: int
    widths: tuple[int, ...]
    corpora: tuple[str, ...]
    archs: tuple[str, ...]
    rates: tuple[float, ...]
    k: int
    batch: int
    blocks: int
    block_steps: int
    threads: int
    device: str
    fresh: bool


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Rows:
    """A folder of rows, one JSON file a key: what is there is not made again."""

    def __init__(self, folder: Path, fresh: bool) -> None:
        """`fresh` makes each row once more, the first time that it is asked for."""
        self._folder, self._fresh = folder, fresh
        self._made: set[str] = set()

    def get(self, key: str, make: Callable[[], Row]) -> Row:
        path = self._folder / f"{key}.json"
        if path.exists() and (not self._fresh or key in self._made):
            return json.loads(path.read_text(encoding="utf-8"))
        began = time.monotonic()
        row = {"key": key, "made": time.strftime("%Y-%m-%d %H:%M"), **make()}
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(row, indent=1), encoding="utf-8")
        temporary.replace(path)
        self._made.add(key)
        say(f"  {key}: {time.monotonic() - began:.0f} s")
        return row


class Runs:
    """Both sides, and what they have answered."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._python = {OURS: sys.executable, PEER: settings.peers_python}
        self._script = {OURS: HERE / "our_side.py", PEER: HERE / "saelens_side.py"}
        self.version = {OURS: our_side.engine_fingerprint(), PEER: self._peer_version()}
        self._activations: dict[str, Path] = {}
        self._rows = Rows(settings.folder / "rows", settings.fresh)

    # --- processes ------------------------------------------------------------------------------

    def _peer_version(self) -> str:
        ask = "from importlib.metadata import version as v; print(v('sae-lens'), v('torch'))"
        found = subprocess.run(
            [self.settings.peers_python, "-c", ask], capture_output=True, text=True, check=True
        )
        name, self.peer_torch = found.stdout.split()
        return name

    def _start(self, side: str, job: Row, log: Path) -> subprocess.Popen[str]:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.settings.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
        job = job | {"threads": self.settings.threads, "device": self.settings.device}
        with log.open("w") as errors:
            return subprocess.Popen(
                [self._python[side], str(self._script[side]), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    @contextlib.contextmanager
    def _process(self, side: str, job: Row, key: str) -> Iterator[Callable[[str], Row]]:
        """A live worker as a function: a request line in, its answer out."""
        log = self.settings.folder / "logs" / f"{key}.{side}.log"
        child = self._start(side, job, log)
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(line: str) -> Row:
            if line:
                stdin.write(line + "\n")
                stdin.flush()
            for answer in stdout:  # libraries print too: an answer is a line of JSON
                if answer.startswith("{"):
                    return json.loads(answer)
            said = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError(
                f"{side} ended without an answer (exit {child.wait()}): {' / '.join(said)}"
            )

        try:
            yield ask
        except BaseException:
            child.terminate()  # it may be in the middle of a long run
            raise
        finally:
            with contextlib.suppress(OSError):
                stdin.close()
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    # --- quality --------------------------------------------------------------------------------

    def use(self, corpus: str, activations: Path) -> None:
        """Where the activations of a corpus lie."""
        self._activations[corpus] = activations

    def quality(
        self,
        side: str,
        arch: str,
        corpus: str,
        width: int,
        steps: int,
        seed: int,
        lr: float = 0.0,
        inputs: str = "scaled",
    ) -> Row:
        """Train, export, reload, judge. `lr` and `inputs` (raw, or scaled to E||x|| = sqrt(d))
        are the peer's alone: ours takes its default template."""
        settings, folder = self.settings, self._activations[corpus]
        data = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()[:6]
        key = (
            f"{side}-{self.version[side]}-{arch}-{corpus}.{data}-m{width}-k{settings.k}"
            f"-b{settings.batch}-s{steps}-seed{seed}"
        )
        if side == PEER:
            key += f"-lr{lr:g}-{inputs}"
        order = settings.folder / "order" / f"{corpus}.{data}-seed{seed}.i32"
        job = {
            "do": "train",
            "arch": arch,
            "activations": str(folder),
            "point": POINT,
            "order": str(order),
            "width": width,
            "k": settings.k,
            "batch": settings.batch,
            "steps": steps,
            "seed": seed,
            "lr": lr,
            "inputs": inputs,
            "export": str(settings.folder / "exports" / key),
        }
        return self._rows.get(key, lambda: self._train(side, job, key, corpus))

    def _train(self, side: str, job: Row, key: str, corpus: str) -> Row:
        activations = shared.open_activations(Path(job["activations"]), POINT)
        order, export = Path(job["order"]), Path(job["export"])
        # Some more than the run needs: ours takes a sample and calibrates on training rows.
        wanted = max(job["steps"] * job["batch"], 400_000)
        shared.write_order(order, len(activations.train), job["seed"], wanted)
        before = shared.load_average()
        with self._process(side, job, key) as ask:
            answer = ask("")
        if answer["version"] != self.version[side]:
            raise RuntimeError(f"{side} changed while the benchmark ran: start it again")
        row = {"side": side, "corpus": corpus, "d": activations.width, **job, **answer}
        row["load_before"] = before
        place = Path(answer["place"])
        row |= judge.judge_export(place, activations, order, job["k"])
        if side == OURS:
            row["in_saelens"] = self._loaded_by_peer(place, activations, key)
        shutil.rmtree(export)
        return row

    def _loaded_by_peer(self, export: Path, activations: shared.Activations, key: str) -> Row:
        """max|dy| / max|y| between our reading of an export and SAELens' own, over held-out rows.

        A pre-activation within rounding of its threshold may be active in one and not in the
        other; such rows are counted and kept apart.
        """
        x = activations.rows(activations.heldout, slice(0, CHECKED_ROWS))
        files = {name: str(export / f"{name}.npy") for name in ("x", "y", "active")}
        np.save(files["x"], x.numpy())
        with self._process(
            PEER, {"do": "load", "export": str(export), **files}, f"{key}-load"
        ) as ask:
            answer = ask("")
        ours, active = judge.reconstruction(export, x)
        same = np.load(files["active"]) == active
        difference = np.abs(np.load(files["y"]) - ours)
        return {
            **answer,
            "error": float(difference[same].max() / np.abs(ours).max()),
            "rows": CHECKED_ROWS,
            "borderline_rows": int((~same).sum()),
        }

    # --- speed and memory -----------------------------------------------------------------------

    def _step_job(self, do: str, arch: str, d: int, width: int, batch: int, **more: Any) -> Row:
        return {
            "do": do,
            "arch": arch,
            "d": d,
            "width": width,
            "k": self.settings.k,
            "batch": batch,
            "steps": 20_000,  # a long run's schedule: neither warm-up's end nor decay comes near
            "seed": 0,
            "lr": 3e-4,
            "pool": 4,
            "dead": 0,
            **more,
        }

    def _step_key(self, job: Row) -> str:
        versions = f"{self.version[OURS]}-{self.version[PEER]}"
        shape = f"d{job['d']}-m{job['width']}-k{job['k']}-b{job['batch']}-dead{job['dead']}"
        return f"{job['do']}-{versions}-{job['arch']}-{shape}-{self.settings.device}"

    def speed(self, arch: str, d: int, width: int, batch: int, dead: int) -> Row:
        """Tokens per second of a training step on both sides, in alternating blocks."""
        job = self._step_job("speed", arch, d, width, batch, dead=dead, warmup=5)
        key = f"{self._step_key(job)}-{self.settings.blocks}x{self.settings.block_steps}"
        return self._rows.get(key, lambda: self._alternate(job, key))

    def _alternate(self, job: Row, key: str) -> Row:
        blocks = []
        n = self.settings.block_steps
        with (
            self._process(OURS, job, key) as ours,
            self._process(PEER, job, key) as peer,
        ):
            # Warm-ups happen side by side; only the blocks are timed, one process at a time.
            ours(""), peer("")
            for number in range(self.settings.blocks):
                block: Row = {}
                pair = [(OURS, ours), (PEER, peer)]
                for side, ask in pair if number % 2 == 0 else reversed(pair):
                    answer = ask(f"go {n}")
                    block[side] = n * job["batch"] / answer["seconds"]
                    block["load"] = answer["load"]
                blocks.append(block)
        return {
            **job,
            OURS: statistics.median(block[OURS] for block in blocks),
            PEER: statistics.median(block[PEER] for block in blocks),
            "ratio": statistics.median(block[OURS] / block[PEER] for block in blocks),
            "blocks": blocks,
        }

    def memory(self, arch: str, d: int, width: int, batch: int) -> Row:
        """Peak memory that training takes on each side, in a fresh process each."""
        job = self._step_job("memory", arch, d, width, batch, warmup=3) | {"pool": 1}
        key = self._step_key(job)

        def measure() -> Row:
            row = dict(job)
            for side in (OURS, PEER):
                with self._process(side, job, key) as ask:
                    row[side] = ask("")["bytes"]
            return row | {"ratio": row[OURS] / row[PEER]}

        return self._rows.get(key, measure)


def fair(row: Row) -> Row:
    """The verdict that a row is compared by: ours as exported; the peer's BatchTopK with its
    threshold set right, as its export's is wrong after short runs."""
    return row["calibrated"] if row["side"] == PEER and "calibrated" in row else row["exported"]


def steps_in(seconds: float, row: Row) -> int:
    """How many steps of the run in `row` fit into `seconds`, its fixed costs counted."""
    fixed = row["whole_seconds"] - row["seconds"]
    return max(1, math.floor((seconds - fixed) / (row["seconds"] / row["steps"])))
