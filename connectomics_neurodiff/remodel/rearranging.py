"""Rearranged tissue: two crops of a volume joined along a membrane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import edt
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from ..errors import ShapeMismatch
from ..geometry import ZYX, is_anisotropic, voxel_size
from .apart import tell_apart
from .elastic import mend, pieces_of
from .neighbours import sides

#: Where along its axis the seam may lie, and how far it may wander to either side: of the axis, and in nm at most.
_MIDDLE, _WANDER, _WANDER_NM = (0.35, 0.65), 0.2, 600.0
#: Edge of the blocks into which the seam's surroundings are divided, nm.
_BLOCK_NM = 100.0
#: Cost of a nm^2 of seam where it runs between neurons in both crops, in one, and in neither.
_COSTS = (0.2, 0.4, 4.0)
#: A cut piece that is nowhere deeper goes to its surroundings: it would be membrane only.
_SLIVER_NM = 20.0
_LEAST_PIXELS = 8
#: Largest sum of capacities that the maximum flow, of 32-bit integers, may meet.
_MOST_CAPACITY = 2**30


@dataclass(frozen=True, eq=False)
class Rearrangement:
    """Two crops of a volume, joined.

    Attributes
    ----------
    label : numpy.ndarray
        (z, y, x) uint32. Labels 1..n are the source's, as far as the first crop shows them; the second crop's and those
        of cut pieces are above n.
    marks : numpy.ndarray
        (z, y, x) uint8.
    left_out : numpy.ndarray
        Labels of the source that are not in `label`.
    """

    label: np.ndarray
    marks: np.ndarray
    left_out: np.ndarray


def join_crops(
    compact: np.ndarray, marks: np.ndarray, voxel_nm: Sequence[float], rng: np.random.Generator
) -> Rearrangement:
    """Replace a part of a volume by a crop of another place, flipped or transposed in-plane.

    The two crops overlap in a band across the volume. The seam is the surface in it that parts its two faces at the
    least cost: .2 per nm^2 where it runs between neurons in both crops, .4 where it does in one, and the other's end at
    that one's membrane, 4 where it cuts through neurons of both. It is the minimum cut [Boykov and Kolmogorov 2003,
    Computing geodesics and minimal surfaces via graph cuts] of a graph whose nodes are, within blocks of 100 nm, the
    voxels that belong to the same label in either crop. The idea of rearranging is MRDA's (MICCAI 2022).

    The second crop's labels get numbers of their own. Of a label that is cut into several pieces the largest keeps the
    number and the others get new ones; pieces nowhere deeper than 20 nm go to what surrounds them.

    Parameters
    ----------
    compact : numpy.ndarray
        (z, y, x) uint32, labels 0..n.
    marks : numpy.ndarray
        (z, y, x) uint8, what lies inside neurons; joined along the same seam.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x). Pixels that are not square are not transposed.
    rng : numpy.random.Generator
        Draws the seam's axis, y or x, and place, and the second crop's turn and place.

    Raises
    ------
    ShapeMismatch
        If a section is less than 8 pixels high or wide.
    """
    size = voxel_size(voxel_nm)
    if min(compact.shape[1:]) < _LEAST_PIXELS:
        raise ShapeMismatch(f"Rearranging needs {_LEAST_PIXELS} pixels along y and x. Got shape {compact.shape}.")
    axis = int(rng.integers(1, 3))
    # From here on the seam's axis is the last one.
    order = (0, 3 - axis, axis)
    first, pitch = compact.transpose(order), np.array(size)[list(order)]
    length = first.shape[2]
    middle = round(length * rng.uniform(*_MIDDLE))
    wander = int(min(_WANDER * length, _WANDER_NM / pitch[2])) + 1
    band = slice(middle - wander, middle + wander)
    window = _second_crop(first.shape, length - band.start, bool(np.isclose(*pitch[1:])), rng)
    second = window(first)
    count = int(compact.max()) + 1
    second = np.where(second > 0, second + np.uint32(count - 1), np.uint32(0))
    keeps = np.ones(first.shape, dtype=bool)
    keeps[..., band] = _seam(first[..., band], second[..., : 2 * wander], pitch)
    keeps[..., band.stop :] = False
    joined, joined_marks = first.copy(), marks.transpose(order).copy()
    for volume, crop in ((joined, second), (joined_marks, window(joined_marks.copy()))):
        replaced = ~keeps[..., band.start :]
        volume[..., band.start :][replaced] = crop[replaced]
    back = tuple(np.argsort(order))
    label = np.ascontiguousarray(joined.transpose(back))
    here = np.bincount(label.ravel(), minlength=2 * count - 1)
    there = np.bincount(compact.ravel(), minlength=2 * count - 1) + np.bincount(second.ravel(), minlength=2 * count - 1)
    is_cut = here < there
    is_cut[0] = False
    label = _mended(label, compact, is_cut, size)
    left_out = np.setdiff1d(np.arange(1, count), label)
    return Rearrangement(label, np.ascontiguousarray(joined_marks.transpose(back)), left_out)


def _second_crop(
    shape: tuple[int, ...], length: int, square: bool, rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """What takes the second crop, `length` along the last axis and `shape` along the others, from a volume."""
    turns = [(True, False, False), (False, True, False), (True, True, False)]
    if square and shape[2] >= shape[1] and shape[1] >= length:
        turns += [(flip, mirror, True) for flip in (False, True) for mirror in (False, True)]
    flip, mirror, transposed = turns[rng.integers(len(turns))]
    across, along = (shape[2], shape[1]) if transposed else shape[1:]
    left, start = int(rng.integers(across - shape[1] + 1)), int(rng.integers(along - length + 1))

    def window(volume: np.ndarray) -> np.ndarray:
        turned = volume.transpose(0, 2, 1) if transposed else volume
        turned = turned[:, :: -1 if flip else 1, :: -1 if mirror else 1]
        return turned[:, left : left + shape[1], start : start + length]

    return window


def _seam(first: np.ndarray, second: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Which voxels of the band keep the first crop, bool: the side of the minimum cut that holds its first plane."""
    nodes, count = _cells(first, second, pitch)
    faces = np.prod(pitch) / pitch
    keys, costs = [], []
    for axis in range(3):
        below, above = sides(3, axis)
        apart = nodes[below] != nodes[above]
        cut = sum(((c[below] == c[above]) & (c[below] > 0))[apart].astype(int) for c in (first, second))
        keys.append(nodes[below][apart] * count + nodes[above][apart])
        costs.append(np.array(_COSTS)[cut] * faces[axis])
    pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    cost = np.bincount(inverse, np.concatenate(costs))
    capacity = np.maximum(np.rint(cost * (_MOST_CAPACITY / (2 * cost.sum()))), 1).astype(np.int32)
    # Two more nodes: all cells of the band's first plane hang on one, those of its last plane on the other.
    source, sink = count, count + 1
    starts, ends = np.unique(nodes[..., 0]), np.unique(nodes[..., -1])
    rows = np.concatenate([pairs // count, np.full(len(starts), source), ends])
    columns = np.concatenate([pairs % count, starts, np.full(len(ends), sink)])
    values = np.concatenate([capacity, np.full(len(starts) + len(ends), _MOST_CAPACITY, np.int32)])
    graph = sparse.coo_matrix((values, (rows, columns)), shape=(count + 2, count + 2)).tocsr()
    graph = (graph + graph.T).astype(np.int32).tocsr()
    flow = csgraph.maximum_flow(graph, source, sink).flow
    residual = (graph - flow).tocsr()
    residual.eliminate_zeros()
    reached = np.zeros(count + 2, dtype=bool)
    reached[csgraph.breadth_first_order(residual, source, return_predecessors=False)] = True
    return np.asarray(reached[nodes])


def _cells(first: np.ndarray, second: np.ndarray, pitch: np.ndarray) -> tuple[np.ndarray, int]:
    """Number per voxel of the cell it is in, of the same label in either crop and in one block; number of cells."""
    steps = np.maximum(_BLOCK_NM // pitch, 1).astype(np.int64)
    z, y, x = (np.arange(n) // step for n, step in zip(first.shape, steps, strict=True))
    # The planes that hang on source and sink are blocks of their own.
    x = 1 + x
    x[0], x[-1] = 0, x[-1] + 1
    block = (z[:, None, None] * (y[-1] + 1) + y[:, None]) * (x[-1] + 1) + x
    key = (block * (int(first.max()) + 1) + first) * (int(second.max()) + 1) + second
    cells, nodes = np.unique(key, return_inverse=True)
    return nodes.reshape(first.shape), len(cells)


def _mended(label: np.ndarray, source: np.ndarray, is_cut: np.ndarray, size: ZYX) -> np.ndarray:
    """Joined labels, every cut piece under its own number, slivers given to their surroundings."""
    count = int(source.max()) + 1
    allowed = np.ones(len(is_cut), dtype=np.int64)
    allowed[:count] = np.where(is_cut[:count], 1, pieces_of(source).counts(count))
    pieces = pieces_of(label)
    apart = tell_apart(label, pieces, allowed)
    deepest = np.zeros(len(pieces.labels))
    flat = is_anisotropic(size) or len(label) == 1
    for part in pieces.components if flat else [pieces.components]:
        pitch = tuple(size)[3 - part.ndim :]
        depth = edt.edt(part, anisotropy=pitch, black_border=False, parallel=1)
        np.maximum.at(deepest, part.ravel(), depth.ravel())
    slivers = is_cut[pieces.labels] & (deepest <= _SLIVER_NM)
    pieces = pieces_of(apart)
    kept = pieces.counts(int(apart.max()) + 1)
    kept[np.unique(apart[slivers[pieces.components]])] = 0
    mend(apart, pieces, kept)
    return apart
