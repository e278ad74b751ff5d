"""The volume: image, neuron labels and what is inside neurons, of one piece of tissue, with the size of its voxels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import MissingInput, ShapeMismatch, ValueRangeError, VolumeFormatError
from ..geometry import ZYX, Box, voxel_size
from .arrays import ArrayLike
from .roles import Scaling


@dataclass(frozen=True, eq=False)
class Volume:
    """One piece of tissue. Arrays are (z, y, x), on disk (read when indexed) or numpy arrays in memory.

    Attributes
    ----------
    image : array or None
        float32 in [0, 1]; None for files that hold masks or a segmentation only.
    label : array or None
        uint64 neuron ids, 0 = background.
    mito : array or None
        uint8, 1 inside mitochondria.
    voxel_nm : ZYX
        Voxel size in nm.
    scaling : Scaling
        Grey values of the recording that became 0 and 1.
    path : str
        Where it was read from; empty if made in memory.
    dark : array or None
        uint8, 1 where neurons are dark inside without a mitochondrion (:func:`.with_dark_bodies`).

    Raises
    ------
    ShapeMismatch
        If the arrays differ in shape.
    VolumeFormatError
        If there is no array, or one has not three axes, or an axis of length 0.
    ValueRangeError
        If the voxel size is not three positive numbers.
    """

    image: ArrayLike | None
    label: ArrayLike | None
    mito: ArrayLike | None
    voxel_nm: ZYX
    scaling: Scaling = field(default_factory=Scaling)
    path: str = ""
    dark: ArrayLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "voxel_nm", voxel_size(self.voxel_nm))
        where = self.path or "A volume"
        arrays = self.arrays
        if not arrays:
            raise VolumeFormatError(f"{where}: needs an image, a label or a mito array. Got none.")
        for name, array in arrays.items():
            if len(array.shape) != 3 or 0 in array.shape:
                raise VolumeFormatError(
                    f"{where}: {name} must have three axes (z, y, x), none empty. Got {array.shape}."
                )
        if len({array.shape for array in arrays.values()}) > 1:
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
            raise ShapeMismatch(f"{where}: all arrays of a volume must have the same shape. Got {shapes}.")

    @property
    def arrays(self) -> dict[str, ArrayLike]:
        """The arrays that are there, by role."""
        named = {"image": self.image, "label": self.label, "mito": self.mito, "dark": self.dark}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extent in voxels, (z, y, x)."""
        z, y, x = next(iter(self.arrays.values())).shape
        return z, y, x

    def array(self, role: str) -> np.ndarray:
        """One array of the volume in memory.

        Parameters
        ----------
        role : str
            ``"image"``, ``"label"``, ``"mito"`` or ``"dark"``.

        Raises
        ------
        MissingInput
            If the volume has none.
        """
        if role not in self.arrays:
            raise MissingInput(f"{self.path or 'The volume'} has no {role}. It has: {', '.join(self.arrays)}.")
        return np.asarray(self.arrays[role])

    @property
    def mito_array(self) -> np.ndarray | None:
        """Mitochondria in memory, None if there are no masks of them."""
        return None if self.mito is None else np.asarray(self.mito)

    @property
    def dark_array(self) -> np.ndarray | None:
        """What else is dark inside neurons, in memory, None if there is no mask of it."""
        return None if self.dark is None else np.asarray(self.dark)

    def crop(self, box: Box) -> Volume:
        """The part inside `box`, as numpy arrays in memory.

        Raises
        ------
        ValueRangeError
            If the box is not inside the volume.
        """
        if not box.within(self.shape):
            raise ValueRangeError(f"A crop must lie inside the volume {self.shape}. Got {box.start} to {box.stop}.")
        parts = {name: np.array(array[box.slices]) for name, array in self.arrays.items()}
        image, label, mito, dark = (parts.get(role) for role in ("image", "label", "mito", "dark"))
        return replace(self, image=image, label=label, mito=mito, dark=dark)

    def load(self) -> Volume:
        """The whole volume as numpy arrays in memory."""
        return self.crop(Box((0, 0, 0), self.shape))
