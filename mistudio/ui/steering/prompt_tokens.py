"""The tokens of a prompt, for choosing those at which steering acts."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio.library.library import Library


@dataclass(frozen=True)
class PromptTokens:
    """`texts` and `ids` by position; `special` are the positions that are never steered."""

    prompt: str
    chat: bool
    model_id: int
    texts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()


def read_tokens(library: Library, model_id: int, prompt: str, chat: bool) -> PromptTokens:
    """As a generation would read them; loads the tokenizer, so never in the GUI thread."""
    from mistudio.engine.models.loading import load_tokenizer, special_ids
    from mistudio.engine.steering.generation import encode_prompt

    tokenizer = load_tokenizer(library.path(library.models.get(model_id).folder))
    ids = encode_prompt(tokenizer, prompt, chat)
    never = special_ids(tokenizer)
    return PromptTokens(
        prompt,
        chat,
        model_id,
        tuple(str(tokenizer.decode([token])) for token in ids),
        tuple(ids),
        frozenset(place for place, token in enumerate(ids) if place == 0 or token in never),
    )
