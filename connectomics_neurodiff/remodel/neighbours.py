"""Pairs of neighbouring voxels."""

from __future__ import annotations


def sides(dimensions: int, axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of all voxels but the last, and of all but the first, along an axis: the two of every pair."""
    below, above = [slice(None)] * dimensions, [slice(None)] * dimensions
    below[axis], above[axis] = slice(None, -1), slice(1, None)
    return tuple(below), tuple(above)
