"""Grey values of a phantom: what stained tissue looks like in an electron microscope.

Lipid membranes and mitochondria are dark, cytoplasm is light and grainy. Lengths are nanometres; grey values are in
[0, 1], 1 = bright.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.interpolate import BSpline

from ..geometry import is_anisotropic

_CYTOPLASM, _MEMBRANE, _MITO, _MITO_OUTLINE = 0.70, 0.20, 0.43, 0.22
#: Outer membranes of mitochondria (two, close together), and the pitch of their cristae, nm.
_OUTLINE_NM, _CRISTAE_NM = 9.0, 48.0
#: Point spread of the microscope, standard deviation in nm.
_BLUR_NM = 3.5


def smooth_noise(shape: tuple[int, ...], size: np.ndarray, length_nm: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of unit variance, correlated over about `length_nm`, float32.

    Random numbers on a lattice of that pitch, blended by cubic B-splines axis by axis: the cost does not grow with the
    length, and the same nanometres give the same roughness at any voxel size.
    """
    bases = [_spline_basis(n, voxel / length_nm) for n, voxel in zip(shape, size, strict=True)]
    noise = rng.normal(size=[basis.shape[1] for basis in bases])
    for basis in bases:
        # Contracting the first axis and appending the result walks through z, y, x and ends in that order.
        noise = np.tensordot(noise, basis, axes=(0, 1))
    # Variance of a blend of independent numbers: the mean over a period of the squared weights, 151/315 per axis.
    return (noise / (151 / 315) ** (len(shape) / 2)).astype(np.float32)


def _spline_basis(n: int, step: float) -> np.ndarray:
    """Values of the cubic B-splines on the integers at ``0, step, 2 step, ...``: (n, number of splines)."""
    at = np.arange(n) * step
    count = int(np.floor(at[-1])) + 4
    return BSpline.design_matrix(at, np.arange(-3, count + 1, dtype=float), 3).toarray()


def render(
    dense: np.ndarray,
    depth: np.ndarray,
    mito: np.ndarray,
    size: np.ndarray,
    rng: np.random.Generator,
    *,
    membrane_nm: float,
    noise: float,
) -> np.ndarray:
    """Image of a phantom.

    Parameters
    ----------
    dense : numpy.ndarray
        (z, y, x) neurites that touch one another, from 1.
    depth : numpy.ndarray
        (z, y, x) nm from each voxel to the nearest one of another neurite.
    mito : numpy.ndarray
        (z, y, x) mitochondria, 0 = none.
    size : numpy.ndarray
        Voxel size in nm, (z, y, x).
    rng : numpy.random.Generator
        Source of randomness.
    membrane_nm : float
        Full width at half depth of the line between two neurites.
    noise : float
        Standard deviation of the shot noise at full brightness.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32 in [0, 1], multiples of 1/255.
    """
    image = _cytoplasm(dense, size, rng)
    _paint_mitochondria(image, mito, size, rng)
    # The surface lies half a voxel before the next neurite's first voxel.
    surface = np.maximum(depth - size.min() / 2, 0)
    darkness = np.exp(-4 * np.log(2) * (surface / membrane_nm) ** 2)
    darkness *= 0.92 + 0.08 * smooth_noise(dense.shape, size, 90.0, rng)
    image += (_MEMBRANE - image) * np.clip(darkness, 0, 1)
    return _expose(image, size, noise, rng)


def _cytoplasm(dense: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cytoplasm: every neurite its own shade, clouds, filaments and ribosomes as dark dots, vesicles as rings."""
    shade = np.append(0, rng.normal(_CYTOPLASM, 0.035, int(dense.max())))
    image = shade[dense].astype(np.float32)
    image += 0.02 * smooth_noise(dense.shape, size, 120.0, rng) + 0.03 * smooth_noise(dense.shape, size, 28.0, rng)
    image -= _spots(rng.random(dense.shape) < 2.5e-6 * size.prod(), size, 6.5) * 0.17
    with_vesicles = np.append(False, rng.random(int(dense.max())) < 0.3)[dense]
    crowd = smooth_noise(dense.shape, size, 200.0, rng) > 0.4
    seeds = (rng.random(dense.shape) < 6e-6 * size.prod()) & with_vesicles & crowd
    # A ring is a wide spot minus a narrow one.
    image += 0.30 * _spots(seeds, size, 9.0) - 0.33 * _spots(seeds, size, 15.0)
    return image


def _spots(seeds: np.ndarray, size: np.ndarray, sigma_nm: float) -> np.ndarray:
    """Gaussian spots of height 1 at the voxels of `seeds`; thinner than a section, they stay within it."""
    sigma = sigma_nm / size
    sigma[sigma < 0.25] = 0
    height = np.prod(np.sqrt(2 * np.pi) * sigma[sigma > 0.4])
    return ndimage.gaussian_filter(seeds.astype(np.float32), sigma, truncate=3) * np.float32(height)


def _paint_mitochondria(image: np.ndarray, mito: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> None:
    """Dark matrix, darker outline, stripes of cristae whose direction differs from one to the next; in place."""
    import edt

    for number, box in enumerate(ndimage.find_objects(mito), start=1):
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        body = mito[around] == number
        part = image[around]
        depth = edt.edt(body, anisotropy=tuple(size), black_border=False, parallel=1)
        depth = np.minimum(depth, np.float32(1e4)) - size.min() / 2
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        grid = np.indices(body.shape).reshape(3, -1)
        along = (axis * size) @ grid
        phase = along.reshape(body.shape) / _CRISTAE_NM + 0.35 * smooth_noise(body.shape, size, 80.0, rng)
        cristae = np.maximum(np.sin(2 * np.pi * phase), 0) ** 2 * (depth > 2 * _OUTLINE_NM)
        texture = 0.05 * smooth_noise(body.shape, size, 30.0, rng)
        grey = rng.normal(_MITO, 0.025) + texture - 0.13 * cristae
        outline = np.exp(-((depth / _OUTLINE_NM) ** 2))
        grey += (_MITO_OUTLINE - grey) * outline
        part[body] = grey[body]


def _expose(image: np.ndarray, size: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blur, drift of brightness and contrast from section to section, shot noise, eight bits."""
    flat = is_anisotropic(size.tolist())
    sigma = _BLUR_NM / size
    if flat:
        sigma[0] = 0
    image = ndimage.gaussian_filter(image, sigma, truncate=3)
    if flat:
        gain, offset = rng.normal([[1.0], [0.0]], [[0.05], [0.025]], size=(2, len(image)))
        image = (image - 0.5) * gain[:, None, None] + 0.5 + offset[:, None, None]
    # Electrons are counted: the variance grows with the signal.
    image = image + noise * np.sqrt(np.clip(image, 0.05, 1)) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.rint(255 * np.clip(image, 0, 1)) / 255).astype(np.float32)
