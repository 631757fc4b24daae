"""A tiny llama-like model that brings its own Python program, as its author would publish it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parent / "data" / "tiny-llama-0.9m"

CONFIGURATION = """\
from pathlib import Path

from transformers import PreTrainedConfig

# Proves in the tests that looking runs nothing.
Path(@MARKER@).touch()


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 intermediate_size=48, max_position_embeddings=128, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
"""

LAYERS = """\
import torch
from torch import nn
from torch.nn import functional as F


class OwnNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class OwnAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (
            part(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class OwnMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_norm = OwnNorm(config.hidden_size)
        self.attn = OwnAttention(config)
        self.mlp_norm = OwnNorm(config.hidden_size)
        self.mlp = OwnMLP(config)

    def forward(self, x):
        x = x + self.attn(self.input_norm(x))
        return x + self.mlp(self.mlp_norm(x))
"""

MODELING = """\
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig
from .own_layers import OwnBlock, OwnNorm


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OwnBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = OwnNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
"""

CODE = ("configuration_own.py", "modeling_own.py", "own_layers.py")
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
WIDTH, MLP, LAYER_COUNT, VOCAB = 32, 48, 2, 1024


def write_own_model(folder: Path, marker: Path) -> Path:
    """A whole model folder; `marker` is made when its program is imported, and never before."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": AUTO_MAP,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYER_COUNT,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    marked = CONFIGURATION.replace("@MARKER@", repr(str(marker)))
    for name, text in zip(CODE, (marked, MODELING, LAYERS), strict=True):
        (folder / name).write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights() -> dict[str, torch.Tensor]:
    shapes = {"embed.weight": (VOCAB, WIDTH), "norm.weight": (WIDTH,)}
    shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYER_COUNT):
        at = f"layers.{layer}"
        shapes |= {f"{at}.attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{at}.{part}_norm.weight": (WIDTH,) for part in ("input", "mlp")}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (MLP, WIDTH) for part in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, MLP)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
