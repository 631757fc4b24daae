"""`steer`."""

from __future__ import annotations

import argparse
from typing import Any

from mistudio.cli.shared import Add, add_sae_options, find_sae, run_here
from mistudio.formatting import number, percent
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
    steer = add("steer", _steer, "continue a prompt with a feature added")
    add_sae_options(steer)
    steer.add_argument("--feature", type=int, required=True, metavar="N")
    steer.add_argument(
        "--strength",
        type=float,
        required=True,
        metavar="S",
        help="multiples of the feature's largest activation",
    )
    steer.add_argument("--prompt", required=True, metavar="TEXT")
    steer.add_argument("--temperature", type=float, default=0.7)
    steer.add_argument("--top-p", type=float, default=1.0)
    steer.add_argument("--max-tokens", type=int, default=60)
    steer.add_argument("--seed", type=int, default=0)
    steer.add_argument("--chat", action="store_true", help="use the model's chat format")


def _steer(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Steer

    sae = find_sae(library, options)
    job = Steer(
        sae.id,
        [[options.feature, options.strength]],
        options.prompt,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_tokens,
        seed=options.seed,
        chat=options.chat,
    )
    generation = library.generations.get(run_here(library, job)["generation_id"])
    result = generation.result
    variant = result["variants"][0]
    print(f"Unsteered: {result['unsteered']}\n\nSteered:   {variant['text']}\n")
    print(
        f"KL {number(variant['kl_per_token'], 4)} nats/token over {variant['tokens']} tokens, "
        f"perplexity x{number(variant['perplexity_ratio'], 2)}, "
        f"word overlap {percent(variant['word_overlap'], 0)}, coefficient "
        f"{number(variant['coefficients'][0], 2)} "
        f"({number(variant['percent_of_norm'], 0)} % of the layer's norm)"
    )
    return {
        "feature": options.feature,
        "strength": options.strength,
        "unsteered": result["unsteered"],
        "steered": variant["text"],
        "unsteered_ids": result["unsteered_ids"],
        "steered_ids": variant["ids"],
        "kl_per_token": variant["kl_per_token"],
        "perplexity_ratio": variant["perplexity_ratio"],
        "word_overlap": variant["word_overlap"],
        "generation_id": generation.id,
    }
