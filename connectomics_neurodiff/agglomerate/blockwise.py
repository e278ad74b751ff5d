"""Instance segmentation of a volume larger than memory: block by block, then stitched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ShapeMismatch
from ..geometry import Box, tiles
from ..progress import progress
from .stitching import WritableLabels, stitch_blocks


class Readable(Protocol):
    """Array (..., z, y, x), in memory or read from disk when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent; the last three axes are (z, y, x)."""

    def __getitem__(self, index: Any) -> Any:
        """Part of the array."""


def segment_blockwise(
    segment: Callable[[np.ndarray], np.ndarray],
    image: Readable,
    *,
    block: Sequence[int],
    overlap: Sequence[int],
    out: WritableLabels | None = None,
    min_fraction: float = 0.5,
    min_contact: int = 8,
    scratch: str | Path | None = None,
    label: str = "segment",
) -> WritableLabels:
    """Segment a volume of any size in overlapping blocks, one of which is in memory at a time.

    Parameters
    ----------
    segment : callable
        Part of the image (a copy) -> its instances (z, y, x): integers >= 0, 0 = background, ids of its own. Every
        part has the shape `block`, or the volume's where that is smaller.
    image : array-like
        (z, y, x), or with leading axes, e.g. affinities (3, z, y, x); may be on disk.
    block, overlap, out, min_fraction, min_contact, scratch
        See :func:`stitch_blocks`.
    label : str
        Name on the progress bar.

    Returns
    -------
    numpy.ndarray (uint64) or `out`
        (z, y, x), 0 = background, instances 1, 2, ...

    Raises
    ------
    ShapeMismatch
        If the image has fewer than three axes.
    ShapeMismatch, ValueRangeError, LabelTypeError
        See :func:`stitch_blocks`.

    Examples
    --------
    >>> segment_blockwise(
    ...     lambda part: segment(part, "waterz", 0.3, voxel_nm), affinities, block=(64, 512, 512), overlap=(8, 64, 64)
    ... )  # doctest: +SKIP
    """
    if len(image.shape) < 3:
        raise ShapeMismatch(f"An image has the axes (..., z, y, x). Got shape {tuple(image.shape)}.")
    shape = tuple(image.shape[-3:])

    def blocks() -> Iterator[tuple[Box, np.ndarray]]:
        for box in progress(tiles(shape, block, overlap), label=label):
            part = np.array(image[(..., *box.slices)], order="C")  # a copy: what `segment` does to it stays there
            yield box, segment(part)

    return stitch_blocks(
        blocks(),
        shape,
        block=block,
        overlap=overlap,
        out=out,
        min_fraction=min_fraction,
        min_contact=min_contact,
        scratch=scratch,
    )
