"""The statistics of features: what each is called, what it means, in which unit, and of how many
observations it is. The one place that the table, its tooltips and the documentation are made from.

A column is one array [n_features] in a discovery's `columns` folder. Discovery writes those of
`DISCOVERY`; analyses add theirs later with `store.add_columns`, so a store may lack some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Column:
    """One statistic. `sample` names where the number of observations stands: a field of
    `FeatureMeta` (`tokens`, `contexts`, `n_features`) or another column (`n_active`: that
    feature's own); "" where there is nothing to count. `better` is "higher", "lower" or "" (none
    is). Where a feature has no such number (it never fired) a float column holds NaN and `none`
    says what an integer column holds."""

    name: str
    label: str
    unit: str
    definition: str
    sample: str
    better: str = ""
    dtype: str = "float32"
    none: int | None = None


BANDS = ("dead", "ultra-rare", "rare", "normal", "frequent", "dense")
BAND_EDGES = (1e-6, 1e-5, 1e-2, 1e-1)  # densities between ultra-rare and the ones that follow

LEAST_CONTEXTS = 20  # activating contexts, fewer of which give no score
NEARLY_ALL = 0.9  # share of contexts beyond which hardly any are left without a feature
_OF_ACTIVE = "of the tokens on which the feature is active"

DISCOVERY = (
    Column(
        "n_active",
        "Active tokens",
        "tokens",
        "Tokens on which the feature's activation is above 0, of those that count: position 0, "
        "special tokens and tokens whose norm is over ten times the layer's median never do.",
        "tokens",
        dtype="int64",
    ),
    Column(
        "density",
        "Density",
        "share of tokens",
        "Active tokens divided by the tokens that count.",
        "tokens",
    ),
    Column(
        "n_contexts",
        "Active contexts",
        "contexts",
        "Contexts with at least one active token.",
        "contexts",
        dtype="int64",
    ),
    Column(
        "context_density",
        "Context density",
        "share of contexts",
        "Contexts with at least one active token, divided by all contexts.",
        "contexts",
    ),
    Column(
        "band",
        "Frequency band",
        "",
        "By density: dead (never active), ultra-rare (below 1 in 1,000,000 tokens), rare (below 1 "
        "in 100,000), normal (up to 1 in 100), frequent (up to 1 in 10), dense (more).",
        "tokens",
        dtype="uint8",
    ),
    Column(
        "max_activation",
        "Max activation",
        "activation",
        "The strongest activation on any token that counts; 0 where the feature never fired.",
        "n_active",
    ),
    Column(
        "p99_activation",
        "99th percentile",
        "activation",
        f"99 % {_OF_ACTIVE} have at most this activation. Read from a histogram of 16 bins an "
        "octave, so within 4.5 %.",
        "n_active",
    ),
    Column(
        "median_activation",
        "Median activation",
        "activation",
        f"Half {_OF_ACTIVE} have at most this activation. Read from a histogram of 16 bins an "
        "octave, so within 4.5 %.",
        "n_active",
    ),
    Column(
        "mean_activation",
        "Mean activation",
        "activation",
        f"The mean activation {_OF_ACTIVE}; 0 where there are none.",
        "n_active",
    ),
    Column(
        "std_activation",
        "Standard deviation",
        "activation",
        f"The standard deviation of the activation {_OF_ACTIVE}; 0 where there are none.",
        "n_active",
    ),
    Column(
        "skewness",
        "Skewness",
        "",
        f"The third standardised moment of the activation {_OF_ACTIVE}: above 0, a few tokens "
        "activate the feature far more strongly than most.",
        "n_active",
    ),
    Column(
        "kurtosis",
        "Excess kurtosis",
        "",
        f"The fourth standardised moment less 3 of the activation {_OF_ACTIVE}: 0 for a normal "
        "distribution, above it for heavier tails.",
        "n_active",
    ),
    Column(
        "relative_norm",
        "Relative strength",
        "median norms",
        "Max activation times the length of the decoder direction, divided by the median norm of "
        "the layer's activations: how large the feature's largest contribution is.",
        "n_active",
    ),
    Column(
        "encoder_cosine",
        "Encoder–decoder cosine",
        "",
        "Cosine of the feature's encoder and decoder directions; none for transcoders whose "
        "input and output differ in width.",
        "",
    ),
    Column(
        "burst_length",
        "Burst length",
        "tokens",
        "Mean length of the runs of neighbouring tokens on which the feature is active: 1 for "
        "single tokens, more for phrases and topics.",
        "n_active",
    ),
    Column(
        "active_share",
        "Active share in context",
        "share of tokens",
        "In the contexts where the feature fires at all: the share of tokens on which it does.",
        "n_contexts",
    ),
    Column(
        "top_token",
        "Top token",
        "token id",
        "The token that is most often the strongest one of the top examples.",
        "n_examples",
        dtype="int32",
        none=-1,
    ),
    Column(
        "top_token_share",
        "Top token share",
        "share of examples",
        "The share of the top examples whose strongest token is the top token.",
        "n_examples",
    ),
    Column(
        "common_token",
        "Commonest token",
        "token id",
        "The token on which the feature is active most often, weak activations included.",
        "n_active",
        dtype="int32",
        none=-1,
    ),
    Column(
        "common_token_share",
        "Commonest token share",
        "share of active tokens",
        "The share of its active tokens that are its commonest token.",
        "n_active",
    ),
    Column(
        "token_recall",
        "Fires on its token",
        "share of occurrences",
        "The share of its commonest token's occurrences in the text on which the feature fires.",
        "tokens",
    ),
    Column(
        "token_purity",
        "Token purity",
        "share of examples",
        "The share of the commonest token among the examples of all deciles of activation (up to "
        "10 each): 1 where the feature fires on one token only. Upper and lower case and the blank "
        "before a word make no difference.",
        "n_decile_examples",
    ),
    Column(
        "token_entropy",
        "Token entropy",
        "share of the largest",
        "Entropy of the tokens of the examples of all deciles, divided by the logarithm of their "
        "number: 0 where all are the same token, 1 where all differ.",
        "n_decile_examples",
    ),
    Column(
        "n_examples",
        "Top examples",
        "examples",
        "How many top examples are kept.",
        "contexts",
        dtype="uint16",
    ),
    Column(
        "n_decile_examples",
        "Decile examples",
        "examples",
        "How many examples are kept over all ten deciles of activation, at most 10 each.",
        "n_active",
        dtype="uint16",
    ),
)

# What analyses of the decoder directions add.
ANALYSES = (
    Column(
        "nearest_cosine",
        "Nearest decoder",
        "",
        "The largest cosine of its decoder direction to another feature's: near 1, the two are "
        "duplicates or one was split.",
        "n_features",
        "lower",
    ),
    Column(
        "nearest_feature",
        "Nearest feature",
        "feature",
        "The feature whose decoder direction has the largest cosine to this one's.",
        "n_features",
        dtype="int32",
        none=-1,
    ),
    Column(
        "logit_std",
        "Logit deviation",
        "logits",
        "Standard deviation over the vocabulary of what the feature's direction adds to each "
        "token's logit, final norm folded in: how much it says directly about the next token.",
        "",
    ),
    Column(
        "logit_skewness",
        "Logit skewness",
        "",
        "Third standardised moment of the same: above 0, it promotes a few tokens; below, it "
        "suppresses a few.",
        "",
    ),
    Column(
        "logit_kurtosis",
        "Logit kurtosis",
        "",
        "Fourth standardised moment less 3 of the same: large where few tokens stand out.",
        "",
    ),
    Column(
        "logit_top_gap",
        "Logit gap",
        "standard deviations",
        "Mean of the ten most promoted tokens' logits less the mean of all, divided by their "
        "standard deviation.",
        "",
    ),
    Column(
        "input_score",
        "Input score",
        "share of examples",
        "The share of the top examples whose strongest token is among the 20 tokens that the "
        "feature promotes most (Arad et al. 2025).",
        "n_examples",
    ),
)

_TRIED = (
    "on contexts of documents that the rule was not fitted on: up to 50 active ones from all "
    "deciles, up to 50 inactive ones, half of these with one of the feature's commonest tokens"
)

# What the rule scorer adds (`score.Scores.columns`).
SCORES = (
    Column(
        "score",
        "Interpretability",
        "0 to 1",
        "How well a short rule tells where the feature is active: twice the balanced accuracy "
        "above 0.5, never below 0. 0 is chance, 1 never wrong. None where fewer than 20 contexts "
        "activate it, or hardly any does not.",
        "score_contexts",
        "higher",
    ),
    Column(
        "score_accuracy",
        "Balanced accuracy",
        "share of contexts",
        "The mean of the shares of active and of inactive contexts that the rule is right about, "
        f"{_TRIED}. What rules get on other features' contexts beyond 0.5 is taken off.",
        "score_contexts",
        "higher",
    ),
    Column(
        "score_low",
        "Accuracy, lower bound",
        "share of contexts",
        "Lower end of the 95 % interval of the balanced accuracy, by a bootstrap over contexts. "
        "From 0.70 on the feature counts as interpretable.",
        "score_contexts",
        "higher",
    ),
    Column(
        "score_high",
        "Accuracy, upper bound",
        "share of contexts",
        "Upper end of the 95 % interval of the balanced accuracy, by a bootstrap over contexts.",
        "score_contexts",
        "higher",
    ),
    Column(
        "score_percentile",
        "Percentile of the null",
        "%",
        "The share of rules of other features that do worse on their contexts than this "
        "feature's rule on its own: near 100, the rule is about this feature and no other.",
        "score_contexts",
        "higher",
    ),
    Column(
        "score_contexts",
        "Contexts tried",
        "contexts",
        "Contexts that the balanced accuracy is of, active and inactive ones; 0 where there is "
        "no score.",
        "",
        dtype="int32",
        none=0,
    ),
)


def why_no_score(n_contexts: int, context_density: float) -> str:
    """A sentence in place of the score of a feature that has none, by its own statistics."""
    if not n_contexts:
        return "Never active in this text."
    if n_contexts < LEAST_CONTEXTS:
        return f"Active in {n_contexts} contexts only; a score takes {LEAST_CONTEXTS}."
    if context_density > NEARLY_ALL:
        return (
            f"Active in {100 * context_density:.0f} % of all contexts: too few are left without "
            "it to tell them apart."
        )
    return "Its contexts lie in too few documents to try a rule on others than it was made from."


TABLE = DISCOVERY + ANALYSES + SCORES
BY_NAME = {column.name: column for column in TABLE}


def bands(n_active: np.ndarray, tokens: int) -> np.ndarray:
    """uint8 [n]: the place in `BANDS` of each feature."""
    found = 1 + np.searchsorted(BAND_EDGES[:2], n_active / max(tokens, 1), side="right")
    density = n_active / max(tokens, 1)
    found += (density > BAND_EDGES[2]).astype(np.int64) + (density > BAND_EDGES[3])
    return np.where(n_active > 0, found, 0).astype(np.uint8)
