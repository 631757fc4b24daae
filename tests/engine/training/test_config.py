"""The table of hyper-parameters: every entry explains itself, checks hold, derived values fit."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mistudio.engine.training.config import (
    TrainingConfig,
    default_dead_window,
    default_learning_rate,
    derive,
    option,
    parse,
    problems,
)
from mistudio.errors import InvalidInput


def test_every_option_has_label_and_help():
    for entry in fields(TrainingConfig):
        assert entry.metadata["label"]
        assert entry.metadata["help"].endswith(".")
    assert option("k")["default"] == 32


def test_five_choices_or_fewer_are_essential():
    assert sum(entry.metadata.get("essential", False) for entry in fields(TrainingConfig)) <= 5


def test_defaults_have_no_problem():
    assert problems(TrainingConfig()) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", 8.5),
        ("k", None),
        ("tokens", 3),
        ("tokens", "many"),
        ("sparsity", "magic"),
        ("decay_share", 2.0),
        ("learning_rate", 5.0),
        ("learning_rate", True),
    ],
)
def test_values_out_of_range_are_named(name, value):
    found = problems(TrainingConfig(**{name: value}))
    assert list(found) == [name]
    assert option(name)["label"] in found[name]


def test_text_is_converted_to_the_field_type():
    config = parse({"k": "16", "tokens": "1e6", "auxk": "off", "learning_rate": "auto"})
    assert (config.k, config.tokens, config.auxk) == (16, 1_000_000, False)
    assert config.learning_rate is None
    assert isinstance(config.k, int)


@pytest.mark.parametrize(
    "values", [{"kk": "1"}, {"k": "many"}, {"auxk": "perhaps"}, {"k": "1e999"}, {"k": "0"}]
)
def test_unreadable_options_are_refused_with_a_sentence(values):
    with pytest.raises(InvalidInput) as caught:
        parse(values)
    assert caught.value.field == next(iter(values))
    assert caught.value.what


def test_more_active_latents_than_latents_is_refused():
    with pytest.raises(InvalidInput, match="target L0"):
        derive(TrainingConfig(expansion=1, k=64), 32)


def test_dictionary_size_is_a_multiple_of_eight():
    assert derive(TrainingConfig(expansion=1.3), 100).d_sae == 128


def test_learning_rate_falls_with_the_length_of_the_run():
    rates = [default_learning_rate(steps) for steps in (100, 600, 2_000, 10_000, 100_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 3e-3
    assert rates[3] == pytest.approx(4e-4)


@pytest.mark.parametrize("tokens", [200_000, 2_000_000, 50_000_000])
def test_the_dead_window_fits_into_the_run(tokens):
    assert default_dead_window(tokens) <= tokens / 4
