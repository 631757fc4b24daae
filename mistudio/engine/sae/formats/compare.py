"""Whether two dictionaries are the same function: the check behind every file that is written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation
from mistudio.engine.sae.dictionary import Dictionary

# Relative to the largest value compared; of pre-activations to the largest that their factors
# allow, as a bias that nearly cancels them leaves the rounding of what it cancels.
TOLERANCE = 1e-5


def check_same_function(written: Dictionary, read: Dictionary, where: Path) -> None:
    """RuntimeError where `read` encodes or reconstructs otherwise than `written`.

    Compared are the pre-activations, the activation functions' parameters and what they make of the
    very same pre-activations, and the reconstructions from the same codes: rounding must not decide
    about an entry that lies exactly on a threshold, nor a threshold hide between the samples.
    """
    x = sample_inputs(written)
    with torch.inference_mode():
        pre = written.pre_activations(x)
        codes = written.encode(x)
        checks = {
            "pre-activations": (pre, read.pre_activations(x)),
            "activations": (
                _dense(pre, written.activation.select(pre)),
                _dense(pre, read.activation.select(pre)),
            ),
            "reconstructions": (written.decode(codes, x), read.decode(codes, x)),
        }
    checks |= _parameters(written.activation, read.activation)
    largest = float(x.norm(dim=1).max() * written.encoder.norm(dim=1).max())
    for name, (want, got) in checks.items():
        scale = largest if name == "pre-activations" else 0.0
        if relative_error(want, got, scale) > TOLERANCE:
            raise RuntimeError(f"The SAE in {where} reads back with other {name} than were written")


def sample_inputs(dictionary: Dictionary, n: int = 16) -> Tensor:
    """[n, d_in] of about the size that the dictionary's own biases suggest; always the same."""
    x = torch.randn(n, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    centre = dictionary.centre
    if centre is None:
        centre = dictionary.b_dec
    return x * centre.abs().mean().clamp_min(1.0) + centre


def relative_error(want: Tensor, got: Tensor, scale: float = 0.0) -> float:
    """Largest difference over the largest value (or `scale` where that is larger); infinite where
    the shapes differ."""
    if want.shape != got.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    return float((want - got).abs().max()) / max(float(want.abs().max()), scale, 1e-30)


def _parameters(written: Activation, read: Activation) -> dict[str, tuple[Tensor, Tensor]]:
    """Each parameter of both activation functions, by name; what differs is 1 against 0."""
    if type(written) is not type(read):
        return {"activation functions": (torch.ones(1), torch.zeros(1))}
    pairs = {}
    for name, value in vars(written).items():
        other = vars(read)[name]
        if isinstance(value, Tensor):
            pairs[name] = (value, other)
        elif value != other:
            pairs[name] = (torch.ones(1), torch.zeros(1))
    return pairs


def _dense(pre: Tensor, selected: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    rows, latents, values = selected
    out = torch.zeros_like(pre)
    out[rows, latents] = values
    return out
