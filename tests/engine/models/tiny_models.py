"""Tiny models of many architectures with random weights: two or three layers, 32 channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCAB = 64
LAYERS = 3
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **IDS,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    **IDS,
}
_SHORT: dict[str, Any] = {"vocab_size": VOCAB, "n_layer": LAYERS, "n_head": 4, **IDS}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_SHORT, n_embd=32, n_positions=64)),
    "neox_parallel": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_PLAIN, use_parallel_residual=True)
    ),
    "neox_sequential": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_PLAIN, use_parallel_residual=False)
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GROUPED, head_dim=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT, do_layer_norm_before=True)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            **IDS,
        )
    ),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_GROUPED)),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**_GROUPED)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_SHORT, hidden_size=32)),
}


def seeded(builder: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The same model every time, with noise on every parameter so that norms, biases and position
    tables are not at rest."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = builder()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def build(name: str) -> PreTrainedModel:
    return seeded(BUILDERS[name])


def opt_350m_like() -> PreTrainedModel:
    """Norms behind the additions, narrower embeddings with a projection, no final norm."""
    config = {**_OPT, "word_embed_proj_dim": 16}
    return seeded(lambda: hf.OPTForCausalLM(hf.OPTConfig(**config, do_layer_norm_before=False)))


def granite() -> PreTrainedModel:
    """Residual multipliers: the block adds half of what its modules give."""
    config = hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5)
    return seeded(lambda: hf.GraniteForCausalLM(config))


def bert() -> PreTrainedModel:
    return seeded(lambda: hf.BertForMaskedLM(hf.BertConfig(**_PLAIN)))


def t5() -> PreTrainedModel:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    return seeded(lambda: hf.T5ForConditionalGeneration(config))


def save_tokenizer(folder: Path, vocab: int = VOCAB) -> None:
    """A byte-level BPE tokenizer of at most `vocab` entries; special tokens are 0, 1 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the dog ate the hat"], trainer)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_model(folder: Path, name: str = "llama") -> Path:
    """A complete model folder."""
    build(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
