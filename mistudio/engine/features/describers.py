"""Descriptions of features by a language model, from excerpts of the half of all documents that
descriptions are made from (Bills et al. 2023; prompts after delphi, arXiv 2410.13928)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mistudio.engine.features.excerpts import Excerpt, pieces
from mistudio.engine.features.language_models import LanguageModel
from mistudio.engine.features.score import STRONGEST
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput, UserError

EXAMPLES = 12  # half of them the strongest there are
MARKED = 0.3  # of an excerpt's highest activation: tokens from there on are marked
WORDS, LETTERS = 20, 200  # of a description at most
ATTEMPTS = 2

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"description": {"type": "string", "maxLength": LETTERS}},
    "required": ["description"],
    "additionalProperties": False,
}
START = '{"description": "'

PROMPT = """A unit of a neural network is active on the words between << and >> in these texts:

{texts}

What do these words, or the texts around them, have in common? Answer in at most {words} words, as \
JSON: {{"description": "..."}}"""


def shown_to_describers(excerpts: Sequence[Excerpt]) -> list[Excerpt]:
    """Up to `EXAMPLES` active excerpts of the half that descriptions are made from: the strongest
    ones, and others of the stronger deciles from the top down. InvalidInput where there are
    none."""
    usable = [e for e in excerpts if e.is_active and not e.tried]
    strongest = [e for e in usable if e.kind == STRONGEST]
    rest = sorted((e for e in usable if e.kind != STRONGEST), key=lambda e: -e.decile)
    half = max(EXAMPLES // 2, EXAMPLES - len(rest))
    chosen = [*strongest[:half], *rest[: EXAMPLES - len(strongest[:half])]]
    if not chosen:
        raise InvalidInput(
            "There is nothing to describe",
            "This feature is active in no document of the half that descriptions are made from.",
            "Discover the features on more text.",
            field="feature",
        )
    return chosen


def active_tokens(excerpt: Excerpt) -> np.ndarray:
    """Bool [w]: the tokens that are marked; the strongest alone where no activations are known."""
    values = excerpt.activations
    if not len(values):
        return np.arange(len(excerpt.ids)) == excerpt.peak
    found: np.ndarray = values > MARKED * values.max(initial=0.0)
    return found & (values > 0)


def marked(parts: Sequence[str], chosen: np.ndarray) -> str:
    """The text of `parts` with << and >> around each run of chosen ones, blanks outside."""
    text, inside = "", ""
    for part, is_chosen in zip([*parts, ""], [*chosen, False], strict=True):
        if is_chosen:
            inside += part
            continue
        if inside.strip():
            bare = inside.strip()
            before = inside[: inside.index(bare)]
            text += f"{before}<<{bare}>>{inside[len(before) + len(bare) :]}"
        else:
            text += inside
        text, inside = text + part, ""
    return " ".join(text.split())


def prompt(
    excerpts: Sequence[Excerpt], tokenizer: Any, fits: Callable[[str], bool] = lambda prompt: True
) -> str:
    """With as many excerpts as fit. InvalidInput where there is nothing to describe; UserError
    where not even one fits."""
    texts = [
        f"{number}. {marked(pieces(tokenizer, e.ids), active_tokens(e))}"
        for number, e in enumerate(shown_to_describers(excerpts), 1)
    ]
    for many in range(len(texts), 0, -1):
        asked = PROMPT.format(texts="\n".join(texts[:many]), words=WORDS)
        if fits(asked):
            return asked
    raise UserError(
        "This model reads too little text to describe features",
        "Not even one example fits into it together with the question.",
        "Choose a model with a longer context.",
    )


def describe(
    model: LanguageModel, excerpts: Sequence[Excerpt], tokenizer: Any, progress: Progress = SILENT
) -> str | None:
    """A description, or None where the model's answer could not be parsed, twice."""
    asked = prompt(excerpts, tokenizer, lambda text: model.reads(text, START))
    for attempt in range(ATTEMPTS):
        progress.check()
        found = parsed(model.write(asked, START, SCHEMA, attempt, progress))
        if found is not None:
            return found
    return None


_FIELD = re.compile(r'"description"\s*:\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)


def parsed(answer: str) -> str | None:
    """The description in an answer; None where there is none that one could use."""
    match = _FIELD.search(answer)
    if match is None:
        return None
    try:
        text = json.loads(f'"{match[1]}"', strict=False)
    except ValueError:
        return None
    text = " ".join(text.replace("<<", "").replace(">>", "").split())
    letters = sum(character.isalnum() for character in text)
    if not letters or len(text) > LETTERS or set(text) <= set(". "):
        return None
    return str(text)
