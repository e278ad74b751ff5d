"""Misaligned sections: whole sections jump and drift within their planes, with everything in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ShapeMismatch
from ..geometry import voxel_size
from .apart import tell_apart
from .checks import MOST_NM, positive
from .elastic import pieces_of
from .inside import keep_inside
from .neighbours import sides

#: Share of the sections that jump; half of them alone, the other half with all that follow.
_JUMPS = 0.1
#: A shift fades out towards the frame over so many times its length: there, space is compressed by a quarter at most.
_FADE = 4


def check_misalignment(jump_nm: float, drift_nm: float) -> None:
    """Raise ValueRangeError if a length is not valid."""
    positive("The jump of a section in nm", jump_nm, below=MOST_NM, zero=True)
    positive("The drift of sections in nm", drift_nm, below=MOST_NM, zero=True)


def section_shifts(
    depth: int, voxel_nm: Sequence[float], rng: np.random.Generator, *, jump_nm: float, drift_nm: float
) -> np.ndarray:
    """Random shifts of the sections of a stack.

    A drift is a random walk. Every tenth section on average jumps: half of them alone, as one that was cut or imaged
    askew; half with all the sections after it, as where two blocks were joined. The mean over the stack is zero.

    Parameters
    ----------
    depth : int
        Sections, >= 1.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x).
    rng : numpy.random.Generator
    jump_nm, drift_nm : float
        Standard deviation, per axis, of a jump, and of the step from one section to the next; 0 to 1e5.

    Returns
    -------
    numpy.ndarray
        (depth, 2) int, pixels along y and x by which the contents of a section move.

    Raises
    ------
    ValueRangeError
        If a length or the voxel size is not valid.
    """
    pitch = np.array(voxel_size(voxel_nm)[1:])
    check_misalignment(jump_nm, drift_nm)
    steps = rng.standard_normal((depth, 2)) * drift_nm
    jumps = rng.standard_normal((depth, 2)) * jump_nm * (rng.random((depth, 1)) < _JUMPS)
    alone = rng.random((depth, 1)) < 0.5
    shifts = np.cumsum(steps + jumps * ~alone, axis=0) + jumps * alone
    return np.rint((shifts - shifts.mean(axis=0)) / pitch).astype(int)


def shift_sections(volume: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Shift the sections of a volume within a frame that stays where it is.

    Rows and columns move as a whole. Towards the frame the shift fades out over four times its length, so that nothing
    leaves the frame, nothing has to be invented at it, and every section holds what it held.

    Parameters
    ----------
    volume : numpy.ndarray
        (z, y, x).
    shifts : numpy.ndarray
        (z, 2) int, pixels along y and x. At most an eighth of the frame is used.

    Raises
    ------
    ShapeMismatch
        If there is not one shift per section.
    """
    if shifts.shape != (len(volume), 2):
        raise ShapeMismatch(f"There must be one shift (y, x) per section, {(len(volume), 2)}. Got {shifts.shape}.")
    moved = np.empty_like(volume)
    for section, (down, right), into in zip(volume, shifts, moved, strict=True):
        rows, columns = _source(section.shape[0], int(down)), _source(section.shape[1], int(right))
        into[:] = section[rows][:, columns]
    return moved


def _source(length: int, shift: int) -> np.ndarray:
    """Index that every row is taken from: `shift` before it, and itself at both ends."""
    shift = int(np.clip(shift, -(length // (2 * _FADE)), length // (2 * _FADE)))
    at = np.arange(length)
    if not shift:
        return at
    faded = np.minimum(np.minimum(at, length - 1 - at) / (_FADE * abs(shift)), 1)
    return np.rint(at - shift * faded).astype(int)


def shift_membranes(membrane: np.ndarray, shifts: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """:func:`shift_sections` of membranes, and both pixels wherever two neurons of the shifted labels touch in-plane.

    Where a shift fades out one row in five is left out, and with it a membrane that is two pixels thin. Gaps between
    neurons are membrane already: if both pixels of their boundaries were, too, membranes would be a quarter wider.
    """
    walls = shift_sections(membrane, shifts)
    for axis in (1, 2):
        here, ahead = sides(3, axis)
        one, other = moved[here], moved[ahead]
        touch = (one != other) & (one > 0) & (other > 0)
        walls[here] |= touch
        walls[ahead] |= touch
    return walls


def halved(shifts: np.ndarray) -> np.ndarray:
    """Shifts half as long, and in the end none: then no label vanishes."""
    return np.trunc(shifts / 2).astype(int)


def misalign(
    compact: np.ndarray, membrane: np.ndarray, mito: np.ndarray, shifts: np.ndarray, dark: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Shift labels, membranes and mitochondria together.

    What a jump tears from a neurite too thin to overlap itself gets a label of its own, or becomes background if all of
    it is membrane. Should a label vanish among the rows that are left out, all shifts are halved. Where mitochondria of
    two neurons come to touch, the smaller one loses the voxels that do; those of one neuron become one.

    Parameters
    ----------
    compact : numpy.ndarray
        (z, y, x) uint32, labels 0..n.
    membrane, mito : numpy.ndarray
        (z, y, x) uint8.
    shifts : numpy.ndarray
        As of :func:`section_shifts`.
    dark : numpy.ndarray or None
        (z, y, x) uint8: what else moves along.

    Returns
    -------
    label, membrane, mito, dark : numpy.ndarray
        Labels 0..m, m >= n; those above n are torn pieces. None for a `dark` that is None.
    """
    before = pieces_of(compact)
    allowed = before.counts(int(compact.max()) + 1)
    moved = shift_sections(compact, shifts)
    pieces = pieces_of(moved)
    while ((allowed > 0) & (pieces.counts(len(allowed)) == 0)).any():
        shifts = halved(shifts)
        moved = shift_sections(compact, shifts)
        pieces = pieces_of(moved)
    label, walls = tell_apart(moved, pieces, allowed), shift_membranes(membrane, shifts, moved)
    inside = np.bincount(label[walls == 0], minlength=int(label.max()) + 1)
    specks = (inside == 0) & (np.arange(len(inside)) >= len(allowed))
    label = np.where(specks[label], np.uint32(0), label)
    moved_dark = None if dark is None else shift_sections(dark, shifts)
    return label, walls, keep_inside(shift_sections(mito, shifts), label, walls), moved_dark
