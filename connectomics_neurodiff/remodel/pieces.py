"""Connected pieces of the labels of a volume that is seen one block of sections at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import cc3d
import fastremap
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph


@dataclass(frozen=True, eq=False)
class VolumePieces:
    """26-connected pieces of the labels of a whole volume: `labels[i]`, `sizes[i]`, `boxes[i]` belong to piece i > 0.

    Attributes
    ----------
    names : numpy.ndarray
        (n,) the labels that there are, rising, without 0.
    labels : numpy.ndarray
        (pieces + 1,) int64; 1 + its index in `names`.
    sizes : numpy.ndarray
        (pieces + 1,) voxels.
    boxes : sequence of tuple of slice
        (pieces + 1,) in the volume.
    of_block : list of numpy.ndarray
        Per block, the piece that each of its own components is part of, in the order of :func:`components_of`.
    """

    names: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    boxes: Sequence[tuple[slice, ...]]
    of_block: list[np.ndarray]

    def counts(self, labels: int) -> np.ndarray:
        """Number of pieces of labels 0..labels-1."""
        return np.bincount(self.labels[1:], minlength=labels)


def components_of(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components (z, y, x), 26-connected, and the label of each."""
    components, count = cc3d.connected_components(label, connectivity=26, return_N=True)
    labels = np.zeros(count + 1, dtype=label.dtype)
    for component, name in fastremap.component_map(components, label).items():
        labels[int(component)] = name
    return components, labels


class PieceFinder:
    """Finds the pieces of a volume whose blocks it is given, from the first section to the last."""

    def __init__(self) -> None:
        self._labels: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._corners: list[np.ndarray] = []
        self._edges: list[np.ndarray] = []
        self._count = self._depth = 0
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, label: np.ndarray) -> None:
        """The next block, (z, y, x) unsigned integers."""
        components, labels = components_of(label)
        found = cc3d.statistics(components)
        boxes = found["bounding_boxes"][1:]
        corners = np.array([[(s.start, s.stop) for s in box] for box in boxes], dtype=np.int64).reshape(-1, 3, 2)
        corners[:, 0] += self._depth
        self._labels.append(labels[1:])
        self._sizes.append(np.asarray(found["voxel_counts"][1:], dtype=np.int64))
        self._corners.append(corners)
        # Nodes are numbered from 0 over all blocks; -1 is background.
        nodes = components[[0, -1]].astype(np.int64) + (self._count - 1)
        nodes[components[[0, -1]] == 0] = -1
        if self._last is not None:
            self._edges.append(_across_face(*self._last, nodes[0], label[0]))
        self._last = nodes[1], label[-1].copy()
        self._count += len(labels) - 1
        self._depth += len(label)

    def finish(self) -> VolumePieces:
        """Pieces of the blocks given, joined across their faces."""
        edges = np.concatenate([np.zeros((0, 2), dtype=np.int64), *self._edges])
        ones = np.ones(len(edges), dtype=np.uint8)
        graph = sparse.coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(self._count, self._count))
        pieces, of = csgraph.connected_components(graph, directed=False) if self._count else (0, np.zeros(0, int))
        of = of.astype(np.int64) + 1
        labels, sizes, corners = (np.concatenate(parts) for parts in (self._labels, self._sizes, self._corners))
        names = np.unique(labels)
        own = np.zeros(pieces + 1, dtype=np.int64)
        own[of] = np.searchsorted(names, labels) + 1
        low, high = np.full((pieces + 1, 3), np.iinfo(np.int64).max), np.zeros((pieces + 1, 3), dtype=np.int64)
        np.minimum.at(low, of, corners[..., 0])
        np.maximum.at(high, of, corners[..., 1])
        ends = np.cumsum([len(part) for part in self._labels])
        return VolumePieces(
            names,
            own,
            np.bincount(of, weights=sizes, minlength=pieces + 1).astype(np.int64),
            [tuple(slice(int(a), int(b)) for a, b in zip(*box, strict=True)) for box in zip(low, high, strict=True)],
            np.split(of, ends[:-1]),
        )


def _across_face(nodes: np.ndarray, label: np.ndarray, next_nodes: np.ndarray, next_label: np.ndarray) -> np.ndarray:
    """Pairs of nodes, (pairs, 2), that touch from one section to the next and have one label."""
    pairs = []
    for dy, dx in product((-1, 0, 1), repeat=2):
        here, there = _shifted(label.shape, dy, dx)
        same = (label[here] == next_label[there]) & (nodes[here] >= 0)
        pairs.append(np.unique(np.stack([nodes[here][same], next_nodes[there][same]], axis=1), axis=0))
    return np.unique(np.concatenate(pairs), axis=0)


def _shifted(shape: Sequence[int], *by: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Parts of two sections that lie over each other when the second one is shifted."""
    here = tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(by, shape, strict=True))
    there = tuple(slice(max(0, d), n - max(0, -d)) for d, n in zip(by, shape, strict=True))
    return here, there


def touching(mark: np.ndarray, label: np.ndarray, next_mark: np.ndarray, next_label: np.ndarray) -> np.ndarray:
    """Marked voxels of the next section that touch (26) a marked voxel of another label in the section before it."""
    found = np.zeros(next_mark.shape, dtype=bool)
    for dy, dx in product((-1, 0, 1), repeat=2):
        here, there = _shifted(label.shape, dy, dx)
        found[there] |= (mark[here] > 0) & (next_mark[there] > 0) & (label[here] != next_label[there])
    return found
