"""`steer`, `calibrate`, `sweep`, `export-vector`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mistudio.cli.shared import RUN_HELP, Add, add_sae_options, find_sae, layers, run_here
from mistudio.errors import InvalidInput
from mistudio.formatting import number, percent
from mistudio.library.library import Library

METHODS = ("add", "clamp", "clamp_min", "scale", "ablate", "orthogonal", "cap")
SCOPES = ("all", "generated", "from_last", "last", "chosen")


def add_commands(add: Add, commands: Any) -> None:
    steer = add("steer", _steer, "continue a prompt with features changed")
    add_sae_options(steer)
    _add_features(steer)
    _add_sampling(steer, 60)
    steer.add_argument("--prompt", required=True, metavar="TEXT")
    steer.add_argument("--seed", type=int, default=0)
    steer.add_argument(
        "--scales", type=_numbers, default=[1.0], metavar="S,...",
        help="up to four variants beside each other: each multiplies all strengths",
    )  # fmt: skip
    steer.add_argument("--control", action="store_true", help="add one in a random direction")
    calibrate = add("calibrate", _calibrate, "find out how strongly features can be steered")
    add_sae_options(calibrate)
    calibrate.add_argument(
        "--feature", type=int, action="append", required=True, metavar="N", dest="features"
    )
    calibrate.add_argument("--method", choices=("add", "clamp", "clamp_min"), default="add")
    calibrate.add_argument("--suppress", action="store_true", help="negative strengths too")
    calibrate.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", dest="prompts",
        help="in place of four neutral ones; can be repeated",
    )  # fmt: skip
    calibrate.add_argument("--max-tokens", type=int, default=32, help="so many after each prompt")
    calibrate.add_argument("--seed", type=int, default=0)
    sweep = add("sweep", _sweep, "steer at many strengths and layers, with intervals over seeds")
    add_sae_options(sweep)
    _add_features(sweep)
    _add_sampling(sweep, 40)
    sweep.add_argument("--prompt", action="append", required=True, metavar="TEXT", dest="prompts")
    sweep.add_argument(
        "--strengths", type=_numbers, default=[0.5, 1.0, 2.0, 3.0], metavar="S,...",
        help="each multiplies the features' own strengths (1 where none is given)",
    )  # fmt: skip
    sweep.add_argument("--seeds", type=_whole_numbers, default=[0, 1, 2], metavar="N,...")
    sweep.add_argument("--to", type=Path, metavar="FILE", help="the table as .csv, all as .json")
    vector = add("export-vector", _export_vector, "write what a steering adds to a file")
    vector.add_argument("run", metavar="RUN", nargs="?", help=RUN_HELP)
    vector.add_argument("--layer", type=int, help="which SAE, where the run has several")
    vector.add_argument("--generation", type=int, metavar="N", help="in place of RUN and features")
    _add_features(vector, needed=False)
    _add_sampling(vector, 60)
    vector.add_argument("--prompt", default="", metavar="TEXT", help="for a Python program")
    vector.add_argument("--seed", type=int, default=0)
    vector.add_argument(
        "--format", choices=("gguf", "neuronpedia", "safetensors", "python"), default="gguf"
    )
    vector.add_argument("--to", type=Path, required=True, metavar="FILE")


def _add_features(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    parser.add_argument(
        "--feature", type=_feature, action="append", required=needed, default=None,
        metavar="N[:S[:METHOD]]", dest="features",
        help=f"a feature, its strength and method ({', '.join(METHODS)}); can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="S",
        help="of features without one: multiples of the feature's largest activation",
    )  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="add", help="of features without one")
    parser.add_argument(
        "--at-layers", type=layers, default=[], metavar="N,...",
        help="add the same vector after each of these layers instead (a sweep: after one of them)",
    )  # fmt: skip
    parser.add_argument(
        "--scope", choices=SCOPES, default="all",
        help="which tokens are steered: prompt and generated, only generated, from the prompt's "
        "last on, only that, or --positions",
    )  # fmt: skip
    parser.add_argument(
        "--positions", type=_whole_numbers, default=[], metavar="N,...",
        help="tokens of the prompt, from 1 on (--scope chosen)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-norm", action="store_true", help="every changed activation keeps its length"
    )


def _add_sampling(parser: argparse.ArgumentParser, tokens: int) -> None:
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    parser.add_argument("--max-tokens", type=int, default=tokens, help=f"default {tokens}")
    parser.add_argument("--chat", action="store_true", help="use the model's chat format")


def _feature(text: str) -> tuple[int, float | None, str | None]:
    """`12`, `12:2.5` or `12:2.5:clamp`."""
    feature, _, rest = text.partition(":")
    strength, _, method = rest.partition(":")
    if method and method not in METHODS:
        raise argparse.ArgumentTypeError(f"{method!r} is none of {', '.join(METHODS)}")
    return int(feature), float(strength) if strength else None, method or None


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part.strip()]


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _features(options: argparse.Namespace) -> list[list[Any]]:
    return [
        [feature, options.strength if strength is None else strength, method or options.method]
        for feature, strength, method in options.features or []
    ]


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "repetition_penalty": options.repetition_penalty,
        "max_new_tokens": options.max_tokens,
        "chat": options.chat,
        "scope": options.scope,
        "positions": tuple(options.positions),
        "keep_norm": options.keep_norm,
        "layers": tuple(options.at_layers),
    }


def _steer(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Steer

    job = Steer(
        find_sae(library, options).id,
        _features(options),
        options.prompt,
        seed=options.seed,
        scales=tuple(options.scales),
        control=options.control,
        **_common(options),
    )
    generation = library.generations.get(run_here(library, job)["generation_id"])
    result = generation.result
    print(f"Unsteered: {result['unsteered']}\n")
    for variant in result["variants"]:
        name = "Control: " if variant["control"] else "Steered: "
        scale = "" if len(result["variants"]) == 1 else f" (x {variant['scale']:g})"
        print(f"{name}  {variant['text']}\n\n{_changed(variant)}{scale}")
    first = result["variants"][0]
    return {
        "feature": job.features[0][0],
        "strength": job.features[0][1],
        "unsteered": result["unsteered"],
        "steered": first["text"],
        "unsteered_ids": result["unsteered_ids"],
        "steered_ids": first["ids"],
        "kl_per_token": first["kl_per_token"],
        "perplexity_ratio": first["perplexity_ratio"],
        "word_overlap": first["word_overlap"],
        "variants": result["variants"],
        "generation_id": generation.id,
    }


def _changed(variant: dict[str, Any]) -> str:
    parts = [
        f"KL {number(variant['kl_per_token'], 4)} nats/token over {variant['tokens']} tokens",
        f"perplexity x{number(variant['perplexity_ratio'], 2)}",
        f"word overlap {percent(variant['word_overlap'], 0)}",
        f"coefficient {', '.join(number(c, 2) for c in variant['coefficients'])}",
    ]
    if variant["percent_of_norm"] is not None:
        parts[-1] += f" ({number(variant['percent_of_norm'], 0)} % of the layer's norm)"
    return ", ".join(parts)


def _calibrate(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Calibrate

    sae = find_sae(library, options)
    job = Calibrate(
        sae.id,
        options.features,
        options.method,
        tuple(options.prompts),
        options.suppress,
        options.max_tokens,
        options.seed,
    )
    run_here(library, job)
    found = library.calibrations.of_sae(sae.id)
    kept = [found[feature, job.method] for feature in dict.fromkeys(job.features)]
    for one in kept:
        breaks = "breaks at none tried" if one.s_max is None else f"breaks at {one.s_max:g}"
        print(f"\nFeature {one.feature}: recommended {one.recommended:g}, {breaks}")
        for row in [*reversed(one.tried(-1)), *one.tried(1)]:
            print(
                f"  {row['strength']:>6g}  {row['zone']:<5}  KL {number(row['kl'], 3)} nats/token, "
                f"distinct-2 x{number(row['distinct_ratio'], 2)}, "
                f"perplexity x{number(row['perplexity_ratio'], 2)}, "
                f"own tokens {percent(row['own_share'], 1)}"
                f"{_likelier(row)}"
            )
    return {"sae_id": sae.id, "calibrations": [asdict(one) for one in kept]}


def _likelier(row: dict[str, Any]) -> str:
    """How the feature's own tokens fare; nothing where it has none."""
    before = row.get("own_probability_unsteered")
    return f" x{number(row['own_probability'] / before, 2)} as likely" if before else ""


def _sweep(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.experiments import write_experiment
    from mistudio.jobs.kinds import Sweep

    if options.to is not None and not options.to.absolute().parent.is_dir():
        raise InvalidInput(
            "The table cannot be written there",
            f"There is no folder {options.to.absolute().parent}.",
            "Name a file in an existing folder.",
        )
    job = Sweep(
        find_sae(library, options).id,
        _features(options),
        tuple(options.strengths),
        prompts=tuple(options.prompts),
        seeds=tuple(options.seeds),
        **_common(options),
    )
    experiment = library.experiments.get(run_here(library, job)["experiment_id"])
    for row in experiment.result["rows"]:
        where = "" if row["layer"] is None else f"layer {row['layer']}, "
        print(f"{where}strength {row['strength']:g}: {_estimates(row['summary'])}")
    if options.to is not None:
        write_experiment(experiment, options.to)
    return {"experiment_id": experiment.id, "rows": experiment.result["rows"]}


def _estimates(summary: dict[str, Any]) -> str:
    parts = []
    for name, title in (
        ("kl_per_token", "KL"),
        ("perplexity_ratio", "perplexity x"),
        ("distinct_ratio", "distinct-2 x"),
        ("reactivation", "reactivation"),
    ):
        if (found := summary[name]) is not None:
            text = f"{title} {number(found['mean'], 3)}"
            if found["low"] is not None:
                text += f" [{number(found['low'], 3)} to {number(found['high'], 3)}]"
            parts.append(text)
    return ", ".join(parts)


def _export_vector(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import ExportVector

    if options.generation is not None:
        request = library.generations.get(options.generation).request
    elif options.run is None or not options.features:
        raise InvalidInput(
            "It is not said what to export",
            "Neither a generation nor a run with features was named.",
            "Name a run and --feature N:S, or --generation N.",
        )
    else:
        request = {
            "sae_id": find_sae(library, options).id,
            "features": _features(options),
            "prompt": options.prompt,
            "seed": options.seed,
            **_common(options),
        }
    job = ExportVector(request, str(options.to.absolute()), options.format)
    written = run_here(library, job)
    for line in (*written["files"], *written["notes"]):
        print(line)
    return {"format": options.format, **written}
