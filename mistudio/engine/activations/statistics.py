"""What a site's activations are like: the sums that shards keep, and the figures made of them.

All are of the training split. Moments are of the rows that are stored; norms by position and the
share of outliers are of the tokens that were read, because what is left out is what they show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.positions import OUTLIER_MULTIPLE

FILE = "statistics.safetensors"
# A dimension stands out where its root mean square is this many times the median dimension's.
# (LLM.int8() looks at values of 6 and more, in a model whose usual ones are about 1.)
OUTLIER_DIMENSION = 6.0
LISTED_DIMENSIONS = 32

DEFINITIONS = {
    "tokens": "stored rows of the training split, on which the moments are taken",
    "mean_norm": "mean L2 norm of the stored rows",
    "mean": "mean of each dimension over the stored rows",
    "variance": "mean squared deviation from that mean, of each dimension (divided by the number "
    "of rows)",
    "total_variance": "sum of the variances of all dimensions",
    "largest_dimension_share": "largest variance of a dimension, as a share of the total variance",
    "outlier_share": f"share of the tokens read, position 0 and special tokens apart, whose norm "
    f"at this site is more than {OUTLIER_MULTIPLE:g} times the median norm; they are not stored",
    "outlier_dimensions": f"dimensions whose root mean square over the stored rows is more than "
    f"{OUTLIER_DIMENSION:g} times that of the median dimension, with this ratio, largest first",
    "norm_by_position": "mean L2 norm of all tokens read at each position of the context, position "
    "0, special tokens and outliers included, padding not",
    "largest_value": "largest magnitude among the stored rows, before they were scaled",
}


class SiteSums:
    """Sums over one site's tokens, in float64, on the device of the model where it has float64."""

    FIELDS = (
        "n",
        "norm",
        "sum",
        "squares",
        "largest",
        "position_norm",
        "position_n",
        "countable",
        "outliers",
    )

    def __init__(self, width: int, context: int, device: torch.device) -> None:
        self._device = torch.device("cpu") if device.type == "mps" else device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)

        self.n, self.norm, self.largest = zeros(), zeros(), zeros()
        self.countable, self.outliers = zeros(), zeros()
        self.sum, self.squares = zeros(width), zeros(width)
        self.position_norm, self.position_n = zeros(context), zeros(context)

    def add(
        self, values: Tensor, norms: Tensor, read: Tensor, countable: Tensor, outliers: Tensor
    ) -> None:
        """`values` [n, d] are stored; `norms` float32 [batch, seq] of all tokens; the masks [batch,
        seq] say which were read (padding is not), may count, and are beyond the norm limit."""
        wide = values.to(self._device).double()
        if len(wide):
            self.n += len(wide)
            self.norm += torch.linalg.vector_norm(wide, dim=1).sum()
            self.sum += wide.sum(0)
            self.largest = torch.maximum(self.largest, wide.abs().amax())
            self.squares += wide.square_().sum(0)
        seq = norms.shape[1]
        read = read.to(self._device)
        spread = norms.to(self._device).double().masked_fill(~read, 0.0)
        self.position_norm[:seq] += spread.sum(0)
        self.position_n[:seq] += read.sum(0)
        self.countable += countable.to(self._device).sum()
        self.outliers += outliers.to(self._device).sum()

    def tensors(self, point: str) -> dict[str, Tensor]:
        """For the file of a shard."""
        return {f"{point}.{name}": getattr(self, name).cpu().reshape(-1) for name in self.FIELDS}


@dataclass(frozen=True)
class SiteStatistics:
    """The figures of `DEFINITIONS`, those by dimension and position as float64 arrays."""

    mean: np.ndarray  # [d]
    variance: np.ndarray  # [d]
    norm_by_position: np.ndarray  # [context]; NaN where no token was read
    tokens_by_position: np.ndarray  # [context]
    summary: dict[str, Any]


def gathered(
    files: Sequence[Path], widths: Mapping[str, int], context: int
) -> dict[str, SiteStatistics]:
    """The statistics of each site from the sums of its shards, added in their order."""
    from safetensors.torch import load_file

    totals: dict[str, Tensor] = {}
    for point, width in widths.items():
        totals |= SiteSums(width, context, torch.device("cpu")).tensors(point)
    for path in files:
        for name, values in load_file(path).items():
            if name.endswith(".largest"):
                totals[name] = torch.maximum(totals[name], values)
            else:
                totals[name] = totals[name] + values
    found = {}
    for point in widths:
        sums = {name: totals[f"{point}.{name}"].numpy() for name in SiteSums.FIELDS}
        found[point] = _statistics(sums)
    return found


def _statistics(sums: Mapping[str, np.ndarray]) -> SiteStatistics:
    n = max(float(sums["n"][0]), 1.0)
    mean = sums["sum"] / n
    variance = np.maximum(sums["squares"] / n - mean**2, 0.0)
    size = np.sqrt(sums["squares"] / n)
    ratios = size / max(float(np.median(size)), 1e-30)
    order = np.argsort(-ratios, kind="stable")
    beyond = order[ratios[order] > OUTLIER_DIMENSION]
    seen = sums["position_n"]
    with np.errstate(invalid="ignore", divide="ignore"):
        by_position = sums["position_norm"] / seen
    total, countable = float(variance.sum()), float(sums["countable"][0])
    return SiteStatistics(
        mean,
        variance,
        by_position,
        seen,
        {
            "tokens": int(sums["n"][0]),
            "mean_norm": float(sums["norm"][0]) / n,
            "total_variance": total,
            "largest_dimension_share": float(variance.max()) / max(total, 1e-30),
            "largest_value": float(sums["largest"][0]),
            "tokens_read": int(seen.sum()),
            "outlier_share": float(sums["outliers"][0]) / max(countable, 1.0),
            "outlier_tokens": int(sums["outliers"][0]),
            "outlier_dimensions": [[int(i), float(ratios[i])] for i in beyond[:LISTED_DIMENSIONS]],
            "outlier_dimension_share": len(beyond) / len(ratios),
        },
    )


def write(folder: Path, found: Mapping[str, SiteStatistics]) -> None:
    from safetensors.numpy import save_file

    arrays = {
        f"{point}.{name}": np.ascontiguousarray(getattr(statistics, name))
        for point, statistics in found.items()
        for name in ("mean", "variance", "norm_by_position", "tokens_by_position")
    }
    save_file(arrays, folder / FILE)


def read(folder: Path, summaries: Mapping[str, Any]) -> dict[str, SiteStatistics]:
    """What `write` wrote. Raises `FileNotFoundError` for stores of earlier versions."""
    from safetensors.numpy import load_file

    arrays = load_file(folder / FILE)
    return {
        point: SiteStatistics(
            arrays[f"{point}.mean"],
            arrays[f"{point}.variance"],
            arrays[f"{point}.norm_by_position"],
            arrays[f"{point}.tokens_by_position"],
            summary,
        )
        for point, summary in summaries.items()
    }
