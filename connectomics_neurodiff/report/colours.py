"""Colours of neurons: the same id has the same colour in every figure, and neighbouring ids look different."""

from __future__ import annotations

import numpy as np

from ..errors import LabelTypeError, ShapeMismatch

# Fibonacci hashing (Knuth, TAOCP vol. 3, section 6.4): 2^64 / golden ratio. Multiplying modulo 2^64 turns consecutive
# ids by 137.5 degrees of hue each, the angle that keeps any run of consecutive ids spread evenly over the circle.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# A second odd multiplier, independent of the first (splitmix64, Steele et al. 2014), chooses among lightness steps:
# ids whose hues nearly coincide (13 apart, 21 apart) still differ.
_SPLITMIX = np.uint64(0xBF58476D1CE4E5B9)
_LIGHTNESS = np.array([56.0, 66.0, 76.0, 86.0])
_CHROMA = 42.0


def label_colours(ids: np.ndarray) -> np.ndarray:
    """Colour of each label id.

    Hues are equally spaced in CIE LCh, so that no colour outshines the others; lightness stays between 56 and 86.

    Parameters
    ----------
    ids : numpy.ndarray
        Non-negative integers, any shape.

    Returns
    -------
    numpy.ndarray
        float32 (..., 3) RGB in [0, 1]. Id 0 is black; the colour of an id depends on nothing but the id.

    Raises
    ------
    LabelTypeError
        If `ids` are not integers or one is negative.
    """
    from skimage.color import lab2rgb

    # At least one axis: numpy warns of overflow in scalars, and overflow is the point of this hash.
    number = np.atleast_1d(_as_uint64(np.asarray(ids)))
    hue = (number * _GOLDEN).astype(np.float64) * (2 * np.pi / 2.0**64)
    mixed = number ^ (number >> np.uint64(30))
    lightness = _LIGHTNESS[((mixed * _SPLITMIX) >> np.uint64(62)).astype(np.intp)]
    lab = np.stack([lightness, _CHROMA * np.cos(hue), _CHROMA * np.sin(hue)], axis=-1)
    colours = lab2rgb(lab).astype(np.float32)
    colours[number == 0] = 0
    return colours.reshape(*np.shape(ids), 3)


def _as_uint64(label: np.ndarray) -> np.ndarray:
    if label.dtype.kind not in "iub":
        raise LabelTypeError(f"Labels are non-negative integers. Got {label.dtype}.")
    if label.dtype.kind == "i" and label.size and int(label.min()) < 0:
        raise LabelTypeError(f"Labels are non-negative integers. Got {int(label.min())}.")
    return label.astype(np.uint64)


def colourise(label: np.ndarray) -> np.ndarray:
    """Paint a label array.

    Parameters
    ----------
    label : numpy.ndarray
        (y, x) or (z, y, x) non-negative integers.

    Returns
    -------
    numpy.ndarray
        float32 (..., 3) RGB in [0, 1]; background black.
    """
    ids, inverse = np.unique(label, return_inverse=True)
    return label_colours(ids)[inverse.reshape(label.shape)]


def grey_to_rgb(image: np.ndarray, limits: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Grey image as RGB: `limits` become black and white, values beyond are clipped.

    Parameters
    ----------
    image : numpy.ndarray
        (y, x) grey values.
    limits : (float, float)
        Grey values shown black and white, low < high.

    Returns
    -------
    numpy.ndarray
        float32 (y, x, 3) in [0, 1].
    """
    low, high = limits
    grey = np.clip((np.asarray(image, dtype=np.float32) - low) / (high - low), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def overlay(
    image: np.ndarray, label: np.ndarray, *, opacity: float = 0.45, limits: tuple[float, float] = (0.0, 1.0)
) -> np.ndarray:
    """Tint a grey image with the colours of its labels; background stays grey.

    Parameters
    ----------
    image : numpy.ndarray
        (y, x) grey values.
    label : numpy.ndarray
        (y, x) non-negative integers.
    opacity : float
        Weight of the colour in [0, 1].
    limits : (float, float)
        Grey values shown black and white.

    Returns
    -------
    numpy.ndarray
        float32 (y, x, 3) RGB in [0, 1].

    Raises
    ------
    ShapeMismatch
        If image and label differ in shape.
    """
    if image.shape != label.shape:
        raise ShapeMismatch(f"Image and label must have one shape. Got {image.shape} and {label.shape}.")
    weight = opacity * (label > 0)[..., None]
    return ((1 - weight) * grey_to_rgb(image, limits) + weight * colourise(label)).astype(np.float32)


def outlines(label: np.ndarray) -> np.ndarray:
    """One-pixel outlines of the labels of a section.

    Parameters
    ----------
    label : numpy.ndarray
        (y, x) integers.

    Returns
    -------
    numpy.ndarray
        bool (y, x): pixels whose right or lower neighbour carries another label.
    """
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    return edge


def match_segments(segmentation: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rename segments after the true neurons they cover, so that equal colours mean agreement.

    A segment belongs to the neuron it overlaps most. Of several segments that belong to one neuron (a split) the one
    with the largest overlap takes its id; the others, and segments on background only, take new ids above the
    neurons'. A segment over two neurons (a merge) carries the id of one of them across both.

    Parameters
    ----------
    segmentation, truth : numpy.ndarray
        Non-negative integers of one shape; 0 = background.

    Returns
    -------
    numpy.ndarray
        uint64, the segmentation under its new ids: the same partition, 0 kept.

    Raises
    ------
    ShapeMismatch
        If the shapes differ.
    """
    if segmentation.shape != truth.shape:
        raise ShapeMismatch(
            f"Segmentation and ground truth must have one shape. Got {segmentation.shape} and {truth.shape}."
        )
    segments, segment = np.unique(_as_uint64(segmentation), return_inverse=True)
    neurons, neuron = np.unique(_as_uint64(truth), return_inverse=True)
    pairs, overlap = np.unique(segment.ravel() * neurons.size + neuron.ravel(), return_counts=True)
    row, column = np.divmod(pairs, neurons.size)
    on_neuron = (segments[row] > 0) & (neurons[column] > 0)
    row, column, overlap = row[on_neuron], column[on_neuron], overlap[on_neuron]
    order = np.argsort(-overlap, kind="stable")
    row, column = row[order], column[order]
    _, best = np.unique(row, return_index=True)  # each segment's neuron: its largest overlap comes first
    best.sort()
    _, first = np.unique(column[best], return_index=True)  # each neuron's segment: again the largest first
    winners = best[first]
    new_ids = neurons.max(initial=np.uint64(0)) + np.uint64(1) + np.arange(segments.size, dtype=np.uint64)
    new_ids[row[winners]] = neurons[column[winners]]
    new_ids[segments == 0] = 0
    return new_ids[segment.reshape(segmentation.shape)]
