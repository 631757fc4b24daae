"""What a feature fires on, as a rule that can be wrong: fitted on some contexts, tried on others.

A rule says in which contexts a feature is active: in those that contain a certain token, a word in
any spelling, a pair of words, a word with a certain beginning or ending, anything after or before a
certain word, a kind of token, a script, the start of a line, certain positions, or words of a
topic. The rule is the description, so a score of the rule is a score of the description.

All features of a block are fitted together: a family of rules gives every token of every context a
number, and a rule is a set of such numbers and how often they must occur.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mistudio.engine.datasets.characters import classify
from mistudio.engine.datasets.tokenizers import piece

NOTHING = -1  # in `ids`: no token, or one that does not count
MEMBERS = 8
WEAK = 0.6  # balanced accuracy where the contexts were fitted, below which a rule says nothing


@dataclass(frozen=True)
class Family:
    """A kind of rule. Up to `members` alternatives, each of which needs `at_least` one of these
    many matching tokens. `cost` is what its balanced accuracy must be better by to be preferred:
    between rules that do the same the plainer is the better description."""

    name: str
    cost: float
    members: int = 4
    at_least: tuple[int, ...] = (1,)


FAMILIES = (
    Family("token", 0.0),
    Family("word", 0.002),
    Family("pair", 0.006),
    Family("prefix 5", 0.008),
    Family("prefix 3", 0.010),
    Family("suffix 3", 0.010),
    Family("suffix 2", 0.012),
    Family("after", 0.012),
    Family("before", 0.014),
    Family("kind", 0.010, 1, (1, 2, 4, 8)),
    Family("script", 0.010, 1, (1, 2, 4, 8)),
    Family("line", 0.010, 1),
    Family("position", 0.020),
    Family("topic", 0.020, MEMBERS, (1, 2, 3)),
)
BY_NAME = {family.name: i for i, family in enumerate(FAMILIES)}
MEMBER_COST = 0.006  # of each alternative after the first
TOPIC_LETTERS = 3
TOPIC_LIFT = 3.0  # a topic's word is so many times commoner than in contexts drawn at random


@dataclass(frozen=True)
class Rule:
    """One feature's rule: `family`, its alternatives as text, how many matching tokens a context
    needs. `text` is the description."""

    family: str
    members: tuple[str, ...]
    at_least: int
    text: str


class Vocabulary:
    """What each token of a vocabulary looks like, as numbers; 0 means none, and so does the entry
    behind the last token, where `NOTHING` leads."""

    def __init__(self, texts: Sequence[str]) -> None:
        """`texts` [vocabulary]: each token as text, with the blank before it."""
        self.texts = tuple(texts)
        words = [text.strip().lower() for text in texts]
        self.words = ("", *dict.fromkeys(word for word in words if word))
        number = {word: i for i, word in enumerate(self.words)}
        self.word = _table(number[word] for word in words)
        self.token = _table(range(1, len(texts) + 1))
        starts = [text[:1].isspace() for text in texts]
        letters = [word if word.isalpha() else "" for word in words]
        self._parts: dict[str, tuple[str, ...]] = {}
        self._tables: dict[str, np.ndarray] = {}
        for size in (3, 5):
            beginnings = [
                word[:size] if start and len(word) > size else ""
                for word, start in zip(letters, starts, strict=True)
            ]
            self._add(f"prefix {size}", beginnings)
        for size in (2, 3):
            self._add(f"suffix {size}", [w[-size:] if len(w) > size else "" for w in letters])
        self._add("kind", [_kind(text) for text in texts])
        self._add("script", [_script(word) for word in letters])
        self.breaks = np.array([*("\n" in text for text in texts), False])
        self._topical = np.array([*(len(word) >= TOPIC_LETTERS for word in letters), False])

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        return cls([piece(tokenizer, token) for token in range(size)])

    @cached_property
    def topical(self) -> np.ndarray:
        """`word` where the token is of letters, 0 elsewhere."""
        return np.where(self._topical, self.word, 0).astype(np.int32)

    def _add(self, family: str, parts: list[str]) -> None:
        names = ("", *dict.fromkeys(part for part in parts if part))
        number = {name: i for i, name in enumerate(names)}
        self._parts[family] = names
        self._tables[family] = _table(number[part] for part in parts)

    def codes(self, family: str, ids: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The number that each token has in a family, 0 for none.

        `ids` [W, ...] are tokens along the first axis, `first` [...] the position in its window
        of text at which each begins. Same shape as `ids`.
        """
        if family in ("token", "word"):
            found: np.ndarray = (self.token if family == "token" else self.word)[ids]
        elif family in self._tables:
            found = self._tables[family][ids]
        elif family == "topic":
            found = self.topical[ids]
        elif family == "position":
            # 1: position 1; 2: 2 and 3; 3: 4 to 7; and so on.
            shape = (len(ids),) + (1,) * first.ndim
            places = np.maximum(first + np.arange(len(ids)).reshape(shape), 1)
            found = np.where(ids >= 0, np.frexp(places)[1], 0)
        elif family == "before":
            found = np.zeros(ids.shape, np.int32)
            found[:-1] = np.where(ids[:-1] >= 0, self.word[ids[1:]], 0)
        else:
            found = np.zeros(ids.shape, np.int64 if family == "pair" else np.int32)
            here, previous = ids[1:], ids[:-1]
            if family == "line":
                found[1:] = (here >= 0) & self.breaks[previous]
            elif family == "after":
                found[1:] = np.where(here >= 0, self.word[previous], 0)
            else:
                before, after = self.word[previous], self.word[here]
                joined = before.astype(np.int64) * len(self.words) + after
                found[1:] = np.where((before > 0) & (after > 0), joined, 0)
        return found

    def name(self, family: str, code: int) -> str:
        """A number of a family as text."""
        if family == "token":
            return self.texts[code - 1]
        if family in ("word", "after", "before", "topic"):
            return self.words[code]
        if family == "pair":
            return f"{self.words[code // len(self.words)]} {self.words[code % len(self.words)]}"
        if family == "position":
            low, high = 2 ** (code - 1), 2**code - 1
            return str(low) if low == high else f"{low} to {high}"
        return self._parts[family][code] if family in self._parts else ""


@dataclass(frozen=True)
class Rules:
    """Rules of n features: `family` int8 [n] (the place in `FAMILIES`, -1 where there was nothing
    to fit), `members` int64 [n, MEMBERS] (0 fills up), `at_least` int8 [n], `fit` float64 [n]:
    balanced accuracy on the contexts they were fitted on."""

    family: np.ndarray
    members: np.ndarray
    at_least: np.ndarray
    fit: np.ndarray

    def __len__(self) -> int:
        return len(self.family)

    def matches(self, vocabulary: Vocabulary, ids: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Bool [n, m]: in which of each feature's contexts `ids` [W, n, m] its rule holds."""
        found = np.zeros(ids.shape[1:], bool)
        for number, family in enumerate(FAMILIES):
            of = np.flatnonzero(self.family == number)
            if not len(of):
                continue
            codes = vocabulary.codes(family.name, ids[:, of], first[of])
            counts = _counts(codes, self.members[of, : family.members], family.name == "topic")
            found[of] = counts.sum(0) >= self.at_least[of, None]
        return found

    def rule(self, i: int, vocabulary: Vocabulary) -> Rule | None:
        if self.family[i] < 0:
            return None
        family = FAMILIES[self.family[i]].name
        members = tuple(vocabulary.name(family, int(c)) for c in self.members[i] if c > 0)
        at_least = int(self.at_least[i])
        return Rule(family, members, at_least, _text(family, members, at_least))


def fit(
    vocabulary: Vocabulary,
    ids: np.ndarray,
    first: np.ndarray,
    peak: np.ndarray,
    active: np.ndarray,
    inactive: np.ndarray,
    background: np.ndarray,
) -> Rules:
    """The rule of each of n features that tells its active contexts from the inactive ones best.

    `ids` [W, n, m] are the contexts' tokens, `first` [n, m] their positions, `peak` [n, m] the
    place of the strongest token in each; `active` and `inactive` [n, m] say which to fit on.
    `background` float [words] is the share of contexts drawn at random that contain each word.
    Candidates are what stands at the strongest tokens, and for topics the words that active
    contexts have more often than the background.
    """
    n = ids.shape[1]
    best = Rules(
        np.full(n, -1, np.int8),
        np.zeros((n, MEMBERS), np.int64),
        np.ones(n, np.int8),
        np.full(n, -np.inf),
    )
    worth = np.full(n, -np.inf)
    positives, negatives = active.sum(1), inactive.sum(1)
    known = (positives > 0) & (negatives > 0)
    at_peak = np.maximum(peak, 0)[None]
    for number, family in enumerate(FAMILIES):
        codes = vocabulary.codes(family.name, ids, first)
        topic = family.name == "topic"
        if topic:
            candidates = _topic_words(codes, active, background)
        else:
            there = np.take_along_axis(codes, at_peak, axis=0)[0]
            candidates = _commonest(np.where(active, there, 0), family.members)
        totals = np.cumsum(_counts(codes, candidates, topic), axis=0, dtype=np.int32)
        for used in range(1, candidates.shape[1] + 1):
            possible = known & (candidates[:, used - 1] > 0)
            for at_least in family.at_least:
                if topic and at_least > used:
                    continue
                hit = totals[used - 1] >= at_least
                accuracy = balanced_accuracy(hit, active, inactive)
                gain = accuracy - family.cost - MEMBER_COST * (used - 1)
                better = possible & (gain > worth + 1e-9)
                worth[better] = gain[better]
                best.family[better] = number
                best.members[better] = 0
                best.members[better, :used] = candidates[better, :used]
                best.at_least[better] = at_least
                best.fit[better] = accuracy[better]
    best.fit[~np.isfinite(best.fit)] = np.nan
    return best


def balanced_accuracy(hit: np.ndarray, active: np.ndarray, inactive: np.ndarray) -> np.ndarray:
    """float64 [n]: mean of the shares of active contexts that are hit and of inactive ones that
    are not, [n, m] each; NaN where there are none of either."""
    with np.errstate(invalid="ignore"):
        sensitivity = (hit & active).sum(1) / active.sum(1)
        specificity = (~hit & inactive).sum(1) / inactive.sum(1)
    return (sensitivity + specificity) / 2


def word_shares(vocabulary: Vocabulary, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(contexts that contain each word, their number): float64 [words + 1], the last entry being
    the number; of the contexts `chosen` [n, m] of `ids` [W, n, m]."""
    words = np.sort(vocabulary.topical[ids[:, chosen]], axis=0)
    words[1:][words[1:] == words[:-1]] = 0
    counts = np.bincount(words.ravel(), minlength=len(vocabulary.words)).astype(np.float64)
    return np.append(counts, chosen.sum())


def _counts(codes: np.ndarray, members: np.ndarray, once: bool) -> np.ndarray:
    """uint8 [k, n, m]: how many tokens of each context (`codes` [W, n, m]) are each of the
    members [n, k], a member of 0 never; with `once`, whether any is."""
    found = np.zeros((members.shape[1], *codes.shape[1:]), np.uint8)
    for j in range(members.shape[1]):
        wanted = np.where(members[:, j] > 0, members[:, j], -1)[:, None].astype(codes.dtype)
        if not (wanted > 0).any():
            continue
        for row in codes:
            if once:
                found[j] |= row == wanted
            else:
                found[j] += row == wanted
    return found


def _commonest(codes: np.ndarray, k: int) -> np.ndarray:
    """int64 [n, k]: the commonest numbers other than 0 of each row [n, m], commonest first, 0
    filling up. After the first only those that occur twice at least: one peak makes no rule."""
    codes = np.sort(codes, axis=1)
    times = _run_lengths(codes)
    times[codes == 0] = 0
    order = np.argsort(-times, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(codes, order, axis=1).astype(np.int64)
    often = np.take_along_axis(times, order, axis=1)
    found[often < np.where(np.arange(found.shape[1]) == 0, 1, 2)] = 0
    return found


def _run_lengths(rows: np.ndarray) -> np.ndarray:
    """int32, of the shape of the sorted `rows` [n, m]: at the start of each run of equal numbers
    its length, 0 elsewhere."""
    n, m = rows.shape
    begins = np.ones((n, m), bool)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    flat = np.flatnonzero(begins)
    lengths = np.diff(np.append(flat, n * m))
    found = np.zeros(n * m, np.int32)
    found[flat] = lengths
    return found.reshape(n, m)


def _topic_words(codes: np.ndarray, active: np.ndarray, background: np.ndarray) -> np.ndarray:
    """int64 [n, MEMBERS]: words in many active contexts of each feature (`codes` [W, n, m]) and
    in few others, by their log-likelihood ratio, best first, 0 filling up."""
    most = max(int(active.sum(1).max(initial=0)), 1)
    order = np.argsort(~active, axis=1, kind="stable")[:, :most]
    there = np.take_along_axis(active, order, axis=1)
    words = np.take_along_axis(codes, order[None], axis=2)
    words = np.sort(np.where(there, words, 0), axis=0)
    words[1:][words[1:] == words[:-1]] = 0  # once a context
    rows = np.sort(words.transpose(1, 0, 2).reshape(len(active), -1), axis=1)
    times = _run_lengths(rows)
    times[rows == 0] = 0
    share = times / np.maximum(active.sum(1), 1)[:, None]
    lift = share / background[rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where((times >= 3) & (lift > TOPIC_LIFT), times * np.log(lift), -np.inf)
    best = np.argsort(-ratio, axis=1, kind="stable")[:, :MEMBERS]
    found = np.take_along_axis(rows, best, axis=1).astype(np.int64)
    found[~np.isfinite(np.take_along_axis(ratio, best, axis=1))] = 0
    return np.pad(found, ((0, 0), (0, MEMBERS - found.shape[1])))


def _table(numbers: Any) -> np.ndarray:
    return np.fromiter((*numbers, 0), np.int32)


def _kind(text: str) -> str:
    bare = text.strip()
    if not bare:
        return "line breaks" if "\n" in text else "blanks"
    if bare.isdigit():
        return "years" if len(bare) == 4 and bare[0] in "12" else "numbers"
    if bare.isalpha():
        if bare.isupper() and len(bare) > 1:
            return "words in capitals"
        if bare[0].isupper():
            return "capitalised words"
        return "" if text[:1].isspace() else "parts of words"
    if all(classify(character) == "Punctuation" for character in bare):
        return "punctuation"
    return "symbols" if not any(character.isalnum() for character in bare) else ""


def _script(word: str) -> str:
    return classify(word[0]) if word else ""


def _text(family: str, members: tuple[str, ...], at_least: int) -> str:
    quoted = _listed([f'"{visible(member)}"' for member in members])
    plain = _listed(list(members))
    often = f", {at_least} or more in a context" if at_least > 1 else ""
    if family == "token":
        return f"the token{'s' if len(members) > 1 else ''} {quoted}"
    if family == "word":
        # Signs have no other spelling: a blank before them is all that may differ.
        spelt = any(character.isalpha() for member in members for character in member)
        return f"{quoted} in any spelling" if spelt else quoted
    if family == "pair":
        return f"the last word of {quoted}"
    if family.startswith("prefix"):
        return f"words starting with {quoted}"
    if family.startswith("suffix"):
        return f"words ending in {quoted}"
    if family == "after":
        return f"what follows {quoted}"
    if family == "before":
        return f"what comes before {quoted}"
    if family in ("kind", "script"):
        return plain + often
    if family == "line":
        return "the first token of a line"
    if family == "position":
        return f"tokens at position {plain} of a context"
    if family == "topic" and len(members) == 1:
        return f"contexts that contain {quoted}"
    return f"contexts about {', '.join(map(visible, members))}" + (
        f" ({at_least} or more of these words)" if at_least > 1 else ""
    )


def visible(token: str) -> str:
    """A token as it is written in a sentence: line breaks as ↵, tabs as ⇥, lone blanks as ␣, other
    blanks by their names."""
    text = token.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    if text.strip():
        return text
    return "".join("␣" if c == " " else unicodedata.name(c, repr(c)).lower() for c in text)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
