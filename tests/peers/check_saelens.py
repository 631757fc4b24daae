"""Load every SAELens export of export_every_kind.py with the installed sae-lens and compare.

    peers/bin/python tests/peers/check_saelens.py OUT

Prints a table; exits with 1 where anything does not load or is off by more than 1e-5 of the
largest value, or where the run over twelve layers is not whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
RUN = "twelve-layers-"


def off_by(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).abs().max() / want.abs().max())


def loads(folder: Path, sae_class: type) -> bool:
    try:
        sae_class.load_from_disk(folder)
    except Exception as exc:
        print(f"{folder.name}: {type(exc).__name__}: {exc}")
        return False
    return True


def main(out: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE
    print(
        f"sae-lens {importlib.metadata.version('sae-lens')}, torch {torch.__version__}, "
        f"transformer-lens {importlib.metadata.version('transformer-lens')}\n"
    )
    header = ("dictionary", "architecture", "hook_name -> out", "L0", "encode", "forward")
    rows, worst, misread = [header], 0.0, 0
    layers: list[str] = []
    outcomes = json.loads((out / "outcomes.json").read_text())
    for name, outcome in outcomes.items():
        if outcome["saelens"].startswith("refused"):
            # The library's own folder of such a dictionary must not load as something else.
            how = "loads as another function" if loads(out / "saved" / name, SAE) else "also by it"
            rows.append((name, f"{outcome['saelens']}; {how}", "", "", "", ""))
            misread += how.startswith("loads")
            continue
        folder = out / outcome["saelens"]
        want = load_file(folder.parent / "expected.safetensors")
        sae = SAE.load_from_disk(folder)
        with torch.no_grad():
            acts, forward = sae.encode(want["x"]), sae(want["x"])
        errors = (off_by(want["acts"], acts), off_by(want["out"], forward))
        worst = max(worst, *errors)
        meta = sae.cfg.metadata
        if name.startswith(RUN) and name == RUN + str(meta.hook_name):
            layers.append(str(meta.hook_name))
        place = str(meta.hook_name).removeprefix("blocks.3.")
        if meta.hook_name_out != meta.hook_name:
            place += f" -> {str(meta.hook_name_out).removeprefix('blocks.3.')}"
        l0 = f"{float((acts > 0).sum(1).float().mean()):.1f}"
        rows.append((name, sae.cfg.architecture(), place, l0, *(f"{e:.1e}" for e in errors)))
    widths = [max(len(row[i]) for row in rows if row[4]) for i in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[5]]).rstrip())
    loaded = sum(not outcome["saelens"].startswith("refused") for outcome in outcomes.values())
    print(f"\n{loaded} loaded, {len(outcomes) - loaded} refused at export; worst error {worst:.1e}")
    wanted = {f"blocks.{layer}.hook_resid_post" for layer in range(12)}
    print(f"{len(layers)} layers of one run, each from its own folder")
    return int(worst > TOLERANCE or misread > 0 or set(layers) != wanted)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
