"""Unsteered and steered text in one batch, token by token, with shared sampling noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hf import DynamicCache
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.steering.interventions import RowSteering
from mistudio.errors import InvalidInput


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_p keeps the smallest set of tokens whose
    probability reaches it."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 60
    seed: int = 0

    def check(self) -> None:
        limits = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "max_new_tokens": (1, 2048)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(
                    "A generation setting is out of range",
                    f"{name.replace('_', ' ')} must be between {low:g} and {high:g}; "
                    f"it is {value:g}.",
                    field=name,
                )


@dataclass(frozen=True)
class Continuation:
    """One row's new tokens, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


@dataclass
class Generated:
    """All rows of one generation: row 0 is unsteered."""

    prompt_ids: list[int]
    rows: list[Continuation]
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, through the model's chat template where asked."""
    if not prompt.strip():
        raise InvalidInput("The prompt is empty", next_step="Type some text.", field="prompt")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput(
                "This model has no chat template",
                "Its tokenizer does not say how a conversation is written.",
                "Switch the chat format off.",
                field="chat",
            )
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return list(ids)


@torch.inference_mode()
def generate(
    model: HookedDecoder,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    point: HookPoint,
    vectors: Tensor,
    sampling: Sampling,
    *,
    special_ids: Sequence[int],
    stop_ids: Collection[int],
    progress: Progress = SILENT,
) -> Generated:
    """Continue one prompt in `len(vectors) + 1` rows: row 0 unsteered, row r with vectors[r - 1].

    One Gumbel noise vector a step is shared by all rows, so a difference comes from the steering
    alone. `progress.report` gets `texts`, the continuations so far. Raises RuntimeError if a
    non-zero vector leaves the first logits as they were: silent non-steering is worse than none.
    """
    sampling.check()
    rows = len(vectors) + 1
    model.check_point(point)
    zero = torch.zeros(1, vectors.shape[1], device=vectors.device)
    edit = RowSteering(torch.cat([zero, vectors]).to(model.device), special_ids)
    untouched = [row for row, vector in enumerate(vectors, start=1) if not bool(vector.any())]
    noise = torch.Generator().manual_seed(sampling.seed)
    ids = torch.tensor([list(prompt_ids)] * rows, device=model.device)
    made: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    stops = set(stop_ids)
    cache = DynamicCache(config=model.model.config)
    position = 0
    fed = ids
    for step in range(sampling.max_new_tokens):
        progress.check()
        edit.expect(fed, position)
        with model.intervene({point: edit}):
            out = model.model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        position += fed.shape[1]
        logits = out.logits[:, -1].float()
        # Equal rows of one batch may differ in their last bits, which can tip a near tie.
        logits[untouched] = logits[0].clone()
        if step == 0:
            _check_effect(logits, vectors, out.logits.dtype)
        chosen = draw(logits, sampling, noise)
        for row, token in enumerate(chosen.tolist()):
            if not ended[row]:
                ended[row] = token in stops
                if not ended[row]:
                    made[row].append(token)
        fed = chosen[:, None]
        progress.report(
            step + 1,
            sampling.max_new_tokens,
            phase="generate",
            texts=[tokenizer.decode(tokens) for tokens in made],
        )
        if all(ended):
            break
    continuations = [
        Continuation(tokens, tokenizer.decode(tokens), done)
        for tokens, done in zip(made, ended, strict=True)
    ]
    return Generated(list(prompt_ids), continuations)


def draw(logits: Tensor, sampling: Sampling, noise: torch.Generator) -> Tensor:
    """One token per row of [rows, vocab] by the Gumbel-max trick with the same noise for all."""
    if sampling.temperature == 0:
        return logits.argmax(1)
    scaled = logits / sampling.temperature
    if sampling.top_p < 1:
        probabilities, order = scaled.softmax(1).sort(1, descending=True)
        beyond = probabilities.cumsum(1) - probabilities >= sampling.top_p
        scaled = scaled.masked_fill(beyond.gather(1, order.argsort(1)), -math.inf)
    uniform = torch.rand(logits.shape[1], generator=noise, dtype=torch.float64)
    gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
    return (scaled + gumbel.to(scaled)).argmax(1)


def _check_effect(logits: Tensor, vectors: Tensor, dtype: torch.dtype) -> None:
    """Fail where a row that was given a vector differs by rounding at most."""
    rounding = 16 * torch.finfo(torch.float32).eps * float(logits[0].abs().max())
    limit = rounding if dtype == torch.float32 else 0.0
    for row, vector in enumerate(vectors, start=1):
        if bool(vector.any()) and float((logits[row] - logits[0]).abs().max()) <= limit:
            raise RuntimeError(
                "Steering changed nothing: the hook point's edit does not reach the logits"
            )
