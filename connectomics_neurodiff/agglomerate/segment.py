"""From affinities to neurons: fragments, then one of the registered agglomerators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fastremap
import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError
from ..registry import Registry
from .affinity_input import as_affinities
from .fragments import fragments_from_affinities
from .hierarchical import mean_affinity_sweep, waterz_sweep
from .multicut import multicut_sweep

#: Sweeps by name. The meaning of the threshold, and whether a higher one merges more, is the method's own.
Sweep = Callable[[np.ndarray, np.ndarray, Sequence[float]], Iterator[tuple[float, np.ndarray]]]
AGGLOMERATORS: Registry[Sweep] = Registry(
    "agglomerator", "f(affinities float32 (3,z,y,x), fragments uint64 (z,y,x), thresholds) -> iterator of (t, labels)"
)
AGGLOMERATORS.register("waterz")(waterz_sweep)
AGGLOMERATORS.register("mean")(mean_affinity_sweep)
AGGLOMERATORS.register("multicut")(multicut_sweep)

#: waterz's and multicut's as published with NeuroDiff; mean's joins a pair alone where multicut's does, at a mean
#: affinity above .25. Better tuned on a tune split.
DEFAULT_THRESHOLDS: dict[str, float] = {"waterz": 0.30, "mean": 0.75, "multicut": 0.25}


def _as_fragments(fragments: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    labels = np.asarray(fragments)
    if labels.dtype.kind not in "iu" or (labels.dtype.kind == "i" and labels.size and labels.min() < 0):
        raise LabelTypeError(f"Fragments must be non-negative integers, 0 = background. Got dtype {labels.dtype}.")
    if labels.shape != shape:
        raise ShapeMismatch(f"Fragments must have the affinities' shape (z, y, x) {shape}. Got {labels.shape}.")
    return labels.astype(np.uint64, copy=False)


def segment_sweep(
    affinities: np.ndarray, fragments: np.ndarray, method: str, thresholds: Sequence[float]
) -> Iterator[tuple[float, np.ndarray]]:
    """Segmentations of one set of fragments at several thresholds; the affinities are gathered once.

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x), see :func:`as_affinities`.
    fragments : numpy.ndarray
        (z, y, x) integers, 0 = background (stays 0); not modified.
    method : str
        A name in ``AGGLOMERATORS``: "waterz", "mean" or "multicut".
    thresholds : sequence of float
        In [0, 1]. waterz, mean: merge while the score (:func:`waterz_sweep`) is below, higher merges more. multicut:
        beta, the mean affinity at which an edge is indifferent, inside (0, 1), higher merges less.

    Returns
    -------
    iterator of (threshold, segmentation)
        Ascending thresholds; (z, y, x) uint64, each an array of its own, computed when asked for. Input is checked
        before the first.

    Raises
    ------
    ShapeMismatch, ValueRangeError, LabelTypeError
        If an input is not as described.
    UnknownName
        If there is no such method.
    MissingDependency
        If waterz or python-elf is not installed.
    """
    sweep = AGGLOMERATORS.get(method)
    values = as_affinities(affinities)
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueRangeError(f"Thresholds of '{method}' must lie in [0, 1]. Got {list(thresholds)}.")
    return sweep(values, _as_fragments(fragments, values.shape[1:]), thresholds)


def segment(
    affinities: np.ndarray,
    method: str,
    threshold: float,
    voxel_nm: Sequence[float],
    *,
    fragments: np.ndarray | None = None,
    min_segment_size: int = 0,
    **fragment_options: Any,
) -> np.ndarray:
    """Segment an affinity volume into neurons.

    Parameters
    ----------
    affinities, method, threshold
        See :func:`segment_sweep`; ``DEFAULT_THRESHOLDS`` holds the defaults.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm: decides whether fragments are made section by section or in 3D.
    fragments : numpy.ndarray, optional
        (z, y, x) fragments to agglomerate; without them :func:`fragments_from_affinities` makes them.
    min_segment_size : int
        Segments with fewer voxels become background.
    **fragment_options
        Parameters of :func:`fragments_from_affinities`, ``mask`` among them.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint64, 0 = background.

    Raises
    ------
    ShapeMismatch, ValueRangeError, LabelTypeError, UnknownName, MissingDependency
        See :func:`segment_sweep`; also if options for making fragments come with fragments.
    """
    AGGLOMERATORS.get(method)  # a misspelt name fails before the watershed, not after
    values = as_affinities(affinities)
    if fragments is None:
        fragments = fragments_from_affinities(values, voxel_nm, **fragment_options)
    elif fragment_options:
        raise ValueRangeError(f"With given fragments there are no options for making them. Got {[*fragment_options]}.")
    _, labels = next(iter(segment_sweep(values, fragments, method, [threshold])))
    return _without_small(labels, min_segment_size)


def _without_small(labels: np.ndarray, min_size: int) -> np.ndarray:
    if min_size <= 1:
        return labels
    ids, sizes = fastremap.unique(labels, return_counts=True)
    return fastremap.mask(labels, ids[sizes < min_size].tolist())
