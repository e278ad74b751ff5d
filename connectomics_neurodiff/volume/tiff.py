"""TIFF stacks: one file with a page per section, also BigTIFF, ImageJ and OME."""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..errors import VolumeFormatError
from ..geometry import ZYX
from .arrays import LazyArray
from .source import Source

#: Nanometres in a unit of length, under the names that ImageJ and OME use for it.
NM_PER_UNIT = {
    "nm": 1.0,
    "nanometer": 1.0,
    "angstrom": 0.1,
    "å": 0.1,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "\\u00b5m": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "cm": 1e7,
    "m": 1e9,
}

#: What a damaged file makes tifffile and its codecs raise.
DAMAGE = (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error, zlib.error)


#: Words in tifffile's log that mean: part of the file is gone, and what follows is what is left of it.
_LOST = re.compile(r"invalid page offset|corrupted|failed to reshape")


class _Keeper(logging.Handler):
    """Log handler that keeps what is said in a list."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


@contextmanager
def open_tiff(path: str) -> Iterator[Any]:
    """A ``tifffile.TiffFile`` that is whole.

    Of a truncated file tifffile takes the sections that it finds and only logs the loss; a stack that is silently
    shorter, or one section long, is no longer the user's volume.

    Raises
    ------
    VolumeFormatError
        If the file is truncated, damaged, or no TIFF file.
    """
    from tifffile import TiffFile

    log = logging.getLogger("tifffile")
    remarks: list[str] = []
    keeper = _Keeper(remarks)
    log.addHandler(keeper)
    propagate, log.propagate = log.propagate, False
    try:
        with TiffFile(path) as file:
            _ = len(file.pages), file.series  # finds them all
            lost = next((text for text in remarks if _LOST.search(text)), "") or _missing_end(file)
            if lost:
                raise VolumeFormatError(f"{path} is truncated or damaged: {lost}.")
            yield file
    except DAMAGE as error:
        raise VolumeFormatError(f"{path} is truncated or no TIFF file: {error}.") from error
    finally:
        log.removeHandler(keeper)
        log.propagate = propagate


def _missing_end(file: Any) -> str:
    """What to say if the last pixels, by the file's own account, lie behind its end; else an empty string."""
    series = file.series[0]
    last = series.pages[-1]
    segments = [] if last is None else zip(last.dataoffsets, last.databytecounts, strict=False)
    ends = [offset + count for offset, count in segments]
    if series.dataoffset is not None:
        ends.append(series.dataoffset + series.nbytes)
    needed = max(ends, default=0)
    return f"it has {file.filehandle.size} bytes of {needed}" if needed > file.filehandle.size else ""


class TiffArray(LazyArray):
    """The sections of one TIFF file; only the pages asked for are decoded.

    Parameters
    ----------
    path : str
        The file.
    shape, dtype
        Of the whole stack, (z, y, x).
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(shape, dtype)
        self.path = path

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        z, y, x = box
        out = np.empty([s.stop - s.start for s in box], self.dtype)
        if out.size == 0:
            return out
        with open_tiff(self.path) as file:
            series = file.series[0]
            if series.dataoffset is not None:
                # Sections lie one after the other, uncompressed; large ImageJ stacks list only the first page.
                return np.array(series.asarray(out="memmap").reshape(self.shape)[box], dtype=self.dtype)
            for i, page in enumerate(series.pages[z.start : z.stop]):
                if page is None:
                    raise VolumeFormatError(f"{self.path}: section {z.start + i} is missing.")
                out[i] = page.asarray()[y, x]
        return out


def read_tiff(path: str) -> Source:
    """Contents of a TIFF stack.

    The voxel size is taken from OME metadata (``PhysicalSizeZ/Y/X``) or ImageJ's (``spacing``, ``unit`` and the
    resolution tags) if all three axes are stated in a unit of length; else it counts as not stated.

    Raises
    ------
    VolumeFormatError
        If the file is damaged, has colours, or is no stack of equal sections.
    """
    with open_tiff(path) as file:
        series = file.series[0]
        shape, dtype, axes = series.shape, series.dtype, series.axes
        whole = series.dataoffset is not None or len(series.pages) == (shape[0] if len(shape) == 3 else 1)
        voxel_nm = _ome_voxel(file) if file.is_ome else _imagej_voxel(file)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or "S" in axes or not whole:
        raise VolumeFormatError(
            f"{path}: a TIFF stack has grey sections as pages, (z, y, x). Got {shape}, axes {axes}."
        )
    return Source(path, "TIFF", {"": TiffArray(path, shape, dtype)}, voxel_nm)


def _imagej_voxel(file: Any) -> ZYX | None:
    metadata = file.imagej_metadata or {}
    unit = NM_PER_UNIT.get(str(metadata.get("unit", "")).lower())
    tags = file.pages[0].tags
    if unit is None or "spacing" not in metadata or "XResolution" not in tags or "YResolution" not in tags:
        return None
    # The tags are rational numbers of pixels per unit: (numerator, denominator).
    y, x = (tags[name].value[1] / max(tags[name].value[0], 1) for name in ("YResolution", "XResolution"))
    return _positive(float(metadata["spacing"]) * unit, y * unit, x * unit)


def _ome_voxel(file: Any) -> ZYX | None:
    root = ElementTree.fromstring(file.ome_metadata)
    pixels = next((e for e in root.iter() if re.fullmatch(r"(\{.*\})?Pixels", e.tag)), None)
    if pixels is None or any(f"PhysicalSize{axis}" not in pixels.attrib for axis in "ZYX"):
        return None
    # The OME schema's default unit is the micrometre.
    units = [NM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").lower(), 0.0) for axis in "ZYX"]
    return _positive(*(float(pixels.get(f"PhysicalSize{axis}", 0)) * u for axis, u in zip("ZYX", units, strict=True)))


def _positive(z: float, y: float, x: float) -> ZYX | None:
    return ZYX(z, y, x) if min(z, y, x) > 0 else None
