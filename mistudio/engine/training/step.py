"""One training step of one dictionary, with hand-written sparse gradients (no autograd).

The objective (`objectives/`) says which entries are active and what sparsity costs, the wiring
(`wiring.py`) what is read and what must be reconstructed; this file runs them through a batch in
parts, cares for dead latents, and moves the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.sae.dictionary import CHUNK_CELLS, Codes, Dictionary, weighted_rows
from mistudio.engine.sae.metrics import Density, density
from mistudio.engine.training.config import Plan
from mistudio.engine.training.distributed import ALONE, World
from mistudio.engine.training.objectives import OBJECTIVES, Entries, Weights
from mistudio.engine.training.optimizers import (
    decay_begins,
    forget,
    learning_rate,
    optimizer,
    restore,
)
from mistudio.engine.training.sparse import Gradients, entry_dots
from mistudio.engine.training.wiring import wire
from mistudio.errors import TrainingDiverged

# Encoder rows start short: an Adam step is then large against them, and a latent turns to what it
# finds within a few steps. FVU of 300 steps at 4,608 latents: 0.204 from rows of norm 1, 0.172
# from 0.3 (CONTRIBUTING, "Decisions").
ENCODER_START = 0.3
AUX_EVERY = 4  # steps; the term is weighted up by the same factor
AUX_WEIGHT = 1 / 32  # Gao et al. 2024
REVIVE_AT = (0.10, 0.25, 0.40, 0.55)
# Active entries kept before their gradient is taken: 20 bytes each, 80 MB.
ENTRY_BUDGET = 4 * 1024**2
LEAST_ROWS = 64  # of a part; smaller ones save next to nothing


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured on its batch.

    `fvu`: squared error relative to the calibration sample's variance of what the sparse part
    must reconstruct; `loss`: that plus the price of sparsity (the auxiliary term is left out);
    `l0`: mean active latents per token; `coefficient`: the price's weight, 0 without one.
    """

    loss: float
    fvu: float
    l0: float
    dead: int
    learning_rate: float
    coefficient: float = 0.0


class SiteTrainer:
    """A dictionary in training at one site: parameters, optimiser state, dead counters."""

    def __init__(
        self,
        plan: Plan,
        sample: Tensor,
        seed: int,
        target: Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        """`sample` [n, d_in], and `target` [n, d_out] for transcoders: raw activations that set
        scales, biases and the variance."""
        self.plan, self._world = plan, world
        self.wiring = wire(plan, sample, target)
        u = self.wiring.inputs(sample)
        wanted = self.wiring.targets(u, target)
        self.variance = float((wanted - wanted.mean(0)).square().sum(1).mean())
        generator = torch.Generator().manual_seed(seed)
        self._generator = generator
        directions = _directions(
            torch.randn(plan.d_sae, plan.d_in, generator=generator).to(sample.device)
        )
        self.encoder = ENCODER_START * directions
        self.b_enc = torch.zeros(plan.d_sae, device=sample.device)
        self.b_dec = geometric_median(wanted)
        centred = u - self._centre()
        if self.wiring.centre is None:
            self.decoder = directions
        else:
            self.decoder = _response_directions(directions, centred, wanted - self.b_dec, plan.k)
        self.objective = OBJECTIVES[plan.config.sparsity](plan, self._weights(), centred)
        self.step_number = 0
        self.parts = plan.config.gradient_accumulation
        self.tokens_since_fired = torch.zeros(plan.d_sae, dtype=torch.int64, device=sample.device)
        # Tokens each latent fired on since the last `density`, and out of how many.
        self.firings = torch.zeros_like(self.tokens_since_fired)
        self.firings_tokens = 0
        self.revived = 0
        self._optimizer = optimizer(plan, self.parameters())
        _make_moments(self._optimizer)

    @classmethod
    def resumed(
        cls,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        world: World = ALONE,
    ) -> SiteTrainer:
        """The trainer of the same plan whose `state` is `tensors`."""
        # Whatever a sample sets is in the state too; any sample will do.
        numbers = torch.Generator().manual_seed(0)
        sample = torch.randn(256, plan.d_in, generator=numbers).to(device)
        transcoder = plan.config.wiring in ("transcoder", "skip_transcoder")
        target = torch.randn(256, plan.d_out, generator=numbers).to(device) if transcoder else None
        trainer = cls(plan, sample, plan.config.seed, target, world)
        trainer.load_state(tensors)
        return trainer

    def parameters(self) -> dict[str, Tensor]:
        named = {
            "encoder": self.encoder,
            "b_enc": self.b_enc,
            "decoder": self.decoder,
            "b_dec": self.b_dec,
            **self.objective.parameters,
        }
        if self.wiring.learns_skip and self.wiring.skip is not None:
            named["skip"] = self.wiring.skip
        return named

    @property
    def dead(self) -> Tensor:
        """Bool [d_sae]: silent for longer than the window."""
        return self.tokens_since_fired > self.plan.dead_window

    def current_k(self) -> float:
        """Target L0 of this step: 4k falling linearly to k over the annealing phase."""
        k, steps = self.plan.k, self.plan.config.anneal_share * self.plan.steps
        start = min(4 * k, self.plan.d_sae // 2)
        if steps < 1 or self.step_number >= steps or start <= k:
            return k
        return start + (k - start) * self.step_number / steps

    def learning_rate(self) -> float:
        return learning_rate(self.plan, self.step_number)

    def step(
        self, x: Tensor, y: Tensor | None = None, *, measure: bool = True
    ) -> StepMetrics | None:
        """Learn from raw inputs [batch, d_in] (and targets [batch, d_out] for transcoders): this
        process's rows of the batch. Metrics cost a device sync; None without.

        Raises TrainingDiverged where the loss is not finite (seen when measured). Where that or
        anything else is raised, nothing was learnt from the batch, so that after memory ran out it
        can be tried again in more parts (`split`); a re-initialisation that was done stays done.
        """
        self._maybe_revive(x, y)
        k = self.current_k()
        batch = self._work_through(x, y, k, measure)
        self._update(batch.gradients)
        # The weights have moved: from here on nothing takes memory worth mentioning.
        self.tokens_since_fired += batch.tokens
        self.tokens_since_fired.masked_fill_(batch.firings > 0, 0)
        self.firings += batch.firings
        self.firings_tokens += batch.tokens
        metrics = self._metrics(batch) if measure else None
        self.objective.follow(batch.l0, k, self.step_number)
        self.step_number += 1
        return metrics

    def split(self) -> bool:
        """Work through batches in twice as many parts: less memory, the same result but for
        rounding. False, and nothing changed, where parts would become too small to matter."""
        if self.plan.batch_size // self._world.size < 2 * self.parts * LEAST_ROWS:
            return False
        self.parts *= 2
        return True

    def density(self) -> tuple[Density, int]:
        """How often latents fired on the training tokens since this was last asked, and how many
        tokens those are; the window then begins anew."""
        found, tokens = density(self.firings.cpu(), self.firings_tokens), self.firings_tokens
        self.firings.zero_()
        self.firings_tokens = 0
        return found, tokens

    @property
    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(math.isfinite(float(value.sum())) for value in self.parameters().values())

    def dictionary(self) -> Dictionary:
        """The dictionary as it stands, in training units (scale not folded)."""
        return Dictionary(
            self.encoder,
            self.b_enc,
            self.decoder,
            self.b_dec,
            self.objective.activation(self._weights()),
            self.wiring.scale,
            self.wiring.out_scale,
            self.wiring.centre,
            self.wiring.skip_matrix(),
        )

    # --- the parts of a step ----------------------------------------------------------------

    def _work_through(self, x: Tensor, y: Tensor | None, k: float, measure: bool) -> _Batch:
        world = self._world
        u = self._in_order(self.wiring.inputs(x), world)
        target = self.wiring.targets(u, None if y is None else self._in_order(y, world))
        centred = u - self._centre()
        tokens = len(x) * world.size
        factor = 2.0 / (tokens * self.variance)
        gradients = Gradients({})
        firings = torch.zeros_like(self.b_enc)  # exact in float32: no batch has 16 million tokens
        errors: list[Tensor] = []
        penalty: Tensor | float = 0.0
        for rows, entries in self._entries(centred, k, world):
            part = self.objective.backward(
                self._weights(), entries, centred[rows], target[rows], factor
            )
            gradients.add(part.gradients)
            if self.wiring.learns_skip:
                gradients.add({"skip": part.g.T @ u[rows]})
            errors.append(part.error)
            penalty = penalty + part.penalty
            alive = entries.codes.values > 0
            latents = entries.codes.latents[alive]
            firings.scatter_add_(0, latents, torch.ones_like(latents, dtype=firings.dtype))
            del part, entries  # as large as the batch: not needed beside the optimiser
        error = torch.cat(errors)
        if self.plan.config.auxk and self.step_number % AUX_EVERY == 0:
            self._add_aux_gradients(gradients.values, error, centred)
        firings = world.add(firings).long()
        batch = _Batch(gradients.values, tokens, int(firings.sum()) / tokens, firings)
        if measure:
            sums = torch.stack([error.square().sum(), torch.as_tensor(penalty).to(error)])
            squares, batch.penalty = world.add(sums).tolist()
            batch.fvu = squares / tokens / self.variance
            self._check(batch.fvu + batch.penalty)
        return batch

    def _weights(self) -> Weights:
        return Weights(self.encoder, self.b_enc, self.decoder, self.b_dec)

    def _centre(self) -> Tensor:
        return self.b_dec if self.wiring.centre is None else self.wiring.centre

    def _stride(self, n: int, world: World) -> int:
        """The objective looks at every how-manyth of each process's `n` rows before it selects:
        however many processes share a batch, they are the same rows."""
        tokens = n * world.size
        stride = self.objective.stride(tokens)
        while stride and tokens * self.plan.d_sae > stride * CHUNK_CELLS:
            stride *= 2
        return stride

    def _in_order(self, rows: Tensor, world: World) -> Tensor:
        """The rows that the objective looks at first, then the others: what it sees is the same
        fair sample of the batch whatever parts the batch is worked through in."""
        stride = self._stride(len(rows), world)
        return torch.cat([rows[i::stride] for i in range(stride)]) if stride > 1 else rows

    def _entries(self, centred: Tensor, k: float, world: World) -> Iterator[tuple[slice, Entries]]:
        """The entries of a batch that is `_in_order`, in parts that fit into memory; `world` are
        those who share the batch.
        Pre-activations are the one large matrix of a step, and only a part of it exists at a
        time."""
        n = len(centred)
        part = math.ceil(n / self.parts)
        size = min(part, max(1, CHUNK_CELLS // self.plan.d_sae))
        stride = self._stride(n, world)
        seen = math.ceil(n / stride) if stride else 0
        start, pending, held = 0, [], 0
        encoder = self.encoder.bfloat16() if self.plan.config.mixed_precision else self.encoder
        if seen > size:
            pre = self._pre_activations(centred[:seen], encoder)
            self.objective.begin(pre, k, self.step_number, world)
            del pre
        for first in range(0, n, size):
            chunk = centred[first : first + size]
            pre = self._pre_activations(chunk, encoder)
            if first == 0 and seen <= size:
                self.objective.begin(pre[:seen], k, self.step_number, world)
            entries = self._selected(pre, chunk)
            del pre
            pending.append(entries)
            held += len(entries.pre)
            del entries  # a generator would keep it through the next chunk
            stop = first + len(chunk)
            if held > ENTRY_BUDGET or stop - start >= part or stop == n:
                yield slice(start, stop), Entries.joined(pending)
                start, pending, held = stop, [], 0

    def _pre_activations(self, centred: Tensor, encoder: Tensor) -> Tensor:
        if encoder.dtype == self.b_enc.dtype:
            return torch.addmm(self.b_enc, centred, encoder.T)
        return torch.addmm(self.b_enc.to(encoder.dtype), centred.to(encoder.dtype), encoder.T)

    def _selected(self, pre: Tensor, centred: Tensor) -> Entries:
        rows, latents = self.objective.select(pre)
        values = pre[rows, latents]
        codes = Codes(rows, latents, values, len(pre), pre.shape[1])
        if pre.dtype != self.b_enc.dtype:
            # Half precision only proposes what is active; what is active is computed exactly.
            codes = codes.with_values(values.to(self.b_enc.dtype))
            values = entry_dots(codes, centred, self.encoder) + self.b_enc[latents]
            kept = self.objective.matters(latents, values)
            latents, values = latents[kept], values[kept]
            codes = Codes(rows[kept], latents, values, len(pre), pre.shape[1])
        return Entries(codes.with_values(self.objective.activate(latents, values)), values)

    def _add_aux_gradients(
        self, gradients: dict[str, Tensor], error: Tensor, centred: Tensor
    ) -> None:
        """AuxK (Gao et al. 2024, section A.2): the top dead latents explain the error.

        The error is a constant here. Raw pre-activations are used, negative ones too, so that
        every selected latent gets gradient; no bias enters the estimate.
        """
        dead = self.dead.nonzero().squeeze(1)
        if not len(dead):
            return
        k_aux = min(self.plan.d_in // 2, 256, len(dead))
        encoder, decoder = self.encoder[dead], self.decoder[dead]
        mean = self._world.add(error.sum(0)) / (len(error) * self._world.size)
        spread = self._world.add((error - mean).square().sum())
        factor = 2 * AUX_WEIGHT * AUX_EVERY / spread.clamp_min(1e-12)
        size = max(1, min(CHUNK_CELLS // 4 // len(dead), math.ceil(len(error) / self.parts)))
        for first in range(0, len(error), size):
            inputs, target = centred[first : first + size], -error[first : first + size]
            pre = torch.addmm(self.b_enc[dead], inputs, encoder.T)
            values, picked = pre.topk(k_aux, dim=1, sorted=False)
            z = torch.zeros_like(pre).scatter_(1, picked, values)
            residual = (z @ decoder - target) * factor
            dz = torch.zeros_like(pre).scatter_(1, picked, (residual @ decoder.T).gather(1, picked))
            gradients["decoder"].index_add_(0, dead, z.T @ residual)
            gradients["encoder"].index_add_(0, dead, dz.T @ inputs)
            gradients["b_enc"].index_add_(0, dead, dz.sum(0))

    def _update(self, gradients: dict[str, Tensor]) -> None:
        """Clip, remove the part along each decoder row, step, unit decoder rows."""
        centre = gradients.pop("centre")
        if self.wiring.centre is None:
            gradients["b_dec"] += centre  # it is added to the output and taken off the input
        for gradient in gradients.values():
            self._world.add(gradient)
        along = (gradients["decoder"] * self.decoder).sum(1, keepdim=True)
        gradients["decoder"].addcmul_(self.decoder, along, value=-1)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        clip = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for name, parameter in self.parameters().items():
            parameter.grad = gradients[name].mul_(clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["factor"]
        try:
            self._optimizer.step()
        finally:
            for parameter in self.parameters().values():
                parameter.grad = None
        gradients.clear()  # room for the norms
        self.decoder /= self.decoder.norm(dim=1, keepdim=True)

    def _maybe_revive(self, x: Tensor, y: Tensor | None) -> None:
        """Restart dead latents on the tokens that are explained worst (after Bricken et al. 2023).

        Tokens are drawn in proportion to their squared error; the decoder row points along the
        error, the encoder row along the same token's part that the error leaves (for autoencoders
        the error itself), as long as it must be to fire there; the optimiser forgets. Not once the
        learning rate decays: there is no time left to learn.
        """
        points = {round(share * self.plan.steps) for share in REVIVE_AT}
        if not self.plan.config.revive or self.step_number not in points or not self.step_number:
            return
        if self.step_number > decay_begins(self.plan):
            return
        dead = self.dead.nonzero().squeeze(1)
        if len(dead) <= 0.01 * self.plan.d_sae:
            return
        numbers = self._generator.get_state()
        try:
            self._revive(dead, x, y)
        except BaseException:
            self._generator.set_state(numbers)
            raise

    def _revive(self, dead: Tensor, x: Tensor, y: Tensor | None) -> None:
        """Nothing is moved before the last allocation."""
        # Every process looks at the whole batch by itself, so that all draw the same tokens.
        u = self._in_order(self.wiring.inputs(self._world.gathered(x)), ALONE)
        whole = None if y is None else self._in_order(self._world.gathered(y), ALONE)
        target = self.wiring.targets(u, whole)
        centred = u - self._centre()
        error = torch.empty_like(target)
        faintest = torch.full_like(target[:, 0], math.inf)
        for rows, entries in self._entries(centred, self.current_k(), ALONE):
            codes = entries.codes
            reconstruction = weighted_rows(self.decoder, codes) + self.b_dec
            error[rows] = target[rows] - reconstruction
            faintest[rows] = faintest[rows].scatter_reduce(0, codes.rows, codes.values, "amin")
        faintest[faintest.isinf()] = 0.0  # nothing is active there
        weight = error.square().sum(1).cpu()
        self._check(float(weight.sum()))
        # Latents that restart on the same token would stay twins for ever.
        dead = dead[: int((weight > 0).sum())]
        if not len(dead):
            return
        chosen = torch.multinomial(weight, len(dead), generator=self._generator).to(x.device)
        faintest, error, centred = faintest[chosen], error[chosen], centred[chosen]
        reading = centred
        if self.wiring.centre is None:
            # The error itself, unless its own token speaks against it.
            reading = torch.where((error * centred).sum(1, keepdim=True) > 0, error, centred)
        alive, norms = ~self.dead, self.encoder.norm(dim=1)
        longest = float((norms[alive] if bool(alive.any()) else norms).mean())
        decoder, encoder = _directions(error), _directions(reading)
        # The latent must fire on its own token and on those like it, or it would stay dead, but
        # on few others: by the length of its row, by its bias only where a row as long as the
        # living ones is too short.
        level = self.objective.firing_level(dead, faintest)
        own = (encoder * centred).sum(1)
        norm = (1.5 * level / own.clamp_min(1e-12)).clamp(0.2 * longest, longest)
        encoder, own = encoder * norm[:, None], own * norm
        b_enc = torch.where(level > 0, (1.05 * level - own).clamp(min=0.0), -own / 2)
        self.objective.restart(dead)
        self.decoder[dead], self.encoder[dead], self.b_enc[dead] = decoder, encoder, b_enc
        self._forget(dead)
        self.tokens_since_fired[dead] = 0
        self.revived += len(dead)

    def _forget(self, latents: Tensor) -> None:
        """Zero the optimiser's moments of these latents' rows."""
        for name, parameter in self.parameters().items():
            if name not in ("b_dec", "skip"):
                forget(self._optimizer, parameter, latents)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                "The training diverged",
                f"The loss became {loss} at step {self.step_number + 1}.",
                f"Lower the learning rate (it was {self.plan.learning_rate:.2g}) and start again.",
            )

    def _metrics(self, batch: _Batch) -> StepMetrics:
        coefficient = getattr(self.objective, "coefficient", None)
        return StepMetrics(
            loss=batch.fvu + batch.penalty,
            fvu=batch.fvu,
            l0=batch.l0,
            dead=int(self.dead.sum()),
            learning_rate=self.learning_rate(),
            coefficient=coefficient.value if coefficient else 0.0,
        )

    # --- state for checkpoints --------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that a later `load_state` needs to go on exactly, as plain tensors."""
        return {name: value.clone() for name, value in self.own_state().items()}

    def own_state(self) -> dict[str, Tensor]:
        """`state` without a copy, to be written away at once: the next step changes it."""
        tensors = dict(self.parameters())
        for name, parameter in self.parameters().items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        for key, value in self.objective.state().items():
            tensors[f"objective.{key}"] = value
        if self.wiring.centre is not None:
            tensors["wiring.centre"] = self.wiring.centre
        if self.wiring.skip is not None and not self.wiring.learns_skip:
            tensors["wiring.skip"] = self.wiring.skip
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["firings"] = self.firings
        tensors["firings_tokens"] = torch.tensor(self.firings_tokens)
        tensors["generator"] = self._generator.get_state()
        tensors["numbers"] = torch.tensor(
            [
                self.wiring.scale,
                self.wiring.out_scale,
                self.variance,
                self.step_number,
                self.revived,
                self.parts,
            ],
            dtype=torch.float64,
        )
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state of the same plan; `state` of this trainer then equals it."""
        if self.wiring.centre is not None:
            self.wiring.centre.copy_(tensors["wiring.centre"])
        if self.wiring.skip is not None and not self.wiring.learns_skip:
            self.wiring.skip.copy_(tensors["wiring.skip"])
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
            prefix = f"optimizer.{name}."
            moments = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            if moments:
                restore(self._optimizer, parameter, moments)
        self.objective.load_state(
            {
                key.removeprefix("objective."): value
                for key, value in tensors.items()
                if key.startswith("objective.")
            }
        )
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.b_enc.device, copy=True)
        if "firings" in tensors:  # an older checkpoint's window begins where it goes on
            self.firings = tensors["firings"].to(self.b_enc.device, copy=True)
            self.firings_tokens = int(tensors["firings_tokens"])
        self._generator.set_state(tensors["generator"].cpu())
        scale, out_scale, variance, step, revived, parts = tensors["numbers"].tolist()
        self.wiring.scale, self.wiring.out_scale, self.variance = scale, out_scale, variance
        self.step_number, self.revived, self.parts = int(step), int(revived), int(parts)


@dataclass
class _Batch:
    """What a batch gave, over all processes but for the gradients: `firings` int64 [d_sae], the
    tokens each latent fired on; `fvu` and `penalty` only where they were measured."""

    gradients: dict[str, Tensor]
    tokens: int
    l0: float
    firings: Tensor
    fvu: float = math.nan
    penalty: float = math.nan


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would make as it goes. Made before, a step moves all weights or none,
    and a dictionary that does not fit is known at once. (8-bit moments are left to the first.)"""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.Adam):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            elif isinstance(optimizer, torch.optim.SGD):
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def _directions(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-8)


def _response_directions(encoder: Tensor, centred: Tensor, target: Tensor, k: int) -> Tensor:
    """What a latent's own tokens have in common in the target: unit rows [d_sae, d_out].

    Encoder and decoder of a transcoder live in different spaces, so the decoder cannot start as
    the encoder's transpose. Every latent takes the tokens it responds to most.
    """
    tokens = min(len(centred), 8192)
    centred, target = centred[:tokens], target[:tokens]
    n = max(8, round(tokens * k / len(encoder)))
    rows = torch.empty(len(encoder), target.shape[1], device=target.device)
    size = max(1, CHUNK_CELLS // tokens)
    for first in range(0, len(encoder), size):
        response = encoder[first : first + size] @ centred.T
        values, picked = response.topk(min(n, tokens), dim=1)
        offsets = torch.arange(0, picked.numel(), picked.shape[1], device=picked.device)
        rows[first : first + size] = torch.nn.functional.embedding_bag(
            picked.flatten(),
            target,
            offsets,
            per_sample_weights=values.clamp_min(0.0).flatten(),
            mode="sum",
        )
    return _directions(rows)


def geometric_median(points: Tensor, iterations: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows of `points` (Weiszfeld's algorithm)."""
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1.0 / (points - median).norm(dim=1).clamp_min(1e-8)
        updated = (points * weights[:, None]).sum(0) / weights.sum()
        moved = float((updated - median).norm() / median.norm().clamp_min(1e-12))
        median = updated
        if moved < tolerance:
            break
    return median
