"""Templates: signatures of a library that may be drawn in a volume, their sizes, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .library import LEAST_VOLUME_NM3, Signature, SignatureLibrary
from .plan import Wanted

#: Log-scale tolerance of the axis-length ratio. Published: .35 +- .05; here each template brings its own ratio.
_RATIO_SPREAD = 0.35
#: Log-scale tolerance of a template's volume and height, once scaled, against those that are wanted.
_LIKENESS = 0.25
_SCALE_JITTER = (0.92, 1.08)
#: A template may be drawn up to this size.
_MAX_SCALE = 1.25
#: A template may be drawn down to this size, and at last, where nothing else helps, to the second one, but then not
#: below the volume of the smallest template; clipping and refinement may still take a part of that.
MIN_SCALE, LAST_SCALE = 0.6, 0.35


@dataclass(frozen=True, eq=False)
class Templates:
    """Templates of a library, and per template: volume in voxels, axes in nm and ratio to the host of its widest
    section, height in nm, largest minor axis, smallest sensible size."""

    signatures: tuple[Signature, ...]
    volume: np.ndarray
    major: np.ndarray
    minor: np.ndarray
    ratio: np.ndarray
    height: np.ndarray
    widths: np.ndarray
    least_scale: np.ndarray

    @classmethod
    def of(cls, library: SignatureLibrary, depth: int, voxel_nm: Sequence[float]) -> Templates:
        signatures = library.templates_for(depth * voxel_nm[0])
        widest = [s.widest for s in signatures]
        axes = np.array([s.axes[i] for s, i in zip(signatures, widest, strict=True)])
        return cls(
            signatures,
            np.array([s.volume_nm3 for s in signatures]) / float(np.prod(voxel_nm)),
            axes[:, 0],
            axes[:, 1],
            np.array([s.host_ratios[i] for s, i in zip(signatures, widest, strict=True)]),
            np.array([s.z_extent_nm for s in signatures]),
            np.array([s.axes[:, 1].max() for s in signatures]),
            np.clip(np.cbrt([LEAST_VOLUME_NM3 / s.volume_nm3 for s in signatures]), LAST_SCALE, MIN_SCALE),
        )

    def needs(self, scale: np.ndarray) -> np.ndarray:
        """Depth in nm that the centre of each template needs at such a scale."""
        return np.asarray(0.8 * scale * self.minor / 2)

    @property
    def most_depth_nm(self) -> float:
        """Depth that the centre of no section of any template exceeds in its need."""
        return _MAX_SCALE * float(self.widths.max()) / 2

    @property
    def least_need_nm(self) -> float:
        """Depth that the centre of some template needs at the smallest size at which it may be drawn."""
        return float(self.needs(self.least_scale).min())

    @property
    def most_rise_nm(self) -> float:
        """Height, over its widest section or below it, that no template exceeds."""
        return _MAX_SCALE * max(max(s.widest + 1, len(s) - s.widest) * s.pitch_z_nm for s in self.signatures)

    def matching(self, wanted: Wanted) -> Choice:
        """Each template scaled to the volume wanted, the likelier the more alike it then is."""
        scale = np.clip(np.cbrt(wanted.volume / self.volume), self.least_scale, _MAX_SCALE)
        off = np.log([scale**3 * self.volume / wanted.volume, scale * self.height / wanted.height_nm]) / _LIKENESS
        unlike = (off**2).sum(axis=0)
        return Choice(self, scale, np.exp(-0.5 * (unlike - unlike.min())))

    def filling(self, room_left: float, least_scale: float, rng: np.random.Generator) -> Choice:
        """Each template at a random scale from the least one on; rather a large one drawn smaller than a crowd."""
        scale = np.minimum(np.cbrt(room_left / self.volume), 1.0) * rng.uniform(*_SCALE_JITTER)
        scale *= rng.uniform(least_scale, 1.0)
        fits = scale >= np.maximum(self.least_scale, least_scale)
        return Choice(self, scale, np.where(fits, self.volume * scale**3, 0))


@dataclass(frozen=True, eq=False)
class Choice:
    """Templates to choose from, their scales and weights."""

    templates: Templates
    scale: np.ndarray
    weight: np.ndarray

    @property
    def _likely(self) -> np.ndarray:
        return (self.weight > 0) & (self.weight >= 0.05 * self.weight.max())

    @cached_property
    def least_depth_nm(self) -> float:
        """Depth that the least demanding of the likely templates needs; infinite if there is none."""
        return float(self.templates.needs(self.scale)[self._likely].min(initial=np.inf))

    @cached_property
    def most_depth_nm(self) -> float:
        """Depth that the centre of no section of a likely template exceeds in its need."""
        return float((self.scale * self.templates.widths)[self._likely].max() / 2)

    def choose(self, host_major_nm: float, depth_nm: float, rng: np.random.Generator) -> tuple[Signature, float] | None:
        """Template and its scale for a neuron's cross-section, by the ratio of their axes; None if none fits."""
        templates = self.templates
        fits = (self.weight > 0) & (templates.needs(self.scale) <= depth_nm)
        if not fits.any():
            return None
        off = np.log(templates.major * self.scale / host_major_nm / templates.ratio) / _RATIO_SPREAD
        # The best of those that fit keeps its weight however far all of them are from their ratio.
        weight = np.where(fits, self.weight * np.exp(-0.5 * (off**2 - (off[fits] ** 2).min())), 0)
        if not weight.sum():
            return None
        chosen = int(rng.choice(len(weight), p=weight / weight.sum()))
        return templates.signatures[chosen], float(self.scale[chosen])
