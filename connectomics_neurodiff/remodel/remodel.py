"""Biology-guided mask remodelling (paper, section 2.2): a new labelled mask from an old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..conditions import MOST_THICKNESS_NM, membrane_from_labels
from ..geometry import ZYX, voxel_size
from .checks import binary_mask, compact_labels, positive, require_generator
from .elastic import deform_compact
from .inside import keep_inside
from .library import SignatureLibrary, require_library
from .placement import check_asked, is_wanted, place_in
from .plan import plan_of

#: Values of mitochondria and of what else is dark, in one array, so that both move alike.
_MITO, _DARK = 1, 2


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
    dark : numpy.ndarray or None
        (z, y, x) uint8, 1 where neurons are dark inside without a mitochondrion; None if the source knew nothing of it.
    """

    label: np.ndarray
    membrane: np.ndarray
    mito: np.ndarray
    min_jacobian: float = 1.0
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
    candidate_fraction: float = 0.10,
    margin_nm: float = 10.0,
) -> RemodelledMask:
    """Make a new mask: deform the neurons, take their membranes, and place mitochondria anew.

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
    positive("The membrane's thickness in nm", membrane_thickness_nm, below=MOST_THICKNESS_NM)
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
    membrane = membrane_from_labels(moved, size, membrane_thickness_nm)
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
    if moved_dark is not None:
        moved_dark[(moved == 0) | (membrane > 0) | (new > 0)] = 0
    return RemodelledMask(_renamed(moved, ids), membrane, new, minimum, moved_dark)


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
