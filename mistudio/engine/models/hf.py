"""What we use of transformers, imported in one place.

transformers imports its parts lazily and is not safe when two threads are the first to ask for
them: the second gets "cannot import name". Whoever comes here second waits for the first, as
Python locks a module while it is imported; so nothing else in miStudio imports transformers.
"""

from __future__ import annotations

import torch  # noqa: F401 (first, so that one thread pays for it)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import ConversionOps
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "CONFIG_MAPPING",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Conv1D",
    "ConversionOps",
    "DynamicCache",
    "GenerationConfig",
    "HfQuantizer",
    "LlamaConfig",
    "LlamaForCausalLM",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "QuantizationConfigMixin",
    "logging",
    "modeling_auto",
    "register_quantization_config",
    "register_quantizer",
]
