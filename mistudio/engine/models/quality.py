"""What quantising costs a model: its loss on sample text against the unquantised model's.

    delta CE = CE(quantised) - CE(unquantised)

in nats per token: the mean, over all predicted tokens of the same documents, of the negative
logarithm of the probability that the model gave to the token that came. The first token of each
document is predicted from the separator alone. The standard error takes documents as independent
and their token counts as random (ratio estimator): sqrt(sum (d_i - delta n_i)^2) / sum n_i, with
d_i the difference of the losses summed over document i and n_i its predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistudio.engine.models.loading import adds_bos, separator_id
from mistudio.engine.models.methods import method_of
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

if TYPE_CHECKING:
    from mistudio.engine.models.hf import PreTrainedTokenizerBase
    from mistudio.engine.models.hooks import HookedDecoder

DOCUMENTS = 64
CONTEXT = 128  # tokens of each document that are predicted, at most
LEAST_TOKENS = 16  # shorter documents are left out
LOGIT_CELLS = 32 * 1024**2  # of one batch
# delta CE in nats per token up to which a verdict holds. 0.05 makes each token 5 % less likely,
# which is less than what separates neighbouring sizes of a model family; 0.2, a perplexity a fifth
# higher, is about where 4-bit methods leave models of 100 million parameters (nf4 on SmolLM2-135M:
# 0.16 to 0.23, as the text is; its int8: nothing); one nat is a factor of 2.7 for every token.
FAITHFUL, USABLE, DEGRADED = 0.05, 0.2, 1.0


@dataclass(frozen=True)
class DocumentLosses:
    """Summed negative log-likelihoods in nats and numbers of predictions, by document."""

    precision: str
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def ce(self) -> float:
        return sum(self.losses) / sum(self.tokens)


@dataclass(frozen=True)
class Quality:
    """A quantised model beside the unquantised one; nats per token.

    `error` is the standard error of `delta` by document. `verdict` is "faithful", "usable",
    "degraded" or "destroyed" (or "unreadable" where the unquantised model itself does not predict
    the text), `sentence` the same in words. `method` is what quantised (`methods.method_of`).
    """

    precision: str
    reference: str
    ce: float
    ce_reference: float
    delta: float
    error: float
    tokens: int
    documents: int
    guessing: float
    verdict: str
    sentence: str
    method: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no NaN."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@torch.inference_mode()
def document_losses(
    decoder: HookedDecoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    documents: int = DOCUMENTS,
    context: int = CONTEXT,
    progress: Progress = SILENT,
) -> DocumentLosses:
    """Losses of the first `documents` texts that are long enough, each on its own.

    Raises `InvalidInput` where there are none.
    """
    from mistudio.engine.models.quantise import precision_of

    rows = list(islice(_rows(tokenizer, texts, context), documents))
    if not rows:
        raise InvalidInput("There is no text to judge by", "No document is long enough.")
    batch = max(1, min(8, LOGIT_CELLS // ((context + 1) * decoder.vocab_size)))
    losses: list[float] = []
    # Documents of like length together, so that little is padding; told in the given order.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: dict[int, float] = {}
    for first in range(0, len(order), batch):
        progress.check()
        progress.report(first, len(order), "Measuring the loss")
        some = order[first : first + batch]
        for index, loss in zip(some, _losses(decoder, [rows[i] for i in some]), strict=True):
            found[index] = loss
    losses = [found[index] for index in range(len(rows))]
    progress.report(len(order), len(order), "Measuring the loss")
    return DocumentLosses(
        precision_of(decoder.model), tuple(losses), tuple(len(row) - 1 for row in rows)
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], context: int
) -> Iterable[list[int]]:
    bos = adds_bos(tokenizer)
    start = separator_id(tokenizer) if bos is None else bos
    for text in texts:
        ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) >= LEAST_TOKENS:
            yield [start, *ids[:context]]


def _losses(decoder: HookedDecoder, rows: Sequence[list[int]]) -> list[float]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])
    # Padding lies behind the text, where a causal model does not look from it.
    logits: Tensor = decoder.model(input_ids=ids.to(decoder.device), use_cache=False).logits
    sums = []
    for index, row in enumerate(rows):
        targets = torch.tensor(row[1:], device=logits.device)
        loss = torch.nn.functional.cross_entropy(
            logits[index, : len(row) - 1].float(), targets, reduction="sum"
        )
        sums.append(float(loss))
    return sums


def compare(quantised: DocumentLosses, reference: DocumentLosses, vocab_size: int) -> Quality:
    """The cost of quantising, from the losses of both models on the same documents."""
    if quantised.tokens != reference.tokens:
        raise ValueError("the two models were not measured on the same documents")
    total = sum(reference.tokens)
    differences = [a - b for a, b in zip(quantised.losses, reference.losses, strict=True)]
    delta = sum(differences) / total
    error = math.sqrt(
        sum((d - delta * n) ** 2 for d, n in zip(differences, reference.tokens, strict=True))
    )
    guessing = math.log(vocab_size)
    verdict = judge(delta, quantised.ce, reference.ce, guessing)
    return Quality(
        precision=quantised.precision,
        reference=reference.precision,
        ce=quantised.ce,
        ce_reference=reference.ce,
        delta=delta,
        error=error / total,
        tokens=total,
        documents=len(reference.tokens),
        guessing=guessing,
        verdict=verdict,
        sentence=_SENTENCES[verdict].format(
            name=quantised.precision.upper(),
            delta=f"{delta:+.3f}",
            percent=f"{100 * math.expm1(min(max(delta, -5.0), 5.0)):.0f}",
            ce=f"{quantised.ce:.2f}",
            guessing=f"{guessing:.1f}",
        ),
        method=method_of(quantised.precision),
    )


def judge(delta: float, ce: float, reference: float, guessing: float) -> str:
    """The verdict; a model that predicts no better than guessing is destroyed whatever it was."""
    if not reference < guessing:  # also where it is not a number
        return "unreadable"
    if not math.isfinite(ce) or delta > DEGRADED or ce >= guessing:
        return "destroyed"
    if delta > USABLE:
        return "degraded"
    return "usable" if delta > FAITHFUL else "faithful"


_SENTENCES = {
    "faithful": "{name} predicts as the unquantised model does ({delta} nats per token).",
    "usable": "{name} is a little worse than the unquantised model ({delta} nats per token, "
    "perplexity {percent} % higher): what you find holds for the model as it is quantised.",
    "degraded": "{name} is clearly worse than the unquantised model ({delta} nats per token, "
    "perplexity {percent} % higher): what you find may be the damage, not the model.",
    "destroyed": "{name} has destroyed this model ({delta} nats per token; its loss is {ce}, "
    "guessing gives {guessing}). Choose a higher precision, or a larger model.",
    "unreadable": "The unquantised model does not predict the sample text better than guessing "
    "({guessing} nats per token), so that nothing can be said of {name}: its tokenizer may not be "
    "its own, or it has not learnt this language.",
}
