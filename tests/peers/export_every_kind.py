"""Export a dictionary of every sparsity and wiring, with our own numbers, for other libraries.

    .venv/bin/python tests/peers/export_every_kind.py OUT [RUN_FOLDER ...]
    peers/bin/python tests/peers/check_saelens.py OUT
    peers/bin/python tests/peers/check_sparsify.py OUT

`peers` is an environment as in make_fixtures.py. A run over twelve layers is trained and exported
too, each layer from its own folder. Any folder of SAEs that miStudio saved may be
named too: they are exported as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import twelve_layers

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import OURS, load_sae, save_sae
from mistudio.engine.sae.formats.compare import sample_inputs
from mistudio.engine.sae.formats.writing import EXPORT_FORMATS, export_sae
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible

D, M, N = 64, 512, 256
RUN = "twelve-layers"  # what the exports of that run are called before their site
SPARSITIES = ("topk", "batchtopk", "matryoshka", "jumprelu", "standard", "gated")
WIRINGS = ("sae", "skip_sae_fixed", "skip_sae_low_rank", "transcoder", "skip_transcoder")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary(sparsity: str, wiring: str, norm: str = "none") -> Dictionary:
    """As training leaves it: scaled units, an own centre and a skip where the wiring has them."""
    activation = {
        "topk": TopK(16),
        "batchtopk": JumpReLU(torch.full((M,), 6.0)),
        "matryoshka": JumpReLU(torch.full((M,), 6.0)),
        "jumprelu": JumpReLU(5 + random(M, seed=5).abs()),
        "standard": ReLU(),
        "gated": Gated((0.3 * random(M, seed=6)).exp(), 0.3 * random(M, seed=7)),
    }[sparsity]
    directions = torch.linalg.qr(random(D, 8, seed=8)).Q
    skip = {
        "skip_sae_fixed": 0.2 * torch.eye(D),
        "skip_sae_low_rank": directions @ directions.T,
        "skip_transcoder": random(D, D, seed=9) / D**0.5,
    }.get(wiring)
    rows = random(M, D, seed=2)
    return Dictionary(
        random(M, D, seed=1) / D**0.25,
        0.2 * random(M, seed=3) - (2.0 if sparsity in ("standard", "gated") else 0.0),
        rows / rows.norm(dim=1, keepdim=True),
        random(D, seed=4),
        activation,
        scale=0.37,
        out_scale=2.9 if wiring.endswith("transcoder") else None,
        centre=None if wiring == "sae" else random(D, seed=10),
        skip=skip,
        norm=norm,
    )


def numbers(folder: Path, source: Dictionary, saved: Dictionary) -> None:
    """Latent activations of the saved dictionary, outputs of the one that was handed in."""
    x = sample_inputs(saved, N)
    save_file(
        {"x": x, "acts": saved.encode(x).dense(), "out": source.reconstruct(x).contiguous()},
        folder / "expected.safetensors",
    )


def export(name: str, source: Dictionary, folder: Path, target: Path) -> dict[str, str]:
    outcome = {}
    for format in EXPORT_FORMATS:
        try:
            place = export_sae(folder, target / format / name, format)
        except Incompatible as exc:
            outcome[format] = f"refused: {exc.title}"
            continue
        outcome[format] = str(place.relative_to(target))
        numbers(target / format / name, source, load_sae(folder).dictionary)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("saved", type=Path, nargs="*", help="folders that hold saved SAEs")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    outcomes = {}
    cases = [(sparsity, wiring, "none") for sparsity in SPARSITIES for wiring in WIRINGS]
    cases += [("standard", "sae", "centre"), ("jumprelu", "sae", "centre")]
    cases += [(sparsity, "sae", "layer_norm") for sparsity in ("topk", "standard")]
    for sparsity, wiring, norm in cases:
        name = "-".join([sparsity, wiring] + ([norm] if norm != "none" else []))
        across = wiring.endswith("transcoder")
        site = (
            Site.across_mlp(HookPoint("mlp_in", 3))
            if across
            else Site.at(HookPoint("resid_post", 3))
        )
        module = f"model.layers.3{'.mlp' if across else ''}"
        source = dictionary(sparsity, wiring, norm)
        folder = options.out / "saved" / name
        save_sae(
            source,
            folder,
            site=site,
            model_name="gpt2",
            hf_hook_name=module,
            hf_hook_name_out=module,
            training_architecture=sparsity,
        )
        outcomes[name] = export(name, source, folder, options.out)
    twelve = twelve_layers.run(options.out / "run")
    for root in (twelve, *options.saved):
        for record in sorted(root.rglob(OURS)):
            kind = RUN if root == twelve else root.name
            name = f"{kind}-{record.parent.name}"
            saved = load_sae(record.parent).dictionary
            outcomes[name] = export(name, saved, record.parent, options.out)
    (options.out / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
    for name, outcome in outcomes.items():
        refused = [f"{k} {v}" for k, v in outcome.items() if v.startswith("refused")]
        print(f"{name:<36} {'; '.join(refused) or 'all formats'}")


if __name__ == "__main__":
    main()
