"""Misaligned sections of masks on disk, a few sections at a time."""

from __future__ import annotations

from collections.abc import Sequence

import h5py
import numpy as np

from ..progress import progress
from ..volume.writing import reserve_space
from .elastic import fragments
from .inside import keep_inside
from .pieces import PieceFinder, VolumePieces, components_of, touching
from .sections import halved, shift_membranes, shift_sections


def misalign_blockwise(
    label: h5py.Dataset, membrane: h5py.Dataset, mito: h5py.Dataset, blocks: Sequence[range], shifts: np.ndarray
) -> None:
    """:func:`.misalign` in place; across the face of two blocks, mitochondria that come to touch lose the later voxels.

    Parameters
    ----------
    label, membrane, mito : h5py.Dataset
        (z, y, x), open for writing.
    blocks : sequence of range
        Sections of each block, rising.
    shifts : numpy.ndarray
        (z, 2) int, as of :func:`.section_shifts`.
    """
    before, _ = _shifted_pieces(label, membrane, blocks, np.zeros_like(shifts))
    after, free = _shifted_pieces(label, membrane, blocks, shifts)
    while len(after.names) < len(before.names):
        shifts = halved(shifts)
        after, free = _shifted_pieces(label, membrane, blocks, shifts)
    cut = fragments(after, before.counts(len(before.names) + 1))
    unused = np.setdiff1d(np.arange(1, len(before.names) + len(cut) + 1, dtype=np.uint64), before.names)
    names = np.concatenate([[0], before.names])[after.labels].astype(label.dtype)
    # A piece that is nothing but membrane becomes background.
    names[cut] = np.where(free[cut] > 0, unused[: len(cut)], 0)
    _store_shifted(label, membrane, mito, blocks, shifts, names, after.of_block)


def _shifted_pieces(
    label: h5py.Dataset, membrane: h5py.Dataset, blocks: Sequence[range], shifts: np.ndarray
) -> tuple[VolumePieces, np.ndarray]:
    """Pieces of the shifted labels, and the voxels of each that are not membrane."""
    finder, free = PieceFinder(), []
    for block in progress(blocks, label="sections"):
        part = slice(block.start, block.stop)
        moved = shift_sections(label[part], shifts[part])
        walls = shift_membranes(membrane[part], shifts[part], moved)
        finder.add(moved)
        components, labels = components_of(moved)
        free.append(np.bincount(components[walls == 0], minlength=len(labels))[1:])
    pieces = finder.finish()
    of, voxels = np.concatenate(pieces.of_block), np.concatenate(free)
    return pieces, np.bincount(of, weights=voxels, minlength=len(pieces.labels))


def _store_shifted(
    label: h5py.Dataset,
    membrane: h5py.Dataset,
    mito: h5py.Dataset,
    blocks: Sequence[range],
    shifts: np.ndarray,
    names: np.ndarray,
    of_block: Sequence[np.ndarray],
) -> None:
    """Write shifted masks, every piece under its name."""
    for block, of in zip(progress(blocks, label="misaligned"), of_block, strict=True):
        part = slice(block.start, block.stop)
        moved, marked = (shift_sections(array[part], shifts[part]) for array in (label, mito))
        walls = shift_membranes(membrane[part], shifts[part], moved)
        named = names[np.concatenate([[0], of])][components_of(moved)[0]]
        kept = keep_inside(marked, named, walls)
        if block.start:
            last = block.start - 1
            kept[0][touching(mito[last], label[last], kept[0], named[0])] = 0
        for dataset, sections in ((label, named), (membrane, walls), (mito, kept)):
            reserve_space(dataset.file, sections.nbytes)
            dataset[part] = sections
