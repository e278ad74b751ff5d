"""Remodelling of volumes larger than memory: one block of sections after another, from disk to disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from ..conditions import MOST_THICKNESS_NM, membrane_from_labels, membrane_halo
from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import ZYX, voxel_size
from ..memory import available_main_bytes
from ..progress import progress
from ..seeding import rng_for
from ..volume import ArrayLike
from ..volume.writing import CHUNK, new_dataset, new_volume_file, reserve_space
from .checks import binary_mask, compact_labels, positive, unsigned_labels
from .copies import BYTES_PER_PROCESS, BYTES_PER_VOXEL
from .elastic import MAX_ATTEMPTS, Pieces, calmed, fragments, give_away, torn_labels
from .field import DisplacementField
from .inside import keep_inside
from .library import SignatureLibrary
from .pieces import PieceFinder, VolumePieces, components_of, touching
from .placement import place_in

logger = logging.getLogger("connectomics_neurodiff")

#: A block is to be this many times as deep as the tallest mitochondrion is high.
_LEAST_DEPTHS = 3


def fits_in_memory(shape: Sequence[int]) -> bool:
    """Whether a volume can be remodelled as a whole."""
    return BYTES_PER_VOXEL * int(np.prod(shape)) + BYTES_PER_PROCESS <= available_main_bytes()


def sections_that_fit(shape: Sequence[int], voxel_nm: Sequence[float], thickness_nm: float) -> int:
    """Sections of the largest block that memory allows, a multiple of those that are stored together.

    Raises
    ------
    MemoryError
        If not even the smallest block fits.
    """
    section = BYTES_PER_VOXEL * int(np.prod(shape[1:]))
    fit = (available_main_bytes() - BYTES_PER_PROCESS) // section - 2 * membrane_halo(voxel_nm, thickness_nm)
    if fit < CHUNK[0]:
        needed = (CHUNK[0] + 2 * membrane_halo(voxel_nm, thickness_nm)) * section + BYTES_PER_PROCESS
        raise MemoryError(
            f"{CHUNK[0]} sections of {shape[1]} x {shape[2]} voxels with what they depend on take "
            f"{needed / 2**30:.1f} GiB, {available_main_bytes() / 2**30:.1f} GiB are free; crop the volume"
        )
    return int(min(fit, shape[0]) // CHUNK[0] * CHUNK[0]) or shape[0]


@dataclass(frozen=True, eq=False)
class _Source:
    """The volume that is remodelled, on disk, and its blocks of sections."""

    label: ArrayLike
    mito: ArrayLike | None
    size: ZYX
    blocks: list[range]

    def labels(self, first: int, stop: int) -> np.ndarray:
        """Sections of the label, uint64."""
        return unsigned_labels(self.label[max(first, 0) : stop]).astype(np.uint64, copy=False)

    def mitochondria(self, first: int, stop: int) -> np.ndarray:
        """Sections of the mitochondria inside neurons, uint8; zero where none were annotated."""
        label = self.labels(first, stop)
        if self.mito is None:
            return np.zeros(label.shape, np.uint8)
        return binary_mask(self.mito[max(first, 0) : stop], label.shape, "mitochondria") * (label > 0)

    def moved(self, block: range, field: DisplacementField | None) -> np.ndarray:
        """Labels of a block, moved by the field; not yet mended."""
        return self._pulled(self.labels, block, field)

    def carried(self, block: range, field: DisplacementField | None) -> np.ndarray:
        """Mitochondria of a block, moved by the field."""
        return self._pulled(self.mitochondria, block, field)

    def _pulled(self, read: Any, block: range, field: DisplacementField | None) -> np.ndarray:
        if field is None:
            return np.asarray(read(block.start, block.stop))
        first = max(block.start - field.reach, 0)
        return field.warp(read(first, block.stop + field.reach), first, block)


def remodel_blockwise(
    path: str | os.PathLike[str],
    label: ArrayLike,
    mito: ArrayLike | None,
    voxel_nm: Sequence[float],
    rng: np.random.Generator,
    *,
    sections: int,
    elastic: bool = True,
    place_mitochondria: bool = True,
    library: SignatureLibrary | None = None,
    mito_fraction: float | None = None,
    elastic_sigma_nm: float = 24.0,
    elastic_spacing_nm: float = 300.0,
    min_jacobian: float = 0.2,
    membrane_thickness_nm: float = 25.0,
    candidate_fraction: float = 0.10,
    margin_nm: float = 10.0,
    attributes: Mapping[str, Any] = {},
) -> float:
    """:func:`.remodel` of a volume on disk into a file, a few sections at a time.

    One field deforms the whole volume. Labels are taken apart and joined again across the faces of the blocks, so that
    a neuron counts as connected, lost or torn as it would in the whole volume; what is torn calms the field as there.
    Labels and membranes are therefore those of :func:`.remodel` for the same state of `rng`, except where fragments
    were given to their surroundings: each block gives its own part of a fragment to what surrounds it there.

    Mitochondria are placed in each block by itself, with random numbers of its own, so that the order of the blocks
    does not matter: the largest neurons are those of the block, and the share of mitochondria is that of the whole.
    None crosses a face between blocks: they end there, rounded, and the two sections at such a face hold none.
    Shapes of the volume itself are measured block by block; one that a face cuts counts as two, cut.

    Parameters
    ----------
    path : path
        HDF5 file to write, with ``label``, ``membrane`` and ``mito``. It appears only when it is complete.
    label, mito : array
        (z, y, x), on disk or in memory, as for :func:`.remodel`.
    sections : int
        Of a block, >= 1; best a multiple of 8, as files are stored. Memory grows with it (:func:`sections_that_fit`).
    attributes : mapping
        Further attributes of the file.
    voxel_nm, rng, elastic, place_mitochondria, library, mito_fraction, elastic_sigma_nm, elastic_spacing_nm, \
    min_jacobian, membrane_thickness_nm, candidate_fraction, margin_nm
        As for :func:`.remodel`.

    Returns
    -------
    float
        Smallest Jacobian determinant of the deformation; 1 if there was none.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid.
    """
    if sections < 1:
        raise ValueRangeError(f"A block has at least 1 section. Got {sections}.")
    if len(label.shape) != 3 or 0 in label.shape or (mito is not None and tuple(mito.shape) != tuple(label.shape)):
        raise ShapeMismatch(
            f"Label and mitochondria must have one shape (z, y, x), no axis empty. Got {tuple(label.shape)} and "
            f"{None if mito is None else tuple(mito.shape)}."
        )
    positive("The elastic amplitude in nm", elastic_sigma_nm, zero=True)
    positive("The spacing of the elastic grid in nm", elastic_spacing_nm)
    positive("The membrane's thickness in nm", membrane_thickness_nm, below=MOST_THICKNESS_NM)
    size, depth = voxel_size(voxel_nm), label.shape[0]
    source = _Source(label, mito, size, [range(z, min(z + sections, depth)) for z in range(0, depth, sections)])
    seeds = [int(seed) for seed in rng.integers(2**63, size=2)]
    before, shapes, share = _survey(source, library if place_mitochondria else None, place_mitochondria)
    if place_mitochondria and len(source.blocks) > 1:
        _warn_of_shallow_blocks(sections * size.z, shapes)
    field, minimum, gone = None, 1.0, np.zeros(0, dtype=np.int64)
    of_block: list[np.ndarray] = []
    if elastic:
        drawn = DisplacementField.random(
            label.shape, size, np.random.default_rng(seeds[0]), sigma_nm=elastic_sigma_nm, spacing_nm=elastic_spacing_nm
        )
        field, minimum, gone, of_block = _settled(source, before, drawn, min_jacobian)
    largest = int(before.names[-1]) if len(before.names) else 0
    with new_volume_file(path, size, attributes) as file:
        stored = np.dtype(np.uint32 if largest < 2**32 else np.uint64)
        label_out = new_dataset(file, "label", label.shape, stored)
        membrane_out, mito_out = (
            new_dataset(file, name, label.shape, np.dtype(np.uint8)) for name in ("membrane", "mito")
        )
        for i, block in enumerate(progress(source.blocks, label="labels")):
            moved = source.moved(block, field)
            if gone.size:
                _mend_block(moved, of_block[i], gone)
            _store(label_out, block, moved)
        halo = membrane_halo(size, membrane_thickness_nm)
        for block in progress(source.blocks, label="membranes"):
            first = max(block.start - halo, 0)
            near = membrane_from_labels(label_out[first : block.stop + halo], size, membrane_thickness_nm)
            _store(membrane_out, block, near[block.start - first :][: len(block)])
        if not place_mitochondria:
            _carry(source, field, label_out, membrane_out, mito_out)
            return minimum
        share = share if mito_fraction is None else mito_fraction
        for i, block in enumerate(progress(source.blocks, label="mitochondria")):
            compact, _ = compact_labels(label_out[block.start : block.stop])
            placed = place_in(
                compact,
                membrane_out[block.start : block.stop],
                size,
                shapes,
                rng_for(seeds[1], "block", i),
                mito_fraction=share,
                candidate_fraction=candidate_fraction,
                margin_nm=margin_nm,
                faces=(block.start == 0, block.stop == depth),
            )
            _store(mito_out, block, placed)
    return minimum


def _store(dataset: h5py.Dataset, block: range, sections: np.ndarray) -> None:
    """Write the sections of a block."""
    reserve_space(dataset.file, sections.size * dataset.dtype.itemsize)
    dataset[block.start : block.stop] = sections


def _warn_of_shallow_blocks(depth_nm: float, shapes: SignatureLibrary) -> None:
    """Warn where a large part of the mitochondria will meet a face between blocks."""
    tallest = max((signature.z_extent_nm for signature in shapes.signatures), default=0.0)
    if depth_nm < _LEAST_DEPTHS * tallest:
        logger.warning(
            "Blocks are %.0f nm deep and mitochondria up to %.0f nm high: many will be cut short, and there will be "
            "more of them than in the source. Give deeper blocks, or shapes of a whole volume (--library).",
            depth_nm,
            tallest,
        )


def _survey(
    source: _Source, library: SignatureLibrary | None, place: bool
) -> tuple[VolumePieces, SignatureLibrary, float]:
    """Pieces of the source's labels, shapes to place and the share of the volume that they shall fill."""
    finder, own, marked = PieceFinder(), SignatureLibrary((), 0.0, 0.0), 0
    for block in progress(source.blocks, label="source"):
        label, mito = source.labels(block.start, block.stop), source.mitochondria(block.start, block.stop)
        finder.add(label)
        marked += int(np.count_nonzero(mito))
        if place and library is None:
            own = own.merged(SignatureLibrary.from_masks(label, mito, source.size))
    shapes = own if library is None else library
    if not marked:
        return finder.finish(), shapes, shapes.mito_fraction
    # A volume whose mitochondria are all specks has no shapes to place: membranes alone, as without any.
    has_shapes = len(shapes) or library is not None
    return finder.finish(), shapes, marked / int(np.prod(source.label.shape)) if has_shapes else 0.0


def _settled(
    source: _Source, before: VolumePieces, drawn: DisplacementField, min_jacobian: float
) -> tuple[DisplacementField, float, np.ndarray, list[np.ndarray]]:
    """Field that tears nothing (:func:`.elastic_deform`), its smallest Jacobian determinant, and pieces to give away.

    The pieces are given by number, with the numbers of every block's own components.
    """
    allowed = before.counts(len(before.names) + 1)
    field = drawn
    for attempt in range(MAX_ATTEMPTS):
        field, minimum = field.without_folds(min_jacobian)
        finder = PieceFinder()
        for block in progress(source.blocks, label=f"deformation, attempt {attempt + 1}"):
            finder.add(source.moved(block, field))
        after = _renumbered(finder.finish(), before.names)
        torn = torn_labels(after, allowed)
        gone = fragments(after, allowed)
        if not torn.any():
            return field, minimum, gone, after.of_block
        field = calmed(field, list(_torn_boxes(before, after, allowed, torn, gone)), attempt)
    return field.scaled(0.0), 1.0, np.zeros(0, dtype=np.int64), []


def _renumbered(pieces: VolumePieces, names: np.ndarray) -> VolumePieces:
    """Pieces whose labels are counted as those of another volume that has all of them."""
    place = np.concatenate([[0], np.searchsorted(names, pieces.names) + 1])
    return VolumePieces(names, place[pieces.labels], pieces.sizes, pieces.boxes, pieces.of_block)


def _torn_boxes(
    before: VolumePieces, after: VolumePieces, allowed: np.ndarray, torn: np.ndarray, gone: np.ndarray
) -> Iterator[tuple[slice, ...]]:
    """Boxes around labels that vanished and around large parts that broke off."""
    for label in np.flatnonzero(torn & (after.counts(len(allowed)) == 0)):
        own = [before.boxes[i] for i in np.flatnonzero(before.labels == label).tolist()]
        yield tuple(slice(min(b[a].start for b in own), max(b[a].stop for b in own)) for a in range(3))
    yield from (after.boxes[i] for i in gone.tolist() if torn[after.labels[i]])


def _mend_block(moved: np.ndarray, of_block: np.ndarray, gone: np.ndarray) -> None:
    """Give a block's parts of the pieces that are given away to what surrounds them within the block."""
    components, _ = components_of(moved)
    mine = np.flatnonzero(np.isin(of_block, gone)) + 1
    if not mine.size:
        return
    compact, ids = compact_labels(moved)
    give_away(compact, Pieces(components, np.zeros(len(of_block) + 1, dtype=np.int64)), mine)
    moved[:] = ids[compact]


def _carry(
    source: _Source,
    field: DisplacementField | None,
    label: h5py.Dataset,
    membrane: h5py.Dataset,
    mito: h5py.Dataset,
) -> None:
    """Mitochondria that move along; those of two neurons do not touch across the face of two blocks."""
    for block in progress(source.blocks, label="mitochondria"):
        part = slice(block.start, block.stop)
        host = label[part]
        kept = keep_inside(source.carried(block, field), host, membrane[part])
        if block.start:
            last = block.start - 1
            kept[0][touching(mito[last], label[last], kept[0], host[0])] = 0
        _store(mito, block, kept)
