"""Optimisers and learning-rate schedules, from the configuration's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.methods import bitsandbytes
from mistudio.engine.training.config import Plan
from mistudio.errors import Incompatible, InvalidInput

MOMENTUM = 0.9  # of SGD
# Runs here are short: the second moment must forget the first steps' large gradients.
BETAS = (0.9, 0.99)
# Decoder rows have norm 1, encoder rows are shorter: the decoder needs the larger steps.
FACTORS = {"decoder": 2.0}
# What AdamW shrinks. Logarithms (of thresholds, of gains) would not shrink but go to 1, a learnt
# skip is not to be penalised, and decoder rows have norm 1 in any case.
DECAYED = ("encoder", "b_enc", "b_dec", "b_mag")
FALLS_TO = 0.1  # where linear and exponential schedules end


def optimizer(plan: Plan, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """One group a parameter, with the `factor` its learning rate is multiplied by.

    Raises InvalidInput where the device has no such optimiser.
    """
    rate, config = plan.learning_rate, plan.config
    decay = config.weight_decay if config.optimizer == "adamw" else 0.0
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter],
            "factor": FACTORS.get(name, 1.0),
            "weight_decay": decay if name in DECAYED else 0.0,
        }
        for name, parameter in parameters.items()
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=BETAS, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, fused=True)
    device = parameters["encoder"].device.type
    if device != "cuda":
        raise InvalidInput(
            "8-bit Adam needs an NVIDIA GPU",
            f"This run is on {device}.",
            "Choose Adam.",
            field="optimizer",
        )
    try:
        library = bitsandbytes()
    except Incompatible as exc:
        raise InvalidInput(
            "8-bit Adam needs bitsandbytes",
            exc.what,
            "Choose Adam, or install it (pip install bitsandbytes).",
            field="optimizer",
        ) from exc
    made: torch.optim.Optimizer = library.optim.Adam8bit(groups, lr=rate, betas=BETAS)
    return made


def restore(
    optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
) -> None:
    """Take up a copy of what the optimiser kept about a parameter, by its own names."""
    state: dict[str, Any] = {
        name: value.to(parameter.device, copy=True) for name, value in moments.items()
    }
    if "state1" in state:  # bitsandbytes counts steps in Python
        state["step"] = int(state["step"])
    optimizer.state[parameter] = state


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero the moments of these rows of a parameter."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if value.is_floating_point():
            value[rows] = 0.0
        else:  # 8-bit moments are places in a table, and 0 is not its first entry
            value[rows] = int(state[name.replace("state", "qmap")].abs().argmin())


def decay_begins(plan: Plan) -> int:
    """The step from which on the rate falls to 0; `plan.steps` without such a phase."""
    share = plan.config.decay_share
    return plan.steps - (max(1, round(share * plan.steps)) if share else 0)


def learning_rate(plan: Plan, step: int) -> float:
    """The rate of a step: linear warm-up, the schedule, linear decay to 0 at the end."""
    config, steps = plan.config, plan.steps
    warmup = max(1, round(config.warmup_share * steps))
    decay = steps - decay_begins(plan)
    factor = min(1.0, (step + 1) / warmup)
    progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    if config.schedule == "linear":
        factor *= 1.0 - (1.0 - FALLS_TO) * progress
    elif config.schedule == "exponential":
        factor *= FALLS_TO**progress
    elif config.schedule == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * progress))
    if decay and step > steps - decay:
        factor = min(factor, (steps - step) / decay)
    return plan.learning_rate * factor
