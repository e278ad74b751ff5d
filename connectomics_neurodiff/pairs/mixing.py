"""Exact mixing of real and synthetic samples, as a pure function of the sample number."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

from ..errors import ValueRangeError

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@lru_cache(maxsize=16)
def _share(ratio: float) -> Fraction:
    """Synthetic share of all samples, ratio / (1 + ratio), as a fraction."""
    if not math.isfinite(ratio) or ratio < 0:
        raise ValueRangeError(f"The ratio synthetic : real must be a finite number >= 0. Got {ratio}.")
    exact = Fraction(ratio).limit_denominator(1_000_000)
    return exact / (1 + exact)


def _count_before(i: int, share: Fraction) -> int:
    """Number of synthetic samples among the first `i`: i * share, rounded down or up.

    Samples come in blocks that hold a whole number of synthetic ones, so every block may start its Bresenham line at
    another phase. A single phase would repeat the same order for ever, and with ratio 1 and two devices, one of
    them would see synthetic samples only. The phases follow the golden ratio, whose multiples never repeat.
    """
    block, within = divmod(i, share.denominator)
    phase = int(share.denominator * (block * _GOLDEN_RATIO % 1.0))
    return block * share.numerator + (within * share.numerator + phase) // share.denominator


def last_synthetic(share: float, samples: int) -> int | None:
    """The `until` of :func:`is_synthetic` for a training of so many samples that ends on real ones.

    Parameters
    ----------
    share : float
        Part of the training, in (0, 1], in which synthetic samples are drawn.
    samples : int
        Samples of the whole training, on all devices together.

    Returns
    -------
    int or None
        The nearest number of samples; None for the whole training.

    Raises
    ------
    ValueRangeError
        If the share is not in (0, 1], or less than half a sample.
    """
    if not 0 < share <= 1:
        raise ValueRangeError(f"The part of a training that sees synthetic samples must be in (0, 1]. Got {share}.")
    until = round(share * samples)
    if not until:
        raise ValueRangeError(
            f"The part of a training that sees synthetic samples must be one of its {samples} samples at least. "
            f"Got {share}."
        )
    return None if share == 1 else until


def is_synthetic(i: int, ratio: float, until: int | None = None) -> bool:
    """Whether training sample `i` is drawn from the synthetic volumes.

    Parameters
    ----------
    i : int
        Sample number, >= 0.
    ratio : float
        Synthetic : real, >= 0. The paper uses 1; 0 means real samples only.
    until : int, optional
        From this sample on all are real: what a network saw last shapes it most.

    Returns
    -------
    bool
        Among the first n samples, floor or ceil of n * ratio / (1 + ratio) are synthetic, for every n up to `until`. (A
        ratio is taken as the nearest fraction with a denominator up to one million.)

    Raises
    ------
    ValueRangeError
        If `ratio` is negative or not finite, or `i` is negative.
    """
    if i < 0:
        raise ValueRangeError(f"A sample number must be >= 0. Got {i}.")
    share = _share(ratio)
    if until is not None and i >= until:
        return False
    return _count_before(i + 1, share) > _count_before(i, share)
