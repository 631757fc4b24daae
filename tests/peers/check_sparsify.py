"""Load every sparsify export of export_every_kind.py with the installed sparsify and compare.

peers/bin/python tests/peers/check_sparsify.py OUT
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5


def main(out: Path) -> int:
    from sparsify import SparseCoder

    print(f"eai-sparsify {importlib.metadata.version('eai-sparsify')}, torch {torch.__version__}\n")
    worst = 0.0
    for name, outcome in json.loads((out / "outcomes.json").read_text()).items():
        if outcome["sparsify"].startswith("refused"):
            print(f"{name:<36} {outcome['sparsify']}")
            continue
        folder = out / outcome["sparsify"]
        want = load_file(out / "sparsify" / name / "expected.safetensors")
        coder = SparseCoder.load_from_disk(folder)
        with torch.no_grad():
            # Without the decorator, which is autocast for CUDA.
            found = SparseCoder.forward.__wrapped__(coder, want["x"])
        acts = torch.zeros_like(want["acts"])
        acts.scatter_(1, found.latent_indices, found.latent_acts)
        errors = [
            float((a - b).abs().max() / a.abs().max())
            for a, b in ((want["acts"], acts), (want["out"], found.sae_out))
        ]
        worst = max(worst, *errors)
        print(
            f"{name:<36} {folder.name:<14} transcode {coder.cfg.transcode!s:<5} "
            f"skip {coder.cfg.skip_connection!s:<5} encode {errors[0]:.1e}  forward {errors[1]:.1e}"
        )
    print(f"\nworst error {worst:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
