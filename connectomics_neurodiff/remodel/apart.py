"""Pieces of labels that were cut get labels of their own."""

from __future__ import annotations

import numpy as np

from .elastic import Pieces, fragments


def tell_apart(compact: np.ndarray, pieces: Pieces, allowed: np.ndarray) -> np.ndarray:
    """Give the small pieces of labels that have too many new labels, n + 1 and on, in the order of the pieces.

    Parameters
    ----------
    compact : numpy.ndarray
        (z, y, x) uint32, labels 0..n.
    pieces : Pieces
        Its pieces.
    allowed : numpy.ndarray
        (n + 1,) pieces (26-connectivity) that each label may have; its largest ones keep the label.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint32.
    """
    cut = fragments(pieces, allowed)
    if not cut.size:
        return compact
    names = pieces.labels.copy()
    names[cut] = len(allowed) + np.arange(len(cut))
    return names.astype(np.uint32)[pieces.components]


def with_new_ids(ids: np.ndarray, compact: np.ndarray) -> np.ndarray:
    """Table `ids` (uint64) of labels 0..n, extended to all labels of `compact` by the smallest ids > 0 not in use."""
    added = max(0, int(compact.max()) + 1 - len(ids))
    unused = np.setdiff1d(np.arange(1, len(ids) + added + 1, dtype=np.uint64), ids)
    return np.concatenate([ids, unused[:added]])
