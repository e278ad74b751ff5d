"""Remodelling of volumes larger than memory: one block of sections after another, from disk to disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fastremap
import h5py
import numpy as np

from ..conditions import MOST_THICKNESS_NM, membrane_from_labels, membrane_halo
from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import ZYX, voxel_size
from ..memory import available_main_bytes
from ..progress import progress
from ..provenance import require_new
from ..volume import ArrayLike
from ..volume.writing import CHUNK, new_dataset, new_volume_file, reserve_space
from .block_placing import BlockwisePlacing, Neurons
from .checks import binary_mask, compact_labels, positive, require_generator, unsigned_labels
from .copies import BYTES_PER_PROCESS, BYTES_PER_VOXEL
from .elastic import MAX_ATTEMPTS, Pieces, calmed, check_field, fragments, give_away, torn_labels
from .field import DisplacementField
from .inside import keep_inside
from .library import SignatureLibrary, require_library
from .pieces import PieceFinder, VolumePieces, components_of, touching
from .placement import check_asked, is_wanted
from .plan import plan_of

logger = logging.getLogger("connectomics_neurodiff")

#: Blocks held at a time: one, and what mitochondria may reach of those beside it.
_BLOCKS_HELD = 3


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
    section, halo = BYTES_PER_VOXEL * int(np.prod(shape[1:])), 2 * membrane_halo(voxel_nm, thickness_nm)
    fit = ((available_main_bytes() - BYTES_PER_PROCESS) // section - halo) // _BLOCKS_HELD
    if fit < CHUNK[0]:
        needed = (_BLOCKS_HELD * CHUNK[0] + halo) * section + BYTES_PER_PROCESS
        raise MemoryError(
            f"Blocks of {CHUNK[0]} sections of {shape[1]} x {shape[2]} voxels with what they depend on take "
            f"{needed / 2**30:.1f} GiB, {available_main_bytes() / 2**30:.1f} GiB are free; crop the volume"
        )
    return int(min(fit, shape[0]) // CHUNK[0] * CHUNK[0]) or shape[0]


@dataclass(frozen=True)
class BlockwiseSettings:
    """What :func:`.remodel` calls by the same names, as far as blocks allow it."""

    elastic: bool = True
    place_mitochondria: bool = True
    mito_fraction: float | None = None
    mito_count: int | None = None
    elastic_sigma_nm: float = 24.0
    elastic_spacing_nm: float = 300.0
    min_jacobian: float = 0.2
    membrane_thickness_nm: float = 25.0
    candidate_fraction: float = 0.10
    margin_nm: float = 10.0

    def check(self, voxel_nm: ZYX) -> None:
        """Raise ValueRangeError if a length is not valid; what concerns placing is checked with the shapes to place."""
        if self.elastic:
            check_field(voxel_nm, self.elastic_sigma_nm, self.elastic_spacing_nm, self.min_jacobian)
        positive("The membrane's thickness in nm", self.membrane_thickness_nm, below=MOST_THICKNESS_NM)
        check_asked(self.place_mitochondria, self.mito_fraction, self.mito_count)


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

    def _pulled(
        self, read: Callable[[int, int], np.ndarray], block: range, field: DisplacementField | None
    ) -> np.ndarray:
        if field is None:
            return read(block.start, block.stop)
        first = max(block.start - field.reach, 0)
        return field.warp(read(first, block.stop + field.reach), first, block)


@dataclass(frozen=True, eq=False)
class _Moved:
    """A field that tears nothing, its smallest Jacobian determinant, and pieces to give to their surroundings.

    The pieces, `gone`, are given by number; `of_block` has the numbers of every block's own components.
    """

    field: DisplacementField | None
    minimum: float
    gone: np.ndarray
    of_block: list[np.ndarray]

    @classmethod
    def still(cls, field: DisplacementField | None = None) -> _Moved:
        """Nothing moves."""
        return cls(field, 1.0, np.zeros(0, dtype=np.int64), [])


@dataclass(frozen=True, eq=False)
class BlockwiseRemodelling:
    """A volume on disk that was surveyed once, of which any number of masks can be made; each reads its labels again.

    One field deforms the whole volume. Labels are taken apart and joined again across the faces of the blocks, so that
    a neuron counts as connected, lost or torn as it would in the whole volume; what is torn calms the field as there.
    Labels and membranes are therefore those of :func:`.remodel` for the same state of the random numbers, except where
    fragments were given to their surroundings: each block gives its own part of a fragment to what surrounds it there.

    Mitochondria are planned for the whole volume and placed block by block (:meth:`.BlockwisePlacing.place`); they
    cross the faces between blocks. Shapes of the volume itself are those of :meth:`.SignatureLibrary.from_masks`, but
    for one that ends beyond the two blocks after the one in which it begins: it is measured up to there, as if cut.

    Attributes
    ----------
    settings : BlockwiseSettings
    pieces : VolumePieces
        Of the volume's labels.
    shapes : SignatureLibrary
        Mitochondria to place.
    share : float
        Of all voxels, to be mitochondria.
    """

    settings: BlockwiseSettings
    pieces: VolumePieces
    shapes: SignatureLibrary
    share: float
    _source: _Source

    @classmethod
    def of(
        cls,
        label: ArrayLike,
        mito: ArrayLike | None,
        voxel_nm: Sequence[float],
        *,
        sections: int,
        library: SignatureLibrary | None = None,
        settings: BlockwiseSettings = BlockwiseSettings(),
    ) -> BlockwiseRemodelling:
        """Read a volume. Parameters and errors as for :func:`remodel_blockwise`."""
        if not isinstance(sections, int | np.integer) or sections < 1:
            raise ValueRangeError(f"A block has a whole number of sections, at least 1. Got {sections}.")
        if library is not None:
            require_library(library)
        if len(label.shape) != 3 or 0 in label.shape or (mito is not None and tuple(mito.shape) != tuple(label.shape)):
            raise ShapeMismatch(
                f"Label and mitochondria must have one shape (z, y, x), no axis empty. Got {tuple(label.shape)} and "
                f"{None if mito is None else tuple(mito.shape)}."
            )
        size = voxel_size(voxel_nm)
        settings.check(size)
        depth = label.shape[0]
        blocks = [range(z, min(z + sections, depth)) for z in range(0, depth, sections)]
        source = _Source(label, mito, size, blocks)
        place = settings.place_mitochondria
        pieces, shapes, share = _survey(source, library, measure=place and library is None and mito is not None)
        share = share if settings.mito_fraction is None else settings.mito_fraction
        count = settings.mito_count
        if place and is_wanted(shapes, share, count, settings.candidate_fraction, settings.margin_nm):
            # A number that the share has no room for is refused before the volume is deformed.
            plan_of(shapes, share * float(np.prod(label.shape)), source.size, count)
            if len(blocks) > 1:
                _warn_of_shallow_blocks(sections * source.size.z, shapes)
        return cls(settings, pieces, shapes, share, source)

    def make(
        self,
        path: str | os.PathLike[str],
        rng: np.random.Generator,
        attributes: Mapping[str, Any] = {},
        *,
        overwrite: bool = False,
    ) -> float:
        """Make a mask. Parameters, result and errors as for :func:`remodel_blockwise`."""
        source, settings = self._source, self.settings
        require_generator(rng)
        if not overwrite:
            require_new(path)
        # Two streams, as in the whole volume.
        seed, place_seed = (int(seed) for seed in rng.integers(2**63, size=2))
        moved = self._settled(np.random.default_rng(seed)) if settings.elastic else _Moved.still()
        largest = int(self.pieces.names[-1]) if len(self.pieces.names) else 0
        with new_volume_file(path, source.size, attributes, overwrite) as file:
            stored = np.dtype(np.uint32 if largest < 2**32 else np.uint64)
            label = new_dataset(file, "label", source.label.shape, stored)
            membrane, mito = (
                new_dataset(file, name, source.label.shape, np.dtype(np.uint8)) for name in ("membrane", "mito")
            )
            neurons = self._store_labels(label, moved)
            self._store_membranes(membrane, label)
            if settings.place_mitochondria:
                BlockwisePlacing(
                    label,
                    membrane,
                    mito,
                    source.blocks,
                    source.size,
                    neurons,
                    settings.candidate_fraction,
                    settings.margin_nm,
                ).place(self.shapes, self.share, settings.mito_count, place_seed)
            else:
                self._carry(mito, label, membrane, moved.field)
        return moved.minimum

    def _settled(self, rng: np.random.Generator) -> _Moved:
        """A random field, calmed until it tears nothing (:func:`.elastic_deform`)."""
        source, settings, before = self._source, self.settings, self.pieces
        allowed = before.counts(len(before.names) + 1)
        field = DisplacementField.random(
            source.label.shape,
            source.size,
            rng,
            sigma_nm=settings.elastic_sigma_nm,
            spacing_nm=settings.elastic_spacing_nm,
        )
        for attempt in range(MAX_ATTEMPTS):
            field, minimum = field.without_folds(settings.min_jacobian)
            finder = PieceFinder()
            for block in progress(source.blocks, label=f"deformation, attempt {attempt + 1}"):
                finder.add(source.moved(block, field))
            after = _renumbered(finder.finish(), before.names)
            torn = torn_labels(after, allowed)
            gone = fragments(after, allowed)
            if not torn.any():
                return _Moved(field, minimum, gone, after.of_block)
            field = calmed(field, list(_torn_boxes(before, after, allowed, torn, gone)), attempt)
        return _Moved.still(field.scaled(0.0))

    def _store_labels(self, label: h5py.Dataset, moved: _Moved) -> Neurons:
        """Write the labels; returns them with their volumes."""
        names = self.pieces.names
        volumes = np.zeros(len(names), dtype=np.int64)
        for i, block in enumerate(progress(self._source.blocks, label="labels")):
            sections = self._source.moved(block, moved.field)
            if moved.gone.size:
                _mend_block(sections, moved.of_block[i], moved.gone)
            _store(label, block, sections)
            found, counts = fastremap.unique(sections, return_counts=True)
            volumes[np.searchsorted(names, found[found > 0])] += counts[found > 0].astype(np.int64)
        return Neurons(names, volumes)

    def _store_membranes(self, membrane: h5py.Dataset, label: h5py.Dataset) -> None:
        """Write the membranes of the labels."""
        size, thickness_nm = self._source.size, self.settings.membrane_thickness_nm
        halo = membrane_halo(size, thickness_nm)
        for block in progress(self._source.blocks, label="membranes"):
            first = max(block.start - halo, 0)
            near = membrane_from_labels(label[first : block.stop + halo], size, thickness_nm)
            _store(membrane, block, near[block.start - first :][: len(block)])

    def _carry(
        self, mito: h5py.Dataset, label: h5py.Dataset, membrane: h5py.Dataset, field: DisplacementField | None
    ) -> None:
        """Mitochondria that move along; those of two neurons do not touch across the face of two blocks."""
        for block in progress(self._source.blocks, label="mitochondria"):
            part = slice(block.start, block.stop)
            host = label[part]
            kept = keep_inside(self._source.carried(block, field), host, membrane[part])
            if block.start:
                last = block.start - 1
                kept[0][touching(mito[last], label[last], kept[0], host[0])] = 0
            _store(mito, block, kept)


def remodel_blockwise(
    path: str | os.PathLike[str],
    label: ArrayLike,
    mito: ArrayLike | None,
    voxel_nm: Sequence[float],
    rng: np.random.Generator,
    *,
    sections: int,
    library: SignatureLibrary | None = None,
    settings: BlockwiseSettings = BlockwiseSettings(),
    attributes: Mapping[str, Any] = {},
    overwrite: bool = False,
) -> float:
    """:func:`.remodel` of a volume on disk into a file, a few sections at a time (:class:`BlockwiseRemodelling`).

    Parameters
    ----------
    path : path
        HDF5 file to write, with ``label``, ``membrane`` and ``mito``. It appears only when it is complete.
    label, mito : array
        (z, y, x), on disk or in memory, as for :func:`.remodel`.
    voxel_nm, rng, library
        As for :func:`.remodel`.
    sections : int
        Of a block, >= 1; best a multiple of 8, as files are stored, and as deep as mitochondria are high. Memory grows
        with it (:func:`sections_that_fit`).
    settings : BlockwiseSettings
    attributes : mapping
        Further attributes of the file.
    overwrite : bool
        Whether an existing file may be replaced; never give it for the file that `label` is in.

    Returns
    -------
    float
        Smallest Jacobian determinant of the deformation; 1 if there was none.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid.
    """
    remodelling = BlockwiseRemodelling.of(label, mito, voxel_nm, sections=sections, library=library, settings=settings)
    return remodelling.make(path, rng, attributes, overwrite=overwrite)


def _store(dataset: h5py.Dataset, block: range, sections: np.ndarray) -> None:
    """Write the sections of a block."""
    reserve_space(dataset.file, sections.size * dataset.dtype.itemsize)
    dataset[block.start : block.stop] = sections


def _warn_of_shallow_blocks(depth_nm: float, shapes: SignatureLibrary) -> None:
    """Warn where mitochondria are higher than what they may reach around the middle of theirs."""
    tallest = max((signature.z_extent_nm for signature in shapes.signatures), default=0.0)
    if depth_nm < tallest:
        logger.warning(
            "Blocks are %.0f nm deep and mitochondria up to %.0f nm high: the highest are drawn shorter, and there may "
            "be more of them than in the source. Give deeper blocks.",
            depth_nm,
            tallest,
        )


def _survey(
    source: _Source, library: SignatureLibrary | None, *, measure: bool
) -> tuple[VolumePieces, SignatureLibrary, float]:
    """Pieces of the source's labels, shapes to place and the share of the volume that they shall fill."""
    finder, own, marked = PieceFinder(), SignatureLibrary((), 0.0, 0.0), 0
    for block in progress(source.blocks, label="source"):
        label, mito = source.labels(block.start, block.stop), source.mitochondria(block.start, block.stop)
        finder.add(label)
        marked += int(np.count_nonzero(mito))
        if measure:
            own = own.merged(_begun_in(source, block))
    shapes = own if library is None else library
    if not marked:
        return finder.finish(), shapes, shapes.mito_fraction
    # A volume whose mitochondria are all specks has no shapes to place: membranes alone, as without any.
    has_shapes = len(shapes) or library is not None
    return finder.finish(), shapes, marked / int(np.prod(source.label.shape)) if has_shapes else 0.0


def _begun_in(source: _Source, block: range) -> SignatureLibrary:
    """Shapes of the mitochondria that begin in a block; up to two blocks after it are seen."""
    first, stop = max(block.start - 1, 0), block.stop + (_BLOCKS_HELD - 1) * len(source.blocks[0])
    part = slice(block.start - first, block.stop - first)
    return SignatureLibrary.of_part(source.labels(first, stop), source.mitochondria(first, stop), source.size, part)


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
