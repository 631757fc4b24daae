"""One training step of one dictionary, with hand-written sparse gradients (no autograd).

Only active latents carry gradient, so everything after the encoder's matrix product costs
nnz * d instead of batch * d_sae * d. `tests/engine/training` holds it against autograd.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation, JumpReLU, TopK
from mistudio.engine.sae.dictionary import Codes, Dictionary, weighted_rows
from mistudio.engine.training.config import Plan
from mistudio.errors import TrainingDiverged

# torch says so once per process; sampled_addmm on CSR is all that is used of it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

AUX_EVERY = 4  # steps; the term is weighted up by the same factor
AUX_WEIGHT = 1 / 32  # Gao et al. 2024
THRESHOLD_MEMORY = 0.9
REVIVE_AT = (0.10, 0.25, 0.40, 0.55)


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured on its batch. `fvu` (and `loss`, which leaves the auxiliary term out
    and is therefore the same number) is relative to the calibration sample's
    variance; `l0` is the mean number of active latents per token."""

    loss: float
    fvu: float
    l0: float
    dead: int
    learning_rate: float


class SiteTrainer:
    """A dictionary in training at one hook point: parameters, Adam moments, dead counters."""

    def __init__(self, plan: Plan, sample: Tensor, seed: int) -> None:
        """`sample` [n, d_in]: raw activations that set the scale, the bias and the variance."""
        self.plan = plan
        generator = torch.Generator().manual_seed(seed)
        self.scale = math.sqrt(plan.d_in) / float(sample.norm(dim=1).mean())
        scaled = sample * self.scale
        self.variance = float((scaled - scaled.mean(0)).square().sum(1).mean())
        decoder = torch.randn(plan.d_sae, plan.d_in, generator=generator).to(sample.device)
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.decoder = decoder
        self.encoder = decoder.clone()
        self.b_enc = torch.zeros(plan.d_sae, device=sample.device)
        self.b_dec = geometric_median(scaled)
        self.threshold: float | None = None
        self.step_number = 0
        self.tokens_since_fired = torch.zeros(plan.d_sae, dtype=torch.int64, device=sample.device)
        self.revived = 0
        self._generator = generator
        self._optimizer = torch.optim.Adam(
            list(self.parameters().values()), lr=plan.learning_rate, betas=(0.9, 0.999), fused=True
        )

    def parameters(self) -> dict[str, Tensor]:
        return {
            "encoder": self.encoder,
            "b_enc": self.b_enc,
            "decoder": self.decoder,
            "b_dec": self.b_dec,
        }

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
        """Linear warm-up, constant, linear decay to 0."""
        config, step, steps = self.plan.config, self.step_number, self.plan.steps
        warmup = max(1, round(config.warmup_share * steps))
        decay = max(1, round(config.decay_share * steps)) if config.decay_share else 0
        factor = min(1.0, (step + 1) / warmup)
        if decay and step > steps - decay:
            factor = min(factor, (steps - step) / decay)
        return self.plan.learning_rate * factor

    def step(self, x: Tensor, *, measure: bool = True) -> StepMetrics | None:
        """Learn from raw activations [batch, d_in]. Metrics cost a device sync; None without."""
        self._maybe_revive(x)
        xs = x * self.scale
        centred = xs - self.b_dec
        pre = torch.addmm(self.b_enc, centred, self.encoder.T)
        codes = self._select(pre)
        del pre
        error = weighted_rows(self.decoder, codes) + self.b_dec - xs
        gradients = reconstruction_gradients(
            codes, error, centred, self.encoder, self.decoder, self.variance
        )
        if self.plan.config.auxk and self.step_number % AUX_EVERY == 0:
            self._add_aux_gradients(gradients, error, centred)
        self._update(gradients)
        self._count_fired(codes)
        self.step_number += 1
        return self._metrics(error, codes) if measure else None

    def dictionary(self) -> Dictionary:
        """The dictionary as it stands, in training units (scale not folded)."""
        if self.plan.config.sparsity == "topk":
            activation: Activation = TopK(self.plan.k)
        else:
            threshold = torch.full_like(self.b_enc, self.threshold or 0.0)
            activation = JumpReLU(threshold)
        return Dictionary(
            self.encoder, self.b_enc, self.decoder, self.b_dec, activation, self.scale
        )

    # --- the parts of a step ----------------------------------------------------------------

    def _select(self, pre: Tensor) -> Codes:
        k = self.current_k()
        if self.plan.config.sparsity == "topk":
            rows, latents, values = TopK(round(k)).select(pre)
        else:
            threshold = self._follow_threshold(pre, k)
            rows, latents = (pre > threshold).nonzero(as_tuple=True)
            values = pre[rows, latents]
        return Codes(rows, latents, values, len(pre), pre.shape[1])

    def _follow_threshold(self, pre: Tensor, k: float) -> float:
        """BatchTopK (Bussmann et al. 2024, 2412.06410) by a running threshold.

        The exact threshold of a batch is its (batch * k)-th largest pre-activation; an eighth of
        the rows estimates it well, and an average over steps smooths it. A flat top-k over the
        whole batch costs more than the encoder.
        """
        rows = pre[:: max(1, min(8, len(pre) // 64))]
        n = max(1, round(len(rows) * k))
        here = max(float(rows.flatten().topk(n, sorted=False).values.min()), 0.0)
        if self.threshold is None or self.step_number < 10:
            self.threshold = here
        else:
            self.threshold = THRESHOLD_MEMORY * self.threshold + (1 - THRESHOLD_MEMORY) * here
        return self.threshold

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
        target = -error
        k_aux = min(self.plan.d_in // 2, 256, len(dead))
        encoder, decoder = self.encoder[dead], self.decoder[dead]
        pre = torch.addmm(self.b_enc[dead], centred, encoder.T)
        values, picked = pre.topk(k_aux, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter_(1, picked, values)
        spread = (target - target.mean(0)).square().sum(1).mean().clamp_min(1e-12)
        weight = AUX_WEIGHT * AUX_EVERY / spread
        residual = (z @ decoder - target) * (2 * weight / len(centred))
        dz = torch.zeros_like(pre).scatter_(1, picked, (residual @ decoder.T).gather(1, picked))
        gradients["decoder"].index_add_(0, dead, z.T @ residual)
        gradients["encoder"].index_add_(0, dead, dz.T @ centred)
        gradients["b_enc"].index_add_(0, dead, dz.sum(0))

    def _update(self, gradients: dict[str, Tensor]) -> None:
        """Clip, remove the part along each decoder row, Adam, unit decoder rows."""
        along = (gradients["decoder"] * self.decoder).sum(1, keepdim=True)
        gradients["decoder"].addcmul_(self.decoder, along, value=-1)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        clip = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for name, parameter in self.parameters().items():
            parameter.grad = gradients[name].mul_(clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._optimizer.step()
        for parameter in self.parameters().values():
            parameter.grad = None
        self.decoder /= self.decoder.norm(dim=1, keepdim=True)

    def _count_fired(self, codes: Codes) -> None:
        self.tokens_since_fired += codes.n_rows
        self.tokens_since_fired[codes.latents] = 0

    def _maybe_revive(self, x: Tensor) -> None:
        """Restart dead latents on the tokens that are explained worst (after Bricken et al. 2023).

        Tokens are drawn in proportion to their squared error; the decoder row points along the
        error, the encoder row likewise at a fifth of the living rows' norm, Adam forgets.
        """
        points = {round(share * self.plan.steps) for share in REVIVE_AT}
        if not self.plan.config.revive or self.step_number not in points or not self.step_number:
            return
        dead = self.dead.nonzero().squeeze(1)
        if len(dead) <= 0.01 * self.plan.d_sae:
            return
        xs = x * self.scale
        centred = xs - self.b_dec
        codes = self._select(torch.addmm(self.b_enc, centred, self.encoder.T))
        error = xs - self.b_dec - weighted_rows(self.decoder, codes)
        chosen = torch.multinomial(
            error.square().sum(1).cpu(), len(dead), replacement=True, generator=self._generator
        ).to(x.device)
        direction = error[chosen] / error[chosen].norm(dim=1, keepdim=True).clamp_min(1e-8)
        living = self.encoder[~self.dead].norm(dim=1).mean()
        self.decoder[dead] = direction
        self.encoder[dead] = 0.2 * living * direction
        self.b_enc[dead] = 0.0
        if self.plan.config.sparsity == "batchtopk" and self.threshold is not None:
            # The latent must fire on its own token, or it would stay dead.
            own = (self.encoder[dead] * centred[chosen]).sum(1)
            self.b_enc[dead] = (1.05 * self.threshold - own).clamp(min=0.0)
        for name, parameter in self.parameters().items():
            state = self._optimizer.state.get(parameter)
            if state and name != "b_dec":
                state["exp_avg"][dead] = 0.0
                state["exp_avg_sq"][dead] = 0.0
        self.tokens_since_fired[dead] = 0
        self.revived += len(dead)

    def _metrics(self, error: Tensor, codes: Codes) -> StepMetrics:
        fvu = float(error.square().sum(1).mean()) / self.variance
        if not math.isfinite(fvu):
            raise TrainingDiverged(
                "The training diverged",
                f"The loss became {fvu} at step {self.step_number}.",
                f"Lower the learning rate (it was {self.plan.learning_rate:.2g}) and start again.",
            )
        return StepMetrics(
            loss=fvu,
            fvu=fvu,
            l0=codes.l0,
            dead=int(self.dead.sum()),
            learning_rate=self.learning_rate(),
        )

    # --- state for checkpoints --------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that a later `load_state` needs to go on exactly, as plain tensors."""
        tensors = {name: value.clone() for name, value in self.parameters().items()}
        for name, parameter in self.parameters().items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = torch.as_tensor(value).clone()
        tensors["tokens_since_fired"] = self.tokens_since_fired.clone()
        tensors["generator"] = self._generator.get_state()
        tensors["numbers"] = torch.tensor(
            [
                self.scale,
                self.variance,
                math.nan if self.threshold is None else self.threshold,
                self.step_number,
                self.revived,
            ],
            dtype=torch.float64,
        )
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
            moments = {
                key: tensors[f"adam.{name}.{key}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{name}.{key}" in tensors
            }
            if moments:
                self._optimizer.state[parameter] = moments
        self.tokens_since_fired = tensors["tokens_since_fired"].clone()
        self._generator.set_state(tensors["generator"])
        scale, variance, threshold, step, revived = tensors["numbers"].tolist()
        self.scale, self.variance = scale, variance
        self.threshold = None if math.isnan(threshold) else threshold
        self.step_number, self.revived = int(step), int(revived)


def reconstruction_gradients(
    codes: Codes,
    error: Tensor,
    centred: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    variance: float,
) -> dict[str, Tensor]:
    """Gradients of mean_i ||error_i||^2 / variance, where error = z @ W_dec + b_dec - x.

    `error`, `centred` (x - b_dec) are [batch, d]. Selection is a constant, as in TopK training.
    """
    g = error * (2.0 / (len(error) * variance))
    # dL/dz at the active entries only: g_i . W_dec[j]
    pattern = torch.sparse_csr_tensor(
        codes.offsets,
        codes.latents,
        torch.zeros_like(codes.values),
        (codes.n_rows, codes.d_sae),
        check_invariants=False,
    )
    dz = torch.sparse.sampled_addmm(pattern, g, decoder.T, beta=0.0).values()
    by_latent = _by_latent(codes)
    db_enc = torch.zeros_like(encoder[:, 0]).index_add_(0, codes.latents, dz)
    return {
        "encoder": by_latent.sum_of(centred, dz),
        "b_enc": db_enc,
        "decoder": by_latent.sum_of(g, codes.values),
        # b_dec enters twice: added to the reconstruction, subtracted from the input.
        "b_dec": g.sum(0) - db_enc @ encoder,
    }


@dataclass(frozen=True)
class _ByLatent:
    """The active entries regrouped by latent: the sparse z^T."""

    rows: Tensor
    order: Tensor
    offsets: Tensor

    def sum_of(self, table: Tensor, values: Tensor) -> Tensor:
        """sum_i values_ij * table[i], [d_sae, d]"""
        return torch.nn.functional.embedding_bag(
            self.rows, table, self.offsets, per_sample_weights=values[self.order], mode="sum"
        )


def _by_latent(codes: Codes) -> _ByLatent:
    order = torch.sort(codes.latents, stable=True).indices
    counts = torch.bincount(codes.latents, minlength=codes.d_sae)
    offsets = counts.cumsum(0) - counts
    return _ByLatent(codes.rows[order], order, offsets)


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
