"""Which tokens a latent's direction promotes and suppresses through the unembedding alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.progress import SILENT, Progress

CHUNK = 256


@torch.inference_mode()
def logit_lens(
    model: HookedDecoder, directions: Tensor, top: int = 10, progress: Progress = SILENT
) -> tuple[Tensor, Tensor]:
    """Top and bottom tokens of each direction [n, d_model].

    Returns ids int32 [n, 2, top] and logits float32 [n, 2, top] (side 0 promoted, 1 suppressed).
    The final norm's gain is folded in (and the direction centred for LayerNorm), then logits are
    centred over the vocabulary: `l = (d * gain) @ W_U - mean`. Scale is relative, as the final
    norm's division depends on the token. This is the direct path only: later blocks are ignored.
    """
    gain, centred = model.final_norm_gain()
    unembedding = model.unembedding_weight().float()
    ids, values = [], []
    for start in range(0, len(directions), CHUNK):
        progress.check()
        d = directions[start : start + CHUNK].float().to(unembedding.device)
        if centred:
            d = d - d.mean(1, keepdim=True)
        logits = (d * gain.float()) @ unembedding.T
        logits -= logits.mean(1, keepdim=True)
        high, low = logits.topk(top, dim=1), logits.topk(top, dim=1, largest=False)
        ids.append(torch.stack([high.indices, low.indices], 1).int().cpu())
        values.append(torch.stack([high.values, low.values], 1).cpu())
        progress.report(start + len(d), len(directions), phase="logit lens")
    return torch.cat(ids), torch.cat(values)
