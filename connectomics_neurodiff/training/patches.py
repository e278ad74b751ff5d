"""Training patches: image, affinities and weights, drawn from real and synthetic volumes in an exact ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..affinities import affinities_from_labels
from ..errors import LabelTypeError, MissingInput, ShapeMismatch, ValueRangeError
from ..geometry import is_anisotropic
from ..pairs import is_synthetic
from ..seeding import rng_for
from ..volume import Volume
from .augmentation import AugmentOptions, augment
from .auxiliary import AuxiliaryTargets, long_range_affinities, shape_descriptors
from .pose import apply_pose, draw_pose, source_box

#: Suits serial sections.
DEFAULT_AUGMENTATION = AugmentOptions()
NO_AUXILIARY_TARGETS = AuxiliaryTargets()


@dataclass(frozen=True)
class _Annotated:
    """A volume ready for training: image float32 and reliability in [0, 1], label uint32; (z, y, x) in memory."""

    image: np.ndarray
    label: np.ndarray
    reliability: np.ndarray | None = None


class AffinityPatches:
    """Endless training patches for affinities; item i is a pure function of (seed, i).

    Parameters
    ----------
    real : sequence of Volume
        Annotated volumes with image and label. All of the annotated area is used, up to the outermost voxel.
    synthetic : sequence of Volume
        Synthetic pairs; may be empty if `ratio` is 0.
    reliability : sequence of (array or None)
        One per synthetic volume, (z, y, x) in [0, 1], by which the loss of its edges is weighted; empty: no weights.
    patch : sequence of 3 ints
        Shape of a patch, voxels (z, y, x); volumes may be smaller (the image is reflected, the rest has weight 0).
    seed : int
        Seed of the run.
    ratio : float
        Synthetic : real, exact over any stretch of samples (:func:`connectomics_neurodiff.pairs.is_synthetic`).
    synthetic_until : int, optional
        Number of the sample from which on all are real.
    augment : AugmentOptions
        Probabilities of the augmentations; the default is for serial sections.
    label_erosion : int
        Width in voxels of the band that neurons in contact lose on each side before affinities are taken, so that
        affinities are 0 on a membrane, not only between two voxels. 0 for labels that leave the membrane free; 1 for
        labels that fill all space. In the plane for sections at least twice as thick as a pixel, else in 3D. Processes
        thinner than three voxels vanish from the target.
    largest_weight : float
        Bound on the class balancing weight; at least 1.
    auxiliary : AuxiliaryTargets
        What is learnt beside the affinities of direct neighbours; nothing by default.

    Raises
    ------
    MissingInput
        If there is no real volume, or none synthetic though `ratio` > 0, or a volume lacks image or label.
    ShapeMismatch, LabelTypeError, ValueRangeError
        If a volume or an argument is not as described.

    Notes
    -----
    A volume is drawn in proportion to its voxels, a position uniformly among all. Affinities are computed after
    the augmentation: a flipped edge belongs to the other voxel, so flipping affinities would be wrong by one.
    """

    def __init__(
        self,
        real: Sequence[Volume],
        synthetic: Sequence[Volume],
        *,
        reliability: Sequence[np.ndarray | None] = (),
        patch: Sequence[int],
        seed: int,
        ratio: float,
        synthetic_until: int | None = None,
        augment: AugmentOptions = DEFAULT_AUGMENTATION,
        label_erosion: int = 0,
        largest_weight: float = 10.0,
        auxiliary: AuxiliaryTargets = NO_AUXILIARY_TARGETS,
    ) -> None:
        if len(patch) != 3 or min(patch) < 1:
            raise ValueRangeError(f"A patch has three sizes >= 1, (z, y, x). Got {tuple(patch)}.")
        if label_erosion < 0:
            raise ValueRangeError(f"label_erosion must be >= 0 voxels. Got {label_erosion}.")
        if largest_weight < 1:
            raise ValueRangeError(f"largest_weight must be >= 1. Got {largest_weight}.")
        if not real:
            raise MissingInput("Training needs at least one real volume. Got none.")
        is_synthetic(0, ratio)  # refuses a ratio that is not one
        if ratio > 0 and not synthetic:
            raise MissingInput(f"A ratio of {ratio:g} synthetic : real needs synthetic volumes. Got none.")
        self.patch = (int(patch[0]), int(patch[1]), int(patch[2]))
        self.seed = seed
        self.ratio = ratio
        self.synthetic_until = synthetic_until
        self.augment = augment
        self.largest_weight = largest_weight
        self.auxiliary = auxiliary
        self.voxel_nm = real[0].voxel_nm
        self._real = [_prepare(volume, label_erosion) for volume in real]
        if reliability and len(reliability) != len(synthetic):
            raise ShapeMismatch(f"{len(synthetic)} synthetic volumes need as many maps. Got {len(reliability)}.")
        maps = reliability or [None] * len(synthetic)
        mixed = zip(synthetic, maps, strict=True) if ratio > 0 else ()
        self._synthetic = [_prepare(volume, label_erosion, reliable) for volume, reliable in mixed]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` >= 0.

        Returns
        -------
        dict
            image (1, z, y, x) in [0, 1]; affinity (3, z, y, x), 0 or 1; weight (3, z, y, x) >= 0; all float32. With
            long-range affinities as further channels of affinity and weight. With shape descriptors also shape
            (10, z, y, x) in [0, 1] and shape_weight (1, z, y, x), 1 inside neurons, else 0.
        """
        rng = rng_for(self.seed, "affinity patch", index)
        image, label, known = self._draw(index, rng)
        image, label, known = augment(image, label, known, rng, self.augment)
        # The plane in front of each axis was only there to know the first edges.
        inner = (slice(None), slice(1, None), slice(1, None), slice(1, None))
        affinity, usable = affinities_from_labels(label), known_edges(known)
        if self.auxiliary.long_range:
            far = long_range_affinities(label, known, self.auxiliary.long_range)
            affinity, usable = np.concatenate([affinity, far[0]]), np.concatenate([usable, far[1]])
        affinity = affinity[inner].astype(np.float32)
        sample = {
            "image": np.array(image[None][inner], order="C"),
            "affinity": affinity,
            "weight": balanced_weights(affinity, usable[inner], self.largest_weight),
        }
        if self.auxiliary.shape_sigma_nm:
            shape = shape_descriptors(label, self.voxel_nm, self.auxiliary.shape_sigma_nm)
            sample["shape"] = np.array(shape[inner], order="C")
            sample["shape_weight"] = np.array(((label > 0) * known)[None][inner], dtype=np.float32, order="C")
        return sample

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, label and known of a random place in a random pose, one plane larger than the patch in front."""
        volumes = self._synthetic if is_synthetic(index, self.ratio, self.synthetic_until) else self._real
        sizes = np.array([volume.image.size for volume in volumes], dtype=float)
        volume = volumes[int(rng.choice(len(volumes), p=sizes / sizes.sum()))]
        options = self.augment
        pose = draw_pose(rng, flip=options.flip, transpose=options.transpose, rotate=options.rotate)
        depth, height, width = self.patch
        extent = (depth, width, height) if pose.exchange_yx else self.patch
        z, y, x = (
            int(rng.integers(min(0, n - e), max(0, n - e) + 1)) for n, e in zip(volume.image.shape, extent, strict=True)
        )
        box = source_box((z, y, x), self.patch, pose)
        crop = read_crop(volume.image, volume.label, *box, reliability=volume.reliability)
        image, label, known = (apply_pose(array, pose) for array in crop)
        return image, label, known


def read_crop(
    image: np.ndarray,
    label: np.ndarray,
    start: Sequence[int],
    shape: Sequence[int],
    *,
    reliability: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box that may reach outside the volume.

    Parameters
    ----------
    image, label : numpy.ndarray
        (z, y, x).
    start, shape : sequence of 3 ints
        First voxel, possibly negative, and extent.
    reliability : numpy.ndarray, optional
        (z, y, x) float32 in [0, 1].

    Returns
    -------
    image, label, known : numpy.ndarray
        Of that shape. Outside the volume the image is reflected, the label 0 and `known` false. With reliability
        `known` is that, and 0 outside.
    """
    stop = [s + n for s, n in zip(start, shape, strict=True)]
    inside = tuple(slice(max(0, a), min(n, b)) for a, b, n in zip(start, stop, image.shape, strict=True))
    margin = [(part.start - a, b - part.stop) for part, a, b in zip(inside, start, stop, strict=True)]
    known = np.ones(image[inside].shape, dtype=bool) if reliability is None else reliability[inside]
    if not any(low or high for low, high in margin):
        return image[inside], label[inside], known
    return np.pad(image[inside], margin, mode="reflect"), np.pad(label[inside], margin), np.pad(known, margin)


def known_edges(known: np.ndarray) -> np.ndarray:
    """The smaller value of both ends of each edge (3, z, y, x), in the type of `known`: whether both are annotated.

    0 on the first plane of each channel's axis.
    """
    edges = np.zeros((3, *known.shape), dtype=known.dtype)
    np.minimum(known[1:], known[:-1], out=edges[0, 1:])
    np.minimum(known[:, 1:], known[:, :-1], out=edges[1, :, 1:])
    np.minimum(known[:, :, 1:], known[:, :, :-1], out=edges[2, :, :, 1:])
    return edges


def balanced_weights(affinity: np.ndarray, known: np.ndarray, largest: float) -> np.ndarray:
    """Weights under which both classes of each channel count alike.

    Parameters
    ----------
    affinity : numpy.ndarray
        (c, z, y, x), 0 or 1.
    known : numpy.ndarray
        (c, z, y, x), 0 to 1: a factor of the weight.
    largest : float
        Bound on a weight.

    Returns
    -------
    numpy.ndarray
        (c, z, y, x) float32: 0.5 / share of the voxel's class among the known voxels of its channel, at most `largest`;
        times `known`.
    """
    weight = np.zeros(affinity.shape, dtype=np.float32)
    for channel in range(len(affinity)):
        total = np.count_nonzero(known[channel])
        positive = affinity[channel] > 0
        count = np.count_nonzero(positive & (known[channel] > 0))
        by_class = [min(largest, 0.5 * total / n) if n else 0.0 for n in (total - count, count)]
        weight[channel] = np.where(positive, np.float32(by_class[1]), np.float32(by_class[0])) * known[channel]
    return weight


def erode_contacts(label: np.ndarray, width: int, *, in_plane: bool) -> np.ndarray:
    """Set voxels to background that lie within `width` voxels of another neuron.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) integers, 0 = background. A border to background loses nothing: the membrane is free already.
    width : int
        Voxels, >= 0, in a square (`in_plane`) or cubic neighbourhood.
    in_plane : bool
        Whether sections are treated one by one.

    Returns
    -------
    numpy.ndarray
        Label of the same type.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    if width == 0:
        return label
    size = (1 if in_plane else 2 * width + 1, 2 * width + 1, 2 * width + 1)
    highest = maximum_filter(label, size, mode="nearest")
    # Background must not win the minimum.
    lowest = minimum_filter(np.where(label == 0, np.iinfo(label.dtype).max, label), size, mode="nearest")
    return np.where(lowest < highest, 0, label).astype(label.dtype)


def _prepare(volume: Volume, label_erosion: int, reliability: np.ndarray | None = None) -> _Annotated:
    """Check a volume and bring it into memory."""
    import fastremap

    where = volume.path or "A volume"
    if volume.image is None or volume.label is None:
        raise MissingInput(f"{where}: training needs an image and a label. Got {', '.join(volume.arrays)}.")
    image, label = np.asarray(volume.image), np.asarray(volume.label)
    if image.shape != label.shape:
        raise ShapeMismatch(f"{where}: image and label must agree. Got {image.shape} and {label.shape}.")
    if not np.issubdtype(label.dtype, np.integer):
        raise LabelTypeError(f"{where}: labels must be integers. Got {label.dtype}.")
    if reliability is not None and reliability.shape != image.shape:
        raise ShapeMismatch(f"{where}: image and reliability must agree. Got {image.shape} and {reliability.shape}.")
    image = image.astype(np.float32)
    if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN is refused too
        raise ValueRangeError(f"{where}: the image must be finite and in [0, 1]. Got {image.min()} to {image.max()}.")
    # Small consecutive ids: half the memory, and only equality matters here.
    compact, _ = fastremap.renumber(label, preserve_zero=True, in_place=False)
    compact = compact.astype(np.uint32)
    eroded = erode_contacts(compact, label_erosion, in_plane=is_anisotropic(volume.voxel_nm))
    if compact.any() and not eroded.any():
        raise ValueRangeError(
            f"{where}: label_erosion must leave something of the neurons. Got {label_erosion} voxels, nothing is left."
        )
    return _Annotated(image, eroded, reliability)
