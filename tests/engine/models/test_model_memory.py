"""Architectures from configurations alone, and what they will take of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mistudio.engine.models.architecture import describe_architecture, read_architecture
from mistudio.engine.models.loading import load_model, resolve_precision
from mistudio.engine.models.memory import Use, beside, best_fit, plan_all, plan_model, shape_of
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.footprint import Machine, RunShape, memory_phases
from mistudio.engine.training.planning import planned_sites
from mistudio.errors import CorruptFile, OutOfMemory, UnsupportedModel

from . import tiny_models as tiny

GB = 1024**3
LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


def machine(free: float) -> Machine:
    return Machine(int(free), int(free), 100 * GB)


def described(config: dict[str, object]):
    return describe_architecture(json.dumps(config).encode())


def test_a_3b_model_is_described_before_its_weights_are_there() -> None:
    found = described(LLAMA_3B)
    assert found.parameters == 3_212_749_824  # as Meta's model card and the Hub count it
    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads) == (28, 3072, 24, 8)
    assert (found.head_dim, found.d_mlp, found.gated_mlp) == (128, 8192, True)
    assert (found.activation, found.norm, found.positions) == ("silu", "RMSNorm", "rotary")
    assert found.tied_embeddings and found.head_parameters == 0
    block = found.blocks[5]
    assert block.attention == 3072 * 128 * (24 + 8 + 8 + 24)
    assert block.mlp == 3 * 3072 * 8192 and block.norms == 2 * 3072
    assert found.weight_bytes("fp32") == 4 * found.parameters
    assert dict(found.hook_points)["mlp_in"] == ("batch", "tokens", 3072)


def test_gpt2_is_described_as_its_paper_does() -> None:
    found = described(GPT2)
    assert found.parameters == 124_439_808
    assert (found.norm, found.positions, found.gated_mlp) == ("LayerNorm", "learned", False)
    assert (found.d_mlp, found.activation, found.vocab_size) == (3072, "gelu_new", 50257)
    assert found.blocks[0].parameters == 7_087_872


@pytest.mark.parametrize("name", sorted(tiny.BUILDERS))
def test_every_architecture_is_described_as_it_is_built(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = read_architecture(tmp_path)
    assert found.parameters == model.num_parameters()
    assert len(found.blocks) == found.n_layers == 3
    gated = name not in (
        "gpt2",
        "bloom",
        "opt",
        "phi",
        "falcon",
        "neox_parallel",
        "neox_sequential",
    )
    assert found.gated_mlp == gated
    expected = {"gpt2": "learned", "opt": "learned", "bloom": "ALiBi"}.get(name, "rotary")
    assert found.positions == expected
    for block in found.blocks:
        assert block.attention > 0 and block.mlp > 0
        assert (block.norms > 0) == (name != "olmo")  # whose norms learn nothing


@pytest.mark.parametrize("precision", ["fp32", "bf16", "q8", "q4", "q2"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_weight_bytes_are_those_of_the_loaded_model(
    name: str, precision: str, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / name, name)
    decoder = load_model(folder, precision)  # type: ignore[arg-type]
    taken = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    assert read_architecture(folder).weight_bytes(precision, resolve_precision("auto")) == taken


def test_a_3b_model_at_four_bits_fits_16_gb_and_unquantised_does_not_fit_8() -> None:
    found = described(LLAMA_3B)
    plan = plan_model(found, "q4", machine(16 * GB), Use(batch=8, context=128))
    assert plan.fits and plan.memory < 6 * GB
    assert plan.weights == pytest.approx(3_212_749_824 * 5 / 8, rel=0.3)
    chosen = best_fit(found, machine(8 * GB), Use(batch=1))
    assert chosen.precision in ("q8", "bf16") and chosen.fits
    with pytest.raises(OutOfMemory, match="FP32 it needs"):
        plan_model(found, "fp32", machine(8 * GB)).require()


def test_gpt2_small_with_a_training_fits_8_gb() -> None:
    found = described(GPT2)
    small = machine(8 * GB)
    sites = planned_sites(TrainingConfig(), [(6, "resid_post")], 768)
    plan = plan_model(found, "fp32", small)
    phases = memory_phases(RunShape(shape_of(found, plan), sites), small)
    both = plan_model(found, "fp32", small, training=beside(phases))
    assert beside(phases) > 50e6 and both.memory > plan.memory
    assert both.fits


def test_the_choice_is_the_best_that_fits_and_never_two_bits() -> None:
    found = described(GPT2)
    plans = plan_all(found, machine(64 * GB))
    memory = {plan.precision: plan.memory for plan in plans}
    assert next(plan.precision for plan in plans) == "fp32" and set(memory) > {"q8", "q4", "q2"}
    assert memory["fp32"] > memory["bf16"] > memory["q8"] > memory["q4"]
    assert best_fit(found, machine(64 * GB)).precision == resolve_precision("auto")
    at_most = memory["q4"] * 1.11
    assert best_fit(found, machine(at_most)).precision == "q4"
    none = best_fit(found, machine(memory["q2"] * 0.5))
    assert not none.fits and none.precision == "q4"


def test_the_cache_grows_with_the_kept_tokens() -> None:
    found = described(LLAMA_3B)
    plans = [plan_model(found, "bf16", machine(99 * GB), Use(1, 128, kept)) for kept in (0, 1000)]
    assert plans[1].memory - plans[0].memory == 1000 * 28 * 2 * 8 * 128 * 2


# --- configurations that are traps ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1_000_000_000},
        {"num_hidden_layers": -3},
        {"hidden_size": 10**30},
        {"vocab_size": 1e300},
        {"intermediate_size": "many"},
        {"num_hidden_layers": True},
        {"num_attention_heads": 5},
        {"hidden_size": 0},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids=str,
)
def test_configurations_that_no_model_has_are_refused_in_words(change: dict[str, object]) -> None:
    with pytest.raises((CorruptFile, UnsupportedModel)) as refusal:
        described({**LLAMA_3B, **change})
    assert refusal.value.title and refusal.value.next_step


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"a":' * 50_000, b'{"hidden_size":' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "cut", "deep list", "deep object", "5000 digits"],
)
def test_configurations_that_are_no_json_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CorruptFile):
        describe_architecture(data)
