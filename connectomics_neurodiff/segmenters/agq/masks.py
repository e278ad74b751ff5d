"""The masks of one sample's queries, computed where they are asked for.

All at once they take as many floats as there are queries for every voxel of the working grid: 410 queries on 40 x 81 x
81 points 430 MB, and every step over them as much time as a convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Voxels at a time: 410 queries of so many are 13 MB, and a few such arrays live at once.
VOXELS_AT_ONCE = 8192


def split(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows, one per voxel, a few thousand at a time."""
    return rows.split(VOXELS_AT_ONCE)


@dataclass(frozen=True)
class QueryMasks:
    """Masks as the products of kernels and features; v is the number of voxels of the working grid.

    Attributes
    ----------
    kernels : torch.Tensor
        (q, c) float32, all normalisations included.
    offset : torch.Tensor
        Added to the logits of all masks; a scalar.
    features : torch.Tensor
        (v, c) float32.
    background : torch.Tensor
        (z, y, x) float32 logits.
    prior : pair of torch.Tensor, optional
        (v,) int64, the index of the query whose component a voxel is in, or -1; and what is added to that query's logit
        there, a scalar.
    """

    kernels: Tensor
    offset: Tensor
    features: Tensor
    background: Tensor
    prior: tuple[Tensor, Tensor] | None = None

    def logits(self, voxels: Tensor | slice) -> Tensor:
        """Logits (n, q) of all queries at some voxels, given by their numbers on the grid."""
        logits = torch.addmm(self.offset, self.features[voxels], self.kernels.t())
        if self.prior is not None:
            components, preference = self.prior
            own = components[voxels]
            (inside,) = torch.nonzero(own >= 0, as_tuple=True)
            logits[inside, own[inside]] += preference
        return logits

    def logits_with_background(self, voxels: Tensor | slice) -> Tensor:
        """Logits (n, 1 + q), the background's first."""
        return torch.cat([self.background.flatten()[voxels, None], self.logits(voxels)], dim=1)

    def logits_of(self, query: int, box: tuple[slice, ...]) -> Tensor:
        """Logits (z, y, x) of one query in a box of the grid."""
        grid = self.background.shape
        logits = self.features.unflatten(0, grid)[box] @ self.kernels[query] + self.offset
        if self.prior is not None:
            components, preference = self.prior
            logits = logits + preference * (components.unflatten(0, grid)[box] == query)
        return logits

    def pieces(self) -> Iterator[slice]:
        """The voxels, a few thousand at a time."""
        for start in range(0, len(self.features), VOXELS_AT_ONCE):
            yield slice(start, start + VOXELS_AT_ONCE)
