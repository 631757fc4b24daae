"""What a dictionary is trained for: one file per family of activation function.

An objective says which entries of a batch are active, adds the price of sparsity, and gives the
gradient of both by hand. `OBJECTIVES` maps the configuration's `sparsity` to its class.
"""

from __future__ import annotations

from mistudio.engine.training.objectives.base import Backward, Entries, Objective, Weights
from mistudio.engine.training.objectives.gated import GatedObjective
from mistudio.engine.training.objectives.jumprelu import JumpReLUObjective
from mistudio.engine.training.objectives.matryoshka import MatryoshkaObjective
from mistudio.engine.training.objectives.relu import ReLUObjective
from mistudio.engine.training.objectives.topk import BatchTopKObjective, TopKObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "batchtopk": BatchTopKObjective,
    "topk": TopKObjective,
    "matryoshka": MatryoshkaObjective,
    "jumprelu": JumpReLUObjective,
    "standard": ReLUObjective,
    "gated": GatedObjective,
}

__all__ = ["OBJECTIVES", "Backward", "Entries", "Objective", "Weights"]
