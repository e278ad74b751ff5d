"""Equivalent ellipses and outlines of one section's mask, in nanometres."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

#: Points per stored outline: enough for an outline of 3 um at 48 nm a point, and the same for all, so that two
#: neighbouring sections can be interpolated point by point.
CONTOUR_POINTS = 64


class Ellipse(NamedTuple):
    """The ellipse with the same second-order central moments as a mask.

    Attributes
    ----------
    major_nm, minor_nm : float
        Full axis lengths.
    angle : float
        Direction of the major axis, radians in (-pi/2, pi/2], from +x towards +y.
    centroid_nm : tuple of float
        (y, x) of the centre of mass; the centre of pixel (0, 0) is the origin.
    """

    major_nm: float
    minor_nm: float
    angle: float
    centroid_nm: tuple[float, float]


def equivalent_ellipse(mask: np.ndarray, pitch_nm: tuple[float, float]) -> Ellipse:
    """Equivalent ellipse of a mask from its second-order central moments.

    The covariance of the pixels' area (each pixel is a rectangle, hence the twelfth) has eigenvalues v1 >= v2; the
    ellipse with that covariance has full axes 4 sqrt(v1) and 4 sqrt(v2) (Haralick & Shapiro 1992, appendix A).

    Parameters
    ----------
    mask : numpy.ndarray
        (y, x), any dtype; non-zero is inside; at least one pixel.
    pitch_nm : tuple of float
        Pixel size (y, x).

    Examples
    --------
    >>> mask = np.zeros((50, 80), dtype=np.uint8)
    >>> mask[20:30, 10:70] = 1
    >>> ellipse = equivalent_ellipse(mask, (2.0, 1.0))
    >>> round(ellipse.major_nm / ellipse.minor_nm, 3), round(ellipse.angle, 3), ellipse.centroid_nm
    (3.0, 0.0, (49.0, 39.5))
    """
    moments = cv2.moments((mask != 0).view(np.uint8), True)
    area = moments["m00"]
    py, px = pitch_nm
    cxx = (moments["mu20"] / area + 1 / 12) * px * px
    cyy = (moments["mu02"] / area + 1 / 12) * py * py
    cxy = moments["mu11"] / area * px * py
    mean, half = (cxx + cyy) / 2, np.hypot((cxx - cyy) / 2, cxy)
    major, minor = 4 * np.sqrt(mean + half), 4 * np.sqrt(max(mean - half, 0.0))
    angle = 0.5 * np.arctan2(2 * cxy, cxx - cyy)
    return Ellipse(float(major), float(minor), float(angle), (moments["m01"] / area * py, moments["m10"] / area * px))


def outline(mask: np.ndarray, pitch_nm: tuple[float, float]) -> np.ndarray:
    """Outer contour of a connected mask as CONTOUR_POINTS points, evenly spaced along it.

    Returns
    -------
    numpy.ndarray
        (CONTOUR_POINTS, 2) float32, (y, x) in nm, through the centres of the boundary pixels.
    """
    found, _ = cv2.findContours((mask != 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    longest = max(found, key=len)[:, 0, ::-1] * np.asarray(pitch_nm)
    closed = np.concatenate([longest, longest[:1]])
    travelled = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = np.linspace(0, travelled[-1], CONTOUR_POINTS, endpoint=False)
    return np.stack([np.interp(at, travelled, closed[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32)


def aligned_to(contour: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Rotate a contour's starting point so that its points lie nearest to those of the `previous` section's."""
    shifts = (np.arange(CONTOUR_POINTS)[:, None] + np.arange(CONTOUR_POINTS)) % CONTOUR_POINTS
    cost = ((contour[shifts] - previous) ** 2).sum(axis=(1, 2))
    return contour[shifts[int(cost.argmin())]]


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """Largest 8-connected piece of a 2D mask, as uint8 (all zero if the mask is empty)."""
    count, pieces, stats, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=8)
    if count <= 2:
        return (pieces > 0).astype(np.uint8)
    return (pieces == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)


def piece_at(section: np.ndarray, y: int, x: int) -> np.ndarray:
    """The 8-connected piece of equal labels in a section, (y, x) uint32, around a pixel: uint8 in its bounding box."""
    filled = np.zeros((section.shape[0] + 2, section.shape[1] + 2), dtype=np.uint8)
    _, _, _, (left, top, width, height) = cv2.floodFill(
        section.view(np.int32), filled, (x, y), 0, flags=8 | cv2.FLOODFILL_MASK_ONLY
    )
    return filled[top + 1 : top + 1 + height, left + 1 : left + 1 + width]
