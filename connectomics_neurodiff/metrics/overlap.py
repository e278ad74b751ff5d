"""Variation of information and adapted Rand error from the overlaps of two label volumes.

Notation: n_ij voxels lie in truth segment i and in segmentation segment j, N = sum n_ij, and a dot sums over an index.
Voxels whose truth is 0 do not count. Segmentation 0 is a segment like any other, so that leaving voxels unsegmented
is not a way to a better score.

References
----------
M. Meila, Comparing clusterings - an information based distance, J. Multivariate Analysis 98 (2007).
I. Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, Frontiers in
Neuroanatomy 9 (2015): adapted Rand error, the score of the SNEMI3D challenge.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import fastremap
import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError

#: Pairs of segments up to which the table is counted densely (128 MiB of float64); beyond, by sorting.
DENSE_TABLE = 1 << 24


@dataclass(frozen=True)
class Scores:
    """How far a segmentation is from the truth; 0 is perfect in every field.

    Attributes
    ----------
    voi_split : float
        H(segmentation | truth) in bits: grows when a neuron is cut into pieces.
    voi_merge : float
        H(truth | segmentation) in bits: grows when neurons are joined.
    voi : float
        Their sum, the variation of information.
    arand : float
        Adapted Rand error in [0, 1].
    """

    voi_split: float
    voi_merge: float
    voi: float
    arand: float

    def as_dict(self) -> dict[str, float]:
        """The fields by name, as plain floats."""
        return asdict(self)


@dataclass(frozen=True)
class RandScores:
    """Rand F-score, taken apart; 1 is perfect for the first two.

    Attributes
    ----------
    rand_split : float
        Of the voxel pairs in one truth segment, the share that the segmentation keeps together (recall). Low: splits.
    rand_merge : float
        Of the voxel pairs in one segment, the share that truly belongs together (precision). Low: mergers.
    arand : float
        1 - harmonic mean of the two.
    """

    rand_split: float
    rand_merge: float
    arand: float


@dataclass(frozen=True)
class Overlap:
    """Sparse contingency table of a truth and a segmentation, truth 0 left out.

    Attributes
    ----------
    truth_index, segment_index : numpy.ndarray
        (k,) int64: dense index of the truth segment i, and of the segmentation segment j, of each overlap.
    voxels : numpy.ndarray
        (k,) float64: n_ij, exact below 2**53.
    """

    truth_index: np.ndarray
    segment_index: np.ndarray
    voxels: np.ndarray

    @property
    def truth_voxels(self) -> np.ndarray:
        """n_i. for each truth segment."""
        return np.bincount(self.truth_index, weights=self.voxels)

    @property
    def segment_voxels(self) -> np.ndarray:
        """n_.j for each segmentation segment."""
        return np.bincount(self.segment_index, weights=self.voxels)


def require_labels(values: np.ndarray, name: str) -> np.ndarray:
    """`values` as an array of integers >= 0, flat; lazy arrays are read."""
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise LabelTypeError(f"The {name} must hold non-negative integers. Got dtype {labels.dtype}.")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise LabelTypeError(f"The {name} must hold non-negative integers. Got the minimum {labels.min()}.")
    return labels.ravel()


def _runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the runs over which both flat arrays are constant.

    Labels are constant over tens of voxels along x: everything after this step works on a fraction of the volume.
    """
    change = first[1:] != first[:-1]
    change |= second[1:] != second[:-1]
    starts = np.concatenate([[0], np.flatnonzero(change) + 1])
    return starts, np.diff(starts, append=first.size)


def _dense(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids renumbered to 0, 1, ... in order of appearance (int64), and how many there are."""
    dense, mapping = fastremap.renumber(ids, preserve_zero=False)
    return dense.astype(np.int64) - 1, len(mapping)


def _sum_by_key(keys: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, and the sum of the weights of each as float64 (exact below 2**53)."""
    if int(keys.max()) < DENSE_TABLE:
        table = np.bincount(keys, weights=weights)
        present = np.flatnonzero(table)
        return present, table[present]
    order = np.argsort(keys)
    keys = keys[order]
    first = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    return keys[first], np.add.reduceat(weights[order], first).astype(np.float64)


def contingency(segmentation: np.ndarray, truth: np.ndarray) -> Overlap:
    """Count the voxels that each truth segment shares with each segmentation segment.

    Parameters
    ----------
    segmentation, truth : numpy.ndarray
        Integers >= 0 of the same shape; (z, y, x) or any other. Truth 0 is ignored, segmentation 0 is a segment.

    Returns
    -------
    Overlap
        Each overlapping pair once.

    Raises
    ------
    ShapeMismatch
        If the shapes differ.
    LabelTypeError
        If one of them holds floats, booleans or negative numbers.
    ValueRangeError
        If the truth is 0 everywhere (or empty).
    """
    if np.shape(segmentation) != np.shape(truth):
        raise ShapeMismatch(
            f"Segmentation and truth must have the same shape. Got {np.shape(segmentation)} and {np.shape(truth)}."
        )
    segments, neurons = require_labels(segmentation, "segmentation"), require_labels(truth, "truth")
    if not neurons.any():
        raise ValueRangeError("The truth must label at least one voxel > 0; it is 0 (ignored) everywhere.")
    starts, lengths = _runs(segments, neurons)
    kept = neurons[starts] != 0
    starts, lengths = starts[kept], lengths[kept]
    truth_index, _ = _dense(neurons[starts])
    segment_index, n_segments = _dense(segments[starts])
    pairs, voxels = _sum_by_key(truth_index * n_segments + segment_index, lengths)
    return Overlap(truth_index=pairs // n_segments, segment_index=pairs % n_segments, voxels=voxels)


def _conditional_entropy(overlap: Overlap, given: np.ndarray) -> float:
    """-sum n_ij / N log2(n_ij / n_given), in bits; `given` holds the marginal that belongs to each overlap."""
    entropy = -(overlap.voxels * np.log2(overlap.voxels / given)).sum() / overlap.voxels.sum()
    return max(0.0, float(entropy))  # max: no -0.0


def _rand(overlap: Overlap, self_pairs: bool) -> RandScores:
    own = 0.0 if self_pairs else overlap.voxels.sum()
    together = (overlap.voxels**2).sum() - own
    in_truth = (overlap.truth_voxels**2).sum() - own
    in_segments = (overlap.segment_voxels**2).sum() - own
    # Without self-pairs a volume of single-voxel segments has no pair at all: nothing can be wrong with it.
    return RandScores(
        rand_split=float(together / in_truth) if in_truth else 1.0,
        rand_merge=float(together / in_segments) if in_segments else 1.0,
        arand=float(1.0 - 2.0 * together / (in_truth + in_segments)) if in_truth + in_segments else 0.0,
    )


def rand_scores(segmentation: np.ndarray, truth: np.ndarray, *, self_pairs: bool = True) -> RandScores:
    """Rand split and merge scores, and the adapted Rand error they make up.

    rand_split = sum n_ij^2 / sum n_i.^2,  rand_merge = sum n_ij^2 / sum n_.j^2 (as funlib.evaluate and waterz name
    them), arand = 1 - 2 sum n_ij^2 / (sum n_i.^2 + sum n_.j^2).

    Parameters
    ----------
    segmentation, truth : numpy.ndarray
        See :func:`contingency`.
    self_pairs : bool
        Whether a voxel makes a pair with itself. True is SNEMI3D's formula. False subtracts N from each sum, as
        scikit-image does (which calls the first quantity `precision` and the second `recall`, the other way round
        than most); the two differ by about 1e-5 on real volumes.
    """
    return _rand(contingency(segmentation, truth), self_pairs)


def evaluate(segmentation: np.ndarray, truth: np.ndarray) -> Scores:
    """Variation of information (bits) and adapted Rand error of a segmentation.

    voi_split = H(S|T) = -sum n_ij/N log2(n_ij / n_i.),  voi_merge = H(T|S) = -sum n_ij/N log2(n_ij / n_.j),
    arand = 1 - 2 sum n_ij (n_ij - 1) / (sum n_i. (n_i. - 1) + sum n_.j (n_.j - 1)): SNEMI3D's, restricted to the
    foreground and over pairs of different voxels, as scikit-image computes it; pairs of a voxel with itself would
    change it by about 1e-5 on real volumes (:func:`rand_scores`).

    Parameters
    ----------
    segmentation : numpy.ndarray
        Integers >= 0. Its 0 counts as one segment.
    truth : numpy.ndarray
        Integers >= 0 of the same shape. Its 0 is ignored.

    Returns
    -------
    Scores
        ``voi_split``, ``voi_merge``, ``voi`` in bits, ``arand`` in [0, 1].

    Raises
    ------
    ShapeMismatch, LabelTypeError, ValueRangeError
        See :func:`contingency`.

    Examples
    --------
    >>> evaluate(np.array([2, 2, 2, 2]), np.array([1, 1, 2, 2]))
    Scores(voi_split=0.0, voi_merge=1.0, voi=1.0, arand=0.5)
    """
    overlap = contingency(segmentation, truth)
    split = _conditional_entropy(overlap, overlap.truth_voxels[overlap.truth_index])
    merge = _conditional_entropy(overlap, overlap.segment_voxels[overlap.segment_index])
    return Scores(split, merge, split + merge, _rand(overlap, self_pairs=False).arand)
