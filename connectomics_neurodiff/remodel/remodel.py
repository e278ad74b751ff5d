"""Biology-guided mask remodelling (paper, section 2.2): a new labelled mask from an old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..conditions import MOST_THICKNESS_NM, membrane_from_labels
from ..geometry import ZYX, voxel_size
from ..seeding import rng_for
from .apart import with_new_ids
from .checks import binary_mask, compact_labels, positive, require_generator
from .elastic import deform_compact
from .field import DisplacementField
from .growing import grow_compact
from .inside import keep_inside
from .library import SignatureLibrary, require_library
from .placement import check_asked, is_wanted, place_in
from .plan import plan_of
from .rearranging import join_crops
from .sections import check_misalignment, misalign, section_shifts
from .swelling import swell_compact

#: Values of mitochondria and of what else is dark, in one array, so that both move alike.
_MITO, _DARK = 1, 2
#: Distance over which the membrane's thickness changes.
_PATCH_NM = 300.0
_MOST_SPREAD = 0.99


@dataclass(frozen=True, eq=False)
class RemodelledMask:
    """Masks to paint an EM volume on.

    Attributes
    ----------
    label : numpy.ndarray
        (z, y, x) uint64 neurons, 0 = background.
    membrane : numpy.ndarray
        (z, y, x) uint8, 1 = membrane.
    mito : numpy.ndarray
        (z, y, x) uint8, 1 = mitochondrion. Never on a membrane or on background; each 26-connected component lies in
        one neuron.
    min_jacobian : float
        Smallest Jacobian determinant of the deformation; 1 if there was none.
    left_out : tuple of int
        Ids of the source that are not in the mask because rearranging chose other tissue; not lost by mistake.
    dark : numpy.ndarray or None
        (z, y, x) uint8, 1 where neurons are dark inside without a mitochondrion; None if the source knew nothing of it.
    """

    label: np.ndarray
    membrane: np.ndarray
    mito: np.ndarray
    min_jacobian: float = 1.0
    left_out: tuple[int, ...] = ()
    dark: np.ndarray | None = None


def mask_arrays(mask: RemodelledMask) -> dict[str, np.ndarray]:
    """The arrays of a mask by the names that they have on disk."""
    arrays = {"label": mask.label, "membrane": mask.membrane, "mito": mask.mito}
    return arrays if mask.dark is None else arrays | {"dark": mask.dark}


def remodel(
    label: np.ndarray,
    mito: np.ndarray | None,
    voxel_nm: Sequence[float],
    rng: np.random.Generator,
    *,
    dark: np.ndarray | None = None,
    elastic: bool = True,
    place_mitochondria: bool = True,
    library: SignatureLibrary | None = None,
    mito_fraction: float | None = None,
    mito_count: int | None = None,
    elastic_sigma_nm: float = 24.0,
    elastic_spacing_nm: float = 300.0,
    min_jacobian: float = 0.2,
    membrane_thickness_nm: float = 25.0,
    membrane_spread: float = 0.0,
    candidate_fraction: float = 0.10,
    margin_nm: float = 10.0,
    rearrange: bool = False,
    neuron_spread_nm: float = 0.0,
    grown_fraction: float = 0.0,
    grown_radius_nm: float = 60.0,
    section_jump_nm: float = 0.0,
    section_drift_nm: float = 0.0,
) -> RemodelledMask:
    """Make a new mask: deform the neurons, take their membranes, and place mitochondria anew.

    In full, and as far as the arguments ask for it: tissue is rearranged, then deformed; neurons shrink and swell;
    neurites grow in empty space; membranes are taken, mitochondria placed; sections are misaligned. Each step has
    random numbers of its own, which do not depend on what the others do.

    A volume of one section is deformed within its plane, and its mitochondria are one section high.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.
    mito : numpy.ndarray or None
        (z, y, x), non-zero inside mitochondria; None where they were not annotated. Those outside neurons are ignored.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x).
    rng : numpy.random.Generator
        The same state gives the same bytes.
    dark : numpy.ndarray or None
        (z, y, x), non-zero where neurons are dark inside without a mitochondrion (:attr:`.Volume.dark`). It moves along
        with its neuron, and gives way to membranes and to mitochondria.
    elastic : bool
        Deform the neurons; otherwise they stay as they are.
    place_mitochondria : bool
        Replace the mitochondria by new ones. Otherwise those of `mito` move along with the deformation and are clipped
        to their neurons.
    library : SignatureLibrary or None
        Shapes to place. None: those of this very volume. With neither a library nor a mitochondrion in `mito` the
        result is membranes alone.
    mito_fraction : float or None
        Share of all voxels to be mitochondria. None: that of `mito` inside neurons, or else of the library.
    mito_count : int or None
        Mitochondria that make up that share. None: as many as in the library's tissue. Where there is no room for the
        share, or for so many, a warning says so.
    elastic_sigma_nm, elastic_spacing_nm, min_jacobian, membrane_thickness_nm, candidate_fraction, margin_nm : float
        See :func:`.elastic_deform`, :func:`.membrane_from_labels` and :func:`.place_mitochondria`.
    membrane_spread : float
        Share, in [0, 1), by which the membrane is thicker in some places and thinner in others; 0: the same everywhere.
    rearrange : bool
        Replace about half of the volume by tissue from another place in it (:func:`.join_crops`). Its labels get ids
        that were not in use; ids of the source may be left out.
    neuron_spread_nm : float
        Standard deviation of how far boundaries of neurons move (:func:`.swell`); 0: not at all.
    grown_fraction, grown_radius_nm : float
        Share, in [0, 0.9], of the empty space that grown neurites fill, and their mean radius (:func:`.grow_neurites`).
        They get ids that were not in use.
    section_jump_nm, section_drift_nm : float
        Standard deviations of jumps of sections and of their drift (:func:`.section_shifts`); 0: none. What a jump
        tears off a thin neurite gets an id that was not in use.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid.
    """
    require_generator(rng)
    if library is not None:
        require_library(library)
    compact, ids = compact_labels(label)
    size = voxel_size(voxel_nm)
    positive("The membrane's thickness in nm", membrane_thickness_nm)
    positive("The spread of the membrane's thickness", membrane_spread, below=_MOST_SPREAD, zero=True)
    thickest = membrane_thickness_nm * (1 + membrane_spread)
    positive("The membrane's thickness in nm, its spread included,", thickest, below=MOST_THICKNESS_NM)
    check_misalignment(section_jump_nm, section_drift_nm)
    check_asked(place_mitochondria, mito_fraction, mito_count)
    source = np.zeros(compact.shape, np.uint8) if mito is None else binary_mask(mito, compact.shape, "mitochondria")
    source[compact == 0] = 0
    marks = _marks(source, dark, compact)
    # Two streams, so that what is placed does not depend on how many numbers the deformation drew.
    seed, place_seed = (int(seed) for seed in rng.integers(2**63, size=2))
    to_place = _what_to_place(compact, source, size, library, mito_fraction) if place_mitochondria else None
    if to_place and is_wanted(*to_place, mito_count, candidate_fraction, margin_nm):
        # A number that the share has no room for is refused before the volume is deformed.
        plan_of(to_place[0], to_place[1] * compact.size, size, mito_count)
    left_out: tuple[int, ...] = ()
    if rearrange:
        joined = join_crops(compact, marks, size, rng_for(seed, "rearrange"))
        compact, marks, left_out = joined.label, joined.marks, tuple(ids[joined.left_out].tolist())
    moved, field, minimum = compact, None, 1.0
    if elastic:
        moved, field, minimum = deform_compact(
            compact,
            size,
            np.random.default_rng(seed),
            sigma_nm=elastic_sigma_nm,
            spacing_nm=elastic_spacing_nm,
            min_jacobian=min_jacobian,
        )
    del compact
    if neuron_spread_nm:
        moved = swell_compact(moved, size, rng_for(seed, "swell"), spread_nm=neuron_spread_nm)
    if grown_fraction:
        moved = grow_compact(
            moved,
            size,
            rng_for(seed, "grow"),
            fraction=grown_fraction,
            radius_nm=grown_radius_nm,
            clearance_nm=membrane_thickness_nm,
        )
    membrane = membrane_from_labels(moved, size, membrane_thickness_nm)
    if membrane_spread:
        spread_rng = np.random.default_rng(int(rng.integers(2**63)))
        membrane = _varied(membrane, moved, size, membrane_thickness_nm, membrane_spread, spread_rng)
    if field and (to_place is None or dark is not None):
        marks = field.warp(marks)
    if to_place is None:
        new = keep_inside(marks == _MITO, moved, membrane)
    else:
        shapes, fraction = to_place
        new = place_in(
            moved,
            membrane,
            size,
            shapes,
            np.random.default_rng(place_seed),
            mito_fraction=fraction,
            mito_count=mito_count,
            candidate_fraction=candidate_fraction,
            margin_nm=margin_nm,
        )
    moved_dark = None if dark is None else (marks == _DARK).astype(np.uint8)
    if section_jump_nm or section_drift_nm:
        shifts = section_shifts(
            len(moved), size, rng_for(seed, "sections"), jump_nm=section_jump_nm, drift_nm=section_drift_nm
        )
        moved, membrane, new, moved_dark = misalign(moved, membrane, new, shifts, moved_dark)
    if moved_dark is not None:
        moved_dark[(moved == 0) | (membrane > 0) | (new > 0)] = 0
    return RemodelledMask(_renamed(moved, with_new_ids(ids, moved)), membrane, new, minimum, left_out, moved_dark)


def _marks(mito: np.ndarray, dark: np.ndarray | None, compact: np.ndarray) -> np.ndarray:
    """Mitochondria and what else is dark inside neurons in one array, (z, y, x) uint8."""
    if dark is None:
        return mito
    other = (binary_mask(dark, compact.shape, "dark") > 0) & (compact > 0) & (mito == 0)
    return np.where(other, np.uint8(_DARK), mito)


def _renamed(compact: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """``ids[compact]``, without the index of 8 bytes per voxel that numpy makes of the whole."""
    label = np.empty(compact.shape, ids.dtype)
    for section, renamed in zip(compact, label, strict=True):
        ids.take(section, out=renamed, mode="clip")
    return label


def _varied(
    membrane: np.ndarray, label: np.ndarray, size: ZYX, thickness_nm: float, spread: float, rng: np.random.Generator
) -> np.ndarray:
    """Membrane that is thicker by `spread` in about a third of the volume and thinner in another, in patches."""
    thin, thick = (membrane_from_labels(label, size, thickness_nm * (1 + sign * spread)) for sign in (-1, 1))
    noise = DisplacementField.random(label.shape, size, rng, sigma_nm=size.y, spacing_nm=_PATCH_NM)
    varied = np.empty_like(membrane)
    for z in range(len(label)):
        # Each in-plane component is of unit variance in voxels, but vanishes at the faces that it crosses.
        level = noise.section(z)[-2:].sum(axis=0) / np.sqrt(2)
        varied[z] = np.where(level > 0.43, thick[z], np.where(level < -0.43, thin[z], membrane[z]))
    return varied


def _what_to_place(
    compact: np.ndarray,
    source: np.ndarray,
    size: ZYX,
    library: SignatureLibrary | None,
    mito_fraction: float | None,
) -> tuple[SignatureLibrary, float]:
    """Shapes to place and the share of the volume they shall fill."""
    shapes = SignatureLibrary.from_masks(compact, source, size) if library is None else library
    if mito_fraction is not None:
        return shapes, mito_fraction
    if source.any():
        # A volume whose mitochondria are all specks has no shapes to place: membranes alone, as without any.
        return shapes, np.count_nonzero(source) / source.size if len(shapes) or library is not None else 0.0
    return shapes, shapes.mito_fraction
