"""Augmentations of EM training patches: what serial sections do to an image.

Small functions on (z, y, x) arrays: image float32 in [0, 1], label unsigned integers, known 1 where the label is
annotated. They return new arrays or change the ones given, as said; :func:`augment` applies them with the
probabilities of :class:`AugmentOptions`. Names follow pytorch_connectomics' AUGMENTOR keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np

from ..errors import ValueRangeError


@dataclass(frozen=True)
class AugmentOptions:
    """Probability of each augmentation, in [0, 1].

    Attributes
    ----------
    flip
        Mirroring, for each axis by itself.
    transpose
        Exchange of y and x.
    rotate
        Quarter turn in the plane.
    elastic
        Smooth deformation in the plane, the same for all sections. Off by default: it costs most.
    misalignment
        A section slips, or all sections from one on are displaced; the label goes along.
    grayscale
        Contrast, brightness and gamma of the patch.
    section_grayscale
        Contrast and brightness of some sections.
    missing_section
        Sections that are black, white or noise.
    missing_parts
        A section of which one side of a line is black or white.
    motion_blur
        Blur along a line in some sections.
    blur
        Defocus of some sections.
    cut_blur
        A box of low resolution.
    cut_noise
        A box of strong noise.
    noise
        Gaussian noise everywhere.

    Raises
    ------
    ValueRangeError
        If a probability is not in [0, 1].
    """

    flip: float = 0.5
    transpose: float = 0.5
    rotate: float = 0.0
    elastic: float = 0.0
    misalignment: float = 0.2
    grayscale: float = 0.5
    section_grayscale: float = 0.2
    missing_section: float = 0.1
    missing_parts: float = 0.1
    motion_blur: float = 0.1
    blur: float = 0.1
    cut_blur: float = 0.1
    cut_noise: float = 0.1
    noise: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueRangeError(f"The probability of '{field.name}' must be in [0, 1]. Got {value}.")

    @classmethod
    def none(cls) -> AugmentOptions:
        """No augmentation at all."""
        return cls(**{field.name: 0.0 for field in fields(cls)})


def grayscale(image: np.ndarray, rng: np.random.Generator, *, strength: float = 0.3) -> np.ndarray:
    """Contrast 1 +- s/2, brightness +- s/2 and gamma 2^(+-s) of the whole patch; a new image in [0, 1]."""
    contrast, brightness, exponent = rng.uniform(-0.5, 0.5, 3) * strength
    adjusted = np.clip(image * np.float32(1 + contrast) + np.float32(brightness), 0.0, 1.0)
    return np.power(adjusted, np.float32(2.0 ** (2 * exponent)), out=adjusted)


def section_grayscale(image: np.ndarray, rng: np.random.Generator, *, strength: float = 0.2) -> np.ndarray:
    """Contrast and brightness of a random half of the sections, each its own; a new image in [0, 1]."""
    depth = len(image)
    change = rng.uniform(-0.5, 0.5, (2, depth, 1, 1)).astype(np.float32) * np.float32(strength)
    change *= (rng.random(depth) < 0.5)[:, None, None]
    return np.clip(image * (1 + change[0]) + change[1], 0.0, 1.0)


def noise(image: np.ndarray, rng: np.random.Generator, *, largest_std: float = 0.08) -> np.ndarray:
    """Gaussian noise, standard deviation uniform up to `largest_std`; a new image in [0, 1]."""
    added = rng.standard_normal(image.shape, dtype=np.float32)
    added *= np.float32(rng.uniform(0, largest_std))
    added += image
    return np.clip(added, 0.0, 1.0, out=added)


def _some_sections(depth: int, rng: np.random.Generator, share: float) -> np.ndarray:
    """Random section numbers, at least one."""
    count = min(depth, 1 + int(rng.binomial(depth, share)))
    return rng.choice(depth, count, replace=False)


def blur(image: np.ndarray, rng: np.random.Generator, *, largest_sigma: float = 1.5) -> np.ndarray:
    """Gaussian blur (sigma in pixels) of some sections; a new image in [0, 1]."""
    blurred = image.copy()
    for section in _some_sections(len(image), rng, 0.2):
        sigma = float(rng.uniform(0.5, largest_sigma))
        blurred[section] = cv2.GaussianBlur(np.ascontiguousarray(image[section]), (0, 0), sigma)
    return np.clip(blurred, 0.0, 1.0, out=blurred)


def motion_blur(image: np.ndarray, rng: np.random.Generator, *, length: int = 9) -> np.ndarray:
    """Blur along a row or a column, `length` pixels, of some sections; a new image in [0, 1]."""
    blurred = image.copy()
    for section in _some_sections(len(image), rng, 0.1):
        size = (length, 1) if rng.random() < 0.5 else (1, length)
        blurred[section] = cv2.blur(np.ascontiguousarray(image[section]), size)
    return np.clip(blurred, 0.0, 1.0, out=blurred)


def missing_section(image: np.ndarray, rng: np.random.Generator, *, most: int = 2) -> np.ndarray:
    """One or more inner sections become black, white or noise; a new image in [0, 1]. The label stays."""
    if len(image) < 3:
        return image
    damaged = image.copy()
    first = int(rng.integers(1, len(image) - 1))
    last = min(first + int(rng.integers(1, most + 1)), len(image) - 1)
    kind = rng.integers(3)
    if kind == 2:
        damaged[first:last] = rng.random(damaged[first:last].shape, dtype=np.float32)
    else:
        damaged[first:last] = float(kind)
    return damaged


def missing_parts(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One side of a random line across one section becomes black or white; a new image in [0, 1]. The label stays."""
    damaged = image.copy()
    _, height, width = image.shape
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:height, :width]
    through = rng.uniform(0, 1, 2) * (height, width)
    beyond = (y - through[0]) * np.sin(angle) + (x - through[1]) * np.cos(angle) > 0
    damaged[int(rng.integers(len(image)))][beyond] = float(rng.integers(2))
    return damaged


def _random_box(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    """Box of a quarter to half the patch on each axis."""
    extent = [max(1, int(n * rng.uniform(0.25, 0.5))) for n in shape]
    start = [int(rng.integers(n - e + 1)) for n, e in zip(shape, extent, strict=True)]
    return tuple(slice(s, s + e) for s, e in zip(start, extent, strict=True))


def cut_noise(image: np.ndarray, rng: np.random.Generator, *, largest: float = 0.2) -> np.ndarray:
    """A box with uniform noise added; a new image in [0, 1]."""
    noisy = image.copy()
    box = _random_box(image.shape, rng)
    added = (rng.random(noisy[box].shape, dtype=np.float32) - np.float32(0.5)) * np.float32(2 * largest)
    noisy[box] = np.clip(noisy[box] + added, 0.0, 1.0)
    return noisy


def cut_blur(image: np.ndarray, rng: np.random.Generator, *, factor: int = 4) -> np.ndarray:
    """A box at a `factor` times lower resolution in the plane; a new image in [0, 1]."""
    coarse = image.copy()
    box = _random_box(image.shape, rng)
    for section in coarse[box]:
        height, width = section.shape
        size = max(1, width // factor), max(1, height // factor)
        small = cv2.resize(np.ascontiguousarray(section), size, interpolation=cv2.INTER_AREA)
        section[:] = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(coarse, 0.0, 1.0, out=coarse)


def _displaced(array: np.ndarray, shift: tuple[int, int], mode: str) -> np.ndarray:
    """Sections moved by `shift` = (rows, columns); what comes in is reflected, or 0 (``mode="constant"``)."""
    height, width = array.shape[1:]
    dy, dx = shift
    padded = np.pad(array, ((0, 0), (abs(dy),) * 2, (abs(dx),) * 2), mode=mode)  # type: ignore[call-overload]
    top, left = abs(dy) - dy, abs(dx) - dx
    return padded[:, top : top + height, left : left + width]


def misalignment(
    image: np.ndarray, label: np.ndarray, known: np.ndarray, rng: np.random.Generator, *, largest_shift: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One section slips, or all sections from a random one on are displaced.

    Parameters
    ----------
    image, label, known : numpy.ndarray
        (z, y, x); all three move together. Rows and columns that come in from outside are reflected in the image,
        unknown and background in the label.
    rng : numpy.random.Generator
        Source of randomness.
    largest_shift : int
        Largest displacement along y and x, pixels.

    Returns
    -------
    tuple of numpy.ndarray
        New image, label and known; the given ones if there is only one section.
    """
    if len(image) < 2:
        return image, label, known
    shift = int(rng.integers(-largest_shift, largest_shift + 1)), int(rng.integers(-largest_shift, largest_shift + 1))
    first = int(rng.integers(1, len(image)))
    moved = slice(first, first + 1 if rng.random() < 0.5 else None)
    result = image.copy(), label.copy(), known.copy()
    for array, mode in zip(result, ("reflect", "constant", "constant"), strict=True):
        array[moved] = _displaced(array[moved], shift, mode)
    return result


def elastic(
    image: np.ndarray,
    label: np.ndarray,
    known: np.ndarray,
    rng: np.random.Generator,
    *,
    spacing: int = 32,
    std: float = 3.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth random deformation in the plane, the same for all sections; new image, label and known.

    Parameters
    ----------
    image, label, known : numpy.ndarray
        (z, y, x); image interpolated linearly, the others by nearest voxel, so no new label appears.
    rng : numpy.random.Generator
        Source of randomness.
    spacing : int
        Distance of the control points, pixels.
    std : float
        Standard deviation of their displacement, pixels.
    """
    _, height, width = image.shape
    grid = max(2, round(height / spacing) + 1), max(2, round(width / spacing) + 1)
    coarse = rng.normal(0, std, (2, *grid)).astype(np.float32)
    dy, dx = (cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) for part in coarse)
    row = np.arange(height, dtype=np.float32)[:, None] + dy
    column = np.arange(width, dtype=np.float32)[None, :] + dx
    warped = np.stack(
        [
            cv2.remap(np.ascontiguousarray(section), column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            for section in image
        ]
    )
    near_row, near_column = np.rint(row).astype(int), np.rint(column).astype(int)
    inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
    index = (slice(None), near_row.clip(0, height - 1), near_column.clip(0, width - 1))
    moved, reached = (np.where(inside, array[index], 0).astype(array.dtype) for array in (label, known))
    return warped, moved, reached


_PIXELWISE = (
    (grayscale, "grayscale"),
    (section_grayscale, "section_grayscale"),
    (motion_blur, "motion_blur"),
    (blur, "blur"),
    (cut_blur, "cut_blur"),
    (cut_noise, "cut_noise"),
    (noise, "noise"),
    # Damage comes last: a lost section shows neither noise nor blur.
    (missing_parts, "missing_parts"),
    (missing_section, "missing_section"),
)


def augment(
    image: np.ndarray, label: np.ndarray, known: np.ndarray, rng: np.random.Generator, options: AugmentOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Everything but flips and transposes: deformations, then grey values.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x) float32 in [0, 1].
    label : numpy.ndarray
        (z, y, x) unsigned integers.
    known : numpy.ndarray
        (z, y, x): 1 where the label is annotated, 0 elsewhere; between them where it is reliable to that degree.
    rng : numpy.random.Generator
        Source of randomness.
    options : AugmentOptions
        How often.

    Returns
    -------
    tuple of numpy.ndarray
        Image (still in [0, 1]), label, known.
    """
    if rng.random() < options.elastic:
        image, label, known = elastic(image, label, known, rng)
    if rng.random() < options.misalignment:
        image, label, known = misalignment(image, label, known, rng)
    for change, name in _PIXELWISE:
        if rng.random() < getattr(options, name):
            image = change(image, rng)
    return image, label, known
