"""What steering does to a model: which features, how, in which rows of a batch, at which positions.

Every change is a sum of decoder rows, all computed from the unchanged activation x and added once,
so the order of features does not matter and the SAE's error term is kept (nothing is decoded).
With d a feature's decoder row, v = d / |d|, f its activation at x, s the strength and
c = s * max_activation:

    add         x + c d                             (Neuronpedia, SAELens, AxBench)
    clamp       x + (c - f) d                       (Templeton et al. 2024: decoding with f = c)
    clamp_min   x + max(0, c - f) d                 (AxBench)
    scale       x + (s - 1) f d                     (multiplies what is there)
    ablate      x - f d
    orthogonal  x + (s - 1) (x . v) v               (Neuronpedia; s = 0 takes the direction out)
    cap         x + (min(x . v, c |d|) - x . v) v   (Neuronpedia's projection cap, from above)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import InvalidInput

METHODS = ("add", "clamp", "clamp_min", "scale", "ablate", "orthogonal", "cap")
# Those that read how much the feature is active.
READS_ACTIVATION = ("clamp", "clamp_min", "scale", "ablate")
SCOPES = ("all", "generated", "from_last", "last", "chosen")
# More than any text survives; far beyond it float32 overflows.
MOST_STRENGTH = 1e6
# The strength at which a method leaves everything as it is; the others have none.
NEUTRAL = {"add": 0.0, "scale": 1.0, "orthogonal": 1.0}


@dataclass(frozen=True)
class FeatureEdit:
    """One feature and its strength in multiples of `max_activation`, the largest activation that
    discovery saw; the raw coefficient is their product. `scale` and `orthogonal` read the strength
    as a factor, `ablate` does not read it."""

    feature: int
    strength: float
    max_activation: float
    method: str = "add"

    @property
    def coefficient(self) -> float:
        return self.strength * self.max_activation

    @property
    def is_neutral(self) -> bool:
        """Whether it leaves every activation as it is."""
        return NEUTRAL.get(self.method) == self.strength

    def check(self, known: int) -> None:
        """Raises InvalidInput where the method does not exist, the feature is none of `known`, or
        the strength is no number or has no unit."""
        if self.method not in METHODS:
            raise InvalidInput(
                "No such intervention",
                f"“{self.method}” was asked for.",
                f"Choose one of {', '.join(METHODS)}.",
                field="method",
            )
        if not 0 <= self.feature < known:
            raise InvalidInput(
                "No such feature",
                f"Feature {self.feature} was asked for; this SAE has 0 to {known - 1}.",
                "Choose one from the feature list.",
                field="feature",
            )
        if not math.isfinite(self.strength) or abs(self.strength) > MOST_STRENGTH:
            raise InvalidInput(
                "This strength cannot be used",
                f"Feature {self.feature} was given the strength {self.strength:g}.",
                f"Choose a number between -{MOST_STRENGTH:,.0f} and {MOST_STRENGTH:,.0f}; "
                "most features need less than 5.",
                field="strength",
            )
        in_multiples = self.method in ("add", "clamp", "clamp_min", "cap")
        if in_multiples and self.max_activation <= 0 and self.strength:
            raise InvalidInput(
                "This feature never fired",
                f"Feature {self.feature} has no activation to take multiples of.",
                "Choose a feature with examples.",
                field="feature",
            )


def wanted(edit: FeatureEdit) -> int:
    """1 where an edit is to make the text say more of what its feature stands for, -1 where less,
    0 where it leaves everything as it is."""
    if edit.method in ("ablate", "cap"):
        return -1
    at = edit.strength - NEUTRAL.get(edit.method, 0.0)
    if edit.method in ("clamp", "clamp_min"):
        return 1 if at > 0 else -1
    return (at > 0) - (at < 0)


@dataclass(frozen=True)
class SiteSteering:
    """What is done at one site: `edits` by features of `dictionary`, and `vector` [d] added as it
    is. `gain` multiplies decoder rows (dictionaries of normalised activations); the edits that read
    an activation take the token's own standard deviation there, as decoding does."""

    site: Site
    dictionary: Dictionary | None = None
    edits: tuple[FeatureEdit, ...] = ()
    vector: Tensor | None = None
    gain: float = 1.0

    @property
    def is_neutral(self) -> bool:
        still = self.vector is None or not bool(self.vector.any())
        return still and all(edit.is_neutral for edit in self.edits)

    def check(self) -> None:
        """Raises InvalidInput where an edit cannot be made: see `FeatureEdit.check`."""
        for edit in self.edits:
            edit.check(0 if self.dictionary is None else self.dictionary.d_sae)


@dataclass(frozen=True)
class Variant:
    """One steered row. `keep_norm` gives every changed activation its former norm back (repeng).
    `control` is a seed: the change then has the size it would have, at every position, but a fixed
    random direction."""

    sites: tuple[SiteSteering, ...]
    keep_norm: bool = False
    control: int | None = None

    @property
    def is_neutral(self) -> bool:
        return all(site.is_neutral for site in self.sites)

    @property
    def always_acts(self) -> bool:
        """Whether it changes every activation that it may touch, whatever that is."""
        return any(
            (site.vector is not None and bool(site.vector.any()))
            or any(edit.method == "add" and edit.coefficient for edit in site.edits)
            for site in self.sites
        )


def adding(site: Site | HookPoint, vector: Tensor) -> Variant:
    """The variant that adds `vector` [d] at one point."""
    where = site if isinstance(site, Site) else Site.at(site)
    return Variant((SiteSteering(where, vector=vector),))


@dataclass(frozen=True)
class Scope:
    """At which positions steering acts. `all`: prompt and generated tokens; `generated`: only
    those; `from_last`: from the prompt's last token on; `last`: only there; `chosen`: at the
    `positions` of the prompt. Position 0 and special tokens never."""

    kind: str = "all"
    positions: tuple[int, ...] = ()

    def check(self, prompt_tokens: int) -> None:
        if self.kind not in SCOPES:
            raise InvalidInput(
                "No such scope",
                f"“{self.kind}” was asked for.",
                f"Choose one of {', '.join(SCOPES)}.",
            )
        if self.kind != "chosen":
            return
        if not self.positions or not all(0 < p < prompt_tokens for p in self.positions):
            raise InvalidInput(
                "These tokens cannot be steered",
                f"Positions {list(self.positions)} of a prompt of {prompt_tokens} tokens.",
                f"Choose among 1 to {prompt_tokens - 1}; position 0 is never steered."
                if prompt_tokens > 1
                else "Write a longer prompt; its first token is never steered.",
                field="positions",
            )

    def mask(self, places: Tensor, prompt_tokens: int) -> Tensor:
        """Bool [seq] for the absolute positions `places` [seq]."""
        if self.kind == "chosen":
            return torch.isin(places, torch.tensor(self.positions, device=places.device))
        if self.kind == "last":
            return places == prompt_tokens - 1
        first = {"all": 0, "generated": prompt_tokens, "from_last": prompt_tokens - 1}[self.kind]
        return places >= first


def steering_vector(dictionary: Dictionary, edits: Sequence[FeatureEdit]) -> Tensor:
    """sum_f coefficient_f * W_dec[f], float32 [d]: what `add` puts on raw activations."""
    vector = torch.zeros(dictionary.d_out, device=dictionary.device)
    for edit in edits:
        SiteSteering(_ANYWHERE, dictionary, (edit,)).check()
        vector += edit.coefficient * dictionary.decoder[edit.feature]
    return vector


_ANYWHERE = Site.at(HookPoint("resid_post", 0))


# -------------------------------------------------------------------- in a forward pass

# Of the stream's length: with less, float32 logits may move by their rounding alone.
LEAST_SHARE = 1e-4


class Steering:
    """The edits of a batch whose row r does `variants[r]` (None: nothing).

    A forward pass with a KV cache sees only the new positions, so `expect` announces every pass:
    which tokens, and at which absolute position they begin. Register `edits()` with
    `HookedDecoder.intervene`.
    """

    def __init__(
        self,
        model: HookedDecoder,
        variants: Sequence[Variant | None],
        special_ids: Sequence[int],
        prompt_tokens: int,
        scope: Scope | None = None,
    ) -> None:
        self._scope = scope or Scope()
        self._scope.check(prompt_tokens)
        self._prompt_tokens = prompt_tokens
        self._device = model.device
        self._special = torch.as_tensor(sorted(special_ids), device=model.device)
        self._mask: Tensor | None = None
        self.acts = False  # whether any position of the announced pass is steered
        self._points: dict[HookPoint, list[_Part]] = {}
        self._read: dict[HookPoint, Tensor] = {}
        # What is added below this length is lost in rounding, by point; known once it acted there.
        self._least: dict[HookPoint, float] = {}
        self._reads: set[HookPoint] = set()
        keeping = [v is not None and v.keep_norm for v in variants]
        self._keep_norm = torch.tensor(keeping, device=model.device) if any(keeping) else None
        self._controls = [None if v is None else v.control for v in variants]
        self._random: dict[tuple[HookPoint, int], Tensor] = {}
        for row, variant in enumerate(variants):
            for site in variant.sites if variant else ():
                model.check_point(site.site.output)
                site.check()
                part = _Part.of(row, site, model.device)
                self._points.setdefault(site.site.output, []).append(part)
                if site.site.is_transcoder and part.reads_activation:
                    self._reads.add(site.site.input)

    def expect(self, ids: Tensor, first_position: int) -> None:
        """Announce the tokens [rows, seq] of the next forward pass and where they start."""
        places = torch.arange(first_position, first_position + ids.shape[1], device=ids.device)
        counts = self._scope.mask(places, self._prompt_tokens) & (places > 0)
        self._mask = ~torch.isin(ids, self._special) & counts
        self.acts = bool(self._mask.any())
        self._read.clear()

    def edits(self) -> Mapping[HookPoint, Callable[[Tensor], Tensor]]:
        """What to register, by hook point."""
        found: dict[HookPoint, Callable[[Tensor], Tensor]] = {
            point: self._remember(point) for point in self._reads
        }
        for point in self._points:
            found[point] = self._change(point, found.get(point))
        return found

    def _remember(self, point: HookPoint) -> Callable[[Tensor], Tensor]:
        def remember(x: Tensor) -> Tensor:
            self._read[point] = x
            return x

        return remember

    def _change(
        self, point: HookPoint, before: Callable[[Tensor], Tensor] | None
    ) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            if before is not None:
                before(x)
            if self._mask is None or self._mask.shape != x.shape[:2]:
                raise RuntimeError("Steering was not told which tokens this forward pass holds")
            if not self.acts:
                return x
            wide = x.float()
            if point not in self._least:
                usual = float(wide.detach()[self._mask].norm(dim=1).median())
                self._least[point] = usual * max(LEAST_SHARE, 4 * torch.finfo(x.dtype).eps)
            delta = self._delta(point, wide) * self._mask[:, :, None]
            changed = wide + delta
            if self._keep_norm is not None:
                norms = wide.norm(dim=2) / changed.norm(dim=2).clamp_min(1e-12)
                norms = torch.where(self._keep_norm[:, None], norms, 1.0)
                changed = changed * norms[:, :, None]
            return torch.where(self._mask[:, :, None], changed.to(x.dtype), x)

        return change

    def is_lost(self, row: int) -> bool:
        """Whether what is added to a row is too little for the model's precision: whatever it
        changes is lost in rounding, and unchanged logits are no sign of a hook that failed. False
        before it acted."""
        added = [
            (point, part.added)
            for point, parts in self._points.items()
            for part in parts
            if part.row == row and part.added is not None
        ]
        return bool(added) and all(
            point in self._least and float(vector.norm()) < self._least[point]
            for point, vector in added
        )

    def _delta(self, point: HookPoint, x: Tensor) -> Tensor:
        """[rows, seq, d], from the unchanged `x`."""
        delta = torch.zeros_like(x)
        for part in self._points[point]:
            read = self._read.get(part.input, x)
            delta[part.row] += part.delta(x[part.row], read[part.row])
        for row, seed in enumerate(self._controls):
            if seed is not None:
                direction = self._random_direction(point, seed, x.shape[2])
                delta[row] = delta[row].norm(dim=1, keepdim=True) * direction
        return delta

    def _random_direction(self, point: HookPoint, seed: int, width: int) -> Tensor:
        """Unit vector [d], the same at every position and pass."""
        key = (point, seed)
        if key not in self._random:
            generator = torch.Generator().manual_seed((seed * 1009 + point.layer) % 2**64)
            direction = torch.randn(width, generator=generator)
            self._random[key] = (direction / direction.norm()).to(self._device)
        return self._random[key]


@dataclass(frozen=True)
class _Part:
    """One variant's steering at one site: `added` [d] whatever the activation, and features that
    depend on it."""

    row: int
    input: HookPoint
    dictionary: Dictionary | None
    added: Tensor | None
    edits: tuple[FeatureEdit, ...] = ()  # all but `add`
    chosen: Tensor = field(default_factory=lambda: torch.empty(0))  # [n]: features of `edits`
    rows: Tensor = field(default_factory=lambda: torch.empty(0))  # [n, d]: gain * W_dec[feature]
    norms: Tensor = field(default_factory=lambda: torch.empty(0))  # [n]
    gain: float = 1.0

    @classmethod
    def of(cls, row: int, steering: SiteSteering, device: torch.device) -> _Part:
        added = None if steering.vector is None else steering.vector.float().to(device)
        plain = [edit for edit in steering.edits if edit.method == "add"]
        other = tuple(edit for edit in steering.edits if edit.method != "add")
        dictionary = steering.dictionary
        if plain:
            assert dictionary is not None  # checked
            vector = steering.gain * steering_vector(dictionary, plain).to(device)
            added = vector if added is None else added + vector
        if not other:
            return cls(row, steering.site.input, None, added)
        assert dictionary is not None
        chosen = torch.tensor([edit.feature for edit in other], device=dictionary.device)
        rows = steering.gain * dictionary.decoder[chosen].float().to(device)
        norms = rows.norm(dim=1).clamp_min(1e-12)
        return cls(
            row, steering.site.input, dictionary, added, other, chosen, rows, norms, steering.gain
        )

    @property
    def reads_activation(self) -> bool:
        return any(edit.method in READS_ACTIVATION for edit in self.edits)

    def delta(self, x: Tensor, read: Tensor) -> Tensor:
        """[seq, d] for the activation `x` [seq, d] at the output and `read` [seq, d_in] where the
        dictionary reads."""
        total = torch.zeros_like(x) if self.added is None else self.added.expand_as(x)
        if not self.edits:
            return total
        active, size = None, None
        if self.reads_activation:
            assert self.dictionary is not None
            active = self.dictionary.activations(read.float(), self.chosen)
            if self.dictionary.norm == "layer_norm":
                # Decoding multiplies by the token's own deviation; `rows` hold the usual one.
                size = self.dictionary.spread(read.float()) / self.gain
        along = (x @ self.rows.T) / self.norms  # [seq, n]: x . v
        amounts = [self._amount(i, edit, active, along) for i, edit in enumerate(self.edits)]
        if size is not None:
            amounts = [
                amount * size if edit.method in READS_ACTIVATION else amount
                for amount, edit in zip(amounts, self.edits, strict=True)
            ]
        return total + torch.stack(amounts, dim=1) @ self.rows

    def _amount(self, i: int, edit: FeatureEdit, active: Tensor | None, along: Tensor) -> Tensor:
        """How often the decoder row is added, [seq]."""
        if active is not None and edit.method in READS_ACTIVATION:
            f = active[:, i]
            if edit.method == "clamp":
                return edit.coefficient - f
            if edit.method == "clamp_min":
                return (edit.coefficient - f).clamp_min(0)
            return (edit.strength - 1) * f if edit.method == "scale" else -f
        if edit.method == "orthogonal":
            return (edit.strength - 1) * along[:, i] / self.norms[i]
        most = edit.coefficient * self.norms[i]
        return (along[:, i].clamp_max(most) - along[:, i]) / self.norms[i]
