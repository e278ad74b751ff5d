"""What is to be placed: how many mitochondria, of which sizes, and how much of their volume is already there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ValueRangeError
from .library import LEAST_VOLUME_NM3, SignatureLibrary

logger = logging.getLogger("connectomics_neurodiff")

#: Placement stops within this share of the volume wanted, and never goes beyond it by more.
_TOLERANCE = 0.04
#: More than this share of the volume or number wanted missing is worth a warning; the gate's limit, too.
_MISSED = 0.1


@dataclass(frozen=True)
class Wanted:
    """One mitochondrion to place: its volume in voxels and its height in nm."""

    volume: float
    height_nm: float


def plan_of(
    library: SignatureLibrary, voxels: float, voxel_nm: Sequence[float], count: int | None = None
) -> list[Wanted]:
    """Mitochondria that make up so many voxels, of the library's sizes, largest first.

    With None as many as in the library's tissue; a `count` that was given is made up by other sizes, in proportion.

    Raises
    ------
    ValueRangeError
        If `count` leaves less to each than the smallest template's volume.
    """
    ranked = sorted(library.signatures, key=lambda s: -s.volume_nm3)
    in_voxels = float(np.prod(voxel_nm))
    # One that is smaller than a voxel cannot be drawn.
    own = max(1, min(round(len(ranked) * voxels * in_voxels / library.mito_nm3), int(voxels)))
    planned = own if count is None else count
    most = max(1, int(voxels * in_voxels / LEAST_VOLUME_NM3))
    if count is not None and count > most:
        raise ValueRangeError(
            f"The number of mitochondria must lie in [1, {most}], so that each of those that make up the share of "
            f"mitochondria is at least {LEAST_VOLUME_NM3:g} nm^3 large. Got {count}."
        )
    # The quantiles of the library's sizes; the sizes themselves where as many are wanted as it holds.
    of = [ranked[i] for i in ((np.arange(planned) + 0.5) * len(ranked) / planned).astype(int)]
    volumes = np.array([s.volume_nm3 for s in of])
    if count is not None:
        volumes = _with_sum(volumes, voxels * in_voxels)
    return [
        Wanted(max(volume, LEAST_VOLUME_NM3) / in_voxels, np.cbrt(volume / s.volume_nm3) * s.z_extent_nm)
        for s, volume in zip(of, volumes, strict=True)
    ]


def _with_sum(volumes: np.ndarray, total: float) -> np.ndarray:
    """Falling volumes in nm^3, as many, in proportion but none below a template's least, with that sum."""
    # By how many of the smallest are raised to the least volume: what is left for the others, as a multiple of theirs.
    factors = (total - LEAST_VOLUME_NM3 * np.arange(len(volumes))) / np.cumsum(volumes)[::-1]
    enough = factors * volumes[::-1] >= LEAST_VOLUME_NM3
    enough[-1] = True
    # As few as possible are.
    return np.maximum(factors[enough.argmax()] * volumes, LEAST_VOLUME_NM3)


@dataclass
class Budget:
    """Voxels of mitochondria wanted so far, those placed, in how many, and those that may still be missing for now."""

    wanted: float
    placed: int = 0
    count: int = 0
    slack: float = 0.0

    def spend(self, voxels: int) -> None:
        """Count a mitochondrion of so many voxels; none if there are 0."""
        self.placed += voxels
        self.count += voxels > 0

    def warn_if_missed(self, voxels: int, count: int | None) -> None:
        """Say so if what was placed in so many voxels is less than was wanted, or not the number asked for."""
        if self.placed < (1 - _MISSED) * self.wanted:
            logger.warning(
                "Mitochondria fill %.3g %% of the volume, %.3g %% were wanted: no neuron has room for another one.",
                100 * self.placed / voxels,
                100 * self.wanted / voxels,
            )
        if count and abs(self.count - count) > max(_MISSED * count, 1):
            logger.warning(
                "%d mitochondria make up the share, %d were wanted: shapes or room of that size were lacking.",
                self.count,
                count,
            )

    @property
    def left(self) -> float:
        """Voxels that may still be placed."""
        return (1 + _TOLERANCE) * self.wanted - self.placed

    @property
    def is_met(self) -> bool:
        """Whether enough is placed."""
        return self.placed >= (1 - _TOLERANCE) * self.wanted - self.slack
