"""Affinity-guided queries: coarse neurons from the predicted affinities, each with its mean feature."""

from __future__ import annotations

from collections.abc import Sequence

import fastremap
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...libraries import MEAN_AFFINITY, silent_stdout, waterz
from .masks import split

# Affinities above the upper one belong together whatever follows, those below the lower one never do. On affinities of
# three FIB crops of 33 x 97 x 97 (waterz, median of largest, at .4) VOI is 1.36 with these limits, 2.01 without.
_WATERSHED_LOW, _WATERSHED_HIGH = 0.1, 0.99


def affinity_components(affinity: np.ndarray) -> np.ndarray:
    """Coarse neurons as published: 26-connected components of the voxels whose mean affinity exceeds the volume's mean.

    Parameters
    ----------
    affinity : numpy.ndarray
        (c, z, y, x) in [0, 1].

    Returns
    -------
    numpy.ndarray
        (z, y, x) integers: 0, or the number 1..n of the component.
    """
    import cc3d

    mask = np.ascontiguousarray(affinity.mean(axis=0) > affinity.mean())  # cc3d 4.1 misreads views
    return np.asarray(cc3d.connected_components(mask, connectivity=26))


def agglomerated_components(affinity: np.ndarray, threshold: float) -> np.ndarray:
    """Coarse neurons by waterz: its own watershed (Zlateski and Seung 2015), merged by mean affinity.

    One gap in a membrane joins connected components for good; a mean over the whole contact hardly sees it.

    Parameters
    ----------
    affinity : numpy.ndarray
        (3, z, y, x) in [0, 1].
    threshold : float
        Neighbours are merged while 1 - the mean affinity between them is below this, in (0, 1].

    Returns
    -------
    numpy.ndarray
        (z, y, x) integers: 0 (no affinity above the watershed's lower threshold), or the number of the component.

    Raises
    ------
    MissingDependency
        If waterz is not installed.
    """
    with silent_stdout():
        (components,) = waterz().agglomerate(
            np.ascontiguousarray(affinity, dtype=np.float32),
            thresholds=[threshold],
            aff_threshold_low=_WATERSHED_LOW,
            aff_threshold_high=_WATERSHED_HIGH,
            scoring_function=MEAN_AFFINITY,
            discretize_queue=256,
        )
    return fastremap.renumber(components)[0]


def largest_components(
    components: np.ndarray, *, smallest: int, most: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """The components that become queries.

    Parameters
    ----------
    components : numpy.ndarray
        (z, y, x) integers >= 0, 0 = none.
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
    voxels = np.bincount(components.ravel())
    voxels[0] = 0
    kept = np.flatnonzero(voxels > smallest)
    if len(kept) > most:
        if rng is None:
            kept = kept[np.argsort(-voxels[kept], kind="stable")[:most]]
        else:
            kept = rng.choice(kept, most, replace=False)
    number = np.zeros(len(voxels), dtype=np.int64)
    number[np.sort(kept)] = np.arange(1, len(kept) + 1)
    return number[components]


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
    own, rows = components.flatten(), features.flatten(1).t()
    total = torch.zeros(len(numbers), len(features), device=features.device)
    # A product with masks rather than a scattered sum: the same bits on every run, also on a GPU. Not all masks at
    # once: without gradients, of 400 components in 40 x 81 x 81 voxels, they take 420 MB.
    for voxels, values in zip(split(own), split(rows), strict=True):
        total = total + (voxels == numbers[:, None]).to(features.dtype) @ values
    return total / torch.bincount(own, minlength=len(numbers) + 1)[1:, None]


def guided_queries(
    affinity: Tensor,
    features: Tensor,
    *,
    smallest: int,
    most: int,
    threshold: float = 0.0,
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
        As for :func:`largest_components`; one generator per sample.
    threshold : float
        Of :func:`agglomerated_components`; 0 for :func:`affinity_components`.

    Returns
    -------
    list of (torch.Tensor, torch.Tensor)
        For sample i its queries (n_i, c), n_i from 0 to `most`, and the components (z, y, x) int64 whose means they
        are: 0, or 1..n_i.
    """
    volumes = affinity.detach().float().cpu().numpy()
    found = []
    for i, volume in enumerate(volumes):
        parts = agglomerated_components(volume, threshold) if threshold > 0 else affinity_components(volume)
        components = torch.from_numpy(
            largest_components(parts, smallest=smallest, most=most, rng=rngs[i] if rngs else None)
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
