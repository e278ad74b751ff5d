"""Affinity-guided queries: the connected components of the predicted affinities, each with its mean feature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def affinity_components(
    affinity: np.ndarray, *, smallest: int, most: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Coarse neurons: 26-connected components of the voxels whose mean affinity exceeds the volume's mean.

    Parameters
    ----------
    affinity : numpy.ndarray
        (c, z, y, x) in [0, 1].
    smallest : int
        Components of this many voxels or fewer are dropped.
    most : int
        Number of components that are kept, >= 0.
    rng : numpy.random.Generator, optional
        If there are more than `most`, a random choice; without it the largest, in the order of their numbers among
        equals.

    Returns
    -------
    numpy.ndarray
        (z, y, x) int64: 0, or the number 1..n of the component, n <= `most`.
    """
    import cc3d

    mask = np.ascontiguousarray(affinity.mean(axis=0) > affinity.mean())  # cc3d 4.1 misreads views
    parts = cc3d.connected_components(mask, connectivity=26)
    voxels = np.bincount(parts.ravel())
    voxels[0] = 0
    kept = np.flatnonzero(voxels > smallest)
    if len(kept) > most:
        if rng is None:
            kept = kept[np.argsort(-voxels[kept], kind="stable")[:most]]
        else:
            kept = rng.choice(kept, most, replace=False)
    number = np.zeros(len(voxels), dtype=np.int64)
    number[np.sort(kept)] = np.arange(1, len(kept) + 1)
    return number[parts]


def mean_features(features: Tensor, components: Tensor) -> Tensor:
    """Mean feature of each component.

    Parameters
    ----------
    features : torch.Tensor
        (c, z, y, x).
    components : torch.Tensor
        (z, y, x) integers 0..n, 0 = none; each of 1..n occurs.

    Returns
    -------
    torch.Tensor
        (n, c).
    """
    numbers = torch.arange(1, int(components.max()) + 1, device=components.device)
    # A product with masks rather than a scattered sum: the same bits on every run, also on a GPU.
    masks = (components.flatten() == numbers[:, None]).to(features.dtype)
    return masks @ features.flatten(1).t() / masks.sum(dim=1, keepdim=True, dtype=torch.float32)


def guided_queries(
    affinity: Tensor,
    features: Tensor,
    *,
    smallest: int,
    most: int,
    rngs: Sequence[np.random.Generator] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Queries of every sample of a batch, and where they come from.

    Parameters
    ----------
    affinity : torch.Tensor
        (b, 3, z, y, x) in [0, 1]; no gradient passes through it.
    features : torch.Tensor
        (b, c, z, y, x) instance features.
    smallest, most, rngs
        As for :func:`affinity_components`; one generator per sample.

    Returns
    -------
    list of (torch.Tensor, torch.Tensor)
        For sample i its queries (n_i, c), n_i from 0 to `most`, and the components (z, y, x) int64 whose means they
        are: 0, or 1..n_i.
    """
    volumes = affinity.detach().float().cpu().numpy()
    found = []
    for i, volume in enumerate(volumes):
        components = torch.from_numpy(
            affinity_components(volume, smallest=smallest, most=most, rng=rngs[i] if rngs else None)
        ).to(features.device)
        found.append((mean_features(features[i], components), components))
    return found


def padded_queries(learned: Tensor, guided: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Learned queries followed by each sample's own, padded with zeros to the longest.

    Parameters
    ----------
    learned : torch.Tensor
        (m, c), shared by all samples.
    guided : sequence of torch.Tensor
        (n_i, c) for each of the b samples.

    Returns
    -------
    queries : torch.Tensor
        (b, m + max n_i, c).
    valid : torch.Tensor
        (b, m + max n_i) bool, false where padded.
    """
    counts = [len(learned) + len(own) for own in guided]
    longest = max(counts)
    rows = [torch.cat([learned, own.to(learned.dtype)]) for own in guided]
    queries = torch.stack([functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    position = torch.arange(longest, device=learned.device)
    return queries, position < torch.tensor(counts, device=learned.device)[:, None]


def component_masks(components: Sequence[Tensor], valid: Tensor, learned: int, dtype: torch.dtype) -> Tensor:
    """The component of every query.

    Parameters
    ----------
    components : sequence of torch.Tensor
        (z, y, x) integers 0..n_i for each of the b samples.
    valid : torch.Tensor
        (b, q) bool, from :func:`padded_queries`.
    learned : int
        How many learned queries come first; they and the padding have no component.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        (b, q, z, y, x): 1 inside the component, else 0.
    """
    number = torch.arange(1 - learned, 1 - learned + valid.shape[1], device=valid.device)
    own = torch.stack(list(components))[:, None] == number[:, None, None, None]
    return (own & (number > 0)[:, None, None, None]).to(dtype)
