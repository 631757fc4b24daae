"""Unsteered and steered text in one batch, token by token, with shared sampling noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hf import DynamicCache
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.models.logits import last_logits
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.steering.interventions import Scope, Steering, Variant
from mistudio.errors import InvalidInput, is_out_of_memory


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all),
    top_p of those the smallest set whose probability reaches it. The repetition penalty divides
    positive logits of tokens that stand in the prompt or the continuation, and multiplies negative
    ones (Keskar et al. 2019, arXiv 1909.05858)."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 60
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        limits = {
            "temperature": (0.0, 2.0),
            "top_p": (0.01, 1.0),
            "top_k": (0, 1000),
            "repetition_penalty": (0.5, 2.0),
            "max_new_tokens": (1, 2048),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(
                    "A generation setting is out of range",
                    f"{name.replace('_', ' ')} must be between {low:g} and {high:g}; "
                    f"it is {value:g}.",
                    field=name,
                )
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises InvalidInput where torch's generators cannot start from it."""
    if not -(2**63) <= seed < 2**63:
        raise InvalidInput(
            "This seed is too large",
            f"{seed} does not fit into 64 bits.",
            "Choose a whole number of up to 18 digits.",
            field="seed",
        )


def check_room(model: HookedDecoder, prompt_tokens: int, new_tokens: int) -> None:
    """Raises InvalidInput where the model has no positions for that many tokens: beyond what it was
    trained on it fails or writes nonsense."""
    longest = model.context
    if longest is None or prompt_tokens + new_tokens <= longest:
        return
    told = f"The prompt has {prompt_tokens:,} tokens; the model reads {longest:,} at most"
    if prompt_tokens >= longest:
        raise InvalidInput(
            "The prompt is too long for this model",
            f"{told}, with what it writes.",
            "Shorten the prompt.",
            field="prompt",
        )
    raise InvalidInput(
        "Prompt and new tokens are too long for this model",
        f"{told}, and {new_tokens:,} new ones were asked for.",
        f"Ask for at most {longest - prompt_tokens:,} new tokens, or shorten the prompt.",
        field="max_new_tokens",
    )


@dataclass(frozen=True)
class Continuation:
    """One row's new tokens, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


@dataclass
class Generated:
    """All rows of one generation: row 0 is unsteered. `together`: in one batch."""

    prompt_ids: list[int]
    rows: list[Continuation]
    together: bool


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, through the model's chat template where asked. Raises InvalidInput
    where there is none."""
    if not prompt.strip():
        raise InvalidInput("The prompt is empty", next_step="Type some text.", field="prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(
            "The prompt is no readable text",
            f"Its character {exc.start + 1} is half of one.",
            "Type the prompt anew.",
            field="prompt",
        ) from exc
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
    if not ids:
        raise InvalidInput(
            "The prompt has no tokens",
            "The model's tokenizer knows none of its characters.",
            "Type other text.",
            field="prompt",
        )
    return list(ids)


@torch.inference_mode()
def generate(
    model: HookedDecoder,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    variants: Sequence[Variant],
    sampling: Sampling,
    *,
    special_ids: Sequence[int],
    stop_ids: Collection[int],
    scope: Scope | None = None,
    together: bool = True,
    progress: Progress = SILENT,
) -> Generated:
    """Continue one prompt in `len(variants) + 1` rows: row 0 unsteered, row r as variants[r - 1].

    One Gumbel noise vector a step is shared by all rows, so a difference comes from the steering
    alone. `progress.report` gets `texts`, the continuations so far. Where memory is short (or
    without `together`) rows follow one another, with the same noise and the same text. Raises
    RuntimeError where a variant that acts on the prompt leaves the first logits as they were:
    silent non-steering is worse than none; InvalidInput where it could not be otherwise, where the
    text does not fit into the model's positions, and where its predictions are no numbers any more.
    """
    sampling.check()
    check_room(model, len(prompt_ids), sampling.max_new_tokens)
    check_scope(scope or Scope(), prompt_ids, special_ids)
    made = _Making(model, tokenizer, list(prompt_ids), sampling, special_ids, stop_ids, scope)
    rows: list[Variant | None] = [None, *variants]
    if together:
        try:
            return made.result(made.run(rows, progress), together=True)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
        # Outside of the handler: the error holds what the batch held.
    parts: list[_Rows] = []
    for number, variant in enumerate(rows):
        before = [tokens for part in parts for tokens in part.ids]
        parts.append(made.run([variant], progress, before, len(rows) - number - 1))
    return made.result(_Rows.joined(parts), together=False)


def check_scope(scope: Scope, prompt_ids: Sequence[int], special_ids: Sequence[int]) -> None:
    """Raises InvalidInput where a scope within the prompt holds nothing that may be steered."""
    if scope.kind not in ("last", "chosen"):
        return
    scope.check(len(prompt_ids))
    last = len(prompt_ids) - 1
    places = scope.positions if scope.kind == "chosen" else (last,)
    if not any(place > 0 and prompt_ids[place] not in special_ids for place in places):
        raise InvalidInput(
            "There is no token to steer",
            "The first token of a prompt and special tokens are never steered, and this scope "
            "holds no other.",
            "Write a longer prompt, or choose other tokens.",
            field="scope",
        )


def check_numbers(logits: Tensor, variants: Sequence[Variant | None]) -> None:
    """Raises InvalidInput where the logits [rows, ..., vocab] of a row are no numbers: an edit, or
    the model itself, went beyond what its precision holds."""
    likeliest = logits.flatten(1).amax(1)
    if bool(likeliest.isfinite().all()):
        return
    broken = [variant for variant, fine in zip(variants, likeliest.isfinite(), strict=True)
              if not fine]  # fmt: skip
    if None in broken:
        raise InvalidInput(
            "The model's predictions are no numbers",
            f"Without any steering it leaves the range of {_short(logits)}.",
            "Use the model in another precision.",
        )
    raise InvalidInput(
        "This steering is too strong",
        f"The model's predictions leave the range of {_short(logits)}.",
        "Use less strength.",
        field="strength",
    )


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class _Rows:
    """What rows became: their tokens, whether they ended, the logits of their first step."""

    ids: list[list[int]]
    ended: list[bool]
    first: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        return cls(
            [tokens for part in parts for tokens in part.ids],
            [ended for part in parts for ended in part.ended],
            torch.cat([part.first for part in parts]),
        )


@dataclass
class _Making:
    """One generation's settings; `run` continues the prompt in some of its rows."""

    model: HookedDecoder
    tokenizer: Any
    prompt_ids: list[int]
    sampling: Sampling
    special_ids: Sequence[int]
    stop_ids: Collection[int]
    scope: Scope | None
    reference: Tensor | None = None  # the unsteered row's first logits

    def run(
        self,
        variants: Sequence[Variant | None],
        progress: Progress,
        before: Sequence[list[int]] = (),
        after: int = 0,
    ) -> _Rows:
        """`before` are rows that are made already, `after` how many follow: for the progress."""
        sampling, stops, rows = self.sampling, set(self.stop_ids), len(variants)
        steering = Steering(
            self.model, variants, self.special_ids, len(self.prompt_ids), self.scope
        )
        still = [r for r, v in enumerate(variants) if v is not None and v.is_neutral]
        noise = torch.Generator().manual_seed(sampling.seed)
        fed = torch.tensor([self.prompt_ids] * rows, device=self.model.device)
        made: list[list[int]] = [[] for _ in range(rows)]
        ended = [False] * rows
        cache = DynamicCache(config=self.model.model.config)
        position, first = 0, torch.empty(0)
        for step in range(sampling.max_new_tokens):
            progress.check()
            steering.expect(fed, position)
            with self.model.intervene(steering.edits()):
                kept = last_logits(self.model, fed, 1, cache)
            position += fed.shape[1]
            check_numbers(kept[:, -1], variants)
            logits = kept[:, -1].float()
            if variants[0] is None and still:
                # Equal rows of one batch may differ in their last bits, which can tip a near tie.
                logits[still] = logits[0].clone()
            if step == 0:
                first = logits.clone()
                self._check_effect(variants, logits, kept.dtype, steering)
            penalised = penalise(logits, sampling.repetition_penalty, self.prompt_ids, made)
            chosen = draw(penalised, sampling, noise)
            for row, token in enumerate(chosen.tolist()):
                if not ended[row]:
                    ended[row] = token in stops
                    if not ended[row]:
                        made[row].append(token)
            fed = chosen[:, None]
            self._tell(progress, step + 1, before, made, after)
            if all(ended):
                break
        return _Rows(made, ended, first)

    def _tell(
        self,
        progress: Progress,
        step: int,
        before: Sequence[list[int]],
        made: Sequence[list[int]],
        after: int,
    ) -> None:
        """Rows that follow one another share the bar."""
        length, done = self.sampling.max_new_tokens, len(before)
        parts = 1 if not (before or after) else done + 1 + after
        texts = [self.tokenizer.decode(tokens) for tokens in (*before, *made)] + [""] * after
        progress.report(done * length + step, parts * length, phase="generate", texts=texts)

    def _check_effect(
        self,
        variants: Sequence[Variant | None],
        logits: Tensor,
        dtype: torch.dtype,
        steering: Steering,
    ) -> None:
        """Fail where a row that is steered in the prompt, by more than what is lost in rounding,
        differs by rounding at most."""
        if variants[0] is None:
            self.reference = logits[0].clone()
        if self.reference is None or not steering.acts:
            return
        rounding = 16 * torch.finfo(torch.float32).eps * float(self.reference.abs().max())
        limit = rounding if dtype == torch.float32 else 0.0
        for row, variant in enumerate(variants):
            if variant is None or not variant.always_acts:
                continue
            moved = float((logits[row] - self.reference).abs().max())
            if moved <= limit and not steering.is_lost(row):
                if self._ends_before_the_text(variant):
                    raise InvalidInput(
                        "Steering these tokens cannot change the text",
                        "After the last layer a token is not read again by later ones.",
                        "Steer the prompt's last token too, or an earlier layer.",
                        field="positions",
                    )
                raise RuntimeError(
                    "Steering changed nothing: the hook point's edit does not reach the logits"
                )

    def _ends_before_the_text(self, variant: Variant) -> bool:
        """Whether it acts only on earlier tokens, and only where nothing reads them any more."""
        scope, last = self.scope or Scope(), self.model.n_layers - 1
        earlier = scope.kind == "chosen" and len(self.prompt_ids) - 1 not in scope.positions
        points = [site.site.output for site in variant.sites]
        return earlier and all(p.layer == last and p.site != "resid_pre" for p in points)

    def result(self, rows: _Rows, together: bool) -> Generated:
        continuations = [
            Continuation(tokens, self.tokenizer.decode(tokens), done)
            for tokens, done in zip(rows.ids, rows.ended, strict=True)
        ]
        return Generated(self.prompt_ids, continuations, together)


def draw(logits: Tensor, sampling: Sampling, noise: torch.Generator) -> Tensor:
    """One token per row of [rows, vocab] by the Gumbel-max trick with the same noise for all."""
    if sampling.temperature == 0:
        return logits.argmax(1)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    if sampling.top_p < 1:
        probabilities, order = scaled.softmax(1).sort(1, descending=True)
        beyond = probabilities.cumsum(1) - probabilities >= sampling.top_p
        scaled = scaled.masked_fill(beyond.gather(1, order.argsort(1)), -math.inf)
    uniform = torch.rand(logits.shape[1], generator=noise, dtype=torch.float64)
    gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
    return (scaled + gumbel.to(scaled)).argmax(1)


def penalise(
    logits: Tensor, penalty: float, prompt_ids: Sequence[int], made: Sequence[Sequence[int]]
) -> Tensor:
    """Logits [rows, vocab] with the repetition penalty on every token that was there before."""
    if penalty == 1.0:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(made):
        seen = torch.tensor(sorted({*prompt_ids, *tokens}), device=logits.device)
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits
