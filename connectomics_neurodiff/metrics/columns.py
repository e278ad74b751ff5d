"""How much a score varies over a volume: scores of its columns, and the difference of two segmentations in them.

One score of a whole volume hangs on a few large neurons: a single merger moves the adapted Rand error by more than any
training does. Columns are scored each for itself, so that the difference of two segmentations comes with an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import cc3d
import numpy as np

from ..errors import ShapeMismatch, ValueRangeError
from .overlap import Scores, evaluate, require_labels

#: Columns along y and x that a volume is scored in.
COLUMNS = (3, 3)


def columns_of(shape: Sequence[int]) -> tuple[int, int]:
    """:data:`COLUMNS`, fewer in a volume (z, y, x) of fewer pixels."""
    return min(COLUMNS[0], shape[1]), min(COLUMNS[1], shape[2])


def evaluate_columns(
    segmentation: np.ndarray, truth: np.ndarray, columns: Sequence[int] = COLUMNS
) -> list[Scores | None]:
    """Scores of each column of a volume; a column runs through all sections.

    Parts of a neuron that only meet outside a column are different neurons in it, in the truth and in the segmentation
    (26-connected components): a merger counts where it happens.

    Parameters
    ----------
    segmentation, truth : numpy.ndarray
        (z, y, x) integers >= 0, as for :func:`.evaluate`.
    columns : sequence of 2 ints
        How many along y and x, >= 1, at most as many as there are pixels.

    Returns
    -------
    list of (Scores or None)
        Row by row. None where the truth of a column is 0 throughout.

    Raises
    ------
    ShapeMismatch
        If the shapes differ or are not three-dimensional.
    ValueRangeError
        If there is not at least one pixel per column.
    LabelTypeError
        See :func:`.evaluate`.
    """
    if np.shape(segmentation) != np.shape(truth) or np.ndim(truth) != 3:
        raise ShapeMismatch(
            "Segmentation and truth must have the same shape (z, y, x). "
            f"Got {np.shape(segmentation)} and {np.shape(truth)}."
        )
    size = truth.shape[1:]
    if len(columns) != 2 or not all(1 <= count <= n for count, n in zip(columns, size, strict=True)):
        raise ValueRangeError(
            f"A volume of {size[0]} x {size[1]} pixels has 1 to as many columns along each axis. Got {tuple(columns)}."
        )
    # Components of other types would be counted without a word.
    require_labels(segmentation, "segmentation")
    require_labels(truth, "truth")
    return [_evaluate_column(segmentation[column], truth[column]) for column in column_slices(size, columns)]


def column_slices(size: Sequence[int], columns: Sequence[int] = COLUMNS) -> list[tuple[Any, slice, slice]]:
    """Index of each column in an array (..., z, y, x), row by row; `size` is its (y, x)."""
    cuts = ([round(i * n / count) for i in range(count + 1)] for n, count in zip(size, columns, strict=True))
    return [(..., slice(a, b), slice(c, d)) for (a, b), (c, d) in product(*(pairwise(axis) for axis in cuts))]


def _evaluate_column(segmentation: np.ndarray, truth: np.ndarray) -> Scores | None:
    if not truth.any():
        return None
    # cc3d 4.1 misreads views.
    parts = (
        cc3d.connected_components(np.ascontiguousarray(labels), connectivity=26) for labels in (segmentation, truth)
    )
    return evaluate(*parts)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of ``after - before`` and its standard error.

    Parameters
    ----------
    before, after : sequence of float
        The same score of the same columns, at least two.

    Returns
    -------
    mean, standard_error : float
        Standard deviation (n - 1) of the differences over the root of their number. Neighbouring columns share neurons,
        and one training is one sample: the true uncertainty is larger.

    Raises
    ------
    ValueRangeError
        If there are not as many of the one as of the other, or fewer than two pairs.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueRangeError(
            f"A paired difference needs as many values before as after, two at least. "
            f"Got {len(before)} and {len(after)}."
        )
    differences = np.subtract(after, before)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
