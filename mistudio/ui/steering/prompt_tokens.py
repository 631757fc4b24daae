"""The tokens of a prompt, for choosing those at which steering acts."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio.library.library import Library

PART = "…"


@dataclass(frozen=True)
class PromptTokens:
    """`texts` and `ids` by position; `special` are the positions that are never steered. Of a
    character that several tokens make up all but the last are PART."""

    prompt: str
    chat: bool
    model_id: int
    texts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()


def read_tokens(library: Library, model_id: int, prompt: str, chat: bool) -> PromptTokens:
    """As a generation would read them; loads the tokenizer, so never in the GUI thread."""
    from mistudio.engine.features.excerpts import pieces
    from mistudio.engine.models.loading import load_tokenizer, special_ids
    from mistudio.engine.steering.generation import encode_prompt

    tokenizer = load_tokenizer(library.path(library.models.get(model_id).folder))
    ids = encode_prompt(tokenizer, prompt, chat)
    never = special_ids(tokenizer)
    return PromptTokens(
        prompt,
        chat,
        model_id,
        tuple(text or PART for text in pieces(tokenizer, ids)),
        tuple(ids),
        frozenset(place for place, token in enumerate(ids) if place == 0 or token in never),
    )
