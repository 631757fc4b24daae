"""The table of hyper-parameters: every entry explains itself, checks hold, derived values fit."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

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

OPTIONS = {entry.name: entry for entry in fields(TrainingConfig)}
NUMBERS = [name for name, entry in OPTIONS.items() if "minimum" in entry.metadata]
CHOICES = [name for name, entry in OPTIONS.items() if "choices" in entry.metadata]
SWITCHES = [name for name, entry in OPTIONS.items() if entry.type == "bool"]


def test_every_option_has_label_help_and_limits():
    for name, entry in OPTIONS.items():
        assert entry.metadata["label"]
        assert entry.metadata["help"].endswith(".")
        kinds = [name in kind for kind in (NUMBERS, CHOICES, SWITCHES)]
        assert sum(kinds) == 1, f"{name} is a number with limits, a choice or a switch"
        if name in NUMBERS:
            assert entry.metadata["minimum"] < entry.metadata["maximum"]
        if name in CHOICES:
            assert entry.default in entry.metadata["choices"]
    assert len({entry.metadata["label"] for entry in OPTIONS.values()}) == len(OPTIONS)
    assert option("k")["default"] == 32
    with pytest.raises(KeyError):
        option("magic")


def test_what_an_option_applies_to_are_other_options_and_their_choices():
    for name, entry in OPTIONS.items():
        for other, values in entry.metadata.get("only", {}).items():
            assert other != name
            assert other in CHOICES
            assert values
            assert set(values) < set(OPTIONS[other].metadata["choices"])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_read_back_from_text_and_from_json(name):
    entry = OPTIONS[name]
    values = [entry.default]
    if name in NUMBERS:
        values += [entry.metadata["minimum"], entry.metadata["maximum"]]
    values += entry.metadata.get("choices", (True, False) if name in SWITCHES else ())
    for value in values:
        for given in (value, json.loads(json.dumps(value)), str(value)):
            read = getattr(parse({name: given}), name)
            assert read == value
            if isinstance(given, str) and value is not None:
                assert type(read).__name__ == entry.type.split(" ")[0]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_refused_beyond_its_limits(name):
    entry = OPTIONS[name]
    for value in (entry.metadata["minimum"] - 1, entry.metadata["maximum"] * 2, "", "nan", "inf"):
        with pytest.raises(InvalidInput) as caught:
            parse({name: value})
        assert caught.value.field == name
        assert entry.metadata["label"] in caught.value.what
    if entry.type.startswith("int"):
        for value in ("10000.5", 10000.5):
            with pytest.raises(InvalidInput) as caught:
                parse({name: value})
            assert caught.value.field == name
            assert "whole number" in str(caught.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_only_open_options_can_be_left_open(name):
    found = problems(TrainingConfig(**{name: None}))
    assert list(found) == ([] if "None" in OPTIONS[name].type else [name])
    assert name not in NUMBERS or "None" in OPTIONS[name].type or "left open" in found[name]


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name):
    for value in ("magic", "", 3):
        found = problems(TrainingConfig(**{name: value}))
        assert list(found) == [name]
        assert all(choice in found[name] for choice in OPTIONS[name].metadata["choices"])


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off(name):
    assert list(problems(TrainingConfig(**{name: 1}))) == [name]
    for text, wanted in (("ON", True), ("yes", True), ("1", True), ("False", False), ("0", False)):
        assert getattr(parse({name: text}), name) is wanted


def test_ghost_gradients_mean_todays_care_for_dead_latents():
    assert not parse({"ghost_gradients": "off"}).auxk
    assert not parse({"ghost_gradients": False}).revive
    assert parse({"ghost_gradients": True}) == TrainingConfig()
    mixed = parse({"ghost_gradients": "off", "auxk": "on"})
    assert (mixed.auxk, mixed.revive) == (True, False)
    for value in ("perhaps", 1, None):
        with pytest.raises(InvalidInput) as caught:
            parse({"ghost_gradients": value})
        assert caught.value.field == "ghost_gradients"


def test_a_configuration_survives_json():
    config = TrainingConfig(k=8, width=640, skip_share=0.5, mixed_precision=True)
    assert parse(json.loads(json.dumps(asdict(config)))) == config


def test_a_skip_that_passes_everything_on_is_refused():
    for share in (1, 1.0, 2.0, 0.96):
        with pytest.raises(InvalidInput, match="Skip share") as caught:
            parse({"wiring": "skip_sae", "skip": "fixed", "skip_share": share})
        assert caught.value.field == "skip_share"
    for rank in (32, 40):
        with pytest.raises(InvalidInput, match="leaves nothing") as caught:
            derive(TrainingConfig(wiring="skip_sae", skip_rank=rank), 32)
        assert caught.value.field == "skip_rank"
    derive(TrainingConfig(wiring="skip_sae", skip_rank=31), 32)
    derive(TrainingConfig(wiring="skip_sae", skip="fixed", skip_rank=40), 32)  # does not apply


def test_steps_and_width_come_before_tokens_and_expansion():
    plan = derive(TrainingConfig(steps=50, width=100, expansion=8, tokens=10_000_000), 32, 48)
    assert (plan.steps, plan.d_sae, plan.d_in, plan.d_out) == (50, 100, 32, 48)
    assert plan.batch_size == 512  # as for the 100,000 tokens that these steps are
    assert plan.learning_rate == default_learning_rate(50, 32, 100)
    assert plan.dead_window == default_dead_window(50 * 512)
    given = derive(TrainingConfig(batch_size=64, learning_rate=1e-4, dead_window=5000), 32)
    assert (given.batch_size, given.learning_rate, given.dead_window) == (64, 1e-4, 5000)
    assert given.steps == 2_000_000 // 64
    assert (given.d_out, given.d_sae) == (32, 256)


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
    "values",
    [
        {"kk": "1"},
        {"k": "many"},
        {"k": "8.5"},
        {"auxk": "perhaps"},
        {"k": "1e999"},
        {"k": "0"},
        {"sparsity": "none"},
        {"wiring": None},
    ],
)
def test_unreadable_options_are_refused_with_a_sentence(values):
    with pytest.raises(InvalidInput) as caught:
        parse(values)
    assert caught.value.field == next(iter(values))
    assert caught.value.what


def test_more_active_latents_than_latents_is_refused():
    for options in ({"expansion": 1, "k": 64}, {"expansion": 1, "k": 32}, {"width": 40, "k": 40}):
        with pytest.raises(InvalidInput, match="target L0") as caught:
            derive(TrainingConfig(**options), 32)
        assert caught.value.field == "k"
    assert derive(TrainingConfig(width=41, k=40), 32).d_sae == 41


def test_dictionary_size_is_a_multiple_of_eight():
    assert derive(TrainingConfig(expansion=1.3), 100).d_sae == 128


def test_learning_rate_falls_with_width_and_with_the_length_of_the_run():
    def rate(steps, d_sae=4608, d_in=576):
        return default_learning_rate(steps, d_in, d_sae)

    assert rate(300) == rate(1_200) == pytest.approx(3e-3)  # as measured
    assert rate(300, 1_152) == pytest.approx(6e-3)
    rates = [rate(steps) for steps in (1_200, 5_000, 20_000, 100_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 3e-4
    widths = [rate(300, d_sae) for d_sae in (1_152, 4_608, 24_576, 131_072)]
    assert widths == sorted(widths, reverse=True)
    assert rate(300, d_in=2304) == pytest.approx(1.5e-3)


@pytest.mark.parametrize("tokens", [200_000, 2_000_000, 50_000_000])
def test_the_dead_window_fits_into_the_run(tokens):
    assert default_dead_window(tokens) <= tokens / 4
