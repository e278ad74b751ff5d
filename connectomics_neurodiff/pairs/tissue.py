"""What tissue looks like, in numbers that do not depend on where the neurons lie.

Grey values, power in bands of physical frequency, how evenly the finest detail is spread, how alike neighbouring
sections are, and how much is dark deep inside neurons. Measured on a whole volume and on nine overlapping parts of it:
how far the parts of one real volume differ says how far a painted volume may.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ..conditions import distance_inside, smoothed
from ..errors import ShapeMismatch
from ..geometry import ZYX, is_anisotropic, voxel_size

GREY_BINS = 256
#: A volume whose standard deviation is below one grey level of uint8 shows nothing.
LEAST_STD = 1 / 255
#: Octaves of spatial frequency, cycles per micrometre: a quarter of a micrometre down to 8 nm.
BAND_EDGES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
#: Bands of fewer cycles than this per window, or that end so close above their beginning, say little.
_LEAST_CYCLES, _LEAST_WIDTH = 3.8, 1.25
#: Noise finer than the first is left out of what is compared; between sections also what is coarser than the second.
SMOOTHING_NM, COARSE_NM = 8.0, 120.0
#: Grain is what smoothing by the first takes away, its strength a mean over the second; standard deviations, pixels.
_FINEST, _NEARBY = 0.6, 2.0
#: So far from any membrane nothing dark is one.
DEPTH_NM = 36.0
#: A part has this share of the rows and columns, and begins at each of these shares of what is left.
_PART, _STARTS = 0.5, (0.0, 0.5, 1.0)
#: Sections are compared with so many that follow.
_REACH = 4
#: Shares are compared as ratios, of no less than this.
_LEAST_SHARE = 1e-3
#: A hundredth of a grey level of uint8, squared: less power is none.
_LEAST_POWER = (0.01 / 255) ** 2


def image_defect(name: str, image: np.ndarray) -> str:
    """Why an image cannot be compared at all, or an empty string."""
    if image.size == 0:
        return f"The {name} image is empty."
    if not np.isfinite(image).all():
        return f"The {name} image must be finite. Got {int((~np.isfinite(image)).sum())} NaN or infinite voxels."
    if image.min() < 0 or image.max() > 1:
        return f"The {name} image must lie in [0, 1]. Got {image.min():.3g} to {image.max():.3g}."
    return ""


def grey_histogram(image: np.ndarray) -> np.ndarray:
    """Share of voxels in each of `GREY_BINS` equal bins of [0, 1], float64."""
    counts, _ = np.histogram(image, bins=GREY_BINS, range=(0.0, 1.0))
    return counts / image.size


def grey_distance(first: np.ndarray, second: np.ndarray) -> float:
    """1-Wasserstein distance of two histograms over [0, 1], in [0, 1]: the area between their cumulative sums."""
    return float(np.abs(np.cumsum(first - second)).sum() / len(first))


class Band(NamedTuple):
    """Spatial frequencies in planes across an axis: lower (included) and upper edge in cycles per micrometre."""

    low: float
    high: float
    axis: int = 0

    def __str__(self) -> str:
        plane = ("", " across rows", " across columns")[self.axis]
        return f"{self.low:g} to {self.high:.3g} cycles/um{plane}"


def tissue_bands(shape: Sequence[int], voxel_nm: Sequence[float]) -> tuple[Band, ...]:
    """Bands that a volume of this shape, (z, y, x), can show: in sections, if isotropic in planes along z too."""
    size = voxel_size(voxel_nm)
    bands = [Band(*edges) for edges in frequency_bands(shape[1:], size[1:])]
    if not is_anisotropic(size):
        bands += [Band(*edges, axis=1) for edges in frequency_bands(shape[::2], size[::2])]
    return tuple(bands)


def frequency_bands(shape: Sequence[int], pitch_nm: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Bands of spatial frequency that a plane can show.

    Parameters
    ----------
    shape : sequence of 2 ints
        Voxels of the plane.
    pitch_nm : sequence of 2 floats
        Distance of its rows and of its columns, nm.

    Returns
    -------
    tuple of (float, float)
        Octaves between `BAND_EDGES`, cycles per micrometre: at least 3.8 cycles within the shorter side, and cut at the
        Nyquist frequency of the wider pitch. Empty for a plane too small or too coarse.
    """
    extent = min(n * nm for n, nm in zip(shape, pitch_nm, strict=True)) / 1000
    nyquist = 500 / max(pitch_nm)
    octaves = [(low, min(high, nyquist)) for low, high in pairwise(BAND_EDGES)]
    return tuple((a, b) for a, b in octaves if a * extent >= _LEAST_CYCLES and b >= _LEAST_WIDTH * a)


def band_power(
    image: np.ndarray, pitch_nm: Sequence[float], bands: Sequence[tuple[float, float]], axis: int = 0
) -> np.ndarray:
    """How much of the variance of an image lies in each band of spatial frequency, plane by plane.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1].
    pitch_nm : sequence of 2 floats
        Pitch of the planes' rows and columns, nm.
    bands : sequence of (float, float)
        Lower (included) and upper edge, cycles per micrometre.
    axis : int
        Across which the planes lie; 0: sections.

    Returns
    -------
    numpy.ndarray
        float64, one value per band, in squared grey values; mean over planes. A plane is windowed (Hann) so that its
        edges, which do not meet, add nothing. A sine of amplitude a has a^2 / 2 in its band.
    """
    planes = np.moveaxis(np.asarray(image), axis, 0)
    rows, columns = planes.shape[1:]
    # Without the zeros at the ends of numpy's window, so that a plane may have few rows.
    window = np.outer(np.hanning(rows + 2)[1:-1], np.hanning(columns + 2)[1:-1])
    frequency = np.hypot(
        np.fft.fftfreq(rows, pitch_nm[0] / 1000)[:, None], np.fft.rfftfreq(columns, pitch_nm[1] / 1000)[None]
    )
    # Each column of the real transform but the first, and the last of an even number, stands for two.
    twice = np.full(frequency.shape[1], 2.0)
    twice[0] = 1.0
    twice[-1] = 1.0 if columns % 2 == 0 else twice[-1]
    inside = [(frequency >= low) & (frequency < high) for low, high in bands]
    power = np.zeros(frequency.shape)
    for plane in planes:
        values = plane.astype(np.float64)
        values -= (values * window).sum() / window.sum()
        power += np.abs(np.fft.rfft2(values * window)) ** 2
    power *= twice / (len(planes) * rows * columns * np.square(window).sum())
    return np.array([power[band].sum() for band in inside])


def section_likeness(image: np.ndarray, tissue: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """How alike sections are: correlation of the details of each with those of the next four.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1].
    tissue : numpy.ndarray
        (z, y, x) bool: where sections are compared.
    voxel_nm : sequence of 3 floats
        Voxel size, nm.

    Returns
    -------
    numpy.ndarray
        (z, 4) float64 in [-1, 1], of section z with z + 1 to z + 4; NaN where there is none, or no tissue at the same
        place. Details are between `SMOOTHING_NM` and `COARSE_NM`: membranes and organelles, neither noise nor somata.
    """
    alike = np.full((len(image), _REACH), math.nan)
    before: list[np.ndarray] = []
    for z, section in enumerate(image):
        plane = section.astype(np.float32)
        fine, coarse = (
            ndimage.gaussian_filter(plane, [width / nm for nm in voxel_nm[1:]]) for width in (SMOOTHING_NM, COARSE_NM)
        )
        details = fine - coarse
        for lag, other in enumerate(before, start=1):
            both = tissue[z] & tissue[z - lag]
            if both.sum() > 1:
                pair = details[both], other[both]
                flat = any(values.std() < 1e-6 for values in pair)
                alike[z - lag, lag - 1] = 0.0 if flat else np.corrcoef(*pair)[0, 1]
        before = [details, *before[: _REACH - 1]]
    return alike


def continuity_and_order(alike: np.ndarray) -> tuple[float, float]:
    """What likeness of sections says about a volume.

    Parameters
    ----------
    alike : numpy.ndarray
        Of :func:`section_likeness`.

    Returns
    -------
    continuity : float
        Mean correlation of neighbouring sections, in [-1, 1]; NaN for a single one.
    order : float
        How often a section is more like its neighbour than like one two to four sections away on the same side, in
        [0, 1]: 1 in tissue, .5 where sections stand in no order. NaN for fewer than three.
    """
    next_one = alike[:, 0]
    right = [next_one[:-lag] - alike[:-lag, lag - 1] for lag in range(2, _REACH + 1)]
    left = [next_one[lag - 1 : -1] - alike[:-lag, lag - 1] for lag in range(2, _REACH + 1)]
    gains = np.concatenate([*right, *left])
    gains, known = gains[np.isfinite(gains)], next_one[np.isfinite(next_one)]
    order = float((gains > 0).mean()) if gains.size else math.nan
    return float(known.mean()) if known.size else math.nan, order


def grain_spread(image: np.ndarray, inside: np.ndarray) -> float:
    """How unevenly the finest detail of sections is spread.

    What is finest in a recording is for the most part its noise, alike everywhere. Where an image was enlarged or
    smoothed, and sharpened since, some places have grain and others none, however right the power in all.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1].
    inside : numpy.ndarray
        (z, y, x) bool: where grain is looked at, away from membranes.

    Returns
    -------
    float
        Standard deviation of the logarithm of the local power of the finest detail, >= 0; independent of contrast. NaN
        where nothing is inside.
    """
    levels = []
    for section, where in zip(np.asarray(image, dtype=np.float32), inside, strict=True):
        finest = section - ndimage.gaussian_filter(section, _FINEST)
        power = ndimage.gaussian_filter(np.square(finest), _NEARBY)
        levels.append(np.log(np.maximum(power[where], _LEAST_POWER)))
    spread = np.concatenate(levels)
    return float(spread.std(dtype=np.float64)) if spread.size else math.nan


def depth_in_neurons(label: np.ndarray, membrane: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """Distance of a neuron's voxels to the nearest voxel of membrane or background, float32 nm; 0 there.

    In the plane of the section for anisotropic volumes, in 3D else; the faces of the volume are no membrane.
    """
    return distance_inside((np.asarray(label) > 0) & (np.asarray(membrane) == 0), voxel_nm)


@dataclass(frozen=True)
class DarkShares:
    """How much is dark deep inside neurons, and in pieces of which size; NaN where nothing lies deep.

    Dark is what is nearer to the median of the volume's own membranes than to that of its own depths. Deep is more than
    `DEPTH_NM` from any membrane.

    Attributes
    ----------
    all : float
        Share of all deep voxels that is dark, in [0, 1].
    mito, rest : float
        Of those inside mitochondria and of the others; NaN without masks of mitochondria.
    size_nm : float
        Diameter of a disk with the area of the piece that a dark voxel lies in, mean over voxels; pieces are those of
        sections, 8-connected. NaN where nothing is dark.
    per_um2 : float
        Pieces per square micrometre of deep tissue.
    """

    all: float
    mito: float = math.nan
    rest: float = math.nan
    size_nm: float = math.nan
    per_um2: float = math.nan


def dark_shares(
    image: np.ndarray,
    label: np.ndarray,
    membrane: np.ndarray,
    mito: np.ndarray | None,
    voxel_nm: Sequence[float],
) -> DarkShares:
    """How much is dark inside neurons: mitochondria, reticulum, vesicles, myelin.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1]; compared after smoothing by `SMOOTHING_NM`.
    label, membrane, mito : numpy.ndarray
        Masks of the same shape; `mito` may be None.
    voxel_nm : sequence of 3 floats
        Voxel size, nm. Anisotropic volumes are smoothed, and depth is measured, section by section.
    """
    deep = depth_in_neurons(label, membrane, voxel_nm) > DEPTH_NM
    on = np.asarray(membrane) > 0
    if not deep.any() or not on.any():
        return DarkShares(math.nan)
    smooth = smoothed(image, voxel_nm, SMOOTHING_NM)
    dark = smooth < (np.median(smooth[on]) + np.median(smooth[deep])) / 2
    pieces = _pieces(dark & deep, deep, voxel_nm)
    if mito is None:
        return DarkShares(float(dark[deep].mean()), math.nan, math.nan, *pieces)
    inside = np.asarray(mito) > 0
    in_mito, rest = (_share(dark, where) for where in (deep & inside, deep & ~inside))
    return DarkShares(float(dark[deep].mean()), in_mito, rest, *pieces)


def _share(dark: np.ndarray, where: np.ndarray) -> float:
    return float(dark[where].mean()) if where.any() else math.nan


def _pieces(dark: np.ndarray, deep: np.ndarray, voxel_nm: Sequence[float]) -> tuple[float, float]:
    """Mean diameter of pieces by their voxels, nm, and pieces per square micrometre."""
    import cc3d

    pixel = voxel_nm[1] * voxel_nm[2]
    counts = [np.bincount(cc3d.connected_components(s.view(np.uint8), connectivity=8).ravel())[1:] for s in dark]
    areas = np.concatenate(counts) * pixel
    number = len(areas) / (deep.sum() * pixel) * 1e6
    diameters = 2 * np.sqrt(areas / np.pi)
    return (float((areas * diameters).sum() / areas.sum()) if areas.size else math.nan), float(number)


@dataclass(frozen=True, eq=False)
class TissueStatistics:
    """The numbers of one image and its masks.

    Attributes
    ----------
    histogram : numpy.ndarray
        :func:`grey_histogram`.
    power : numpy.ndarray
        :func:`band_power` per band, squared grey values.
    continuity, order : float
        :func:`continuity_and_order`.
    dark : DarkShares
        :func:`dark_shares`.
    grain : float
        :func:`grain_spread`.
    """

    histogram: np.ndarray
    power: np.ndarray
    continuity: float
    order: float
    dark: DarkShares
    grain: float

    @property
    def comparable(self) -> np.ndarray:
        """All but histogram and order on scales on which differences mean the same everywhere.

        log2 of the power per band, Fisher's z of the continuity, log2 of the three dark shares and of the grain.
        """
        shares = (self.dark.all, self.dark.mito, self.dark.rest)
        power = np.log2(np.maximum(self.power, 1e-12))
        correlation = np.arctanh(np.clip(self.continuity, -0.999, 0.999))
        ratios = np.log2(np.maximum([*shares, self.grain], _LEAST_SHARE))
        return np.array([*power, correlation, *ratios])


def measure_tissue(
    image: np.ndarray,
    label: np.ndarray,
    membrane: np.ndarray,
    mito: np.ndarray | None,
    voxel_nm: Sequence[float],
    bands: Sequence[Band],
) -> TissueStatistics:
    """Measure one image and its masks, (z, y, x) each, values of the image in [0, 1].

    Raises
    ------
    ShapeMismatch
        If image and masks differ in shape.
    """
    for name, mask in (("label", label), ("membrane", membrane), ("mito", mito)):
        if mask is not None and mask.shape != image.shape:
            raise ShapeMismatch(f"The {name} must have the image's shape {image.shape}. Got {mask.shape}.")
    power = []
    for axis in sorted({band.axis for band in bands}):
        pitch = [nm for other, nm in enumerate(voxel_nm) if other != axis]
        power += [*band_power(image, pitch, [band[:2] for band in bands if band.axis == axis], axis)]
    tissue = (np.asarray(label) > 0) | (np.asarray(membrane) > 0)
    dark = dark_shares(image, label, membrane, mito, voxel_nm)
    sections = continuity_and_order(section_likeness(image, tissue, voxel_nm))
    grain = grain_spread(image, (np.asarray(label) > 0) & (np.asarray(membrane) == 0))
    return TissueStatistics(grey_histogram(image), np.array(power), *sections, dark, grain)


@dataclass(frozen=True, eq=False)
class RealTissue:
    """What a real volume looks like, and how far its parts differ.

    Attributes
    ----------
    voxel_nm : ZYX
        Voxel size, nm.
    bands : tuple of Band
        Of :attr:`TissueStatistics.power`.
    whole : TissueStatistics
        Of the whole volume.
    spread : numpy.ndarray
        Standard deviation among its parts of every entry of :attr:`TissueStatistics.comparable`; 0 where unknown.
    grey_spread : float
        Root of the mean squared distance of the parts' histograms from the whole one.
    """

    voxel_nm: ZYX
    bands: tuple[Band, ...]
    whole: TissueStatistics
    spread: np.ndarray
    grey_spread: float


def measure_real(
    image: np.ndarray, label: np.ndarray, membrane: np.ndarray, mito: np.ndarray | None, voxel_nm: Sequence[float]
) -> RealTissue:
    """Measure a real volume and its parts.

    Parameters
    ----------
    image, label, membrane, mito : numpy.ndarray
        (z, y, x); image in [0, 1], `mito` may be None. The membrane is what synthetic pairs call one
        (:func:`.membrane_from_labels`).
    voxel_nm : sequence of 3 floats
        Voxel size, nm.

    Raises
    ------
    ShapeMismatch
        If image and masks differ in shape.
    """
    size = voxel_size(voxel_nm)
    boxes = list(_parts(image.shape))
    extent = [part.stop - part.start for part in boxes[0]]
    bands = tissue_bands(extent, size)
    whole = measure_tissue(image, label, membrane, mito, size, bands)
    parts = [
        measure_tissue(image[box], label[box], membrane[box], None if mito is None else mito[box], size, bands)
        for box in boxes
    ]
    values = np.array([part.comparable for part in parts])
    known = np.isfinite(values)
    count = known.sum(axis=0)
    mean = np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(known, values - mean, 0) ** 2).sum(axis=0) / np.maximum(count - 1, 1))
    grey = [grey_distance(part.histogram, whole.histogram) for part in parts]
    return RealTissue(size, bands, whole, spread, float(np.sqrt(np.mean(np.square(grey)))))


def _parts(shape: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Nine overlapping parts of half the rows and columns and all sections."""
    extent = [max(1, int(n * _PART)) for n in shape[1:]]
    for shares in product(_STARTS, repeat=2):
        starts = [int(share * (n - e)) for share, n, e in zip(shares, shape[1:], extent, strict=True)]
        y, x = (slice(a, a + e) for a, e in zip(starts, extent, strict=True))
        yield slice(0, shape[0]), y, x
