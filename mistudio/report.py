"""The demo's report: what was done and what it gave, as a page of text."""

from __future__ import annotations

from typing import Any

from mistudio.formatting import count, duration, number, percent

PHASES = ("convert", "tokenize", "extract", "train", "discover", "steer")


def demo_report(result: dict[str, Any], library: str) -> str:
    """A readable page from the demo's result."""
    training, features, steering = result["training"], result["features"], result["steering"]
    seconds = result["seconds"]
    steps = ", ".join(f"{name} {duration(seconds[name])}" for name in PHASES)
    lines = [
        "",
        f"{result['model']} ({result['precision']}), {count(result['tokens'])} tokens of text, "
        f"in {duration(seconds['total'])}",
        f"  {steps}",
        "",
        "The dictionary, on text it has not seen",
        f"  explained variance   {number(training['explained_variance'], 3)}   "
        f"over {count(training['heldout_tokens'])} held-out tokens",
        f"  active latents (L0)  {number(training['l0'], 1)}    target {number(training['k'], 0)}",
        f"  dead latents         {percent(training['dead_share'], 1)}    "
        "never fired on those tokens",
        f"  loss recovered       {percent(training['ce_loss_score'], 1)}   "
        f"next-token loss {number(training['ce_clean'], 3)} -> {number(training['ce_sae'], 3)} "
        "nats "
        f"with the dictionary in its place, {number(training['ce_zero'], 2)} without "
        f"({count(training['ce_tokens'])} predictions)",
        f"  speed                {count(training['tokens_per_second'])} tokens/s of training",
        "",
        f"Features: {count(features['alive'])} of {count(features['total'])} fired, "
        f"{count(features['with_examples'])} have examples. Some, by the rule that tells where "
        "they are active:",
    ]
    for row in result["showcase"]:
        lines += _feature(row)
    lines += [
        "",
        f"Steering with feature {steering['feature']} at {number(steering['strength'], 2)} x its "
        f"largest activation ({number(steering['percent_of_norm'], 0)} % of the layer's norm)",
        f"  it is active on: {steering['shared']}",
        f"  prompt     {steering['prompt']}",
        f"  unsteered  {_one_line(steering['unsteered'])}",
        f"  steered    {_one_line(steering['steered'])}",
        f"  KL {number(steering['kl_per_token'], 3)} nats per token; perplexity "
        f"{number(steering['perplexity_ratio'], 2)} times the unsteered text's, "
        "both under the unsteered model",
        "",
        f"Run: {result['run']}    Library: {library}",
    ]
    return "\n".join(lines)


def _feature(row: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"  #{row['feature']}  {row['shared']}   (right on {percent(row['accuracy'], 0)} of "
        f"{row['tried']} other contexts, {percent(row['low'], 0)} at least; fires on "
        f"{percent(row['density'], 2)} of tokens)",
    ]
    for before, token, after in row["contexts"]:
        lines.append(f"      ...{_one_line(before)}[{_one_line(token)}]{_one_line(after)}...")
    return lines


def _one_line(text: str) -> str:
    return text.replace("\n", " ↵ ")
