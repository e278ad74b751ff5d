"""Hierarchical agglomeration with waterz: merge the most similar neighbours first, until a threshold.

The score of two neighbouring regions is 1 minus the median (50 % quantile, from a histogram of 256 bins) of the
affinities between them, where waterz counts of two fragments the largest affinity alone: so it is the median over the
fragments' contacts, and one strong edge joins two fragments. Pairs are merged in the order of their score as long as it
is below the threshold. The method "mean" takes 1 minus the mean of all affinities of the contact instead, which no
single edge decides.
Funke et al., Large scale image segmentation with structured loss based deep learning, IEEE TPAMI 41 (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..libraries import MEAN_AFFINITY, MEDIAN_OF_LARGEST_AFFINITIES, silent_stdout, waterz


def waterz_sweep(
    affinities: np.ndarray,
    fragments: np.ndarray,
    thresholds: Sequence[float],
    scoring: str = MEDIAN_OF_LARGEST_AFFINITIES,
) -> Iterator[tuple[float, np.ndarray]]:
    """Segmentations at several thresholds, for little more than the cost of the highest.

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x) float32 in [0, 1].
    fragments : numpy.ndarray
        (z, y, x) uint64, 0 = background; not modified.
    thresholds : sequence of float
        In [0, 1]: merge while the score is below it. A HIGHER threshold merges MORE.
    scoring : str
        waterz's name of the score; one that its wheels hold precompiled.

    Yields
    ------
    threshold, segmentation : float, numpy.ndarray
        (z, y, x) uint64, in ascending order of the thresholds; each segmentation is an array of its own.
    """
    wanted = sorted(float(threshold) for threshold in thresholds)
    with silent_stdout():
        segmentations = waterz().agglomerate(
            affinities,
            thresholds=wanted,
            fragments=np.array(fragments, dtype=np.uint64, order="C"),  # a copy: waterz merges in place
            scoring_function=scoring,
            discretize_queue=256,
        )
    for threshold in wanted:
        with silent_stdout():
            segmentation = next(segmentations)
        yield threshold, segmentation.copy()  # waterz goes on merging in the same array


def mean_affinity_sweep(
    affinities: np.ndarray, fragments: np.ndarray, thresholds: Sequence[float]
) -> Iterator[tuple[float, np.ndarray]]:
    """As :func:`waterz_sweep`, scored by 1 minus the mean affinity over the whole contact of two regions."""
    return waterz_sweep(affinities, fragments, thresholds, MEAN_AFFINITY)
