"""Signature library: the shapes of real mitochondria, section by section, in nanometres (paper, section 2.2)."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from ..errors import MissingInput, ValueRangeError, VolumeFormatError
from ..geometry import voxel_size
from ..provenance import atomic_write
from .checks import MOST_NM, binary_mask, compact_labels
from .ellipse import CONTOUR_POINTS, Ellipse, aligned_to, equivalent_ellipse, largest_piece, outline, piece_at

logger = logging.getLogger("connectomics_neurodiff")

#: Templates must make up at least this share of the library's mitochondrial volume.
_LEAST_SHARE = 0.5
#: Objects whose largest section is smaller are taken for specks. Published: 100 px of 6 x 6 nm.
MIN_SECTION_NM2 = 3600.0
#: Height of a cut chain, relative to its width, from which it can be closed and drawn anywhere.
_LEAST_KNOWN = 0.75
#: Volume from which an object is used as a template: a ball of 73 nm. Crops cut smaller corners off large objects.
LEAST_VOLUME_NM3 = 2.0e5
#: Share of an object's sections that must be clear of the lateral border; otherwise the border cuts the object.
_LEAST_WHOLE = 0.6
_FORMAT = 1
_PER_OBJECT = ("pitch_z_nm", "volume_nm3", "cut_below", "cut_above", "cut_lateral")
_PER_SECTION = ("contours", "centroids", "axes", "angles", "areas_nm2", "host_ratios")


@dataclass(frozen=True, eq=False)
class Signature:
    """One mitochondrion as the chain of its sections.

    Attributes
    ----------
    contours : numpy.ndarray
        (s, 64, 2) float32: outline of each section, (y, x) in nm relative to the section's centroid. Points of
        neighbouring sections correspond.
    centroids : numpy.ndarray
        (s, 2) float32: (y, x) in nm of each section's centroid relative to the first one's: the drift.
    axes : numpy.ndarray
        (s, 2) float32: full major and minor axis of the equivalent ellipse, nm.
    angles : numpy.ndarray
        (s,) float32: orientation of the major axis, radians from +x towards +y.
    areas_nm2 : numpy.ndarray
        (s,) float32: area of each section.
    host_ratios : numpy.ndarray
        (s,) float32: major axis over the major axis of the host neuron's cross-section.
    pitch_z_nm : float
        Distance between sections.
    volume_nm3 : float
        Volume of the whole object inside its host.
    cut_below, cut_above : bool
        Whether the chain was cut at that end: by the volume's first or last section, or by the trimming of
        sections that touch the lateral border.
    cut_lateral : bool
        Whether so many sections touch the lateral border that the object is not known. Otherwise the chain is the
        longest run of sections that do not.
    """

    contours: np.ndarray
    centroids: np.ndarray
    axes: np.ndarray
    angles: np.ndarray
    areas_nm2: np.ndarray
    host_ratios: np.ndarray
    pitch_z_nm: float
    volume_nm3: float
    cut_below: bool
    cut_above: bool
    cut_lateral: bool

    def __len__(self) -> int:
        return len(self.contours)

    @property
    def z_extent_nm(self) -> float:
        """Height of the chain."""
        return len(self) * self.pitch_z_nm

    @property
    def is_low(self) -> bool:
        """Whether a cut left less than 3/4 of its width in height: closed, it would be a disk."""
        cut = self.cut_below or self.cut_above
        return cut and self.z_extent_nm < _LEAST_KNOWN * float(self.axes[:, 1].max())

    @property
    def widest(self) -> int:
        """Index of the section with the largest area."""
        return int(self.areas_nm2.argmax())

    def at(self, heights_nm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shapes at heights above the first section's centre, interpolated between the two nearest sections.

        Parameters
        ----------
        heights_nm : numpy.ndarray
            (h,) nm; beyond the ends the end's shape.

        Returns
        -------
        contours : numpy.ndarray
            (h, 64, 2), nm relative to the centroid.
        centroids : numpy.ndarray
            (h, 2), nm relative to the first section's.
        minor_nm : numpy.ndarray
            (h,) full minor axis.
        """
        f = np.clip(np.asarray(heights_nm) / self.pitch_z_nm, 0, len(self) - 1)
        i = np.minimum(f.astype(int), max(len(self) - 2, 0))
        j, w = np.minimum(i + 1, len(self) - 1), f - i
        contours = (1 - w)[:, None, None] * self.contours[i] + w[:, None, None] * self.contours[j]
        centroids = (1 - w)[:, None] * self.centroids[i] + w[:, None] * self.centroids[j]
        return contours, centroids, (1 - w) * self.axes[i, 1] + w * self.axes[j, 1]


@dataclass(frozen=True, eq=False)
class SignatureLibrary:
    """Signatures of real mitochondria, and how much of their tissue they filled.

    All lengths are in nm, so a library made at one voxel size serves volumes of another.

    Attributes
    ----------
    signatures : tuple of Signature
        Every mitochondrion found, those cut by the volume's border included (and flagged).
    mito_nm3, tissue_nm3 : float
        Volume of mitochondria inside neurons, and of the whole tissue it was measured in.
    """

    signatures: tuple[Signature, ...]
    mito_nm3: float
    tissue_nm3: float

    def __len__(self) -> int:
        return len(self.signatures)

    @property
    def mito_fraction(self) -> float:
        """Share of the tissue's volume that is mitochondria, in [0, 1]."""
        return self.mito_nm3 / self.tissue_nm3 if self.tissue_nm3 > 0 else 0.0

    def templates_for(self, depth_nm: float) -> tuple[Signature, ...]:
        """Signatures fit for placement in a stack of that depth: no specks, and whole enough to be drawn elsewhere.

        Left out are specks, those that the lateral border cuts, and those that are low (:attr:`Signature.is_low`). Low
        ones are taken too if the stack is less than twice as deep as the tallest signature is high: they are common
        there, and are put on its faces, where they need not be closed. Where what passes makes up less than half of the
        library's volume, as in a small crop, it does not stand for the rest; then the largest of those left out are
        added until it does: straight sides are smoothed at placement.
        """
        thin = depth_nm < 2 * max((signature.z_extent_nm for signature in self.signatures), default=0.0)
        fit = np.array(
            [
                s.volume_nm3 >= LEAST_VOLUME_NM3 and not s.cut_lateral and (thin or not s.is_low)
                for s in self.signatures
            ],
            dtype=bool,
        )
        volumes = np.array([signature.volume_nm3 for signature in self.signatures])
        order = np.lexsort((-volumes, ~fit))
        half = int(np.searchsorted(np.cumsum(volumes[order]), _LEAST_SHARE * volumes.sum())) + 1
        return tuple(self.signatures[i] for i in np.sort(order[: max(int(fit.sum()), half)]))

    @classmethod
    def from_masks(cls, label: np.ndarray, mito: np.ndarray, voxel_nm: Sequence[float]) -> SignatureLibrary:
        """Measure every mitochondrion of a volume.

        A mitochondrion is a 26-connected component of `mito`, restricted to the neuron that holds most of it; what
        lies outside any neuron is not measured.

        Parameters
        ----------
        label : numpy.ndarray
            (z, y, x) non-negative integers, 0 = background.
        mito : numpy.ndarray
            (z, y, x), non-zero inside mitochondria.
        voxel_nm : sequence of 3 floats
            Voxel size (z, y, x).

        Raises
        ------
        LabelTypeError, ShapeMismatch, ValueRangeError
            If an array or the voxel size is not valid.
        """
        return cls.of_part(label, mito, voxel_nm, slice(0, len(label)))

    @classmethod
    def of_part(cls, label: np.ndarray, mito: np.ndarray, voxel_nm: Sequence[float], part: slice) -> SignatureLibrary:
        """:meth:`from_masks` of a part of the tissue, of which more is seen: the mitochondria that begin in it.

        Parameters
        ----------
        label, mito, voxel_nm
            As for :meth:`from_masks`; they show one section before the part, unless the tissue begins there, and
            as many after it as mitochondria may reach.
        part : slice
            Sections, of those shown, that are measured.

        Raises
        ------
        LabelTypeError, ShapeMismatch, ValueRangeError
            As :meth:`from_masks`.
        """
        compact, _ = compact_labels(label)
        mask = binary_mask(mito, compact.shape, "mitochondria")
        z, y, x = voxel_size(voxel_nm)
        mask[compact == 0] = 0
        components = cc3d.connected_components(mask, connectivity=26)
        hosts = ndimage.find_objects(compact)
        signatures = []
        for i, box in enumerate(ndimage.find_objects(components), start=1):
            if not part.start <= box[0].start < part.stop:
                continue
            region = components[box] == i
            host = int(np.bincount(compact[box][region]).argmax())
            signature = _measure(compact, region & (compact[box] == host), box, host, hosts[host - 1], (z, y, x))
            if signature.areas_nm2.max() >= MIN_SECTION_NM2:
                signatures.append(signature)
        measured = mask[part]
        return cls(tuple(signatures), float(measured.sum()) * z * y * x, measured.size * z * y * x)

    def merged(self, *others: SignatureLibrary) -> SignatureLibrary:
        """Library of several volumes: all signatures; the fraction is that of the tissue together."""
        all_of = (self, *others)
        return SignatureLibrary(
            tuple(s for library in all_of for s in library.signatures),
            sum(library.mito_nm3 for library in all_of),
            sum(library.tissue_nm3 for library in all_of),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the library as an NPZ file of plain arrays, atomically. `path` ends in ``.npz``."""
        arrays: dict[str, np.ndarray] = {
            "format": np.array(_FORMAT),
            "tissue": np.array([self.mito_nm3, self.tissue_nm3]),
            "lengths": np.array([len(s) for s in self.signatures], dtype=np.int64),
        }
        for name in _PER_OBJECT:
            arrays[name] = np.array([getattr(s, name) for s in self.signatures], dtype=np.float64)
        for name in _PER_SECTION:
            parts = [getattr(s, name) for s in self.signatures]
            arrays[name] = np.concatenate(parts) if parts else np.zeros((0, *_TAILS[name]), np.float32)
        with atomic_write(path) as temporary, open(temporary, "wb") as handle:
            np.savez_compressed(handle, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SignatureLibrary:
        """Read a library written by :meth:`save`; no pickle is ever executed.

        Raises
        ------
        MissingInput
            If there is no such file.
        VolumeFormatError
            If it is not a signature library.
        """
        try:
            # Opened here: numpy leaves the file open when the archive is broken.
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            if int(arrays["format"]) != _FORMAT:
                raise ValueError("unknown format")
            _require_sound(arrays)
            ends = np.cumsum(arrays["lengths"])
            sections = {name: np.split(arrays[name], ends[:-1]) if len(ends) else [] for name in _PER_SECTION}
            mito_nm3, tissue_nm3 = (float(v) for v in arrays["tissue"])
            numbers = {name: arrays[name][: len(ends)] for name in _PER_OBJECT}
            signatures = [
                Signature(
                    **{name: parts[i] for name, parts in sections.items()},
                    pitch_z_nm=float(numbers["pitch_z_nm"][i]),
                    volume_nm3=float(numbers["volume_nm3"][i]),
                    cut_below=bool(numbers["cut_below"][i]),
                    cut_above=bool(numbers["cut_above"][i]),
                    cut_lateral=bool(numbers["cut_lateral"][i]),
                )
                for i in range(len(ends))
            ]
        except FileNotFoundError as error:
            raise MissingInput(f"There is no signature library {os.fspath(path)}.") from error
        except (KeyError, IndexError, ValueError, EOFError, OSError, TypeError, zipfile.BadZipFile) as error:
            raise VolumeFormatError(
                f"{os.fspath(path)} is not a signature library (an NPZ file written by SignatureLibrary.save)."
            ) from error
        return cls(tuple(signatures), mito_nm3, tissue_nm3)


def _require_sound(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless the arrays of a file fit one another and hold numbers that a shape can have."""
    lengths = arrays["lengths"]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
        raise ValueError("sections per object")
    for name in _PER_SECTION:
        if arrays[name].shape != (lengths.sum(), *_TAILS[name]):
            raise ValueError(f"shape of {name}")
    for name in _PER_OBJECT:
        if arrays[name].shape != lengths.shape:
            raise ValueError(f"shape of {name}")
    for name in (*_PER_SECTION, "pitch_z_nm", "volume_nm3", "tissue"):
        if arrays[name].dtype.kind not in "iuf" or not np.isfinite(arrays[name]).all():
            raise ValueError(f"values of {name}")
    if any((arrays[name] <= 0).any() for name in ("axes", "areas_nm2", "host_ratios", "pitch_z_nm", "volume_nm3")):
        raise ValueError("a length that is not positive")
    if any(arrays[name].dtype.kind not in "biuf" for name in ("cut_below", "cut_above", "cut_lateral")):
        raise ValueError("a cut that is neither true nor false")
    if any((np.abs(arrays[name]) > MOST_NM).any() for name in ("contours", "centroids", "axes", "pitch_z_nm")):
        raise ValueError("a length beyond any in tissue")
    mito_nm3, tissue_nm3 = arrays["tissue"]
    if not 0 <= mito_nm3 <= tissue_nm3 or (lengths.size and not mito_nm3):
        raise ValueError("more mitochondria than tissue, or shapes of none")


def require_library(library: SignatureLibrary) -> None:
    """Raise ValueRangeError unless it is one: the name of a file is not."""
    if not isinstance(library, SignatureLibrary):
        raise ValueRangeError(
            "A library is a SignatureLibrary; SignatureLibrary.load reads one from a file. "
            f"Got {type(library).__name__}."
        )


def gather_libraries(
    label: np.ndarray, mito: np.ndarray | None, voxel_nm: Sequence[float], paths: Sequence[str | os.PathLike[str]]
) -> SignatureLibrary | None:
    """Library of a volume's own mitochondria, if it has any, and of the files at `paths`; None without either.

    A volume whose mitochondria are all specks has no shapes either.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError, MissingInput, VolumeFormatError
        As :meth:`SignatureLibrary.from_masks` and :meth:`SignatureLibrary.load`.
    """
    own = [] if mito is None or not np.any(mito) else [SignatureLibrary.from_masks(label, mito, voxel_nm)]
    libraries = [*own, *(SignatureLibrary.load(path) for path in paths)]
    if not libraries:
        return None
    gathered = libraries[0].merged(*libraries[1:])
    if not paths and not len(gathered):
        logger.warning("No mitochondrion lies in a neuron and is large enough to be a template: masks will have none.")
        return None
    return gathered


_TAILS = {
    "contours": (CONTOUR_POINTS, 2),
    "centroids": (2,),
    "axes": (2,),
    "angles": (),
    "areas_nm2": (),
    "host_ratios": (),
}


def _host_section(
    compact: np.ndarray, z: int, host: int, host_box: tuple[slice, ...], at: tuple[int, int]
) -> np.ndarray:
    """Mask of the host's cross-section piece at section z that contains pixel `at`, in the host's box."""
    y, x = at[0] - host_box[1].start, at[1] - host_box[2].start
    return piece_at(compact[z][host_box[1:]], y, x)


def _measure(
    compact: np.ndarray,
    region: np.ndarray,
    box: tuple[slice, ...],
    host: int,
    host_box: tuple[slice, ...],
    voxel_nm: tuple[float, float, float],
) -> Signature:
    """Signature of one mitochondrion given as a mask in its bounding box."""
    pitch = voxel_nm[1:]
    sections, cut_lateral = _whole_run(region, box, compact.shape)
    contours: list[np.ndarray] = []
    ellipses: list[Ellipse] = []
    areas, ratios = [], []
    for z in sections:
        piece = largest_piece(region[z])
        ellipse = equivalent_ellipse(piece, pitch)
        contour = outline(piece, pitch) - np.asarray(ellipse.centroid_nm, dtype=np.float32)
        contours.append(aligned_to(contour, contours[-1]) if contours else contour)
        ellipses.append(ellipse)
        areas.append(float(piece.sum()) * pitch[0] * pitch[1])
        y, x = (int(v[0]) for v in np.nonzero(piece))
        seen = _host_section(compact, box[0].start + z, host, host_box, (box[1].start + y, box[2].start + x))
        ratios.append(ellipse.major_nm / equivalent_ellipse(seen, pitch).major_nm)
    centroids = np.array([e.centroid_nm for e in ellipses], dtype=np.float32)
    occupied = np.flatnonzero(region.any(axis=(1, 2)))
    return Signature(
        contours=np.stack(contours),
        centroids=centroids - centroids[0],
        axes=np.array([(e.major_nm, e.minor_nm) for e in ellipses], dtype=np.float32),
        angles=np.array([e.angle for e in ellipses], dtype=np.float32),
        areas_nm2=np.array(areas, dtype=np.float32),
        host_ratios=np.array(ratios, dtype=np.float32),
        pitch_z_nm=voxel_nm[0],
        volume_nm3=float(region[sections].sum() * np.prod(voxel_nm)),
        cut_below=bool(sections[0] > occupied[0] or box[0].start + sections[0] == 0),
        cut_above=bool(sections[-1] < occupied[-1] or box[0].start + sections[-1] == compact.shape[0] - 1),
        cut_lateral=cut_lateral,
    )


def _whole_run(region: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """Longest run of sections that the lateral border does not cut, and whether it cuts too many.

    If fewer than _LEAST_WHOLE of the sections are in that run, the run of all sections is returned.
    """
    cut = np.zeros(region.shape[0], dtype=bool)
    for axis in (1, 2):
        if box[axis].start == 0:
            cut |= region.take(0, axis=axis).any(axis=1)
        if box[axis].stop == shape[axis]:
            cut |= region.take(-1, axis=axis).any(axis=1)
    # A chain has no gaps: where the restriction to the host emptied a section, it ends.
    present = np.asarray(region.any(axis=(1, 2)))
    whole = np.asarray(present & ~cut)
    usable = whole if _longest_run(whole)[1] >= _LEAST_WHOLE * present.sum() else present
    start, length = _longest_run(usable)
    return np.arange(start, start + length), usable is not whole


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of true values; length 0 if there is none."""
    steps = np.diff(flags.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not starts.size:
        return 0, 0
    longest = int((stops - starts).argmax())
    return int(starts[longest]), int(stops[longest] - starts[longest])
