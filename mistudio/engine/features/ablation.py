"""What a latent does to the model's predictions, by taking it away: real forward passes.

Nothing is decoded: at a position where latent i is active with f_i, what is added to the site's
output is -f_i d_i, so the error term of the dictionary stays where it is. The same amounts along
random directions of equal norm, at the same positions, tell what any change of that size does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.positions import counted
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import Edit, HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.loss import CHUNK_CELLS, LOGIT_CELLS, check_fit
from mistudio.engine.sae.site import Site
from mistudio.errors import InvalidInput

MODES = ("zero", "mean")
CONTROLS = 5
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its 95 % interval: 2.5 and 97.5 percentiles of a bootstrap over
    contexts, as tokens of one context are no independent draws. NaN for a single context."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """Over `tokens` predictions in `contexts` contexts.

    `delta_ce`: cross-entropy with the change less that without it, nats. `kl`: KL(p || p_changed)
    over the vocabulary, nats. `changed`: share whose most likely next token is another one.
    `ce`: mean cross-entropy without the change, nats; perplexity is exp of it, and with the
    change exp of its sum with `delta_ce`.
    """

    tokens: int
    contexts: int
    delta_ce: Estimate
    kl: Estimate
    changed: Estimate
    ce: float


@dataclass(frozen=True)
class Group:
    """One kind of positions: the latent taken away, the same along `CONTROLS` random directions
    (mean over them), and the difference, paired by context. `above` is how many of the random
    directions the latent's mean KL exceeds."""

    feature: Effect
    control: Effect | None
    excess_ce: Estimate | None
    excess_kl: Estimate | None
    above: int


@dataclass(frozen=True)
class TokenEffects:
    """[contexts, tokens] each: the latent's activation (0 where it is left alone), and for the
    prediction made there NaN where it does not count. `ce` is of the model as it is; `before`
    and `after` int32 are the most likely next tokens without and with the change, -1 where the
    prediction does not count."""

    activations: np.ndarray
    ce: np.ndarray
    delta_ce: np.ndarray
    kl: np.ndarray
    changed: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Ablation:
    """What taking latent `feature` away at its active positions does.

    `active` is over the predictions made at active positions, `following` over all other ones
    behind the first active position of their context, `everywhere` over all that count (no
    control); None where there are none. `raised` and `lowered` are the tokens (id, change of
    their log-probability, nats, mean over the active predictions) that move most. `resumed_at`
    is the first layer that the changed passes ran: what lies before it does not change.
    """

    feature: int
    mode: str
    controls: int
    contexts: int
    active: Group | None
    following: Group | None
    everywhere: Effect | None
    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]
    per_token: TokenEffects
    resumed_at: int


@torch.inference_mode()
def ablate(
    model: HookedDecoder,
    dictionary: Dictionary,
    site: Site,
    feature: int,
    ids: Tensor,
    *,
    medians: Mapping[HookPoint, float],
    special_ids: Sequence[int],
    mode: str = "zero",
    mean_activation: float | None = None,
    controls: int = CONTROLS,
    seed: int = 0,
    top: int = 10,
    batch: int = 4,
    progress: Progress = SILENT,
) -> Ablation:
    """Take latent `feature` away on the contexts `ids` [n, seq].

    Position 0, special tokens and norm outliers (`medians`, of all the site's points) are left
    alone and never measured, nor are predictions of special tokens. `mode` "zero" sets the
    activation to 0; "mean" to `mean_activation`, the latent's mean over all tokens, active or
    not. Raises InvalidInput for a latent, mode or text that will not do, Incompatible where the
    dictionary does not fit the site.
    """
    check_fit(model, site, dictionary)
    _check(dictionary, feature, ids, mode, mean_activation)
    passes = _Passes(model, site)
    baseline = 0.0 if mode == "zero" else float(mean_activation or 0.0)
    direction = _direction(dictionary, feature)
    random = [random_direction(direction, seed + i) for i in range(controls)]
    meter = _Meter(len(ids), ids.shape[1], controls, model.vocab_size)
    batch = max(1, min(batch, LOGIT_CELLS // (ids.shape[1] * model.vocab_size)))
    for start in range(0, len(ids), batch):
        progress.check()
        rows = ids[start : start + batch].to(model.device)
        clean = passes.clean(rows)
        mask = counted(rows, passes.read_at(site.points), medians, special_ids)
        activations, amounts = _amounts(
            dictionary, feature, passes.read_at((site.input,))[site.input], mask, baseline
        )
        places = _Places(rows, mask, activations, special_ids)
        changed = passes.changed(-amounts[..., None] * direction)
        meter.add_feature(start, places, clean, changed)
        for number, other in enumerate(random):
            progress.check()
            if places.behind.any():
                logits = passes.changed(-amounts[..., None] * other)
                meter.add_control(number, start, places, clean, logits)
        progress.report(start + len(rows), len(ids), phase="ablation")
    return meter.result(feature, mode, passes.resumed_at, top, seed)


def example_windows(store: FeatureStore, feature: int, limit: int = 64) -> np.ndarray:
    """int64 [n], n <= limit: the windows of text to ablate a feature on, ascending; half of them
    where it is strongest, the rest (and what either side leaves) from all tenths of its
    activations alike. Windows are `store.meta.context` tokens of the store's split."""
    top = np.array(store.top[feature])
    tenths = np.array(store.deciles[feature]).T.ravel()  # one of each tenth, then the next
    strongest = list(dict.fromkeys(top["window"][top["value"] > 0].tolist()))
    sampled = list(dict.fromkeys(tenths["window"][tenths["value"] > 0].tolist()))
    first = set(strongest[: limit // 2])
    rest = [window for window in sampled if window not in first][: limit - limit // 2]
    chosen = dict.fromkeys(rest + strongest + sampled)
    return np.sort(np.array(list(chosen)[:limit], np.int64))


def random_direction(like: Tensor, seed: int) -> Tensor:
    """A direction drawn evenly from all, with the norm of `like` [d]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(like), generator=generator).to(like.device)
    return drawn * (like.norm() / drawn.norm())


def _check(
    dictionary: Dictionary, feature: int, ids: Tensor, mode: str, mean_activation: float | None
) -> None:
    if not 0 <= feature < dictionary.d_sae:
        raise InvalidInput(
            "No such feature",
            f"Feature {feature} was asked for; this SAE has 0 to {dictionary.d_sae - 1}.",
            "Choose one from the feature list.",
            field="feature",
        )
    if mode not in MODES:
        raise InvalidInput(
            "Unknown way to ablate",
            f'"{mode}" is not one.',
            f"Choose one of {', '.join(MODES)}.",
            field="mode",
        )
    if mode == "mean" and mean_activation is None:
        raise InvalidInput(
            "The mean activation is not known",
            "Setting a feature to its mean needs the mean.",
            "Choose the mode zero, or run discovery first.",
            field="mode",
        )
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        raise InvalidInput(
            "Nothing to ablate on",
            f"The text has the shape {tuple(ids.shape)}; contexts of two tokens and more are "
            "needed.",
            "Choose a feature with examples.",
        )


def _direction(dictionary: Dictionary, feature: int) -> Tensor:
    """What one unit of activation adds to raw activations, float32 [d_out]."""
    out_scale = dictionary.scale if dictionary.out_scale is None else dictionary.out_scale
    return dictionary.decoder[feature].float() / out_scale


def _amounts(
    dictionary: Dictionary, feature: int, x: Tensor, mask: Tensor, baseline: float
) -> tuple[Tensor, Tensor]:
    """(activation, units of the direction to take away) at each position, [batch, seq]; both 0
    where the latent is not active or the position does not count."""
    rows = x[mask].float()
    found = dictionary.activations(rows, torch.tensor([feature], device=rows.device))[:, 0]
    taken = torch.where(found > 0, found - baseline, found)
    if dictionary.norm == "layer_norm":  # decoding multiplies by the token's own spread
        taken = taken * rows.std(dim=1)
    activations = torch.zeros(mask.shape, device=x.device)
    amounts = torch.zeros(mask.shape, device=x.device)
    activations[mask], amounts[mask] = found, taken
    return activations, amounts


class _Passes:
    """Forward passes with and without a change, the latter from the first layer it touches on.

    The stream before that layer is kept from the clean pass, and the blocks before it hand their
    input on. Whether a model's passes may be shortened so is tried on the first batch: the
    logits without a change must be the clean ones, bit for bit; else all layers run.
    """

    def __init__(self, model: HookedDecoder, site: Site) -> None:
        self._model, self._site = model, site
        layer, point = site.output.layer, site.output
        if point.site == "resid_post" and layer + 1 < model.n_layers:
            layer, point = layer + 1, HookPoint("resid_pre", layer + 1)
        self._start, self._point = HookPoint("resid_pre", layer), point
        self._skipped = [
            model.model.get_submodule(model.module_path(HookPoint("resid_post", i)))
            for i in range(layer)
        ]
        self._read: dict[HookPoint, Tensor] = {}
        self._short: bool | None = None
        self._ids = torch.empty(0)

    @property
    def resumed_at(self) -> int:
        return self._start.layer if self._short else 0

    def clean(self, ids: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of the model as it is."""
        self._ids = ids

        def reader(point: HookPoint) -> Edit:
            def read(x: Tensor) -> Tensor:
                self._read[point] = x.clone()
                return x

            return read

        plain: list[bool] = []
        handles = [
            block.register_forward_hook(lambda _m, _a, out: plain.append(isinstance(out, Tensor)))
            for block in self._skipped
        ]
        try:
            with self._model.intervene({p: reader(p) for p in {self._start, *self._site.points}}):
                logits = self._logits()
        finally:
            for handle in handles:
                handle.remove()
        if self._short is None:
            self._short = False
            if self._skipped and all(plain):
                self._short = True
                untouched = torch.zeros_like(self._read[self._site.output], dtype=torch.float32)
                self._short = torch.equal(self.changed(untouched), logits)
        return logits

    def read_at(self, points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        return {point: self._read[point] for point in points}

    def changed(self, delta: Tensor) -> Tensor:
        """Logits with `delta` [batch, seq, d] added to the site's output."""
        kept = self._read[self._start]

        def add(y: Tensor) -> Tensor:
            return (y.float() + delta).to(y.dtype)

        if not self._short:
            with self._model.intervene({self._point: add}):
                return self._logits()
        edits: dict[HookPoint, Edit] = {self._start: lambda _: kept, self._point: add}
        if self._point == self._start:
            edits = {self._start: lambda _: add(kept)}
        with _handing_on(self._skipped), self._model.intervene(edits):
            return self._logits()

    def _logits(self) -> Tensor:
        return self._model.model(self._ids, use_cache=False).logits


@contextmanager
def _handing_on(blocks: Sequence[Any]) -> Iterator[None]:
    """Meanwhile the blocks give their input as their output."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Places:
    """The predictions of a batch that count: bool [batch, seq] each."""

    def __init__(
        self, ids: Tensor, mask: Tensor, activations: Tensor, special_ids: Sequence[int]
    ) -> None:
        self.ids, self.activations = ids, activations
        scored = mask.clone()
        scored[:, -1] = False
        if special_ids:
            special = torch.as_tensor(list(special_ids), device=ids.device)
            scored[:, :-1] &= ~torch.isin(ids[:, 1:], special)
        acting = activations > 0
        self.scored = scored
        self.active = scored & acting
        self.behind = scored & (acting.cumsum(1) > 0)  # what a change can reach
        self.following = self.behind & ~acting


@dataclass
class _Meter:
    """Per-token measures of all contexts, filled batch by batch."""

    contexts: int
    seq: int
    controls: int
    vocab: int
    masks: dict[str, np.ndarray] = field(init=False)
    tokens: TokenEffects = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.contexts, self.seq)

        def unknown(*leading: int) -> np.ndarray:
            return np.full((*leading, *shape), np.nan, np.float32)

        self.masks = {n: np.zeros(shape, bool) for n in ("active", "following", "scored")}
        self.tokens = TokenEffects(
            activations=np.zeros(shape, np.float32),
            **{name: unknown() for name in ("ce", "delta_ce", "kl", "changed")},
            **{name: np.full(shape, -1, np.int32) for name in ("before", "after")},
        )
        self._control = {n: unknown(self.controls) for n in ("delta_ce", "kl", "changed")}
        self._shift = torch.zeros(self.vocab, dtype=torch.float64)

    def add_feature(self, start: int, places: _Places, clean: Tensor, changed: Tensor) -> None:
        rows = slice(start, start + len(places.ids))
        self.tokens.activations[rows] = places.activations.cpu().numpy()
        for name in self.masks:
            self.masks[name][rows] = getattr(places, name).cpu().numpy()
        found = self._compare(places, places.scored, clean, changed, places.active)
        where = places.scored.cpu().numpy()
        for name, values in found.items():
            getattr(self.tokens, name)[rows][where] = values

    def add_control(
        self, number: int, start: int, places: _Places, clean: Tensor, changed: Tensor
    ) -> None:
        rows = slice(start, start + len(places.ids))
        where = places.behind.cpu().numpy()
        found = self._compare(places, places.behind, clean, changed)
        for name, kept in self._control.items():
            kept[number, rows][where] = found[name]

    def _compare(
        self,
        places: _Places,
        where: Tensor,
        clean: Tensor,
        changed: Tensor,
        shifting: Tensor | None = None,
    ) -> dict[str, np.ndarray]:
        """Of the predictions at `where`; those at `shifting` also count towards the tokens that
        move. Vocabularies are wide, so rows are taken a few at a time."""
        at = where.flatten().nonzero()[:, 0]
        following = places.ids.flatten()[at + 1]
        names = ("ce", "delta_ce", "kl", "changed", "before", "after")
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        step = max(1, CHUNK_CELLS // clean.shape[-1])
        for start in range(0, len(at), step):
            rows, targets = at[start : start + step], following[start : start + step, None]
            p = clean.flatten(0, 1)[rows].float().log_softmax(1)
            q = changed.flatten(0, 1)[rows].float().log_softmax(1)
            parts["ce"].append(-p.gather(1, targets)[:, 0])
            parts["delta_ce"].append((p.gather(1, targets) - q.gather(1, targets))[:, 0])
            parts["kl"].append((p.exp() * (p - q)).sum(1).clamp_min(0.0))
            parts["before"].append(p.argmax(1))
            parts["after"].append(q.argmax(1))
            parts["changed"].append((parts["before"][-1] != parts["after"][-1]).float())
            if shifting is not None:
                moved = (q - p)[shifting.flatten()[rows]]
                self._shift += moved.double().sum(0).cpu()
        return {
            name: torch.cat(values).cpu().numpy() if values else np.empty(0, np.float32)
            for name, values in parts.items()
        }

    def result(self, feature: int, mode: str, resumed_at: int, top: int, seed: int) -> Ablation:
        n = int(self.masks["active"].sum())
        shift = self._shift / max(n, 1)
        top = min(top, self.vocab) if n else 0
        high, low = shift.topk(top), shift.topk(top, largest=False)
        bootstrap = _Bootstrap(self.contexts, seed)
        return Ablation(
            feature=feature,
            mode=mode,
            controls=self.controls,
            contexts=self.contexts,
            active=self._group("active", bootstrap),
            following=self._group("following", bootstrap),
            everywhere=_effect(vars(self.tokens), self.masks["scored"], bootstrap),
            raised=tuple(zip(high.indices.tolist(), high.values.tolist(), strict=True)),
            lowered=tuple(zip(low.indices.tolist(), low.values.tolist(), strict=True)),
            per_token=self.tokens,
            resumed_at=resumed_at,
        )

    def _group(self, name: str, bootstrap: _Bootstrap) -> Group | None:
        where = self.masks[name]
        own = vars(self.tokens)
        feature = _effect(own, where, bootstrap)
        if feature is None or not self.controls:
            return None if feature is None else Group(feature, None, None, None, 0)
        mean = {key: values.mean(0) for key, values in self._control.items()}
        mean["ce"] = own["ce"]
        each = [float(values[where].mean()) for values in self._control["kl"]]
        return Group(
            feature,
            _effect(mean, where, bootstrap),
            bootstrap.estimate(own["delta_ce"] - mean["delta_ce"], where),
            bootstrap.estimate(own["kl"] - mean["kl"], where),
            sum(feature.kl.mean > kl for kl in each),
        )


def _effect(
    measured: Mapping[str, np.ndarray], where: np.ndarray, bootstrap: _Bootstrap
) -> Effect | None:
    if not where.any():
        return None
    return Effect(
        int(where.sum()),
        int(where.any(axis=1).sum()),
        bootstrap.estimate(measured["delta_ce"], where),
        bootstrap.estimate(measured["kl"], where),
        bootstrap.estimate(measured["changed"], where),
        float(measured["ce"][where].mean(dtype=np.float64)),
    )


class _Bootstrap:
    """Contexts drawn with replacement, the same draws for everything that is compared."""

    def __init__(self, contexts: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        even = np.full(contexts, 1 / contexts)
        self._weights = generator.multinomial(contexts, even, size=DRAWS).astype(np.float64)

    def estimate(self, values: np.ndarray, where: np.ndarray) -> Estimate:
        """Mean of `values` [contexts, seq] over the tokens `where`, at least one."""
        sums = np.where(where, values, 0.0).sum(axis=1, dtype=np.float64)
        counts = where.sum(axis=1).astype(np.float64)
        mean = float(sums.sum() / counts.sum())
        if (counts > 0).sum() < 2:
            return Estimate(mean, float("nan"), float("nan"))
        drawn = self._weights @ counts
        low, high = np.percentile((self._weights @ sums)[drawn > 0] / drawn[drawn > 0], [2.5, 97.5])
        return Estimate(mean, float(low), float(high))
