"""How text becomes tokens: the choices, what each means, and which of them make a difference.

Plain data without torch, so that a dialog can be drawn from it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mistudio.errors import InvalidInput

PADDINGS = ("pack", "max_length", "longest", "none")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
LONGEST_WINDOW = 131_072  # tokens; more than any model reads that fits on one machine
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class TokenSettings:
    """`max_length` is in tokens, special ones included; `heldout_share` is a share of documents."""

    max_length: int = 512
    padding: str = "pack"
    truncation: str = "longest_first"
    add_special_tokens: bool = True
    attention_mask: bool = True
    heldout_share: float = HELDOUT_SHARE

    @property
    def packed(self) -> bool:
        return self.padding == "pack"

    @property
    def padded(self) -> bool:
        return self.padding in ("max_length", "longest")

    @property
    def truncates(self) -> bool:
        """Whether the end of a long document is cut off. There is never a second text to cut."""
        return not self.packed and self.truncation in ("longest_first", "only_first")

    def check(self) -> None:
        """InvalidInput, with the field, where a value cannot be."""
        if self.padding not in PADDINGS:
            raise _unknown("padding", self.padding, PADDINGS)
        if self.truncation not in TRUNCATIONS:
            raise _unknown("truncation", self.truncation, TRUNCATIONS)
        whole = isinstance(self.max_length, int) and not isinstance(self.max_length, bool)
        if not whole or not 1 <= self.max_length <= LONGEST_WINDOW:
            raise InvalidInput(
                "The maximum length is out of range",
                f"It must be a whole number of tokens from 1 to {LONGEST_WINDOW:,}; "
                f"it is {self.max_length!r}.",
                field="max_length",
            )
        if not 0 <= self.heldout_share <= 1:
            raise InvalidInput(
                "The held-out share is out of range",
                f"It must be between 0 and 1; it is {self.heldout_share!r}.",
                "0.1 keeps one document in ten for judging.",
                field="heldout_share",
            )

    def key(self) -> dict[str, Any]:
        """What a tokenisation is found again by: only what changes the tokens that are stored.

        Two dialogs that differ in a setting without effect share one tokenisation.
        """
        key: dict[str, Any] = {"heldout_share": self.heldout_share}
        if not self.add_special_tokens:
            key["add_special_tokens"] = False
        if self.packed:
            return key
        key |= {
            "padding": self.padding,
            "max_length": self.max_length,
            "truncation": "longest_first" if self.truncates else "do_not_truncate",
        }
        if self.padded and not self.attention_mask:
            key["attention_mask"] = False
        return key

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TokenSettings:
        """Settings from a key, a job's row or a dialog; what is missing has its default."""
        known = {entry.name for entry in fields(TokenSettings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidInput(
                "Unknown tokenisation setting",
                f"{', '.join(unknown)} is not among {', '.join(sorted(known))}.",
                field=unknown[0],
            )
        settings = TokenSettings(**values)
        settings.check()
        return settings

    def describe(self) -> str:
        """One line for a list of tokenisations."""
        held = f"{self.heldout_share:.0%} held out"
        bare = "" if self.add_special_tokens else ", no special tokens"
        if self.packed:
            return f"packed, {held}{bare}"
        names = {
            "max_length": "padded to",
            "longest": "padded to at most",
            "none": "whole windows of",
        }
        name = names[self.padding]
        cut = "cut off" if self.truncates else "continued"
        return f"{name} {self.max_length} tokens, long documents {cut}, {held}{bare}"

    def in_effect(self) -> frozenset[str]:
        """The fields that change anything under the chosen padding: a dialog dims the others."""
        always = {"padding", "add_special_tokens", "heldout_share"}
        if self.packed:
            return frozenset(always)
        always |= {"max_length", "truncation"}
        return frozenset(always | ({"attention_mask"} if self.padded else set()))


def _unknown(field: str, value: str, allowed: tuple[str, ...]) -> InvalidInput:
    return InvalidInput(
        f"Unknown {field} strategy",
        f"{value!r} is not one of {', '.join(allowed)}.",
        field=field,
    )


LABELS: dict[str, dict[str, str]] = {
    "padding": {
        "pack": "Pack (join documents, no padding)",
        "max_length": "Max Length (pad to max_length)",
        "longest": "Longest (pad to longest in batch)",
        "none": "Do Not Pad",
    },
    "truncation": {
        "longest_first": "Longest First",
        "only_first": "Only First Sequence",
        "only_second": "Only Second Sequence",
        "do_not_truncate": "Do Not Truncate",
    },
}

HELP: dict[str, str] = {
    "max_length": "How many tokens one window holds, special tokens included. When packing, it has "
    "no effect: a packed store can be cut into windows of any length, and the training chooses it.",
    "padding": "What happens where a document does not fill a window. Packing is the default for "
    "training: documents follow each other with a separator between them, so every position is "
    "real text and no computing time goes into padding. Choose padding when each window must be "
    "one document of its own.",
    "padding.pack": "Documents are joined with the tokenizer's end-of-text token and cut into "
    "windows. Nothing is cut off and nothing is padded; only the last part of a window at the very "
    "end is left out.",
    "padding.max_length": "One document a window, filled up with padding to the full length. "
    "Padding is marked as special and never counts in a training, a statistic or a feature, but "
    "the model still spends time on it.",
    "padding.longest": "As Max Length, but a batch is only as wide as its longest document, which "
    "saves computing time on short documents.",
    "padding.none": "Only windows that lie whole inside one document are used. Documents shorter "
    "than a window, and the last part of each, are left out.",
    "truncation": "What happens to a document that is longer than a window. The cut is made when "
    "the dataset is tokenised. When packing, nothing is cut off and this has no effect.",
    "truncation.longest_first": "The end of a long document is cut off.",
    "truncation.only_first": "For pairs of texts: cut the first one. Documents here are single "
    "texts, which are always the first: the same as Longest First.",
    "truncation.only_second": "For pairs of texts: cut the second one. Documents here are single "
    "texts and have no second: nothing is cut off, a long document goes on in further windows.",
    "truncation.do_not_truncate": "Nothing is cut off: a long document goes on in further windows.",
    "add_special_tokens": "The tokens that the tokenizer itself puts around a text, such as a "
    "start token. Models expect what they were trained with: leave this on unless you know that "
    "the model was trained without. When packing, off also leaves out the separator between "
    "documents.",
    "attention_mask": "Which positions of a padded window are text and which are padding. It is "
    "not stored as bits: it follows from the documents' lengths and is made when windows are read. "
    "The model's own results do not depend on it, as padding is on the right and a token only sees "
    "what stands before it.",
    "heldout_share": "The share of documents that dictionaries never learn from and are judged on. "
    "A document falls on one side by its text, so that exact copies stay together.",
}
