"""What every reader returns: the arrays of a file by name, and what the file says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import MissingInput, did_you_mean
from ..geometry import ZYX
from .arrays import LazyArray


@dataclass(frozen=True)
class Source:
    """Contents of one file or folder.

    Attributes
    ----------
    path : str
        The file or folder.
    format : str
        ``"HDF5"``, ``"TIFF"``, ``"sections"`` or ``"Zarr"``.
    arrays : mapping of str to LazyArray
        Every array, by its name inside the file; formats that hold one unnamed array call it ``""``.
    voxel_nm : ZYX or None
        Voxel size if the file states it.
    attributes : mapping
        What else the file says: attributes of its root and, as ``name.attribute``, of its arrays.
    """

    path: str
    format: str
    arrays: Mapping[str, LazyArray]
    voxel_nm: ZYX | None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def array(self, name: str) -> LazyArray:
        """The array called `name`; raises :class:`MissingInput` that lists what is there."""
        wanted = name.strip("/")
        if wanted not in self.arrays:
            raise MissingInput(f"{self.path} has no dataset '{wanted}'.{self._offer(wanted)}")
        return self.arrays[wanted]

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is there."""
        return next((name for name in names if name in self.arrays), None)

    def missing(self, names: Sequence[str]) -> MissingInput:
        """Error that says none of `names` is there, what is, and how to pick one."""
        wanted = " or ".join(f"'{name}'" for name in names)
        return MissingInput(f"{self.path} has no dataset {wanted}.{self._offer(names[0])} Or name one: file::dataset.")

    def _offer(self, name: str) -> str:
        there = ", ".join(f"{n or '(unnamed)'} {a.shape}" for n, a in self.arrays.items())
        return f"{did_you_mean(name, self.arrays)} It has: {there or 'nothing'}."
