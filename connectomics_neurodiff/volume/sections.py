"""A folder with one PNG or TIFF file per section, in natural order (``s9.png`` before ``s10.png``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingInput, VolumeFormatError
from .arrays import LazyArray
from .source import Source

SECTION_SUFFIXES = (".png", ".tif", ".tiff")


class SectionFolder(LazyArray):
    """The sections of a folder; only the files asked for are decoded.

    Parameters
    ----------
    paths : list of str
        One file per section, in order.
    shape, dtype
        Of the whole stack, (z, y, x).
    as_label : bool
        How a colour section is read. True: ids ``red * 65536 + green * 256 + blue``, as the AC3/AC4 annotations are
        distributed. False: its grey value, if the three channels are equal.
    """

    def __init__(self, paths: list[str], shape: tuple[int, ...], dtype: Any, as_label: bool) -> None:
        super().__init__(shape, dtype)
        self.paths = paths
        self.as_label = as_label

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        z, y, x = box
        out = np.empty([s.stop - s.start for s in box], self.dtype)
        for i, path in enumerate(self.paths[z]):
            section = read_section(path, self.as_label)
            if section.shape != self.shape[1:] or section.dtype != self.dtype:
                raise VolumeFormatError(
                    f"{path}: all sections must be {self.shape[1:]} {self.dtype} like the first. "
                    f"Got {section.shape} {section.dtype}."
                )
            out[i] = section[y, x]
        return out


def read_folder(path: str, *, as_label: bool) -> Source:
    """Contents of a folder of sections; the voxel size is never stated.

    Raises
    ------
    MissingInput
        If the folder holds no section.
    VolumeFormatError
        If PNG and TIFF files are mixed, or a section cannot be read.
    """
    files = [f for f in Path(path).iterdir() if f.suffix.lower() in SECTION_SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise MissingInput(f"{path}: a folder must hold sections as {', '.join(SECTION_SUFFIXES)}. It holds none.")
    kinds = {f.suffix.lower().replace(".tiff", ".tif") for f in files}
    if len(kinds) > 1:
        raise VolumeFormatError(f"{path}: sections must be all PNG or all TIFF. Got both.")
    paths = [str(f) for f in sorted(files, key=lambda f: natural_key(f.name))]
    first = read_section(paths[0], as_label)
    stack = SectionFolder(paths, (len(paths), *first.shape), first.dtype, as_label)
    return Source(path, "sections", {"": stack}, None)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that orders numbers inside names by value.

    >>> sorted(["s10.png", "s9.png"], key=natural_key)
    ['s9.png', 's10.png']
    """
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts] + [(1, 0, name)]


def read_section(path: str, as_label: bool) -> np.ndarray:
    """One section as (y, x); see :class:`SectionFolder` for colours.

    Raises
    ------
    VolumeFormatError
        If the file cannot be decoded, or an image section is coloured.
    """
    pixels = _decode(path)
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (2, 3, 4):
        raise VolumeFormatError(f"{path}: a section must be grey or RGB. Got shape {pixels.shape}.")
    if pixels.shape[2] == 2:  # grey and opacity
        return pixels[..., 0]
    red, green, blue = (pixels[..., c] for c in range(3))
    if as_label:
        if pixels.dtype != np.uint8:
            raise VolumeFormatError(f"{path}: colour labels must have 8 bits per channel. Got {pixels.dtype}.")
        return red.astype(np.uint32) * 65536 + green.astype(np.uint32) * 256 + blue
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise VolumeFormatError(f"{path} is coloured, not grey; if these are labels, read them as label (--as label).")
    return np.ascontiguousarray(red)


def _decode(path: str) -> np.ndarray:
    """Pixels (y, x) or (y, x, channels) with channels red, green, blue[, opacity]."""
    if path.lower().endswith(".png"):
        import cv2

        pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise VolumeFormatError(f"{path} is truncated or no PNG file.")
        # OpenCV orders channels blue, green, red.
        return pixels[..., [2, 1, 0]] if pixels.ndim == 3 and pixels.shape[2] >= 3 else pixels
    from .tiff import open_tiff

    with open_tiff(path) as file:
        section: np.ndarray = file.pages[0].asarray()
        return section
